"""Runs that are killed and continued end as if nothing had happened; checkpoints are whole or not there."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cyclefit import UserError, cli
from cyclefit.finetune import GeneratorFinetune
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
    for part in PARTS:
        same(left[part], right[part], part)


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "ema", "global_step", "epoch")
# Epochs of three steps, a validation after every second one.
ERRORS = [
    ("objective", 3), ("objective", 5), ("validation_step", 2), ("validation_results", 6), ("on_train_batch_end", 2),
    ("on_train_batch_end", 3), ("log_metrics", 3), ("log_metrics", 4), ("save_checkpoint", 4), ("validation_step", 8),
]  # fmt: skip


def test_an_error_at_any_place_loses_no_step(launch, monkeypatch):
    """It leaves `last.ckpt` of the step before it, and the run goes on as if it had not been, validations included."""
    owners = {"objective": GeneratorFinetune, "validation_step": GeneratorFinetune}
    owners |= {"validation_results": GeneratorFinetune, "on_train_batch_end": cli.StopOnSignal}
    owners |= {"log_metrics": cli.JsonlLogger, "save_checkpoint": cli.WholeCheckpoints}
    settings = ["--model.ema_decay=0.9", "--model.validation_images=2", "--data.validation_size=8"]
    whole = launch("miniature_sd_lora.yaml", "whole", *settings, steps=8)
    for place, step in ERRORS:
        name, original = f"{place}-{step}", getattr(owners[place], place)

        def failing(self, *args, place=place, step=step, original=original, **kwargs):
            if place == "log_metrics":
                now = kwargs["step"] + 1
            elif place == "save_checkpoint":
                now = args[0]["global_step"] if Path(args[1]).stem == "best" else None
            else:
                now = getattr(args[0], "global_step", None) or self.global_step
            if now == step:
                raise OSError("something fails")
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owners[place], place, failing)
            with pytest.raises(OSError, match="something fails") as failed:
                launch("miniature_sd_lora.yaml", name, *settings, steps=8)
        run = whole.parent / name
        assert re.match(rf"saved as of step {step}; continue with: .*--ckpt_path last", failed.value.__notes__[0]), name
        assert checkpoint(run)["global_step"] == step, name
        launch("miniature_sd_lora.yaml", name, *settings, "--ckpt_path=last", steps=8)
        assert lines(run) == lines(whole), name
        for part in PARTS:
            same(checkpoint(run)[part], checkpoint(whole)[part], f"{name}: {part}")
        scores = [torch.load(r / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] for r in (run, whole)]
        assert scores[0] == scores[1], name


def test_weights_in_an_unknown_state_are_not_saved(launch, tmp_path, monkeypatch):
    """An error amid an update, and one after weights were lost that no loss has shown yet."""

    def amid(self, closure):
        closure()
        raise OSError("something fails")

    def lost(self, *_):
        if self.global_step:
            next(iter(self.trained.values())).data.fill_(torch.nan)
            raise OSError("something fails")
        return objective(self, *_)

    objective = GeneratorFinetune.objective
    accidents = {
        "the error came amid an update": (torch.optim.AdamW, "step", amid),
        "the weights are not finite": (GeneratorFinetune, "objective", lost),
    }
    for reason, accident in accidents.items():
        with monkeypatch.context() as patch, pytest.raises(OSError, match="something fails") as failed:
            patch.setattr(*accident)
            launch("miniature_sd_lora.yaml", "run", "--ckpt_path=auto", "--trainer.log_every_n_steps=50", steps=2)
        assert f"could not be saved: {reason}" in failed.value.__notes__[0]
    assert not list(tmp_path.rglob("*.ckpt"))


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
