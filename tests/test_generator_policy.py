"""Rewards for a generator: densities of solver steps, gradients, old policies, and that training raises the reward."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.cycles import DiffusionNFT, DiffusionPolicyGradient, rewards
from cyclefit.cycles.diffusion_policy import StochasticSolver, log_density, swapped
from cyclefit.judges import ImageText, Judge, Partners
from cyclefit.models import Conditioning, Generator, Lora, OpenClip, Schedule, StableDiffusion, StableDiffusion3
from cyclefit.models.pretrained import adapters_off

CAPTIONS = [f"a {colour} star on the {place}" for colour in ("red", "green", "blue") for place in ("left", "right")]
BATCH = Batch(torch.rand(6, 3, 32, 32), CAPTIONS, [[caption] for caption in CAPTIONS], CAPTIONS)
SEEDS = [11, 22, 33, 44, 55, 66]


class Brightness(Judge):
    """The mean of the pixels."""

    kinds = ("images",)

    def score(self, partners, given, candidates, seeds, others=None):
        return candidates.mean((2, 3, 4))


class Squared(Judge):
    """The mean square of the pixels."""

    kinds = ("images",)

    def score(self, partners, given, candidates, seeds, others=None):
        return candidates.square().mean((2, 3, 4))


class Line(Generator):
    """v = w z in the first step and 0 later, of latents with one element: every expectation is known."""

    pretrained, steps, guidance_scale, image_size, batch_size = "nothing", 2, 1.0, 1, 1_000_000
    latent_shape, towers, trains_texts = (1, 1, 1), (), False
    predicts = staticmethod(lambda weight, latents, times: weight * latents * (times > 500).view(-1, 1, 1, 1))

    def __init__(self, scheduler=None):
        super().__init__()
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.schedule = Schedule.of(self.scheduler)
        self.weight = nn.Parameter(torch.tensor(0.3))

    def compute_latents(self, images):
        return images[:, :1]

    def decode_latents(self, latents):
        return latents.expand(-1, 3, -1, -1)

    def compute_conditioning(self, texts):
        return Conditioning(torch.zeros(len(texts), 1, 1))

    def encode_soft_texts(self, texts):
        raise NotImplementedError

    def predict(self, latents, times, conditioning):
        return self.predicts(self.weight, latents, times)


def made(weights, flow, text_encoder=False, moved=False, **settings):
    """A generator of either pair with adapters; with `moved`, ones that make a difference."""
    torch.manual_seed(0)
    settings = {"steps": 4, "guidance_scale": 3.0, "batch_size": 64} | settings
    lora = Lora(rank=4, alpha=4.0, text_encoder=text_encoder)
    if flow:
        folder = str(weights / "stable-diffusion-3")
        generator = StableDiffusion3(folder, max_sequence_length=8, lora=lora, **settings)
    else:
        generator = StableDiffusion(str(weights / "stable-diffusion"), lora=lora, **settings)
    for name, parameter in generator.named_parameters():
        if moved and "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return generator


def trained(generator):
    return [parameter for parameter in generator.parameters() if parameter.requires_grad]


DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_diffusion_steps_are_those_of_ddim(prediction, level):
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**DIFFUSION, prediction_type=prediction, set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    schedule, (noised, predicted, noise) = Schedule.of(scheduler), torch.randn(3, 2, 4, 3, 3)
    shares = torch.cat([schedule.shares(scheduler.timesteps.float()), torch.tensor([[1.0], [0.0]])], 1)
    for k, t in enumerate(scheduler.timesteps):
        now, following = shares[:, [k, k]], shares[:, [k + 1, k + 1]]
        mean, deviation = schedule.stochastic_step(noised, predicted, now, following, level)
        expected = scheduler.step(predicted, t, noised, eta=level, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + deviation * noise, expected, atol=1e-4, rtol=1e-4)
        assert deviation.shape == (2, 1, 1, 1)
    assert (deviation == 0).all(), "the last step adds no noise"


def test_flow_steps_by_their_equation():
    """Of data that is one point the denoiser is known, and with it every marginal: N(alpha m, sigma^2)."""
    schedule, level, point = Schedule.of(FlowMatchEulerDiscreteScheduler()), 0.7, 0.6
    torch.manual_seed(0)
    noised, predicted, (s, t) = torch.randn(2, 1), torch.randn(2, 1), (0.5, 0.8)
    at = [torch.tensor([[1 - x], [x]]).expand(2, 2) for x in (t, s)]
    mean, deviation = schedule.stochastic_step(noised, predicted, *at, level)
    w = level * math.sqrt(t / (1 - t))
    expected = noised + (predicted + w**2 / (2 * t) * (noised + (1 - t) * predicted)) * (s - t)
    torch.testing.assert_close(mean, expected)
    assert deviation[0].item() == pytest.approx(w * math.sqrt(t - s))
    last = torch.tensor([[1.0], [0.0]]).expand(2, 2)
    mean, deviation = schedule.stochastic_step(noised, predicted, at[0], last, level)
    torch.testing.assert_close(mean, noised - t * predicted)
    assert (deviation == 0).all()

    latents, sigmas = torch.randn(20_000, 1), torch.linspace(1, 0.2, 200)
    for t, s in itertools.pairwise(sigmas):
        at = [torch.stack([1 - x, x])[:, None].expand(2, len(latents)) for x in (t, s)]
        exact = (latents - point) / t  # eps - x_0 with eps = (z - (1 - t) m) / t
        mean, deviation = schedule.stochastic_step(latents, exact, *at, level)
        latents = mean + deviation * torch.randn_like(latents)
    assert latents.mean().item() == pytest.approx(0.8 * point, abs=0.01)
    assert latents.std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("flow", [False, True], ids=["epsilon", "flow"])
def test_densities_are_those_of_the_path(flow, weights):
    """Each step of a path is its mean plus the noise of its seed; the density is torch's."""
    generator = made(weights, flow, moved=True)
    solver, seeds = StochasticSolver(generator, 0.7, None, 3.0), [5, 6, 7]
    with torch.no_grad():
        told = generator.encode_texts(CAPTIONS[:3])
        path = solver.path(told, seeds)
        assert path.shape == (3, 5, *generator.latent_shape)
        alone = solver.path(told[torch.tensor([1])], [6])
        torch.testing.assert_close(alone[0], path[1], atol=1e-4, rtol=1e-4)
        for k in range(3):
            step = torch.full((3,), k)
            mean, deviation = solver.mean(path[:, k], step, told), solver.deviation(step)
            noise = (path[:, k + 1] - mean) / deviation.view(-1, 1, 1, 1)
            drawn = torch.randn(4, *generator.latent_shape, generator=torch.Generator().manual_seed(6))
            torch.testing.assert_close(noise[1], drawn[k + 1], atol=1e-3, rtol=1e-3)
            normal = torch.distributions.Normal(mean, deviation.view(-1, 1, 1, 1))
            expected = normal.log_prob(path[:, k + 1]).flatten(1).mean(1)
            torch.testing.assert_close(log_density(path[:, k + 1], mean, deviation), expected)


