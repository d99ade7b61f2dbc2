"""FLOPs of every method by formula, beside torch's own count, and what a run on many GPUs needs.

    python -m benchmarks.costs

The architectures are those of Stable Diffusion 1.5, BLIP base and CLIP ViT-L/14, without weights, on the `meta` device.
A FLOP is an addition or a multiplication of a matrix product, a convolution or an attention, as
`torch.utils.flop_counter` counts; what is elementwise is left out. Everything is per sample.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass through frozen weights, by what the backward pass costs.

    The gradient of a product with a frozen weight costs as much as the product, that of an attention (two products of
    activations each way) or of an adapter (its weights are trained) twice as much.
    """

    weights: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0
    fixed: float = 0.0
    """No gradient passes here."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, count: float) -> "Flops":
        return Flops(*(count * a for a in astuple(self)))

    @property
    def forward(self) -> float:
        """Of one forward pass."""
        return sum(astuple(self))

    @property
    def backward(self) -> float:
        """Of the backward pass behind it; the scores of an attention are kept, not computed again."""
        return self.weights + 2 * self.attention + 2 * self.adapters

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def when(self, differentiable: bool) -> "Flops":
        """Itself, or the same forward without a backward pass."""
        return self if differentiable else Flops(fixed=self.forward)


def linear(tokens: int, inputs: int, outputs: int) -> Flops:
    """A linear layer, or a 1 x 1 convolution: 2 n i o."""
    return Flops(2 * tokens * inputs * outputs)


def convolution(pixels: int, inputs: int, outputs: int, kernel: int = 3) -> Flops:
    """2 n i o k^2, n the output's pixels."""
    return Flops(2 * pixels * inputs * outputs * kernel**2)


def attention(queries: int, keys: int, width: int) -> Flops:
    """Q K^T and its product with V, masked or not: 4 q k d."""
    return Flops(attention=4 * queries * keys * width)


def adapter(tokens: int, inputs: int, outputs: int, rank: int) -> Flops:
    """The additional B A x of a linear layer: 2 n r (i + o)."""
    return Flops(adapters=2 * tokens * rank * (inputs + outputs))


def encoder(tokens: int, width: int, hidden: int, layers: int) -> Flops:
    """A transformer's layers: four projections, attention, two layers of the MLP."""
    return (linear(tokens, width, 4 * width + 2 * hidden) + attention(tokens, tokens, width)) * layers


def resnet(pixels: int, inputs: int, outputs: int, embedding: int = 0) -> Flops:
    """Two convolutions, a shortcut where the width changes, the timestep's projection."""
    shortcut = linear(pixels, inputs, outputs if inputs != outputs else 0)
    return (
        convolution(pixels, inputs, outputs)
        + convolution(pixels, outputs, outputs)
        + shortcut
        + linear(1, embedding, outputs).when(False)
    )


def transformer(pixels: int, width: int, tokens: int, context: int, rank: int, source: str, first: bool) -> Flops:
    """A denoiser's transformer block with adapters on all attention projections; `source` as in `denoiser`."""
    reached = not first or source == "latents"
    trained, asked = source != "conditioning", source == "conditioning"
    adapted = adapter(pixels, width, width, rank)
    own = linear(pixels, width, width) + adapted + attention(pixels, pixels, width)
    return (
        linear(pixels, width, width).when(reached)
        + linear(pixels, width, 3 * width).when(reached)
        + adapted * 3
        + own.when(reached or trained)
        + linear(pixels, width, width).when(reached or trained)
        + adapted
        + linear(tokens, context, 2 * width).when(asked)
        + adapter(tokens, context, width, rank) * 2
        + attention(pixels, tokens, width)
        + linear(pixels, width, width)
        + adapted
        + linear(pixels, width, 8 * width)  # GEGLU
        + linear(pixels, 4 * width, width)
        + linear(pixels, width, width)
    )


