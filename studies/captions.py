"""The study behind docs/results.md: image cycles against plain finetuning and the image-text control, over seeds.

`python -m studies.captions` finetunes with every variant and seed through `train.py`, captions the test and
novel splits, holds every caption against the facts of its image, and writes the tables. Runs that are complete are not
repeated. Settings were chosen on validation with another seed. `--pair modern` asks the same of the modern pair.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from cyclefit.data import evaluation_batches
from cyclefit.metrics.captions import References
from cyclefit.metrics.facts import KINDS, FactCheck, check
from cyclefit.metrics.statistics import seed_interval, seed_ratio_interval
from cyclefit.miniature import WEIGHTS
from cyclefit.models import Decoding, OpenClip
from cyclefit.models.pretrained import freeze
from cyclefit.progress import progress_bar
from cyclefit.records import IMAGE_TEXT, LOG_DENOISING
from cyclefit.rerank import sample_seed
from cyclefit.runs import load_run
from studies.pretrain.card import models

PLAIN, SOFT, REWARD = "miniature_blip.yaml", "miniature_cycle_blip.yaml", "miniature_cycle_blip_reward.yaml"
DPO = "miniature_dpo_blip.yaml"
J = "--model.cycle.reward"
EPOCHS = "--model.cycle.inner_epochs=2"
ERROR = [f"{J}.log=false"]
REGENERATION = [f"{J}=cyclefit.judges.Regeneration", f"{J}.steps=5", f"{J}.guidance_scale=3.0"]
PARTS = [
    {"class_path": "cyclefit.judges.Denoising", "init_args": {"log": True, "num_timesteps": 2}},
    {"class_path": "cyclefit.judges.ImageText"},
]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    # name: (config, overrides); all rewards have the settings that validation chose for log denoising, but the control,
    # which breaks down at its weight.
    "plain": (PLAIN, []),
    "image-text": (REWARD, [f"{J}=cyclefit.judges.ImageText", "--model.cycle.weight=2"]),
    "log denoising": (REWARD, []),
    "denoising error": (REWARD, ERROR),
    "contrastive denoising": (REWARD, [*ERROR, f"{J}.num_timesteps=4", f"{J}.num_others=1", f"{J}.contrast=0.5"]),
    "regeneration": (REWARD, REGENERATION),
    "regeneration, latents": (REWARD, [*REGENERATION, f"{J}.latents=true"]),
    "log denoising + image-text": (REWARD, [f"{J}=cyclefit.judges.Sum", f"{J}.judges={json.dumps(PARTS)}"]),
    "log denoising, two inner epochs": (REWARD, [EPOCHS]),
    "image-text, two inner epochs": (REWARD, [f"{J}=cyclefit.judges.ImageText", "--model.cycle.weight=2", EPOCHS]),
    "DPO, log denoising": (DPO, []),
    "DPO, image-text": (DPO, []),
    "soft captions": (SOFT, []),
    "soft captions, contrast, straight-through, sampled": (
        SOFT,
        ["--model.cycle.form=straight-through", "--model.cycle.captions=sampled", "--model.cycle.contrastive=true"],
    ),
}

JUDGES = {"DPO, log denoising": LOG_DENOISING, "DPO, image-text": IMAGE_TEXT}
"""Who chooses the pairs of a variant that learns from pairs."""
ENVIRONMENT = {**os.environ, "WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
OVERLAYS: dict[str, tuple[list[str], list[str]]] = {
    # name of a pair: configs read after those of the variants, in training and in evaluation
    "first": ([], []),
    "modern": (["--config", "miniature_modern.yaml"], ["--config", "miniature_modern_evaluate.yaml"]),
}


def train_run(folder: Path, name: str, config: str, overrides: list[str], seed: int) -> Path:
    """One run of `train.py` in a process of its own on one thread; nothing where it is already complete."""
    run = folder / name
    if (run / "seconds.txt").exists():
        return run
    command = [sys.executable, "train.py", "--config", config, "--runs", str(folder), "--name", name, *overrides]
    command += [f"--seed_everything={seed}", f"--model.seed={seed}", f"--data.seed={seed}", "--group=study"]
    command += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    command += ["--ckpt_path", "auto"]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{errors.read().decode()[-3000:]}")
    # The processor's time, about the time on a free core; beside other load it is up to a third more.
    (run / "seconds.txt").write_text(f"{used.ru_utime + used.ru_stime:.1f}\n")
    return run


def evaluate(
    direction: str, out: Path, config: list[str], runs: list[Path], shards: dict[str, Path], number: int
) -> Path:
    """`evaluate.py DIRECTION` of runs and the base model with `number` candidates."""
    command = [sys.executable, "evaluate.py", direction, *config, f"--runs={[str(run) for run in runs]}"]
    command += [f"--shards={json.dumps({split: str(path) for split, path in shards.items()})}"]
    subprocess.run([*command, f"--num_candidates={number}", "--out", str(out)], check=True, env=ENVIRONMENT)
    return out


def ranked(direction: str, out: Path, config: list[str], data: Path, judges: Iterable[str]) -> dict[str, Path]:
    """Pairs for DPO by judge: the best and the worst of the base model's ten candidates for each finetuning sample."""
    folder, made = out / "ranked", {}
    for judge in judges:
        made[judge] = out / f"pairs-{slug(judge)}"
        if made[judge].exists():
            continue
        evaluate(direction, folder, config, [], {"finetune": data / "finetune"}, 10)
        command = [sys.executable, "-m", "cyclefit.data", "pairs", "--evaluation", str(folder), "--split", "finetune"]
        command += ["--direction", direction, "--judge", judge, "--out", str(made[judge])]
        shards = ["--shards", str(data / "finetune")] if direction == "captions" else []
        subprocess.run([*command, *shards], check=True)
    return made


