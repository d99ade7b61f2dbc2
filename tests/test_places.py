"""Paths are found from any folder, and what they lead to is looked for before models are loaded."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cyclefit import UserError, evaluate, export, latents
from cyclefit.config import start
from cyclefit.data import ShardData, latents_source
from cyclefit.miniature import WEIGHTS
from cyclefit.runs import load_run, read_config
from cyclefit.train import cli
from tests.conftest import ROOT

SMALL = [
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
    "--data.validation_size=4", "--data.batch_size=4", "--data.epoch_size=24", "--model.generator.steps=1",
    "--model.validation_images=1", "--model.image_cycle=null", "--model.text_cycle=null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "in_a_file", "on_the_command_line"),
    [
        ("model", "cyclefit:miniature/weights/blip", str(WEIGHTS / "blip"), str(WEIGHTS / "blip")),
        ("model", "../models/m", "@/models/m", "@/models/m"),
        ("model", "near", "@/configs/near", "near"),
        ("model", "models/m", "models/m", "@/elsewhere/models/m"),
        ("model", "org/name", "org/name", "org/name"),
        ("model", "ViT-B-32", "ViT-B-32", "ViT-B-32"),
        ("model", "./missing", "@/configs/missing", "@/elsewhere/missing"),
        ("shards", "../data/train", "@/data/train", "@/data/train"),
        ("shards", "data/{000..009}.tar", "@/configs/data/{000..009}.tar", "@/elsewhere/data/{000..009}.tar"),
        ("shards", "../data/*/[ab].tar", "@/data/*/[ab].tar", "@/data/*/[ab].tar"),
        ("shards", "file:data/a.tar", "@/configs/data/a.tar", "@/elsewhere/data/a.tar"),
        ("shards", "https://host/{0..1}.tar?x=1", "https://host/{0..1}.tar?x=1", "https://host/{0..1}.tar?x=1"),
        ("shards", "pipe:cat data/0.tar", "pipe:cat data/0.tar", "pipe:cat data/0.tar"),
        ("shards", ["a", "s3://b/c"], ["@/configs/a", "s3://b/c"], ["@/elsewhere/a", "s3://b/c"]),
        ("splits", {"test": "../data"}, {"test": "@/data"}, {"test": "@/data"}),
        ("runs", ["a", "../runs/b"], ["@/configs/a", "@/runs/b"], ["@/elsewhere/a", "@/runs/b"]),
    ],
)
def test_a_path_is_relative_to_its_file_or_to_where_one_stands(
    tmp_path, monkeypatch, key, value, in_a_file, on_the_command_line
):
    from jsonargparse import ArgumentParser

    from cyclefit.config.paths import Folder, NameOrPath, written_from
    from cyclefit.data import Shards

    for name in ("configs/near", "models/m", "elsewhere/models/m", "runs/x"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=NameOrPath | str)
    parser.add_argument("--shards", type=Shards | list[Shards] | None)
    parser.add_argument("--splits", type=dict[str, Shards])
    parser.add_argument("--runs", type=list[Folder] | None)

    def absolute(expected):
        return json.loads(json.dumps(expected).replace('"@', f'"{tmp_path}'))

    (tmp_path / "configs" / "x.yaml").write_text(yaml.safe_dump({key: value}))
    found = parser.parse_args(["--config", "../configs/x.yaml"])
    assert found[key] == absolute(in_a_file)
    given = value if isinstance(value, str) else json.dumps(value)
    assert parser.parse_args([f"--{key}={given}"])[key] == absolute(on_the_command_line)

    # What a run writes of it means the same wherever both are moved, read by a parser or without one.
    with written_from(tmp_path / "runs" / "x"):
        (tmp_path / "runs" / "x" / "config.yaml").write_text(parser.dump(found))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("configs", "models", "runs"):
        (tmp_path / name).rename(moved / name)
    expected = json.loads(json.dumps(in_a_file).replace('"@', f'"{moved}'))
    assert parser.parse_args(["--config", "../moved/runs/x/config.yaml"])[key] == expected
    assert read_config(moved / "runs" / "x")[key] == expected


@pytest.fixture
def project(tmp_path, world, monkeypatch):
    """A project of its own: its configs, weights and data; standing in another folder."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "configs", folder / "configs")
    weights = folder / "src" / "cyclefit" / "miniature" / "weights"
    weights.parent.mkdir(parents=True)
    shutil.copytree(WEIGHTS, weights, copy_function=os.symlink)
    shutil.copytree(world, folder / "data" / "miniature", copy_function=os.symlink)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return folder