def denoiser(config, side: int, tokens: int, rank: int = 0, source: str = "latents") -> Flops:
    """One call of a UNet2DConditionModel on latents of `side` x `side`, `tokens` of conditioning.

    `source` is where gradient starts on its way back from the output: at the `adapters`, the `conditioning`, or, beside
    the adapters, the `latents`. What lies before the first such place has no backward pass.
    """
    channels, layers, context = config.block_out_channels, config.layers_per_block, config.cross_attention_dim
    width, embedding = channels[0], 4 * channels[0]
    total = (linear(1, width, embedding) + linear(1, embedding, embedding)).when(False)
    total += convolution(side**2, config.in_channels, width).when(source == "latents")
    first, skips = True, [width]

    def stage(inputs: int, outputs: int, attends: bool) -> Flops:
        nonlocal first
        flops = resnet(side**2, inputs, outputs, embedding).when(not first or source == "latents")
        if attends:
            flops += transformer(side**2, outputs, tokens, context, rank, source, first)
            first = False
        return flops

    for place, (kind, outputs) in enumerate(zip(config.down_block_types, channels, strict=True)):
        for _ in range(layers):
            total += stage(width, outputs, "CrossAttn" in kind)
            skips.append(width := outputs)
        if place < len(channels) - 1:
            side //= 2
            total += convolution(side**2, width, width)
            skips.append(width)
    total += stage(width, width, True) + stage(width, width, False)
    for place, (kind, outputs) in enumerate(zip(config.up_block_types, reversed(channels), strict=True)):
        for _ in range(layers + 1):
            total += stage(width + skips.pop(), outputs, "CrossAttn" in kind)
            width = outputs
        if place < len(channels) - 1:
            side *= 2
            total += convolution(side**2, width, width)
    return total + convolution(side**2, width, config.out_channels)


def _middle(pixels: int, width: int) -> Flops:
    return resnet(pixels, width, width) * 2 + linear(pixels, width, 4 * width) + attention(pixels, pixels, width)


def decoding(config, side: int) -> Flops:
    """An AutoencoderKL's decoder from latents of `side` x `side`."""
    channels, latent = config.block_out_channels, config.latent_channels
    width = channels[-1]
    total = linear(side**2, latent, latent) + convolution(side**2, latent, width) + _middle(side**2, width)
    for place, outputs in enumerate(reversed(channels)):
        for _ in range(config.layers_per_block + 1):
            total += resnet(side**2, width, outputs)
            width = outputs
        if place < len(channels) - 1:
            side *= 2
            total += convolution(side**2, width, width)
    return total + convolution(side**2, width, config.out_channels)


def encoding(config, side: int) -> Flops:
    """An AutoencoderKL's encoder of an image of `side` x `side`."""
    channels, latent = config.block_out_channels, config.latent_channels
    width = channels[0]
    total = convolution(side**2, config.in_channels, width)
    for place, outputs in enumerate(channels):
        for _ in range(config.layers_per_block):
            total += resnet(side**2, width, outputs)
            width = outputs
        if place < len(channels) - 1:
            side //= 2
            total += convolution(side**2, width, width)
    total += _middle(side**2, width) + convolution(side**2, width, 2 * latent)
    return total + linear(side**2, 2 * latent, 2 * latent)


def text_encoder(config) -> Flops:
    """A CLIPTextModel on a full row of tokens."""
    return encoder(
        config.max_position_embeddings, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    )


