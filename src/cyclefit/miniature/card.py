"""Writes the miniature world's weights in half precision, and the card that says what they are worth."""

import hashlib
import json
import platform
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cyclefit.captioners import Blip, Decoding
from cyclefit.generators import StableDiffusion
from cyclefit.metrics.captions import caption_metrics
from cyclefit.miniature import scenes
from cyclefit.miniature.pretrain import ATTRIBUTES, SIZE_LIMIT, STEPS, Probe, attributes, captions, world
from cyclefit.scorers import OpenClip

MODELS = ("stable-diffusion", "blip", "clip", "clip-heldout")


def write_weights(work: Path, out: Path, seed: int) -> None:
    """Copies the models of `work` to `out` with weights rounded to float16, measures both, writes `card.json`.

    Raises:
        ValueError: the weights are larger than SIZE_LIMIT.

    """
    shutil.rmtree(out, ignore_errors=True)
    for name in MODELS:
        shutil.copytree(work / name, out / name, ignore=shutil.ignore_patterns("seconds.txt"))
    files = sorted(out.rglob("*.safetensors"))
    for path in files:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    total = sum(path.stat().st_size for path in files)
    if total > SIZE_LIMIT:
        raise ValueError(f"the weights take {total} bytes, more than {SIZE_LIMIT}")
    probe = Probe().eval()
    probe.load_state_dict(load_file(work / "probe" / "probe.safetensors"))
    card = {
        "description": "Pretrained models of cyclefit's miniature world, float16, made by cyclefit.miniature.pretrain.",
        "seed": seed,
        "steps": STEPS,
        "seconds": {p.parent.name: int(p.read_text()) for p in sorted(work.glob("*/seconds.txt"))},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "bytes": total,
        "quality": {"float32": quality(work, probe, seed), "float16": quality(out, probe, seed)},
        "sha256": {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card["quality"], indent=2))


@torch.no_grad()
def quality(folder: Path, probe: Probe, seed: int) -> dict[str, float]:
    """What the models of a folder do on the validation split."""
    pixels, drawn, generators = world("validation", seed)
    images = pixels.float() / 255
    truth = attributes(drawn)
    full = captions("validation", seed, ("full",))[0]
    references = [[scenes.caption(s, "clean", rng) for _ in range(5)] for s, rng in zip(drawn, generators, strict=True)]

    generator = StableDiffusion(str(folder / "stable-diffusion"), steps=10, guidance_scale=4.0, batch_size=100)
    made = generator.generate(full, list(range(len(full))))
    decoded = generator.decode_latents(generator.encode_images(images))
    psnr = -10 * (decoded - images).square().mean((1, 2, 3)).log10()
    result = {"vae_psnr_db": psnr.mean()}
    result |= {f"generated_{k}": v for k, v in attribute_accuracy(probe.predict(made), truth).items()}
    result |= {f"real_{k}": v for k, v in attribute_accuracy(probe.predict(images), truth).items()}

    for name in ("clip", "clip-heldout"):
        scorer = OpenClip(str(folder / name))
        source, regenerated, texts = scorer.embed_images(images), scorer.embed_images(made), scorer.embed_texts(full)
        retrieved = (texts[:100] @ source[:100].T).argmax(1) == torch.arange(100)
        result[f"{name}_recall_at_1_of_100"] = retrieved.float().mean()
        result[f"{name}_similarity_generated"] = (source * regenerated).sum(1).mean()
        result[f"{name}_similarity_shuffled"] = (source * regenerated.roll(1, 0)).sum(1).mean()

    captioner = Blip(str(folder / "blip"))
    greedy = [row[0] for row in captioner.sample(images, Decoding(), list(range(len(images))))]
    result["captioner_greedy_cider"] = caption_metrics(greedy, references)["CIDEr"]
    return {name: round(float(value), 4) for name, value in result.items()}


def attribute_accuracy(predicted: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Shares of images whose background, shapes, colours, sizes, place or relation is right.

    `relation` is of two things: the layout is right, and each slot shows the thing the caption put there, where the
    two things differ in colour and the colours are right in some order.
    """
    names = list(ATTRIBUTES)
    column = {name: predicted[:, i] == truth[:, i] for i, name in enumerate(names)}
    two = truth[:, names.index("shape 2")] != len(scenes.SHAPES)
    first, second = names.index("colour 1"), names.index("colour 2")
    ordered = column["colour 1"] & column["colour 2"]
    swapped = (predicted[:, first] == truth[:, second]) & (predicted[:, second] == truth[:, first])
    comparable = two & (truth[:, first] != truth[:, second]) & (ordered | swapped)
    result = {"background": column["background"].float().mean(), "place": column["layout"][~two].float().mean()}
    for what in ("shape", "colour", "size"):
        both = torch.cat([column[f"{what} 1"], column[f"{what} 2"][two]])
        result[what] = both.float().mean()
    result["relation"] = (column["layout"] & ordered)[comparable].float().mean()
    return {name: float(value) for name, value in result.items()}
