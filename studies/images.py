"""The study of text cycles: the generator's LoRA with each cycle against denoising alone and CLIP, over seeds.

`python -m studies.images` finetunes with every variant and seed through `train.py`, draws one image of
each prompt of the test and novel splits with every run through `evaluate.py images`, reads the facts of every image,
reranks the base model, and writes the tables. Runs that are complete are not repeated. Settings were chosen on
validation with another seed. `--pair modern` asks the same of the modern pair.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from cyclefit.metrics.facts import KINDS, FactCheck
from cyclefit.records import (
    FALSE,
    IMAGE_TEXT,
    SINGLE,
    TEXT_CYCLE,
    TRUTH,
    Candidate,
    Evaluation,
    candidates_path,
    read_candidates,
    read_evaluation,
)
from studies.captions import (
    OVERLAYS,
    J,
    against,
    counts,
    difference,
    evaluate,
    ranked,
    share,
    slug,
    together,
    train_run,
)

CYCLE = "miniature_cycle_sd.yaml"
POLICY = "miniature_sd_policy.yaml"
DPO = "miniature_dpo_sd.yaml"
NFT = ["--model.cycle=cyclefit.cycles.DiffusionNFT", "--model.cycle.num_images=8"]
EVALUATION = "miniature_evaluate_images.yaml"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    # name: (config, overrides)
    "plain": ("miniature_sd_lora.yaml", ["--trainer.max_steps=200"]),
    "CLIP's reward": (
        CYCLE,
        ["--model.cycle.likelihood_weight=0", "--model.cycle.image_text_weight=1", "--model.cycle.weight=5"],
    ),
    "truncated, K = 2": (CYCLE, []),
    "truncated, K = 1": (CYCLE, ["--model.cycle.grad_steps=1"]),
    "policy gradient, text cycle": (POLICY, []),
    "policy gradient, CLIP's reward": (POLICY, [f"{J}=cyclefit.judges.ImageText"]),
    "NFT, text cycle": (POLICY, [*NFT, f"{J}=cyclefit.judges.CaptionLikelihood", f"{J}.contrastive=true"]),
    "NFT, CLIP's reward": (POLICY, [*NFT, f"{J}=cyclefit.judges.ImageText"]),
    "DPO, text cycle": (DPO, []),
    "DPO, CLIP's reward": (DPO, []),
    "one step, t < 300": (CYCLE, ["--model.cycle=cyclefit.cycles.OneStepCaptioning", "--model.cycle.weight=0.1"]),
}
JUDGES = {"DPO, text cycle": TEXT_CYCLE, "DPO, CLIP's reward": IMAGE_TEXT}
"""Who chooses the pairs of a variant that learns from pairs."""
NUMBERS = {
    "image similarity (clip-heldout)": 3,
    "image-text similarity (clip-heldout)": 3,
    "text similarity (clip-heldout)": 3,
    "CIDEr": 1,
}
"""Columns beside truth, with their decimals."""


def measured(folder: Path, split: str) -> dict[str, dict]:
    """Each model's first image of every prompt, in the order of the keys: checks, and numbers by name."""
    rows: dict[str, dict[str, Candidate]] = defaultdict(dict)
    for one in read_candidates(candidates_path(folder, split)):
        if one.index == 0:
            rows[one.model][one.key] = one
    return {
        model: {"checks": [FactCheck.read(found[key].facts) for key in sorted(found)]}
        | {name: [found[key].metrics[name] for key in sorted(found)] for name in NUMBERS}
        for model, found in rows.items()
    }


