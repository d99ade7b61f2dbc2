"""Every family of generators against its own pipeline, its training script and its file formats."""

import inspect
import json
import re
import shutil

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel

from cyclefit import UserError, export, latents, models
from cyclefit.batch import Batch
from cyclefit.cycles import DiffusionDpo
from cyclefit.data import ShardData, verify_shards
from cyclefit.finetune import GeneratorFinetune
from cyclefit.judges import Partners
from cyclefit.models import Conditioning, Lora, SoftTexts
from cyclefit.models.repository import adapter_of
from cyclefit.train.dry_run import step_needs
from tests.conftest import ROOT
from tests.families import CAPTIONS, CLASSES, FAMILIES, FEW, betas, gemma, quiet, written

SEEDS = [5, 6]
CLIPS = ["sd2", "lcm", "sdxl", "sd3", "sd3 without T5", "flux-dev"]
VARIANTS = [*CLIPS, "sana", "z-image", "qwen-image", "lumina-2", "klein", "pixart-sigma", "pixart-alpha"]
"""A model of every family and way of telling it something; the first ones read texts with CLIP."""
ASKED = {
    "flux": {"image_size": 16},  # whose denoiser does not say a size
    "pixart-alpha": {"image_size": 16},
    "qwen-image": {"image_size": 16},
    "klein": {"image_size": 16, "guidance_scale": 4.0},  # as the base model, which is not distilled
    "z-image": {"image_size": 16, "guidance_scale": 4.0},  # the default is that of Turbo, 1
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = written(name, tmp_path_factory.mktemp("family"), ROOT)
        return made[name]

    return folder


def adapter(folder, name, **settings):
    settings = (
        {"steps": FEW.get(name, 4)} | ({"guidance_scale": 1.0} if name in FEW and name != "lcm" else {}) | settings
    )
    settings = ASKED.get(name.partition("-dev")[0].partition("-schnell")[0], {}) | settings
    return getattr(models, CLASSES[name])(str(folder), **settings)


def pipeline_of(folder, generator):
    absent = {
        name: None for name in ("text_encoder_3", "tokenizer_3") if getattr(generator, "text_encoder_3", 1) is None
    }
    pipeline = quiet(DiffusionPipeline.from_pretrained(folder, **absent))
    if generator.solver_lines():
        pipeline.scheduler = type(generator.scheduler).from_config(generator.scheduler.config)
    return pipeline


@pytest.fixture(scope="module")
def cases(folders):
    """Generators with fresh adapters, which change nothing yet, and their pipelines."""
    made = {}

    def case(name):
        if name not in made:
            folder = folders(name)
            generator = adapter(folder, name, lora=Lora(4, 8.0, text_encoder=name in ("sdxl", "sd3")))
            made[name] = generator, pipeline_of(folder, generator)
        return made[name]

    return case


def drawn(pipeline, generator, captions=CAPTIONS, seeds=SEEDS, **settings):
    """The pipeline's images, from its own random numbers."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = generator.call() | settings
    if "negative_prompt" in settings:
        settings["negative_prompt"] = [settings["negative_prompt"]] * len(captions)
    return pipeline(prompt=list(captions), generator=generators, output_type="pt", **settings).images


OTHER_GUIDANCE = {
    "sd2": (3.0, {"guidance_scale": 3.0}),
    "flux-schnell": (3.0, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
    "z-image": (1.0, {"guidance_scale": 0.0}),
    "qwen-image": (1.0, {"true_cfg_scale": 1.0}),
    "lumina-2": (1.0, {"guidance_scale": 1.0}),
    "klein": (1.0, {"guidance_scale": 1.0}),
}
"""Another scale than a generator's own, and what it is for the pipeline."""


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_those_of_the_pipeline(name, cases):
    generator, pipeline = cases(name)
    ours = generator.generate(CAPTIONS, SEEDS)
    torch.testing.assert_close(ours, drawn(pipeline, generator), atol=1e-4, rtol=0)
    assert ours.std() > 0.05
    assert (ours[0] - ours[1]).abs().mean() > 0.02
    if name in OTHER_GUIDANCE:
        scale, settings = OTHER_GUIDANCE[name]
        guided = generator.generate(CAPTIONS, SEEDS, guidance_scale=scale)
        torch.testing.assert_close(guided, drawn(pipeline, generator, **settings), atol=1e-4, rtol=0)
        assert (guided - ours).abs().max() > 1e-3
    assert generator.calls_per_image(4) == (8 if name not in FEW and name != "flux-dev" else 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_depends_on_its_caption_and_seed_alone(name, cases):
    """Also with solvers that add noise, and with images of other captions beside it."""
    generator, _ = cases(name)
    together = generator.generate([*CAPTIONS, CAPTIONS[0]], [*SEEDS, 7])
    alone = generator.generate(CAPTIONS[1:], SEEDS[1:])
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.05


def told(pipeline, name):
    """The denoiser's arguments for the captions, as the pipeline encodes them."""
    if name.startswith("sdxl"):
        hidden, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    if name.startswith("sd3"):
        hidden, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    if name.startswith("flux"):
        hidden, pooled, ids = pipeline.encode_prompt(CAPTIONS)
        places = pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
        guidance = torch.full((2,), 3.5) if pipeline.transformer.config.guidance_embeds else None
        known = {"encoder_hidden_states": hidden, "pooled_projections": pooled, "guidance": guidance}
        return known | {"txt_ids": ids, "img_ids": places}
    if name == "sana":
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        hidden, mask, _, _ = pipeline.encode_prompt(CAPTIONS, False, complex_human_instruction=instruction)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    if name == "z-image":
        return {"cap_feats": pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)[0]}
    if name.startswith("pixart"):
        hidden, mask, _, _ = pipeline.encode_prompt(CAPTIONS, False)
        size = {"resolution": torch.full((2, 2), 16.0), "aspect_ratio": torch.ones(2, 1)}
        added = {key: value if name == "pixart-alpha" else None for key, value in size.items()}
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "added_cond_kwargs": added}
    if name == "klein":
        hidden, ids = pipeline.encode_prompt(CAPTIONS)
        places = pipeline._prepare_latent_ids(torch.zeros(2, 16, 4, 4))
        return {"encoder_hidden_states": hidden, "txt_ids": ids, "img_ids": places}
    if name == "lumina-2":
        hidden, mask, _, _ = pipeline.encode_prompt(CAPTIONS, False)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    if name == "qwen-image":
        hidden, mask = pipeline.encode_prompt(CAPTIONS)
        told = {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}
        return told | {"img_shapes": [[(1, 4, 4)]] * 2}
    hidden, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
    cond = pipeline.get_guidance_scale_embedding(torch.full((2,), 6.5), 16) if name == "lcm" else None
    return {"encoder_hidden_states": hidden, "timestep_cond": cond}


