"""The scenes of the miniature world: rendered images, captions at three noise levels, and splits written as shards.

`python -m cyclefit.miniature.scenes --out data/miniature` writes the splits, with the same code that packs real data.
"""

import argparse
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from cyclefit.config.start import run
from cyclefit.files import write_atomic
from cyclefit.metrics.facts import OPPOSITE, PLACES, RELATIONS, SHAPES, SIZE_WORDS

SIZE = 32
SUPERSAMPLING = 4
COLOURS = {  # RGB
    "red": (214, 39, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 50),
    "green": (40, 160, 60),
    "turquoise": (50, 205, 205),
    "blue": (35, 70, 215),
    "purple": (130, 50, 175),
    "pink": (250, 150, 195),
}
BACKGROUNDS = {
    "white": (242, 242, 240),
    "black": (18, 18, 22),
    "grey": (128, 128, 130),
    "brown": (112, 78, 50),
}
SIZES = {"small": 4.9, "large": 7.0}
"""Radius in pixels."""
NOVEL_PAIRS = frozenset((SHAPES[i % len(SHAPES)], colour) for i, colour in enumerate(COLOURS))
"""Shape-colour pairs that the captioner is never trained on; every scene of `novel` shows at least one."""

Noise = Literal["web", "clean", "full"]
SPLITS = {
    # name: (images, novel pairs, noise of the captions, captions per image)
    "pretrain": (40_000, "any", None, 0),
    "captioner": (40_000, "never", "web", 1),
    "finetune": (1_000, "never", "web", 1),
    "validation": (300, "never", "clean", 5),
    "test": (400, "never", "clean", 5),
    "novel": (400, "always", "clean", 5),
    "unpaired": (1_000, "always", None, 0),
    "prompts": (1_000, "always", "clean", 1),
}
"""The captions of `prompts` are written to a text file, without their images."""


@dataclass(frozen=True)
class Thing:
    """One drawn object; centre and radius in pixels of the 32 x 32 image, rotation in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One or two things on a background.

    `place` is the position of a single thing (a key of PLACES), or the relation of the first of two things to the
    second (a key of RELATIONS; the first is always the left or upper one, so "left" or "above").
    """

    things: tuple[Thing, ...]
    place: str
    background: str
    background_rgb: tuple[int, int, int]

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """Shape and colour of each thing."""
        return {(thing.shape, thing.colour) for thing in self.things}

    @property
    def facts(self) -> dict:
        """The facts of the scene, as stored in its sample's json; see `cyclefit.metrics.facts`."""
        things = [{"shape": thing.shape, "colour": thing.colour, "size": thing.size} for thing in self.things]
        layout = "relation" if len(things) == 2 else "place"
        return {"things": things, layout: self.place, "background": self.background}


def _tinted(rgb: tuple[int, int, int], spread: float, rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(v) for v in np.clip(np.array(rgb) + rng.normal(0, spread, 3), 0, 255))


def _thing(x: float, y: float, rng: np.random.Generator) -> Thing:
    shape, colour, size = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES))
    x, y = x + rng.normal(0, 0.8), y + rng.normal(0, 0.8)
    radius, rotation = SIZES[size] * rng.uniform(0.94, 1.06), rng.normal(0, 0.12)
    return Thing(str(shape), str(colour), str(size), x, y, radius, rotation, _tinted(COLOURS[colour], 7, rng))


def draw_scene(rng: np.random.Generator, novel: Literal["any", "never", "always"] = "any") -> Scene:
    """Samples a scene, with rejection if the split restricts the shape-colour pairs."""
    while True:
        background = str(rng.choice(list(BACKGROUNDS)))
        if rng.random() < 0.35:
            place = str(rng.choice(list(PLACES)))
            dx, dy = {"left": (-8, 0), "right": (8, 0), "top": (0, -8), "bottom": (0, 8), "middle": (0, 0)}[place]
            things = (_thing(16 + dx, 16 + dy, rng),)
        else:
            place = str(rng.choice(["left", "above"]))
            across, along = rng.normal(0, 1.5, 2), rng.uniform(7.5, 8.5, 2)
            first, second = (16 - along[0], 16 + across[0]), (16 + along[1], 16 + across[1])
            if place == "above":
                first, second = first[::-1], second[::-1]
            things = (_thing(*first, rng), _thing(*second, rng))
        scene = Scene(things, place, background, _tinted(BACKGROUNDS[background], 5, rng))
        if len(scene.things) == 2 and things[0].shape == things[1].shape and things[0].colour == things[1].colour:
            continue
        if novel == "any" or bool(scene.pairs & NOVEL_PAIRS) == (novel == "always"):
            return scene


def _polygon(points: list[tuple[float, float]], thing: Thing) -> list[tuple[float, float]]:
    cos, sin = math.cos(thing.rotation), math.sin(thing.rotation)
    return [
        (
            SUPERSAMPLING * (thing.x + thing.radius * (cos * px - sin * py)),
            SUPERSAMPLING * (thing.y + thing.radius * (sin * px + cos * py)),
        )
        for px, py in points
    ]


def _ray(angle: float, length: float) -> tuple[float, float]:
    return length * math.sin(angle), -length * math.cos(angle)


OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [_ray(k * math.tau / 3, 1.12) for k in range(3)],
    "star": [_ray(k * math.tau / 10, 1.15 if k % 2 == 0 else 0.48) for k in range(10)],
    "cross": [
        *[(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32)],
        *[(0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)],
    ],
}


def render(scene: Scene) -> Image.Image:
    """Renders the scene as a 32 x 32 RGB image, drawn at four times the size and box-filtered."""
    image = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, scene.background_rgb)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        if thing.shape in OUTLINES:
            draw.polygon(_polygon(OUTLINES[thing.shape], thing), fill=thing.rgb)
            continue
        x, y, radius = thing.x, thing.y, thing.radius
        box = [SUPERSAMPLING * v for v in (x - radius, y - radius, x + radius, y + radius)]
        if thing.shape == "ring":
            draw.ellipse(box, outline=thing.rgb, width=round(SUPERSAMPLING * radius * 0.42))
        else:
            draw.ellipse(box, fill=thing.rgb)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def caption(scene: Scene, noise: Noise, rng: np.random.Generator) -> str:
    """One caption of the scene.

    `full` states every detail; `clean` is true and omits some; `web` omits more, and each remaining detail is wrong
    with probability 0.22, like noisy alt-text.
    """
    return say(scene, noise, rng)[0]


def say(scene: Scene, noise: Noise, rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    """A caption and the facts it states, true or false, as (kind, value) pairs in the order of its words."""
    wrong = 0.22 if noise == "web" else 0.0
    drop = {"full": 0.0, "clean": 0.25, "web": 0.7}[noise]

    def said(truth: str, words) -> str:
        others = [word for word in words if word != truth]
        return str(rng.choice(others)) if rng.random() < wrong else truth

    def noun(thing: Thing) -> tuple[str, list[tuple[str, str]]]:
        words, stated = [], []
        if rng.random() >= drop:
            stated.append(("size", said(thing.size, SIZE_WORDS)))
            words.append(str(rng.choice(SIZE_WORDS[stated[-1][1]])))
        if rng.random() >= drop / 3:
            stated.append(("colour", said(thing.colour, COLOURS)))
            words.append(stated[-1][1])
        stated.append(("shape", said(thing.shape, SHAPES)))
        words.append(stated[-1][1])
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words]), stated

    nouns = [noun(thing) for thing in scene.things]
    tell_place = rng.random() >= drop
    if len(nouns) == 1:
        text, stated = nouns[0]
        if tell_place:
            place = said(scene.place, PLACES)
            text += " " + str(rng.choice(PLACES[place]))
            stated.append(("place", place))
    elif noise == "web" and rng.random() < 0.2:
        text, stated = nouns[rng.integers(2)]
    else:
        turned = rng.random() < 0.5
        (first, stated), (second, others) = nouns[::-1] if turned else nouns
        relation = said(OPPOSITE[scene.place] if turned else scene.place, RELATIONS)
        text = f"{first} {rng.choice(RELATIONS[relation]) if tell_place else 'and'} {second}"
        stated = [*stated, *[("relation", relation)] * tell_place, *others]
    if rng.random() >= drop:
        background = said(scene.background, BACKGROUNDS)
        text += f" on {background}" if rng.random() < 0.3 else f" on a {background} background"
        stated.append(("background", background))
    return text, stated


def scenes(split: str, seed: int = 0) -> Iterator[tuple[Scene, np.random.Generator]]:
    """The split's scenes, each with a random generator for its captions; a pure function of (split, seed)."""
    count, novel, _, _ = SPLITS[split]
    for index in range(count):
        rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
        yield draw_scene(rng, novel), rng


def write_splits(out: Path, splits: list[str], seed: int = 0, samples_per_shard: int = 100) -> None:
    """Writes each split as shards to `out/SPLIT`, skipping splits that are already complete.

    Of `prompts` only the captions are written, to `prompts.txt`.
    """
    from cyclefit.data import Sample, write_shards

    def samples(split: str) -> Iterator[Sample]:
        _, _, noise, captions = SPLITS[split]
        for index, (scene, rng) in enumerate(scenes(split, seed)):
            png = io.BytesIO()
            render(scene).save(png, "png")
            texts = [caption(scene, noise, rng) for _ in range(captions)]
            yield Sample(f"{split}-{index:06d}", png.getvalue(), texts, {"facts": scene.facts})

    for split in splits:
        if split == "prompts":
            captions = (caption(scene, "clean", rng) for scene, rng in scenes(split, seed))
            write_atomic(out / f"{split}.txt", "".join(f"{text}\n" for text in captions))
            continue
        if (out / split / "manifest.json").exists():
            print(f"{out / split}: already there")
            continue
        source = f"miniature world, split {split}, seed {seed}"
        total = SPLITS[split][0]
        write_shards(
            samples(split),
            out / split,
            samples_per_shard=samples_per_shard,
            total=total,
            source=source,
            without_captions=not SPLITS[split][3],
        )


def main(arguments: list[str]) -> int:
    """Writes the miniature world's splits for finetuning and evaluation as shards."""
    parser = argparse.ArgumentParser(prog="cyclefit scenes", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/miniature"), help="folder of the splits")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS)[1:], default=list(SPLITS)[2:])
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    write_splits(parsed.out, parsed.splits, parsed.seed)
    return 0


if __name__ == "__main__":
    run(main)
