"""The study of text cycles: the generator's LoRA with each cycle against the denoising loss alone, over seeds.

`python -m cyclefit.miniature.study_images` chooses each cycle's weight on validation with a seed of its own, finetunes
with every other seed through `train.py`, draws one image per prompt of the test and novel splits with every run through
`evaluate.py images`, reranks the base model, and writes the tables. Runs that are complete are not repeated.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from cyclefit.miniature.study import CHOOSING_SEED, best_of, difference, evaluate, slug, together, train_run

CYCLE = "miniature_cycle_sd.yaml"
EVALUATION = "miniature_evaluate_images.yaml"
VARIANTS: dict[str, tuple[str, list[str], list[float]]] = {
    # name: (config, overrides, weights to choose from)
    "plain": ("miniature_sd_lora.yaml", [], []),
    "plain, the cycle's rate": (CYCLE, ["--model.cycle=null"], []),
    "one step, t < 300": (CYCLE, ["--model.cycle=cyclefit.cycles.OneStepCaptioning"], [1.0, 0.1]),
    "truncated, K = 1": (CYCLE, ["--model.cycle.grad_steps=1"], [1.0]),
    "truncated, K = 2": (CYCLE, [], [1.0, 10.0]),
    "truncated, K = 2, contrastive": (CYCLE, ["--model.cycle.contrastive=true"], [1.0, 0.1]),
    "truncated, K = 2, CLIP": (CYCLE, ["--model.cycle.image_text_weight=1.0"], [1.0]),
    "best of 10, text cycle": ("miniature_sd_lora.yaml", [], []),
    "best of 10, image-text": ("miniature_sd_lora.yaml", [], []),
}
CHEAP = ["--model.validation_images=8", "--data.validation_size=8"]
MEASURES = {
    "captioner NLL": (1, 3),
    "CIDEr": (100, 1),
    "text similarity (clip-heldout)": (1, 3),
    "image-text similarity (clip)": (1, 3),
    "image-text similarity (clip-heldout)": (1, 3),
    "image similarity (clip-heldout)": (1, 3),
}
"""Columns of the tables, with their scale and decimals."""


def measured(folder: Path, split: str) -> dict[str, dict[str, np.ndarray]]:
    """Each model's measures of its first image of every prompt, in the order of the keys."""
    rows: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in map(json.loads, (folder / f"candidates-{split}.jsonl").read_text().splitlines()):
        if row["index"] == 0:
            rows[row["model"]][row["key"]] = row["metrics"]
    return {
        model: {name: np.array([found[key][name] for key in sorted(found)]) for name in MEASURES}
        for model, found in rows.items()
    }


def reranked(metrics: dict) -> list[str]:
    """The base model's best of ten by each judge, as lines of a Markdown table."""
    lines = ["The base model's best of ten:", "", "| split | kept by | " + " | ".join(MEASURES) + " | denoiser calls |"]
    lines += ["| --- " * (len(MEASURES) + 3) + "|"]
    for split, result in metrics["splits"].items():
        for row in (row for row in result["rows"] if row["model"] == "base" and row["selection"] != "single"):
            values = (f"{k * row['metrics'][name]['value']:.{n}f}" for name, (k, n) in MEASURES.items())
            lines.append(f"| {split} | {row['selection']} | {' | '.join(values)} | {row['denoiser_calls']:.0f} |")
    return lines


def main() -> None:
    """Runs the study and writes `table.md` into --out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/study_images"))
    parser.add_argument("--data", type=Path, default=Path("data/miniature"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    out, data = arguments.out, arguments.data
    out.mkdir(parents=True, exist_ok=True)

    chosen = {}
    for name in (name for name in arguments.variants if name.startswith("best of")):
        pool = out / "pool"
        if not (pool / "metrics.json").exists():
            evaluate("images", pool, EVALUATION, [], {"finetune": data / "finetune"}, 10)
        chosen[name] = best_of(name, "images", pool, out / slug(name))

    def job(name: str, weight: float | None, seed: int, prefix: str = "", suffix: str = ""):
        config, overrides, _ = VARIANTS[name]
        overrides = [*overrides, *CHEAP, *([f"--data.train={chosen[name]}"] if name in chosen else [])]
        return lambda: train_run(out, f"{prefix}{slug(name)}-{suffix or seed}", config, overrides, weight, seed)

    weights = {name: VARIANTS[name][2][0] for name in arguments.variants if VARIANTS[name][2]}
    grid = [(name, weight) for name in weights if len(VARIANTS[name][2]) > 1 for weight in VARIANTS[name][2]]
    jobs = [job(name, weight, CHOOSING_SEED, "choose-", str(weight)) for name, weight in grid]
    tried = together(jobs, "choosing weights on validation")
    choice = evaluate("images", out / "choice", EVALUATION, tried, {"validation": data / "validation"}, 1)
    found = measured(choice, "validation")
    choices: dict[str, dict[float, float]] = {}
    for (name, weight), run in zip(grid, tried, strict=True):
        choices.setdefault(name, {})[weight] = float(found[run.name]["CIDEr"].mean())
    weights |= {name: max(values, key=values.get) for name, values in choices.items()}

    pairs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.variants]
    runs = together([job(name, weights.get(name), seed) for name, seed in pairs], "finetuning")
    splits = ("test", "novel")
    folder = evaluate("images", out / "evaluation", EVALUATION, runs, {split: data / split for split in splits}, 10)
    seconds = {run.name: float((run / "seconds.txt").read_text()) for run in runs}
    lines = []
    for split in splits:
        values = measured(folder, split)
        count = len(next(iter(values["base"].values())))
        lines += [
            "",
            f"One image per prompt of {split}, {count} prompts, {arguments.seeds} seeds; below each measure the",
        ]
        lines += ["difference to plain finetuning with its 95 % interval over seeds and prompts.", ""]
        lines += ["| finetuning | weight | " + " | ".join(MEASURES) + " | s per run |"]
        lines += ["| --- " * (len(MEASURES) + 3) + "|"]
        names = ["base", *arguments.variants]
        for name in names:
            labels = ["base"] if name == "base" else [f"{slug(name)}-{seed}" for seed in range(arguments.seeds)]
            cells, changes = [], []
            for measure, (scale, places) in MEASURES.items():
                matrix = scale * np.array([values[label][measure] for label in labels])
                cells.append(f"{matrix.mean():.{places}f}")
                if name not in ("base", "plain") and "plain" in arguments.variants:
                    plain = scale * np.array([values[f"plain-{seed}"][measure] for seed in range(arguments.seeds)])
                    changes.append(difference(matrix - plain, places))
            spent = "" if name == "base" else f"{np.mean([seconds[label] for label in labels]):.0f}"
            weight = f"{weights[name]:g}" if name in weights else ""
            lines.append(f"| {name} | {weight} | {' | '.join(cells)} | {spent} |")
            if changes:
                lines.append(f"| | | {' | '.join(changes)} | |")
    lines += ["", *reranked(json.loads((folder / "metrics.json").read_text()))]
    lines += ["", "CIDEr of the image's caption on validation by weight, one seed of its own:", ""]
    lines += [f"- {name}: " + ", ".join(f"{weight:g}: {value:.1f}" for weight, value in found.items())
              for name, found in choices.items()]  # fmt: skip
    table = "\n".join(lines).lstrip() + "\n"
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