def scripts_loss(pipeline, name, images, timesteps, noise):
    """The loss of each sample as diffusers' train_dreambooth_lora_*.py computes it, without weighting."""
    vae, config = pipeline.vae, pipeline.vae.config
    pixels = images * 2 - 1
    encoded = vae.encode(pixels.unsqueeze(2) if name == "qwen-image" else pixels)
    x = encoded.latent if name == "sana" else encoded.latent_dist.mode()
    if name.startswith(("sd3", "flux", "z-image", "lumina")):
        x = (x - config.shift_factor) * config.scaling_factor
    elif name == "qwen-image":
        mean, deviation = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        x = ((x - mean) / deviation)[:, :, 0]
    elif name == "klein":
        x, statistics = pipeline._patchify_latents(x), (vae.bn.running_mean, vae.bn.running_var + config.batch_norm_eps)
        mean, variance = (value.view(1, -1, 1, 1) for value in statistics)
        x = (x - mean) / variance.sqrt()
    else:
        x = x * config.scaling_factor
    arguments = told(pipeline, name)
    if name in ("sd2", "lcm", "sdxl"):
        solver = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        noised = solver.add_noise(x, noise, timesteps)
        predicted = pipeline.unet(noised, timesteps, **arguments).sample
        target = solver.get_velocity(x, noise, timesteps) if name == "sd2" else noise
        return (predicted - target).square().mean((1, 2, 3))
    if name.startswith("pixart"):  # of which diffusers has no script: as for Stable Diffusion, without the variance
        noised = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(x, noise, timesteps)
        predicted = pipeline.transformer(noised, timestep=timesteps, return_dict=False, **arguments)[0]
        return (predicted[:, :4] - noise).square().mean((1, 2, 3))
    shift = {"flux-dev": 1.0, "qwen-image": 1.0, "lumina-2": 6.0, "klein": 1.0}.get(name, 3.0)
    solver = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    indices = 999 - timesteps
    sigma, t = solver.sigmas[indices].view(-1, 1, 1, 1), solver.timesteps[indices]
    noised = (1 - sigma) * x + sigma * noise
    if name == "lumina-2":  # whose script calls the image's share sigma
        predicted = pipeline.transformer(noised, 1 - t / 1000, return_dict=False, **arguments)[0]
        return (predicted - (x - noise)).square().mean((1, 2, 3))
    if name == "klein":
        packed = pipeline._pack_latents(noised)
        predicted = pipeline.transformer(packed, timestep=t / 1000, return_dict=False, **arguments)[0]
        predicted = pipeline._unpack_latents_with_ids(predicted, arguments["img_ids"])
        return (predicted - (noise - x)).square().mean((1, 2, 3))
    packed = name in ("flux-dev", "qwen-image")
    if packed:
        noised, t = pipeline._pack_latents(noised, 2, 4, 8, 8), t / 1000
    if name == "z-image":
        listed = list(noised.unsqueeze(2).unbind(0))
        predicted = pipeline.transformer(listed, (1000 - t) / 1000, return_dict=False, **arguments)[0]
        predicted = -torch.stack(predicted).squeeze(2)
    else:
        predicted = pipeline.transformer(hidden_states=noised, timestep=t, return_dict=False, **arguments)[0]
    if packed:
        predicted = pipeline._unpack_latents(predicted, 16, 16, 2).view_as(x)
    return (predicted - (noise - x)).square().mean((1, 2, 3))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_that_of_diffusers_training_script(name, cases):
    generator, pipeline = cases(name)
    images, timesteps, noise = (
        torch.rand(2, 3, *[generator.image_size] * 2),
        torch.tensor([40, 700]),
        generator.noise(SEEDS),
    )
    latents_, conditioning = generator.encode_images(images), generator.encode_texts(CAPTIONS)
    ours = generator.errors(latents_, conditioning, timesteps, noise)
    with torch.no_grad():
        theirs = scripts_loss(pipeline, name, images, timesteps, noise)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_reaches_the_adapters_and_nothing_else(name, cases):
    generator, _ = cases(name)
    plain = generator.generate(CAPTIONS, SEEDS)
    images = generator.generate(CAPTIONS, SEEDS, grad_steps=1)
    torch.testing.assert_close(images, plain, atol=1e-5, rtol=0)
    noise, timesteps = generator.noise(SEEDS), torch.tensor([40, 700])
    conditioning, clean = generator.encode_texts(CAPTIONS), torch.rand(2, *generator.latent_shape)
    for value in (
        images.square().mean(),
        generator.errors(clean, conditioning, timesteps, noise).mean(),
        generator.one_step(clean, generator.encode_texts(CAPTIONS), timesteps, noise).square().mean(),
    ):
        generator.zero_grad()
        value.backward()
        reached = {n for n, p in generator.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached, "no gradient at all"
        assert all("lora_B" in n for n in reached)  # A only moves once B is not zero
    adapted = {n.partition(".lora_")[0] for n, p in generator.named_parameters() if p.requires_grad}
    assert {n for n, p in generator.named_parameters() if p.requires_grad} == {
        n for n, _ in generator.named_parameters() if ".lora_" in n
    }
    layers = {".".join(n.split(".")[3:]) for n in adapted if n.startswith("transformer.")}
    attention = {f"to_{x}" for x in ("q", "k", "v", "out.0")}
    if name.startswith(("sd3", "flux")):
        joint = attention | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
        assert {n.removeprefix("attn.") for n in layers if n.startswith("attn.")} == joint
        assert any("ff" in n for n in layers) == (name == "flux-dev")
    else:
        ends = {re.search(r"\.(to_\w+(\.0)?)$", n)[1] for n in adapted if not n.startswith("text")}
        assert ends == attention | ({"to_qkv_mlp_proj", "to_out"} if name == "klein" else set())
    encoders = {n.partition(".")[0] for n in adapted if n.startswith("text")}
    assert encoders == ({"text_encoder", "text_encoder_2"} if name in ("sdxl", "sd3") else set())


@pytest.mark.parametrize("name", VARIANTS)
def test_soft_texts_of_the_captions_own_embeddings_are_the_captions(name, cases):
    """Through every text encoder: T5 reads them, Gemma's are scaled, CLIP's pooled vector is where the text ends."""
    generator, _ = cases(name)
    captions = [*CAPTIONS, ""]
    hard, soft = generator.compute_conditioning(captions), []
    for tower in generator.towers:
        framed = tower.frame(captions)
        soft.append(SoftTexts(tower.embedding[framed.ids].detach().requires_grad_(), framed.ids, framed.mask))
        spans = [[span for span in row if span[0] < span[1]] for row in framed.offsets.tolist()]
        spoken = "".join(CAPTIONS[0][start:end] for start, end in dict.fromkeys(map(tuple, spans[0])))
        assert spoken.replace(" ", "") == CAPTIONS[0].replace(" ", "")
        assert not spans[2]
    conditioning = generator.encode_soft_texts(soft)
    for field in ("hidden", "mask", "pooled", "guidance"):
        ours, theirs = getattr(conditioning, field), getattr(hard, field)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours, theirs), field
    noise, timesteps = generator.noise([1, 2, 3]), torch.tensor([40, 700, 700])
    generator.errors(torch.rand_like(noise), conditioning, timesteps, noise).sum().backward()
    for texts in soft:
        for row in (0, 1):
            assert texts.embeddings.grad[row].abs().sum() > 0
    moved = [SoftTexts(t.embeddings.detach().roll(1, 0), t.ids, t.mask) for t in soft]
    assert (generator.encode_soft_texts(moved).hidden - hard.hidden).abs().max() > 1e-3
    if hard.pooled is not None:
        assert (generator.encode_soft_texts(moved).pooled - hard.pooled).abs().max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_conditioning_is_taken_apart_and_joined(name, cases):
    generator, _ = cases(name)
    both, repeated = generator.encode_texts(CAPTIONS), generator.encode_texts([*CAPTIONS, CAPTIONS[0]])
    joined = Conditioning.cat([both, both[:1]]).detach()
    noise, times = generator.noise([1, 2, 3]), torch.full((3,), 500)
    with torch.no_grad():
        ours = generator.predict(noise, times, joined)
        torch.testing.assert_close(generator.predict(noise, times, repeated), ours, atol=1e-5, rtol=1e-5)
        turned = both[torch.tensor([1, 0])]
        for row, which in ((0, 1), (1, 0)):
            alone = generator.predict(noise[row : row + 1], times[:1], both[which : which + 1])
            torch.testing.assert_close(
                generator.predict(noise[:2], times[:2], turned)[row], alone[0], atol=1e-5, rtol=1e-4
            )
        assert (both.repeat(2).hidden[1] == both.hidden[0]).all()


