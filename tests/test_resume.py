"""Runs that are killed and continued end as if nothing had happened; checkpoints are whole or not there."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cyclefit import UserError
from cyclefit.runs import damage, newest, read_run, write_checkpoint
from tests.conftest import ROOT
from tests.probes import ENVIRONMENT, command, ended

STEPS = 24
PLACES = ("step", "validation", "saving", "written", "renaming")


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def lines(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "started", "gpus")} for row in rows]


def same(left, right, where):
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right, strict=True)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def saved_step(run: Path) -> int:
    if not list((run / "checkpoints").glob("*.ckpt")):
        return 0
    return torch.load(newest(run)[0], weights_only=True)["global_step"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("processes", "kills"), [(1, 14), (2, 7)])
def test_killed_again_and_again_it_ends_bit_identical(processes, kills, tmp_path, world):
    """SIGKILL once at each place, then to all processes at random moments; each time it is continued."""
    shared = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null", "--data.num_workers=1"]
    shared += [f"--trainer.max_steps={STEPS}", "--model.ema_decay=0.9", "--model.validation_images=4"]
    shared += ["--trainer.devices=2", "--trainer.strategy=ddp"] if processes == 2 else []
    run, rng, log = tmp_path / "killed", random.Random(processes), tmp_path / "killed" / "metrics.jsonl"

    def start(name, *more):
        arguments = command("miniature_sd_lora.yaml", tmp_path, name, world, *shared, *more)
        return subprocess.Popen(
            arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def go_on(*more):
        """Continues where there is something to continue; begins again where the end is near."""
        if 0 < saved_step(run) <= STEPS - 8:
            return start("killed", "--ckpt_path=last", *more)
        shutil.rmtree(run, ignore_errors=True)
        return start("killed", *more)

    killed_at = []
    for i in range(kills):
        if i < len(PLACES):
            accident = ["--trainer.callbacks+=tests.probes.Accident", f"--trainer.callbacks.place={PLACES[i]}"]
            step = saved_step(run) % (STEPS - 4) + 4
            process = go_on(*accident, f"--trainer.callbacks.step={step}")
        else:
            process = go_on()
            began, deadline = time.time(), time.monotonic() + 120
            while not (log.exists() and log.stat().st_mtime > began) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
        assert process.returncode != 0, said[-3000:]
        killed_at.append(saved_step(run))
    print("killed with checkpoints of steps", killed_at)
    for process in (start("whole"), start("killed", "--ckpt_path=last") if saved_step(run) else start("killed")):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    assert lines(run) == lines(tmp_path / "whole")
    left, right = checkpoint(run), checkpoint(tmp_path / "whole")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ema", "global_step", "epoch"):
        same(left[part], right[part], part)


@pytest.fixture
def run(tmp_path):
    """Two checkpoints of a run, the newer one of step 2."""
    for step in (1, 2):
        state = {"global_step": step, "state_dict": {"captioner.w": torch.full((5000,), float(step))}}
        write_checkpoint(state, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, how):
    last, previous = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    assert newest(run) == (last, None)
    assert [torch.load(path, weights_only=True)["global_step"] for path in (last, previous)] == [2, 1]
    if how == "flipped":
        flip(last)
        torch.load(last, weights_only=True)  # torch does not notice
    else:
        last.write_bytes(last.read_bytes()[: 8000 if how == "cut" else 0])
    path, passed_over = newest(run)
    assert path == previous
    assert str(last) in passed_over
    (run / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"last.ckpt is damaged .*: previous"):
        read_run(run)
    assert read_run(run, "previous")[0]["steps"] == 1
    flip(previous)
    with pytest.raises(UserError, match=r"last.ckpt is damaged .*previous.ckpt is damaged"):
        newest(run)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, world):
    settings = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]

    def train(name, *more):
        done = ended(command("miniature_blip.yaml", tmp_path, name, world, *settings, *more))
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    train("run", "--trainer.max_steps=4")
    flip(tmp_path / "run" / "checkpoints" / "last.ckpt")
    said = train("run", "--trainer.max_steps=6", "--ckpt_path=last")
    assert "last.ckpt is damaged" in said
    assert "previous.ckpt" in said
    train("whole", "--trainer.max_steps=6")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(tmp_path / "whole")["state_dict"], "weights")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_whole(small_disk):
    last = small_disk / "checkpoints" / "last.ckpt"
    state = {"global_step": 1, "weights": torch.rand(200_000)}
    for _ in range(2):
        write_checkpoint(state, last)
    with pytest.raises(UserError, match=r"could not be written: No space left on device; whole are last.ckpt, prev"):
        write_checkpoint(state | {"global_step": 2}, last)
    assert [path.name for path in sorted(last.parent.iterdir())] == ["last.ckpt", "previous.ckpt"]
    assert not any(damage(path) for path in last.parent.iterdir())
    assert torch.load(last, weights_only=True)["global_step"] == 1


def test_a_run_on_a_full_disk_stops_with_one_sentence(small_disk, world):
    settings = ["--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null", "--trainer.max_steps=20"]
    (small_disk / "ballast").write_bytes(bytes(600_000))
    done = ended(command("miniature_sd_lora.yaml", small_disk, "run", world, *settings))
    assert done.returncode == 2, done.stdout[-3000:]
    said = done.stdout.splitlines()[-1]
    assert said.startswith("error: ")
    assert "No space left on device" in said
    assert "Traceback" not in done.stdout
    assert all(damage(path) is None for path in (small_disk / "run" / "checkpoints").glob("*.ckpt"))
