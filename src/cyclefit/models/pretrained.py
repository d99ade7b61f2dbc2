"""The common part of all model adapters: loading with clear errors, precision, resizing, per-sample random numbers."""

import copy
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cyclefit import UserError
from cyclefit.config.paths import is_path
from cyclefit.hub import silence_of
from cyclefit.models.repository import Incomplete, local_files, repository


class MissingModel(UserError, FileNotFoundError):
    """A model is neither a readable local folder nor available from the hub."""


@contextmanager
def loading(kind: str, name: str) -> Iterator[None]:
    """Turns the errors of hub clients for missing files or network into one sentence that names the way out.

    If the hub does not answer, only the local cache is used: clients would retry for a minute.

    Raises:
        MissingModel: the model is neither a readable local folder nor available from the hub.

    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    local, silence = Path(name).is_dir(), None
    try:
        if is_path(name) and not local:
            raise FileNotFoundError(f"there is no folder {name}")
        if not local and not constants.is_offline_mode():
            silence = silence_of(constants.ENDPOINT)
        with patch.object(constants, "HF_HUB_OFFLINE", True) if silence else nullcontext():
            yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise MissingModel(
            f"cannot load the {kind} {name!r}: its files are given only to those who have accepted its terms on the "
            "hub; do so there, and log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        _refuse_code(kind, name, error)
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such model, or a private one: `hf auth login` or HF_TOKEN says who asks"
        if isinstance(error, Incomplete):  # what is there was read: no hub is missed
            silence, reason = None, str(error)
        elif not local and not is_path(name) and isinstance(error, OSError) and constants.is_offline_mode():
            silence = silence or "HF_HUB_OFFLINE is set"
        raise MissingModel(
            f"cannot load the {kind} {name!r}: give the id of a model on the hub (with network access), a local folder "
            f"in the hub's own layout, or set HF_HOME to a cache that holds it ({silence or reason})"
        ) from error


def _refuse_code(kind: str, name: str, error: BaseException | None) -> None:
    """Raises UserError if unpickling was refused at something that is no tensor."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    if error is not None:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls {found[1]}" if found else "is damaged or holds more than tensors"
        raise UserError(
            f"cannot load the {kind} {name!r}: one of its `.bin` files {what}, and nothing is unpickled but tensors; "
            "use a copy in safetensors"
        ) from error


def load_model(
    kind: type,
    pretrained: str,
    subfolder: str = "",
    random_weights: bool = False,
    revision: str | None = None,
    variant: str | None = None,
) -> nn.Module:
    """A model of transformers or diffusers in float32, with every weight from its files and none unused.

    Safetensors are preferred to `.bin`, of which only tensors are read. With `random_weights`, or inside
    `with torch.device("meta")`, it is built from its config alone.

    Raises:
        UserError: there is no such variant, or the files lack weights, which would stay random, or hold others; the
            message names some.

    """
    diffusers = hasattr(kind, "load_config")
    if random_weights or without_weights():
        config = local_files(pretrained, subfolder, revision)
        if diffusers:
            return kind.from_config(kind.load_config(config))
        return kind(kind.config_class.from_pretrained(config))
    found = repository(pretrained, revision)
    stems = ("diffusion_pytorch_model",) * 2 if diffusers else ("model", "pytorch_model")
    files, variant = found.weights(stems, subfolder, variant)
    root = found.fetch([*found.small(subfolder), *files])
    _refuse_pointers(root / name for name in files)
    settings = {"use_safetensors": ".safetensors" in files[0], "variant": variant, "output_loading_info": True}
    settings["torch_dtype" if diffusers else "dtype"] = torch.float32
    model, info = kind.from_pretrained(root / subfolder, **settings)
    # A buffer of CLIP's that is not learned; it is in the files, and no longer in the models.
    odd = {
        "lack": sorted(info["missing_keys"]),
        "hold what it has no place for": sorted(k for k in info["unexpected_keys"] if not k.endswith("position_ids")),
        "hold in another shape": sorted(str(entry[0]) for entry in info["mismatched_keys"]),
    }
    wrong = [f"{what} {len(keys)} weights ({', '.join(keys[:3])})" for what, keys in odd.items() if keys]
    if wrong:
        raise UserError(
            f"the files of {f'{pretrained}/{subfolder}'.rstrip('/')!r} do not fit {kind.__name__}: they "
            f"{'; they '.join(wrong)}; is it a checkpoint of another architecture, or incomplete?"
        )
    return model


