"""Runs side by side: their settings, their cost, what evaluations measured, and how they differ."""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from cyclefit import UserError
from cyclefit.evaluate.analyses import difference
from cyclefit.evaluate.common import log_tables
from cyclefit.files import check_out_folder
from cyclefit.metrics.facts import counts_of
from cyclefit.metrics.statistics import seed_interval, seed_ratio_interval
from cyclefit.records import (
    COVERAGE,
    FALSE,
    GREEDY,
    NUCLEUS,
    SINGLE,
    TRUTH,
    Candidate,
    Difference,
    Evaluation,
    candidates_path,
    joined,
    read_candidates,
    read_evaluation,
    write_json,
)
from cyclefit.report.comparison import Entry, write_page
from cyclefit.report.tables import COSTS, estimates, known, reading, write_csv
from cyclefit.runs import read_config, read_run

# Settings that say what a run is called, where it is or how it was launched, not what it trained.
NAMING = ("name", "group", "logger", "runs", "ckpt_path", "trainer.default_root_dir")
SEEDS = ("seed_everything", "model.seed", "data.seed")
PRINTED = (TRUTH, COVERAGE, *FALSE.values(), "CIDEr")
"""Metrics whose differences are printed."""
DECODINGS = {"captions": (GREEDY, NUCLEUS), "images": ("",)}
"""By kind of evaluation, the decodings that give one caption or image of each input."""
FACTS = {"captions": [TRUTH, COVERAGE], "images": [TRUTH]}


