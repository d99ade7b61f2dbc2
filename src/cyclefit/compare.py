"""One table of several runs: `python -m cyclefit.compare runs/A runs/B ... [--group NAME] [--out FILE.csv]`."""

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Column, Table

from cyclefit import UserError
from cyclefit.cli import run

# What names a run, says where it lies or how it was launched, and not what it trained.
APART = ("name", "group", "runs", "ckpt_path", "trainer.default_root_dir")


def settings(config: dict, prefix: str = "") -> dict:
    """A configuration as one level of dotted names; a class stands as its short name, under the name of its place."""
    found = {}
    for key, value in config.items():
        name = prefix.removesuffix(".") if key == "class_path" else f"{prefix}{'' if key == 'init_args' else key}"
        if key == "class_path":
            found[name] = str(value).rpartition(".")[2]
        elif isinstance(value, dict):
            found |= settings(value, name if key == "init_args" else f"{name}.")
        else:
            found[name] = value
    return found


def differences(configs: list[dict]) -> list[dict]:
    """The settings of each run that not all runs share; one that only some runs have counts by its values in those."""
    flat = [{k: v for k, v in settings(config).items() if k not in APART} for config in configs]
    names = dict.fromkeys(name for row in flat for name in row)
    differ = [name for name in names if len({json.dumps(row[name]) for row in flat if name in row}) > 1]
    return [{name: row[name] for name in differ if name in row} for row in flat]


def read_metrics(path: Path) -> tuple[dict[str, list[float]], float]:
    """Every metric's values in the order of their steps, and the seconds trained, queues and pauses left out.

    A step that was trained twice, because its first time was never saved, counts by its second. Lines that a kill has
    cut off are passed over.

    """
    values: dict[str, dict[int, float]] = {}
    seconds, before = 0.0, None
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        before = row.pop("started", before)
        now, step = row.pop("time"), row.pop("step")
        seconds += now - (now if before is None else before)
        before = now
        for name, value in row.items():
            values.setdefault(name, {})[step] = value
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in values.items()}, seconds


def read_run(folder: Path) -> dict:
    """What the table says of a run.

    Raises:
        UserError: the folder holds no run, or one that has trained and saved nothing yet, or a broken file.

    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        metrics, seconds = read_metrics(folder / "metrics.jsonl")
        # Memory-mapped: of the weights nothing is read.
        state = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", mmap=True, weights_only=True)
        steps, planned = state["global_step"], config["trainer"]["max_steps"]
    except FileNotFoundError as missing:
        raise UserError(f"{folder}: no {Path(missing.filename).name}") from None
    except Exception as error:  # yaml, json and torch raise whatever broken bytes lead to
        raise UserError(f"{folder}: cannot be read ({type(error).__name__})") from None
    return {"folder": folder, "config": config, "metrics": metrics, "seconds": seconds, "steps": steps,
            "planned": planned}  # fmt: skip


def shown(metrics: dict) -> list[str]:
    """CIDEr and the image similarity of the round trip, one of which `best.ckpt` is the highest of."""
    return [name for name in metrics if name == "val/CIDEr" or name.startswith("val/image_similarity/")]


def rows(runs: list[dict]) -> list[dict]:
    """One flat row for each run."""
    different = differences([run["config"] for run in runs])
    measured = dict.fromkeys(name for run in runs for name in shown(run["metrics"]))
    made = []
    for found, differs in zip(runs, different, strict=True):
        row = {"run": found["folder"].name, "group": found["config"].get("group") or "", **differs}
        row |= {"steps": found["steps"], "planned": found["planned"], "seconds": round(found["seconds"], 1)}
        for name in measured:
            values = found["metrics"].get(name, [None])
            row |= {f"{name} best": max(values, key=lambda v: v or 0), f"{name} last": values[-1]}
        made.append(row)
    return made


def show(table: list[dict], different: list[str]) -> Table:
    """The rows as a rich table, what differs in one column."""
    drawn = Table("run", "group", Column("differs in", overflow="fold"), Column("steps", no_wrap=True), "seconds")
    measured = [name for name in table[0] if name.startswith("val/")]
    for name in measured:
        drawn.add_column(name.removeprefix("val/"), justify="right", no_wrap=True)
    for row in table:
        differs = "\n".join(f"{name}={row[name]}" for name in different if name in row)
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in measured]
        drawn.add_row(row["run"], row["group"], differs, f"{row['steps']}/{row['planned']}", f"{row['seconds']:.0f}",
                      *cells)  # fmt: skip
    return drawn


def main(arguments: list[str]) -> int:
    """Compares; exit status 0 also where some of the runs are unfinished or broken, which are named.

    Raises:
        UserError: there is no run to compare.

    """
    parser = argparse.ArgumentParser(prog="python -m cyclefit.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--group", help="only the runs of this group")
    parser.add_argument("--out", type=Path, help="a CSV file of the same")
    options = parser.parse_args(arguments)
    found, broken = [], []
    for folder in dict.fromkeys(options.runs):
        try:
            found.append(read_run(folder))
        except UserError as error:
            broken.append(str(error))
    found = [run for run in found if options.group in (None, run["config"].get("group"))]
    if not found:
        raise UserError("; ".join(["there is no run to compare" + f" in group {options.group}" * bool(options.group),
                                   *broken]))  # fmt: skip
    table = rows(found)
    different = [name for name in dict.fromkeys(n for d in differences([r["config"] for r in found]) for n in d)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(show(table, different))
    for row in table:
        if row["steps"] < row["planned"]:
            console.print(f"unfinished: {row['run']}, {row['steps']} of {row['planned']} steps", highlight=False)
    for sentence in broken:
        console.print(f"left out: {sentence}", highlight=False, soft_wrap=True)
    if options.out:
        columns = list(dict.fromkeys(name for row in table for name in row))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)
    return 0


if __name__ == "__main__":
    run(main)
