"""The study behind docs/results.md: every image cycle against plain finetuning on the miniature world, over seeds.

`python -m cyclefit.miniature.study` chooses each cycle's weight on validation with a seed of its own, finetunes with
every other seed through `train.py`, captions the test and novel splits, reranks the base model, and writes the tables.
Runs that are complete are not repeated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cyclefit.captioners import Blip, Decoding
from cyclefit.data import evaluation_batches
from cyclefit.loading import freeze
from cyclefit.metrics.captions import CaptionScorer
from cyclefit.metrics.statistics import seed_interval
from cyclefit.miniature import WEIGHTS
from cyclefit.rerank import sample_seed
from cyclefit.runs import load_run

REWARD = "miniature_cycle_blip_reward.yaml"
SOFT = "miniature_cycle_blip.yaml"
EVALUATION = "miniature_evaluate.yaml"
FREE = ["--model.cycle.kl_weight=0"]
"""Only the contrast makes captions grow without end."""
REGENERATION = ["--model.cycle.reward=cyclefit.judges.Regeneration", "--model.cycle.reward.steps=5"]
REGENERATION += ["--model.cycle.reward.guidance_scale=3.0", *FREE]
VARIANTS: dict[str, tuple[str, list[str], list[float]]] = {
    # name: (config, overrides, weights to choose from; the first is taken where no choice is made)
    "plain": ("miniature_blip.yaml", [], []),
    "contrastive denoising": (REWARD, [], [0.5, 1.0]),
    "regeneration": (REWARD, REGENERATION, [0.5]),
    "image-text": (REWARD, ["--model.cycle.reward=cyclefit.judges.ImageText", *FREE], [0.5, 1.0]),
    "denoising error": (REWARD, ["--model.cycle.reward.num_others=0", *FREE], [0.5]),
    "soft, teacher-forced": (SOFT, [], [10.0, 1.0]),
    "straight-through, teacher-forced": (SOFT, ["--model.cycle.form=straight-through"], [10.0, 1.0]),
    "straight-through, sampled": (
        SOFT,
        ["--model.cycle.form=straight-through", "--model.cycle.captions=sampled"],
        [10.0, 1.0],
    ),
    "best of 10, image cycle": ("miniature_blip.yaml", [], []),
    "best of 10, contrastive": ("miniature_blip.yaml", [], []),
}
"""Finetuning on the best of ten is plain finetuning on the captions that the judge chose from the base model's."""
CHOOSING_SEED = 1000