FORMS = [(name, "peft" if name.startswith("pixart") else "diffusers") for name in VARIANTS]
FORMS += [("sd2", "kohya"), ("sdxl", "kohya")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_pipeline_draws_the_same_images_with_exported_adapters(name, form, folders, tmp_path):
    folder = folders(name)
    generator = adapter(folder, name, lora=Lora(4, 8.0, text_encoder=name in CLIPS))
    before = generator.generate(CAPTIONS, SEEDS)
    torch.manual_seed(0)
    for key, parameter in generator.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.3)
    ours = generator.generate(CAPTIONS, SEEDS)
    assert (ours - before).abs().max() > 0.05, "the adapters do nothing"
    path = tmp_path / f"lora{generator.formats[form]}"
    lines = generator.export(form, path)
    pipeline = pipeline_of(folder, generator)
    if form == "peft":
        PeftModel.from_pretrained(pipeline.transformer, str(path))
    else:
        pipeline.load_lora_weights(str(path))
    torch.testing.assert_close(drawn(pipeline, generator), ours, atol=1e-4, rtol=0)
    assert f"from diffusers import {'DPMSolverMultistepScheduler, ' if name == 'sd2' else ''}" in lines
    names = {"diffusers": pipeline_of, "torch": torch}
    exec(compile(lines, "printed", "exec"), names)
    assert names["image"].size == (generator.image_size,) * 2
    assert type(names["pipeline"]).__name__ == generator.pipelines[0]