def slug(variant: str) -> str:
    """A variant's name as part of a folder's."""
    return re.sub(r"[^\w.]+", "-", variant)


def together(jobs: list, title: str) -> list:
    """Runs functions without arguments side by side, one per core, behind a progress bar."""
    with progress_bar() as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task(title, total=len(jobs))
        futures = [pool.submit(job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        return [future.result() for future in futures]


@torch.no_grad()
def captioned(captioner, split: Path) -> dict[str, list[str]]:
    """One greedy and one nucleus caption of each image of a split, in its order."""
    texts = {"greedy": [], "nucleus": []}
    for batch in evaluation_batches(str(split), image_size=32, batch_size=100):
        seeds = [sample_seed(key) for key in batch.keys]
        for name, decoding in (("greedy", Decoding()), ("nucleus", Decoding("nucleus"))):
            texts[name] += [row[0] for row in captioner.sample(batch.images, decoding, seeds)]
    return texts


def captions_of(run: Path, data: Path, split: str) -> dict[str, list[str]]:
    """`captioned` of a finished run on one split; kept in the run's folder."""
    path = run / f"captions-{split}.json"
    if not path.exists():
        path.write_text(json.dumps(captioned(freeze(load_run(run)[0]), data / split)))
    return json.loads(path.read_text())


class Measures:
    """What is measured of captions of a split."""

    def __init__(self, split: Path):
        batches = list(evaluation_batches(str(split), image_size=32, batch_size=100))
        self.facts = [facts for batch in batches for facts in batch.facts]
        self.cider = References([captions for batch in batches for captions in batch.references])
        self.scorer = OpenClip(str(WEIGHTS / "clip-heldout"))
        with torch.no_grad():
            self.images = torch.cat([self.scorer.embed_images(batch.images) for batch in batches])

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> dict:
        """Of one caption for each image, in the split's order: its FactCheck, and numbers by name."""
        similarity = (self.scorer.embed_texts(texts) * self.images).sum(1).tolist()
        return {
            "checks": [check(text, facts) for text, facts in zip(texts, self.facts, strict=True)],
            "CIDEr": self.cider.measure(texts).each["CIDEr"].tolist(),
            "words": [len(text.split()) for text in texts],
            "held-out similarity": similarity,
        }


def counts(runs: list[dict], what: str, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Parts and wholes (seeds, images) of `truth`, `coverage` or `false captions`."""

    def of(one: FactCheck) -> tuple[int, int]:
        return (int(one.false), 1) if what == "false captions" else one.counts(kind)[what]

    found = np.array([[of(one) for one in run["checks"]] for run in runs], dtype=float)
    return found[..., 0], found[..., 1]


def share(runs: list[dict], what: str, kind: str | None = None) -> str:
    """In percent, over all seeds and images."""
    parts, wholes = counts(runs, what, kind)
    return f"{100 * parts.sum() / wholes.sum():.1f}" if wholes.any() else "-"


def against(runs: list[dict], others: list[dict], what: str, kind: str | None = None) -> str:
    """The difference in percentage points with its interval."""
    number = min(len(runs), len(others))
    value = seed_ratio_interval(counts(runs[:number], what, kind), counts(others[:number], what, kind))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in value))


def difference(runs: list[dict], others: list[dict], what: str, places: int = 1) -> str:
    """The difference of a number's means with its interval."""
    number = min(len(runs), len(others))
    matrix = np.array([run[what] for run in runs[:number]]) - np.array([run[what] for run in others[:number]])
    return "{:+.{p}f} [{:+.{p}f}, {:+.{p}f}]".format(*seed_interval(matrix), p=places)


def of_equal_length(runs: list[dict], others: list[dict]) -> tuple[list[dict], list[dict], int]:
    """Both sides' captions of the images on which their lengths differ by a word at most, and how many they are.

    Checks of the other images count nothing.
    """
    kept = ([], [])
    number = 0
    for run, other in zip(runs, others, strict=False):
        near = np.abs(np.array(run["words"]) - np.array(other["words"])) <= 1
        number += int(near.sum())
        for side, of in zip(kept, (run, other), strict=True):
            side.append({"checks": [c if n else FactCheck() for c, n in zip(of["checks"], near, strict=True)]})
    return *kept, number


def tabulate(results: dict[str, dict], seconds: dict[str, float]) -> str:
    """The study as Markdown: by split and decoding truth, coverage, false captions and the seconds of a run."""
    lines = []
    for split, by_decoding in results.items():
        for decoding, found in by_decoding.items():
            some = next(iter(found.values()))
            lines += ["", f"One {decoding} caption on {split}, {len(some[0]['checks'])} images:", ""]
            heads = ["finetuning", "seeds", "false captions %", "truth %", "coverage %", "CIDEr", "words"]
            heads += ["held-out similarity", "CPU s per run"]
            lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
            for name, runs in found.items():
                cells = [share(runs, what) for what in ("false captions", "truth", "coverage")]
                cells += [f"{np.mean([run[w] for run in runs]):.{p}f}" for w, p in
                          (("CIDEr", 1), ("words", 1), ("held-out similarity", 3))]  # fmt: skip
                cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
                lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
            lines += [
                "",
                f"Right of those stated (stated rightly of those there), in percent, {decoding}, {split}:",
                "",
            ]
            kinds = KINDS[:-1]
            lines += [f"| finetuning | {' | '.join(kinds)} |", "| --- " * (len(kinds) + 1) + "|"]
            for name, runs in found.items():
                cells = [f"{share(runs, 'truth', k)} ({share(runs, 'coverage', k)})" for k in kinds]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            for other in ("plain", "image-text"):
                if other not in found:
                    continue
                lines += ["", f"Against {other}, percentage points with 95 % intervals over seeds and images:", ""]
                kinds = ("size", "relation")
                heads = ["finetuning", "false captions", "truth", "coverage"]
                heads += [f"{what} of {kind}s" for kind in kinds for what in ("truth", "coverage")]
                heads += ["CIDEr", "truth at equal length", "coverage at equal length"]
                lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
                for name, runs in found.items():
                    if name in (other, "before finetuning"):
                        continue
                    others = found[other]
                    cells = [against(runs, others, what) for what in ("false captions", "truth", "coverage")]
                    cells += [against(runs, others, what, k) for k in kinds for what in ("truth", "coverage")]
                    cells.append(difference(runs, others, "CIDEr"))
                    *sides, number = of_equal_length(runs, others)
                    cells += [f"{against(*sides, w)} (n = {number})" for w in ("truth", "coverage")] if number else []
                    lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).lstrip() + "\n"


def curve(runs: dict[str, list[Path]]) -> str:
    """Validation's greedy truth and coverage by step and by seconds of training, means over seeds, as Markdown."""
    lines = ["", "Greedy captions of validation over the time of training (validation not counted):", ""]
    lines += ["| finetuning | step | seconds | truth % | coverage % |", "| --- | --- | --- | --- | --- |"]
    for name, folders in runs.items():
        logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in folders]
        measured = [{row["step"]: row for row in log if "val/coverage" in row} for log in logs]
        seconds = [_step_seconds(log) for log in logs]
        for step in sorted(set.intersection(*(set(of) for of in measured))):
            means = (np.mean([of[step][f"val/{what}"] for of in measured]) for what in ("truth", "coverage"))
            cells = [f"{np.mean(seconds) * (step + 1):.0f}", *(f"{mean:.1f}" for mean in means)]
            lines.append(f"| {name} | {step + 1} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _step_seconds(log: list[dict]) -> float:
    """The median seconds of a step between two logged ones, which leaves validation out."""
    logged = [row for row in log if "train/loss" in row]
    pairs = [(a, b) for a, b in itertools.pairwise(logged) if b["step"] > a["step"]]
    return float(np.median([(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs]))


def main() -> None:
    """Runs the study and writes `table.md` into --out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pair", choices=list(OVERLAYS), default="first")
    parser.add_argument("--out", type=Path, help="default: runs/study, runs/study_modern")
    parser.add_argument("--data", type=Path, default=Path("data/miniature"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    out = arguments.out or Path("runs", "study" if arguments.pair == "first" else f"study_{arguments.pair}")
    variants = {name: VARIANTS[name] for name in arguments.variants}
    study(variants, out, arguments.data, arguments.seeds, arguments.pair)


def study(variants: dict[str, tuple[str, list[str]]], out: Path, data: Path, seeds: int, pair: str = "first") -> None:
    """Finetunes with every variant and seed, captions the test and novel splits with every run, writes the tables."""
    out.mkdir(parents=True, exist_ok=True)
    overlay, of_evaluation = OVERLAYS[pair]
    judges = {LOG_DENOISING: PARTS[0], IMAGE_TEXT: PARTS[1]}
    config = ["--config", "miniature_evaluate.yaml", *of_evaluation, f"--judges={json.dumps(judges)}"]
    asked = {JUDGES[name] for name in variants if name in JUDGES}
    pairs = ranked("captions", out, config, data, sorted(asked))

    def job(name: str, seed: int):
        config, overrides = variants[name]
        overrides = [*overlay, *overrides, "--model.round_trip_images=0"]
        if name in JUDGES:
            overrides.append(f"--data.train={pairs[JUDGES[name]]}")

        def run() -> Path:
            made = train_run(out, f"{slug(name)}-{seed}", config, overrides, seed)
            for split in ("test", "novel"):
                captions_of(made, data, split)
            return made

        return run

    together([job(name, seed) for seed in range(1, seeds + 1) for name in variants], "finetuning")
    write_tables(out, data, list(variants), pair)


def write_tables(out: Path, data: Path, variants: list[str], pair: str) -> None:
    """The tables of the runs that are complete."""
    runs = {
        name: sorted(path.parent for path in out.glob(f"{slug(name)}-[0-9]*/captions-novel.json")) for name in variants
    }
    runs = {name: found for name, found in runs.items() if found}
    base, results = freeze(models(WEIGHTS, pair)[1]), {}
    for split in ("test", "novel"):
        measure, before = Measures(data / split), captioned(base, data / split)
        results[split] = {
            decoding: {"before finetuning": [measure(before[decoding])]}
            | {name: [measure(captions_of(run, data, split)[decoding]) for run in of] for name, of in runs.items()}
            for decoding in ("nucleus", "greedy")
        }
    seconds = {name: float(np.mean([float((r / "seconds.txt").read_text()) for r in of])) for name, of in runs.items()}
    table = tabulate(results, seconds) + curve(runs)
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
