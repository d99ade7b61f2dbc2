"""What a run is, how far it is, what it measured last, and what to do next: `cyclefit status RUN`."""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from cyclefit import UserError
from cyclefit.config.paths import found, is_path
from cyclefit.config.settings import Problem, class_named, parameters
from cyclefit.config.start import resolve_configs
from cyclefit.config.start import run as run_command
from cyclefit.files import check_out_file
from cyclefit.models import Captioner, Generator, Scorer
from cyclefit.progress import in_words, truth_first
from cyclefit.report.page import is_page
from cyclefit.report.runs import write_page
from cyclefit.runs import ENDED, holder, read_checkpoint, read_config, saved

PARTS = {"captioner": Captioner, "generator": Generator, "scorer": Scorer, "held_out": Scorer}
LEARNERS = {"captions": "captioner", "images": "generator"}
"""What is finetuned, by what is evaluated of it."""
KINDS = {"CaptionerFinetune": ["captions"], "GeneratorFinetune": ["images"]}
OWN = ("trainable", "label_smoothing", "batch_size", "steps", "guidance_scale", "random_weights")
"""Settings of a run's models that an evaluation has its own values for, beside those of adapters."""


@dataclass
class Status:
    """What the files in a run's folder say."""

    folder: Path
    config: dict
    metrics: dict[str, dict[int, float]]
    """Logged values by name and step."""
    logged: float | None
    """When the last of them was written, in seconds since 1970."""
    checkpoints: dict[str, str]
    """What is known of each, by the name of its file."""
    step: int
    state: str

    @property
    def name(self) -> str:
        """The folder's."""
        return Path(os.path.abspath(self.folder)).name

    @property
    def model(self) -> dict:
        """The settings of the finetuning."""
        return self.config["model"]["init_args"]

    @property
    def kinds(self) -> list[str]:
        """`captions` if it finetunes a captioner, `images` if a generator."""
        both = [kind for kind, part in LEARNERS.items() if self.model.get(part)]
        return KINDS.get(_short(self.config["model"]), both)

    @property
    def cycles(self) -> dict[str, dict]:
        """The cycles by the names of their settings; none in a run with its own loss alone."""
        return {key: of for key, of in self.model.items() if key.endswith("cycle") and of}

    @property
    def planned(self) -> int | None:
        """The number of steps it is to take, if it is limited by steps."""
        steps = self.config["trainer"]["max_steps"]
        return steps if steps and steps > 0 else None

    @property
    def progress(self) -> str:
        """`step 120 of 500`."""
        return f"step {self.step}" + (f" of {self.planned}" if self.planned else "")

    @property
    def measured(self) -> dict[str, float]:
        """The results of the last validation, truth first."""
        steps = {name: max(by_step) for name, by_step in self.metrics.items() if name.startswith("val/")}
        last = max(steps.values(), default=0)
        of_last = {name.removeprefix("val/"): self.metrics[name][last] for name, at in steps.items() if at == last}
        return truth_first(of_last)


def is_run(folder: Path) -> bool:
    """Whether a folder contains a run that has taken a step."""
    with suppress(OSError, UserError, KeyError, TypeError):
        config = read_config(folder)
        return isinstance(config["model"]["init_args"], dict) and "max_steps" in config["trainer"]
    return False


def read(folder: Path) -> Status:
    """The status of a run, from its folder alone; nothing in it is changed."""
    config, metrics, logged = read_config(folder), {}, None
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a line that a kill has cut off
            row = json.loads(line)
            logged, step = row.pop("time", logged), row.pop("step")
            for name, value in row.items():
                metrics.setdefault(name, {})[step] = value
    checkpoints, steps = {}, []
    for path in [*saved(folder), folder / "checkpoints" / "best.ckpt"]:
        if path.is_file():
            try:
                step = read_checkpoint(path, verify=False)["global_step"]
                checkpoints[path.name] = f"step {step}, {_date(path.stat().st_mtime)}"
                steps.append(step)
            except (UserError, OSError) as error:
                checkpoints[path.name] = str(error)
    # A row has the number of the step before it is counted.
    steps += [1 + max(by_step) for by_step in metrics.values()]
    status = Status(folder, config, metrics, logged, checkpoints, max(steps, default=0), "")
    ended = folder / ENDED
    if process := holder(folder):
        status.state = f"running: {process}"
    elif ended.is_file():
        status.state = ended.read_text().strip()
    elif status.planned and status.step >= status.planned:
        status.state = "finished"
    else:
        status.state = "interrupted: its process was killed"
    return status


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _short(described: dict) -> str:
    return described.get("class_path", "").rpartition(".")[2]


