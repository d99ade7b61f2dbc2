"""What goes wrong outside: broken data, lost losses, signals, disks and networks; docs/faults.md lists it."""

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cyclefit import UserError
from cyclefit.data import BadSamples, evaluation_batches
from cyclefit.export import main as export
from cyclefit.models import Captioner
from cyclefit.runs import RESUMABLE, hold, load_run, newest, read_checkpoint, read_run
from tests.conftest import ROOT
from tests.probes import ENVIRONMENT, command, ended, forked, started
from tests.test_data_read import captions, encoded, tar


@pytest.fixture
def broken(tmp_path):
    """Every fault of data at once, beside as many good samples."""
    folder, good = tmp_path / "broken", encoded((9, 90, 200), (32, 32))
    folder.mkdir()
    for shard in range(4):
        entries = {}
        for i in range(20):
            entries[f"s{shard}_{i}.png"] = encoded((50 * shard, 12 * i, 0), (32, 32))
            entries[f"s{shard}_{i}.json"] = captions(f"a picture {i} of shard {shard}")
        tar(folder / f"good{shard}.tar", entries)
    whole = (folder / "good0.tar").read_bytes()
    (folder / "truncated.tar").write_bytes(whole[:3000])
    (folder / "gzip.tar").write_bytes(gzip.compress(whole)[:900])
    (folder / "zero.tar").write_bytes(b"")
    tar(folder / "empty.tar", {})
    tar(
        folder / "samples.tar",
        {
            "captionless.png": good,
            "imageless.json": captions("no picture"),
            "zero.png": b"",
            "zero.json": captions("a picture of no bytes"),
            "huge.png": encoded(1, (10_000, 10_000), mode="1"),
            "huge.json": captions("a picture of a hundred megapixels"),
            "long.png": good,
            "long.json": captions("word " * 10_000),
            "twice.png": good,
            "twice.json": captions("the first of two of one name"),
        },
    )
    tar(folder / "twice.tar", {"twice.png": good, "twice.json": captions("the second of two of one name")})
    return folder


