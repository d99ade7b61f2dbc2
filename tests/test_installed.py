"""The command `cyclefit`, and the wheel: installed elsewhere, used from a folder that has only data."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec

import pytest
import yaml
from PIL import Image

from cyclefit import UserError, evaluate
from cyclefit.__main__ import COMMANDS, main
from cyclefit.config import start
from cyclefit.train import cli
from tests.conftest import ROOT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
SMALL = [
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.logger=false", "--data.batch_size=4",
    "--data.epoch_size=24", "--data.validation_size=4", "--model.round_trip_images=0",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip


@pytest.fixture
def installed(tmp_path):
    """A virtual environment with the wheel, which sees the packages of this one; its Python."""
    pytest.importorskip("setuptools.build_meta", reason="the build backend is not installed")
    pytest.importorskip("pip", reason="pip is not installed")
    project, environment = tmp_path / "project", tmp_path / "environment"
    passed_over = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=passed_over)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=project, check=True, capture_output=True)
    shutil.rmtree(project)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True)
    [packages] = environment.glob("lib/*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_works_from_any_folder_and_writes_there_alone(installed, world, tmp_path):
    folder, environment = tmp_path / "elsewhere", installed.parents[1]
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "miniature").symlink_to(world)
    (folder / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text("black\n")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outside |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

    def said(*command):
        done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    command, before = environment / "bin" / "cyclefit", sorted(environment.rglob("*"))
    assert all(name in said(command, "--help") for name in COMMANDS)
    assert "2 samples" in said(command, "data", "pack", "folder", "--images", "images", "--out", "data/own")
    said(command, "train", "--config", "miniature_blip.yaml", *SMALL)
    config = yaml.safe_load((folder / "runs" / "miniature_blip" / "config.yaml").read_text())
    assert config["data"]["train"] == "../../data/miniature/finetune"
    assert config["model"]["init_args"]["captioner"]["init_args"]["pretrained"] == "cyclefit:miniature/weights/blip"
    assert sorted(environment.rglob("*")) == before, "it has written into its installation"

    # The run is used by the same package elsewhere.
    moved = environment.rename(tmp_path / "moved") / "bin" / "python"
    options = ["--runs=[runs/miniature_blip]", "--limit", "8", "--generator.steps=1", "--num_candidates=2"]
    evaluated = ["evaluate", "captions", "--config", "miniature_evaluate", *options]
    assert "report: " in said(moved, "-m", "cyclefit", *evaluated)
    assert (folder / "runs" / "miniature_evaluation" / "report.html").exists()
    assert {path.name for path in folder.iterdir()} == {"data", "images", "runs"}


def test_a_command_is_what_its_table_says(capsys, monkeypatch):
    for name in COMMANDS:
        if name == "app" and find_spec("gradio") is None:
            with pytest.raises(UserError, match="the app needs gradio"):
                main([name, "--help"])
        elif name not in ("train", "evaluate"):
            with pytest.raises(SystemExit) as stopped:
                main([name, "--help"])
            assert stopped.value.code == 0
            assert capsys.readouterr().out.startswith(f"usage: cyclefit {name} ")
    for name, function in (("train", (cli, "train")), ("evaluate", (evaluate, "main"))):
        monkeypatch.setattr(*function, lambda arguments: arguments)
        assert main([name, "--config", "miniature_blip"]) == ["--config", "miniature_blip"]
        with pytest.raises(UserError, match=r"there is no config 'blib'; did you mean blip\.yaml\?"):
            main([name, "--config", "blib"])
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{option} " in said for option in ("config", *start.OPTIONS))
    with pytest.raises(UserError, match="cyclefit takes one of train, .* not 'trian'; did you mean train"):
        main(["trian"])


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        (["/a b/bin/cyclefit", "train", "--name", "x y"], "cyclefit train --name 'x y'"),
        (["/lib/cyclefit/__main__.py", "train"], "cyclefit train"),
        (["train.py", "--name", "x"], "python train.py --name x"),
    ],
)
def test_a_command_is_repeated_as_it_was_typed(typed, again, monkeypatch):
    monkeypatch.setattr(sys, "argv", typed)
    assert start.command_line() == again


def test_processes_are_started_with_the_subcommand(monkeypatch):
    """Lightning starts further ranks with `sys.argv`."""

    def stop(*args, **kwargs):
        raise StopIteration

    monkeypatch.setattr(cli, "RunCLI", stop)
    for typed, kept in ((["cyclefit", "train", "--name=x"], ["train", "--name=x"]), (["own.py"], ["--name=x"])):
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(StopIteration):
            cli.train(["--name=x"])
        assert sys.argv[1:] == kept


def test_an_old_python_is_told_which_one_to_use(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "x"])
    with pytest.raises(SystemExit) as stopped:
        start.run(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "is Python 3.10, and cyclefit needs 3.11 or newer: " in said and said.count("\n") == 1
