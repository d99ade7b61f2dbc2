"""What evaluations share: the models compared, the rows of a table, differences, the printed table."""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cyclefit import UserError
from cyclefit.captioners import Captioner
from cyclefit.generators import Generator
from cyclefit.metrics.statistics import bootstrap_interval, paired_bootstrap
from cyclefit.runs import Which, load_run


def load_models(
    base: Captioner | Generator, runs: list[str] | None, checkpoint: str, which: Which
) -> dict[str, tuple[Captioner | Generator, dict]]:
    """The base model and those of the runs, by name, with their configurations; the base has none.

    Raises:
        UserError: two of them would have the same name.

    """
    models: dict[str, tuple[Captioner | Generator, dict]] = {"base": (base, {})}
    for run in runs or []:
        name = Path(run).name
        # `source` is the folder of the reference images, beside those of the models.
        if name in models or name == "source":
            raise UserError(f"the name of the run {run} is taken: rename its folder, or give each run once")
        models[name] = load_run(Path(run), checkpoint, which)
    return models


class Rows:
    """The rows of `candidates-SPLIT.jsonl`, appended to as they come: an interrupted evaluation goes on from them."""

    def __init__(self, path: Path, stamp: dict):
        self.path = path
        self.rows: list[dict] = []
        settings = path.with_suffix(".settings.json")
        if path.exists():
            if json.loads(settings.read_text()) != stamp:
                raise UserError(f"{path} was written with other settings: delete {path.parent} or choose another --out")
            complete = path.read_bytes().rpartition(b"\n")[0]  # the last line may be torn
            self.rows = [json.loads(line) for line in complete.splitlines()]
            # A batch is one write, so only its tail can be torn: samples short of candidates are done again.
            counts = defaultdict(int)
            for row in self.rows:
                counts[row["model"], row["key"]] += 1
            self.rows = [row for row in self.rows if counts[row["model"], row["key"]] == row["of"]]
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(json.dumps(stamp, indent=1))

    def done(self, model: str) -> set[str]:
        """Keys that need no more work."""
        return {row["key"] for row in self.rows if row["model"] == model}

    def append(self, rows: list[dict]) -> None:
        """Adds a batch's rows, on disk before anything else happens."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def rewrite(self) -> None:
        """Puts the rows on disk as they are now."""
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(self.path)


def progress_bar(unit: str) -> Progress:
    """A bar with counts of `unit` and times."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())


def save_sources(folder: Path, batch, side: int | None = None) -> None:
    """Saves the images of a batch that are not there yet as `KEY.png`; see `save_image`."""
    for key, image in zip(batch.keys, batch.images, strict=True):
        if not (folder / f"{key}.png").exists():
            save_image(image, folder / f"{key}.png", side)


def save_image(image: torch.Tensor, path: Path, side: int | None = None) -> None:
    """Saves an image (3, h, w) in [0, 1], its longer side at most `side` pixels if that is given."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    if side is not None:
        picture.thumbnail((side, side))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed run must not leave half a picture that the next one takes for a whole.
    partial = path.with_suffix(".partial")
    picture.save(partial, "PNG")
    partial.replace(path)


def write_json(path: Path, value) -> None:
    """Writes a file that is either whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def machine() -> str:
    """Processor, cores and GPU in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, {gpu}"


def cycle_of(config: dict, which: Which) -> dict | None:
    """The cycle a run finetuned its captioner or generator with, as its configuration has it."""
    arguments = config["model"]["init_args"]
    return arguments.get("cycle") or arguments.get({"captioner": "image_cycle", "generator": "text_cycle"}[which])


def baselines(models: dict[str, tuple], which: Which) -> tuple[list[str], list[str]]:
    """Names of the runs without and with a cycle."""
    cycle = {name: cycle_of(config, which) for name, (_, config) in models.items() if name != "base"}
    return [name for name, value in cycle.items() if value is None], [name for name, value in cycle.items() if value]


def describe_models(models: dict[str, tuple], which: Which) -> dict[str, dict]:
    """What the report says of each model."""
    return {name: _described(config, which, i) for i, (name, (_, config)) in enumerate(models.items())}


def _described(config: dict, which: Which, index: int) -> dict:
    if not config:
        return {"description": "before finetuning", "color_index": index}
    cycle = cycle_of(config, which)
    own = "finetuned with its own loss"
    if cycle is None:
        described = own
    else:
        reward = cycle.get("init_args", {}).get("reward")
        what = cycle["class_path"].rpartition(".")[2] + (
            f" ({reward['class_path'].rpartition('.')[2]})" if reward else ""
        )
        described = f"{own} and a cycle: {what}"
    return {"description": described, "steps": config["steps"], "color_index": index}


def estimate(values: list[float]) -> dict[str, float]:
    """The mean of a metric with its bootstrap interval."""
    return dict(zip(("value", "low", "high"), bootstrap_interval(values), strict=True))


def rank_curve(model: str, judge: str, metric: str, ranked: list[list[dict]]) -> dict:
    """A metric's mean by rank, of samples whose candidates are sorted by a judge, best first."""
    columns = zip(*ranked, strict=True)
    values = [{"rank": k} | estimate([row["metrics"][metric] for row in rows]) for k, rows in enumerate(columns, 1)]
    return {"model": model, "selection": judge, "metric": metric, "values": values}


def difference(metric: str, a: str, b: str, chosen: dict[str, list[dict]]) -> dict:
    """Paired bootstrap of a metric of two selections, whose rows are of the same samples in the same order."""
    first, second = ([row["metrics"][metric] for row in chosen[name]] for name in (a, b))
    value, low, high, p = paired_bootstrap(first, second)
    relative = value / np.mean(second) if np.mean(second) else 0.0
    return {"metric": metric, "a": a, "b": b, "value": value, "low": low, "high": high, "p": p} | {
        "relative": float(relative)
    }


def outcome_of(difference: dict) -> tuple[bool | None, str]:
    """Whether a difference says that the cycle helped, and how the verdict begins."""
    if difference["low"] > 0:
        return True, "The cycle helped"
    if difference["high"] < 0:
        return False, "The cycle hurt"
    return None, "The cycle made no difference that these images can show"


def print_results(metrics: dict, columns: dict[str, Callable[[dict], str]], names: int, unit: str = "images") -> None:
    """Prints the table of every split of `unit`, `names` columns of names first, and the verdict."""
    console = Console()
    console.width = max(console.width, 140)
    for split, result in metrics["splits"].items():
        table = Table(title=f"{split}: {result['num_images']} {unit}")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < names else "right")
        for row in result["rows"]:
            table.add_row(*[cell(row) for cell in columns.values()])
        console.print(table)
    if "verdict" in metrics:
        console.print(f"[bold]{metrics['verdict']['sentence']}[/bold]")
