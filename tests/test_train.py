import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import ImageFont

from cyclefit.config import start
from cyclefit.data import evaluation_batches
from cyclefit.finetune import Finetune, base
from cyclefit.finetune.grid import Sample, sample_grid, wrapped
from cyclefit.runs import read_run
from cyclefit.train import cli
from tests.conftest import ROOT
from tests.probes import ended, forked, started

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
TRAINING = [name for name in CONFIGS if not re.search("evaluate|ablation|matrix|miniature.yaml|modern.yaml", name)]


def values(run, key):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", TRAINING)
def test_every_yaml_parses_through_the_real_entry_point(name, monkeypatch, tmp_path, world):
    parsed = []

    class Parsed(cli.RunCLI):
        def instantiate_classes(self):
            parsed.append(self.config.as_dict())
            raise StopIteration

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "RunCLI", Parsed)
    data = [f"--data.train={world / 'finetune'}", f"--data.validation={world / 'validation'}"]
    data += [f"--data.unpaired={world / 'unpaired'}"] * ("unpaired" in name)
    with pytest.raises(StopIteration):
        cli.train(["--config", name, *data])
    [config] = parsed
    head = (ROOT / "configs" / name).read_text().split("name:")[0]
    assert f"python train.py --config {name}" in head, "each config is headed by its launch command"
    assert config["name"] == name.removesuffix(".yaml")
    with pytest.raises(StopIteration):
        cycles = [f"--model.{key}=null" for key in config["model"]["init_args"] if key.endswith("cycle")]
        assert all(cycle in head for cycle in cycles if name.startswith("cycle")), "the header names the baseline"
        cli.train(["--config", name.removesuffix(".yaml"), *data, *cycles, "--name=other"])


def test_an_unknown_config_lists_those_that_exist(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "cycle_blib.yaml"])
    with pytest.raises(SystemExit) as stopped:
        start.run(cli.train)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "cycle_blib.yaml" in said
    assert all(name in said for name in TRAINING)
    assert "Traceback" not in said