def _words(described: dict) -> str:
    """A model or a cycle: its class, weights, and reward."""
    arguments = described.get("init_args") or {}
    words = [_short(described), *(str(arguments[key]) for key in ("model", "pretrained") if arguments.get(key))][:2]
    if arguments.get("weight") is not None:
        words.append(f"weight {arguments['weight']}")
    if arguments.get("reward"):
        words.append(f"reward {_short(arguments['reward'])}")
    return ", ".join(words)


def facts(status: Status) -> dict[str, str]:
    """What is known of a run, in words, by what it is about."""
    data, loss = status.config.get("data", {}), {} if status.cycles else {"cycle": "none, its own loss alone"}
    known = {"config": f"{status.folder / 'config.yaml'}, {_short(status.config['model'])}"}
    known |= {name: _words(status.model[name]) for name in PARTS if status.model.get(name)}
    known |= {name.replace("_", " "): _words(of) for name, of in status.cycles.items()} | loss
    known |= {"data": str(data.get("train"))}
    known |= {"progress": f"{status.progress}, {status.state}"}
    if status.logged:
        known["last logged"] = _date(status.logged)
    known |= {name: of for name, of in status.checkpoints.items()}
    if status.measured:
        known["last validation"] = in_words(status.measured)
    return known


# ---- commands


def commands(status: Status) -> dict[str, str]:
    """What can be done with a run, and the command of each."""
    folder, made = relative(status.folder), {}
    parent = folder.parent
    finished = status.state == "finished"
    if not status.state.startswith("running"):
        train = ["python", "train.py", "--config", folder / "config.yaml", "--runs", parent, "--name", status.name]
        train += ["--ckpt_path", "last" if status.checkpoints else "auto"]
        if not finished:
            made["continue"] = _joined(train)
        elif status.planned:
            made["train for longer"] = _joined([*train, f"--trainer.max_steps={2 * status.planned}"])
    if not status.checkpoints:
        return made
    for kind in status.kinds:
        config, overrides = _evaluation(status, kind)
        command = ["python", "evaluate.py", kind, "--config", config, f"--runs={json.dumps([str(folder)])}"]
        made[f"evaluate {kind}"] = _joined([*command, f"--out={parent / f'{status.name}-{kind}'}", *overrides])
    others = sorted(parent.glob("*/config.yaml"))
    compare = ["python", "evaluate.py", "compare"]
    if len(others) > 8:
        every = f"{shlex.quote(str(parent))}/*"
    else:
        alike = {path.parent: read_config(path.parent) for path in others if is_run(path.parent)}
        alike = {path: of for path, of in alike.items() if _short(of["model"]) == _short(status.config["model"])}
        every = _joined(sorted(alike, key=lambda path: (_has_cycle(alike[path]), path.name)))  # the baseline first
    made["compare"] = " ".join([_joined(compare), every, _joined([f"--out={parent / 'comparison'}"])])
    for kind in status.kinds:
        part = LEARNERS[kind]
        cls = class_named(status.model[part]["class_path"], (PARTS[part],), part)
        formats = getattr(cls, "formats", {})
        for form, suffix in (formats if isinstance(formats, Mapping) else {"diffusers": ""}).items():
            out = parent / f"{status.name}-{form}{suffix}"
            made[f"export the {part}"] = _joined(
                ["python", "-m", "cyclefit.export", folder, "--format", form, "--out", out]
            )
    return made


def relative(folder: Path) -> Path:
    """A folder's path from the working directory, ending in its name."""
    folder = Path(os.path.abspath(folder))
    return Path(os.path.relpath(folder.parent)) / folder.name


def _joined(words: list) -> str:
    return shlex.join(map(str, words))


def _has_cycle(config: dict) -> bool:
    return any(of for key, of in config["model"]["init_args"].items() if key.endswith("cycle"))


