"""What evaluations share: their processes, the models compared, the file of candidates, the printed table."""

import glob
import itertools
import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.table import Table

from cyclefit import UserError, records
from cyclefit.files import atomic, check_names, check_out_folder, safe_name
from cyclefit.models import Captioner, Generator
from cyclefit.runs import load_run

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def load_models(
    base: Captioner | Generator, runs: list[str] | None, checkpoint: str, kind: records.Kind
) -> dict[str, tuple[Captioner | Generator, dict]]:
    """The base model and those of the runs, by name, with their configurations; the base has none.

    Raises:
        UserError: two of them would have the same name.

    """
    models: dict[str, tuple[Captioner | Generator, dict]] = {"base": (base, {})}
    for run in runs or []:
        name = Path(os.path.abspath(run)).name
        # `source` is the folder of the reference images, beside those of the models; some systems ignore case.
        if name.casefold() in [taken.casefold() for taken in (*models, "source")]:
            raise UserError(f"the name of the run {run} is taken: rename its folder, or give each run once")
        models[name] = load_run(Path(run), checkpoint, {"captions": "captioner", "images": "generator"}[kind])
    return models


def check_out(folder: Path, kind: records.Kind | Literal["matrix"], splits: Iterable[str]) -> None:
    """Looks at the names that an evaluation writes under, before anything is loaded or written.

    Raises:
        UserError: a split's name will not do for a file, or the folder holds anything but an evaluation of this kind.

    """

    def own(folder: Path) -> bool:
        if kind == "matrix":
            return (folder / "parts").is_dir()
        # One that has not come to its end has settings alone.
        written = [folder / "metrics.json", *folder.glob("candidates-*.settings.json")]
        try:
            return {json.loads(path.read_text()).get("kind", kind) for path in written if path.exists()} == {kind}
        except (OSError, ValueError, AttributeError):
            return False

    check_names(splits, "the split name")
    check_out_folder(folder, own, f"evaluation of {kind}")