def train_run(folder: Path, name: str, config: str, overrides: list[str], weight: float | None, seed: int) -> Path:
    """One run of `train.py` in a process of its own on one thread; nothing where it is already complete."""
    run = folder / name
    if (run / "seconds.txt").exists():
        return run
    command = [sys.executable, "train.py", "--config", config, "--runs", str(folder), "--name", name, *overrides]
    command += [f"--seed_everything={seed}", f"--model.seed={seed}", f"--data.seed={seed}", "--group=study"]
    command += ["--trainer.val_check_interval=100", "--trainer.enable_progress_bar=false"]
    command += ["--trainer.enable_model_summary=false"]
    if weight is not None:
        command.append(f"--model.cycle.weight={weight}")
    command += ["--ckpt_path", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    (run / "seconds.txt").write_text(f"{time.perf_counter() - start:.1f}\n")
    return run


def evaluate(direction: str, out: Path, config: str, runs: list[Path], shards: dict[str, Path], number: int) -> Path:
    """`evaluate.py DIRECTION` of runs and the base model with `number` candidates."""
    command = [sys.executable, "evaluate.py", direction, "--config", config, f"--runs={[str(run) for run in runs]}"]
    command += [f"--shards={json.dumps({split: str(path) for split, path in shards.items()})}"]
    subprocess.run([*command, f"--num_candidates={number}", "--out", str(out)], check=True)
    return out


def best_of(variant: str, direction: str, pool: Path, out: Path, *more: str) -> Path:
    """The shards of a variant named `best of N, JUDGE` from the candidates of `pool`."""
    if not (out / "manifest.json").exists():
        command = [sys.executable, "-m", "cyclefit.data", "best-of", "--evaluation", str(pool), "--split", "finetune"]
        command += ["--judge", variant.partition(", ")[2], "--direction", direction, "--out", str(out), *more]
        subprocess.run(command, check=True)
    return out


def slug(variant: str) -> str:
    """A variant's name as part of a folder's."""
    return re.sub(r"[^\w.]+", "-", variant)


def scored(run: Path, data: Path, split: str) -> dict:
    """`per_image` of a finished run on one split; kept in the run's folder."""
    path = run / f"captions-{split}.json"
    if not path.exists():
        path.write_text(json.dumps(per_image(freeze(load_run(run)[0]), data / split)))
    return json.loads(path.read_text())


@torch.no_grad()
def per_image(captioner, split: Path, samples: int = 4) -> dict[str, dict[str, list[float]]]:
    """CIDEr and length per image of a split: of one greedy caption, and the mean over `samples` nucleus samples."""
    texts, references = {"greedy": [], "nucleus": []}, []
    decodings = {"greedy": Decoding(), "nucleus": Decoding("nucleus", samples)}
    for batch in evaluation_batches(str(split), image_size=32, batch_size=100):
        seeds = [sample_seed(key) for key in batch.keys]
        for name, decoding in decodings.items():
            texts[name] += captioner.sample(batch.images, decoding, seeds)
        references += batch.references
    scorer, result = CaptionScorer(references), {}
    for name, rows in texts.items():
        flat, images = zip(*[(text, i) for i, row in enumerate(rows) for text in row], strict=True)
        cider = scorer.score(list(flat), list(images))["CIDEr"].reshape(len(rows), -1).mean(1)
        words = [np.mean([len(text.split()) for text in row]) for row in rows]
        result[name] = {"CIDEr": cider.round(4).tolist(), "words": words}
    return result


def together(jobs: list, title: str) -> list:
    """Runs functions without arguments side by side, one per core, behind a progress bar."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task(title, total=len(jobs))
        futures = [pool.submit(job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        return [future.result() for future in futures]


def main() -> None:
    """Runs the study and writes `study.json` and `table.md` into --out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--data", type=Path, default=Path("data/miniature"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--choose", action=argparse.BooleanOptionalAction, default=True, help="weights, on validation")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    splits, train = ("test", "novel"), arguments.data / "finetune"
    chosen = {}
    for name in (name for name in arguments.variants if name.startswith("best of")):
        pool = out / "pool"
        if not (pool / "metrics.json").exists():
            evaluate("captions", pool, EVALUATION, [], {"finetune": train}, 10)
        chosen[name] = best_of(name, "captions", pool, out / slug(name), f"--shards={train}")

    def job(name: str, weight: float | None, seed: int, prefix: str = "", suffix: str = ""):
        config, overrides, _ = VARIANTS[name]
        overrides = [*overrides, "--model.round_trip_images=0"]
        overrides += [f"--data.train={chosen[name]}"] if name in chosen else []
        folder = f"{prefix}{slug(name)}-{suffix or seed}"
        return lambda: train_run(out, folder, config, overrides, weight, seed)

    weights = {name: (VARIANTS[name][2] or [None])[0] for name in arguments.variants}
    choices: dict[str, dict[float, float]] = {}
    if arguments.choose:
        grid = [(name, weight) for name in arguments.variants for weight in VARIANTS[name][2]]
        jobs = [job(name, weight, CHOOSING_SEED, "choose-", str(weight)) for name, weight in grid]
        runs = together(jobs, "choosing weights on validation")
        for (name, weight), run in zip(grid, runs, strict=True):
            found = scored(run, arguments.data, "validation")["nucleus"]["CIDEr"]
            choices.setdefault(name, {})[weight] = float(np.mean(found))
        weights |= {name: max(found, key=found.get) for name, found in choices.items()}

    pairs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.variants]
    together([job(name, weights[name], seed) for name, seed in pairs], "finetuning")
    shown = [out / f"{slug(name)}-0" for name in ("plain", "contrastive denoising") if name in weights]
    evaluate("captions", out / "evaluation", EVALUATION, shown, {split: arguments.data / split for split in splits}, 10)
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    results, seconds = {}, {}
    base = Blip(str(WEIGHTS / "blip"))
    results["before finetuning"] = {split: [per_image(base, arguments.data / split)] for split in splits}
    for name in arguments.variants:
        runs = [out / f"{slug(name)}-{seed}" for seed in range(arguments.seeds)]
        results[name] = {split: [scored(run, arguments.data, split) for run in runs] for split in splits}
        seconds[name] = float(np.mean([float((run / "seconds.txt").read_text()) for run in runs]))
    study = {"weights": weights, "choices": choices, "seconds": seconds, "results": results}
    study["reranked"] = {split: reranked(out / "evaluation" / f"candidates-{split}.jsonl") for split in splits}
    (out / "study.json").write_text(json.dumps(study))
    table = tabulate(study, arguments.seeds) + tabulate_reranking(metrics)
    (out / "table.md").write_text(table)
    print(table)


