"""Racing: candidates are judged with little effort first, and only those that may win with more."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cyclefit import UserError
from cyclefit.config.ranges import Count, Range, checked
from cyclefit.judges.base import Judge, Partners, distinct
from cyclefit.models.pretrained import Adapter


class Progressive(Judge):
    """A judge of captions that can score with less effort: fewer timesteps, or fewer solver steps."""

    @abstractmethod
    def effort(self, partners: Partners) -> int:
        """The effort of `score`."""

    @abstractmethod
    def begin(
        self,
        partners: Partners,
        given: Float[Tensor, "b 3 h w"],
        pairs: list[tuple[int, str]],
        seeds: Sequence[int],
        others: Float[Tensor, "b m 3 h w"] | None,
    ) -> Callable[[int, Int[Tensor, "q"]], Float[Tensor, "q"]]:
        """A function that scores some of the pairs of image and caption with an effort; at full effort as `score`.

        It is called with rising effort and ever fewer pairs, and computes nothing twice that it can keep.
        """

    @abstractmethod
    def spent(self, partners: Partners, efforts: Sequence[int]) -> dict[str, int]:
        """Generated images and denoiser calls for one caption that was scored with these efforts, one after another."""


@checked
@dataclass
class Race(Judge):
    """Successive halving: all candidates are judged with little effort, the best of them with more, up to the full one.

    Round r judges with effort min(first / keep^r, all) and keeps the ceil(keep n) best of an image's n different
    captions; the last round has the judge's full effort. Those that reach it have the judge's own score, s. A caption
    that was dropped after round r has min_j s_j - (min_j s_rj - s_r), where j are those that went on and s_r is the
    score of that round: less than any of theirs, by as much as it was behind.

    Karnin et al., ICML 2013 (sequential halving); of denoising errors that share timesteps and noise, as in diffusion
    classifiers (Li et al., ICCV 2023, arXiv 2303.16203; Clark and Jaini, NeurIPS 2023, arXiv 2303.15233).
    """

    races = True

    judge: Judge
    """The judge whose favourite is sought, `Denoising` or `Regeneration`."""
    keep: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """The share of an image's captions that goes on to the next round."""
    first: Count = 1
    """The effort of the first round: timesteps of `Denoising`, solver steps of `Regeneration`."""

    def __post_init__(self):
        if not isinstance(self.judge, Progressive):
            raise UserError(f"Race: judge must be Denoising or Regeneration, not {type(self.judge).__name__}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The partners of its judge."""
        return self.judge.needs

    @property
    def num_others(self) -> int:
        """As many as its judge."""
        return self.judge.num_others

    @property
    def models(self) -> list[Adapter]:
        """Its judge's own."""
        return self.judge.models

    def check(self, partners: Partners) -> None:
        """Checks its judge's settings, and that the first round is not already the full effort."""
        self.judge.check(partners)
        if self.first >= (full := self.judge.effort(partners)):
            raise UserError(f"Race: first must be below the effort of {self.judge.label}, {full}, not {self.first}")

    def efforts(self, partners: Partners) -> list[int]:
        """The effort of each round."""
        full, found = self.judge.effort(partners), [self.first]
        while found[-1] < full:
            found.append(min(full, math.ceil(self.first / self.keep ** len(found) - 1e-6)))
        return found

    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """The judge's scores of those that reached the last round, and lower ones of the others."""
        return self.score_rounds(partners, given, candidates, seeds, others)[0]

    @torch.no_grad()
    def score_rounds(
        self, partners, given, candidates, seeds, others=None
    ) -> tuple[Float[Tensor, "b n"], Int[Tensor, "b n"]]:
        """The scores, and in how many rounds each candidate was judged."""
        self.check(partners)
        pairs, index = distinct(candidates)
        image, index = (torch.tensor(of, device=given.device) for of in ([i for i, _ in pairs], index))
        score = self.judge.begin(partners, given, pairs, seeds, others)
        alive, rounds, judged = torch.arange(len(pairs), device=given.device), torch.zeros_like(image), []
        for effort in self.efforts(partners):
            if judged:
                alive = alive[self._best(judged[-1][1], image[alive])]
            judged.append((alive, score(effort, alive)))
            rounds[alive] += 1
        scores = judged[-1][1].new_zeros(len(pairs)).index_copy(0, *judged[-1])
        for number, (places, found) in reversed(list(enumerate(judged[:-1], 1))):
            on, of = rounds[places] > number, image[places]
            lowest, last = (_least(values[on], of[on], len(given))[of] for values in (scores[places], found))
            scores[places] = torch.where(on, scores[places], lowest - (last - found))
        return scores[index], rounds[index]

    def cost(self, partners, num_candidates) -> dict[str, int]:
        """The cost of its rounds; it depends on the number of candidates alone, and grows slower than it."""
        efforts, count, total = self.efforts(partners), num_candidates, {"generator_calls": 0, "denoiser_calls": 0}
        for number in range(1, len(efforts) + 1):
            on = self._kept(count) if number < len(efforts) else 0
            for name, calls in self.judge.spent(partners, efforts[:number]).items():
                total[name] += (count - on) * calls
            count = on
        return total

    def describe(self) -> str:
        """Of itself and its judge."""
        return f"{super().describe()} The judge: {self.judge.describe()}"

    def _kept(self, count: int) -> int:
        return math.ceil(self.keep * count - 1e-6)

    def _best(self, scores: Float[Tensor, "q"], image: Int[Tensor, "q"]) -> Int[Tensor, "r"]:
        """The places of those that go on, by rising image."""
        counts = image.unique_consecutive(return_counts=True)[1].tolist()
        kept, start = [], 0
        for count in counts:
            order = scores[start : start + count].argsort(descending=True, stable=True)
            kept.append(start + order[: self._kept(count)].sort().values)
            start += count
        return torch.cat(kept)


def _least(values: Float[Tensor, "q"], image: Int[Tensor, "q"], count: int) -> Float[Tensor, "b"]:
    """The lowest value of each image."""
    return values.new_full((count,), torch.inf).scatter_reduce(0, image, values, "amin")