def launch(devices: int, num_nodes: int) -> "Fabric":
    """The processes of an evaluation, one for each device: started here, or by torchrun or srun.

    They share files and wait for each other; no tensors are exchanged.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    # A rank may wait for the others' last samples as long as they take.
    together = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=7))
    fabric = Fabric(devices=devices, num_nodes=num_nodes, strategy="auto" if devices * num_nodes == 1 else together)
    fabric.launch()
    return fabric


class CandidateFile:
    """The candidates of a split, appended as they come: an interrupted evaluation continues from them.

    Candidates of a model that were made with the settings it has now are kept; the others are dropped, to be made
    anew, and it is printed which. Of several ranks each one after the first writes to a file of its own until all are
    done, `candidates-SPLIT.rankR.jsonl`.
    """

    def __init__(self, folder: Path, split: str, settings: records.Settings, fabric: "Fabric"):
        self.folder, self.split, rank = folder, split, fabric.global_rank
        self.path = records.candidates_path(folder, split)
        self.own = self.path.with_name(f"{self.path.stem}.rank{rank}.jsonl") if rank else self.path
        self.candidates: list[records.Candidate] = []
        if not rank:
            folder.mkdir(parents=True, exist_ok=True)
            # What an interrupted evaluation has left, on whatever number of ranks, is gathered before it goes on; where
            # gathering itself was interrupted, a sample is in two files.
            self.gather()
            self._drop_outdated(settings)
        fabric.barrier()
        self.candidates = _whole_samples(self.path)

    def _drop_outdated(self, settings: records.Settings) -> None:
        settings.depends = json.loads(json.dumps(settings.depends))  # as it comes back from the file
        last = records.read_settings(self.folder, self.split)
        depends, before = settings.depends, last.depends if last else {}
        present = {one.model for one in self.candidates}
        outdated = sorted(model for model in present if before.get(model) != depends.get(model))
        for model in outdated:
            if model not in depends:
                print(f"{self.split}: the results of {model} are dropped: it is not among the models any more")
            elif old := before.get(model):
                changed = ", ".join(name for name, value in depends[model].items() if old.get(name) != value)
                print(
                    f"{self.split}: {model} is evaluated anew: changed since its last results: {changed or 'settings'}"
                )
            else:
                print(f"{self.split}: {model} is evaluated anew: it is not known what its last results depend on")
        if outdated:
            if kept := [model for model in depends if model in before and model not in outdated]:
                print(f"{self.split}: kept are the results of {', '.join(kept)}")
            for name in ("metrics.json", "report.html"):  # they tell of candidates that are no more
                (self.folder / name).unlink(missing_ok=True)
            self.candidates = [one for one in self.candidates if one.model not in outdated]
            self.rewrite()
        # Source images that are there are taken for the samples', and may be there before any candidate is.
        now, then = ({(of.get("images"), of.get("image_size")) for of in known.values()} for known in (depends, before))
        if last and now != then:
            for image in (self.folder / "images" / self.split / "source").glob("*.png"):
                image.unlink()
        records.write_settings(self.folder, self.split, settings)

    def done(self, model: str) -> set[str]:
        """Keys that need no more work."""
        return {one.key for one in self.candidates if one.model == model}

    def append(self, candidates: list[records.Candidate]) -> None:
        """Adds a batch's candidates, on disk before anything else happens."""
        records.append_candidates(self.own, candidates)
        self.candidates += candidates

    def gather(self) -> int:
        """Puts all ranks' candidates into the one file, each sample once; returns how many samples came twice."""
        files = [self.path, *sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*.jsonl"))]
        samples: dict[tuple, list[records.Candidate]] = {}
        found = 0
        for file in files:
            of_file = defaultdict(list)
            for one in _whole_samples(file):
                of_file[one.model, one.key].append(one)
            samples = of_file | samples
            found += len(of_file)
        self.candidates = [one for sample in samples.values() for one in sample]
        self.rewrite()
        for file in files[1:]:
            file.unlink()
        return found - len(samples)

    def merge(self, models: Iterable[str], keys: list[str]) -> None:
        """Gathers the ranks' candidates in the order of models and keys.

        Raises:
            RuntimeError: a sample is missing, was made by two ranks, or has the wrong number of candidates.

        """
        if twice := self.gather():
            raise RuntimeError(f"{twice} samples of {self.path} were made by two ranks")
        place = {name: i for i, name in enumerate(itertools.product(models, keys))}
        wanted = set(keys)  # there are more where the limit was higher before
        self.candidates = [one for one in self.candidates if one.key in wanted]
        found = {(one.model, one.key) for one in self.candidates}
        if found != place.keys():
            raise RuntimeError(f"{self.path} does not hold every sample once: {next(iter(found ^ place.keys()))}")
        self.candidates.sort(key=lambda one: place[one.model, one.key])
        self.rewrite()

    def rewrite(self) -> None:
        """Puts the candidates on disk as they are now."""
        records.write_candidates(self.path, self.candidates)


def _whole_samples(path: Path) -> list[records.Candidate]:
    """A file's candidates, without samples that are short of some because a write was cut off."""
    candidates = records.read_candidates(path)
    counts = Counter((one.model, one.key) for one in candidates)
    return [one for one in candidates if counts[one.model, one.key] == one.of]


def save_sources(folder: Path, batch, side: int | None = None) -> None:
    """Saves the images of a batch that are not there yet as `KEY.png`; see `save_image`."""
    for key, image in zip(batch.keys, batch.images, strict=True):
        path = folder / f"{safe_name(key)}.png"
        if not path.exists():
            save_image(image, path, side)


def picture(image: torch.Tensor) -> Image.Image:
    """An image (3, h, w) in [0, 1] in 8 bits."""
    return Image.fromarray((image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_image(image: torch.Tensor, path: Path, side: int | None = None, **texts: str) -> None:
    """Saves an image (3, h, w) in [0, 1] with texts, its longer side at most `side` pixels if that is given."""
    saved = picture(image)
    if side is not None:
        saved.thumbnail((side, side))
    about = PngInfo()
    for name, text in texts.items():
        about.add_text(name, text)
    with atomic(path) as partial:  # a run takes a picture that is there for a whole one
        saved.save(partial, "PNG", pnginfo=about)


def log_tables(
    tables: dict[str, list[dict]], folder: Path, summary: dict | None = None, configs: Sequence[dict] = (), **settings
) -> None:
    """Logs tables, the figures of a folder and a summary where the runs of `configs` log; to W&B if there are none.

    In W&B they are a run of their own, with `settings` of `wandb.init`; TensorBoard's are in `tensorboard/` in the
    folder. Nothing is logged to W&B if it is disabled.
    """
    from cyclefit.train.loggers import check_logger

    with_loggers = [config for config in configs if config.get("trainer", {}).get("logger") in (None, True)]
    chosen = {config.get("logger", "wandb") for config in with_loggers} if configs else {"wandb"}
    if chosen & {"tensorboard", "both"}:
        try:
            check_logger("tensorboard")
            _to_tensorboard(tables, folder, summary or {})
        except UserError as error:
            print(f"not logged to TensorBoard: {error}")
    if chosen & {"wandb", "both"}:
        _to_wandb(tables, folder, summary or {}, settings)


def _to_tensorboard(tables: dict[str, list[dict]], folder: Path, summary: dict) -> None:
    from cyclefit.train.loggers import tensorboard_logger

    logger = tensorboard_logger(folder)
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
        logger.experiment.add_text(name, "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells))
    for path in sorted((folder / "figures").glob("*.png")):
        with Image.open(path) as figure:
            pixels = np.asarray(figure.convert("RGB"))
        logger.experiment.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")
    logger.log_metrics({name: value for name, value in summary.items() if value is not None}, step=0)
    logger.finalize("success")


def _to_wandb(tables: dict[str, list[dict]], folder: Path, summary: dict, settings: dict) -> None:
    import wandb

    from cyclefit.train.loggers import wandb_mode

    mode = os.environ.get("WANDB_MODE") or wandb_mode(folder)
    if mode == "disabled":
        return
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "cyclefit"),
        name=folder.name,
        dir=folder,
        mode=mode,
        reinit="create_new",  # whatever else this process logs
        settings=wandb.Settings(silent=True),
        **settings,
    ) as run:
        for name, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            data = [[row.get(column) for column in columns] for row in rows]
            run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})
        for path in sorted((folder / "figures").glob("*.png")):
            run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        run.summary.update(summary)