def test_formats_are_those_that_the_family_has(cases):
    assert set(cases("sdxl")[0].formats) == {"diffusers", "kohya"}
    assert set(cases("sd3 without T5")[0].formats) == {"diffusers"}


def test_gemma_has_no_adapters_and_another_family_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="text_encoder adapts CLIP text encoders, and Sana has none"):
        adapter(folders("sana"), "sana", lora=Lora(text_encoder=True))
    with pytest.raises(UserError, match=r"is a model for StableDiffusionXL: set class_path to Stable"):
        models.StableDiffusion(str(folders("sdxl")))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    for load in (models.StableDiffusion3, adapter_of):
        with pytest.raises(UserError, match=r"family KolorsPipeline, which is not supported: .*Flux loads FluxP"):
            load(str(tmp_path))
    with pytest.raises(UserError, match="image_size must be a multiple of 4, .* not 18"):
        adapter(folders("sd3 without T5"), "sd3 without T5", image_size=18)


class Guided(models.StableDiffusion):
    """Stable Diffusion in the layout of a pipeline that the package's own adapters do not load."""

    pipelines = ("StableDiffusionPAGPipeline",)


def test_an_adapter_of_ones_own_loads_the_pipelines_that_it_names(weights, tmp_path):
    folder = tmp_path / "guided"
    shutil.copytree(weights / "stable-diffusion", folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": Guided.pipelines[0]}
    (folder / "model_index.json").write_text(json.dumps(index))
    generator = Guided(str(folder), steps=2, batch_size=3, image_size=32)
    assert generator.generate(["a red ring"], [0]).shape == (1, 3, 32, 32)
    assert generator.batch_size == 3
    with pytest.raises(UserError, match="family StableDiffusionPAGPipeline, which is not supported: "):
        models.StableDiffusion(str(folder))
    with pytest.raises(UserError, match="^Guided loads StableDiffusionPAGPipeline, .* for StableDiffusion: set class"):
        Guided(str(weights / "stable-diffusion"))


def test_guidance_of_a_distilled_klein_is_refused(tmp_path):
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"Flux2Klein: .* is distilled .* set guidance_scale to 1, not 4.0"):
        adapter(tmp_path, "klein")


