"""Judges of captions and of images: CLIP similarity, a captioner's answers, functions, and sums of judges."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit import UserError
from cyclefit.config.ranges import Count, NonNegative, checked
from cyclefit.judges.base import Judge, Partners, check_complete, distinct
from cyclefit.metrics.questions import VQASCORE, check_template
from cyclefit.models import Captioner
from cyclefit.models.pretrained import Adapter
from cyclefit.records import Kind


@dataclass
class ImageText(Judge):
    """f(x, y): CLIP similarity of image and text, in both directions; the control, which needs no other model."""

    kinds = ("captions", "images")
    needs = ("scorer",)

    def check(self, partners: Partners) -> None:
        """Whether the scorer embeds both."""
        partners.scorer.check("ImageText", "images", "texts")

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """Cosine similarities, in [-1, 1]."""
        self.check(partners)
        if isinstance(candidates, Tensor):
            one, many = partners.scorer.embed_texts(given), partners.scorer.embed_images(candidates.flatten(0, 1))
        else:
            one = partners.scorer.embed_images(given)
            many = partners.scorer.embed_texts([text for row in candidates for text in row])
        return torch.einsum("bd,bnd->bn", one, many.unflatten(0, (len(one), -1)))


@checked
@dataclass
class YesProbability(Judge):
    """P("Yes" | image, question): how likely a captioner says that the image shows the text.

    VQAScore (Lin et al., ECCV 2024, arXiv 2404.01291): the question and the answer are those of its repository. The
    probability of the answer is the product of those of its tokens, without an end token.
    """

    question: str = VQASCORE
    """The question; `{}` is the text."""
    answer: str = "Yes"
    captioner: Captioner | None = field(default=None, repr=False)
    """The captioner that is asked; the partners' if None."""
    batch_size: Count = 32
    """Pairs of image and text that are asked about together."""

    kinds = ("captions", "images")

    @property
    def needs(self) -> tuple[str, ...]:
        """The captioner, unless it has its own."""
        return ("captioner",) if self.captioner is None else ()

    def check(self, partners: Partners) -> None:
        """Whether the captioner answers questions, and the settings are a question and an answer."""
        check_template("YesProbability", self.question, self.answer)
        (self.captioner or partners.captioner).check_questions("YesProbability")

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """Probabilities, in [0, 1]."""
        self.check(partners)
        captioner = self.captioner or partners.captioner
        if isinstance(candidates, Tensor):
            images, count = candidates.flatten(0, 1), candidates.shape[1]
            pairs = [(row, given[row // count]) for row in range(len(images))]
            index = [list(range(row, row + count)) for row in range(0, len(images), count)]
        else:
            images, (pairs, index) = given, distinct(candidates)
        found = []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            rows = sorted({row for row, _ in part})
            at = torch.tensor([rows.index(row) for row, _ in part], device=images.device)
            questions = [self.question.replace("{}", text) for _, text in part]
            features = captioner.embed(images[rows])[at]
            found.append(captioner.answer_log_probs(features, questions, [self.answer] * len(part)).exp())
        return torch.cat(found)[torch.tensor(index, device=images.device)]


@dataclass
class Function(Judge):
    """A judge that is a function, or an object that can be called, with the arguments of `Judge.score`."""

    function: Callable
    """Returns one score for each candidate, as a tensor or as lists; a config gives its dotted path."""
    kinds: tuple[Kind, ...] = ("captions",)
    """What it judges: `captions`, `images` or both."""
    needs: tuple[Literal["generator", "scorer", "captioner"], ...] = ()
    """The partners it uses."""

    def __post_init__(self):
        self.named = getattr(self.function, "__qualname__", type(self.function).__qualname__)

    @property
    def label(self) -> str:
        """The function's name."""
        return self.named.rpartition(".")[2]

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """What the function returns; raises UserError if it is not one score for each candidate."""
        found, shape = self.function(partners, given, candidates, seeds, others), (len(given), len(candidates[0]))
        device = next(of.device for of in (given, candidates) if isinstance(of, Tensor))
        try:
            scores = torch.as_tensor(found, dtype=torch.float32, device=device)
        except (TypeError, ValueError, RuntimeError):
            scores = None
        if scores is None or scores.shape != shape:
            raise UserError(f"{self.label} must return one score for each candidate, a tensor of shape {shape}")
        return scores

    def describe(self) -> str:
        """The first paragraph of the function's docstring, or its name."""
        return " ".join((inspect.getdoc(self.function) or self.named).split("\n\n")[0].split())


@checked
class Sum(Judge):
    """sum_j w_j s_j / spread(s_j): a weighted sum of several judges' scores on a common scale.

    The spread is the standard deviation of a judge's scores around each input's mean, over all candidates of the batch,
    as in the normalisation of advantages. In a batch of one input, it is the spread of that input's candidates.

    Args:
        judges: the judges.
        weights: one per judge; all 1 if None.

    """

    def __init__(self, judges: list[Judge], weights: list[NonNegative] | None = None):
        if not judges:
            raise UserError("Sum: judges must name at least one judge")
        if weights is not None and len(weights) != len(judges):
            raise UserError(f"Sum: give as many weights as judges: there are {len(weights)} and {len(judges)}")
        for judge in judges:
            check_complete(judge, "Sum")
        self.judges, self.weights = judges, weights
        labels = [judge.label for judge in judges]
        earlier = [labels[:i].count(label) for i, label in enumerate(labels)]
        self.names = [f"{label}-{k + 1}" if k else label for label, k in zip(labels, earlier, strict=True)]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that all judges have in common."""
        return tuple(kind for kind in get_args(Kind) if all(kind in judge.kinds for judge in self.judges))

    @property
    def needs(self) -> tuple[str, ...]:
        """The partners that any of the judges needs."""
        return tuple(dict.fromkeys(name for judge in self.judges for name in judge.needs))

    @property
    def num_others(self) -> int:
        """The largest number among the judges."""
        return max(judge.num_others for judge in self.judges)

    @property
    def models(self) -> list[Adapter]:
        """The models of all judges."""
        return [model for judge in self.judges for model in judge.models]

    def check(self, partners: Partners) -> None:
        """Checks the settings of every judge."""
        for judge in self.judges:
            judge.check(partners)

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """The weighted sum, in units of spread and with mean 0 for each input."""
        return self.score_parts(partners, given, candidates, seeds, others)[0]

    @torch.no_grad()
    def score_parts(self, partners, given, candidates, seeds, others=None):
        """The weighted sum, and each judge's own scores by its name; judges of the same name are numbered."""
        total, parts = 0, {}
        weights = self.weights or [1.0] * len(self.judges)
        for name, judge, weight in zip(self.names, self.judges, weights, strict=True):
            fewer = others
            if others is not None:
                few = slice(judge.num_others)
                fewer = others[:, few] if isinstance(others, Tensor) else [row[few] for row in others]
            scores = parts[name] = judge.score(partners, given, candidates, seeds, fewer).float()
            around = scores - scores.mean(1, keepdim=True)
            total = total + weight * around / (around.square().mean().sqrt() + 1e-12)
        return total, parts

    def cost(self, partners, num_candidates) -> dict[str, int]:
        """The total cost of all judges."""
        costs = [judge.cost(partners, num_candidates) for judge in self.judges]
        return {name: sum(cost[name] for cost in costs) for name in costs[0]}