def machine() -> str:
    """Processor, cores and GPU in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, {gpu}"


def cycle_of(config: dict, kind: records.Kind) -> dict | None:
    """The cycle a run finetuned its captioner or generator with, as its configuration has it."""
    arguments = config["model"]["init_args"]
    return arguments.get("cycle") or arguments.get({"captions": "image_cycle", "images": "text_cycle"}[kind])


def is_control(cycle: dict, kind: records.Kind) -> bool:
    """Whether a cycle's reward is CLIP's similarity of image and text alone, without the other model."""
    arguments = cycle.get("init_args", {})
    if kind == "captions":
        return _class_name(arguments.get("reward")) == "ImageText"
    return arguments.get("likelihood_weight") == 0 and not arguments.get("text_weight")


def _class_name(described: dict | None) -> str:
    return (described or {}).get("class_path", "").rpartition(".")[2]


def baselines(models: dict[str, tuple], kind: records.Kind) -> tuple[list[str], list[str], list[str]]:
    """Names of the runs without a cycle, with one, and with the image-text control in its place."""
    cycle = {name: cycle_of(config, kind) for name, (_, config) in models.items() if name != "base"}
    control = {name for name, value in cycle.items() if value and is_control(value, kind)}
    return (
        [name for name, value in cycle.items() if value is None],
        [name for name, value in cycle.items() if value and name not in control],
        [name for name in cycle if name in control],
    )


def describe_models(models: dict[str, tuple], kind: records.Kind) -> dict[str, records.Model]:
    """What the report says of each model."""
    described = {}
    for i, (name, (_, config)) in enumerate(models.items()):
        known = {key: config[key] for key in ("steps", "folder", "digest", "train_seconds") if key in config}
        described[name] = records.Model(_description(config, kind), i, **known)
    return described


def _description(config: dict, kind: records.Kind) -> str:
    if not config:
        return "before finetuning"
    cycle, own = cycle_of(config, kind), "finetuned with its own loss"
    if cycle is None:
        return own
    reward = _class_name(cycle.get("init_args", {}).get("reward"))
    what = _class_name(cycle) + f" ({reward})" * bool(reward)
    return f"{own} and {'the control' if is_control(cycle, kind) else 'a cycle'}: {what}"


def print_results(evaluation: records.Evaluation, columns: Iterable[tuple[str, str, int]]) -> None:
    """Prints the table of every split and the verdict; a column is its title, the metric and its decimals."""
    console = Console()
    console.width = max(console.width, 140)
    kept = {"captions": "decoding", "images": "image"}[evaluation.kind]
    for split, result in evaluation.splits.items():
        table = Table("model", kept, title=f"{split}: {result.num_images} {records.UNITS[evaluation.kind]}")
        for title in (*(title for title, _, _ in columns), "drawn", "denoised", "s"):
            table.add_column(title, justify="right")
        for row in result.rows:
            numbers = [_number(row, metric, places) for _, metric, places in columns]
            costs = f"{row.generator_calls:.0f}", f"{row.denoiser_calls:.0f}", f"{row.seconds:.3f}"
            table.add_row(row.model, _kept(row), *numbers, *costs)
        console.print(table)
    if found := evaluation.verdict:
        console.print(f"[bold]{found.sentence}[/bold]")
        for sentence in (
            found.control and found.control.sentence,
            found.changes,
            *(of.sentence for of in found.hacked),
        ):
            if sentence:
                console.print(sentence)


def _kept(row: records.Row) -> str:
    if row.selection == records.SINGLE or (row.selection == records.ORACLE and not row.decoding):
        return row.decoding or row.selection
    return ", ".join(filter(None, (row.decoding, f"best by {row.selection}")))


def _number(row: records.Row, metric: str, places: int) -> str:
    if metric not in row.metrics:
        return ""
    found = row.metrics[metric]
    interval = f" [{found.low:.0f}, {found.high:.0f}]" if metric == "CIDEr" else ""
    return f"{found.value:.{places}f}{interval}"