def vision_transformer(side: int, patch: int, width: int, hidden: int, layers: int) -> Flops:
    """Patch embedding and layers over (side / patch)^2 + 1 tokens."""
    patches = (side // patch) ** 2
    return linear(patches, 3 * patch**2, width) + encoder(patches + 1, width, hidden, layers)


def vision(config, side: int | None = None) -> Flops:
    """BLIP's vision tower."""
    config = config.vision_config
    return vision_transformer(
        side or config.image_size,
        config.patch_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
    )


def image_tokens(config, side: int | None = None) -> int:
    """Image features that BLIP's decoder attends to."""
    return ((side or config.vision_config.image_size) // config.vision_config.patch_size) ** 2 + 1


def keys(config, side: int | None = None) -> Flops:
    """Keys and values of the image in all of BLIP's cross-attentions: once per forward pass and caption."""
    text = config.text_config
    per_layer = linear(image_tokens(config, side), config.vision_config.hidden_size, 2 * text.hidden_size)
    return per_layer * text.num_hidden_layers


def reading(config, tokens: int, side: int | None = None) -> Flops:
    """BLIP's decoder on `tokens` given (prefix and caption without its end), its head included, the keys not."""
    text, width = config.text_config, config.text_config.hidden_size
    layer = (
        linear(tokens, width, 6 * width)
        + attention(tokens, tokens, width)
        + attention(tokens, image_tokens(config, side), width)
        + linear(tokens, width, 2 * text.intermediate_size)
    )
    return layer * text.num_hidden_layers + linear(tokens, width, width + text.vocab_size)


def writing(config, tokens: int, side: int | None = None) -> Flops:
    """BLIP's decoder token by token with its cache: as `reading`, attention over the tokens before alone."""
    text = config.text_config
    saved = tokens * (tokens - 1) // 2
    return reading(config, tokens, side) + attention(1, -saved, text.hidden_size) * text.num_hidden_layers


def clip_image(config: dict) -> Flops:
    """open_clip's image tower, from its own configuration."""
    tower = config["vision_cfg"]
    width = tower["width"]
    hidden = int(width * tower.get("mlp_ratio", 4))
    flops = vision_transformer(tower["image_size"], tower["patch_size"], width, hidden, tower["layers"])
    return flops + linear(1, width, config["embed_dim"])


def clip_text(config: dict) -> Flops:
    """open_clip's text tower, from its own configuration."""
    tower = config["text_cfg"]
    width = tower["width"]
    hidden = int(width * tower.get("mlp_ratio", 4))
    flops = encoder(tower.get("context_length", 77), width, hidden, tower["layers"])
    return flops + linear(1, width, config["embed_dim"])


@dataclass(frozen=True)
class Costs:
    """FLOPs per sample of everything that is done with a generator, a captioner and a scorer, by their configs.

    Every caption counts as distinct (repeated ones are encoded once) and every forward pass as one sample of a batch.
    """

    unet: object
    vae: object
    text: object
    blip: object
    clip: dict
    image_size: int
    """Of the generator; the captioner and the scorer resize to their own."""
    caption_tokens: int = 12
    """Tokens the captioner's decoder reads: its begin token and prompt, the caption without its end token."""
    rank: int = 8
    """Of the generator's adapters; 0 where it is the frozen partner."""
    guidance: int = 2
    """Denoiser calls per solver step: 2 with classifier-free guidance, else 1."""

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.image_size // 2 ** (len(self.vae.block_out_channels) - 1)

    def denoiser(self, source: str = "latents", rank: int = 0) -> Flops:
        """One call; see the function."""
        return denoiser(self.unet, self.side, self.text.max_position_embeddings, rank, source)

    @property
    def captioner(self) -> Flops:
        """NLL of a caption given an image; everything frozen, gradient to the image."""
        return vision(self.blip) + keys(self.blip) + reading(self.blip, self.caption_tokens)

    def sampling(self, steps: int, rank: int = 0) -> float:
        """S guided steps and the decoding of one image, without gradient."""
        return steps * self.guidance * self.denoiser(rank=rank).forward + decoding(self.vae, self.side).forward

    def candidates(self, count: int) -> float:
        """N captions of one image, the vision tower once."""
        each = keys(self.blip) + writing(self.blip, self.caption_tokens)
        return vision(self.blip).forward + count * each.forward

    def regeneration(self, count: int, steps: int) -> float:
        """The judge f(x, SD(y)) on N captions: the source embedded once."""
        text, image = text_encoder(self.text).forward, clip_image(self.clip).forward
        return count * (text + self.sampling(steps) + image) + image

    def denoising(self, count: int, timesteps: int = 4, others: int = 0) -> float:
        """The judge err(x, y) on N captions; `others` contrasted with, each from the batch."""
        calls = count * timesteps * (1 + others)
        text, image = text_encoder(self.text).forward, encoding(self.vae, self.image_size).forward
        return image + count * text + calls * self.denoiser().forward

    def image_text(self, count: int) -> float:
        """The control f(x, y) on N captions."""
        return clip_image(self.clip).forward + count * clip_text(self.clip).forward

    def text_cycle(self, count: int, steps: int) -> float:
        """The best of N images of a text: each drawn, captioned, compared in text space."""
        text, caption = text_encoder(self.text).forward, clip_text(self.clip).forward  # equal prompts are encoded once
        return text + caption + count * (self.sampling(steps) + self.candidates(1) + caption)

    def learning(self, trainable: str = "cross-attention queries") -> float:
        """The captioner's backward pass, its vision tower frozen; `decoder` trains all behind the tower."""
        tokens, text = self.caption_tokens, self.blip.text_config
        read, width, layers = reading(self.blip, tokens), text.hidden_size, text.num_hidden_layers
        if trainable == "decoder":
            return read.backward + read.weights + keys(self.blip).weights
        # None to the image's keys and values, none to what lies before the first queries.
        image = attention(tokens, image_tokens(self.blip), width) * layers
        before = linear(tokens, width, 5 * width) + attention(tokens, tokens, width)
        return read.backward - image.forward - before.backward + layers * linear(tokens, width, width).weights

    def language(self, trainable: str = "cross-attention queries") -> float:
        """A step of the captioner's own loss."""
        return self.captioner.forward + self.learning(trainable)

    def soft_captions(self) -> float:
        """What SoftCaptionDenoising adds to a step: the bridge, text encoder and denoiser both ways, VAE encoding."""
        # The product with the bridge's table has as much behind it, to the probabilities.
        table = linear(self.caption_tokens, self.blip.text_config.vocab_size, self.text.hidden_size)
        there = table.both + text_encoder(self.text).both + self.denoiser("conditioning").both
        return there + encoding(self.vae, self.image_size).forward

    def reward(self, samples: int, judge: float, kl: bool = True) -> float:
        """What PolicyGradient adds: K captions sampled, judged, scored both ways; the start's scores for a KL."""
        each = (keys(self.blip) + reading(self.blip, self.caption_tokens)).forward
        scored = each + self.learning() + (each if kl else 0)
        return self.candidates(samples) - vision(self.blip).forward + judge + samples * scored

    def denoising_loss(self) -> float:
        """A step of the generator's own loss with adapters."""
        text, image = text_encoder(self.text).forward, encoding(self.vae, self.image_size).forward
        return text + image + self.denoiser("adapters", self.rank).both

    def _read_back(self) -> float:
        # The decoder is checkpointed: forward, forward again, backward.
        drawn = decoding(self.vae, self.side)
        return drawn.forward + drawn.both + self.captioner.both

    def one_step(self) -> float:
        """What OneStepCaptioning adds: VAE and text encoding, one denoiser call, decoding and captioner both ways."""
        return self.denoising_loss() + self._read_back()

    def truncated_forward(self, steps: int) -> float:
        """Of TruncatedSampling: S guided calls, decoding, the captioner."""
        text = text_encoder(self.text).forward
        return text + self.sampling(steps, self.rank) + self.captioner.forward

    def truncated_backward(self, grad_steps: int) -> float:
        """Of TruncatedSampling: the last K guided calls checkpointed, so forward and backward; decoding as well.

        The first of them has no gradient to pass to its latents.
        """
        first, later = self.denoiser("adapters", self.rank), self.denoiser("latents", self.rank)
        calls = self.guidance * (first.both + (grad_steps - 1) * later.both)
        return calls + decoding(self.vae, self.side).both + self.captioner.backward


def allreduce(parameters: int, ranks: int, bytes_each: int = 4) -> float:
    """Bytes each rank sends (and receives) a step in a ring: 2 (R - 1) / R x bytes of the gradients."""
    return 2 * (ranks - 1) / ranks * bytes_each * parameters


def lora_parameters(config, rank: int) -> int:
    """Adapters on a denoiser's q, k, v and out: r (i + o) each, two attentions in each transformer block."""
    layers, context = config.layers_per_block, config.cross_attention_dim
    widths = [config.block_out_channels[-1]]  # the middle
    for count, kinds, channels in (
        (layers, config.down_block_types, config.block_out_channels),
        (layers + 1, config.up_block_types, config.block_out_channels[::-1]),
    ):
        for kind, width in zip(kinds, channels, strict=True):
            widths += [width] * count * ("CrossAttn" in kind)
    return sum(rank * (6 * 2 * width + 2 * (context + width)) for width in widths)


def blip_parameters(config, trainable: str) -> int:
    """Trained parameters of BLIP: its `cross-attention queries` or all of its `decoder`."""
    text, d = config.text_config, config.text_config.hidden_size
    if trainable == "cross-attention queries":
        return text.num_hidden_layers * (d * d + d)
    m, image = text.intermediate_size, config.vision_config.hidden_size
    layer = 6 * (d * d + d) + 2 * (image * d + d) + 2 * d * m + m + d + 3 * 2 * d
    embeddings = (text.vocab_size + text.max_position_embeddings) * d + 2 * d
    return (
        text.num_hidden_layers * layer + embeddings + d * d + d + 2 * d + text.vocab_size
    )  # the head's matrix is tied


def architectures(image_size: int = 512) -> dict[str, nn.Module]:
    """Stable Diffusion 1.5, BLIP base and CLIP ViT-L/14 without weights, on the `meta` device."""
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import BlipConfig, BlipForConditionalGeneration, CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging as chatter

    level, chatty = chatter.get_verbosity(), logging.root.level
    chatter.set_verbosity_error()
    logging.root.setLevel(logging.ERROR)  # open_clip regrets the weights
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(cross_attention_dim=768, sample_size=image_size // 8),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=image_size,
            ),
            "text": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
            "blip": BlipForConditionalGeneration(
                BlipConfig(text_config={"num_attention_heads": 12}, vision_config={"image_size": 384})
            ),
            "clip": open_clip.create_model("ViT-L-14-quickgelu", None, device="meta"),
        }
    chatter.set_verbosity(level)
    logging.root.setLevel(chatty)
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def costs(models: dict[str, nn.Module], image_size: int = 512, **settings) -> Costs:
    """The formulas with the architectures' own configs."""
    import open_clip

    parts = {name: models[name].config for name in ("unet", "vae", "text", "blip")}
    clip = open_clip.get_model_config("ViT-L-14-quickgelu")
    return Costs(**parts, clip=clip, image_size=image_size, **settings)


def counted(function: Callable[[], object]) -> int:
    """FLOPs by torch's counter. Attention by its plain formula: the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def checks(models: dict[str, nn.Module], size: int) -> dict[str, tuple[float, Callable[[], object]]]:
    """Formula and forward (and backward) pass of every architecture for images of `size` x `size`."""
    unet, vae, text, blip, clip = models.values()
    side, tokens, patches = size // 8, 12, image_tokens(blip.config)

    def draw(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.zeros(shape, device="meta", requires_grad=grad)

    def ids(count: int) -> torch.Tensor:
        return torch.zeros(1, count, dtype=torch.long, device="meta")

    def denoise(latents: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return unet(latents, draw(1), conditioning).sample

    def read(features: torch.Tensor) -> torch.Tensor:
        return blip.text_decoder(input_ids=ids(tokens), encoder_hidden_states=features, use_cache=False).logits

    def see(pixels: torch.Tensor) -> torch.Tensor:
        return blip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state

    seen = size * 3 // 4  # BLIP's 384 beside Stable Diffusion's 512
    call, asked = (denoiser(unet.config, side, 77, source=source) for source in ("latents", "conditioning"))
    decoder = reading(blip.config, tokens) + keys(blip.config)
    return {
        f"denoiser, {size} px": (call.forward, lambda: denoise(draw(1, 4, side, side), draw(1, 77, 768))),
        f"denoiser and gradient to its conditioning, {size} px": (
            asked.both,
            lambda: denoise(draw(1, 4, side, side), draw(1, 77, 768, grad=True)).sum().backward(),
        ),
        f"VAE decoding, {size} px": (decoding(vae.config, side).forward, lambda: vae.decode(draw(1, 4, side, side))),
        f"VAE decoding and gradient, {size} px": (
            decoding(vae.config, side).both,
            lambda: vae.decode(draw(1, 4, side, side, grad=True)).sample.sum().backward(),
        ),
        f"VAE encoding, {size} px": (encoding(vae.config, size).forward, lambda: vae.encode(draw(1, 3, size, size))),
        "text encoder": (text_encoder(text.config).forward, lambda: text(ids(77))),
        f"BLIP's vision tower, {seen} px": (vision(blip.config, seen).forward, lambda: see(draw(1, 3, seen, seen))),
        f"BLIP's decoder, {tokens} tokens": (decoder.forward, lambda: read(draw(1, patches, 768))),
        "BLIP and gradient to its image": (
            (vision(blip.config) + decoder).both,
            lambda: read(see(draw(1, 3, 384, 384, grad=True))).sum().backward(),
        ),
        "CLIP ViT-L/14, image": (
            clip_image(costs(models).clip).forward,
            lambda: clip.encode_image(draw(1, 3, 224, 224)),
        ),
        "CLIP ViT-L/14, text": (clip_text(costs(models).clip).forward, lambda: clip.encode_text(ids(77))),
    }


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Prints the tables of docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--pairs", type=float, default=100e6)
    parser.add_argument("--peak", type=float, default=312e12, help="FLOP/s of a GPU (A100, bf16)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--images_per_core", type=float, default=190, help="a second, as benchmarks.loader measures")
    parser.add_argument("--image_bytes", type=float, default=46e3)
    parser.add_argument("--shard_bytes", type=float, default=1e9)
    arguments = parser.parse_args()
    console, models, tera = Console(width=130), architectures(), 1e12

    def show(title: str, columns: str, rows: dict[str, list[str | float]]) -> None:
        made = Table(title=title, title_justify="left")
        for place, name in enumerate(columns.split("|")):
            made.add_column(name.strip(), justify="right" if place else "left")
        for name, row in rows.items():
            made.add_row(name, *(cell if isinstance(cell, str) else number(cell) for cell in row))
        console.print(made)

    rows = {}
    for size in (512, 256):
        for name, (formula, function) in checks(models, size).items():
            count = counted(function)
            rows[name] = [formula / 1e9, count / 1e9, f"{formula / count - 1:+.2%}"]
    show("One call, by formula and by torch's counter", "|formula, GFLOP|counted, GFLOP|difference", rows)

    rows = {}
    for size in (256, 512, 768):
        c = costs(models, size)
        cycle = c.truncated_forward(20) + c.truncated_backward(1)
        rows[f"{size}"] = [
            *(c.denoiser().forward / tera, decoding(c.vae, c.side).forward / tera),
            *((c.candidates(10) + judge) / tera for judge in (c.regeneration(10, 20), c.denoising(10))),
            *(c.denoising_loss() / tera, cycle / tera),
        ]
    columns = "px|denoiser call|VAE decoding|best of 10, S = 20|by denoising|LoRA's own loss|truncated, S = 20, K = 1"
    show("By resolution, TFLOP per sample", columns, rows)

    c, rows = costs(models), {}
    for n in (1, 4, 10, 20):
        judges = [c.regeneration(n, s) for s in (10, 20, 50)] + [c.denoising(n, 4, others) for others in (0, 2)]
        rows[f"N = {n}"] = [(c.candidates(n) + judge) / tera for judge in (0, *judges, c.image_text(n))]
        rows[f"N = {n}"].append(c.text_cycle(n, 20) / tera)
    columns = "|captions alone|S = 10|S = 20|S = 50|denoising|contrastive|image-text|images of a text, S = 20"
    show("Reranking, TFLOP per input, 512 px", columns, rows)

    rows = {}
    for k in (1, 2, 4, 10):
        backward = c.truncated_backward(k)
        rows[f"K = {k}"] = [(c.truncated_forward(s) + backward) / tera for s in (10, 20, 50)] + [backward / tera]
    show("TruncatedSampling, TFLOP per sample, 512 px, guided", "|S = 10|S = 20|S = 50|of it backward", rows)

    language, own = c.language(), c.denoising_loss()
    rows = {
        "captioner, its own loss": language,
        "+ soft captions": language + c.soft_captions(),
        "+ reward: contrastive, K = 4, 2 timesteps": language + c.reward(4, c.denoising(4, 2, 1)),
        "+ reward: regeneration, K = 4, S = 20": language + c.reward(4, c.regeneration(4, 20)),
        "+ reward: image-text, K = 4": language + c.reward(4, c.image_text(4)),
        "generator, its own loss": own,
        "+ one-step captioning": own + c.one_step(),
        "+ truncated sampling, S = 20, K = 1": own + c.truncated_forward(20) + c.truncated_backward(1),
    }
    for name, flops in rows.items():
        rate = arguments.peak * arguments.utilisation / flops
        total = rate * arguments.gpus
        read = total / arguments.images_per_core, total * arguments.image_bytes / 1e6
        rows[name] = [flops / tera, rate, total, *read, arguments.pairs / total / 86400]
    title = (
        f"{arguments.pairs:,.0f} pairs once, {arguments.gpus} GPUs at {arguments.utilisation:.0%} of "
        f"{arguments.peak / tera:.0f} TFLOP/s, {arguments.images_per_core:.0f} images/s a core"
    )
    show(title, f"step|TFLOP/sample|samples/s/GPU|on {arguments.gpus}|cores|MB/s|days", rows)
    size = arguments.pairs * arguments.image_bytes
    shards = size / arguments.shard_bytes
    print(f"data {size / tera:.2f} TB: {shards:,.0f} shards of {arguments.pairs / shards:,.0f} samples\n")

    trained = {f"LoRA of rank {r}": lora_parameters(c.unet, r) for r in (4, 8, 64)}
    trained |= {f"BLIP's {part}": blip_parameters(c.blip, part) for part in ("cross-attention queries", "decoder")}
    rows = {name: [n / 1e6, *(allreduce(n, ranks) / 1e6 for ranks in (2, 8, 64))] for name, n in trained.items()}
    show("Gradients each rank sends a step, float32, MB", "trained|million|2 ranks|8|64", rows)


if __name__ == "__main__":
    main()
