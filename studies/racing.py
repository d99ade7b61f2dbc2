"""Racing against fewer timesteps for all: what the judges' favourites are worth, by denoiser calls an image.

    python -m studies.racing [--split validation] [--models FOLDER]

The base captioner of the miniature world samples N captions of each image; every judge chooses among the same ones,
with the same noise. An error that several judges ask for is measured once and counted for each. The settings of the
races were chosen on validation. TFLOP are an image's at 512 px, counted on Stable Diffusion 1.5 and
CLIP ViT-L/14 if FOLDER is given, that of benchmarks.full_size, and on the miniature world's models if not.
"""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import common
from benchmarks.costs import METHODS, TERA, built, calls
from cyclefit import records
from cyclefit.config.start import run
from cyclefit.data import evaluation_batches
from cyclefit.judges import Denoising, Judge, Partners, Race, Regeneration
from cyclefit.metrics.captions import References
from cyclefit.metrics.facts import FactCheck, check
from cyclefit.metrics.statistics import paired_bootstrap, paired_ratio_bootstrap
from cyclefit.miniature import WEIGHTS
from cyclefit.models import Blip, Decoding, Generator, OpenClip, StableDiffusion
from cyclefit.models.pretrained import freeze
from cyclefit.rerank import sample_seed

TIMESTEPS = (1, 2, 3, 4, 8, 16)
"""Of the judges that judge all captions in full; the last is what the others are compared with."""
RACES = ((4, 0.35, 1), (8, 0.35, 1), (8, 0.35, 2), (16, 0.35, 1), (16, 0.5, 1), (16, 0.35, 2))
"""Timesteps, share that goes on, timesteps of the first round."""


def of_errors(log: bool) -> dict[str, Judge]:
    """The judges that go by the denoising error, or by its logarithm; the reference comes first."""
    full = {timesteps: Denoising(num_timesteps=timesteps, log=log) for timesteps in reversed(TIMESTEPS)}
    found = {f"all, {count} timestep{'s' * (count > 1)}": judge for count, judge in full.items()}
    for timesteps, keep, first in RACES:
        race = Race(full[timesteps], keep, first)
        rounds = ", ".join(map(str, race.efforts(Partners())))
        found[f"race, {rounds} timesteps, keep {keep}"] = race
    return found


def of_images() -> dict[str, Judge]:
    """The paper's judge, which draws an image of each caption in the generator's own steps, with fewer, and raced."""
    return {
        "all, 8 steps": Regeneration(),
        "all, 4 steps": Regeneration(steps=4),
        "race, 2, 8 steps, keep 0.25": Race(Regeneration(), 0.25, 2),
    }


class Remembered:
    """Denoising errors that are measured once, by image, caption and timestep."""

    def __init__(self, generator: Generator):
        self.measure, self.known = generator.errors, {}

    def __call__(self, latents: Tensor, conditioning, timesteps: Tensor, noise: Tensor) -> Float[Tensor, "b"]:
        """The errors, of which those not known yet are measured."""
        rows = zip(latents, conditioning.hidden, timesteps.tolist(), strict=True)
        keys = [(hash(z.numpy().tobytes()), hash(c.numpy().tobytes()), t) for z, c, t in rows]
        if new := [i for i, key in enumerate(keys) if key not in self.known]:
            found = self.measure(latents[new], conditioning[torch.tensor(new)], timesteps[new], noise[new])
            self.known |= zip([keys[i] for i in new], found.tolist(), strict=True)
        return torch.tensor([self.known[key] for key in keys])