def test_a_scheduler_without_a_schedule_is_named():
    for scheduler in (diffusers.DDPMScheduler(**betas(), prediction_type="sample"), diffusers.EDMEulerScheduler()):
        with pytest.raises(
            UserError, match=r"has no schedule here: prediction_type may be epsilon, v_prediction or flow"
        ):
            models.Schedule.of(scheduler)


@pytest.mark.parametrize("name", ["sd3 without T5", "sana"])
def test_latents_are_computed_for_the_family_that_a_model_is_of(name, folders, world, tmp_path):
    folder, out = str(folders(name)), tmp_path / "latents"
    more = ["--class_path", CLASSES[name]] if name == "sana" else []
    command = ["--shards", str(world / "validation"), "--generator", folder, "--out", str(out), *more]
    assert latents.main(command) == 0
    assert verify_shards(out)["samples"] == verify_shards(world / "validation")["samples"]
    generator = adapter(folder, name)
    data = ShardData(
        str(out),
        latents=folder,
        image_size=generator.image_size,
        batch_size=4,
        epoch_size=4,
        num_workers=0,
        crop="center",
    )
    batch = next(iter(data.train_dataloader())).to("cpu")
    torch.testing.assert_close(batch.latents.float(), generator.encode_images(batch.images), atol=2e-3, rtol=2e-3)
    with pytest.raises(UserError, match="--class_path: there is no class Sena; did you mean Sana"):
        latents.main([*command[:-2], "--out", str(tmp_path / "other"), "--class_path", "Sena"])