def reranked(candidates: Path, judge: str = "image cycle") -> list[float]:
    """CIDEr per image, in the split's order, of the base model's nucleus sample that the judge likes best."""
    rows: dict[str, list[dict]] = {}
    for row in map(json.loads, candidates.read_text().splitlines()):
        if row["model"] == "base" and row["decoding"] == "nucleus":
            rows.setdefault(row["key"], []).append(row)
    return [max(pool, key=lambda row: row["scores"][judge])["metrics"]["CIDEr"] for pool in rows.values()]


def tabulate(study: dict, seeds: int) -> str:
    """The study as Markdown tables, one per decoding and split: means over seeds and images, and paired differences."""
    results, lines = study["results"], []
    for decoding, title in (("nucleus", "one nucleus sample"), ("greedy", "one greedy caption")):
        for split, best in study["reranked"].items():
            lines += [
                "",
                f"CIDEr of {title} on {split}, {len(best)} images, {seeds} seeds, 95 % intervals over both.",
                "",
            ]
            lines += [
                "| finetuning | weight | CIDEr | against plain | against the base's best of 10 | words | s per run |"
            ]
            lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
            for name, found in results.items():
                matrix = np.array([run[decoding]["CIDEr"] for run in found[split]])
                cells = [f"{matrix.mean():.1f}", "", difference(matrix - np.array(best))]
                if name not in ("plain", "before finetuning") and "plain" in results:
                    plain = np.array([run[decoding]["CIDEr"] for run in results["plain"][split]])
                    cells[1] = difference(matrix - plain)
                words = np.mean([np.mean(run[decoding]["words"]) for run in found[split]])
                weight, seconds = study["weights"].get(name), study["seconds"].get(name)
                lines.append(
                    f"| {name} | {'' if weight is None else f'{weight:g}'} | {' | '.join(cells)} | {words:.1f} | "
                    f"{'' if seconds is None else f'{seconds:.0f}'} |"
                )
        lines += ["", f"CIDEr of {title} on test, each seed:", ""]
        for name, found in list(results.items())[1:]:
            means = (f"{np.mean(run[decoding]['CIDEr']):.0f}" for run in found["test"])
            lines.append(f"- {name}: {' '.join(means)}")
    if study["choices"]:
        lines += ["", "CIDEr of one nucleus sample on validation by weight, one seed of its own:", ""]
        lines += [f"- {name}: " + ", ".join(f"{weight:g}: {value:.1f}" for weight, value in found.items())
                  for name, found in study["choices"].items()]  # fmt: skip
    return "\n".join(lines).lstrip() + "\n"


def difference(matrix: np.ndarray, places: int = 1) -> str:
    """The mean over seeds and images with its interval, as text."""
    mean, low, high = (f"{value:+.{places}f}" for value in seed_interval(matrix))
    return f"{mean} [{low}, {high}]"


def tabulate_reranking(metrics: dict) -> str:
    """The base model reranked by each judge, and CIDEr by the rank each judge gives, as Markdown tables."""
    lines = ["", "The base model, CIDEr with 95 % intervals over images:", ""]
    lines += ["| split | decoding | CIDEr | words | images drawn | denoiser calls | s per image |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for split, result in metrics["splits"].items():
        for row in (row for row in result["rows"] if row["model"] == "base"):
            cider = row["metrics"]["CIDEr"]
            words = row["metrics"]["words"]["value"]
            single = row["selection"] == "single"
            lines.append(
                f"| {split} | {row['decoding'] if single else 'best by ' + row['selection']} | "
                f"{cider['value']:.1f} [{cider['low']:.0f}, {cider['high']:.0f}] | {words:.1f} | "
                f"{row['generator_calls']:.1f} | {row['denoiser_calls']:.0f} | {row['seconds']:.2f} |"
            )
    lines += ["", "CIDEr by rank:", ""]
    for split, result in metrics["splits"].items():
        for curve in (curve for curve in result["rank_curves"] if curve["model"] == "base"):
            values = " ".join(f"{point['value']:.0f}" for point in curve["values"])
            lines.append(f"- {split}, {curve['selection']}: {values}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
