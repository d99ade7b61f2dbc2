"""Hard negatives: true captions of scenes beside the same with one fact changed, which a judge should like less."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit.config.ranges import Count, Seed, checked
from cyclefit.data.hard_negatives import Benchmark, Example
from cyclefit.metrics.facts import OPPOSITE, SHAPES, SIZE_WORDS
from cyclefit.miniature.scenes import BACKGROUNDS, COLOURS, Scene, caption, render, scenes

VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZE_WORDS)}


def changed(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """A scene of two things with one fact changed, by kind; without the kinds that would change nothing."""
    first, second = scene.things
    found = {}
    for what in ("colour", "size"):
        one, other = getattr(first, what), getattr(second, what)
        if one != other:
            things = replace(first, **{what: other}), replace(second, **{what: one})
            found[f"{what}s swapped"] = replace(scene, things=things)
    found["relation turned"] = replace(scene, place=OPPOSITE[scene.place])
    for what, values in VALUES.items():
        place = int(rng.integers(2))
        value = str(rng.choice([v for v in values if v != getattr(scene.things[place], what)]))
        things = [replace(t, **{what: value}) if i == place else t for i, t in enumerate(scene.things)]
        found[f"{what} replaced"] = replace(scene, things=tuple(things))
    background = str(rng.choice([v for v in BACKGROUNDS if v != scene.background]))
    return found | {"background replaced": replace(scene, background=background)}


def negatives(split: str, seed: int = 0) -> Iterator[tuple[Scene, dict[str, list[str]]]]:
    """The split's scenes of two things, and of each by kind a full caption and its hard negative."""
    for index, (scene, _) in enumerate(scenes(split, seed)):
        if len(scene.things) < 2:
            continue
        made = changed(scene, np.random.default_rng([seed, index, 1]))
        # The same draws for both: they differ in the fact alone.
        yield (
            scene,
            {
                kind: [caption(s, "full", np.random.default_rng([seed, index, 2])) for s in (scene, other)]
                for kind, other in made.items()
            },
        )


def pairs(split: str, count: int, seed: int = 0) -> tuple[Float[Tensor, "n 3 32 32"], list[dict[str, list[str]]]]:
    """Images of the first `count` scenes of two things, and of each by kind a full caption and its hard negative."""
    drawn, captions = zip(*islice(negatives(split, seed), count), strict=True)
    images = np.stack([np.asarray(render(scene)) for scene in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, list(captions)


@checked
@dataclass
class Miniature(Benchmark):
    """Hard negatives of the miniature world: the first scenes of two things of a split, and of each every kind."""

    split: Literal["finetune", "validation", "test", "novel"] = "test"
    count: Count = 150
    """Number of scenes."""
    seed: Seed = 0

    def __post_init__(self):
        drawn = list(islice(negatives(self.split, self.seed), self.count))
        images = []
        for scene, _ in drawn:
            render(scene).save(file := io.BytesIO(), "PNG")
            images.append(file.getvalue())
        kinds = max((captions for _, captions in drawn), key=len)
        self.examples = [
            Example(f"{self.split}-{place}", kind, [images[place]], captions[kind][:1], captions[kind][1:])
            for kind in kinds
            for place, (_, captions) in enumerate(drawn)
            if kind in captions
        ]
