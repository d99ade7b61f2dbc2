"""The model card of an export: what was trained and on what, what an evaluation measured, and under which licence."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import jinja2
import yaml

from cyclefit import UserError, report
from cyclefit.data.pack import MANIFEST
from cyclefit.data.shards import expand_shards, is_remote
from cyclefit.models.pretrained import loading
from cyclefit.models.repository import repository
from cyclefit.records import (
    COVERAGE,
    SINGLE,
    TRUTH,
    UNITS,
    Difference,
    Evaluation,
    Row,
    Split,
    joined,
    read_evaluation,
    read_settings,
)
from cyclefit.report.tables import limits, metric_names, number, reading
from cyclefit.runs import Which, versions

LIBRARIES = {"kohya": "diffusers", "blip": "transformers", "clipcap": "cyclefit"}
"""The libraries that load a format, where it does not have the library's name."""
ADAPTERS = ("diffusers", "kohya", "peft", "clipcap")
"""Formats of weights that are added to those of the base; the others contain the whole model."""

_STORE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_HIDDEN = (
    (re.compile(r"pipe:.*", re.DOTALL), "pipe:..."),
    (re.compile(r"(://)[^\s/@]*@"), r"\1"),
    (re.compile(r"(://[^\s?]+)\?[^\s'\"]*"), r"\1"),
    (re.compile(r"(?<![\w:/.])~?(?:/[^\s/'\",\[\]{}<>=]+)+/(?=[^\s/])"), ""),
)
"""Commands, credentials in addresses and their queries, local folders."""


@dataclass
class Export:
    """What is exported: the weights of one model of a run, in a format."""

    run: Path
    checkpoint: str
    which: Which
    form: str
    config: dict
    """As `read_run` gives it."""
    parameters: int
    """The number of the model's trained parameters."""
    usage: str
    """Lines of Python that load it."""

    @property
    def model(self) -> dict:
        """The settings of the model."""
        return self.config["model"]["init_args"][self.which]

    @property
    def arguments(self) -> dict:
        """The arguments of the model's class."""
        return self.model.get("init_args", {})

    @property
    def base(self) -> str | None:
        """The hub id or local folder of the weights that training began with."""
        return self.arguments.get("pretrained") or self.arguments.get("language_model")

    @property
    def base_id(self) -> str | None:
        """The base's hub id, if it has one; that of a folder in the hub's cache is in its path."""
        if self.base is None or not Path(self.base).is_dir():
            return self.base
        found = _STORE.search(f"{Path(self.base).resolve()}/")
        return found and f"{found[1]}/{found[2]}"

    @property
    def base_name(self) -> str:
        """The base as a reader elsewhere knows it."""
        return self.base_id or (Path(self.base).name if self.base else "a model without a name")


def public(value):
    """Settings or text without local folders, commands, and credentials and queries of addresses."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if isinstance(value, str):
        for hidden, shown in _HIDDEN:
            value = hidden.sub(shown, value)
    return value


def model_card(export: Export, name: str, evaluation: Path | None = None) -> str:
    """A README.md in the hub's format: a YAML header, and sections in Markdown.

    Args:
        export: the weights, their run, and the lines that load them.
        name: of the model.
        evaluation: the folder of the evaluation to report; if None, all beside the run that contain these weights.

    Raises:
        UserError: `evaluation` is not an evaluation of these weights.

    """
    from huggingface_hub import ModelCard, ModelCardData

    evaluations, terms = list(_evaluations(export, evaluation)), licence(export.base, export.arguments.get("revision"))
    results = [result for _, known, model in evaluations for result in _results(known, model)]
    adapter, config = export.form in ADAPTERS, export.config
    settings, captioner = config["model"]["init_args"], export.which == "captioner"
    cycle = settings.get("cycle") or settings.get("image_cycle" if captioner else "text_cycle")
    task = "image-text-to-text" if export.form == "transformers" else "image-to-text"
    data = ModelCardData(
        **terms,
        base_model=export.base_id,
        base_model_relation=("adapter" if adapter else "finetune") if export.base_id else None,
        library_name=LIBRARIES.get(export.form, export.form),
        pipeline_tag=task if captioner else "text-to-image",
        tags=["cyclefit", *["lora"] * (not captioner), *["cycle-consistency"] * bool(cycle)],
        datasets=hub_datasets(config["data"]) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    part = export.arguments.get("trainable") or export.arguments.get("lora")
    if isinstance(part, dict):
        part = "LoRA, " + ", ".join(f"{key} {value}" for key, value in part.items() if value is not None)
    head = takewhile(lambda line: line.startswith("# "), (export.run / "config.yaml").read_text().splitlines())
    made = {line.split(" ")[1]: public(line.removeprefix("# ")) for line in head}
    trainer = {key: value for key, value in config["trainer"].items() if value is not None}
    trainer.pop("default_root_dir", None)
    body = _template().render(
        export=export,
        name=name,
        adapter=adapter,
        kind="an image captioner" if captioner else "a text-to-image model",
        cycle=cycle,
        config=config,
        settings=settings,
        part=part,
        command=made.get("python"),
        trained_with=made.get("cyclefit"),
        versions=versions(),
        whole={"trainer": trainer, "model": config["model"], "data": config["data"]},
        evaluations=evaluations,
        terms=terms,
    )  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(report.__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "class": lambda settings: settings["class_path"].rpartition(".")[2],
        "yaml": lambda settings: yaml.safe_dump(public(settings), sort_keys=False, allow_unicode=True).strip(),
        "shards": describe_shards,
        "public": public,
        "reading": reading,
    }
    environment.globals |= {
        "units": UNITS, "metric_names": metric_names, "cell": _cell, "compared": _compared, "source": _source
    }  # fmt: skip
    return environment.get_template("card.md.j2")


def _cell(row: Row, metric: str) -> str:
    """A metric of a row with its interval."""
    estimate = row.metrics.get(metric)
    ends = estimate and limits(estimate, metric)
    return number(estimate and estimate.value, metric) + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def _compared(result: Split, name: str) -> list[Difference]:
    """The model's differences from others with the same decoding, in the facts or, where none are known, CIDEr."""
    halves = [(one, one.a.split(" · "), one.b.split(" · ")) for one in result.differences]
    own = [one for one, a, b in halves if a[0] == name and a[1:] == b[1:]]
    return [one for one in own if one.metric in (TRUTH, COVERAGE)] or [one for one in own if one.metric == "CIDEr"]


