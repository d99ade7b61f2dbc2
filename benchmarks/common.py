"""What the benchmarks share: models, whose weights are random where FOLDER is given, and the clock.

FOLDER holds models by the last part of their hub names, configs and tokenizers alone: neither time nor memory depends
on the weights. Without it they are the miniature world's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cyclefit.config.start import resolve_configs
from cyclefit.data import ShardData
from cyclefit.finetune import Finetune
from cyclefit.miniature import WEIGHTS
from cyclefit.models import Blip, StableDiffusion
from cyclefit.train import cli

BLIP, DIFFUSION = "blip-image-captioning-base", "stable-diffusion-v1-5"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--models`; matrix products are TF32 from here on, as train.py has them."""
    torch.set_float32_matmul_precision("high")
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", type=Path, metavar="FOLDER", help="configs and tokenizers; weights are random")
    return made


def machine() -> str:
    """What the figures are of."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} cores"


def captioner(folder: Path | None, **settings) -> Blip:
    """BLIP base with random weights, or the miniature world's BLIP."""
    return Blip(str(folder / BLIP if folder else WEIGHTS / "blip"), random_weights=bool(folder), **settings).to(DEVICE)


def generator(folder: Path | None, **settings) -> StableDiffusion:
    """Stable Diffusion 1.5 with random weights, or the miniature world's."""
    name = str(folder / DIFFUSION if folder else WEIGHTS / "stable-diffusion")
    return StableDiffusion(name, random_weights=bool(folder), **settings).to(DEVICE)


class ModuleCLI(cli.RunCLI):
    """Builds a configuration's module alone, without a run's folder, data or trainer."""

    def before_instantiate_classes(self) -> None:
        """Writes nothing."""

    def instantiate_classes(self) -> None:
        """Builds the module."""
        self.model = self._get(self.parser.instantiate_classes(self.config), "model")


def configured(
    config: str, overrides: list[str], models: Path | None, captioner: str = BLIP, meta: bool = False
) -> tuple[Finetune, object]:
    """A configuration's module, and the configuration as it was parsed.

    With `models` the captioner and the generator are those of this folder, all weights random; with `meta` there are no
    weights, see `cyclefit.train.dry_run`.
    """
    parts = {}
    if models:
        for part, folder in (("captioner", captioner), ("generator", DIFFUSION)):
            parts[part] = {"init_args": {"pretrained": str((models / folder).absolute()), "random_weights": True}}
        for part in ("scorer", "held_out") if "sd" in config or "reward" in config else ("scorer",):
            parts[part] = {"init_args": {"pretrained": None}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"model": {"init_args": parts}}, file)
        arguments = [*resolve_configs(["--config", config]), "--config", file.name, *overrides]
        with torch.device("meta" if meta else "cpu"):
            made = ModuleCLI(
                ExitStack(), Finetune, ShardData, subclass_mode_model=True, auto_configure_optimizers=False,
                save_config_callback=None, seed_everything_default=0, parser_kwargs={"exit_on_error": False}, run=False,
                args=arguments,
            )  # fmt: skip
    return made.model.to("meta" if meta else DEVICE), made.config


def flops(function: Callable[[], object]) -> int:
    """FLOPs by torch's counter; attention by its plain formula: the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def half(module: torch.nn.Module) -> None:
    """Frozen parameters in bf16 on the CPU too, where training leaves them."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds of one call, the device's work included, and what it returned."""
    _wait()
    start = time.perf_counter()
    made = function()
    _wait()
    return time.perf_counter() - start, made


def seconds(function: Callable[[], object], rounds: int) -> float:
    """The median time of `rounds` calls after a first one that warms up."""
    return statistics.median([timed(function)[0] for _ in range(rounds + 1)][1:])


def ratio(others: list[float], own: list[float]) -> str:
    """The median of ratios of times taken in turns, and their range."""
    found = [other / mine for other, mine in zip(others, own, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
