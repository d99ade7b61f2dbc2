"""Captioners, p(caption | image)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.ranges import Count, Natural, Positive, Range, checked
from cyclefit.models.pretrained import Adapter, seeded
from cyclefit.models.rows import Features


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


class Captioner(Adapter, ABC):
    """p(caption | image), token by token.

    Captions are token ids `(b, l)`: the caption, the end token, padding; the padding token may be the end token. Begin
    token and prompt are added by the model. Images are encoded once, by `embed`; all other methods work on the features
    it returns. A new captioner sets the attributes and writes the three abstract methods.
    """

    tokenizer: object
    end_token_id: int
    pad_token_id: int
    vocab_size: int
    """Width of the logits; the tokenizer may know fewer tokens."""
    label_smoothing: float = 0.0
    max_tokens: int = 64
    """Longer captions are truncated to it, the end token included."""
    max_new_tokens: int = 64
    """The most tokens that can be generated."""
    formats: Mapping[str, str] = {}
    """The formats of `export`, each with the suffix of its file, empty for a folder."""

    @abstractmethod
    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of images in [0, 1]; they carry gradient to the images, and to the vision tower if it is trained."""

    @abstractmethod
    def logits(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Logits of each of `tokens` given the image and the tokens before it (teacher forcing)."""

    @abstractmethod
    def generate_tokens(self, features: Features, **settings) -> Int[Tensor, "b l"]:
        """One caption for each row, without the prompt: the decoder's own `generate` of transformers.

        Args:
            features: of the images.
            settings: passed on to it: length, beams, end and padding token, and the logits processors that sample.

        """

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.parameters()).device

    def export(self, form: str, path: Path) -> str:
        """Writes `path` in one of `formats`; returns lines of Python that load it there."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, features: Features, decoding: Decoding, seeds: Sequence[int]) -> Int[Tensor, "b n l"]:
        """`decoding.num_samples` captions per image, without gradient, sampled by each image's own seed."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.check(decoding)
        count, processors = decoding.num_samples, LogitsProcessorList()
        if decoding.method in ("top-k", "nucleus"):
            if decoding.temperature != 1:
                processors.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.method == "top-k":
                processors.append(TopKLogitsWarper(decoding.top_k))
            elif decoding.top_p < 1:
                processors.append(TopPLogitsWarper(decoding.top_p))
            uniforms = seeded(torch.rand, seeds, count, decoding.max_new_tokens, device=self.device)
            processors.append(SeededSampling(uniforms.flatten(0, 1).double()))
        training = [module for module in self.modules() if module.training]
        self.eval()
        tokens = self.generate_tokens(
            features.repeat(count),
            eos_token_id=self.end_token_id,
            pad_token_id=self.pad_token_id,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            num_beams=decoding.num_beams if decoding.method == "beam" else 1,
            do_sample=False,
            logits_processor=processors,
        )
        for module in training:
            module.training = True
        return tokens.unflatten(0, (-1, count))

    def tokenize(self, captions: list[str]) -> Int[Tensor, "b l"]:
        """Captions as token ids with end token and padding, truncated to `max_tokens`."""
        length = self.max_tokens - 1
        # A tokenizer stores the truncation that it is called with, and `export` would save it.
        rows = [row[:length] for row in self.tokenizer(captions, add_special_tokens=False).input_ids]
        length = max(map(len, rows)) + 1
        padded = [row + [self.end_token_id] + [self.pad_token_id] * (length - len(row) - 1) for row in rows]
        return torch.tensor(padded, device=self.device)

    def decode(self, tokens: Int[Tensor, "b l"]) -> list[str]:
        """Token ids as text."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def check(self, decoding: Decoding) -> None:
        """Checks that the model has positions for the longest captions of a decoding.

        Raises:
            UserError: it does not.

        """
        if decoding.max_new_tokens > self.max_new_tokens:
            raise UserError(
                f"max_new_tokens must be at most {self.max_new_tokens}, all that the captioner has positions for, "
                f"not {decoding.max_new_tokens}"
            )

    def check_questions(self, who: str) -> None:
        """Checks that it can be asked questions, for what is named `who`.

        Raises:
            UserError: it cannot.

        """
        raise UserError(
            f"{who}: {type(self).__name__} answers no questions: use a VisionLanguage whose model has a chat template"
        )

    def answer_log_probs(self, features: Features, questions: list[str], answers: list[str]) -> Float[Tensor, "b"]:
        """Log p(answer | image, question) of each row, summed over the answer's tokens without an end token, in nats.

        It carries gradient to the features, and to the parameters that are trained.

        Raises:
            UserError: see `check_questions`.

        """
        self.check_questions("answer_log_probs")

    def first_token_log_probs(
        self, features: Features, questions: list[str], words: list[list[str]]
    ) -> Float[Tensor, "b"]:
        """Log of the probability that the answer's first token is that of one of the row's words, in nats.

        Each token counts once. It carries gradient as `answer_log_probs` does.

        Raises:
            UserError: see `check_questions`.

        """
        self.check_questions("first_token_log_probs")

    def lengths(self, tokens: Int[Tensor, "b l"]) -> Int[Tensor, "b"]:
        """Tokens of each caption before its first end token; all of them where there is none."""
        return ((tokens == self.end_token_id).cumsum(1) == 0).sum(1)

    def mask(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """1 for the caption's tokens and its end token, 0 for padding."""
        inside = torch.arange(tokens.shape[1], device=tokens.device) <= self.lengths(tokens)[:, None]
        if self.pad_token_id != self.end_token_id:  # padding may be sampled, and is no part of the caption then
            inside = inside & (tokens != self.pad_token_id)
        return inside.float()

    def token_log_probs(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """Log p(y_l | y_<l, x) of each token, padding included, in nats."""
        return self.logits(features, tokens).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def log_prob(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        """Log p(caption | image), summed over the caption's tokens and its end token, in nats."""
        return -cross_entropy(self.logits(features, tokens), tokens, self.mask(tokens))

    def loss(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        """`loss_of` the captions, for callers that do not need the logits."""
        return self.loss_of(self.logits(features, tokens), tokens)

    def loss_of(self, logits: Float[Tensor, "b l v"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        """L_LM = -(1/l) sum_l log p(y_l | y_<l, x), label-smoothed, in nats; l the mean length of the batch's captions.

        Its mean over the batch is the mean over all tokens, as BLIP is trained: dividing each caption by its own length
        would weight the end tokens of short captions most, and captions would become short.
        """
        mask = self.mask(tokens)
        return cross_entropy(logits, tokens, mask, self.label_smoothing) / mask.sum(1).mean()

    def sample(self, images: Float[Tensor, "b 3 h w"], decoding: Decoding, seeds: Sequence[int]) -> list[list[str]]:
        """`decoding.num_samples` captions of each image, without gradient, as text."""
        with torch.no_grad():
            tokens = self.generate(self.embed(images), decoding, seeds)
        texts = self.decode(tokens.flatten(0, 1))
        return [texts[i : i + tokens.shape[1]] for i in range(0, len(texts), tokens.shape[1])]


LOGITS_AT_ONCE = 2**26
"""Logits that a `LargeVocabulary` computes at a time: 256 MB in float32."""


class LargeVocabulary(Captioner):
    """A captioner with a separate head: log-probabilities are computed for a part of the tokens at a time.

    With a vocabulary of 152 thousand, a batch of 64 captions of 30 tokens has 1.2 GB of logits in float32, and
    cross-entropy keeps several copies for its gradient. Here the head is checkpointed (Chen et al., arXiv 1604.06174)
    over parts of the tokens, and no tensor `(b, l, v)` exists unless `logits` is called.
    """

    @abstractmethod
    def states(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """The decoder's last hidden states, from which `head` computes the logits of each of `tokens`."""

    @abstractmethod
    def head(self, states: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape v"]:
        """Logits of hidden states."""

    @override
    def logits(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        return self.head(self.states(features, tokens))

    def _losses(
        self, states: Float[Tensor, "b l d"], tokens: Int[Tensor, "b l"], smoothing: float = 0.0
    ) -> Float[Tensor, "b l"]:
        def losses(states: Tensor, chosen: Tensor) -> Tensor:
            return F.cross_entropy(self.head(states).float(), chosen, reduction="none", label_smoothing=smoothing)

        rows = max(1, LOGITS_AT_ONCE // self.vocab_size)
        parts = zip(states.flatten(0, 1).split(rows), tokens.flatten().split(rows), strict=True)
        found = [checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(found).view(tokens.shape)

    @override
    def token_log_probs(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        return -self._losses(self.states(features, tokens), tokens)

    @override
    def log_prob(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        return (self.token_log_probs(features, tokens) * self.mask(tokens)).sum(1)

    @override
    def loss(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        mask = self.mask(tokens)
        losses = self._losses(self.states(features, tokens), tokens, self.label_smoothing)
        return (losses * mask).sum(1) / mask.sum(1).mean()


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
    """A logits processor that samples each row's token by inverse transform from that row's own random numbers.

    Exact sampling from the warped distribution, one uniform number per token: independent of batch and device, unlike
    `do_sample=True` with its one generator for the whole batch. One object is for one call of `generate`.
    """

    def __init__(self, uniforms: Float[Tensor, "rows steps"]):
        self.uniforms = iter(uniforms.T)

    def __call__(self, input_ids: Int[Tensor, "rows l"], scores: Float[Tensor, "rows v"]) -> Tensor:
        """Scores that are 0 at the chosen token and -inf elsewhere."""
        cumulative = scores.double().softmax(-1).cumsum(-1)
        uniform = next(self.uniforms)[:, None]
        # Compared with the total, not with 1: rounding must never pick a token that the warpers removed.
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def merged(model: nn.Module) -> nn.Module:
    """A model of transformers with its adapters merged into its weights, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
        if getattr(module, "_hf_peft_config_loaded", False):
            module._hf_peft_config_loaded = False  # or `save_pretrained` would look for adapters
    return model
