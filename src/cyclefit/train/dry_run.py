"""The memory and time that a training step needs on a GPU, computed without weights on torch's `meta` device.

Tensors on that device have shapes but no values. The step is the one that training runs, with bf16 and fused attention
as on a GPU. Every matrix product is counted, and every tensor is tracked from its creation until it is freed. Not
included are fragmentation of the allocator, workspaces of kernels, the buckets of DDP, and validation.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cyclefit.batch import Batch
from cyclefit.finetune import Finetune
from cyclefit.finetune.unpaired import check_unpaired

CAPTION = "a man in a red shirt is riding a brown horse along the beach"
"""A caption of typical length; a number is appended to make the captions of a step distinct."""

CONTEXT = 0.6 * 2**30
"""Bytes used by CUDA itself and its libraries."""

PEAKS = {"RTX 4090": 165e12, "A100": 312e12, "H100, H200": 989e12}
"""Published FLOP/s of dense bf16 matrix products."""

UTILISATION = 0.4
"""The share of the peak that a training step is assumed to reach."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors created within this mode, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)  # made before: weights
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage not in self._known:
                self._known[storage] = True
                weakref.finalize(storage, self._drop, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return made

    def _drop(self, size: int) -> None:
        self.live -= size


def _storages(values) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.device.type == "meta":
            yield value.untyped_storage()


HALF = [
    *((F, name) for name in ("linear", "conv2d")),
    *((torch, name) for name in ("matmul", "bmm", "baddbmm", "einsum")),
    *((Tensor, name) for name in ("matmul", "__matmul__")),
]
"""Functions that autocast runs in bf16."""
FULL = [
    *((F, name) for name in ("softmax", "log_softmax", "layer_norm", "group_norm", "cross_entropy")),
    *((owner, name) for owner in (torch, Tensor) for name in ("softmax", "log_softmax")),
]
"""Functions that autocast runs in float32."""


def autocast_on_meta() -> Iterator:
    """Patches that apply autocast to tensors on the `meta` device, which torch's autocast ignores."""
    copies: dict[int, Tensor] = {}

    def half(value):
        if not (isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "meta"):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in copies:  # autocast keeps the copies of what is trained
            with torch.enable_grad():
                copies[id(value)] = value.bfloat16()
        return copies[id(value)]

    def full(value):
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    def changed(function: Callable, change: Callable) -> Callable:
        def call(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = [change(x) for x in args]
                kwargs = {name: change(x) for name, x in kwargs.items()}
            return function(*args, **kwargs)

        return call

    for change, functions in ((half, HALF), (full, FULL)):
        for owner, name in functions:
            yield patch.object(owner, name, changed(getattr(owner, name), change))


def transformers_on_meta() -> Iterator:
    """Patches with which models of transformers do not look at values, which the `meta` device has not."""
    yield patch("transformers.masking_utils.is_tracing", lambda *_: True)  # a compiler has none either
    yield patch("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True)  # the places of DeepStack: all


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention that does not keep the matrix of attention weights in memory, like the fused kernels of a GPU."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.bfloat16() for x in (query, key, value))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    graded = any(x.requires_grad for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, graded and torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


@dataclass(frozen=True)
class Needs:
    """What one step requires; everything is in bytes except `flops`."""

    weights: int
    """All models with their buffers, and the moving average."""
    training: int
    """Gradients and the optimizer's state."""
    activations: int
    """The peak of everything else: activations kept for the backward pass, and temporary tensors."""
    flops: int
    """FLOPs of one batch, forward and backward, including what activation checkpointing recomputes."""

    @property
    def memory(self) -> float:
        """The total, including CUDA itself."""
        return self.weights + self.training + self.activations + CONTEXT


def step_needs(
    module: Finetune,
    batch_size: int,
    image_size: int,
    autocast: bool = True,
    latents: bool = False,
    unpaired: int = 0,
    prompts: int = 0,
) -> Needs:
    """Runs a step of a module on the `meta` device twice: to measure its memory and to count its FLOPs.

    `unpaired` and `prompts` are the numbers of images and of captions for the cycle alone.
    Sampled captions are assumed to have the maximum length, so the result is an upper bound.
    """
    module.setup("fit")
    module.on_fit_start()
    halves = module.halves
    trained = [half.trained.values() for half in halves]
    rewards = [getattr(half.cycle, "reward", None) for half in halves]
    models = [module, *(model for reward in rewards if reward is not None for model in reward.models)]
    weights = sum(tensor.nbytes for tensor in {x for of in models for x in (*of.parameters(), *of.buffers())})
    if (average := getattr(module, "ema", None)) is not None:
        weights += sum(tensor.nbytes for tensor in average.shadow_params)
    shape = halves[0].generator.latent_shape if latents else None

    def samples(count: int) -> Batch:
        captions = [f"{CAPTION} {k}" for k in range(count)]
        return Batch(
            images=torch.empty(count, 3, image_size, image_size, device="meta"),
            captions=captions,
            references=[[caption] for caption in captions],
            keys=captions,
            latents=torch.empty(count, *shape, device="meta") if latents else None,
            rejected_captions=captions,
            rejected_images=torch.empty(count, 3, image_size, image_size, device="meta"),
        )

    batch = samples(batch_size)
    batch.unpaired, batch.prompts = (samples(count) if count else None for count in (unpaired, prompts))

    def steps() -> None:
        for half, own in zip(halves, trained, strict=True):
            for parameters in trained:
                for parameter in parameters:
                    parameter.requires_grad_(parameters is own)
            batch.images = torch.empty_like(batch.images)  # a new batch: nothing of it is cached
            for _ in range(half.inner_epochs):
                loss, _, _ = half.objective(batch, list(range(batch_size)))
                loss.backward()

    memory, flops = LiveBytes(), FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", fused_attention))
        for change in (
            *autocast_on_meta(),
            *transformers_on_meta(),
            *(change for half in halves for change in _without_values(half)),
        ):
            stack.enter_context(change)
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
        with memory:
            for parameter in module.trained.values():
                parameter.grad = torch.empty_like(parameter)
            made = module.configure_optimizers()
            for optimizer in made[0] if isinstance(made, tuple) else [made["optimizer"]]:
                optimizer.step()
            training = memory.live
            steps()
        with flops:
            steps()
    return Needs(weights, training, memory.peak - training, flops.get_total_flops())


def _without_values(half: Finetune) -> Iterator:
    """Patches for functions that read tensor values, which do not exist on the `meta` device."""
    captioner = half.captioner

    def generate(features, decoding, seeds):
        count, length = decoding.num_samples, decoding.max_new_tokens
        tokens = torch.zeros(len(features) * count, length, dtype=torch.long, device="meta")
        with torch.no_grad():
            # All steps at once; but the logits of each are gone with it, where the captioner can do without.
            getattr(captioner, "states", captioner.logits)(features.repeat(count), tokens)
        return tokens.unflatten(0, (-1, count))

    yield patch("cyclefit.cycles.policy.check_scores", lambda *_: None)
    yield patch.object(half, "over_ranks", lambda value: value.detach())  # there is no trainer
    if captioner is not None:
        yield patch.object(captioner, "generate", generate)
        yield patch.object(captioner, "decode", lambda tokens: [f"{CAPTION} {k}" for k in range(len(tokens))])


def report(module: Finetune, config) -> None:
    """Prints what is trained, and the memory and time of a step on one GPU, for the parsed `config`."""
    data, trainer, giga = config.data, config.trainer, 2**30
    check_unpaired(module.halves, data)
    more = data.unpaired_batch_size or data.batch_size
    unpaired = {name: more for name in ("unpaired", "prompts") if data[name]}
    console = Console(soft_wrap=True)
    with console.status("running a step without values"):
        mixed, latents = "mixed" in str(trainer.precision), bool(data.latents)
        needs = step_needs(module, data.batch_size, data.image_size, mixed, latents, **unpaired)
    table = Table(title=f"{config.name}: batches of {data.batch_size}, images of {data.image_size} px")
    table.add_column("model")
    for column in ("million parameters", "trained", "GiB"):
        table.add_column(column, justify="right")
    trained, listed = {id(p) for p in module.trained.values()}, set()
    for half in module.halves:
        for name in ("captioner", "generator", "scorer", "held_out", "cycle"):
            part = getattr(half, name, None)
            parameters = [p for p in part.parameters() if id(p) not in listed] if part is not None else []
            listed |= set(map(id, parameters))  # a cycle's copy of the captioner shares what is not trained
            if parameters:
                count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
                learning = sum(p.numel() for p in parameters if id(p) in trained)
                table.add_row(name, f"{count / 1e6:,.1f}", f"{learning / 1e6:,.2f}", f"{size / giga:.2f}")
    console.print(table)
    console.print(
        f"memory of one GPU: {needs.memory / giga:.1f} GiB = weights {needs.weights / giga:.1f} + gradients and "
        f"optimizer {needs.training / giga:.2f} + activations {needs.activations / giga:.1f} + CUDA, about "
        f"{CONTEXT / giga:.1f}"
    )
    batches, steps = trainer.accumulate_grad_batches or 1, trainer.max_steps or -1
    console.print(
        f"one batch: {needs.flops / 1e12:,.2f} TFLOP; at {UTILISATION:.0%} of the peak rate of one GPU in bf16:"
    )
    rates = {torch.cuda.get_device_name(): matrix_rate()} if torch.cuda.is_available() else PEAKS
    for name, rate in rates.items():
        seconds = needs.flops / (UTILISATION * rate)
        line = f"  {name}, {rate / 1e12:,.0f} TFLOP/s: {seconds:.3f} s, {data.batch_size / seconds:,.0f} images/s"
        if steps > 0:
            hours = seconds * batches * steps / 3600
            line += f"; {steps:,} steps of {batches} batches: {hours:,.1f} h without validation"
        console.print(line)


def matrix_rate(device: str = "cuda", size: int = 8192) -> float:
    """Measured FLOP/s of a product of square bf16 matrices, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
