"""Policy gradient with any judge as the reward of sampled captions."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.ranges import Count, NonNegative, Range, checked
from cyclefit.cycles.images import ImageCycle, Kept, Reading, check_batch_size
from cyclefit.judges import Judge, Partners, check_complete, check_judge
from cyclefit.models import Captioner, Decoding, Features
from cyclefit.models.pretrained import frozen_copy


@dataclass
class Rollout:
    """The captions sampled in a step, and what is known of them in all of its inner epochs."""

    tokens: Int[Tensor, "n l"]
    advantages: Float[Tensor, "b k"]
    logs: dict[str, Tensor]
    log_probs: Float[Tensor, "n l"] | None = None
    """Of each token under the captioner that sampled it; known after the first inner epoch."""


@checked
class PolicyGradient(ImageCycle):
    """Policy gradient with a leave-one-out baseline (Kool et al., 2019) on captions sampled from the captioner.

    K captions y_k ~ p(.|x), rewards r_k;  A_k = r_k - mean_{j != k} r_j;
    L = -(1/K) sum_k A_k log p(y_k|x) + kl_weight KL(p || p_0),  log p summed over tokens, no length correction.
    This is REINFORCE. With several inner epochs, K captions serve several updates, and log p(y_k|x) gives way to the
    clipped ratio of PPO (Schulman et al., 2017, arXiv 1707.06347), taken per token as in GRPO (Shao et al., 2024, arXiv
    2402.03300, eq. 3), but summed over tokens, without GRPO's 1/|y_k| (Liu et al., 2025, arXiv 2503.20783):
    L = -(1/K) sum_k sum_l min(r_kl A_k, clip(r_kl, 1 - eps, 1 + eps) A_k),  r_kl = p(y_kl | y_k,<l, x) / p_old(...)
    with p_old the captioner that sampled the captions. In the first inner epoch r = 1, and the gradient is REINFORCE's.
    p_0 is the captioner before finetuning. The KL is taken per token on the sampled prefixes: either exactly, as a sum
    over the vocabulary, or estimated from the sampled token alone, as GRPO does (k3 of Schulman, "Approximating KL
    divergence", 2020):  r - 1 - log r,  r = p_0(y_l) / p(y_l).  The value of k3 is unbiased for captions of p itself,
    that is, in the first inner epoch; its gradient is that of KL(p_0 || p), as wherever k3 is used as a loss.

    Args:
        reward: the judge whose score is the reward.
        weight: weight of this loss relative to the captioner's own.
        num_samples: K, the number of captions per image; at least 2, because of the baseline.
        num_images: number of images of the batch that the cycle uses; all if None.
        normalize: divide the advantages by their standard deviation over the batch, so that the same weight works for
            rewards of different scales.
        kl_weight: weight of the KL; at 0 no copy of the initial captioner is kept.
        kl_estimator: `exact`, or `k3`, which holds nothing of size captions x vocabulary in memory where the captioner
            can do without.
        max_new_tokens: length limit of the sampled captions.
        inner_epochs: number of updates on each batch, and on the captions sampled for it; the captioner's own loss
            takes part in all of them.
        clip: eps, how far the probability of a token may move from the one it was sampled with before its gradient is
            cut off; without effect in the first inner epoch.

    """

    reads_logits = False
    needs_pairs = False

    def __init__(
        self,
        reward: Judge,
        weight: NonNegative = 0.5,
        num_samples: Annotated[int, Range(2)] = 4,
        num_images: Count | None = None,
        normalize: bool = True,
        kl_weight: NonNegative = 0.0,
        kl_estimator: Literal["exact", "k3"] = "exact",
        max_new_tokens: Count = 30,
        inner_epochs: Count = 1,
        clip: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2,
    ):
        super().__init__()
        self.reward = reward
        self.weight = weight
        self.num_images = num_images
        self.normalize = normalize
        self.kl_weight = kl_weight
        self.kl_estimator = kl_estimator
        self.decoding = Decoding("nucleus", num_samples, max_new_tokens, top_p=1.0)
        self.inner_epochs = inner_epochs
        self.clip = clip
        self.start: Captioner | None = None
        self._kept = Kept(inner_epochs)

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return self.reward.needs

    @override
    def prepare(self, captioner: Captioner, partners: Partners) -> None:
        check_judge(self.reward, "captions", "reward")
        check_complete(self.reward, "reward")
        self.reward.check(partners)
        captioner.check(self.decoding)
        if self.kl_weight:
            self.start = frozen_copy(captioner)

    @override
    def check_batch(self, batch_size: int) -> None:
        check_batch_size(self, batch_size, self.reward.num_others)

    @override
    def forward(
        self, captioner: Captioner, partners: Partners, reading: Reading, seeds: Sequence[int]
    ) -> tuple[Float[Tensor, "m"], dict[str, Tensor]]:
        count, samples = self.num_images or len(reading.images), self.decoding.num_samples
        images, features, seeds = reading.images[:count], reading.features[:count], seeds[:count]
        rollout = self._kept.get(seeds, lambda: self._sample(captioner, partners, images, features, seeds))
        tokens, logs = rollout.tokens, dict(rollout.logs)
        mask = captioner.mask(tokens)
        log_probs, kl = self._log_probs(captioner, features.repeat(samples), tokens)
        if self.inner_epochs == 1:
            summed = (log_probs * mask).sum(1).unflatten(0, (-1, samples))
            loss = -(rollout.advantages * summed).mean(1)
        else:
            if rollout.log_probs is None:
                rollout.log_probs = log_probs.detach()
            gains, clipped = clipped_gains(log_probs, rollout.log_probs, rollout.advantages.flatten(), self.clip)
            loss = -(gains * mask).sum(1).unflatten(0, (-1, samples)).mean(1)
            logs["clipped"] = (clipped * mask).sum() / mask.sum()
        if kl is not None:
            kl = (kl * mask).sum(1).unflatten(0, (-1, samples)).mean(1)
            loss = loss + self.kl_weight * kl
            logs["kl"] = kl.detach().mean()
        return loss, logs

    def _sample(
        self, captioner: Captioner, partners: Partners, images: Tensor, features: Features, seeds: Sequence[int]
    ) -> Rollout:
        samples = self.decoding.num_samples
        tokens = captioner.generate(features.detach(), self.decoding, seeds).flatten(0, 1)
        texts = captioner.decode(tokens)
        candidates = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        rewards, logs = rewarded(self.reward, partners, images, candidates, seeds)
        logs["words"] = captioner.mask(tokens).sum(1).mean() - 1
        return Rollout(tokens, advantages(rewards, self.normalize), logs)

    def _log_probs(
        self, captioner: Captioner, features: Features, tokens: Int[Tensor, "n l"]
    ) -> tuple[Float[Tensor, "n l"], Float[Tensor, "n l"] | None]:
        """Log p of each token, and its KL if that has a weight."""
        if not self.kl_weight:
            return captioner.token_log_probs(features, tokens), None
        if self.kl_estimator == "k3":
            chosen = captioner.token_log_probs(features, tokens)
            with torch.no_grad():
                start = self.start.token_log_probs(features.detach(), tokens)
            return chosen, k3(chosen, start)
        log_probs = captioner.logits(features, tokens).float().log_softmax(-1)
        chosen = log_probs.gather(-1, tokens[..., None])[..., 0]
        with torch.no_grad():
            start = self.start.logits(features.detach(), tokens).float().log_softmax(-1)
        return chosen, (log_probs.exp() * (log_probs - start)).sum(-1)


def rewarded(
    judge: Judge,
    partners: Partners,
    given: Float[Tensor, "b 3 h w"] | list[str],
    candidates: list[list[str]] | Float[Tensor, "b k 3 h w"],
    seeds: Sequence[int],
) -> tuple[Float[Tensor, "b k"], dict[str, Tensor]]:
    """The judge's scores of samples, checked, and values to log: the mean, of a sum that of each part, the spread."""
    rewards, parts = judge.score_parts(partners, given, candidates, seeds)
    check_scores(judge, rewards, candidates)
    rewards = rewards.float()
    means = {f"reward/{name}": scores.float().mean() for name, scores in parts.items()}
    return rewards, {"reward": rewards.mean(), **means, "reward_spread": rewards.std(1).mean()}


def check_scores(judge: Judge, scores: Float[Tensor, "b n"], candidates: list[list[str]] | Tensor) -> None:
    """Checks scores that are used as rewards; warns if they say nothing about the candidates.

    Raises:
        UserError: a score is NaN or infinite; the message names the candidate.

    """
    for i, k in (~scores.isfinite()).nonzero().tolist():
        what = f"the caption {candidates[i][k]!r}" if isinstance(candidates, list) else f"image {k} of prompt {i}"
        raise UserError(
            f"the reward {judge.label} is {scores[i, k].item()} for {what}: correct the judge, or remove what it "
            "cannot score from the data"
        )
    if (scores == scores[:, :1]).all():
        warnings.warn(
            f"the reward {judge.label} is the same for all samples of each input in this step, so they teach nothing: "
            "either it is constant, or the samples do not differ",
            stacklevel=2,
        )


def clipped_gains(
    log_probs: Float[Tensor, "n l"], old: Float[Tensor, "n l"], advantages: Float[Tensor, "n"], clip: float
) -> tuple[Float[Tensor, "n l"], Float[Tensor, "n l"]]:
    """min(r A, clip(r, 1 - clip, 1 + clip) A) of each token, r = p / p_old; and 1 where it is cut off, 0 elsewhere."""
    ratio, of = (log_probs - old).exp(), advantages[:, None]
    gains, limited = ratio * of, ratio.clamp(1 - clip, 1 + clip) * of
    return torch.minimum(gains, limited), (limited < gains).float()


def k3(log_prob: Float[Tensor, "*shape"], start: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The estimate r - 1 - log r of the KL from sampled tokens, r = p_0 / p: at least 0, and unbiased over p."""
    ratio = start - log_prob
    return ratio.expm1() - ratio


def advantages(rewards: Float[Tensor, "b k"], normalize: bool = False) -> Float[Tensor, "b k"]:
    """A_k = r_k - mean_{j != k} r_j; with `normalize`, divided by their standard deviation over the batch."""
    k = rewards.shape[1]
    found = (rewards - rewards.mean(1, keepdim=True)) * (k / (k - 1))
    return found / (found.std() + 1e-6) if normalize else found
