"""Captioners, p(caption | image)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cyclefit import UserError
from cyclefit.loading import freeze, loading, own_precision, resized, seeded, sketched, whole
from cyclefit.paths import NameOrPath
from cyclefit.ranges import Count, Natural, Positive, Range, Share, checked


@checked
@dataclass(frozen=True)
class Decoding:
    """How a caption is decoded: greedy, beam search, top-k or nucleus sampling (Holtzman et al., ICLR 2020)."""

    method: Literal["greedy", "beam", "top-k", "nucleus"] = "greedy"
    num_samples: Count = 1
    """Captions per image; more than one for top-k and nucleus sampling only."""
    max_new_tokens: Count = 30
    min_new_tokens: Natural = 0
    num_beams: Count = 3
    top_k: Count = 50
    top_p: Annotated[float, Range(0, 1, above=True)] = 0.9
    temperature: Positive = 1.0

    def __post_init__(self):
        if self.num_samples > 1 and self.method in ("greedy", "beam"):
            raise UserError(f"{self.method} decoding gives one caption per image, not num_samples={self.num_samples}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens}, not {self.min_new_tokens}"
            )


class Captioner(nn.Module, ABC):
    """p(caption | image), token by token.

    Captions are token ids `(b, l)`: the caption, the end token, padding; whatever the model wants before the caption
    is its own affair. Images enter once through `embed`; everything else works on those features.
    """

    tokenizer: object
    end_token_id: int
    pad_token_id: int
    vocab_size: int
    """Width of the logits; the tokenizer may know fewer tokens."""
    label_smoothing: float = 0.0
    max_tokens: int = 64
    """Longer captions are cut to it, the end token included."""
    max_new_tokens: int = 64
    """The most that can be generated."""

    @abstractmethod
    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        """Image features; carries gradient where the vision tower is trained."""

    @abstractmethod
    def logits(self, features: Float[Tensor, "b p d"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Logits of each of `tokens` given the image and the tokens before it (teacher forcing)."""

    @abstractmethod
    def generate(
        self, features: Float[Tensor, "b p d"], decoding: Decoding, seeds: Sequence[int]
    ) -> Int[Tensor, "b n l"]:
        """`decoding.num_samples` captions per image, without gradient, sampled by each image's own seed."""

    def tokenize(self, captions: list[str]) -> Int[Tensor, "b l"]:
        """Captions as token ids, ended and padded; what is longer than `max_tokens` is cut."""
        length = self.max_tokens - 1
        rows = self.tokenizer(captions, add_special_tokens=False, truncation=True, max_length=length).input_ids
        length = max(map(len, rows)) + 1
        padded = [row + [self.end_token_id] + [self.pad_token_id] * (length - len(row) - 1) for row in rows]
        return torch.tensor(padded, device=next(self.parameters()).device)

    def decode(self, tokens: Int[Tensor, "b l"]) -> list[str]:
        """Token ids as text."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def check(self, decoding: Decoding) -> None:
        """Checks that captions of a decoding's greatest length are within what the model has positions for.

        Raises:
            UserError: they are not.

        """
        if decoding.max_new_tokens > self.max_new_tokens:
            raise UserError(
                f"max_new_tokens must be at most {self.max_new_tokens}, all that the captioner has positions for, "
                f"not {decoding.max_new_tokens}"
            )

    def mask(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """1 for the caption's tokens and its end token, 0 for padding."""
        return (tokens != self.pad_token_id).float()

    def log_prob(self, features: Float[Tensor, "b p d"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        """Log p(caption | image), summed over the caption's tokens and its end token, in nats."""
        return -cross_entropy(self.logits(features, tokens), tokens, self.mask(tokens))

    def loss_of(self, logits: Float[Tensor, "b l v"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        """L_LM = -(1/l) sum_l log p(y_l | y_<l, x), label-smoothed, in nats; l the mean length of the batch's captions.

        Its mean over the batch is the mean over all tokens, as BLIP is trained: dividing each caption by its own length
        would weigh the end tokens of short captions most, and captions would grow short.
        """
        mask = self.mask(tokens)
        return cross_entropy(logits, tokens, mask, self.label_smoothing) / mask.sum(1).mean()

    def loss(self, features: Float[Tensor, "b p d"], captions: list[str]) -> Float[Tensor, "b"]:
        """`loss_of` the captions themselves."""
        tokens = self.tokenize(captions)
        return self.loss_of(self.logits(features, tokens), tokens)

    def sample(self, images: Float[Tensor, "b 3 h w"], decoding: Decoding, seeds: Sequence[int]) -> list[list[str]]:
        """`decoding.num_samples` captions of each image, without gradient, as text."""
        with torch.no_grad():
            tokens = self.generate(self.embed(images), decoding, seeds)
        texts = self.decode(tokens.flatten(0, 1))
        return [texts[i : i + tokens.shape[1]] for i in range(0, len(texts), tokens.shape[1])]


def cross_entropy(
    logits: Float[Tensor, "b l v"],
    tokens: Int[Tensor, "b l"],
    mask: Float[Tensor, "b l"],
    smoothing: float = 0.0,
) -> Float[Tensor, "b"]:
    """Cross-entropy of the masked tokens, summed per sample, in nats; float32 whatever the logits are."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none", label_smoothing=smoothing)
    return (losses * mask).sum(1)


class SeededSampling:
    """A logits processor that picks each row's token by inverse transform with that row's own random numbers.

    Exact sampling from the warped distribution, one uniform number per token: independent of batch and device, which
    `do_sample=True` with its one generator for the whole batch is not.
    """

    def __init__(self, uniforms: Float[Tensor, "rows steps"], prefix_length: int):
        self.uniforms = uniforms
        self.prefix_length = prefix_length

    def __call__(self, input_ids: Int[Tensor, "rows l"], scores: Float[Tensor, "rows v"]) -> Tensor:
        """Scores that are 0 at the chosen token and -inf elsewhere."""
        cumulative = scores.double().softmax(-1).cumsum(-1)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prefix_length, None]
        # Compared with the total, not with 1: rounding must never pick a token that the warpers removed.
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


Trainable = Literal["cross-attention queries", "cross-attention", "decoder", "all", "lora"]


@checked
class Blip(Captioner):
    """BLIP (Li et al., ICML 2022, arXiv 2201.12086) over transformers' BlipForConditionalGeneration.

    Args:
        pretrained: hub id or local folder in the hub's layout.
        trainable: what is trained of it. The paper trains the cross-attention queries; `lora` adds adapters to the
            decoder's attention. None freezes everything.
        prompt: text before every caption, excluded from the loss (the paper's code: "a picture of ").
        label_smoothing: of the training loss (BLIP's own recipe and the paper's code: 0.1).
        lora_rank: rank and alpha of the adapters.
        random_weights: build the architecture from the config alone, for tests and benchmarks.

    Raises:
        FileNotFoundError: the model is neither a local folder nor to be had from the hub.

    """

    def __init__(
        self,
        pretrained: NameOrPath | str = "Salesforce/blip-image-captioning-base",
        trainable: Trainable | None = None,
        prompt: str = "",
        label_smoothing: Share = 0.1,
        lora_rank: Count = 16,
        random_weights: bool = False,
    ):
        super().__init__()
        from transformers import AutoTokenizer, BlipConfig, BlipForConditionalGeneration

        with loading("captioner", pretrained):
            if random_weights or sketched():
                self.model = BlipForConditionalGeneration(BlipConfig.from_pretrained(pretrained))
            else:
                files = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
                self.model = whole(BlipForConditionalGeneration.from_pretrained(pretrained, **files), pretrained)
            self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
            mean, std = _preprocessing(pretrained)
        self.pretrained = pretrained
        text, vision = self.model.config.text_config, self.model.config.vision_config
        self.image_size = vision.image_size
        self.begin_token_id, self.end_token_id = text.bos_token_id, text.sep_token_id
        self.pad_token_id, self.vocab_size = text.pad_token_id, text.vocab_size
        self.label_smoothing = label_smoothing
        prefix = [self.begin_token_id, *self.tokenizer(prompt, add_special_tokens=False).input_ids]
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self.max_new_tokens = text.max_position_embeddings - len(prefix) + 1
        self.max_tokens = min(self.max_tokens, self.max_new_tokens)
        self.register_buffer("image_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.trainable = trainable
        freeze(self)
        self._unfreeze(trainable, lora_rank)

    def _unfreeze(self, trainable: Trainable | None, lora_rank: int) -> None:
        decoder = self.model.text_decoder
        if trainable is None:
            return
        if trainable == "lora":
            from peft import LoraConfig

            decoder.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=["query", "key", "value"]))
        elif trainable == "all":
            self.model.requires_grad_(True)
        else:
            part = {
                "cross-attention queries": "crossattention.self.query",
                "cross-attention": "crossattention",
            }
            for name, parameter in decoder.named_parameters():
                parameter.requires_grad_(part.get(trainable, "") in name)
        # Eval mode stays on what is frozen: its dropout must not run.
        (self.model if trainable == "all" else decoder).train()

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        """Last hidden states of the vision transformer."""
        images = resized(images, self.image_size, self.image_size)
        pixels = (images - self.image_mean) / self.image_std
        tower = self.model.vision_model
        with own_precision(tower, self.trainable != "all"):
            return tower(pixels.to(tower.dtype)).last_hidden_state

    def logits(self, features: Float[Tensor, "b p d"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Logits of each of `tokens` given the image and the tokens before it."""
        inputs = torch.cat([self.prefix.expand(len(tokens), -1), tokens[:, :-1]], 1)
        # Padding only ever follows the caption and attention is causal: no mask is needed.
        decoder = self.model.text_decoder
        with own_precision(decoder, self.trainable is None):
            features = features.to(decoder.dtype)
            hidden = decoder(input_ids=inputs, encoder_hidden_states=features, use_cache=False)
        return hidden.logits[:, len(self.prefix) - 1 :]

    @torch.no_grad()
    def generate(
        self, features: Float[Tensor, "b p d"], decoding: Decoding, seeds: Sequence[int]
    ) -> Int[Tensor, "b n l"]:
        """Captions by transformers' `generate`, one pass over the vision features for all candidates of an image."""
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.check(decoding)
        count, prefix = decoding.num_samples, self.prefix
        processors = LogitsProcessorList()
        if decoding.method in ("top-k", "nucleus"):
            if decoding.temperature != 1:
                processors.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.method == "top-k":
                processors.append(TopKLogitsWarper(decoding.top_k))
            elif decoding.top_p < 1:
                processors.append(TopPLogitsWarper(decoding.top_p))
            uniforms = seeded(torch.rand, seeds, count, decoding.max_new_tokens, device=features.device)
            processors.append(SeededSampling(uniforms.flatten(0, 1).double(), len(prefix)))
        features = features.to(self.model.text_decoder.dtype).repeat_interleave(count, 0)
        ids = prefix.repeat(len(features), 1)
        mode = self.model.text_decoder.training
        tokens = self.model.text_decoder.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
            eos_token_id=self.end_token_id,
            pad_token_id=self.pad_token_id,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            num_beams=decoding.num_beams if decoding.method == "beam" else 1,
            do_sample=False,
            logits_processor=processors,
        )
        self.model.text_decoder.train(mode)
        return tokens[:, len(prefix) :].unflatten(0, (-1, count))


def _preprocessing(pretrained: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation the model's own image processor uses; CLIP's, as BLIP's are, where none is found."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.utils import cached_file

    path = cached_file(pretrained, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)
    import json

    config = json.loads(Path(path).read_text())
    return config["image_mean"], config["image_std"]
