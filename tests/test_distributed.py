"""Two processes over gloo: the ranks learn the same from different data, and one that fails takes the job down."""

import re
import sys
from datetime import timedelta
from functools import partial

import pytest
import torch

from cyclefit.batch import Batch
from cyclefit.cycles.images import Kept
from cyclefit.finetune import CaptionerFinetune
from cyclefit.train import cli
from tests.conftest import ROOT
from tests.probes import command, ended, forked, started
from tests.test_data_read import captions, encoded, tar

TWO = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.check_val_every_n_epoch=null")
# Plain gradient steps: Adam makes a step of full size out of a difference in the last digit.
SGD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.05")
BOTH = [f"--model.{half}_{flag.removeprefix('--model.')}" for half in ("captioner", "generator") for flag in SGD]
CONFIGS = {
    "miniature_blip.yaml": SGD,
    "miniature_cycle_blip.yaml": SGD,
    "miniature_cycle_blip_reward.yaml": (
        *SGD,
        "--model.cycle.num_images=3",
        "--model.cycle.reward.num_timesteps=1",
        "--model.cycle.inner_epochs=2",
    ),
    "miniature_sd_lora.yaml": (*SGD, "--model.generator.lora.text_encoder=true"),
    "miniature_cycle_sd.yaml": (*SGD, "--model.cycle.num_images=3", "--model.cycle.steps=3"),
    "miniature_sd_policy.yaml": (
        *SGD, "--model.cycle.num_images=2", "--model.cycle.num_samples=3", "--model.cycle.steps=3",
        "--model.cycle.inner_epochs=2",
    ),
    "miniature_sd_policy.yaml with an old policy": (
        *SGD, "--model.cycle=DiffusionNFT", "--model.cycle.reward=ImageText", "--model.cycle.num_images=2",
        "--model.cycle.num_samples=3", "--model.cycle.steps=3", "--model.cycle.kl_weight=0.1",
        "--model.cycle.old_decay=0",  # one process draws for both ranks: its average would move twice in a step
    ),
    "miniature_cycle_both.yaml": (*BOTH, "--model.image_cycle.num_images=4", "--model.text_cycle.num_images=4"),
}  # fmt: skip


def recorded(record, rank, step) -> Batch:
    parts = torch.load(record / f"batch-{rank}-{step}.pt", weights_only=True)
    parts |= {name: parts[name] and Batch(**parts[name]) for name in ("unpaired", "prompts")}
    return Batch(**parts)


def micro_batches(model, record, steps):
    """What one process makes of the ranks' batches as micro-batches of one batch, the optimizer stepping after both."""
    at = {}
    ranked = {"global_rank": property(lambda _: at["rank"]), "global_step": property(lambda _: at["step"])}
    model.__class__ = type("Ranked", (type(model),), ranked | {"current_epoch": 0})
    configured = model.configure_optimizers()
    if isinstance(configured, dict):
        configured = [configured["optimizer"]], [configured["lr_scheduler"]["scheduler"]]
    optimizers, schedulers = configured
    keys, captioning = [], model.halves[0]
    for step in range(steps):
        batches = [recorded(record, rank, step) for rank in range(2)]
        keys.append([batch.keys for batch in batches])
        keys += [[batch.unpaired.keys for batch in batches]] if batches[0].unpaired else []
        turn = step % len(optimizers)
        inner = model.halves[turn].inner_epochs
        rollouts = [Kept(inner) for _ in batches]
        # All ranks' tokens count alike: the reference has to know the others' lengths too.
        lengths = [captioning.captioner.mask(captioning.captioner.tokenize(b.captions)).sum(1).mean() for b in batches]
        captioning.over_ranks = lambda _, lengths=lengths: torch.stack(lengths).mean()
        for _ in range(inner):
            optimizers[turn].zero_grad()
            for rank, batch in enumerate(batches):
                at.update(rank=rank, step=step)
                if inner > 1:  # each rank has its own cycle, with what it has sampled
                    model.cycle._kept = rollouts[rank]
                loss = model.objective(batch, model.step_seeds(step, len(batch)))[0]
                (loss / len(batches)).backward()
            parameters = [p for group in optimizers[turn].param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizers[turn].step()
        schedulers[turn].step()
    return keys


@pytest.mark.parametrize("config", CONFIGS)
def test_two_ranks_learn_what_one_process_learns_from_both_batches(config, tmp_path, world, monkeypatch):
    steps, record = 4, tmp_path / "record"
    settings, config = CONFIGS[config], config.partition(" ")[0]
    settings = [*settings, "--data.epoch_size=48", f"--trainer.max_steps={steps}"]
    if "both" in config:
        settings += [f"--data.unpaired={world / 'unpaired'}", f"--data.prompts={world / 'prompts.txt'}"]
    callback = ["--trainer.callbacks+=tests.probes.Record", f"--trainer.callbacks.folder={record}"]
    arguments = command(config, tmp_path, "two", world, *TWO, *settings, "--trainer.limit_val_batches=0", *callback)
    done = ended(forked(arguments, ranks=2))
    assert done.returncode == 0, done.stdout[-3000:]
    weights = [torch.load(record / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), f"{name} differs between the ranks"

    fitted = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.L.Trainer, "fit", lambda self, model, *_, **__: fitted.update(model=model))
    arguments = command(config, tmp_path, "one", world, *settings)
    monkeypatch.setattr(sys, "argv", arguments[1:])
    cli.train(arguments[2:])
    model = fitted["model"]
    model._trainer = type("One", (), {"world_size": 1})()
    model.setup("fit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = micro_batches(model, record, steps)
    assert all(set(first).isdisjoint(second) for first, second in keys), "the ranks see the same samples"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[0][name], tensor, atol=2e-6, rtol=1e-4)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights[0].items())