def _refuse_pointers(files: Iterable[Path]) -> None:
    """Raises UserError at the pointers that a clone without Git LFS has in place of weights."""
    for path in files:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{path} is a pointer of Git LFS, not weights: run `git lfs pull` in its repository")


def resized(
    images: Float[Tensor, "b 3 h w"], height: int, width: int, *, crop: bool = False
) -> Float[Tensor, "b 3 height width"]:
    """Images at another size, bicubic with antialiasing, differentiable, clamped to [0, 1].

    `crop` keeps the aspect ratio and cuts the centre; otherwise the image is stretched.
    """
    if images.shape[-2:] == (height, width):
        return images
    if crop:
        h, w = images.shape[-2:]
        scale = max(height / h, width / w)
        scaled = max(height, round(h * scale)), max(width, round(w * scale))
        images = F.interpolate(images, scaled, mode="bicubic", antialias=True)
        top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
        return images[:, :, top : top + height, left : left + width].clamp(0, 1)
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def seeded(draw, seeds: Sequence[int], *shape: int, device: torch.device | str = "cpu") -> Tensor:
    """`draw` (torch.randn or torch.rand) of `shape` for each seed, `(len(seeds), *shape)`, drawn on the CPU.

    Each sample's numbers depend on its own seed alone: not on the batch, the rank or the device.
    """
    rows = [draw(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device, non_blocking=True)


@contextmanager
def replaced(table: nn.Module, embeddings: Float[Tensor, "b n d"]) -> Iterator[None]:
    """Makes an embedding table return `embeddings` for any ids; gradient flows to them.

    For text encoders that take no `inputs_embeds`, such as CLIP's. Positions are added by the encoder.
    """
    hook = table.register_forward_hook(lambda *_: embeddings.to(table.weight.dtype))
    try:
        yield
    finally:
        hook.remove()


def without_weights() -> bool:
    """Whether models are being built for their shapes alone: inside `with torch.device("meta")`."""
    return torch.get_default_device().type == "meta"


def weights_dtype(network: nn.Module) -> torch.dtype:
    """The precision of a network's first weights, to which its inputs are cast."""
    return next(network.parameters()).dtype


def own_precision(network: nn.Module, frozen: bool = True) -> AbstractContextManager:
    """Switches autocast off: a frozen network computes in the precision of its weights, norms included."""
    if not frozen:
        return nullcontext()
    device = next(network.parameters()).device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def freeze(module: nn.Module) -> nn.Module:
    """The module in eval mode with no parameter requiring a gradient."""
    return module.eval().requires_grad_(False)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A frozen copy of a module as it is now, which shares the parameters that are not trained: they do not change."""
    return freeze(copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad}))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """A module without what its adapters (LoRA, by peft) add."""
    layers = adapted_layers(module)
    required = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, asked in required:  # peft has set it for all of them
            parameter.requires_grad_(asked)


def adapted_layers(module: nn.Module) -> list:
    """The layers of a module that have adapters (LoRA, by peft)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def halve(module: nn.Module) -> None:
    """Casts frozen parameters to bf16 unless they are on the CPU, also those under trained LoRA; not buffers."""
    for parameter in module.parameters():
        if parameter.device.type != "cpu" and parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


class Adapter(nn.Module):
    """A captioner, generator or scorer: networks of other libraries behind an interface of this package."""

    def half_on_gpu(self) -> None:
        """Casts frozen networks to bf16 unless they are on the CPU; the adapter's own buffers keep their precision.

        By default whole networks with their buffers, where all of a network is frozen, and of the others the direct
        children that are: BLIP's vision tower beside its trained decoder. Override it for networks with buffers that
        bf16 is too coarse for, such as rotary frequencies, or with LoRA inside frozen layers: `halve` casts only their
        frozen parameters.
        """
        for network in self.children():
            parts = network.children() if any(p.requires_grad for p in network.parameters()) else [network]
            for part in parts:
                parameter = next(part.parameters(), None)
                if parameter is not None and parameter.device.type != "cpu":
                    if not any(p.requires_grad for p in part.parameters()):
                        nn.Module.to(part, torch.bfloat16)  # diffusers' own `to` warns