def test_a_run_trains_and_exports_what_a_short_class_name_says(folders, launch, tmp_path, capsys):
    folder = str(folders("sd3 without T5"))
    model = [
        "--model.generator=StableDiffusion3",
        f"--model.generator.pretrained={folder}",
        "--model.generator.lora.rank=4",
    ]
    run = launch("miniature_sd_lora.yaml", "sd3", *model, "--model.generator.guidance_scale=2.0")
    out = tmp_path / "lora"
    assert export.main([str(run), "--format", "diffusers", "--out", str(out)]) == 0
    assert "StableDiffusion3Pipeline" in capsys.readouterr().out
    pipeline = pipeline_of(folder, adapter(folder, "sd3 without T5"))
    pipeline.load_lora_weights(str(out))
    assert pipeline.transformer.peft_config["default_0"].r == 4
    with pytest.raises(UserError, match="trained a generator, which --format kohya cannot export: use diffusers"):
        export.main([str(run), "--format", "kohya", "--out", str(tmp_path / "x.safetensors")])


PUBLISHED = {
    "StableDiffusionXL": ("stable-diffusion-xl-base-1.0", {}, 2_567_463_684),
    "StableDiffusion3": ("stable-diffusion-3.5-medium", {"": "stable-diffusion-3-medium"}, 2_243_171_520),
    "Flux": ("flux.1-dev", {"": "flux.1-schnell"}, 11_901_408_320),
    "Sana": ("sana-600m-1024px", {}, 591_747_872),
    "PixArtAlpha": ("pixart-alpha-xl-2-1024-ms", {}, 611_349_152),
    "PixArtSigma": ("pixart-sigma-xl-2-1024-ms", {"": "pixart-alpha-xl-2-1024-ms"}, 610_856_096),
    "ZImage": ("z-image-turbo", {}, 6_154_908_736),
    "QwenImage": ("qwen-image", {}, 20_430_401_088),
    "Lumina2": ("lumina-image-2.0", {}, 2_609_769_152),
}
"""The folder of the published model, what its missing folders are taken from, and the parameters of its denoiser."""


@pytest.fixture
def at_the_published_size(shared, tmp_path):
    def built(kind):
        name, others, _ = PUBLISHED[kind]
        for source in (*others.values(), name):
            shutil.copytree(shared / "models" / source, tmp_path / name, dirs_exist_ok=True)
        if kind in ("Sana", "Lumina2"):
            gemma()["tokenizer"].save_pretrained(tmp_path / name / "tokenizer")
        with torch.device("meta"):
            return getattr(models, kind)(str(tmp_path / name), steps=2, lora=Lora(4, 4.0))

    return built


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_are_those_of_the_published_model(kind, at_the_published_size):
    generator, count = at_the_published_size(kind), PUBLISHED[kind][2]
    assert generator.image_size == 1024
    if kind in ("ZImage", "QwenImage"):  # the published tokenizer, in its template
        read = generator.frame("text_encoder", CAPTIONS)
        assert [(row[:, 0] < row[:, 1]).sum() for row in read.offsets] == [7, 4]
    assert sum(p.numel() for n, p in generator.denoiser.named_parameters() if ".lora_" not in n) == count


@pytest.mark.parametrize("kind", ["StableDiffusionXL", "StableDiffusion3"])
def test_a_dry_run_at_the_published_size(kind, at_the_published_size):
    generator, count = at_the_published_size(kind), PUBLISHED[kind][2]
    needs = step_needs(GeneratorFinetune(generator), 1, 1024)
    assert needs.memory > 2 * count
    assert needs.flops > 2 * count


@pytest.mark.parametrize("name", VARIANTS)
def test_dpo_begins_at_the_reference(name, cases):
    generator, _ = cases(name)
    cycle, images = DiffusionDpo(beta=1.0), torch.rand(4, 3, generator.image_size, generator.image_size)
    cycle.prepare(generator, Partners())
    captions = [[caption] for caption in CAPTIONS]
    batch = Batch(images[:2], CAPTIONS, captions, ["a", "b"], rejected_images=images[2:])
    loss, logs = cycle(generator, Partners(), batch, SEEDS)
    assert logs["chosen_log_ratio"] == logs["rejected_log_ratio"] == 0
    trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss.mean(), trained.values(), allow_unused=True)
    moved = [name for name, g in zip(trained, found, strict=True) if g is not None and g.abs().sum() > 0]
    assert moved and all("lora_B" in name for name in moved), "lora_A has no gradient as long as lora_B is zero"
