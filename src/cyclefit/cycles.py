"""Cycles: reconstruction losses for one model, computed through the other, frozen."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cyclefit import UserError
from cyclefit.bridge import Bridge
from cyclefit.captioners import Captioner, Decoding
from cyclefit.judges import Judge, Partners
from cyclefit.loading import freeze


@dataclass
class Reading:
    """What the captioner made of a batch: one pass, shared by its own loss and the cycle."""

    images: Float[Tensor, "b 3 h w"]
    features: Float[Tensor, "b p d"]
    tokens: Int[Tensor, "b l"]
    """The reference captions."""
    logits: Float[Tensor, "b l v"]
    """Of the reference captions' tokens, teacher-forced."""


class ImageCycle(nn.Module, ABC):
    """x -> y -> x': what a captioner's caption lets the generator know about the image."""

    weight: float
    needs: tuple[str, ...] = ()
    """Which of the partners it asks for."""

    def prepare(self, captioner: Captioner, partners: Partners) -> None:
        """Called once, before the first step and before a checkpoint is read."""

    @abstractmethod
    def forward(
        self, captioner: Captioner, partners: Partners, reading: Reading, seeds: Sequence[int]
    ) -> tuple[Float[Tensor, "m"], dict[str, Tensor]]:
        """The unweighted loss of m <= b samples, and scalars to log; `seeds` has one number per image.

        Carries gradient into the captioner and nothing else.
        """


class SoftCaptionDenoising(ImageCycle):
    """Denoising through soft captions (Li et al., ICCV 2023, arXiv 2212.12249, section 3.2).

    pi_l = softmax(logits_l / T);  e_l = pi_l^T M;  c = tau(BOS, e_1 .. e_L, EOS)
    L = E_{t, eps} || eps - eps_theta(z_t, t, c) ||^2 on the source image's latents, one timestep and noise per image.

    Args:
        weight: of the loss beside the captioner's own.
        temperature: T.
        form: `soft`, or `straight-through`: the generator reads the hard caption in its own tokens, the gradient is
            the soft one's, aligned by characters.
        captions: `reference` (teacher-forced) or `sampled` from the captioner.
        contrastive: subtract the error under the same caption on the batch's next image.
        min_timestep: lowest timestep drawn.
        max_timestep: highest timestep drawn, exclusive.

    """

    needs = ("generator",)

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        form: Literal["soft", "straight-through"] = "soft",
        captions: Literal["reference", "sampled"] = "reference",
        contrastive: bool = False,
        min_timestep: int = 0,
        max_timestep: int = 1000,
    ):
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.form = form
        self.captions = captions
        self.contrastive = contrastive
        self.min_timestep = min_timestep
        self.max_timestep = max_timestep
        self.bridge: Bridge | None = None

    def prepare(self, captioner: Captioner, partners: Partners) -> None:
        """Builds the vocabulary bridge."""
        generator = partners.generator
        table = generator.text_encoder.get_input_embeddings().weight
        self.bridge = Bridge(captioner.tokenizer, generator.tokenizer, table, captioner.vocab_size)

    def forward(
        self, captioner: Captioner, partners: Partners, reading: Reading, seeds: Sequence[int]
    ) -> tuple[Float[Tensor, "m"], dict[str, Tensor]]:
        """The denoising error under each image's soft caption."""
        generator, tokens, logits = partners.generator, reading.tokens, reading.logits
        if self.captions == "sampled":
            decoding = Decoding("nucleus", top_p=1.0)
            tokens = captioner.generate(reading.features.detach(), decoding, seeds)[:, 0]
            logits = captioner.logits(reading.features, tokens)
        lengths = (captioner.mask(tokens) * (tokens != captioner.end_token_id)).sum(1).long()
        probabilities = (logits.float() / self.temperature).softmax(-1)
        if self.form == "soft":
            embeddings = self.bridge.soft(probabilities, lengths)
        else:
            hard = tokens if self.captions == "sampled" else logits.argmax(-1)
            embeddings = self.bridge.straight_through(hard, probabilities, lengths)
        conditioning = generator.encode_embeddings(embeddings)
        latents, noise = generator.encode_images(reading.images), generator.noise(seeds)
        timesteps = torch.randint(self.min_timestep, self.max_timestep, (len(latents),)).to(latents.device)
        loss = error = generator.errors(latents, conditioning, timesteps, noise)
        if self.contrastive:
            loss = error - generator.errors(latents.roll(1, 0), conditioning, timesteps, noise)
        return loss, {"denoising_error": error.detach().mean()}