def _source(folder: Path, split: str) -> str:
    settings = read_settings(folder, split)
    return describe_shards(settings.shards) if settings else "not recorded"


def describe_shards(shards: str | list[str]) -> str:
    """The number of samples of shards and their source, as far as the manifests beside them say."""
    folders, said = defaultdict(set), []
    try:
        for url in expand_shards(shards):
            if is_remote(url):
                said.append(f"`{public(url)}`")
            else:
                folders[Path(url).parent].add(Path(url).name)
    except (FileNotFoundError, UserError):
        return f"`{public(shards)}`, which was not there any more at the time of export"
    for folder, names in folders.items():
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            samples = sum(entry["samples"] for entry in manifest["shards"] if entry["name"] in names)
            said.append(f"{samples:,} samples of `{folder.name}`, packed from: {public(manifest['source'])}")
        except (OSError, ValueError, KeyError, TypeError):
            said.append(f"{', '.join(f'`{name}`' for name in sorted(names))} in `{folder.name}`, without a manifest")
    return "; ".join(said)


def hub_datasets(settings: dict) -> list[str]:
    """Ids of the data sets on the hub that shards are read from."""
    from huggingface_hub import constants

    address = re.compile(rf"(?:hf:/|{re.escape(constants.ENDPOINT)})/datasets/([\w.-]+/[\w.-]+)")
    read = " ".join(str(settings.get(role)) for role in ("train", "unpaired", "prompts"))
    return sorted(set(address.findall(read)))


def _evaluations(export: Export, given: Path | None) -> Iterator[tuple[Path, Evaluation, str]]:
    """Evaluations of these weights, which they know by digest, and the names that they have for them."""
    digest, kind = export.config["digest"], {"captioner": "captions", "generator": "images"}[export.which]
    folders = [given] if given else sorted(path.parent for path in export.run.absolute().parent.glob("*/metrics.json"))
    for folder in folders:
        try:
            evaluation = read_evaluation(folder)
        except (FileNotFoundError, UserError) as error:
            if given:
                raise UserError(f"--evaluation {folder} cannot be read: {error}") from None
            continue
        name = next((name for name, model in evaluation.models.items() if model.digest == digest), None)
        if name and evaluation.kind == kind:
            yield folder, evaluation, name
        elif given:
            raise UserError(
                f"--evaluation {folder} has no results on {kind} of the weights in {export.run} ({export.checkpoint}): "
                f"name an evaluation of this checkpoint, run `python evaluate.py {kind}`, or leave --evaluation out"
            )


def _results(evaluation: Evaluation, name: str) -> Iterator:
    """The model's own rows for the header."""
    from huggingface_hub import EvalResult

    task = {"captions": "image-to-text", "images": "text-to-image"}[evaluation.kind]
    for split, result in evaluation.splits.items():
        for row in result.rows:
            own = row.metrics if row.model == name and row.selection == SINGLE else {}
            for metric, estimate in own.items():
                if estimate.value is not None:
                    yield EvalResult(
                        task_type=task,
                        dataset_type=split,
                        dataset_name=f"{split} ({result.num_images} {UNITS[evaluation.kind]})",
                        dataset_split=split,
                        metric_type=re.sub(r"[^a-z0-9@]+", "_", metric.lower()).strip("_"),
                        metric_name=joined(metric, row.decoding),
                        metric_value=round(float(estimate.value), 4),
                    )


def licence(base: str | None, revision: str | None = None) -> dict[str, str]:
    """`license`, `license_name` and `license_link`, as the base's own card or configuration states them; else nothing.

    They are looked up in a local folder, on the hub, or in its cache.
    """
    from huggingface_hub import ModelCard

    if base is None:
        return {}
    stated: dict = {}
    try:
        with loading("base", base):
            found = repository(base, revision)
            for name in ("config.json", "model_index.json"):
                stated |= found.read(name) or {}
            if "README.md" in found.files:
                card = ModelCard.load(found.fetch(["README.md"]) / "README.md", ignore_metadata_errors=True)
                stated |= card.data.to_dict()
    except (UserError, yaml.YAMLError):  # there is no such file to be had, or it is broken
        return {}
    return {key: stated[key] for key in ("license", "license_name", "license_link") if isinstance(stated.get(key), str)}