def test_a_run_is_used_from_any_folder_and_after_it_was_moved(project, tmp_path, monkeypatch):
    config = "configs/miniature_cycle_both.yaml"
    cli.train(["--config", f"../project/{config}", "--runs=../project/runs", "--name=x", *SMALL])
    before = load_run(project / "runs" / "x")[0].state_dict()
    stored = (project / "runs" / "x" / "config.yaml").read_text()
    assert stored.count(str(tmp_path)) == 1, "only where it was trained"
    assert "pretrained: cyclefit:miniature/weights/blip\n" in stored

    # The whole project, under another name, as its folder of runs is.
    moved = tmp_path / "new" / "name"
    moved.parent.mkdir()
    project.rename(moved)
    (moved / "runs").rename(moved / "results")
    run = moved / "results" / "x"
    after = load_run(Path("../new/name/results/x"))[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_run(run, which="generator")[0].pretrained == str(WEIGHTS / "stable-diffusion")
    assert f"from_pretrained('{WEIGHTS}" in export.export(run, "diffusers", tmp_path / "lora")
    monkeypatch.setattr("cyclefit.evaluate.run.write_report", str)  # drawing figures takes longer than all else
    small = ["--limit=2", "--generator.steps=1", "--out=evaluation", "--num_candidates=1"]
    runs = "--runs=['../new/name/results/x']"
    assert evaluate.main(["images", "--config", f"{moved}/configs/miniature_evaluate_images.yaml", runs, *small]) == 0
    assert (tmp_path / "elsewhere" / "evaluation" / "metrics.json").exists()

    def steps(folder):
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    def best(folder):
        states = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
        [state] = [state for name, state in states.items() if "val/CIDEr" in name]
        return state["best_model_path"], float(state["best_model_score"])

    score = best(run)[1]

    again = ["--ckpt_path=last", *SMALL]
    cli.train(["--config", f"../new/name/{config}", "--runs=../new/name/results", "--name=x", *again,
               "--trainer.max_steps=3"])  # fmt: skip
    assert steps(run) == 3
    assert best(run) == (str(run / "checkpoints" / "best.ckpt"), score), "nothing was validated since"
    # The run alone, away from the models and data of its project.
    far = tmp_path / "far" / "and" / "away" / "x"
    far.parent.mkdir(parents=True)
    run.rename(far)
    assert load_run(far, which="generator")[0].pretrained == str(WEIGHTS / "stable-diffusion")
    cli.train(["--config", "../far/and/away/x/config.yaml", "--ckpt_path=last", "--trainer.max_steps=4"])
    assert steps(far) == 4
    assert not run.exists()


def test_runs_in_a_file_are_relative_to_it(project, capsys):
    text = (project / "configs" / "miniature_evaluate.yaml").read_text()
    (project / "configs" / "own.yaml").write_text(text + "runs: [../runs/x]\n")
    with pytest.raises(FileNotFoundError, match=f"^{project}/runs/x is not a run"):
        evaluate.main(["captions", "--config", "../project/configs/own.yaml"])


EVALUATIONS = {"captions": "miniature_evaluate.yaml", "images": "miniature_evaluate_images.yaml"}


@pytest.mark.parametrize(
    ("command", "removed", "said"),
    [
        ("train", "data/miniature/finetune", "data.train: shard "),
        ("train", "data/miniature/validation", "data.validation: shard "),
        ("captions", "data/miniature/test", "shards.test: shard "),
        ("images", "data/miniature/novel", "shards.novel: shard "),
        ("captions", "runs/x", "is not a run"),
        ("images", "runs/x/checkpoints/best.ckpt", "does not exist; checkpoints the run has saved so far: last"),
    ],
)
def test_what_is_missing_is_said_before_models_are_loaded(project, monkeypatch, capsys, command, removed, said):
    def loading(kind, name):
        raise AssertionError(f"the {kind} {name} is loaded")

    for module in ("blip", "latent_diffusion", "scorer"):
        monkeypatch.setattr(f"cyclefit.models.{module}.loading", loading)
    run = project / "runs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        (run / name).touch()
    path = project / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    arguments = ["--config", "../project/configs/miniature_blip.yaml"]
    if command != "train":
        arguments = [command, "--config", f"../project/configs/{EVALUATIONS[command]}"]
        arguments += ["--runs=['../project/runs/x']", "--checkpoint=best"]
    monkeypatch.setattr(sys, "argv", ["command.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        start.run(cli.train if command == "train" else evaluate.main)
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: ") and said in sentence and str(path) in sentence
    if "data" in removed:
        assert "python -m cyclefit.data pack" in sentence and "python -m cyclefit.miniature.scenes" in sentence
    assert not list(Path.cwd().iterdir())


def test_cached_latents_are_known_by_the_autoencoder_and_not_by_its_path(project, tmp_path):
    model = project / "src" / "cyclefit" / "miniature" / "weights" / "stable-diffusion"
    shards, out = str(project / "data" / "miniature" / "validation"), tmp_path / "latents"
    assert latents.main(["--shards", shards, "--generator", str(model), "--out", str(out)]) == 0
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    settings = {"image_size": 32, "batch_size": 4, "epoch_size": 80, "num_workers": 0, "crop": "center"}

    def first():
        return next(iter(ShardData(str(out), latents=str(moved), **settings).train_dataloader()))

    assert first().latents is not None
    path = moved / "vae" / "config.json"
    path.write_text(path.read_text() + " ")
    latents_source.cache_clear()
    with pytest.raises(UserError, match="latents of vae .* not of vae"):
        first()
