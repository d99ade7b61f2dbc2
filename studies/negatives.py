"""How often judges like a true caption of the miniature world better than its hard negative."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit.judges import Judge, Partners
from cyclefit.miniature.negatives import pairs
from cyclefit.rerank import sample_seed

Score = Callable[[Float[Tensor, "b 3 h w"], list[list[str]], list[int]], Float[Tensor, "b n"]]
"""Scores of each image's captions; a seed for each image."""


@torch.no_grad()
def accuracy(score: Score, split: str, count: int = 150, seed: int = 0) -> dict[str, float]:
    """Of each kind the share in percent of true captions that score higher than their hard negatives; chance is 50."""
    images, captions = pairs(split, count, seed)
    kinds = list(dict.fromkeys(kind for of in captions for kind in of))
    found = {}
    for kind in kinds:
        places = [i for i, of in enumerate(captions) if kind in of]
        seeds = [sample_seed(f"{split}-{i}", seed) for i in places]
        scores = score(images[places], [captions[i][kind] for i in places], seeds)
        found[kind] = 100 * float((scores[:, 0] > scores[:, 1]).float().mean())
    return found


def of_judge(judge: Judge, partners: Partners) -> Score:
    """The scores of a judge."""
    return lambda images, candidates, seeds: judge.score(partners, images, candidates, seeds)