def tabulate(found: dict[str, list[dict]], seconds: dict[str, float], split: str) -> list[str]:
    """One split's tables as lines of Markdown: truth and costs, by kind, and differences."""
    kinds = [kind for kind in KINDS[:-1] if counts(found["base"], "truth", kind)[1].any()]
    lines = ["", f"One image per prompt of {split}, {len(found['base'][0]['checks'])} prompts:", ""]
    heads = [
        "finetuning",
        "seeds",
        "false images %",
        "truth %",
        *[f"{kind} %" for kind in kinds],
        *NUMBERS,
        "CPU s per run",
    ]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, runs in found.items():
        cells = [share(runs, "false captions"), share(runs, "truth"), *[share(runs, "truth", k) for k in kinds]]
        cells += [f"{np.mean([run[what] for run in runs]):.{places}f}" for what, places in NUMBERS.items()]
        cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    for other in ("base", "plain", "CLIP's reward"):
        if other not in found:
            continue
        lines += ["", f"Against {other}, with 95 % intervals over seeds and prompts:", ""]
        heads = ["finetuning", "false images", "truth", "truth of shapes", "truth of colours", *NUMBERS]
        lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for name, runs in found.items():
            if name in (other, "base"):
                continue
            others = found[other] * len(runs) if other == "base" else found[other]
            cells = [against(runs, others, "false captions"), against(runs, others, "truth")]
            cells += [against(runs, others, "truth", kind) for kind in ("shape", "colour")]
            cells += [difference(runs, others, what, places) for what, places in NUMBERS.items()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def reranked(evaluation: Evaluation) -> list[str]:
    """The base model's best of ten by each judge, as lines of a Markdown table."""
    names = [FALSE["images"], TRUTH, *NUMBERS]
    lines = ["", "The base model's best of ten:", "", f"| split | kept by | {' | '.join(names)} | denoiser calls |"]
    lines += ["| --- " * (len(names) + 3) + "|"]
    for split, result in evaluation.splits.items():
        for row in (row for row in result.rows if row.model == "base" and row.selection != SINGLE):
            values = (f"{row.metrics[name].value:.{NUMBERS.get(name, 1)}f}" for name in names)
            lines.append(f"| {split} | {row.selection} | {' | '.join(values)} | {row.denoiser_calls:.0f} |")
    return lines


def main() -> None:
    """Runs the study and writes `table.md` into --out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pair", choices=list(OVERLAYS), default="first")
    parser.add_argument("--out", type=Path, help="default: runs/study_images, runs/study_images_modern")
    parser.add_argument("--data", type=Path, default=Path("data/miniature"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--candidates", type=int, default=10, help="of the base model, to choose among")
    arguments = parser.parse_args()
    suffix = "" if arguments.pair == "first" else f"_{arguments.pair}"
    out, variants = arguments.out or Path(f"runs/study_images{suffix}"), {n: VARIANTS[n] for n in arguments.variants}
    study(variants, out, arguments.data, arguments.seeds, arguments.candidates, arguments.pair)


def study(
    variants: dict[str, tuple[str, list[str]]], out: Path, data: Path, seeds: int, candidates: int, pair: str = "first"
) -> None:
    """Finetunes with every variant and seed, draws the prompts of test and novel with every run, writes the tables.

    `candidates` is the base model's number of images for each prompt, to choose among.
    """
    overlay, of_evaluation = OVERLAYS[pair]
    out.mkdir(parents=True, exist_ok=True)
    config = ["--config", EVALUATION, *of_evaluation]
    asked = {JUDGES[name] for name in variants if name in JUDGES}
    chosen = ranked("images", out, config, data, sorted(asked))

    def job(name: str, seed: int):
        config, overrides = variants[name]
        overrides = [*overlay, *overrides, "--model.validation_images=0"]
        if name in JUDGES:
            overrides.append(f"--data.train={chosen[JUDGES[name]]}")
        return lambda: train_run(out, f"{slug(name)}-{seed}", config, overrides, seed)

    pairs = [(name, seed) for seed in range(1, seeds + 1) for name in variants]
    runs = together([job(name, seed) for name, seed in pairs], "finetuning")
    splits = {split: data / split for split in ("test", "novel")}
    folder = evaluate("images", out / "evaluation", config, runs, splits, candidates)
    lines = []
    for split in splits:
        values, seconds = measured(folder, split), {}
        found = {"base": [values["base"]]}
        for name in variants:
            names = [f"{slug(name)}-{seed}" for seed in range(1, seeds + 1)]
            found[name] = [values[of] for of in names]
            seconds[name] = float(np.mean([float((out / of / "seconds.txt").read_text()) for of in names]))
        lines += tabulate(found, seconds, split)
    if candidates > 1:
        lines += reranked(read_evaluation(folder))
    table = "\n".join(lines).lstrip() + "\n"
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
