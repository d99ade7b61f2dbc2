"""What each means of going faster is worth alone: the same work without it and with it, in turns, in one process.

    python -m benchmarks.means --models FOLDER [--image_size 512] [--batch_size 8] [--only latents compiled]

FOLDER is that of benchmarks.full_size. `predicted` is the ratio of FLOPs by torch's counter where the means saves
work; `measured` is the ratio of times, the median over rounds and their range. On a CPU images are of 128 px.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import half, seconds
from cyclefit.captioners import Blip, Decoding
from cyclefit.dry_run import CAPTION
from cyclefit.generators import StableDiffusion
from cyclefit.loading import freeze

Work = Callable[[], object]


@dataclass
class Means:
    """Work without and with a means; `before` and `after` put the models into the state that it asks for and back."""

    name: str
    work: str
    without: Work
    used: Work
    saves: bool = False
    """Whether it saves FLOPs, so that a ratio can be predicted."""
    before: Work = lambda: None
    after: Work = lambda: None


def flops(function: Work) -> int:
    """By torch's counter; attention by its plain formula."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def all_means(arguments: argparse.Namespace, device: str) -> list[Means]:
    """Everything that is measured, on Stable Diffusion 1.5 and BLIP base in bf16."""
    size, count = arguments.image_size, arguments.batch_size
    folder = str(arguments.models / "stable-diffusion-v1-5")
    generator = StableDiffusion(folder, image_size=size, random_weights=True).to(device)
    captioner = Blip(str(arguments.models / "blip-image-captioning-base"), random_weights=True).to(device)
    for model in (generator, captioner):
        half(freeze(model))
    unet, captions, seeds = generator.unet, [f"{CAPTION} {k}" for k in range(count)], list(range(count))
    images = torch.rand(count, 3, size, size, device=device)
    latents, conditioning = generator.noise(seeds), generator.encode_texts(captions)
    empty, times = generator.encode_texts([""]).expand_as(conditioning), torch.full((count,), 500, device=device)
    guided = torch.cat([latents] * 2), torch.cat([times] * 2), torch.cat([empty, conditioning])
    ten, nucleus = captions[:1] * 10, Decoding("nucleus", max_new_tokens=20)
    ten_at_once = Decoding("nucleus", 10, max_new_tokens=20)

    def call(z=latents, c=conditioning) -> torch.Tensor:
        return generator.predict(z, times, c)

    def twice() -> torch.Tensor:
        return generator.predict(*guided)

    def in_a_row() -> torch.Tensor:
        return call(c=empty) + call()

    def under_autocast() -> None:
        with torch.autocast(device, torch.bfloat16):
            unet(latents.bfloat16(), times, conditioning.bfloat16())

    def float32() -> None:
        unet32(latents, times, conditioning)

    def one_by_one() -> None:
        for _ in range(10):
            captioner.generate(captioner.embed(images), nucleus, seeds)

    def through_the_vae() -> None:
        generator.errors(generator.encode_images(images.clone()), conditioning, times, latents)

    def compiled() -> None:
        unet.compile()
        call()

    def eager() -> None:
        unet._compiled_call_impl = None

    unet32 = None if arguments.only and "bf16" not in " ".join(arguments.only) else type(unet).from_config(unet.config)
    if unet32 is not None:
        freeze(unet32).to(device)
    lasting = unet.to
    return [
        Means("bf16", "a denoiser call", float32, call),
        Means("autocast off where all is frozen", "a denoiser call", under_autocast, call),
        Means("guidance in one call", "two denoiser calls", in_a_row, twice),
        Means(
            "channels last", "a denoiser call", call, call,
            before=lambda: lasting(memory_format=torch.channels_last),
            after=lambda: lasting(memory_format=torch.contiguous_format),
        ),
        Means("compiled denoiser, in place", "a denoiser call", call, call, before=compiled, after=eager),
        Means(
            "latents of source images cached", "denoising error of images", through_the_vae,
            lambda: generator.errors(latents, conditioning, times, latents), saves=True,
        ),
        Means(
            "unconditional embedding kept", "conditioning of a batch",
            lambda: generator.encode_texts([*captions, ""]), lambda: generator.encode_texts(captions), saves=True,
        ),
        Means(
            "captions encoded once each", "conditioning of ten candidates, all alike",
            lambda: generator.text_encoder(generator.tokenize(ten)), lambda: generator.encode_texts(ten), saves=True,
        ),
        Means(
            "one vision pass for all candidates", "ten nucleus samples an image", one_by_one,
            lambda: captioner.generate(captioner.embed(images), ten_at_once, seeds), saves=True,
        ),
        Means(
            "guidance cut off after half of the steps", "four steps", lambda: [twice() for _ in range(4)],
            lambda: [twice(), twice(), call(), call()], saves=True,
        ),
    ]  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Prints the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="a folder of configs and tokenizers")
    parser.add_argument("--image_size", type=int, default=512 if torch.cuda.is_available() else 128)
    parser.add_argument("--batch_size", type=int, default=8 if torch.cuda.is_available() else 2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="words of the names of those to measure")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} cores"
    table = Table(title=f"{machine}, {arguments.image_size} px, batches of {arguments.batch_size}, bf16")
    for column in ("means", "work", "predicted", "measured", "range"):
        table.add_column(column, justify="left" if column in ("means", "work") else "right")
    for means in all_means(arguments, device):
        if arguments.only and not any(word in means.name for word in arguments.only):
            continue
        print(f"{means.name} ...", file=sys.stderr)
        ratios = []
        for _ in range(arguments.rounds):
            without = seconds(means.without, 2)
            means.before()
            used = seconds(means.used, 2)
            means.after()
            ratios.append(without / used)
        predicted = f"{flops(means.without) / flops(means.used):.2f}" if means.saves else ""
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(means.name, means.work, predicted, f"{statistics.median(ratios):.2f}", spread)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