class PolicyGradient(ImageCycle):
    """REINFORCE with a leave-one-out baseline (Kool et al., 2019) on captions sampled from the captioner.

    K captions y_k ~ p(.|x), rewards r_k;  A_k = r_k - mean_{j != k} r_j;
    L = -(1/K) sum_k A_k log p(y_k|x) + kl_weight KL(p || p_0),  log p summed over tokens, no length correction.
    The KL is exact per token on the sampled prefixes, p_0 the captioner before finetuning.

    Args:
        reward: any judge.
        weight: of the loss beside the captioner's own.
        num_samples: K.
        num_images: images of the batch that take part, all if None.
        normalize: divide the advantages by their standard deviation over the batch, so that weights carry over
            between rewards of different scale.
        kl_weight: 0 keeps no copy of the starting captioner.
        max_new_tokens: length limit of the sampled captions.

    """

    def __init__(
        self,
        reward: Judge,
        weight: float = 0.5,
        num_samples: int = 4,
        num_images: int | None = None,
        normalize: bool = True,
        kl_weight: float = 0.0,
        max_new_tokens: int = 30,
    ):
        super().__init__()
        if num_samples < 2:
            raise UserError(f"a leave-one-out baseline needs num_samples >= 2, not {num_samples}")
        self.reward = reward
        self.weight = weight
        self.num_images = num_images
        self.normalize = normalize
        self.kl_weight = kl_weight
        self.decoding = Decoding("nucleus", num_samples, max_new_tokens, top_p=1.0)
        self.start: Captioner | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """What the reward asks for."""
        return self.reward.needs

    def prepare(self, captioner: Captioner, partners: Partners) -> None:
        """Keeps a frozen copy of the captioner where a KL is asked for."""
        if self.kl_weight:
            self.start = freeze(copy.deepcopy(captioner))

    def forward(
        self, captioner: Captioner, partners: Partners, reading: Reading, seeds: Sequence[int]
    ) -> tuple[Float[Tensor, "m"], dict[str, Tensor]]:
        """Minus the advantage-weighted log-likelihood of each image's sampled captions."""
        count, samples = self.num_images or len(reading.images), self.decoding.num_samples
        images, features, seeds = reading.images[:count], reading.features[:count], seeds[:count]
        tokens = captioner.generate(features.detach(), self.decoding, seeds).flatten(0, 1)
        texts = captioner.decode(tokens)
        candidates = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        rewards = self.reward.score(partners, images, candidates, seeds).float()
        advantages = leave_one_out(rewards)
        if self.normalize:
            advantages = advantages / (advantages.std() + 1e-6)

        repeated = features.repeat_interleave(samples, 0)
        logits, mask = captioner.logits(repeated, tokens).float(), captioner.mask(tokens)
        log_probs = logits.log_softmax(-1)
        chosen = (log_probs.gather(-1, tokens[..., None])[..., 0] * mask).sum(1)
        loss = -(advantages * chosen.unflatten(0, (-1, samples))).mean(1)
        logs = {
            "reward": rewards.mean(),
            "reward_spread": rewards.std(1).mean(),
            "words": mask.sum(1).mean() - 1,
        }
        if self.kl_weight:
            with torch.no_grad():
                start = self.start.logits(repeated.detach(), tokens).float().log_softmax(-1)
            kl = ((log_probs.exp() * (log_probs - start)).sum(-1) * mask).sum(1).unflatten(0, (-1, samples)).mean(1)
            loss = loss + self.kl_weight * kl
            logs["kl"] = kl.detach().mean()
        return loss, logs


def leave_one_out(rewards: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """A_k = r_k - mean_{j != k} r_j."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (k / (k - 1))
