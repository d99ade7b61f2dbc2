"""Writes the miniature world's weights in half precision, and the card that says what they are worth."""

import hashlib
import json
import platform
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cyclefit.judges import Denoising, ImageText, Likelihood, Partners
from cyclefit.metrics.captions import caption_metrics
from cyclefit.metrics.facts import by_kind, check, summarize
from cyclefit.metrics.reader import SceneReader
from cyclefit.miniature import WEIGHTS, scenes
from cyclefit.models import (
    Blip,
    Captioner,
    Decoding,
    Generator,
    OpenClip,
    StableDiffusion,
    StableDiffusion3,
    VisionLanguage,
)
from studies.negatives import accuracy, of_judge
from studies.pretrain import common

SIZE_LIMIT = 24_000_000
"""Bytes that the shipped weights of a pair may take together."""
MODELS = {
    "first": ("stable-diffusion", "blip", "clip", "clip-heldout", "reader"),
    "modern": ("stable-diffusion-3", "smolvlm"),
}
CARDS = {"first": "card.json", "modern": "card_modern.json"}


def write_weights(work: Path, out: Path, seed: int, pair: str, stages: list[str]) -> None:
    """Copies a pair's models from `work` to `out` with weights rounded to float16, measures them, writes their card.

    Raises:
        ValueError: the weights are larger than SIZE_LIMIT.

    """
    files, splits = [], ("validation", "test", "novel")
    for name in MODELS[pair]:
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(work / name, out / name, ignore=shutil.ignore_patterns("seconds.txt"))
        files += sorted((out / name).rglob("*.safetensors"))
    for path in files:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    total = sum(path.stat().st_size for path in files)
    if total > SIZE_LIMIT:
        raise ValueError(f"the weights take {total} bytes, more than {SIZE_LIMIT}")
    scorers = out if pair == "first" else WEIGHTS
    generator, captioner = models(out, pair)
    card = {
        "description": f"Models of cyclefit's miniature world, float16, made by studies.pretrain --pair {pair}.",
        "seed": seed,
        "steps": {name: common.STEPS[name] for name in common.PAIRS[pair]},
        "seconds": {name: int((work / name / "seconds.txt").read_text()) for name in sorted(stages)},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "bytes": total,
        "quality": {split: quality(generator, captioner, scorers, split, seed) for split in splits},
        "hard negatives": {split: hard_negatives(generator, captioner, scorers, split, seed) for split in splits},
        "sha256": {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (out / CARDS[pair]).write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card["quality"], indent=2))


def models(folder: Path, pair: str) -> tuple[Generator, Captioner]:
    """The pair whose weights lie in a folder."""
    settings = {"steps": 10, "guidance_scale": 3.0, "batch_size": 100}
    if pair == "first":
        return StableDiffusion(str(folder / "stable-diffusion"), **settings), Blip(str(folder / "blip"))
    generator = StableDiffusion3(str(folder / "stable-diffusion-3"), max_sequence_length=8, **settings)
    return generator, VisionLanguage(str(folder / "smolvlm"))


def quality(generator: Generator, captioner: Captioner, scorers: Path, split: str, seed: int) -> dict[str, float]:
    """What a pair does on a split, and what the scorers of a folder say of it; shares in percent."""
    pixels, drawn, generators = common.world(split, seed)
    images, facts = pixels.float() / 255, [scene.facts for scene in drawn]
    full = common.captions(split, seed, ("full",))[0]
    references = [[scenes.caption(s, "clean", rng) for _ in range(5)] for s, rng in zip(drawn, generators, strict=True)]

    reader = SceneReader(str(scorers / "reader"))
    with torch.no_grad():
        made = generator.generate(full, list(range(len(full))))
        decoded = generator.decode_latents(generator.encode_images(images))
    psnr = -10 * (decoded - images).square().mean((1, 2, 3)).log10()
    result = {"vae_psnr_db": psnr.mean()}
    for name, shown in (("real", images), ("through the VAE", decoded), ("drawn", made)):
        # A full caption states every fact: what the reader does not find is wrong in the image, or misread.
        found = by_kind([check(text, of) for text, of in zip(full, reader.read(shown), strict=True)])
        result |= {f"{kind} right, {name}": of["truth"]["value"] for kind, of in found.items()}

    for name in ("clip", "clip-heldout"):
        scorer = OpenClip(str(scorers / name))
        with torch.no_grad():
            source, regenerated = scorer.embed_images(images), scorer.embed_images(made)
            texts = scorer.embed_texts(full)
        retrieved = (texts[:100] @ source[:100].T).argmax(1) == torch.arange(len(texts[:100]))
        result[f"{name}: recall at 1 of 100"] = 100 * retrieved.float().mean()
        result[f"{name}: similarity of drawn"] = (source * regenerated).sum(1).mean()
        result[f"{name}: similarity of shuffled"] = (source * regenerated.roll(1, 0)).sum(1).mean()

    for decoding in (Decoding(), Decoding("nucleus", 2)):
        rows = captioner.sample(images, decoding, list(range(len(images))))
        found = summarize([check(text, of) for row, of in zip(rows, facts, strict=True) for text in row])
        result |= {f"{decoding.method}: {name}": of["value"] for name, of in found.items()}
        if decoding.num_samples == 1:
            result["greedy: CIDEr"] = caption_metrics([row[0] for row in rows], references)["CIDEr"]
    return {name: round(float(value), 4) for name, value in result.items()}


def hard_negatives(
    generator: Generator, captioner: Captioner, scorers: Path, split: str, seed: int
) -> dict[str, dict[str, float]]:
    """Of each judge the accuracy in percent by kind of changed fact, on 150 scenes of two things; chance is 50."""
    clip, held_out = (Partners(generator, OpenClip(str(scorers / name))) for name in ("clip", "clip-heldout"))
    judges = {
        "CLIP image-text (the control)": of_judge(ImageText(), clip),
        "held-out CLIP": of_judge(ImageText(), held_out),
        "denoising error": of_judge(Denoising(), clip),
        "log denoising error, 2 timesteps": of_judge(Denoising(log=True, num_timesteps=2), clip),
        "contrastive, 2 others, contrast 0.5": of_judge(Denoising(num_others=2, contrast=0.5), clip),
        "the captioner's own likelihood": of_judge(Likelihood(), Partners(captioner=captioner)),
    }
    return {
        name: {kind: round(value, 1) for kind, value in accuracy(score, split, 150, seed).items()}
        for name, score in judges.items()
    }