def test_without_noise_the_path_is_the_solvers_own(weights):
    """Euler steps of flow matching: the images that `generate` gives of the same first noise."""
    generator = made(weights, flow=True, moved=True)
    with torch.no_grad():
        told = generator.encode_texts(CAPTIONS[:2])
        path = StochasticSolver(generator, 0.0, None, 3.0).path(told, [5, 6])
        expected = generator.denoise(told, path[:, 0])
    torch.testing.assert_close(path[:, -1], expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_is_that_of_the_expected_reward(monkeypatch):
    """E[r] = c^2 + std^2 with c = 1 + (w + s^2 / 2) dt, r the square of what the one step with noise leads to."""
    monkeypatch.setattr(rewards, "advantages", lambda found, normalize: 2 * (found - found.mean(1, keepdim=True)))
    generator, count = Line(), 15_000
    cycle = DiffusionPolicyGradient(reward=Squared(), num_samples=2, noise_level=0.7)
    cycle.prepare(generator, Partners())
    batch = Batch(torch.zeros(count, 3, 1, 1), ["a star"] * count, [["a star"]] * count, ["a"] * count)
    loss, logs = cycle(generator, Partners(), batch, range(count))
    loss.mean().backward()
    sigma = 1e-3  # of the second and last step of diffusers' solver
    spread, dt = 0.49 / (1 - sigma), sigma - 1
    c = 1 + (0.3 + spread / 2) * dt
    assert logs["reward"].item() == pytest.approx(c**2 - spread * dt, rel=0.05)
    assert generator.weight.grad.item() == pytest.approx(-2 * c * dt, rel=0.1)


def test_the_clipped_loss_by_its_definition():
    """Later inner epochs: the hand-written ratio, its clipping, and no gradient where it is clipped."""
    generator = Line()
    cycle = DiffusionPolicyGradient(reward=Squared(), num_samples=2, inner_epochs=2, clip=0.05)
    cycle.prepare(generator, Partners())
    batch = Batch(torch.zeros(8, 3, 1, 1), ["a star"] * 8, [["a star"]] * 8, ["a"] * 8)
    seen, draw = [], cycle.draw
    cycle.draw = lambda *arguments: seen.append(draw(*arguments)) or seen[-1]
    loss, logs = cycle(generator, Partners(), batch, list(range(8)))
    assert logs["clipped"] == 0
    [rollout] = seen
    torch.testing.assert_close(loss, -rollout.advantages.unflatten(0, (8, 2)).mean(1))
    told = rollout.conditioning[rollout.caption]
    noise, start = rollout.target - cycle.output(generator, rollout.noised, rollout.step, told), rollout.noised
    gradient = -(rollout.advantages * (noise * start * -0.999).flatten() / rollout.deviation**2).mean()
    loss.mean().backward()
    torch.testing.assert_close(generator.weight.grad, gradient.detach(), atol=1e-4, rtol=1e-4)

    with torch.no_grad():
        generator.weight += 0.05
    generator.weight.grad = None
    loss, logs = cycle(generator, Partners(), batch, list(range(8)))
    assert len(seen) == 1, "the second inner epoch draws again"
    mean = cycle.output(generator, rollout.noised, rollout.step, told)
    moved = log_density(rollout.target, mean, rollout.deviation)
    ratio, advantage = (moved - rollout.old).exp().detach(), rollout.advantages
    free = (ratio - 1).abs() < 0.05
    assert 0 < free.sum() < len(free)
    assert logs["clipped"].item() == pytest.approx(1 - free.float().mean().item())
    expected = torch.where(free, ratio, 1 + 0.05 * (ratio - 1).sign()) * advantage
    torch.testing.assert_close(loss, -torch.minimum(ratio * advantage, expected).unflatten(0, (8, 2)).mean(1))
    open_ = free | ((ratio > 1) != (advantage > 0))
    (-(torch.where(open_, (moved - rollout.old).exp() * advantage, 0.0)).mean()).backward()
    expected, generator.weight.grad = generator.weight.grad.clone(), None
    loss.mean().backward()
    torch.testing.assert_close(generator.weight.grad, expected)
    cycle(generator, Partners(), batch, list(range(8)))
    assert len(seen) == 2, "a new step draws anew"


CYCLES = {
    "policy": lambda **more: DiffusionPolicyGradient(reward=Brightness(), num_samples=2, kl_weight=0.1, **more),
    "nft": lambda **more: DiffusionNFT(reward=Brightness(), num_samples=2, kl_weight=0.1, **more),
}


@pytest.mark.parametrize("flow", [False, True], ids=["epsilon", "flow"])
@pytest.mark.parametrize("name", CYCLES)
def test_gradient_reaches_the_adapters_alone_and_the_start_has_no_kl(name, flow, weights):
    generator, cycle = made(weights, flow, text_encoder=not flow), CYCLES[name](num_images=3)
    cycle.prepare(generator, Partners())
    asked = {n for n, p in generator.named_parameters() if p.requires_grad}
    loss, logs = cycle(generator, Partners(), BATCH, SEEDS)
    assert loss.shape == (3,)
    assert logs["kl"] < 1e-9
    assert all(value.dim() == 0 and not value.requires_grad for value in logs.values())
    loss.mean().backward()
    for n, p in generator.named_parameters():
        assert p.requires_grad == (n in asked), n
        assert (p.grad is not None) == (n in asked), n
        if "to_q.lora_B" in n:  # lora_A has none while lora_B is zero
            assert p.grad.abs().sum() > 0, n
    assert not any(p.requires_grad for p in cycle.parameters())


@pytest.mark.parametrize("name", CYCLES)
def test_a_caption_and_its_seed_make_the_loss_whatever_the_batch(name, weights):
    losses = []
    for rows, together in ((slice(0, 6), 64), (slice(2, 4), 3)):
        generator, cycle = made(weights, flow=False, moved=True, batch_size=together), CYCLES[name]()
        cycle.prepare(generator, Partners())
        seen, draw = [], cycle.draw
        cycle.draw = lambda *arguments, draw=draw, seen=seen: seen.append(draw(*arguments)) or seen[-1]
        _, logs = cycle(generator, Partners(), BATCH[rows], SEEDS[rows])
        assert logs["kl"] > 1e-6, "the start is the policy itself"
        losses.append([getattr(seen[0], part) for part in ("noised", "target", "step", "start")])
    whole, part = losses
    count = len(part[0])
    for left, right in zip(whole, part, strict=True):
        torch.testing.assert_close(left[count : 2 * count], right, atol=2e-3, rtol=2e-3)


def test_the_adapters_are_off_in_the_start(weights):
    generator = made(weights, flow=False, text_encoder=True, moved=True)
    plain = StableDiffusion(str(weights / "stable-diffusion"), steps=4, guidance_scale=3.0)
    before = generator.generate(CAPTIONS[:2], [0, 1])
    flags = [p.requires_grad for p in generator.parameters()]
    with adapters_off(generator):
        torch.testing.assert_close(generator.generate(CAPTIONS[:2], [0, 1]), plain.generate(CAPTIONS[:2], [0, 1]))
    assert [p.requires_grad for p in generator.parameters()] == flags
    assert torch.equal(generator.generate(CAPTIONS[:2], [0, 1]), before)
    with pytest.raises(UserError, match=r"set model.generator.lora, .* or kl_weight to 0"):
        CYCLES["nft"]().prepare(plain, Partners())


def test_nft_by_its_equations(weights):
    generator = made(weights, flow=True, moved=True)
    cycle = DiffusionNFT(reward=Brightness(), num_samples=3, beta=0.5, num_timesteps=2, inner_epochs=2)
    cycle.prepare(generator, Partners())
    seen, draw = [], cycle.draw
    cycle.draw = lambda *arguments: seen.append(draw(*arguments)) or seen[-1]
    parameters, step = trained(generator), 1e-3
    loss, logs = cycle(generator, Partners(), BATCH, SEEDS)
    loss.mean().backward()
    [rollout] = seen
    assert logs["moved"] < 1e-9
    # At the old policy the gradient is that of (2 r - 1) d(p), whatever beta is.
    told = rollout.conditioning[rollout.caption]
    times = generator.schedule.times(rollout.step)
    predicted = generator.predict(rollout.noised, times, told)
    torch.testing.assert_close(predicted, rollout.old, atol=1e-4, rtol=1e-4)
    errors = (predicted - rollout.target).flatten(1)
    plain = errors.square().mean(1) / errors.detach().abs().mean(1)
    expected = torch.autograd.grad((rollout.advantages.clamp(-1, 1) * plain).mean(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-2)
        with torch.no_grad():
            parameter -= step * parameter.grad.sign()
    # Away from it, by the definition; images and the old policy are those of the first inner epoch.
    loss, logs = cycle(generator, Partners(), BATCH, SEEDS)
    assert len(seen) == 1
    assert logs["moved"] > 1e-6
    with torch.no_grad():
        now = generator.predict(rollout.noised, times, told)
        sides = [0.5 * rollout.old + 0.5 * now - rollout.target, 1.5 * rollout.old - 0.5 * now - rollout.target]
        sides = [side.square().mean((1, 2, 3)) / side.abs().mean((1, 2, 3)) for side in sides]
        share = 0.5 + 0.5 * rollout.advantages.clamp(-1, 1)
        expected = ((share * sides[0] + (1 - share) * sides[1]) / 0.5).unflatten(0, (6, -1)).mean(1)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_the_old_policy_draws_and_follows(weights):
    generator = made(weights, flow=False, moved=True)
    cycle = DiffusionNFT(reward=Brightness(), num_samples=2, old_decay=0.75)
    cycle.prepare(generator, Partners())
    first = [p.detach().clone() for p in trained(generator)]
    with torch.no_grad():
        for parameter in trained(generator):
            parameter.add_(0.1)
    now = [p.detach().clone() for p in trained(generator)]
    with swapped(trained(generator), first), torch.no_grad():
        old = generator.predict(*(arguments := (torch.ones(1, *generator.latent_shape), torch.tensor([300]),
                                                generator.encode_texts(CAPTIONS[:1]))))  # fmt: skip
    assert all(torch.equal(p, value) for p, value in zip(trained(generator), now, strict=True))
    assert not torch.allclose(generator.predict(*arguments), old)
    drawn = []
    generator.decoded = lambda latents: drawn.append(latents) or Generator.decoded(generator, latents)
    cycle(generator, Partners(), BATCH, SEEDS)
    for value, before, after in zip(cycle.old, first, now, strict=True):
        torch.testing.assert_close(value, 0.75 * before + 0.25 * after)
    with swapped(trained(generator), cycle.old), torch.no_grad():
        own = cycle.image_seeds(SEEDS)
        told = generator.encode_texts([caption for caption in CAPTIONS for _ in range(2)])
        expected = generator.denoise(told, generator.noise(own), seeds=own)
    torch.testing.assert_close(drawn[0], expected, atol=1e-4, rtol=1e-4)


def test_memory_grows_neither_with_steps_nor_with_a_conditioning_per_step(weights):
    """Bytes that autograd keeps for the backward pass, counted by their memory."""

    def kept(steps, timesteps):
        generator, storages = made(weights, flow=False, moved=True, guidance_scale=1.0), {}
        cycle = DiffusionPolicyGradient(reward=Brightness(), num_samples=2, steps=steps, num_timesteps=timesteps)
        cycle.prepare(generator, Partners())

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cycle(generator, Partners(), BATCH[:2], SEEDS[:2])
        return sum(storages.values())

    latents = 4 * 4 * math.prod(made(weights, flow=False).latent_shape)
    assert kept(8, 2) == pytest.approx(kept(4, 2), rel=0.02)
    assert kept(8, 6) - kept(8, 2) < 4 * 8 * latents


@pytest.mark.parametrize(
    ("kind", "flow"), [(DiffusionPolicyGradient, False), (DiffusionPolicyGradient, True), (DiffusionNFT, True)]
)
def test_training_raises_the_reward(kind, flow, weights):
    generator = made(weights, flow, steps=3, guidance_scale=1.0)
    cycle = kind(reward=Brightness(), num_samples=4, num_timesteps=2)
    cycle.prepare(generator, Partners())
    optimizer = torch.optim.AdamW(trained(generator), 3e-3)
    before = generator.generate(CAPTIONS, SEEDS).mean().item()
    for step in range(12):
        loss, _ = cycle(generator, Partners(), BATCH[:4], [100 * step + k for k in range(4)])
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained(generator), 1.0)
        optimizer.step()
    assert generator.generate(CAPTIONS, SEEDS).mean().item() > before + 0.02


def test_settings_are_held_against_the_models(weights):
    generator, partners = made(weights, flow=True), Partners()
    scorer = Partners(scorer=OpenClip(str(weights / "clip")))
    DiffusionPolicyGradient(reward=ImageText(), num_timesteps=3).prepare(generator, scorer)
    with pytest.raises(UserError, match=r"num_timesteps must be at most 3, .* not 4"):
        DiffusionPolicyGradient(reward=Brightness(), num_timesteps=4).prepare(generator, partners)
    with pytest.raises(UserError, match="steps must be at least 2, since the last one adds no noise"):
        DiffusionPolicyGradient(reward=Brightness(), steps=1).prepare(generator, partners)
    with pytest.raises(UserError, match="steps must be at most 1000"):
        DiffusionNFT(reward=Brightness(), steps=1001).prepare(generator, partners)