@dataclass
class Run:
    """A finetuned run."""

    folder: Path
    config: dict
    metrics: dict[str, list[float]]
    """Logged values by name, in the order of their steps."""
    seconds: float
    gpu_seconds: float
    steps: int
    digests: list[str]
    """Of the last and the best trained parameters, by which evaluations know the run."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name


def compare(
    runs: list[str],
    evaluations: list[str] | None = None,
    group: str | None = None,
    out: str = "runs/comparison",
) -> int:
    """Compares runs, `compare runs/A runs/B ...`: settings, cost, quality, and differences with intervals.

    Writes `comparison.json`, `comparison.csv`, `differences.csv`, figures and `comparison.html` into `out`, and the
    same where the runs log. Runs that are unfinished or broken are named.

    Args:
        runs: folders of runs; all differences are from the first one.
        evaluations: folders that `evaluate.py captions` and `images` wrote; those beside the runs if not given.
        group: only the runs of this group; also the comparison's own in W&B.
        out: the folder of the comparison.

    """
    check_out_folder(Path(out), _is_comparison, "comparison of runs")
    found, left_out = [], []
    for folder in dict.fromkeys(map(Path, runs)):
        try:
            found.append(load(folder))
        except UserError as error:
            left_out.append(str(error))
    found = [run for run in found if group in (None, run.config.get("group"))]
    if not found:
        nothing = "there is no run to compare" + f" in group {group}" * bool(group)
        raise UserError("; ".join([nothing, *left_out]))
    names = [run.name for run in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs are called {twice}: evaluations know runs by their folder's name, so rename one")
    beside = sorted({path.parent for run in found for path in run.folder.parent.glob("*/metrics.json")})
    compared, entries = rows(found), []
    for folder in map(Path, beside if evaluations is None else evaluations):
        of_folder, outdated = read_entries(folder, found, named=evaluations is not None)
        entries += of_folder
        left_out += outdated
    folder, tables = Path(out), flat(compared, entries)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", {"runs": compared, "evaluations": entries})
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    page = write_page(compared, entries, folder)
    _print(compared, entries, left_out)
    _log(tables, folder, group, found)
    print(f"comparison: {page}")
    return 0


def _is_comparison(folder: Path) -> bool:
    try:
        return json.loads((folder / "comparison.json").read_text()).keys() == {"runs", "evaluations"}
    except (OSError, ValueError, AttributeError):
        return False


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
    flat = [{k: v for k, v in settings(config).items() if k not in NAMING} for config in configs]
    names = dict.fromkeys(name for row in flat for name in row)
    differ = [name for name in names if len({json.dumps(row[name]) for row in flat if name in row}) > 1]
    return [{name: row[name] for name in differ if name in row} for row in flat]


def read_metrics(path: Path) -> tuple[dict[str, list[float]], float, float]:
    """Every metric's values in the order of their steps, the seconds trained, and the GPU-seconds.

    Queues and pauses are left out. A step that was trained twice, because its first time was never saved, counts by its
    second. Lines that a kill has cut off are passed over.

    """
    values: dict[str, dict[int, float]] = {}
    seconds, gpu_seconds, gpus, before = 0.0, 0.0, 0, None
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        before, gpus = row.pop("started", before), row.pop("gpus", gpus)
        now, step = row.pop("time"), row.pop("step")
        passed = now - (now if before is None else before)
        seconds, gpu_seconds, before = seconds + passed, gpu_seconds + gpus * passed, now
        for name, value in row.items():
            values.setdefault(name, {})[step] = value
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in values.items()}, seconds, gpu_seconds


def load(folder: Path) -> Run:
    """Read a run.

    Raises:
        UserError: the folder contains no run, or one that has saved nothing yet, or a broken file.

    """
    try:
        config, (last, _) = read_config(folder), read_run(folder)
        digests = [last["digest"]]
        if (folder / "checkpoints" / "best.ckpt").exists():
            digests.append(read_run(folder, "best")[0]["digest"])
        return Run(folder, config, *read_metrics(folder / "metrics.jsonl"), last["steps"], digests)
    except FileNotFoundError as missing:
        raise UserError(f"{folder}: no {Path(missing.filename).name}" if missing.filename else str(missing)) from None


def rows(runs: list[Run]) -> list[dict]:
    """One flat row for each run, with CIDEr or the image similarity of the round trip, of which `best.ckpt` is best."""
    different = differences([run.config for run in runs])
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    measured = [name for name in logged if name == "val/CIDEr" or name.startswith("val/image_similarity/")]
    made = []
    for run, differs in zip(runs, different, strict=True):
        row = {"run": run.name, "group": run.config.get("group") or "", **differs, "steps": run.steps}
        row |= {"planned": run.config["trainer"]["max_steps"], "seconds": round(run.seconds, 1)}
        row |= {"GPU-hours": round(run.gpu_seconds / 3600, 3)}
        for name in measured:
            values = run.metrics.get(name, [None])
            row |= {f"{name} best": max(values, key=lambda v: v or 0), f"{name} last": values[-1]}
        made.append(row)
    return made


def conditions(configs: dict[str, dict]) -> list[list[str]]:
    """Names of runs that differ in nothing but the seed, together."""
    found: dict[str, list[str]] = {}
    for name, config in configs.items():
        same = {k: v for k, v in settings(config).items() if k not in (*NAMING, *SEEDS)}
        found.setdefault(json.dumps(same, sort_keys=True), []).append(name)
    return list(found.values())


def read_entries(folder: Path, runs: list[Run], named: bool) -> tuple[list[Entry], list[str]]:
    """What an evaluation says of the runs, an entry for each split: their rows, and their differences from the first.

    Also a sentence for each run that was trained anew since: an evaluation knows runs by name and by their weights.

    Raises:
        UserError: it was asked for (`named`) and is no evaluation, or knows none of the runs.

    """
    try:
        evaluation = read_evaluation(folder)
    except (FileNotFoundError, UserError) as error:
        if named:
            raise UserError(f"{folder} is no evaluation: its metrics.json cannot be read ({error})") from None
        return [], []
    listed = [run for run in runs if run.name in evaluation.models]
    known = [run for run in listed if evaluation.models[run.name].digest in run.digests]
    outdated = [
        f"the results of {run.name} in {folder}: they are those of other weights than {run.folder} holds; evaluate it "
        "again"
        for run in listed
        if run not in known
    ]
    if named and not known:
        nothing = f"the evaluation {folder} knows none of the runs, but {', '.join(evaluation.models)}"
        raise UserError("; ".join([nothing, *outdated]))
    return [_entry(folder, evaluation, split, known) for split in evaluation.splits if known], outdated


def _entry(folder: Path, evaluation: Evaluation, split: str, runs: list[Run]) -> Entry:
    names, kind, result = [run.name for run in runs], evaluation.kind, evaluation.splits[split]
    chosen: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in read_candidates(candidates_path(folder, split)):
        if candidate.model in names and candidate.index == 0:
            chosen[joined(candidate.model, candidate.decoding)].append(candidate)
    rows = [row for row in result.rows if row.model in names and row.selection == SINGLE]
    differences, over_seeds = [], []
    first, *others = conditions({run.name: run.config for run in runs})
    for decoding in DECODINGS[kind]:
        of_first = joined(names[0], decoding)
        sample = chosen[of_first][0]
        metrics = [m for m in sample.metrics if m not in ("BLEU-1", "BLEU-2", "BLEU-3")]
        metrics = (FACTS[kind] if sample.facts else []) + metrics
        for name in names[1:]:
            differences += [difference(metric, joined(name, decoding), of_first, chosen) for metric in metrics]
        for other in others:
            if len(other) > 1 or len(first) > 1:
                over_seeds += [_over_seeds(metric, decoding, other, first, chosen) for metric in metrics]
    models = {name: replace(evaluation.models[name], color_index=place) for place, name in enumerate(names)}
    rows = [row for row in rows if row.decoding in DECODINGS[kind]]
    return Entry(str(folder), kind, split, result.num_images, models, rows, differences, over_seeds)


def _over_seeds(metric: str, decoding: str, runs_a: list[str], runs_b: list[str], chosen: dict) -> Difference:
    """Two conditions' difference with an interval over seeds and images, run by run where there are as many."""
    paired = len(runs_a) == len(runs_b)
    sides = [[chosen[joined(name, decoding)] for name in names] for names in (runs_a, runs_b)]
    if metric in (TRUTH, COVERAGE):
        counts = [np.array([[counts_of(one.facts, metric) for one in run] for run in side], float) for side in sides]
        if not paired:
            counts[1] = np.broadcast_to(counts[1].mean(0), counts[0].shape)
        first, second = (np.moveaxis(of, -1, 0) for of in counts)
        found = [100 * v for v in seed_ratio_interval(first, second)]
        mean = 100 * second[0].sum() / second[1].sum() if second[1].any() else 0.0
    else:
        first, second = (np.array([[one.metrics[metric] for one in run] for run in side]) for side in sides)
        found, mean = seed_interval(first - (second if paired else second.mean(0))), second.mean()
    value, low, high = (v if np.isfinite(v) else None for v in found)
    relative = float(value / mean) if mean and value is not None else 0.0
    a, b = (joined(f"{names[0]} ({len(names)} seeds)", decoding) for names in (runs_a, runs_b))
    return Difference(metric, a, b, value, low, high, relative=relative)


