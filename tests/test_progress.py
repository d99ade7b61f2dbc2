"""How far work is: lines where the output is no terminal, bars on one; and where runs log."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from cyclefit import UserError, progress
from cyclefit.train import loggers
from tests.conftest import ROOT
from tests.probes import ENVIRONMENT, command, ended, forked

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)")


def lines(said: str) -> list[str]:
    """The lines with a time, without it; all of them ASCII, none overwritten."""
    assert "\r" not in said
    found = [match[1] for match in map(LINE.fullmatch, said.splitlines()) if match]
    assert all(line.isascii() for line in found)
    return found


@pytest.fixture
def often(monkeypatch):
    """A line at every occasion."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_lines_in_place_of_bars(often, capsys):
    assert list(progress.track(["a", "b"], "images\r of café")) == ["a", "b"]
    with progress.progress_bar(stderr=True) as bar:
        assert list(bar.track((x for x in "ab"), description="packing")) == ["a", "b"]
    with progress.progress_bar(rank=1) as bar:
        list(bar.track("ab", description="hidden"))
    said = capsys.readouterr()
    first, second, last = lines(said.out)
    assert first.startswith(r"images of caf\xe9: 1/2 (50%)")
    assert first.endswith(" left")
    assert second.startswith(r"images of caf\xe9: 2/2 (100%)")
    assert last.endswith(", took 0:00:00")
    assert [line.split(",")[0] for line in lines(said.err)] == ["packing: 1", "packing: 2", "packing: 2"]


def test_the_next_line_is_due_after_a_while(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 1))
    bar = progress.Lines(stderr=False)
    bar.get_time = lambda: float(next(clock))
    with bar:
        list(bar.track(range(100), description="work"))
    passed = [int(re.match(r"work: (\d+)/100", line)[1]) for line in lines(capsys.readouterr().out)]
    assert passed[0] < 5
    assert 3 <= len(passed) < 40
    assert passed[-1] == 100


def test_a_terminal_shows_bars():
    outer, inner = pty.openpty()
    code = "from cyclefit.progress import track; list(track(range(3), 'images'))"
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stdout=inner, stderr=inner, env=environment, check=True, cwd=ROOT)
    os.close(inner)
    said = os.read(outer, 100_000).decode()
    os.close(outer)
    assert "100%" in said
    assert "3/3" in said
    assert not LINE.search(said)


@pytest.fixture(scope="module")
def logged(tmp_path_factory, world):
    """The folder of a run of train.py in two processes whose output is a pipe, and what they said."""
    runs = tmp_path_factory.mktemp("runs")
    small = [x for x in command("miniature_blip.yaml", runs, "run", world) if "enable_progress_bar" not in x]
    more = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"]
    result = ended(forked([*small, *more, "--trainer.devices=2", "--trainer.strategy=ddp"], ranks=2))
    assert not result.returncode, result.stdout
    return runs / "run", result.stdout


def test_a_run_writes_lines_into_a_pipe(logged):
    folder, said = logged
    found = lines(said)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {name: value for row in rows for name, value in row.items()}
    first, second = (line for line in found if "validated" in line)
    assert first.startswith("step 3/6 (50%), ")
    assert re.search(r"s( each)?, \d+:\d\d:\d\d left; validated in \d+:\d\d:\d\d: truth ", first)
    assert second.startswith("step 6/6 (100%), ")
    measured = [name.removeprefix("val/") for name in values if name.startswith("val/")]
    assert measured and all(f"{name} {values[f'val/{name}']:.4g}" in second for name in measured)
    assert found[-1].startswith("step 6/6 (100%), ")
    assert f"loss {values['train/loss']:.4g}" in found[-1]
    assert (folder / "ended.txt").read_text() == "finished\n"


def test_an_evaluation_writes_lines_into_a_pipe(logged, world, tmp_path):
    folder, _ = logged
    arguments = ["captions", "--config", "miniature_evaluate.yaml", f"--runs=[{folder}]", f"--out={tmp_path / 'out'}"]
    shards = json.dumps({split: str(world / split) for split in ("test", "novel")})
    arguments += [f"--shards={shards}", "--limit=4", "--java=false"]
    small = ["--num_candidates=2", "--generator.steps=1", "--devices=2", "--batch_size=2"]
    result = ended(forked([sys.executable, "evaluate.py", *arguments, *small], ranks=2))
    assert not result.returncode, result.stdout
    last = [line.split(":")[:2] for line in lines(result.stdout) if "4/4 (100%), " in line and ", took " in line]
    assert last == [[split, f" {of}"] for split in ("test", "novel") for of in ("references", "base", "run")]


def test_packing_writes_lines_into_a_pipe(world, tmp_path):
    arguments = ["-m", "cyclefit.data", "pack", "img2dataset", "--images", str(world / "test"), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("packing: ") and ", took " in line for line in lines(done.stderr))


def test_how_a_run_failed_is_written_down(launch, tmp_path):
    gone = ["--trainer.callbacks+=tests.probes.Remove", "--trainer.callbacks.path=missing"]
    with pytest.raises(FileNotFoundError):
        launch("miniature_blip.yaml", "run", *gone, "--trainer.callbacks.step=1")
    ended = tmp_path / "run" / "ended.txt"
    assert ended.read_text() == "failed: [Errno 2] No such file or directory: 'missing'\n"
    launch("miniature_blip.yaml", "run", "--ckpt_path=last")
    assert ended.read_text() == "finished\n"


def test_tensorboard_is_chosen_by_name(tmp_path, launch, monkeypatch):
    for package in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--logger both needs the package tensorboard, .* `pip install tensorboard`"):
        launch("miniature_blip.yaml", "none", "--logger=both")
    assert not (tmp_path / "none").exists()


def test_tensorboard_has_the_values_the_samples_and_the_configuration(launch):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX, which writes TensorBoard's files")
    run = launch("miniature_blip.yaml", "board", "--logger=tensorboard")
    (events,) = (run / "tensorboard").glob("events.out.tfevents.*")
    written = events.read_bytes()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(name.encode() in written for row in rows for name in row.keys() - {"step", "time", "started", "gpus"})
    assert b"val/samples" in written
    assert b"class_path: cyclefit.models.Blip" in written
    assert not (run / "wandb_id.txt").exists()


def test_a_logger_of_lightnings_joins_the_runs_own_file(launch, tmp_path):
    chosen = f"--trainer.logger={json.dumps({'class_path': 'CSVLogger', 'init_args': {'save_dir': str(tmp_path)}})}"
    run = launch("miniature_blip.yaml", "csv", chosen)
    assert (run / "metrics.jsonl").exists()
    (csv,) = tmp_path.glob("lightning_logs/**/metrics.csv")
    assert "train/loss" in csv.read_text()