RESUMED = {
    "miniature_cycle_blip.yaml": [],
    "miniature_cycle_blip_reward.yaml": ["--model.cycle.num_images=8"],
    "miniature_cycle_sd.yaml": ["--model.ema_decay=0.9"],
    "miniature_cycle_both.yaml": ["--model.image_cycle.num_images=8"],
    "miniature_sd_policy.yaml": [f"--model.cycle.{of}" for of in ("num_images=2", "inner_epochs=2", "steps=3")],
    "miniature_cycle_both.yaml with an old policy": [
        "--model.image_cycle.num_images=8", "--model.text_cycle=DiffusionNFT",
        "--model.text_cycle.reward=CaptionLikelihood", "--model.text_cycle.num_images=2",
        "--model.text_cycle.num_samples=2", "--model.text_cycle.steps=2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("config", RESUMED)
def test_two_steps_and_two_more_equal_four(launch, config):
    name, settings = config.partition(" ")[0], RESUMED[config]
    whole = launch(name, "whole", *settings, steps=4)
    part = launch(name, "part", *settings, steps=2)
    launch(name, "part", *settings, "--ckpt_path=last", steps=4)
    assert values(whole, "train/loss") == values(part, "train/loss")
    assert values(whole, "val/CIDEr") == values(part, "val/CIDEr")
    expected, resumed = checkpoint(whole), checkpoint(part)
    assert resumed["global_step"] == expected["global_step"] == 4
    assert resumed["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    for optimizer, other in zip(expected["optimizer_states"], resumed["optimizer_states"], strict=True):
        assert optimizer["state"]
        for index, moment in optimizer["state"].items():
            for name, value in moment.items():
                assert torch.equal(value, other["state"][index][name])
    assert ("cycle" in expected) == ("old policy" in config)
    for name, value in expected.get("cycle", {}).items():
        assert torch.equal(value, resumed["cycle"][name])
    for average, other in zip(*(s.get("ema", {}).get("shadow_params", []) for s in (expected, resumed)), strict=True):
        assert torch.equal(average, other)


def test_a_finished_run_goes_on_with_more_steps(launch):
    """`max_steps` ends the first part between two validations."""
    whole = launch("miniature_sd_lora.yaml", "whole", steps=3)
    part = launch("miniature_sd_lora.yaml", "part", steps=1)
    launch("miniature_sd_lora.yaml", "part", "--ckpt_path=last", steps=3)
    assert values(whole, "train/loss") == values(part, "train/loss")
    expected, resumed = checkpoint(whole), checkpoint(part)
    assert resumed["epoch"] == expected["epoch"]
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


BASELINES = {
    "miniature_cycle_blip.yaml": "miniature_blip.yaml",
    "miniature_cycle_blip_reward.yaml": "miniature_blip.yaml",
    "miniature_unpaired.yaml": "miniature_blip.yaml",
    "miniature_cycle_sd.yaml": "miniature_sd_lora.yaml",
    "miniature_sd_policy.yaml": "miniature_sd_lora.yaml",
}


RATE = {
    "miniature_cycle_sd.yaml": ["--model.optimizer.lr=3e-4"],
    "miniature_sd_policy.yaml": ["--model.optimizer.lr=3e-4"],
}
"""Where the baseline has another learning rate."""


def test_weight_zero_is_the_baseline(launch):
    baselines = {}
    for config, baseline in BASELINES.items():
        if baseline not in baselines:
            baselines[baseline] = launch(baseline, baseline, steps=3)
        plain = baselines[baseline]
        zero = launch(config, config, "--model.cycle.weight=0", *RATE.get(config, []), steps=3)
        assert values(plain, "train/loss") == values(zero, "train/loss")
        assert len(values(zero, "train/cycle")) == 3
        if "unpaired" in config:
            continue
        null = launch(config, f"{config}-null", "--model.cycle=null", *RATE.get(config, []), steps=3)
        assert values(plain, "train/loss") == values(null, "train/loss")
        assert not values(null, "train/cycle")


def test_a_generators_run_holds_its_adapters_alone(launch):
    """What is trained is fp32 LoRA."""
    run = launch("miniature_cycle_sd.yaml", "lora", "--model.generator.lora.text_encoder=true", steps=2)
    state = checkpoint(run)["state_dict"]
    assert state
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    assert {name.split(".")[1] for name in state} == {"unet", "text_encoder"}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 4_000_000, "frozen models are in the checkpoint"
    logged = ("caption_nll", "CIDEr", "image_similarity/clip", "image_similarity/clip-heldout", "text_similarity/clip")
    assert all(values(run, f"val/{name}") for name in logged)
    assert list((run / "samples").glob("*.png"))
    with pytest.raises(cli.UserError, match="needs a captioner"):
        launch("miniature_cycle_sd.yaml", "alone", "--model.captioner=null")


def test_a_generator_without_adapters_is_refused(weights):
    from cyclefit.finetune import GeneratorFinetune
    from cyclefit.models import StableDiffusion

    with pytest.raises(cli.UserError, match=r"model.generator.lora"):
        GeneratorFinetune(StableDiffusion(str(weights / "stable-diffusion"))).setup("fit")


def test_base_weights_are_bit_identical_after_training(launch, monkeypatch):
    from cyclefit.finetune import GeneratorFinetune

    kept = {}

    def copy(module):
        return {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" not in name}

    start, end = GeneratorFinetune.on_fit_start, GeneratorFinetune.on_train_end
    monkeypatch.setattr(
        GeneratorFinetune, "on_fit_start", lambda self: (start(self), kept.update(before=copy(self)))[0]
    )
    monkeypatch.setattr(GeneratorFinetune, "on_train_end", lambda self: (end(self), kept.update(after=copy(self)))[0])
    launch("miniature_cycle_sd.yaml", "bits", steps=3)
    assert kept["before"].keys() == kept["after"].keys()
    assert any(name.startswith("generator.unet") for name in kept["before"])
    assert all(torch.equal(kept["before"][name], kept["after"][name]) for name in kept["before"])


def test_both_models_take_turns(launch):
    """Even steps move the captioner alone, odd steps the generator alone; the step counter counts both."""
    states = {}
    for steps in (1, 2, 3):
        run = launch("miniature_cycle_both.yaml", f"both-{steps}", "--model.image_cycle.num_images=8", steps=steps)
        state = checkpoint(run)
        assert state["global_step"] == steps
        states[steps] = state["state_dict"]
    moved = [
        {name.split(".")[0] for name in states[a] if not torch.equal(states[a][name], states[b][name])}
        for a, b in ((1, 2), (2, 3))
    ]
    assert moved == [{"generator"}, {"captioner"}]
    lm, denoising = values(run, "train/captioner/lm"), values(run, "train/generator/denoising")
    assert lm[0] == lm[1] != lm[2], "Lightning repeats the last value in the steps between"
    assert denoising.keys() == {1, 2}


def test_the_moving_average_is_validated_and_the_parameters_come_back(launch, monkeypatch):
    from cyclefit.finetune import GeneratorFinetune

    seen = {}
    step, results = GeneratorFinetune.validation_step, GeneratorFinetune.validation_results

    def validation_step(self, *arguments):
        seen["validated"] = [p.detach().clone() for p in self.trained.values()]
        return step(self, *arguments)

    def validation_results(self):
        found = results(self)
        seen["after"] = [p.detach().clone() for p in self.trained.values()]
        seen["average"] = [p.clone() for p in self.ema.shadow_params]
        return found

    monkeypatch.setattr(GeneratorFinetune, "validation_step", validation_step)
    monkeypatch.setattr(GeneratorFinetune, "validation_results", validation_results)
    launch("miniature_sd_lora.yaml", "average", "--model.ema_decay=0.9", steps=2)
    assert all(torch.equal(a, b) for a, b in zip(seen["validated"], seen["average"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen["validated"], seen["after"], strict=True))


def test_a_run_leaves_everything_in_its_folder(launch):
    run = launch("miniature_cycle_blip.yaml", "all", steps=2)
    state = checkpoint(run)
    assert state["state_dict"]
    assert all(name.startswith("captioner.model.text_decoder.") for name in state["state_dict"])
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 8_000_000, "frozen models are in the checkpoint"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["cycle"]["class_path"] == "cyclefit.cycles.SoftCaptionDenoising"
    assert list((run / "samples").glob("*.png"))
    assert set(values(run, "val/CIDEr")) == {1}
    assert values(run, "val/image_similarity/clip")
    assert values(run, "val/BLEU-4")
    assert (run / "wandb_id.txt").read_text().strip()
    before = sorted(path.name for path in run.parent.iterdir())
    with pytest.raises(cli.UserError, match="--ckpt_path last"):
        launch("miniature_cycle_blip.yaml", "all", steps=2)
    with pytest.raises(cli.UserError, match=r"no checkpoint .*nothing.checkpoints.last.ckpt"):
        launch("miniature_cycle_blip.yaml", "nothing", "--ckpt_path=last")
    assert sorted(path.name for path in run.parent.iterdir()) == before


def test_last_is_the_newest_state_and_best_the_best_by_cider(launch, monkeypatch):
    """CIDEr is made to fall after the first validation."""
    from cyclefit.finetune import CaptionerFinetune

    measured = CaptionerFinetune.validation_results
    monkeypatch.setattr(
        CaptionerFinetune,
        "validation_results",
        lambda self: measured(self) | {"CIDEr": torch.tensor(1.0 / self.global_step)},
    )
    run = launch("miniature_blip.yaml", "falls", steps=5)
    assert values(run, "val/CIDEr") == {1: 0.5, 3: 0.25}
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 2
    assert checkpoint(run)["global_step"] == 5, "what was trained after the last validation is lost"
    launch("miniature_blip.yaml", "falls", "--ckpt_path=last", steps=6)
    assert checkpoint(run)["global_step"] == 6
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_a_checkpoint_of_other_parameters_is_refused(launch):
    run = launch("miniature_blip.yaml", "decoder", steps=2)
    with pytest.raises(ValueError, match="does not fit the configuration"):
        launch("miniature_blip.yaml", "decoder", "--ckpt_path=last", "--model.captioner.trainable=cross-attention")
    assert run.exists()


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ("miniature_blip.yaml", ["caption: ", "reference: "]),
        ("miniature_sd_lora.yaml", ["prompt: ", "captioner: "]),
        ("miniature_cycle_both.yaml", ["caption: ", "reference: ", "prompt: ", "captioner: "]),
    ],
)
def test_the_sample_grid_shows_what_went_in_and_what_came_out(launch, monkeypatch, world, config, shown):
    grids, draw = [], base.sample_grid
    monkeypatch.setattr(base, "sample_grid", lambda samples: grids.append(samples) or draw(samples))
    without = [f"--model.{cycle}=null" for cycle in ("image_cycle", "text_cycle") if "both" in config]
    launch(config, "grid", *without)
    texts = [text for sample in grids[-1] for text in sample.texts]
    batch = next(iter(evaluation_batches(str(world / "validation"), image_size=32, batch_size=4)))
    assert all(any(text.startswith(name) for text in texts) for name in shown)
    given = [text.partition(": ")[2] for text in texts if text.startswith(("reference: ", "prompt: "))]
    assert set(given) == set(batch.captions)


def test_texts_of_any_length_have_room_in_the_grid():
    """Each line is drawn within its cell, below its images and above the next row's."""
    long = ["prompt: " + "a painting of a very small dog " * 12, "captioner: " + "incomprehensibility" * 9, "x " * 9000]
    image = torch.full((3, 32, 32), 0.5)
    grid = np.asarray(sample_grid([Sample(image, image, long), Sample(image, image, ["a"])] * 3))
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
    rows = [row for text in long for row in wrapped(text, 256, font)]
    assert all(font.getlength(row) <= 256 for row in rows)
    for text, last in zip(long, (False, False, True), strict=True):
        lines = wrapped(text, 256, font)
        whole = "".join(text.split()) == "".join("".join(lines).split())
        assert (lines[-1] == "[...]") == last and whole != last
    height = grid.shape[0] // 2
    assert height == 128 + 8 + 14 * len(rows)
    white = (grid == 255).all(-1)
    assert white[height - 2 : height].all() and not white[height - 10 : height - 2].all()
    assert white[:, 256:264].all() and white[128:130].all() and not white[130:height].all()


def test_what_the_cycle_needs_is_asked_for(launch):
    with pytest.raises(ValueError, match=r"needs a generator: set model\.generator"):
        launch("miniature_cycle_blip.yaml", "needs", "--model.generator=null", "--model.cycle.weight=1")
    from cyclefit.finetune import CaptionerFinetune
    from cyclefit.models import Blip

    with pytest.raises(ValueError, match="captioner is frozen"):
        CaptionerFinetune(Blip("src/cyclefit/miniature/weights/blip")).setup("fit")


def test_a_partner_that_is_not_frozen_is_refused(launch, monkeypatch):
    from cyclefit.models import StableDiffusion

    build = StableDiffusion.__init__

    def thawed(self, *arguments, **named):
        build(self, *arguments, **named)
        self.unet.conv_in.weight.requires_grad_(True)

    monkeypatch.setattr(StableDiffusion, "__init__", thawed)
    with pytest.raises(RuntimeError, match=r"generator must be frozen: .*conv_in"):
        launch("miniature_blip.yaml", "thawed")


def test_a_missing_model_is_one_sentence(tmp_path, world, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config", "miniature_blip.yaml", f"--runs={tmp_path}", "--model.captioner.pretrained=no/such-model"]
    arguments += [f"--data.train={world}/finetune", f"--data.validation={world}/validation"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        start.run(cli.train)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no/such-model" in said
    assert "HF_HOME" in said
    assert "Traceback" not in said


def test_lora_trains_and_saves_adapters_alone(launch):
    run = launch("miniature_blip.yaml", "lora", "--model.captioner.trainable=lora")
    assert all("lora_" in name for name in checkpoint(run)["state_dict"])


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path, world):
    """A real process, a real signal; continued, it ends where it would have ended."""

    def command(name, *more):
        small = ["--trainer.max_steps=6", "--trainer.val_check_interval=6", "--trainer.log_every_n_steps=1"]
        small += [f"--data.train={world / 'finetune'}", f"--data.validation={world / 'validation'}"]
        small += [
            "--data.batch_size=8",
            "--data.validation_size=24",
            "--model.round_trip_images=0",
            "--data.num_workers=1",
            f"--runs={tmp_path}",
        ]
        return [sys.executable, "train.py", "--config", "miniature_cycle_blip.yaml", "--name", name, *small, *more]

    process = started(command("run"))
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the loader's workers too
    done = ended(process)
    said = done.stdout
    assert done.returncode == 130, said
    assert "Traceback" not in said
    step = int(re.search(r"stopped at step (\d+), saved", said)[1])
    assert 1 <= step < 6
    assert "--ckpt_path last" in said
    assert checkpoint(tmp_path / "run")["global_step"] == step
    for name, more in (("run", ["--ckpt_path", "last"]), ("whole", [])):
        done = ended(forked(command(name, *more)))
        assert done.returncode == 0, done.stdout[-2000:]
    for name, tensor in checkpoint(tmp_path / "whole")["state_dict"].items():
        assert torch.equal(tensor, checkpoint(tmp_path / "run")["state_dict"][name]), name


def test_wandb_gets_one_run_with_the_configuration(launch, monkeypatch):
    """The real client, offline: the run's own folder holds one run under one id, also after it was continued."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    wandb.finish()  # what an earlier test has left open would take this run in
    run = launch("miniature_blip.yaml", "logged")
    wandb.finish()
    launch("miniature_blip.yaml", "logged", "--ckpt_path=last", steps=4)
    wandb.finish()
    identifier = (run / "wandb_id.txt").read_text().strip()
    logs = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in logs} == {f"run-{identifier}.wandb"}
    assert any(b"captioner" in path.read_bytes() for path in logs)
    assert list((run / "wandb").rglob("media/images/val/*.png"))


def test_ranks_and_steps_have_noise_of_their_own():
    def seeds(epoch, step, rank):
        return tuple(Finetune.step_seeds(SimpleNamespace(seed=0, current_epoch=epoch, global_rank=rank), step, 2))

    places = list(itertools.product(range(2), repeat=3))
    assert len({seed for place in places for seed in seeds(*place)}) == 2 * len(places)
    assert seeds(0, 1, 1) == seeds(0, 1, 1)


def test_a_run_knows_the_seconds_it_has_trained_and_its_limit_of_time(launch):
    run = launch("miniature_blip.yaml", "timed", "--trainer.max_time=00:00:00:03", steps=4000)
    config, _ = read_run(run)
    assert 0 < config["steps"] < 4000
    first = config["train_seconds"]
    assert 2 < first < 60
    launch("miniature_blip.yaml", "timed", "--ckpt_path=last", steps=config["steps"] + 2)
    again, _ = read_run(run)
    assert again["steps"] == config["steps"] + 2
    assert again["train_seconds"] > first
