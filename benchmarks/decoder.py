"""A small decoder in the VAE's place where gradient flows: what the text cycle's gradient loses by it.

    python -m benchmarks.decoder [--steps 1500] [--out runs/decoder]

Distils an AutoencoderTiny (TAESD's architecture) from the miniature world's VAE, and compares, on the same prompts and
noise, the captioner's loss and the gradient of the adapters through either: the cosine of the two, and beside it, that
of two halves of the VAE's own samples. `--out` keeps it for `train.py --model.generator.decoder=runs/decoder`.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import common
from cyclefit.cycles import OneStepCaptioning, TextCycle, TruncatedSampling
from cyclefit.data import evaluation_batches
from cyclefit.generators import Lora, StableDiffusion
from cyclefit.judges import Partners
from cyclefit.loading import freeze


def distilled(generator: StableDiffusion, images: Tensor, width: int, steps: int) -> AutoencoderTiny:
    """A decoder trained to say what the VAE says of images' latents."""
    levels = len(generator.vae.config.block_out_channels)
    small = AutoencoderTiny(
        encoder_block_out_channels=(width,) * levels, decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels,
        latent_channels=generator.latent_shape[0],
    ).to(common.DEVICE)  # fmt: skip
    with torch.no_grad():
        latents = torch.cat([generator.encode_images(part) for part in images.split(128)])
        targets = torch.cat([generator.decode_latents(part) for part in latents.split(128)])
    optimizer = torch.optim.AdamW(small.decoder.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), "distilling"):
        rows = torch.randint(len(latents), (32,), device=latents.device)
        made = small.decode(latents[rows], return_dict=False)[0] / 2 + 0.5
        optimizer.zero_grad()
        F.mse_loss(made, targets[rows]).backward()
        optimizer.step()
        schedule.step()
    return freeze(small)


def gradient(cycle: TextCycle, generator: StableDiffusion, partners: Partners, batch, seeds) -> tuple[float, Tensor]:
    """The cycle's loss and its gradient in the adapters, as one vector."""
    adapters = [p for p in generator.parameters() if p.requires_grad]
    torch.manual_seed(seeds[0])
    loss = cycle(generator, partners, batch.images, batch.captions, seeds)[0].mean()
    made = torch.autograd.grad(loss, adapters)
    return loss.item(), torch.cat([g.flatten() for g in made])


def main() -> None:
    """Prints the table of docs/performance.md."""
    options = common.parser(__doc__)
    options.add_argument("--shards", default="data/miniature/finetune")
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--batches", type=int, default=16)
    options.add_argument("--out")
    arguments = options.parse_args()
    torch.manual_seed(0)
    generator = common.generator(None, steps=5, guidance_scale=4.0, lora=Lora())
    with torch.no_grad():  # adapters as after some training: at the start half of their gradient is zero
        for name, parameter in generator.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    captioner = freeze(common.captioner(None))
    pool = list(evaluation_batches(arguments.shards, image_size=32, batch_size=32))
    held_out, pool = pool[: arguments.batches], pool[arguments.batches :]
    small = distilled(generator, torch.cat([batch.images for batch in pool]), arguments.width, arguments.steps)
    with torch.no_grad():
        latents = generator.encode_images(held_out[0].images)
        generator.decoder = small
        error = (generator._decode_small(latents) - generator.decode_latents(latents)).square().mean()
    partners = Partners(captioner=captioner)
    table = Table(title=f"PSNR to the VAE's decoding {-10 * error.log10():.1f} dB, {common.machine()}")
    for column in ("text cycle", "loss, VAE", "loss, small decoder", "cosine", "cosine of halves", "time, VAE / small"):
        table.add_column(column, justify="left" if column == "text cycle" else "right")
    for cycle in (OneStepCaptioning(), TruncatedSampling(grad_steps=2)):
        losses, gradients, times = ([], []), ([], []), ([], [])
        for k, batch in enumerate(track(held_out, type(cycle).__name__)):
            for which, decoder in enumerate((None, small)):
                generator.decoder = decoder
                seeds = list(range(32 * k, 32 * k + len(batch)))
                taken, (loss, vector) = common.timed(
                    lambda: gradient(cycle, generator, partners, batch, seeds)  # noqa: B023
                )
                for found, value in ((losses, loss), (gradients, vector), (times, taken)):
                    found[which].append(value)
        ours, other = (torch.stack(rows) for rows in gradients)
        halves = F.cosine_similarity(ours[::2].mean(0), ours[1::2].mean(0), dim=0)
        alike = F.cosine_similarity(ours.mean(0), other.mean(0), dim=0)
        means = [sum(values) / len(values) for values in losses]
        said = f"{means[0]:.3f}", f"{means[1]:.3f}", f"{alike:.3f}", f"{halves:.3f}", common.ratio(*times)
        table.add_row(type(cycle).__name__, *said)
    Console(width=130).print(table)
    if arguments.out:
        small.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
