"""Distils a small decoder from the miniature world's VAE, to train through instead of it.

    python -m benchmarks.decoder --out runs/decoder
    python train.py --config miniature_cycle_sd.yaml --model.generator.decoder=runs/decoder --name small_decoder

It is an AutoencoderTiny, TAESD's architecture; for Stable Diffusion 1.5 the hub has madebyollin/taesd.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from rich.progress import track

from benchmarks import common
from cyclefit.data import evaluation_batches


def main() -> None:
    """Writes the decoder and prints how near it comes."""
    options = common.parser(__doc__)
    options.add_argument("--shards", default="data/miniature/finetune")
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--out", required=True)
    arguments = options.parse_args()
    torch.manual_seed(0)
    generator = common.generator(None)
    levels, width = len(generator.vae.config.block_out_channels), arguments.width
    small = AutoencoderTiny(
        encoder_block_out_channels=(width,) * levels, decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels,
        latent_channels=generator.latent_shape[0],
    ).to(common.DEVICE)  # fmt: skip
    batches = evaluation_batches(arguments.shards, image_size=generator.image_size, batch_size=128)
    with torch.no_grad():
        latents = torch.cat([generator.encode_images(batch.images.to(common.DEVICE)) for batch in batches])
        targets = torch.cat([generator.decode_latents(part) for part in latents.split(128)])
    held_out = len(latents) // 10
    optimizer = torch.optim.AdamW(small.decoder.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    for _ in track(range(arguments.steps), "distilling"):
        rows = torch.randint(held_out, len(latents), (32,), device=common.DEVICE)
        made = small.decode(latents[rows], return_dict=False)[0] / 2 + 0.5
        optimizer.zero_grad()
        F.mse_loss(made, targets[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        made = small.decode(latents[:held_out], return_dict=False)[0] / 2 + 0.5
    error = F.mse_loss(made.clamp(0, 1), targets[:held_out])
    small.save_pretrained(arguments.out)
    print(f"{arguments.out}: {-10 * error.log10():.1f} dB from the VAE's decoding of {held_out} held-out images")


if __name__ == "__main__":
    main()
