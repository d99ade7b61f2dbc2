"""Reranked inference: sample N captions, keep the one a judge likes best; and the evaluation built on it.

Li et al., ICCV 2023 (arXiv 2212.12249), section 3.1: the judge is the CLIP similarity of the source image and the image
regenerated from the caption. It costs N generations per input, which cycle finetuning moves into the weights.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.captioners import Captioner, Decoding
from cyclefit.judges import Judge, Partners


def sample_seed(key: str, seed: int = 0) -> int:
    """A sample's own random seed: a function of its key and the run's seed alone."""
    return zlib.crc32(f"{seed}/{key}".encode())


@dataclass
class Candidates:
    """What reranking made of one batch."""

    captions: list[list[str]]
    """N captions of each image, in the order they were sampled."""
    scores: dict[str, Float[Tensor, "b n"]]
    """Each judge's scores, higher is better."""
    seconds: dict[str, float]
    """Of sampling (`sampling`) and of each judge, for the whole batch."""

    def ranked(self, judge: str) -> list[list[str]]:
        """Each image's captions, the judge's favourite first."""
        order = self.scores[judge].argsort(dim=1, descending=True, stable=True).tolist()
        return [[row[i] for i in places] for row, places in zip(self.captions, order, strict=True)]


@torch.no_grad()
def rerank(
    captioner: Captioner,
    partners: Partners,
    judges: dict[str, Judge],
    images: Float[Tensor, "b 3 h w"],
    decodings: Sequence[Decoding],
    seeds: Sequence[int],
    others: Float[Tensor, "b m 3 h w"] | None = None,
) -> Candidates:
    """Captions of each image under `decodings`, one after another, and every judge's scores of them all.

    Captions and noise depend on an image's seed alone; a caption that was sampled twice is judged once.

    Args:
        captioner: p(y | x).
        partners: the frozen models the judges ask for.
        judges: by name.
        images: the source images.
        decodings: for instance `[Decoding("nucleus", num_samples=10)]`.
        seeds: one per image.
        others: other images for judges that contrast; the batch's own if None.

    """
    start = time.perf_counter()
    rows = [captioner.sample(images, decoding, seeds) for decoding in decodings]
    captions = [[text for part in parts for text in part] for parts in zip(*rows, strict=True)]
    _wait(images)
    seconds, scores = {"sampling": time.perf_counter() - start}, {}
    noise_seeds = [seed + 1 for seed in seeds]
    for name, judge in judges.items():
        start = time.perf_counter()
        scores[name] = judge.score(partners, images, captions, noise_seeds, others).float().cpu()
        seconds[name] = time.perf_counter() - start
    return Candidates(captions, scores, seconds)


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def with_others(batches: Iterator[Batch], count: int) -> Iterator[tuple[Batch, Float[Tensor, "b m 3 h w"] | None]]:
    """Each batch with `count` other images per sample, which depend on the sample and not on its batch.

    They are taken from the first 4 x `count` images of the stream, by the sample's key.

    Raises:
        UserError: the stream holds too few images to contrast with.

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
        raise UserError(f"contrasting with {count} other images needs more than the {len(keys)} images there are")
    pool = torch.cat([batch.images for batch in held])[:size]

    def others(batch: Batch) -> Tensor:
        rows = []
        for key in batch.keys:
            start = sample_seed(key) % len(keys)
            places = [(start + k) % len(keys) for k in range(count + 1)]
            rows.append([place for place in places if keys[place] != key][:count])
        return pool[torch.tensor(rows)]

    for batch in held:
        yield batch, others(batch)
    for batch in batches:
        yield batch, others(batch)