def flat(runs: list[dict], entries: list[Entry]) -> dict[str, list[dict]]:
    """The comparison as two flat tables by name: a row for each run, a row for each difference."""
    table, differences = [dict(row) for row in runs], []
    by_name = {row["run"]: row for row in table}
    for entry in entries:
        for row in entry.rows:
            where = " ".join(filter(None, (entry.kind, entry.split, row.decoding)))
            cells = estimates(row.metrics) | {f"{name} per input": getattr(row, name) for name in COSTS}
            by_name[row.model] |= {f"{where} {name}": value for name, value in cells.items() if value is not None}
        about = {"evaluation": entry.evaluation, "kind": entry.kind, "split": entry.split}
        differences += [about | known(row) for row in (*entry.differences, *entry.over_seeds)]
    return {"comparison": table, "differences": differences}


def show(table: list[dict]) -> Table:
    """The rows of runs as a rich table, with the settings that differ in one column."""
    fixed = ("run", "group", "steps", "planned", "seconds", "GPU-hours")
    measured = [name for name in table[0] if name.startswith("val/")]
    columns = [Column(name.removeprefix("val/"), justify="right", no_wrap=True) for name in measured]
    drawn = Table("run", "group", Column("differs in", overflow="fold"), Column("steps", no_wrap=True), "seconds",
                  "GPU-hours", *columns)  # fmt: skip
    for row in table:
        differs = "\n".join(f"{name}={value}" for name, value in row.items() if name not in (*fixed, *measured))
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in measured]
        drawn.add_row(row["run"], row["group"], differs, f"{row['steps']}/{row['planned']}", f"{row['seconds']:.0f}",
                      f"{row['GPU-hours']:.2f}", *cells)  # fmt: skip
    return drawn


def _print(runs: list[dict], entries: list[Entry], left_out: list[str]) -> None:
    console = Console()
    console.width = max(console.width, 160)
    console.print(show(runs))
    for entry in entries:
        console.print(f"[bold]{entry.kind} on {entry.num_images} of {entry.split}[/bold] ({entry.evaluation})")
        for row in (*entry.differences, *entry.over_seeds):
            if row.metric in PRINTED or row.metric.startswith("image similarity"):
                console.print(f"  {reading(row)}", highlight=False)
    if not entries:
        console.print("not evaluated: `python evaluate.py captions` or `images` with these --runs, then compare again")
    for row in runs:
        if row["steps"] < row["planned"]:
            console.print(f"unfinished: {row['run']}, {row['steps']} of {row['planned']} steps", highlight=False)
    for sentence in left_out:
        console.print(f"left out: {sentence}", highlight=False, soft_wrap=True)


def _log(tables: dict[str, list[dict]], folder: Path, group: str | None, runs: list[Run]) -> None:
    """The tables and figures where the runs log; in W&B as a run of its own, which names the runs compared."""
    ids = {run.name: run.folder / "wandb_id.txt" for run in runs}
    log_tables(
        dict(zip(("runs", "differences"), tables.values(), strict=True)),
        folder,
        {f"{row['run']}/{k}": v for row in tables["comparison"] for k, v in row.items() if isinstance(v, int | float)},
        [run.config for run in runs],
        group=group,
        job_type="comparison",
        tags=["comparison", *(name[:64] for name in ids)],
        config={"runs": {name: path.read_text().strip() for name, path in ids.items() if path.exists()}},
    )
