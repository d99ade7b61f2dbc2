"""Caption metrics by CLIP's embeddings: CLIPScore, RefCLIPScore and retrieval of the source image."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

WEIGHT = 2.5
PREFIX = "A photo depicts "
"""The authors' code puts it before captions and references."""


@torch.no_grad()
def clip_scores(
    embed: Callable[[list[str]], Tensor], images: Float[Tensor, "n d"], captions: list[str], references: list[list[str]]
) -> dict[str, Float[Tensor, "n"]]:
    """CLIPScore and RefCLIPScore of n captions (Hessel et al., EMNLP 2021, arXiv 2104.08718), each (n,), at least 0.

    CLIPScore = 2.5 max(cos(image, caption), 0); RefCLIPScore is its harmonic mean with max(cos(caption, reference), 0)
    of the best reference. `images` and what `embed` makes of texts are of unit length; texts get the authors' prefix.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys([*captions, *(r for row in references for r in row)]))}
    texts = embed([PREFIX + text for text in place])
    own = texts[[place[text] for text in captions]]
    plain = WEIGHT * (own * images).sum(-1).clamp(min=0)
    owners = torch.tensor([i for i, row in enumerate(references) for _ in row], device=own.device)
    flat = texts[[place[text] for row in references for text in row]]
    similarity = (own[owners] * flat).sum(-1).clamp(min=0)
    best = torch.zeros(len(own), device=own.device).scatter_reduce(0, owners, similarity, "amax")
    harmonic = 2 * plain * best / (plain + best).clamp(min=torch.finfo(plain.dtype).tiny)
    return {"CLIPScore": plain, "RefCLIPScore": harmonic}


def retrieval(
    queries: Float[Tensor, "n d"], gallery: Float[Tensor, "m d"], own: Int[Tensor, "n"]
) -> dict[str, Float[Tensor, "n"]]:
    """R@1, R@5 and R@10: 100 where fewer than k of the gallery are more similar to a query than its own, else 0.

    Unit-length embeddings; `own` is each query's place in the gallery.
    """
    ahead = []
    for part, at in zip(queries.split(4096), own.split(4096), strict=True):
        similarities = part @ gallery.T
        ahead.append((similarities > similarities.gather(1, at[:, None])).sum(1))
    return {f"R@{k}": 100 * (torch.cat(ahead) < k).float() for k in (1, 5, 10)}
