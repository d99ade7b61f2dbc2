"""Reranked inference: sample N captions of an image, or N images of a prompt, and keep the one with the best score.

In Li et al., ICCV 2023 (arXiv 2212.12249), section 3.1, a caption's score is the CLIP similarity of the source image
and the image regenerated from the caption; an image's score is the CLIP similarity of its prompt and its caption. Both
cost N generations per input, which cycle finetuning avoids at inference.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.judges import Judge, Partners, Race
from cyclefit.models import Captioner, Decoding, Generator


def sample_seed(key: str, seed: int = 0) -> int:
    """The random seed of a sample, a function of its key and the run's seed only."""
    return zlib.crc32(f"{seed}/{key}".encode())


@dataclass
class Drawing:
    """Sampling settings of a generator; its own steps and guidance if None."""

    steps: int | None = None
    guidance_scale: float | None = None


@dataclass
class Candidates:
    """N candidates of each input of a batch, with the judges' scores."""

    candidates: list[list[str]] | Float[Tensor, "b n 3 h w"]
    """The captions of each image in the order of sampling, or the images in [0, 1] of each prompt."""
    scores: dict[str, Float[Tensor, "b n"]]
    """Scores by judge, higher is better; on the CPU."""
    seconds: dict[str, float]
    """Seconds for the whole batch, by decoding (`greedy`, `nucleus x 10`) or `drawing`, and by judge.

    Of judges that share their computation, each has the time it would take alone.
    """
    rounds: dict[str, Int[Tensor, "b n"]] = field(default_factory=dict)
    """By judge that races, in how many rounds each candidate was judged; 0 with score NaN where it does not choose."""


@torch.no_grad()
def rerank(
    model: Captioner | Generator,
    partners: Partners,
    judges: dict[str, Judge],
    given: Float[Tensor, "b 3 h w"] | Sequence[str],
    how: Sequence[Decoding] | Drawing,
    seeds: Sequence[int] | Sequence[Sequence[int]],
    others: Float[Tensor, "b m 3 h w"] | list[list[str]] | None = None,
) -> Candidates:
    """Samples candidates of each input and scores all of them with every judge.

    Candidates and the judges' noise depend only on the seeds; a caption that was sampled twice is judged once. A judge
    that races scores only the captions of the last decoding, among which it chooses.

    Args:
        model: a captioner, p(y | x), or a generator, p(x | y).
        partners: the frozen models that the judges need.
        judges: the judges by name.
        given: source images for a captioner, or prompts for a generator.
        how: decodings for a captioner, for instance `[Decoding("nucleus", num_samples=10)]`; sampling settings for a
            generator.
        seeds: one per image for a captioner; n per prompt for a generator, one for each image to draw.
        others: other images or prompts for contrastive judges; None for those of the batch.

    """
    if isinstance(model, Captioner):
        rows, seconds = [], {}
        for decoding in how:
            sampled, seconds[label(decoding)] = sample(model, given, decoding, seeds)
            rows.append(sampled)
        candidates = [[text for part in parts for text in part] for parts in zip(*rows, strict=True)]
        noise = [seed + 1 for seed in seeds]
    else:
        start = time.perf_counter()
        prompts = [prompt for prompt, row in zip(given, seeds, strict=True) for _ in row]
        images = model.generate(prompts, [seed for row in seeds for seed in row], how.steps, how.guidance_scale)
        _wait(images)
        candidates, seconds = images.unflatten(0, (len(given), -1)), {"drawing": time.perf_counter() - start}
        noise = [row[0] + 1 for row in seeds]
    scores, rounds, longest = {}, {}, {}
    with partners.sharing():
        for name, judge in judges.items():
            start = time.perf_counter()
            if isinstance(judge, Race):
                scores[name], rounds[name] = _raced(judge, partners, given, candidates, how[-1], noise, others)
            else:
                scores[name] = judge.score(partners, given, candidates, noise, others).float().cpu()
            seconds[name] = time.perf_counter() - start
            if judge.basis is not None:
                # Alone, each would take as long as the one that computed what they share.
                seconds[name] = longest[judge.basis] = max(seconds[name], longest.get(judge.basis, 0.0))
    return Candidates(candidates, scores, seconds, rounds)


def _raced(
    judge: Race, partners: Partners, given, candidates: list[list[str]], decoding: Decoding, noise, others
) -> tuple[Float[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Scores and rounds of a race among the captions of the last decoding."""
    before = len(candidates[0]) - decoding.num_samples
    scores, rounds = judge.score_rounds(partners, given, [row[before:] for row in candidates], noise, others)
    return F.pad(scores.float().cpu(), (before, 0), value=torch.nan), F.pad(rounds.cpu(), (before, 0))


def label(decoding: Decoding) -> str:
    """The name of a decoding in `Candidates.seconds`: `greedy`, `nucleus x 10`."""
    return decoding.method + (f" x {decoding.num_samples}" if decoding.num_samples > 1 else "")


def sample(
    captioner: Captioner, images: Float[Tensor, "b 3 h w"], decoding: Decoding, seeds: Sequence[int]
) -> tuple[list[list[str]], float]:
    """Captions of each image with one decoding, and the seconds they took, including the vision tower."""
    _wait(images)
    start = time.perf_counter()
    captions = captioner.sample(images, decoding, seeds)
    _wait(images)
    return captions, time.perf_counter() - start


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def with_others(
    batches: Iterator[Batch], count: int, of: Callable[[Batch], Tensor | list] = attrgetter("images")
) -> Iterator[tuple[Batch, Float[Tensor, "b m 3 h w"] | list[list[str]] | None]]:
    """Adds `count` other inputs per sample to each batch, which depend on the sample but not on its batch.

    They are chosen by the sample's key from the first 4 x `count` samples of the stream; `of` returns a batch's inputs.

    Raises:
        UserError: the stream has too few samples to contrast with.

    """
    if not count:
        yield from ((batch, None) for batch in batches)
        return
    held: list[Batch] = []
    size = 4 * count
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= size:
            break
    keys = [key for batch in held for key in batch.keys][:size]
    if len(keys) <= count:
        raise UserError(f"contrasting with {count} other images needs more than the {len(keys)} images available")
    pool = [one for batch in held for one in of(batch)][:size]

    def others(batch: Batch) -> Tensor | list:
        rows = []
        for key in batch.keys:
            start = sample_seed(key) % len(keys)
            places = [(start + k) % len(keys) for k in range(count + 1)]
            rows.append([pool[place] for place in places if keys[place] != key][:count])
        return torch.stack([torch.stack(row) for row in rows]) if isinstance(pool[0], Tensor) else rows

    for batch in held:
        yield batch, others(batch)
    for batch in batches:
        yield batch, others(batch)