class Choices:
    """The captions of a split's images, and what the ones that a judge chooses are worth."""

    def __init__(self, split: Path, limit: int, number: int):
        batches = list(evaluation_batches(str(split), image_size=32, batch_size=100, limit=limit))
        self.batches = [batch.images for batch in batches]
        self.seeds = [[sample_seed(key) for key in batch.keys] for batch in batches]
        captioner, nucleus = freeze(Blip(str(WEIGHTS / "blip"))), Decoding("nucleus", number)
        sampled = [captioner.sample(*of) for of in zip(self.batches, [nucleus] * len(batches), self.seeds, strict=True)]
        self.sampled, self.rows = sampled, [row for rows in sampled for row in rows]
        facts = [of for batch in batches for of in batch.facts]
        references = References([of for batch in batches for of in batch.references])
        texts = [text for row in self.rows for text in row]
        places = np.arange(len(self.rows)).repeat(number).tolist()
        self.cider = np.reshape(references.measure(texts, places).each["CIDEr"], (-1, number))
        self.checks = [[check(text, of) for text in row] for row, of in zip(self.rows, facts, strict=True)]

    def of(self, judge: Judge, partners: Partners) -> list[int]:
        """The place of the caption that the judge chooses, for each image."""
        found = []
        for images, captions, seeds in zip(self.batches, self.sampled, self.seeds, strict=True):
            scores = judge.score(partners, images, captions, [seed + 1 for seed in seeds])
            found += scores.argmax(1).tolist()
        return found

    def cost(self, judge: Judge, partners: Partners) -> dict[str, float]:
        """Drawn images and denoiser calls an image, and its different captions, on average."""
        different = [len(set(row)) for row in self.rows]
        costs = [judge.cost(partners, count) | {"captions": count} for count in different]
        return {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}

    def counts(self, chosen: list[int], what: str) -> tuple[np.ndarray, np.ndarray]:
        """Parts and wholes of truth, or of false captions, for each image."""
        picked: list[FactCheck] = [row[k] for row, k in zip(self.checks, chosen, strict=True)]
        parts = [(int(one.false), 1) if what == records.FALSE["captions"] else one.counts()[what] for one in picked]
        return tuple(np.array(parts, float).T)

    def cells(self, chosen: list[int], reference: list[int]) -> list[str]:
        """Agreement with another choice, and CIDEr, truth and false captions with the difference from it."""
        texts, others = ([row[k] for row, k in zip(self.rows, of, strict=True)] for of in (chosen, reference))
        found = [f"{100 * np.mean([a == b for a, b in zip(texts, others, strict=True)]):.1f}"]
        cider, its = (self.cider[np.arange(len(of)), of] for of in (chosen, reference))
        found.append(f"{cider.mean():.1f} ({{:+.1f}} [{{:+.1f}}, {{:+.1f}}])".format(*paired_bootstrap(cider, its)))
        for what in (records.TRUTH, records.FALSE["captions"]):
            own, other = self.counts(chosen, what), self.counts(reference, what)
            change = [100 * value for value in paired_ratio_bootstrap(own, other)[:3]]
            share = 100 * own[0].sum() / own[1].sum()
            found.append(f"{share:.1f} ({{:+.1f}} [{{:+.1f}}, {{:+.1f}}])".format(*change))
        return found


def full_size(models: Path | None) -> dict[str, float]:
    """TFLOP of one call of each network."""
    size = 512 if models else 32
    with torch.no_grad():
        found = calls(built(METHODS["+ soft captions"], models, size), size)
        return {name: common.flops(call) / TERA for name, call in found.items()}


def tflop(cost: dict[str, float], each: dict[str, float]) -> float:
    """An image's: the denoiser, text encoder, and of drawn images decoder and CLIP, else the image's own encoding."""
    drawn = cost["generator_calls"]
    texts, seen = (drawn, each["CLIP, image"]) if drawn else (cost["captions"], each["VAE encoding"])
    found = cost["denoiser_calls"] * each["the denoiser"] + texts * each["the generator's text encoder"] + seen
    return found + drawn * (each["VAE decoding"] + each["CLIP, image"])


def tabulate(title: str, judges: dict[str, Judge], choices: Choices, partners: Partners, each: dict[str, float]) -> str:
    """One table as Markdown; differences are from the first judge."""
    heads = ["judge", "denoiser calls", "share", "TFLOP", "same caption %", "CIDEr", "truth %", "false captions %"]
    lines = [f"{title}:", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    chosen = {name: choices.of(judge, partners) for name, judge in judges.items()}
    costs = {name: choices.cost(judge, partners) for name, judge in judges.items()}
    first = next(iter(judges))
    for name in sorted(judges, key=lambda name: -costs[name]["denoiser_calls"]):
        spent = costs[name]["denoiser_calls"]
        share = spent / costs[first]["denoiser_calls"]
        cells = [f"{spent:.1f}", f"{share:.3f}", f"{tflop(costs[name], each):.3g}"]
        lines.append(f"| {' | '.join([name, *cells, *choices.cells(chosen[name], chosen[first])])} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    """Writes the tables into --out and prints them."""
    options = common.parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("data/miniature"))
    options.add_argument("--split", default="test")
    options.add_argument("--images", type=int, default=400)
    options.add_argument("--candidates", type=int, default=10)
    options.add_argument("--out", type=Path, default=Path("runs/racing"))
    arguments = options.parse_args()
    generator = StableDiffusion(str(WEIGHTS / "stable-diffusion"), steps=8, guidance_scale=3.0, batch_size=100)
    partners = Partners(freeze(generator), freeze(OpenClip(str(WEIGHTS / "clip"))))
    choices = Choices(arguments.data / arguments.split, arguments.images, arguments.candidates)
    each, tables = full_size(arguments.models), []
    arguments.out.mkdir(parents=True, exist_ok=True)
    with patch.object(generator, "errors", Remembered(generator)):
        for title, judges in {
            "Denoising error": of_errors(log=False),
            "Log denoising error": of_errors(log=True),
            "Regenerated images, the paper's judge": of_images(),
        }.items():
            title = f"{title}, {len(choices.rows)} images of {arguments.split}"
            tables.append(tabulate(title, judges, choices, partners, each))
            print(tables[-1], flush=True)
            (arguments.out / f"{arguments.split}.md").write_text("\n".join(tables))


if __name__ == "__main__":
    run(lambda _: main())