def test_two_ranks_learn_what_one_learns_with_twice_the_batch(tmp_path, world, monkeypatch, launch):
    """The language loss, over captions of unequal length; the command starts its second rank itself."""
    record, steps = tmp_path / "record", 3
    settings = [*SGD, "--data.epoch_size=48", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
    callback = ["--trainer.callbacks+=tests.probes.Record", f"--trainer.callbacks.folder={record}"]
    done = ended(started(command("miniature_blip.yaml", tmp_path, "two", world, *TWO, *settings, *callback)))
    assert done.returncode == 0, done.stdout[-3000:]

    def double(self, batch, batch_idx):
        halves = [torch.load(record / f"batch-{r}-{batch_idx}.pt", weights_only=True) for r in range(2)]
        images = torch.cat([half["images"] for half in halves])
        both = Batch(images, *([*halves[0][k], *halves[1][k]] for k in ("captions", "references", "keys")))
        return step(self, both, batch_idx)

    step = CaptionerFinetune.training_step
    monkeypatch.setattr(CaptionerFinetune, "training_step", double)
    run = launch("miniature_blip.yaml", "one", *settings, "--trainer.check_val_every_n_epoch=null", steps=steps)
    expected = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weights = torch.load(record / "weights-0.pt", weights_only=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-4)


def two_shards(folder, second):
    """A good shard, and another one: `short`, `truncated`, or `bad` throughout."""
    folder.mkdir()
    for name, count in (("first", 40), (second, {"short": 3, "truncated": 40, "bad": 400}[second])):
        entries = {}
        for i in range(count):
            entries[f"{name}{i:02d}.png"] = b"no image" if name == "bad" else encoded((5 * i, 100, 0), (32, 32))
            entries[f"{name}{i:02d}.json"] = captions(f"a picture {i}")
        path = tar(folder / f"{name}.tar", entries)
        if name == "truncated":
            path.write_bytes(path.read_bytes()[:5000])
    return folder


def run_on(data, tmp_path, world, *more, start=started):
    settings = [*TWO, *SGD, "--trainer.max_steps=6", f"--data.train={data}", "--data.epoch_size=16", *more]
    done = ended(start(command("miniature_blip.yaml", tmp_path, "run", world, *settings)))
    print(done.stdout[-3000:])
    return done


@pytest.mark.parametrize("second", ["short", "truncated"])
def test_shards_that_are_unequal_do_not_hang_the_ranks(second, tmp_path, world):
    record = tmp_path / "record"
    callback = ["--trainer.callbacks+=tests.probes.Record", f"--trainer.callbacks.folder={record}"]
    shards, both = two_shards(tmp_path / "shards", second), partial(forked, ranks=2)
    done = run_on(shards, tmp_path, world, *callback, start=both)
    assert done.returncode == 0
    assert len(list(record.glob("batch-1-*.pt"))) == len(list(record.glob("batch-0-*.pt")))
    assert all(
        torch.equal(*pair)
        for pair in zip(
            *(torch.load(record / f"weights-{r}.pt", weights_only=True).values() for r in (0, 1)), strict=True
        )
    )


@pytest.mark.timeout(300)  # it is not to hang
def test_a_rank_that_sees_only_bad_samples_ends_the_job_with_its_reason(tmp_path, world):
    bad = two_shards(tmp_path / "shards", "bad") / "bad.tar"
    diverted = ["--trainer.callbacks+=tests.probes.Divert", f"--trainer.callbacks.shards={bad}"]
    done = run_on(world / "finetune", tmp_path, world, *diverted, "--trainer.callbacks.rank=1")
    assert done.returncode not in (0, None)
    assert re.search(r"error: \d+ (of \d+ samples|samples in a row) .*cannot be used.*bad.tar", done.stdout)


@pytest.mark.timeout(300)  # it is not to hang
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_takes_the_job_down(rank, tmp_path, world):
    accident = ["--trainer.callbacks+=tests.probes.Accident", "--trainer.callbacks.place=step"]
    accident += ["--trainer.callbacks.step=2", f"--trainer.callbacks.rank={rank}"]
    done = run_on(world / "finetune", tmp_path, world, *accident)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stdout
    [said] = re.findall("^error: .*", done.stdout, re.MULTILINE)
    assert said.startswith(f"error: rank {1 - rank} of 2 has lost contact with another rank")
    assert re.search(r"continue with: python \S*train\.py .*--ckpt_path " + ("auto", "last")[rank], said)
    if rank:  # the first one, still there, has saved the step that both had taken
        assert "saved as of step 3" in said
        assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_auto_waits_no_longer_than_ten_minutes_for_another_rank():
    strategy = cli.L.Trainer(accelerator="cpu", devices=2, logger=False, enable_progress_bar=False).strategy
    assert strategy._timeout == timedelta(minutes=10)
    assert strategy._ddp_kwargs["find_unused_parameters"] is False
