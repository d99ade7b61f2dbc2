"""What flows through the project: one batch of images with their captions."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info


@dataclass
class Batch:
    """Images and their captions, in the one convention every part of the project shares.

    Images are RGB in [0, 1]; `ShardData` loads them as bytes, and `to` makes floats of them on the device. Each model
    adapter resizes and normalises for its own network, in differentiable tensor operations.
    """

    images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]
    captions: list[str]
    """The caption of this visit, one of the references (training picks one at random, evaluation the first)."""
    references: list[list[str]]
    """All captions of each image."""
    keys: list[str]
    """Each sample's name in its shard; unique within a split."""
    latents: Float[Tensor, "b c h2 w2"] | None = None
    """The generator's scaled latents of the images, where the shards hold them."""
    facts: list[dict | None] | None = None
    """What is in each image (`cyclefit.metrics.facts`), None where the shards do not say; evaluation reads it alone."""
    rejected_captions: list[str] | None = None
    """What lost to each caption as a caption of its image, where a cycle asks for pairs."""
    rejected_images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | None = None
    """What lost to each image as an image of its caption, where a cycle asks for pairs."""
    unpaired: "Batch | None" = None
    """Further images for the cycle of a captioner, without captions: each caption is empty and has no references."""
    prompts: "Batch | None" = None
    """Further captions for the cycle of a generator, without images: the images have 0 x 0 pixels."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, images as floats; Lightning moves batches by it."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, part in parts.items():
            if isinstance(part, Batch):
                parts[name] = part.to(device)
            elif isinstance(part, Tensor):
                # Waiting for a GPU would mean waiting for the step before.
                part = part.to(device, non_blocking=torch.device(device).type == "cuda")
                # By a tensor of the device: CUDA multiplies by the rounded reciprocal of a number.
                bytes_ = part.dtype == torch.uint8
                parts[name] = part.float().div_(torch.full((), 255.0, device=device)) if bytes_ else part
        return Batch(**parts)

    def __getitem__(self, rows: slice) -> "Batch":
        """Some of the samples, without `unpaired` and `prompts`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        parts |= {"unpaired": None, "prompts": None}
        return Batch(**{name: part if part is None else part[rows] for name, part in parts.items()})

    def __len__(self) -> int:
        return len(self.keys)


class Stack:
    """Images, at most `most`, copied into one tensor as they come; in a worker it is in shared memory from the start.

    Images kept until a batch is complete would have left the cache, and copying them once more would share them.
    """

    def __init__(self, most: int):
        self.most, self.count, self.images = most, 0, None

    def add(self, image: UInt8[np.ndarray, "3 h w"] | None) -> None:
        """Copies an image, of the same size as those before it, if there is one."""
        if image is None:
            return
        if self.images is None and get_worker_info() is not None and image.size:
            shared = torch.UntypedStorage._new_shared(self.most * image.size)
            self.images = torch.empty(0, dtype=torch.uint8).set_(shared).view(self.most, *image.shape)
        elif self.images is None:  # numpy's memory is in huge pages
            self.images = torch.from_numpy(np.empty((self.most, *image.shape), np.uint8))
        self.images[self.count] = torch.from_numpy(image)
        self.count += 1

    def made(self) -> UInt8[Tensor, "b 3 h w"] | None:
        """The images; None where there was none."""
        return None if self.images is None else self.images[: self.count]
