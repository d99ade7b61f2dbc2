"""What `python -m cyclefit.status` says of runs: its words against their files, its commands by running them."""

import json
import re
import shlex
import shutil

import pytest
import torch

from cyclefit import UserError, evaluate, export, status
from cyclefit.runs import hold
from tests.conftest import ROOT, drawing


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """A folder with a finished run, moved there under another name, and one that was stopped by a signal."""
    from cyclefit.train import cli

    folder = tmp_path_factory.mktemp("before")
    small = {
        "runs": folder, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
        "data.train": world / "finetune", "data.validation": world / "validation", "data.validation_size": 8,
        "data.batch_size": 4, "data.epoch_size": 24, "model.generator.steps": 2, "model.round_trip_images": 0,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["train.py"])
        for name, config, more in (
            ("plain", "miniature_blip.yaml", ["--trainer.max_steps=2"]),
            ("first", "miniature_cycle_blip.yaml", ["--trainer.max_steps=4"]),
        ):
            cli.train(["--config", config, *[f"--{k}={v}" for k, v in small.items()], "--name", name, *more])
    moved = tmp_path_factory.mktemp("after") / "some runs"
    moved.mkdir()
    shutil.move(folder / "plain", moved / "plain")
    shutil.move(folder / "first", moved / "cycle")
    (moved / "notes").mkdir()
    return moved


def said(capsys, *arguments) -> str:
    """What the command prints, in one line."""
    assert status.main([str(argument) for argument in arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_run_in_words(runs, capsys):
    text = said(capsys, runs / "cycle")
    rows = [json.loads(line) for line in (runs / "cycle" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/truth" in row][-1]
    assert "progress step 4 of 4, finished" in text
    assert "CaptionerFinetune captioner Blip, " in text
    assert "cycle SoftCaptionDenoising, weight " in text
    assert re.search(r"last\.ckpt step 4, \d{4}-\d\d-\d\d \d\d:\d\d previous\.ckpt step 2,", text)
    assert f"last validation truth {last['val/truth']:.4g}, coverage {last['val/coverage']:.4g}, false_captions" in text
    assert "cycle none, its own loss alone" in said(capsys, runs / "plain")


def test_how_a_run_ended(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "cycle", run)
    with hold(run, "--name"):
        assert re.search(r"step 4 of 4, running: process \d+ on \S+ since ", text := said(capsys, run))
        assert "train.py" not in text
    for ended in ("stopped by SIGUSR1", "failed: the loss is not finite at step 3"):
        (run / "ended.txt").write_text(f"{ended}\n")
        assert f"step 4 of 4, {ended}" in said(capsys, run)
    (run / "ended.txt").unlink()
    assert "step 4 of 4, finished" in said(capsys, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 4", "max_steps: 9"))
    (run / ".lock").write_text("process 1 on elsewhere since yesterday\n")  # which nobody holds
    assert "step 4 of 9, interrupted: its process was killed" in said(capsys, run)
    assert (run / ".lock").read_text() == "process 1 on elsewhere since yesterday\n"
    (run / "checkpoints" / "last.ckpt").write_bytes(b"half of it")
    assert "last.ckpt is not a checkpoint saved by a run" in said(capsys, run)


def test_the_commands_work(runs, tmp_path, capsys, monkeypatch, launch, world):
    folder = tmp_path / "some runs"
    shutil.copytree(runs, folder)
    monkeypatch.chdir(ROOT)
    found = status.commands(status.read(folder / "cycle"))
    assert list(found) == ["train for longer", "evaluate captions", "compare", "export the captioner"]
    arguments = {name: shlex.split(command) for name, command in found.items()}
    assert arguments["compare"][3:5] == [str(status.relative(folder / name)) for name in ("plain", "cycle")]
    from cyclefit.train import cli

    assert cli.train(arguments["train for longer"][2:]) == 0
    last = torch.load(folder / "cycle" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    python, module, name, *rest = arguments["export the captioner"]
    assert (python, module, name) == ("python", "-m", "cyclefit.export")
    assert export.main(rest) == 0
    assert evaluate.main(arguments["compare"][2:]) == 0
    small = ["--limit=4", "--num_candidates=2", "--java=false", "--generator.steps=1"]
    small.append(f"--shards={json.dumps({'test': str(world / 'validation')})}")
    assert evaluate.main([*arguments["evaluate captions"][2:], *small]) == 0
    assert (folder / "cycle-captions" / "metrics.json").is_file()


def test_the_models_of_a_run_are_those_of_its_evaluation(runs, tmp_path, weights):
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    state = status.read(run)
    assert status._evaluation(state, "captions") == ("miniature_evaluate.yaml", [])
    state.config["data"]["image_size"] = 64
    state.model["captioner"] = {
        "class_path": "cyclefit.models.VisionLanguage",
        "init_args": {"pretrained": "owner/model", "trainable": "decoder", "prompt": "Say it's", "lora_rank": 4},
    }
    config, overrides = status._evaluation(state, "captions")
    assert config == "miniature_evaluate.yaml"  # of the generator and the scorer
    assert overrides == [
        "--captioner=VisionLanguage", "--captioner.pretrained=owner/model", "--captioner.prompt=Say it's",
        "--image_size=64",
    ]  # fmt: skip


def test_several_runs_take_a_line_each(runs, capsys):
    text = said(capsys, runs)
    assert re.search(r"cycle \S captioner \S SoftCaptionDenoising.* step 4 of 4 \S finished \S truth ", text)
    assert re.search(r"plain \S captioner \S none \S step 2 of 2 \S finished", text)
    assert "notes" not in text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("notes", "is neither a run nor a folder of runs: name a folder that"),
        ("missing", "is not a folder: name a"),
        ("plain/config.yaml", "is not a folder: name a"),
    ],
)
def test_no_run_is_one_sentence(runs, name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        status.main([str(runs / name)])
    assert "\n" not in str(caught.value)


def test_the_page_of_a_run_and_of_several(runs, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    with drawing():
        said(capsys, folder / "cycle", "--html")
    page = (folder / "cycle" / "index.html").read_text()
    assert 'aria-label="val/truth against the step"' in page
    assert "train.py --config" in page
    assert page.index("val/truth") < page.index("val/CIDEr") < page.index("train/loss")
    table = (folder / "cycle" / "figures" / "curve-train-loss.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table] == [["run", "step"], *([["cycle", str(step)] for step in range(4)])]
    said(capsys, folder, "--html")
    both = (folder / "figures" / "curve-val-truth.csv").read_text()
    assert "plain,1," in both
    assert "cycle,3," in both
    (folder / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"index\.html exists and is not a page written by this command"):
        status.main([str(folder), "--html"])
    assert (folder / "index.html").read_text() == "mine"