def test_training_goes_through_broken_data(broken, launch, caplog):
    """Both models learn from it, captions of 10,000 words are cut; a shard goes away in mid-run."""
    removal = ["--trainer.callbacks+=tests.probes.Remove", f"--trainer.callbacks.path={broken / 'good3.tar'}"]
    run = launch(
        "miniature_cycle_both.yaml", "run", f"--data.train={broken}", "--data.max_bad_fraction=0.5", *removal,
        "--trainer.callbacks.step=2", "--data.epoch_size=160", "--model.image_cycle.num_images=4",
        "--model.text_cycle.num_images=2", "--model.text_cycle.steps=2", steps=14,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 14
    assert all(loss == loss for loss in losses)
    reasons = {"truncated shard", "unreadable shard", "no caption", "no image", "empty image", "pixel limit"}
    missed = {reason for reason in reasons if reason not in caplog.text}
    assert not missed
    assert "good3.tar" in caplog.text


def test_evaluation_counts_what_is_broken_and_takes_no_key_twice(broken):
    def read(bad, batch_size=8):
        settings = {"image_size": 32, "batch_size": batch_size, "bad": bad}
        return list(evaluation_batches(str(broken), **settings))

    for name in ("truncated", "gzip"):  # copies of another shard
        (broken / f"{name}.tar").unlink()
    for batch_size in (1, 100):
        with pytest.raises(UserError, match="key twice appears twice"):
            read(BadSamples(0.5), batch_size)
    (broken / "twice.tar").unlink()
    bad = BadSamples(0.5)
    keys = [key for batch in read(bad) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 82
    assert {"long", "twice"} < set(keys)
    expected = ("no caption", "no image", "empty image", "above PIL's pixel limit", "unreadable shard")
    assert bad.reasons == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("config", ["miniature_blip.yaml", "miniature_sd_lora.yaml"])
def test_weights_that_are_lost_stop_the_run_before_they_are_saved(config, launch, tmp_path):
    """A learning rate that is far too high: the loss is lost for every sample at once."""
    with pytest.raises(
        UserError, match=r"not finite at step \d+; samples: ([\w-]+, ){7}[\w-]+, or those of the step before"
    ):
        launch(config, "run", "--model.optimizer.lr=1e30", "--model.warmup_steps=2", steps=6)
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_sample_whose_loss_is_lost_is_named(launch, tmp_path, monkeypatch):
    losses, seen = Captioner.loss_of, []

    def spoiled(self, logits, tokens):
        values = losses(self, logits, tokens)
        seen.append(len(values))
        return torch.where(torch.arange(len(values)) == 3, torch.nan, 1.0) * values if len(seen) == 4 else values

    monkeypatch.setattr(Captioner, "loss_of", spoiled)
    with pytest.raises(UserError, match=r"not finite at step 3; samples: [\w-]+\. The last"):
        launch("miniature_blip.yaml", "run", "--trainer.log_every_n_steps=5", steps=8)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_what_is_lost_after_the_last_look_is_not_saved(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "loss_of", lambda self, logits, tokens: logits.mean((1, 2)) * torch.nan)
    with pytest.raises(UserError, match="not finite at step 0"):
        launch("miniature_blip.yaml", "run", "--trainer.log_every_n_steps=50", "--trainer.limit_val_batches=0", steps=3)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def training(tmp_path, world, *more, start=forked):
    """A long run that has taken its first step."""
    process = start(command("miniature_blip.yaml", tmp_path, "run", world, "--trainer.max_steps=100000", *more))
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends(ranks, tmp_path, world):
    """On two ranks only one of them is told."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"] if ranks == 2 else []
    process = training(tmp_path, world, *two, start=started)
    os.kill(process.pid, signal.SIGTERM)
    done = ended(process)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout[-3000:]
    assert (tmp_path / "run" / "ended.txt").read_text() == "stopped by SIGTERM\n"
    step = int(re.search(r"stopped at step (\d+), saved", done.stdout)[1])
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == step >= 1


def test_a_second_ctrl_c_ends_at_once(tmp_path, world):
    """In a step that takes for ever; the checkpoint before stays whole."""
    accident = ["--trainer.callbacks+=tests.probes.Sleep", "--trainer.callbacks.step=3"]
    every = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    process = training(tmp_path, world, *accident, *every)
    for line in process.stdout:
        if "sleeping" in line:
            break
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1)
    done = ended(process)
    assert done.returncode not in (0, None), done.stdout[-3000:]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_run_is_one_process_s(tmp_path, world, launch):
    """A second process is told who has it; killed, the first one holds nothing, though a worker of its loader lives."""
    process = training(tmp_path, world, "--data.num_workers=1")
    try:
        for more in ([], ["--ckpt_path=auto"], ["--ckpt_path=last"]):
            with pytest.raises(UserError, match=rf"run is in use by process {process.pid} on \S+ since 20.*--name"):
                launch("miniature_blip.yaml", "run", *more)
        os.kill(process.pid, signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.01)
        run = launch("miniature_blip.yaml", "run", "--ckpt_path=auto", steps=1)
    finally:
        with suppress(ProcessLookupError):  # the worker leaves seconds after its parent
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # From the start, or from what the first one had saved by then.
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 1
    assert not (run / ".lock").exists()


def test_a_folder_is_held_by_one_and_left_as_it_was(tmp_path):
    folder = tmp_path / "new" / "evaluation"
    with hold(folder, "--out"):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*choose another --out"):
            with hold(folder, "--out"):
                pass
        assert folder.is_dir()
    assert not folder.exists()
    with hold(folder, "--out"):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with pytest.raises(UserError, match=r"cannot be a folder, because .*/result is a file: choose another --out"):
        with hold(folder / "result" / "deeper", "--out"):
            pass


def test_a_run_exists_once_it_has_trained(launch, tmp_path):
    """What fails before leaves nothing that asks for another command, and changes no run."""
    run = tmp_path / "run"
    for more in ([], ["--ckpt_path=auto"]):
        with pytest.raises((UserError, FileNotFoundError), match="nowhere"):
            launch("miniature_blip.yaml", "run", "--data.train=nowhere", *more)
        assert not (run / "config.yaml").exists()
    with pytest.raises(UserError, match="leave out --ckpt_path to start the run"):
        launch("miniature_blip.yaml", "run", "--ckpt_path=last")
    launch("miniature_blip.yaml", "run", "--model.warmup_steps=7", steps=1)
    config = (run / "config.yaml").read_text()
    assert "warmup_steps: 7" in config
    for mistake in ("--data.train=nowhere", "--model.captioner.trainable=cross-attention"):
        with pytest.raises((UserError, FileNotFoundError), match="nowhere|does not fit"):
            launch("miniature_blip.yaml", "run", "--ckpt_path=last", mistake)
        assert (run / "config.yaml").read_text() == config
    with pytest.raises(UserError, match="already holds a run: continue it with --ckpt_path last"):
        launch("miniature_blip.yaml", "run")
    shutil.rmtree(run / "checkpoints")  # as if killed before anything was saved
    with pytest.raises(UserError, match="already holds a run: .*restart it with --ckpt_path auto"):
        launch("miniature_blip.yaml", "run")
    with pytest.raises(UserError, match="restart the run with --ckpt_path auto"):
        launch("miniature_blip.yaml", "run", "--ckpt_path=last")
    launch("miniature_blip.yaml", "run", "--ckpt_path=auto", steps=1)


def test_runs_that_are_a_file_are_one_sentence(launch, tmp_path):
    (tmp_path / "file").touch()
    for runs in ("file", "file/deeper"):
        with pytest.raises(UserError, match=rf"run cannot be a folder, because {tmp_path}/file is a file: .*--runs"):
            launch("miniature_blip.yaml", "run", f"--runs={tmp_path / runs}")


class Reducer:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def strange(folder: Path, mark: Path) -> list[Path]:
    """Files in place of a checkpoint."""
    folder.mkdir()
    tensors = {"weight": torch.ones(2)}
    run = {key: kind() for key, kind in RESUMABLE.items()}
    states = {
        "reducer": Reducer(mark), "inside": run | {"callbacks": {"x": Reducer(mark)}}, "module": torch.nn.Linear(2, 2),
        "plain": tensors, "lightning": {"state_dict": tensors, "epoch": 1}, "list": [1, 2], "tensor": tensors["weight"],
        "types": run | {"global_step": "1"}, "values": run | {"state_dict": {"weight": Reducer(mark)}},
    }  # fmt: skip
    for name, state in states.items():
        torch.save(state, folder / f"{name}.ckpt")
    torch.save(states["reducer"], folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(states["reducer"]))
    (folder / "text.ckpt").write_text("no checkpoint")
    (folder / "empty.ckpt").touch()
    save_file(tensors, folder / "model.safetensors")
    with zipfile.ZipFile(folder / "zip.ckpt", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with zipfile.ZipFile(folder / "bytes.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02broken")
        archive.writestr("archive/version", "3")
    (folder / "folder.ckpt").mkdir()
    return sorted(folder.iterdir())


def test_strange_checkpoints_are_one_sentence_and_run_no_code(tmp_path, launch):
    mark, run = tmp_path / "ran", tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model: {}")
    readers = [
        lambda path: read_checkpoint(path, RESUMABLE), lambda path: read_checkpoint(path, RESUMABLE, verify=False),
        lambda path: launch("miniature_blip.yaml", "new", f"--ckpt_path={path}"),
        lambda path: launch("miniature_blip.yaml", "run", "--ckpt_path=last"), lambda path: load_run(run),
        lambda path: export([str(run), "--format=blip", f"--out={tmp_path / 'out'}"]),
    ]  # fmt: skip
    for path in strange(tmp_path / "strange", mark):
        last = run / "checkpoints" / "last.ckpt"
        if path.is_file():
            shutil.copy(path, last)
        for number, read in enumerate(readers if path.is_file() else readers[:3]):
            try:
                with pytest.raises(UserError) as refused:
                    read(path)
            except BaseException as error:
                raise AssertionError(f"{path.name}, reader {number}") from error
            said = str(refused.value)
            assert str(path) in said or str(last) in said
            assert re.search("not a checkpoint|damaged", said)
            assert "\n" not in said
            assert "weights_only" not in said
    assert not mark.exists()
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path, launch):
    """Of the same parameters in another shape, as those of a larger model are."""
    run = launch("miniature_blip.yaml", "run", steps=1)
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    name = min(state["state_dict"])
    state["state_dict"][name] = torch.zeros(3, 5)
    torch.save(state, last)
    with pytest.raises(UserError, match=rf"does not fit the configuration: parameters of another shape \(1: {name}\)"):
        launch("miniature_blip.yaml", "run", "--ckpt_path=last")
    with pytest.raises(UserError, match=rf"does not fit its config.yaml: {name.partition('.')[2]} has another shape"):
        load_run(run)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is not a configuration"):
        read_run(run)
    assert newest(run)[0] == last


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_python_without_packages_is_told_which_one_has_them(script, tmp_path):
    """An interpreter without site-packages: the project's own is named where there is one, else how to make it."""
    project = tmp_path / "project"
    package = "src/cyclefit"
    for name in (script, "Makefile", *(f"{package}/{name}" for name in ("__init__.py", "config/start.py"))):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    for name in ("train/cli.py", "evaluate/__init__.py"):
        (project / package / name).parent.mkdir()
        (project / package / name).write_text("import torch\n")
    bare = [sys.executable, "-I", "-S"]

    def said(*arguments, cwd=project):
        done = subprocess.run([*bare, *arguments], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        return done.stderr

    none = f"error: {sys.executable} has no package 'torch': "
    assert said(script, "--name", "a b") == none + "run `make setup` in ., which makes .venv/bin/python\n"
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert said(script, "--name", "a b") == none + f"run it with .venv/bin/python {script} --name 'a b'\n"
    assert said(f"project/{script}", cwd=tmp_path) == none + f"run it with project/.venv/bin/python project/{script}\n"
    real = subprocess.run([*bare, ROOT / script, "--name", "x"], cwd=ROOT, capture_output=True, text=True)
    assert real.returncode == 2
    assert re.fullmatch(r"error: .* has no package '\w+': .*\n", real.stderr)


def test_wandb_that_does_not_answer_is_said_and_logged_offline(tmp_path, world, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "WANDB_API_KEY", "a" * 40)
    monkeypatch.setitem(ENVIRONMENT, "WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delitem(ENVIRONMENT, "WANDB_MODE")
    settings = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    done = ended(forked(command("miniature_blip.yaml", tmp_path, "run", world, *settings)))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "W&B cannot be reached" in done.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_run_folder_that_cannot_be_written_is_one_sentence(tmp_path, world):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system that is read-only")
    try:
        done = ended(forked(command("miniature_blip.yaml", folder, "run", world, "--trainer.max_steps=2")))
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    assert done.returncode == 2, done.stdout[-3000:]
    assert re.fullmatch(r"error: .*disk/run: Read-only file system; .*--runs", done.stdout.splitlines()[-1])
    assert "Traceback" not in done.stdout
