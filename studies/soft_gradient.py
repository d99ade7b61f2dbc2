"""What the gradient of the soft-caption loss says of a fact: its sign between a true and a false caption.

The soft-caption loss reads mixtures of token embeddings. Between those of a true caption, e(0), and of the same caption
with one fact changed, e(1), lies e(a) = (1 - a) e(0) + a e(1). A judge is right where L(e(1)) > L(e(0)); gradient
descent on the mixture can mend the fact where dL/da > 0, above all at a = 1, where the caption is wrong.
`python -m studies.soft_gradient` prints the judge's accuracy and the share of right signs by kind of fact.
"""

import argparse

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cyclefit.miniature import WEIGHTS
from cyclefit.miniature.negatives import pairs
from cyclefit.models import Blip, Generator, StableDiffusion
from cyclefit.models.bridge import Bridge
from cyclefit.models.pretrained import freeze
from cyclefit.rerank import sample_seed

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Of the false caption in the mixture."""


def losses(
    generator: Generator, latents: Tensor, conditioning, noise: Tensor, num_timesteps: int, contrastive: bool
) -> Float[Tensor, "b"]:
    """The denoising error over `num_timesteps` timesteps, less that on the next image where contrastive."""
    edges = torch.linspace(0, 1000, num_timesteps + 1)
    total = torch.zeros(len(latents))
    for t in ((edges[1:] + edges[:-1]) / 2).long().tolist():
        timesteps = torch.full((len(latents),), t)
        error = generator.errors(latents, conditioning, timesteps, noise)
        if contrastive:
            error = error - generator.errors(latents.roll(1, 0), conditioning, timesteps, noise)
        total = total + error / num_timesteps
    return total


def along(count: int, num_timesteps: int, contrastive: bool) -> dict[str, list[float]]:
    """By kind of fact in percent: the judge's accuracy, and the share of dL/da > 0 at each of SHARES."""
    captioner = freeze(Blip(str(WEIGHTS / "blip")))
    generator = freeze(StableDiffusion(str(WEIGHTS / "stable-diffusion")))
    bridge = Bridge(captioner.tokenizer, generator.towers, captioner.vocab_size)
    images, captions = pairs("validation", count)
    found = {}
    for kind in dict.fromkeys(kind for of in captions for kind in of):
        places = [i for i, of in enumerate(captions) if kind in of]
        tokens = captioner.tokenize([text for side in (0, 1) for text in (captions[i][kind][side] for i in places)])
        lengths = (captioner.mask(tokens) * (tokens != captioner.end_token_id)).sum(1).long()
        true, false = F.one_hot(tokens, captioner.vocab_size).float().chunk(2)
        same = lengths[: len(places)] == lengths[len(places) :]
        latents = generator.encode_images(images[places])
        noise = generator.noise([sample_seed(f"validation-{i}") for i in places])
        values, slopes = [], []
        for a in SHARES:
            share = torch.full((len(places), 1, 1), a, requires_grad=True)
            soft = bridge.soft((1 - share) * true + share * false, lengths[: len(places)])
            loss = losses(generator, latents, generator.encode_soft_texts(soft), noise, num_timesteps, contrastive)
            slopes.append(torch.autograd.grad(loss.sum(), share)[0].flatten()[same])
            values.append(loss.detach()[same])
        right = [(values[-1] > values[0]).float().mean(), *((slope > 0).float().mean() for slope in slopes)]
        found[kind] = [100 * float(r) for r in right]
    return found


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--images", type=int, default=80, help="of validation, with two things")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[4])
    arguments = parser.parse_args()
    for num_timesteps in arguments.timesteps:
        for contrastive in (False, True):
            what = "contrastive" if contrastive else "plain"
            print(f"\n{what} error, timesteps: {num_timesteps}, in percent:\n")
            print(f"| fact | judge right | {' | '.join(f'dL/da > 0 at a = {a}' for a in SHARES)} |")
            print("| --- " * (len(SHARES) + 2) + "|")
            for kind, right in along(arguments.images, num_timesteps, contrastive).items():
                print(f"| {kind} | {' | '.join(f'{r:.0f}' for r in right)} |", flush=True)


if __name__ == "__main__":
    main()
