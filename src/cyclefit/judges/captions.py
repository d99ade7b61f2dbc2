"""Judges of captions that use the generator, and the captioner's own likelihood."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cyclefit import UserError
from cyclefit.config.ranges import Count, Natural, NonNegative, Positive, checked
from cyclefit.judges.base import Judge, Partners, distinct
from cyclefit.judges.race import Progressive
from cyclefit.models import Generator, Scorer
from cyclefit.models.generator import check_steps, check_timesteps


@checked
@dataclass
class Regeneration(Progressive):
    """f(x, SD(y)): CLIP image similarity of the source and the image regenerated from the caption.

    Li et al., ICCV 2023 (arXiv 2212.12249), eq. 1. All candidates of an image start from the same noise.
    """

    num_regenerations: Count = 1
    """Number of images drawn per caption, over which the similarities are averaged."""
    steps: Count | None = None
    """Solver steps; the generator's own number if None."""
    guidance_scale: Positive | None = None
    scorer: Scorer | None = field(default=None, repr=False)
    """The scorer that compares the images; the partners' if None."""
    euclidean: bool = False
    """Score by the negative Euclidean distance of the unnormalised embeddings instead of the cosine."""
    latents: bool = False
    """Score by the negative Euclidean distance of both images' latents under the generator, without a scorer."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The generator; also the scorer, unless it compares latents or has its own scorer."""
        return ("generator",) if self.latents or self.scorer is not None else ("generator", "scorer")

    def check(self, partners: Partners) -> None:
        """Checks its number of steps against the generator's timesteps, and that the scorer embeds images."""
        check_steps(self, partners.generator)
        if not self.latents:
            (self.scorer or partners.scorer).check("Regeneration", "images")

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """Cosine similarities, in [-1, 1], or negative distances."""
        self.check(partners)
        pairs, index = distinct(candidates)
        score = self.begin(partners, given, pairs, seeds, others)
        return score(self.effort(partners), torch.arange(len(pairs)))[torch.tensor(index, device=given.device)]

    def effort(self, partners) -> int:
        """Solver steps."""
        return self.steps or partners.generator.steps

    def begin(self, partners, given, pairs, seeds, others) -> Callable[[int, Int[Tensor, "q"]], Float[Tensor, "q"]]:
        """Images of fewer solver steps, from the same noise; those of more steps are drawn anew."""
        embedded = self._embedded(partners, given)

        def score(steps: int, places: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
            some = [pairs[place] for place in places.tolist()]
            source, similarities = embedded[[i for i, _ in some]], 0
            for repeat in range(self.num_regenerations):
                drawn = partners.generator.generate(
                    [text for _, text in some],
                    [seeds[i] + repeat for i, _ in some],
                    steps=steps,
                    guidance_scale=self.guidance_scale,
                )
                made, distant = self._embedded(partners, drawn), self.euclidean or self.latents
                alike = -(source - made).norm(dim=-1) if distant else (source * made).sum(-1)
                similarities = similarities + alike
            return similarities / self.num_regenerations

        return score

    def _embedded(self, partners: Partners, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        if self.latents:
            return partners.generator.encode_images(images).flatten(1)
        return (self.scorer or partners.scorer).embed_images(images, normalize=not self.euclidean)

    def cost(self, partners, num_candidates) -> dict[str, int]:
        """One generated image per candidate and regeneration."""
        images = num_candidates * self.num_regenerations
        calls = partners.generator.calls_per_image(self.steps, self.guidance_scale)
        return {"generator_calls": images, "denoiser_calls": images * calls}

    def spent(self, partners, efforts) -> dict[str, int]:
        """An image for each effort and regeneration."""
        calls = sum(partners.generator.calls_per_image(steps, self.guidance_scale) for steps in efforts)
        repeats = self.num_regenerations
        return {"generator_calls": len(efforts) * repeats, "denoiser_calls": calls * repeats}


@checked
@dataclass
class Denoising(Progressive):
    """-E_{t, eps} || eps - eps_theta(z_t, t, tau(y)) ||^2 on the source latents.

    With `num_others` > 0 it is contrastive: E_{t, eps}[contrast err(x_j, y) - err(x, y)], where err is the denoising
    error under caption y and x_j are other images. This is the generator's estimate of how much y tells about x in
    particular. All candidates of an image, and the images it is contrasted with, share timesteps and noise. The plain
    error favours short, safe captions, the full contrast long ones; with values between, the length stays the same.

    With `log` the score is -E[log err]. Up to a factor this is the log-likelihood of the noise under a Gaussian whose
    variance is estimated (the profile likelihood), whereas the plain error corresponds to a known variance. A detail
    then counts relative to the error that remains.
    """

    num_others: Natural = 0
    contrast: NonNegative = 1.0
    min_timestep: Natural = 0
    max_timestep: Count = 1000
    log: bool = False
    """Score by the logarithm of the errors."""
    num_timesteps: Count = 4
    """Number of timesteps per caption: the midpoints of equal parts of [min_timestep, max_timestep]."""
    batch_size: Count = 256
    """Number of latents per denoiser call."""

    needs = ("generator",)
    baseline = ""  # the easier image would have the higher score with every text (DiffusionITM, arXiv 2305.16397)

    def __post_init__(self):
        check_timesteps(self)
        there = self.max_timestep - self.min_timestep
        if self.num_timesteps > there:
            raise UserError(
                f"Denoising: num_timesteps must be at most {there}, the number of timesteps from min_timestep to "
                f"max_timestep, not {self.num_timesteps}"
            )
        if self.contrast != 1 and not self.num_others:
            raise UserError(f"Denoising: contrast {self.contrast} needs other images: set num_others to 1 or more")

    def check(self, partners: Partners) -> None:
        """Checks its timesteps against the generator's."""
        check_timesteps(self, partners.generator)

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """The negative error, or a difference of errors around 0, in units of the denoiser's target."""
        self.check(partners)
        pairs, index = distinct(candidates)

        def compute() -> Tensor:
            places = torch.arange(len(pairs), device=given.device)
            return self._errors(partners.generator, given, pairs, seeds, others)(range(self.num_timesteps), places)

        errors = partners.once(self.basis, (given, candidates, seeds, others), compute)
        return self._combined(errors)[torch.tensor(index, device=given.device)]

    def effort(self, partners) -> int:
        """Timesteps."""
        return self.num_timesteps

    def begin(self, partners, given, pairs, seeds, others) -> Callable[[int, Int[Tensor, "q"]], Float[Tensor, "q"]]:
        """The errors of fewer of its timesteps, spread over their range; those of more are added to them."""
        measure, order = self._errors(partners.generator, given, pairs, seeds, others), spread(self.num_timesteps)
        errors = torch.zeros(self.num_timesteps, 1 + self.num_others, len(pairs), device=given.device)
        known = 0

        def score(count: int, places: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
            nonlocal known
            new, known = order[known:count], count
            errors[new] = errors[new].index_copy(2, places, measure(new, places))
            return self._combined(errors[sorted(order[:count])][..., places])

        return score

    def _combined(self, errors: Float[Tensor, "t e p"]) -> Float[Tensor, "p"]:
        signs = [-1.0] + [self.contrast / max(self.num_others, 1)] * self.num_others
        total = torch.zeros(errors.shape[-1], device=errors.device)
        for of_timestep in errors:
            for sign, found in zip(signs, of_timestep, strict=True):
                total += sign * (found.log() if self.log else found) / len(errors)
        return total

    @property
    def basis(self) -> Hashable:
        """The errors of equal timesteps and other images, whatever is made of them."""
        timesteps = self.min_timestep, self.max_timestep, self.num_timesteps
        return type(self), self.num_others, *timesteps, self.batch_size

    def _errors(
        self,
        generator: Generator,
        given: Float[Tensor, "b 3 h w"],
        pairs: list[tuple[int, str]],
        seeds: Sequence[int],
        others: Float[Tensor, "b m 3 h w"] | None,
    ) -> Callable[[Sequence[int], Int[Tensor, "q"]], Float[Tensor, "t e q"]]:
        """A function that measures errors: at some of the timesteps, for some pairs of image and caption.

        They are of the image and of each other image.
        """
        device = given.device
        rows = torch.tensor([i for i, _ in pairs], device=device)
        conditioning = generator.encode_texts([text for _, text in pairs])
        latents = [generator.encode_images(given)]
        if self.num_others:
            if others is None:
                if len(given) <= self.num_others:
                    raise UserError(
                        f"contrasting with {self.num_others} other images needs a batch of more than {self.num_others} "
                        f"images, not {len(given)}: raise the batch size or lower num_others"
                    )
                latents += [latents[0].roll(-k, 0) for k in range(1, self.num_others + 1)]
            else:
                latents += [generator.encode_images(others[:, k]) for k in range(self.num_others)]
        noise = generator.noise(seeds)
        edges = torch.linspace(self.min_timestep, self.max_timestep, self.num_timesteps + 1)
        midpoints = ((edges[1:] + edges[:-1]) / 2).long().tolist()

        def errors(timesteps: Sequence[int], places: Int[Tensor, "q"]) -> Float[Tensor, "t e q"]:
            found = torch.zeros(len(timesteps), len(latents), len(places), device=device)
            for k, number in enumerate(timesteps):
                for j, z in enumerate(latents):
                    for some in torch.arange(len(places), device=device).split(self.batch_size):
                        part = places[some]
                        t = torch.full((len(part),), midpoints[number], device=device)
                        found[k, j, some] = generator.errors(z[rows[part]], conditioning[part], t, noise[rows[part]])
            return found

        return errors

    def cost(self, partners, num_candidates) -> dict[str, int]:
        """One denoiser call per caption and timestep, for the image and for each image it is contrasted with."""
        return {"generator_calls": 0, "denoiser_calls": num_candidates * self.num_timesteps * (1 + self.num_others)}

    def spent(self, partners, efforts) -> dict[str, int]:
        """The timesteps of the last effort, which include those before."""
        return {"generator_calls": 0, "denoiser_calls": efforts[-1] * (1 + self.num_others)}


@checked
@dataclass
class Likelihood(Judge):
    """log p(y | x) - alpha log p(y), in nats: the captioner's own likelihood, less a share of it without the image.

    Lin et al., ICML 2024 (arXiv 2306.01879): the likelihood alone is their VisualGPTScore, with alpha = 1 it is the
    pointwise mutual information. p(y) is the mean of p(y | x_k) over images of Gaussian noise, the same for all
    captions, with pixels of mean 0.5 and standard deviation 0.25.
    """

    alpha: NonNegative = 0.0
    """The share of log p(y) that is subtracted; the higher, the less a fluent caption is preferred for that."""
    per_token: bool = False
    """Divide by the number of tokens."""
    num_noise_images: Count = 3
    """Number of images of noise, where alpha is not 0."""

    needs = ("captioner",)

    @torch.no_grad()
    def score(self, partners, given, candidates, seeds, others=None) -> Float[Tensor, "b n"]:
        """Log-probabilities, at most 0 if alpha is 0."""
        captioner = partners.captioner
        features, columns = captioner.embed(given), []
        if self.alpha:
            noise = torch.randn(self.num_noise_images, *given.shape[1:], generator=torch.Generator().manual_seed(0))
            empty = captioner.embed((0.5 + 0.25 * noise).clamp(0, 1).to(given))
        for texts in zip(*candidates, strict=True):
            tokens = captioner.tokenize(list(texts))
            column = captioner.log_prob(features, tokens)
            if self.alpha:
                each = [captioner.log_prob(empty[k : k + 1].repeat(len(texts)), tokens) for k in range(len(empty))]
                column = column - self.alpha * (torch.stack(each).logsumexp(0) - math.log(len(each)))
            columns.append(column / captioner.mask(tokens).sum(1) if self.per_token else column)
        return torch.stack(columns, 1)


def spread(count: int) -> list[int]:
    """The numbers below `count`, a quarter, three quarters, half, ...: the first few are spread over the range.

    Van der Corput's sequence, moved on by a quarter, so that the first two are the midpoints of the halves.
    """
    bits = count.bit_length() + 1
    parts = [sum((i >> bit & 1) / 2 ** (bit + 1) for bit in range(bits)) for i in range(2**bits)]
    return list(dict.fromkeys(int((part + 0.25) % 1 * count) for part in parts))
