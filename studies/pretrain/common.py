"""What every stage of the pretraining uses: its scenes and captions, the loop that trains, the number of steps."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from cyclefit.miniature import scenes
from cyclefit.progress import progress_bar
from studies.pretrain.vocabularies import CONTEXT_LENGTH

PAIRS = {
    "first": {
        "vae": 2000,
        "decoder": 500,
        "text_encoder": 500,
        "generator": 3000,
        "clip": 500,
        "clip-heldout": 1500,
        "eyes": 2000,
        "captions": 2000,
        "web captions": 750,
        "reader": 800,
    },
    "modern": {
        "chat eyes": 1200,
        "chat captions": 2000,
        "chat web captions": 750,
        "chat captions again": 500,
        "chat web captions again": 300,
        "flow text_encoder": 1000,
        "flow text_encoder_2": 1000,
        "flow transformer": 3500,
    },
}
"""What is trained of each pair, and for how many steps."""
STEPS = PAIRS["first"] | PAIRS["modern"]


@cache
def world(split: str, seed: int) -> tuple[Tensor, list[scenes.Scene], list[np.random.Generator]]:
    """A split's images as uint8 `(n, 3, 32, 32)`, its scenes, and a generator for the captions of each."""
    drawn, generators = zip(*scenes.scenes(split, seed), strict=True)
    images = np.stack([np.asarray(scenes.render(scene)) for scene in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), list(drawn), list(generators)


@cache
def captions(split: str, seed: int, levels: tuple[str, ...]) -> list[list[str]]:
    """For each level of noise, one caption per scene of the split."""
    _, drawn, _ = world(split, seed)
    rng = np.random.default_rng([seed, len(levels), 7])
    return [[scenes.caption(scene, level, rng) for scene in drawn] for level in levels]


def tokens(tokenizer, texts: list[list[str]]) -> Tensor:
    """Token ids `(levels, n, CONTEXT_LENGTH)` of texts."""
    return torch.stack(
        [
            tokenizer(row, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt").input_ids
            for row in texts
        ]
    )


def train(
    name: str,
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    lr: float,
    after: Callable[[], None] = lambda: None,
) -> None:
    """AdamW over STEPS[name] steps with warm-up and cosine decay, behind a progress bar."""
    steps = STEPS[name]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / (0.04 * steps), 0.02 + 0.98 * (1 + math.cos(math.pi * k / steps)) / 2),
    )
    with progress_bar() as progress:
        task = progress.add_task(name, total=steps)
        mean = None
        for _ in range(steps):
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            after()
            mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
            progress.update(task, advance=1, description=f"{name}, loss {mean:.4f}")


def batches(images: Tensor, size: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns the next random indices and their images in [0, 1], epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = iter(())

    def following() -> tuple[Tensor, Tensor]:
        nonlocal order
        index = next(order, None)
        if index is None or len(index) < size:
            order = iter(torch.randperm(len(images), generator=generator).split(size))
            index = next(order)
        return index, images[index].float() / 255

    return following
