import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from cyclefit import UserError, export
from cyclefit.card import hub_datasets, licence, public
from cyclefit.config import start
from cyclefit.models import Blip, Decoding, Lora, StableDiffusion
from cyclefit.records import Difference, Estimate, Evaluation, Finding, Model, Row, Split, Verdict, write_evaluation
from cyclefit.runs import load_run, read_run, versions
from cyclefit.train import cli
from tests.conftest import ROOT

PROMPTS, SEEDS = ["a red circle above a blue square", "a green triangle", "two small yellow stars"], [1, 2, 3]
SCALES = {"encoder": [4, 16.0], "average": [8, 8.0], "both": [8, 2.0]}
"""Rank and alpha of the runs that train adapters of the generator."""
ADAPTERS = [(name, form) for name in SCALES for form in ("diffusers", "kohya")]

RUNS = {
    "encoder": ["miniature_sd_lora.yaml", "model.optimizer.init_args.lr=0.01", "model.generator.lora.rank=4",
                "model.generator.lora.alpha=16", "model.generator.lora.text_encoder=true"],
    "average": ["miniature_sd_lora.yaml", "model.optimizer.init_args.lr=0.01", "model.ema_decay=0.9"],
    "both": ["miniature_cycle_both.yaml", "model.generator_optimizer.init_args.lr=0.01", "model.generator.lora.alpha=2",
             "model.image_cycle=null", "model.text_cycle=null"],
    "adapted": ["miniature_blip.yaml", "model.captioner.trainable=lora", "model.captioner.prompt=a small ",
                "model.optimizer.init_args.lr=0.003", "model.round_trip_images=0"],
    "cycle": ["miniature_cycle_sd.yaml", "model.cycle.grad_steps=1", "model.cycle.steps=3", "trainer.max_steps=1"],
    "chat": ["miniature_blip.yaml", "model.captioner=VisionLanguage", "model.captioner.trainable=lora",
             "model.captioner.pretrained=src/cyclefit/miniature/weights/smolvlm", "model.captioner.prompt=null",
             "model.round_trip_images=0", "trainer.max_steps=1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """Five steps of every kind of run through train.py's own entry point, at learning rates that show at once."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, (config, *more) in RUNS.items():
            patch.setattr(sys, "argv", ["train.py"])
            small = {
                "runs": folder, "name": name, "trainer.max_steps": 5, "trainer.val_check_interval": 2,
                "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
                "data.train": world / "finetune", "data.validation": world / "validation", "data.validation_size": 24,
                "data.batch_size": 8, "data.epoch_size": 40, "model.warmup_steps": 0, "model.generator.steps": 2,
            }  # fmt: skip
            cli.train(["--config", config, *[f"--{k}={v}" for k, v in small.items()], *[f"--{one}" for one in more]])
    return folder


def fresh(script, *arguments):
    """What a new Python process prints as json."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loras(runs, tmp_path_factory):
    """Every run's adapters in both formats."""
    folder, paths = tmp_path_factory.mktemp("loras"), {}
    for name, form in ADAPTERS:
        paths[name, form] = folder / (f"{name}.safetensors" if form == "kohya" else name)
        assert export.main([str(runs / name), "--format", form, "--out", str(paths[name, form])]) == 0
    return paths


PIPELINES = """
import json, sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
base, noise, drawn, *loras = sys.argv[1:]
images, scales = {}, {}
for lora in loras:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    solver = {"algorithm_type": "dpmsolver++", "lower_order_final": True}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **solver)
    pipeline.load_lora_weights(lora)
    latents = torch.load(noise, weights_only=True)
    settings = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "pt"}
    images[lora] = pipeline(PROMPTS, latents=latents, **settings).images
    scales[lora] = {part: (model.peft_config["default_0"].r, model.peft_config["default_0"].lora_alpha)
                    for part in ("unet", "text_encoder") if hasattr(model := getattr(pipeline, part), "peft_config")}
torch.save(images, drawn)
print(json.dumps(scales))
""".replace("PROMPTS", repr(PROMPTS))


@pytest.fixture(scope="module")
def drawn(loras, generator, weights, tmp_path_factory):
    """Images of diffusers' own pipeline in a process that knows nothing of cyclefit; rank and alpha it found."""
    folder = tmp_path_factory.mktemp("drawn")
    torch.save(generator.noise(SEEDS), folder / "noise.pt")
    scales = fresh(PIPELINES, weights / "stable-diffusion", folder / "noise.pt", folder / "images.pt", *loras.values())
    images = torch.load(folder / "images.pt", weights_only=True)
    return {case: (images[str(path)], scales[str(path)]) for case, path in loras.items()}


def trained(runs, name, weights, average=True):
    """The run's generator with the weights of its checkpoint."""
    from diffusers.training_utils import EMAModel

    state = torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)
    rank, alpha = SCALES[name]
    lora = Lora(rank, alpha, text_encoder=name == "encoder")
    model = StableDiffusion(str(weights / "stable-diffusion"), steps=8, guidance_scale=4.0, lora=lora)
    for key, value in state["state_dict"].items():
        if "generator." in key:
            model.get_parameter(key.rpartition("generator.")[2]).data = value
    if "ema" in state and average:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ema = EMAModel(parameters)
        ema.load_state_dict(state["ema"])
        ema.copy_to(parameters)
    return model


@pytest.mark.parametrize(("name", "form"), ADAPTERS)
def test_diffusers_draws_the_same_images_with_the_exported_adapters(name, form, runs, drawn, generator, weights):
    images, scales = drawn[name, form]
    expected = trained(runs, name, weights).generate(PROMPTS, SEEDS)
    assert (expected - generator.generate(PROMPTS, SEEDS)).abs().amax() > 0.1, "the adapters do nothing"
    assert torch.equal(images, expected)
    parts = ["unet", "text_encoder"] if name == "encoder" else ["unet"]
    assert scales == {part: SCALES[name] for part in parts}


CARDS = {"encoder": "kohya", "average": "diffusers", "adapted": "blip", "chat": "transformers"}
"""Formats by run."""

PASTED = """
import json, sys
results = {}
for name, lines in json.loads(sys.argv[1]).items():
    exec(lines, found := {})
    results[name] = found.get("caption")
    if "caption" not in found:
        found["image"].save(f"{sys.argv[2]}/{name}.png")
print(json.dumps(results))
"""


def test_the_lines_of_the_cards_do_what_the_run_does(runs, batch, tmp_path):
    """Pasted as they are, in a process that knows nothing of cyclefit."""
    pasted, photo = {}, tmp_path / "photo.png"
    Image.fromarray((batch.images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(photo)
    for name, form in CARDS.items():
        out = tmp_path / (f"{name}.safetensors" if form == "kohya" else name)
        printed = export.export(runs / name, form, out)
        text = (tmp_path / "encoder.md" if form == "kohya" else out / "README.md").read_text()
        pasted[name] = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1].replace("photo.jpg", str(photo))
        assert pasted[name].endswith(printed)
    results = fresh(PASTED, json.dumps(pasted), tmp_path)
    for name in ("encoder", "average"):
        expected = load_run(runs / name, which="generator")[0].generate(["a red boat on blue water"], [0])
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(pixels, (expected[0] * 255).round().byte()), name
    for name in ("adapted", "chat"):
        captioner = load_run(runs / name)[0]
        said = captioner.sample(batch.images[:1], Decoding(), [0])[0][0]
        assert results[name] == ("a small " * (name == "adapted")) + said


def test_the_moving_average_is_exported(runs, drawn, weights):
    last = trained(runs, "average", weights, average=False).generate(PROMPTS, SEEDS)
    assert (drawn["average", "diffusers"][0] - last).abs().amax() > 0.01


def test_kohya_names_every_adapted_layer(loras, generator):
    tensors = load_file(loras["encoder", "kohya"])
    layers = {
        f"lora_unet_{name.replace('.', '_')}": module
        for name, module in generator.unet.named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    }
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in layers
    for k, layer in enumerate(generator.text_encoder.encoder.layers):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layers[f"lora_te_text_model_encoder_layers_{k}_self_attn_{part}"] = getattr(layer.self_attn, part)
    suffixes = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{name}.{suffix}" for name in layers for suffix in suffixes}
    for name, layer in layers.items():
        assert tensors[f"{name}.lora_down.weight"].shape == (4, layer.in_features)
        assert tensors[f"{name}.lora_up.weight"].shape == (layer.out_features, 4)
        assert tensors[f"{name}.alpha"].item() == 16


def test_the_checkpoint_is_the_one_asked_for(runs, tmp_path):
    module, saved = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", []
    for checkpoint in ("last", "best"):
        path = tmp_path / f"{checkpoint}.safetensors"
        export.export(runs / "encoder", "kohya", path, checkpoint)
        state = torch.load(runs / "encoder" / "checkpoints" / f"{checkpoint}.ckpt", weights_only=True)["state_dict"]
        saved.append(load_file(path)[f"lora_unet_{module.replace('.', '_')}.lora_up.weight"])
        assert torch.equal(saved[-1], state[f"generator.unet.{module}.lora_B.default.weight"])
    assert not torch.equal(*saved)


CAPTIONERS = {"adapted": ("a small ", "lora"), "both": ("", "decoder")}
"""Prompt and what is trained, of the runs that train a captioner."""

CAPTIONS = """
import json, sys
from pathlib import Path
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration, pipeline
exported, prompts = Path(sys.argv[1]), json.loads(sys.argv[2])
images, said = [Image.open(path) for path in sorted(exported.glob("*.png"))], {}
for name, prompt in prompts.items():
    processor = AutoProcessor.from_pretrained(exported / name)
    model, loading = BlipForConditionalGeneration.from_pretrained(exported / name, output_loading_info=True)
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    captions = processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)
    task = pipeline("image-text-to-text", model=str(exported / name))
    piped = [task(image, text=prompt, max_new_tokens=30)[0]["generated_text"] for image in images]
    said[name] = captions, piped, sorted(map(str, [*loading["missing_keys"], *loading["unexpected_keys"]]))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(runs, batch, tmp_path_factory):
    """Captions by transformers' model and by its pipeline, in a process that knows nothing of cyclefit."""
    folder = tmp_path_factory.mktemp("captioners")
    for k, image in enumerate((batch.images * 255).round().byte()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in CAPTIONERS:
            export.export(runs / name, "blip", folder / name)
    return fresh(CAPTIONS, folder, json.dumps({name: prompt for name, (prompt, _) in CAPTIONERS.items()}))


@pytest.mark.parametrize("name", CAPTIONERS)
def test_transformers_says_the_same_captions(name, runs, said, weights, batch):
    prompt, trainable = CAPTIONERS[name]
    captions, piped, different = said[name]
    captioner = Blip(str(weights / "blip"), trainable, prompt)

    def ours():
        return [f"{prompt}{row[0]}" for row in captioner.sample(batch.images, Decoding(), range(len(batch)))]

    before = ours()
    state = torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in state.items():
        if "captioner." in key:
            captioner.get_parameter(key.rpartition("captioner.")[2]).data.copy_(value)
    expected = ours()
    assert expected != before, "training changed nothing"
    assert len(set(expected)) > 3, "a captioner that says one thing proves nothing"
    assert captions == expected
    # The pipeline puts the prompt as it was given before the rest, which begins with a space of its own.
    assert [" ".join(caption.split()) for caption in piped] == expected
    assert not different


@pytest.mark.parametrize(
    ("name", "form", "out", "error", "message"),
    [
        ("bothe", "blip", "new", FileNotFoundError, r"bothe is not a run .*runs in the same folder: .*both"),
        ("adapted", "diffusers", "new", UserError, "trained a captioner, which --format diffusers .*: use blip$"),
        ("adapted", "kohya", "new.safetensors", UserError, "trained a captioner, which --format kohya .*: use blip$"),
        ("average", "blip", "new", UserError, "trained a generator, which --format blip .*: use diffusers, kohya$"),
        ("average", "diffusers", "full", UserError, "full exists: delete it or choose another --out"),
        ("average", "kohya", "full/file.safetensors", UserError, "exists: delete it or choose another --out"),
        ("average", "kohya", "new", UserError, r"--out .*new must end in \.safetensors"),
    ],
)
def test_mistakes_are_named(name, form, out, error, message, runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.safetensors").touch()
    with pytest.raises(error, match=message):
        export.main([str(runs / name), "--format", form, "--out", str(tmp_path / out)])
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "file.safetensors").stat().st_size == 0


def test_a_checkpoint_not_yet_saved_is_one_sentence(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text((runs / "average" / "config.yaml").read_text())
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    arguments = [str(tmp_path), "--format", "kohya", "--out", str(tmp_path / "x.safetensors"), "--checkpoint", "best"]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        start.run(export.main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "best.ckpt does not exist; checkpoints the run has saved so far: last" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_out_appears_complete_or_not_at_all(form, runs, tmp_path, monkeypatch):
    import safetensors.torch

    out = tmp_path / "lora.safetensors"
    leftover = tmp_path / ".lora.safetensors.partial"
    leftover.mkdir()
    (leftover / "torn").touch()  # of an export that was killed
    save = safetensors.torch.save_file

    def dies(tensors, path, **named):
        save(tensors, path, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            export.export(runs / "average", form, out)
    assert not list(tmp_path.iterdir())
    export.export(runs / "average", form, out)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == (
        {"lora.safetensors", "lora.md"}
        if form == "kohya"
        else {"lora.safetensors/pytorch_lora_weights.safetensors", "lora.safetensors/README.md"}
    )
    if form == "kohya":
        out.unlink()
        with pytest.raises(UserError, match=r"lora\.md exists"):
            export.export(runs / "average", form, out)


def test_the_card_says_what_was_trained(runs, loras, world):
    card = ModelCard.load(loras["both", "diffusers"] / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.tags == ["cyclefit", "lora"]
    assert card.data.base_model is card.data.license is card.data.eval_results is card.data.model_name is None, (
        "nothing known is made up"
    )
    card = ModelCard.load(loras["encoder", "kohya"].with_suffix(".md"))
    config, trained = read_run(runs / "encoder")
    text = card.text
    for said in (
        "`StableDiffusion`, from `stable-diffusion`",
        "LoRA, rank 4, alpha 16",
        f"{sum(one.numel() for one in trained.values()):,} parameters",
        "5 of 5 planned, checkpoint `last`",
        f"`{config['digest']}`",
        "python train.py --config miniature_sd_lora.yaml",
        f"**Trained with**: {versions()}",
        "The licence of the base, `stable-diffusion`, is not known here",
        "No evaluation of these weights was found",
    ):
        assert said in text, said
    manifest = json.loads((world / "finetune" / "manifest.json").read_text())
    assert f"{manifest['samples']:,} samples of `finetune`, packed from: {manifest['source']}" in text
    settings = text.partition("All settings")[2].partition("## Data")[0]
    assert "the cycle" not in text.partition("## Training")[0]
    assert "pretrained: stable-diffusion" in settings and str(ROOT) not in settings and str(world) not in settings


def test_the_card_has_the_cycle_and_its_settings(runs, tmp_path):
    export.export(runs / "cycle", "diffusers", tmp_path / "lora")
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.tags == ["cyclefit", "lora", "cycle-consistency"]
    assert "its own loss and the cycle loss `TruncatedSampling`." in card.text
    assert "the captioner `Blip`" in card.text
    settings = card.text.partition("The cycle `TruncatedSampling`:")[2].partition("<details>")[0]
    assert "grad_steps: 1\nsteps: 3\n" in settings


def evaluated(folder, digest, better):
    """An evaluation with an image of each prompt by the base and by a run, which it calls by another name."""
    rows = [
        Row("base", {"truth": Estimate(90.0, 88.0, 92.0)}),
        Row("first", {"truth": Estimate(85.0, 82.0, 88.0), "CIDEr": Estimate(71.3)}),
        Row("base", {"truth": Estimate(99.0, 98.0, 100.0)}, selection="oracle"),
    ]
    differences = [Difference("truth", "first · single", "plain · single", -5.0, -8.0, -2.0)]
    models = {"base": Model(), "first": Model(digest=digest)}
    verdict = Verdict(better, "Less true: first against plain.", Finding(None, "Nor than CLIP."), "What changed: size.")
    folder.mkdir()
    splits = {"test": Split(rows, 150, differences)}
    write_evaluation(folder, Evaluation(splits, "images", models=models, verdict=verdict))


def test_the_card_reports_the_evaluation_of_the_weights_also_if_the_cycle_harmed(runs, tmp_path):
    """Found beside the run, and only by the digest: neither a name nor another checkpoint will do."""
    run = tmp_path / "runs" / "average"
    run.parent.mkdir()
    run.symlink_to(runs / "average")
    evaluated(tmp_path / "runs" / "own", read_run(run)[0]["digest"], False)
    evaluated(tmp_path / "runs" / "others", "0123456789abcdef", True)
    export.export(run, "diffusers", tmp_path / "lora")
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    found = [(one.metric_type, one.metric_value, one.dataset_split) for one in card.data.eval_results]
    assert found == [("truth", 85.0, "test"), ("cider", 71.3, "test")]
    assert card.data.metrics == ["truth", "cider"]
    text = card.text.partition("## Evaluation")[2]
    verdict = text.partition("**Did the cycle help?**")[2].partition("####")[0].split("without:\n")[1].strip()
    assert verdict == "no, it did harm.\nLess true: first against plain.\nNor than CLIP.\nWhat changed: size."
    assert "first falls behind plain by 5.0 in truth, 95% interval 2.0 to 8.0" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| metric | base | **this model** |"
    assert table[2:] == ["| truth | 90.0 [88.0, 92.0] | 85.0 [82.0, 88.0] |", "| CIDEr | \N{EN DASH} | 71.3 |"]
    for given in ("others", "none"):
        with pytest.raises(UserError, match=f"--evaluation .*{given}"):
            export.export(run, "diffusers", tmp_path / given, evaluation=tmp_path / "runs" / given)
        assert not (tmp_path / given).exists()


def test_the_licence_is_the_one_that_the_base_states(tmp_path, monkeypatch):
    store = tmp_path / "models--some--base"
    snapshot = store / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert licence("some/base") == licence(str(snapshot)) == licence("some/other") == licence(None) == {}
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own-terms\ntags: [x]\n---\n# Base\n")
    assert licence("some/base") == licence(str(snapshot)) == {"license": "other", "license_name": "own-terms"}
    (snapshot / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert licence("some/base") == {}


def test_data_sets_are_those_that_shards_are_read_from():
    shards = {"train": "pipe:curl -L " + constants.ENDPOINT + "/datasets/org/pairs/resolve/main/{000..009}.tar"}
    shards |= {"unpaired": ["hf://datasets/org/images/0.tar", "hf://datasets/org/images/1.tar"], "prompts": None}
    assert hub_datasets(shards) == ["org/images", "org/pairs"]
    assert hub_datasets({"train": "/data/datasets/org/pairs/0.tar"}) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/shards/{000..009}.tar", "{000..009}.tar"),
        ("coco /data/coco/train2014 ~/coco/captions.json", "coco train2014 captions.json"),
        ("python train.py --data.train=/home/me/shards --name x", "python train.py --data.train=shards --name x"),
        ("https://me:secret@host.org/a/b.tar?signature=1", "https://host.org/a/b.tar"),
        ("pipe:curl -H 'Authorization: x' https://host.org", "pipe:..."),
        ("<s>[INST] a/b or c </s></s>", "<s>[INST] a/b or c </s></s>"),
        ("some-org/model", "some-org/model"),
    ],
)
def test_cards_name_no_local_folder_and_no_secret(text, shown):
    assert public({"of": [text]}) == {"of": [shown]}


class Hub(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes to upload a folder, answered as the hub does."""

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do(self):
        hub, path = self.server, self.path
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        name = path.removeprefix("/api/models/")
        address = f"http://127.0.0.1:{hub.server_port}"
        if not path.startswith("/lfs/") and self.headers.get("Authorization") not in hub.tokens:
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user"})
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return self.answer({"error": "You don't have the rights to create a model"}, 403)
            known = name in hub.private
            hub.private.setdefault(name, asked.get("visibility") == "private")
            return self.answer({"url": f"{address}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.command == "GET" and name in hub.private:
            return self.answer({"id": name, "private": hub.private[name], "siblings": []})
        if found := re.fullmatch(r"(.*)/branch/(.*)", name):
            hub.branches.append(found.groups())
            return self.answer({})
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(data)["files"]]
            modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
            return self.answer(
                {"files": [{"path": f, "uploadMode": mode, "shouldIgnore": False} for f, mode in modes.items()]}
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{address}/lfs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/lfs/"):
            hub.large[path.removeprefix("/lfs/")] = data
            return self.answer({})
        if found := re.fullmatch(r"(.*)/commit/(.*)", name):
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[(*found.groups(), value["path"])] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[(*found.groups(), value["path"])] = hub.large[value["oid"]]
            return self.answer({"commitUrl": f"{address}/{found[1]}/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": "not found"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = do

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine in the place of the hub, and the token that it knows."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.files, server.large, server.private, server.branches = [], {}, {}, {}, []
    server.tokens = ["Bearer hf_right"]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_is_pushed_whole(runs, tmp_path, hub, capsys):
    out = tmp_path / "captioner"
    arguments = [str(runs / "adapted"), "--format=blip", f"--out={out}", "--push=me/captioner", "--private"]
    assert export.main(arguments) == 0
    sent = {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.files == {("me/captioner", "main", name): data for name, data in sent.items()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= sent.keys()
    assert hashlib.sha256(sent["model.safetensors"]).hexdigest() in hub.large
    assert hub.private == {"me/captioner": True}
    assert f"uploaded to {constants.ENDPOINT}/me/captioner" in capsys.readouterr().out
    assert "from_pretrained('me/captioner')" in (card := sent["README.md"].decode())
    assert str(tmp_path) not in card and str(ROOT) not in card


def test_a_file_is_pushed_to_a_branch_with_its_card(runs, tmp_path, hub):
    out = tmp_path / "lora.safetensors"
    push = ["--push=me/lora", "--revision=try"]
    assert export.main([str(runs / "average"), "--format=kohya", f"--out={out}", *push]) == 0
    card = (tmp_path / "lora.md").read_bytes()
    sent = {"lora.safetensors": out.read_bytes(), "README.md": card}
    assert hub.files == {("me/lora", "try", name): data for name, data in sent.items()}
    assert hub.branches == [("me/lora", "try")]
    assert b"load_lora_weights('me/lora', revision='try', weight_name='lora.safetensors')" in card
    assert b"from_pretrained('stable-diffusion')" in card
    assert b"`stable-diffusion` was a local folder" in card


def test_nothing_is_pushed_if_the_export_fails(runs, tmp_path, hub, monkeypatch):
    import safetensors.torch

    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        export.main([str(runs / "average"), "--format=diffusers", f"--out={tmp_path / 'x'}", "--push=me/lora"])
    assert hub.requests == [("GET", "/api/whoami-v2")]


@pytest.mark.parametrize(
    ("case", "push", "message", "exported"),
    [
        ("no token", "me/x", "there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN$", False),
        ("wrong token", "me/x", "the hub does not accept the token: log in", False),
        ("no network", "me/x", r"http://127\.0\.0\.1:9 does not answer .*: check the network, or HF_ENDPOINT$", False),
        ("offline", "me/x", "HF_HUB_OFFLINE is set: unset it to use the hub$", False),
        ("", "x", "--push x is not the name of a repository on the hub: write it as ORG/NAME$", False),
        ("", "other/x", "no right to write to other/x: .*lora is complete: delete it and run the command", True),
        ("public", "me/x", "me/x exists and is public, so nothing was uploaded: leave out --private", True),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(case, push, message, exported, runs, tmp_path, hub, monkeypatch):
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif case == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif case == "public":
        hub.private["me/x"] = False
    with pytest.raises(UserError, match=message) as raised:
        export.main(
            [str(runs / "average"), "--format=diffusers", f"--out={tmp_path / 'lora'}", f"--push={push}", "--private"]
        )
    assert "\n" not in str(raised.value)
    assert (tmp_path / "lora").exists() == exported
    assert not hub.files


def test_clipcap_is_downloaded_before_it_is_loaded():
    printed = "from cyclefit.models import ClipCap\ncaptioner = ClipCap('/a/.x.partial', clip='/b/clip')"
    lines = export._from_hub(printed, Path("/a/.x.partial"), "clipcap", "me/x", "try", "")
    assert lines.splitlines()[0] == "from huggingface_hub import snapshot_download"
    assert lines.splitlines()[2] == "captioner = ClipCap(snapshot_download('me/x', revision='try'), clip='clip')"


def test_options_of_an_upload_need_one(runs, tmp_path):
    with pytest.raises(UserError, match="add --push ORG/NAME"):
        export.main([str(runs / "average"), "--format=diffusers", f"--out={tmp_path / 'x'}", "--private"])