def _evaluation(status: Status, kind: str) -> tuple[str, list[str]]:
    """The config of an evaluation of the run, and the arguments that give it the run's models."""
    miniature = any("miniature/weights" in str(of) for of in status.model.values())
    name = {"captions": "evaluate", "images": "evaluate_images"}[kind] if miniature else f"evaluate_{kind}"
    name, settings = f"{'miniature_' * miniature}{name}.yaml", {}
    for path in map(Path, resolve_configs(["--config", name])[1::2]):
        settings = _merged(settings, yaml.safe_load(path.read_text()), path.parent)
    overrides = []
    for part, base in PARTS.items():
        if status.model.get(part) and settings.get(part):
            overrides += _overrides(part, base, status.model[part], settings[part])
    size = status.config.get("data", {}).get("image_size")
    return name, overrides + ([f"--image_size={size}"] if size and size != settings.get("image_size") else [])


def _merged(a, b, folder: Path):
    """Settings `b` of a yaml in a folder on top of `a`."""
    if isinstance(b, dict):
        a = a if isinstance(a, dict) else {}
        return a | {key: _merged(a.get(key), value, folder) for key, value in b.items()}
    return found(b, folder) if isinstance(b, str) and is_path(b) else b


def _overrides(part: str, base: type, own: dict, given: dict) -> Iterator[str]:
    """Arguments that make a model of an evaluation that of the run."""
    cls, path = class_named(own["class_path"], (base,), part), own["class_path"]
    short = _short(own) if path.startswith("cyclefit.") else path
    if short != given["class_path"]:
        yield f"--{part}={short}"
    known = {} if isinstance(cls, Problem) else parameters(cls)[0]
    defaults = {name: parameter.default for name, parameter in known.items()} | given.get("init_args", {})
    for name, value in (own.get("init_args") or {}).items():
        if name in defaults and name not in OWN and not name.startswith("lora") and value != defaults[name]:
            yield f"--{part}.{name}={value if isinstance(value, str) else json.dumps(value)}"


# ---- output


def show(statuses: list[Status], console: Console) -> None:
    """Prints one run with its commands, or a line for each of several."""
    if len(statuses) > 1:
        table = Table("run", "finetunes", "cycle", "progress", "state", "last validation")
        for row in map(line, statuses):
            table.add_row(*row.values())
        console.print(table, markup=False)
        return
    (status,) = statuses
    grid = Table.grid(padding=(0, 2))
    for name, text in facts(status).items():
        grid.add_row(name, text)
    console.print(status.name, style="bold", markup=False)
    console.print(grid, markup=False)
    for name, command in commands(status).items():
        console.print(f"\n{name}:", style="bold", markup=False)
        console.print(command, soft_wrap=True, highlight=False, markup=False)


def line(status: Status) -> dict[str, str]:
    """A run as a row of a table."""
    return {
        "run": status.name,
        "finetunes": " and ".join(LEARNERS[kind] for kind in status.kinds),
        "cycle": "; ".join(map(_words, status.cycles.values())) or "none",
        "progress": status.progress,
        "state": status.state[:80],
        "last validation": in_words(dict(list(status.measured.items())[:3])),
    }


def main(arguments: list[str]) -> int:
    """`cyclefit status RUN [--html]`, of one run or of a folder of runs."""
    parser = argparse.ArgumentParser(
        prog="cyclefit status", description="Says what a run is, how far it is, and what to do with it next."
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of several")
    parser.add_argument("--html", action="store_true", help="also write index.html with the learning curves into it")
    options = parser.parse_args(arguments)
    folder = options.run
    folders = [folder] if is_run(folder) else [path.parent for path in sorted(folder.glob("*/config.yaml"))]
    statuses = [read(one) for one in folders if is_run(one)]
    if not statuses:
        if process := holder(folder):
            raise UserError(f"{folder} has no finished step yet: it is in use by {process}")
        what = "is neither a run nor a folder of runs" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} {what}: name a folder that train.py has written, such as runs/NAME")
    console = Console()
    console.width = max(console.width, 140)
    show(statuses, console)
    if options.html:
        page = folder / "index.html"
        check_out_file(page, is_page, "page written by this command")
        title, curves = Path(os.path.abspath(folder)).name, {status.name: status.metrics for status in statuses}
        if len(statuses) == 1:
            write_page(page, title, facts(statuses[0]), commands(statuses[0]), [], curves)
        else:
            write_page(page, title, {}, {}, list(map(line, statuses)), curves)
        print(f"page: {page}")
    return 0


if __name__ == "__main__":
    run_command(main)
