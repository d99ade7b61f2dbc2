"""What judges have in common, and the frozen models that they use."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit import UserError
from cyclefit.models import Captioner, Decoding, Generator, Scorer
from cyclefit.models.pretrained import Adapter, freeze
from cyclefit.records import Kind


@dataclass
class Partners:
    """The frozen models that a cycle or judge uses; None for those that are not configured."""

    generator: Generator | None = None
    scorer: Scorer | None = None
    captioner: Captioner | None = None
    _captioned: tuple[Tensor, int, list[str]] | None = field(default=None, init=False, repr=False)
    _shared: dict[Hashable, tuple[tuple, Tensor]] | None = field(default=None, init=False, repr=False)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within it, judges that score the same candidates share what `once` computes for them."""
        self._shared = {}
        try:
            yield
        finally:
            self._shared = None

    def once(self, basis: Hashable, inputs: tuple, compute: Callable[[], Tensor]) -> Tensor:
        """The value of `compute`; within `sharing`, computed once per basis while `inputs` are the same objects."""
        if self._shared is None:
            return compute()
        known, value = self._shared.get(basis, ((), None))
        if value is None or any(a is not b for a, b in zip(known, inputs, strict=True)):
            value = compute()
            self._shared[basis] = inputs, value
        return value

    @torch.no_grad()
    def captions_of(self, images: Float[Tensor, "b n 3 h w"], max_new_tokens: int) -> list[str]:
        """Greedy captions of all b * n images; cached for the last `images`, since several judges may need them."""
        if self._captioned is None or self._captioned[0] is not images or self._captioned[1] != max_new_tokens:
            flat = images.flatten(0, 1)
            rows = self.captioner.sample(flat, Decoding(max_new_tokens=max_new_tokens), [0] * len(flat))
            self._captioned = images, max_new_tokens, [caption for [caption] in rows]
        return self._captioned[2]


class Judge(ABC):
    """Scores candidates, higher is better, without gradient."""

    kinds: tuple[Kind, ...] = ("captions",)
    """What it judges: `captions` of images, `images` of prompts, or both."""
    needs: tuple[str, ...] = ()
    """The partners it needs."""
    num_others = 0
    """The number of other inputs that each input is contrasted with."""
    names: Sequence[str] = ()
    """The names of its parts, if it has any."""
    races = False
    """Whether it judges in full only those candidates that may be the best: for choosing one, not as a reward."""
    basis: Hashable = None
    """What is equal for judges that share their computation by `Partners.once`; None if it shares none."""
    baseline: str | None = None
    """The text whose score `score_across` subtracts for each image; None if scores of different images compare."""

    @property
    def models(self) -> list[Adapter]:
        """The models of its own, which it uses in place of partners."""
        return [value for value in vars(self).values() if isinstance(value, Adapter)]

    def check(self, partners: Partners) -> None:  # noqa: B027
        """Checks its settings against the partners; called before the first step."""

    @abstractmethod
    def score(
        self,
        partners: Partners,
        given: Float[Tensor, "b 3 h w"] | Sequence[str],
        candidates: list[list[str]] | Float[Tensor, "b n 3 h w"],
        seeds: Sequence[int],
        others: Float[Tensor, "b m 3 h w"] | list[list[str]] | None = None,
    ) -> Float[Tensor, "b n"]:
        """One score per candidate; every input has the same number of candidates.

        Args:
            partners: the frozen models.
            given: the source images if captions are judged, or the prompts if images are judged.
            candidates: n captions of each image, or n images of each prompt.
            seeds: one per input; all its candidates share the noise, so that luck does not decide their ranking.
            others: m other inputs for each input, for contrastive judges; None for the next ones in the batch.

        """

    def score_across(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """Scores of captions that also compare between images: `score`, less that of the image under `baseline`."""
        if self.baseline is None:
            return self.score(partners, given, candidates, seeds, others)
        scores = self.score(partners, given, [[*row, self.baseline] for row in candidates], seeds, others)
        return scores[:, :-1] - scores[:, -1:]

    def score_parts(
        self, partners, given, candidates, seeds, others=None
    ) -> tuple[Float[Tensor, "b n"], dict[str, Float[Tensor, "b n"]]]:
        """`score`, and the scores of the judges that it consists of, by name; only a `Sum` has such parts."""
        return self.score(partners, given, candidates, seeds, others), {}

    def cost(self, partners: Partners, num_candidates: int) -> dict[str, int]:
        """Generated images and denoiser calls per input, for `num_candidates` different candidates."""
        return {"generator_calls": 0, "denoiser_calls": 0}

    @property
    def label(self) -> str:
        """A short name, for logs and messages."""
        return type(self).__name__

    def describe(self) -> str:
        """A description for the report: the first paragraph of the class's docstring."""
        return " ".join((inspect.getdoc(type(self)) or "").split("\n\n")[0].split())


def check_judge(judge: Judge, kind: Kind, place: str) -> None:
    """Raises UserError if the judge set in `place` does not judge this kind of candidates."""
    if kind not in judge.kinds:
        raise UserError(f"{place}: {type(judge).__name__} judges {' and '.join(judge.kinds)}, not {kind}")


def check_complete(judge: Judge, place: str) -> None:
    """Raises UserError if the judge set in `place`, where every score counts, only ranks some of the candidates."""
    if judge.races:
        what = f"{judge.label} drops candidates before they are scored in full, and here every score counts"
        raise UserError(f"{place}: {what}: set the judge that races itself")


def place(judge: Judge | None, device: torch.device) -> None:
    """Freezes a judge's own models and moves them to a device; on a GPU, casts them to bf16."""
    for model in judge.models if judge is not None else ():
        freeze(model.to(device))
        model.half_on_gpu()


def distinct(candidates: list[list[str]]) -> tuple[list[tuple[int, str]], list[list[int]]]:
    """The distinct (image, caption) pairs, and the index of each candidate's pair."""
    pairs: dict[tuple[int, str], int] = {}
    index = [[pairs.setdefault((i, text), len(pairs)) for text in row] for i, row in enumerate(candidates)]
    return list(pairs), index
