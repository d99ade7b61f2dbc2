"""Unpaired data: images without captions and prompts without images, read beside pairs and used by the cycle alone."""

import logging
import re
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch

from cyclefit import UserError, latents
from cyclefit.batch import Batch
from cyclefit.cycles import OneStepCaptioning, PolicyGradient, Reading, SoftCaptionDenoising, TruncatedSampling
from cyclefit.data import ShardData, UnusableData, verify_shards
from cyclefit.data.__main__ import main as data_command
from cyclefit.finetune import AlternatingFinetune, CaptionerFinetune, GeneratorFinetune
from cyclefit.finetune.unpaired import Mixture
from cyclefit.judges import Denoising, ImageText
from cyclefit.models import Blip, Lora, OpenClip, StableDiffusion
from tests.test_data_read import as_rank, captions, data, encoded, make_shards, tar
from tests.test_resume import checkpoint, same
from tests.test_train import values

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


@pytest.fixture
def folders(tmp_path):
    """Shards of pairs, shards of images alone, and a file of prompts."""
    pairs = make_shards(tmp_path / "pairs")
    alone = tmp_path / "alone"
    alone.mkdir()
    for s in range(2):
        tar(alone / f"{s}.tar", {f"u{s}_{i}.png": encoded((0, s * 50, i * 20)) for i in range(9)})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff" + "".join(f"prompt {i}\n\n" for i in range(30)))
    return pairs, alone, prompts


def both(folders, **settings) -> ShardData:
    pairs, alone, prompts = map(str, folders)
    return data(pairs, **({"unpaired": alone, "prompts": prompts, "unpaired_batch_size": 3} | settings))


def seen(batches) -> list[list]:
    return [
        [[part.keys, part.captions, part.images.sum().item()] for part in (batch, batch.unpaired, batch.prompts)]
        for batch in batches
    ]


def test_a_batch_has_parts_of_their_own_size_beside_the_same_pairs(folders):
    batches = list(both(folders).train_dataloader())
    pairs = list(data(folders[0]).train_dataloader())
    assert len(batches) == len(pairs) == 10
    for batch, pair in zip(batches, pairs, strict=True):
        assert batch.keys == pair.keys
        assert batch.captions == pair.captions
        assert torch.equal(batch.images, pair.images)
        assert pair.unpaired is None and pair.prompts is None
        alone, prompts = batch.unpaired, batch.prompts
        assert alone.images.shape == (3, 3, 8, 8) and alone.captions == ["", "", ""] and alone.references == [[]] * 3
        for image, key in zip(alone.images, alone.keys, strict=True):
            colour = torch.tensor([0, int(key[1]) * 50, int(key[3:]) * 20], dtype=torch.uint8)
            assert torch.equal(image, colour[:, None, None].expand(3, 8, 8))
        assert prompts.images.shape == (3, 3, 0, 0) and prompts.references == [[text] for text in prompts.captions]
        # Every other line is empty.
        assert prompts.keys == [f"prompts.txt:{2 * int(text.split()[1]) + 1}" for text in prompts.captions]
        assert batch[:2].unpaired is None and batch[:2].keys == batch.keys[:2]
    drawn = [caption for batch in batches for caption in batch.prompts.captions]
    assert len(set(drawn)) > 20, "an epoch does not stay at the beginning of the file"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_depends_on_seed_epoch_rank_and_worker_alone(folders, workers, monkeypatch):
    loader = both(folders, num_workers=workers).train_dataloader()
    first, second = seen(loader), seen(loader)
    assert first == seen(both(folders, num_workers=workers).train_dataloader())
    others = [second, seen(both(folders, num_workers=workers, seed=1).train_dataloader())]
    as_rank(monkeypatch, 1, 2)
    others.append(seen(both(folders, num_workers=workers, epoch_size=80).train_dataloader()))
    for other in others:
        for part in (1, 2):
            assert [of[part] for of in first] != [of[part] for of in other]


def test_prompts_from_the_training_shards_do_not_follow_its_order(folders):
    batches = list(both(folders, prompts=str(folders[0]), unpaired_batch_size=None).train_dataloader())
    assert all(len(batch.prompts) == len(batch.unpaired) == len(batch) for batch in batches)
    assert [batch.prompts.keys for batch in batches] != [batch.keys for batch in batches]
    assert {text[-1] for batch in batches for text in batch.prompts.captions} == set("abc")


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch):
        self.seen += seen([batch])
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(("workers", "stop"), [(0, 2), (2, 7)])
def test_resuming_sees_the_same_parts_as_not_stopping(folders, tmp_path, workers, stop):
    (folders[1] / "1.tar").write_bytes((folders[1] / "1.tar").read_bytes()[:9000])  # bad samples on the way

    def fit(steps, ckpt_path=None):
        module, quiet = Recorder(), ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing")
        trainer = L.Trainer(accelerator="cpu", max_steps=steps, **dict.fromkeys(quiet, False))
        settings = dict(num_workers=workers, epoch_size=20, max_bad_fraction=0.5)
        trainer.fit(module, datamodule=both(folders, **settings), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        return module.seen

    straight, first = fit(12), fit(stop)
    assert first + fit(12, tmp_path / "c.ckpt") == straight


def test_resuming_with_other_unpaired_data_is_said(folders, caplog):
    before = both(folders)
    before.train_dataloader()
    for other, said in (
        (data(folders[0]), "batch_size of unpaired 3 -> none, shards of unpaired 2 -> none"),
        (both(folders, unpaired_batch_size=2), "batch_size of prompts 3 -> 2"),
    ):
        other.load_state_dict(before.state_dict())
        other.train_dataloader()
        assert said in caplog.text


def test_bad_samples_of_every_part_are_counted_and_replaced(folders, tmp_path, caplog):
    pairs, alone, prompts = folders
    tar(alone / "2.tar", {f"b{i}.png": b"no image" for i in range(3)} | {"c.json": captions("a caption alone")})
    tar(tmp_path / "silent.tar", {"d.json": b"{}", "e.txt": b"a prompt"})
    module = both((pairs, alone, tmp_path / "silent.tar"), max_bad_fraction=0.5)
    batches = list(module.train_dataloader())
    assert all(len(batch.unpaired) == len(batch.prompts) == 3 for batch in batches)
    assert set(module.bad.reasons) == {"broken image", "no image", "no caption"}
    assert module.bad.seen == 10 * (4 + 3 + 3)
    assert f"skipped d in {tmp_path / 'silent.tar'}: no caption" in caplog.text
    for settings, said in (
        ({"unpaired": str(prompts)}, r"no image \(prompts.txt:"),
        ({"prompts": str(alone / "0.tar")}, "no caption"),
        ({"unpaired": str(tar(tmp_path / "none.tar", {}))}, "none.tar and others are empty"),
    ):
        with pytest.raises(UnusableData, match=said):
            list(both(folders, epoch_size=400, **settings).train_dataloader())


def test_few_shards_are_said_but_not_of_a_text_file(folders, caplog):
    with caplog.at_level(logging.WARNING):
        both(folders, num_workers=4).train_dataloader()
    assert "2 unpaired shards for 1 ranks x 4 workers" in caplog.text
    assert "prompt shards" not in caplog.text


def test_a_folder_of_images_without_captions_is_packed_on_request(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        (images / f"{i}.png").write_bytes(encoded((i, 0, 0)))
    (images / "2.txt").write_text("a caption")
    (images / "3.png").write_bytes(b"no image")
    command = ["pack", "folder", "--images", str(images), "--out"]
    assert data_command([*command, str(tmp_path / "strict")]) == 0
    assert verify_shards(tmp_path / "strict")["samples"] == 1
    assert data_command([*command, str(tmp_path / "out"), "--without_captions"]) == 0
    assert verify_shards(tmp_path / "out")["samples"] == 3
    assert "1 x broken image" in capsys.readouterr().out
    batch = next(iter(data(tmp_path / "strict", unpaired=str(tmp_path / "out")).train_dataloader()))
    assert set(batch.unpaired.keys) == {"0", "1", "2"} and set(batch.unpaired.captions) == {""}
    assert data_command(["pack", "img2dataset", "--images", str(images), "--out", "x", "--without_captions"]) == 2
    assert "pack img2dataset takes no --without_captions; leave it out." in capsys.readouterr().err


def test_cached_latents_come_with_unpaired_images(world, weights, tmp_path, capsys):
    generator, cached = str(weights / "stable-diffusion"), {}
    for split, more in (("validation", []), ("unpaired", ["--without_captions"])):
        cached[split] = str(tmp_path / split)
        shards = str(world / split / "000000.tar")
        command = ["--shards", shards, "--generator", generator, "--out", cached[split], *more]
        assert latents.main(command) == 0
    assert f"--data.unpaired={cached['unpaired']}" in capsys.readouterr().out
    settings = dict(image_size=32, batch_size=4, epoch_size=80, num_workers=0, crop="center", latents=generator)
    batch = next(iter(ShardData(cached["validation"], unpaired=cached["unpaired"], **settings).train_dataloader())).to(
        "cpu"
    )
    own = StableDiffusion(generator)
    torch.testing.assert_close(batch.unpaired.latents.float(), own.encode_images(batch.unpaired.images), **CLOSE)
    # The step reads both parts' latents in the order of its mixture and encodes nothing.
    own.vae.encode = None
    module = CaptionerFinetune(
        Blip(str(weights / "blip"), trainable="decoder"), own, cycle=PolicyGradient(Denoising(), num_samples=2)
    )
    mixture = Mixture.of(4, 4, 6)
    reading = module.mixed_reading(batch, module.captioner.embed(batch.images), mixture)
    every = torch.cat([batch.latents, batch.unpaired.latents]).float()
    assert torch.equal(own.encode_images(reading.images), every[mixture.rows])
    with pytest.raises(UnusableData, match="no latents: write them with"):
        list(ShardData(cached["validation"], unpaired=str(world / "unpaired"), **settings).train_dataloader())


CLOSE = {"atol": 2e-3, "rtol": 2e-3}


@pytest.mark.parametrize(
    ("paired", "unpaired", "most", "rows", "used"),
    [
        (2, 2, None, [2, 0, 3, 1], 2),
        (4, 2, None, [4, 0, 5, 1, 2, 3], 2),
        (1, 3, 3, [1, 0, 2], 2),
        (64, 8, 16, [row for k in range(8) for row in (64 + k, k)], 8),
        (8, 8, 1, [8], 1),
    ],
)
def test_the_parts_alternate(paired, unpaired, most, rows, used):
    mixture = Mixture.of(paired, unpaired, most)
    assert (mixture.rows, mixture.used) == (rows, used)
    seeds = mixture.seeds(list(range(paired)))
    assert [seed for seed, row in zip(seeds, rows, strict=True) if row < paired] == [r for r in rows if r < paired]
    assert len(set(seeds)) == len(seeds)
    losses = torch.arange(1.0, len(rows) + 1)
    placed = mixture.by_place(losses)
    assert placed[rows].tolist() == losses.tolist() and placed.count_nonzero() == len(rows)
    alone = [loss for loss, row in zip(losses.tolist(), rows, strict=True) if row >= paired]
    assert mixture.logs(losses)["cycle_unpaired"].item() == pytest.approx(sum(alone) / len(alone))


@pytest.fixture
def mixed(world, batch):
    """Four pairs with three unpaired images and two prompts."""
    settings = dict(image_size=32, batch_size=3, epoch_size=3, num_workers=0)
    alone = next(
        iter(ShardData(str(world / "finetune"), unpaired=str(world / "unpaired"), **settings).train_dataloader())
    )
    prompts = ["a small red ring", "a large blue star"]
    prompts = Batch(torch.empty(2, 3, 0, 0), prompts, [[p] for p in prompts], ["p:1", "p:2"])
    pairs = batch[:4]
    pairs.unpaired, pairs.prompts = alone.unpaired.to("cpu"), prompts
    return pairs


def captioning(weights, cycle) -> CaptionerFinetune:
    generator = StableDiffusion(str(weights / "stable-diffusion"), steps=2)
    captioner, scorer = Blip(str(weights / "blip"), trainable="decoder"), OpenClip(str(weights / "clip"))
    module = CaptionerFinetune(captioner, generator, scorer, cycle)
    module.over_ranks = lambda value: value.detach()
    return module


def drawing(weights, cycle) -> GeneratorFinetune:
    generator = StableDiffusion(str(weights / "stable-diffusion"), steps=2, lora=Lora(4, 4.0))
    return GeneratorFinetune(generator, Blip(str(weights / "blip")), OpenClip(str(weights / "clip")), cycle=cycle)


CYCLES = {
    "policy": (captioning, lambda: PolicyGradient(ImageText(), num_samples=2, num_images=5)),
    "soft sampled": (captioning, lambda: SoftCaptionDenoising(captions="sampled")),
    "truncated": (drawing, lambda: TruncatedSampling(steps=2, num_images=5)),
    "truncated contrastive": (drawing, lambda: TruncatedSampling(steps=2, contrastive=True)),
}


@pytest.mark.parametrize("name", CYCLES)
def test_the_cycle_gets_both_parts_and_the_own_loss_the_pairs(name, weights, mixed, monkeypatch):
    finetune, make = CYCLES[name]
    module, given = finetune(weights, make()), []
    module.setup("fit")
    forward = module.cycle.forward
    monkeypatch.setattr(module.cycle, "forward", lambda *given_: given.append(given_[2:]) or forward(*given_))
    torch.manual_seed(0)
    loss, logs, terms = module.objective(mixed, [1, 2, 3, 4])
    torch.manual_seed(0)
    _, paired, _ = module.objective(mixed[:4], [1, 2, 3, 4])
    own = "lm" if finetune is captioning else "denoising"
    assert logs[own] == paired[own]
    assert loss.isfinite() and logs["cycle_unpaired"].isfinite() and "cycle_unpaired" not in paired
    samples, seeds = given[0]
    rows = Mixture.of(4, 3 if finetune is captioning else 2, module.cycle.num_images).rows
    assert [seed for seed in seeds if seed in (1, 2, 3, 4)] == [1, 2, 3, 4][: sum(row < 4 for row in rows)]
    if finetune is captioning:
        assert isinstance(samples, Reading) and samples.tokens is None and samples.logits is None
        images = torch.cat([mixed.images, mixed.unpaired.images])[rows]
        assert torch.equal(samples.images, images)
        torch.testing.assert_close(samples.features.hidden, module.captioner.embed(images).hidden, atol=1e-4, rtol=1e-4)
    else:
        assert samples.captions == [[*mixed.captions, *mixed.prompts.captions][row] for row in rows]
        assert samples.images.shape == (len(rows), 3, 0, 0)
    keys = 4 + (3 if finetune is captioning else 2)
    assert [len(term) for term in terms] == [4, keys]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.trained.values())


def test_a_loss_that_is_not_finite_names_the_unpaired_sample(weights, mixed, monkeypatch):
    module = drawing(weights, TruncatedSampling(steps=2))
    module.cycle.prepare(module.generator, module.partners)
    module._trainer = SimpleNamespace(log_every_n_steps=1, global_step=7, current_epoch=0, global_rank=0)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    forward = module.cycle.forward

    def broken(*given):
        loss, logs = forward(*given)
        return loss * torch.tensor([1, 1, torch.nan, 1, 1, 1]), logs

    monkeypatch.setattr(module.cycle, "forward", broken)
    with pytest.raises(UserError, match=r"not finite at step 7; samples: p:2\. "):
        module.training_step(mixed, 0)


REWARD = {"reward": ImageText(), "num_samples": 2}
REFUSED = [
    ("captioner", PolicyGradient(**REWARD), "prompts",
     "data.prompts has prompts without images, from which a generator learns, but this run trains a captioner: leave"),
    ("generator", TruncatedSampling(steps=2), "unpaired",
     "data.unpaired has images without captions, from which a captioner learns, but this run trains a generator: "),
    ("captioner", None, "unpaired",
     "data.unpaired has images without captions, from which only a cycle learns, and the captioner has no cycle: set"),
    ("generator", None, "prompts",
     "data.prompts has prompts without images, from which only a cycle learns, and the generator has no cycle: set"),
    ("captioner", SoftCaptionDenoising(), "unpaired",
     "SoftCaptionDenoising needs the caption of each image, and data.unpaired has images without captions: leave it "
     "out, or choose PolicyGradient, or SoftCaptionDenoising with captions: sampled"),
    ("generator", OneStepCaptioning(), "prompts",
     "OneStepCaptioning needs the image of each caption, and data.prompts has prompts without images: leave it out, or "
     "choose TruncatedSampling"),
]  # fmt: skip


@pytest.mark.parametrize(("learner", "cycle", "name", "said"), REFUSED)
def test_what_cannot_learn_from_unpaired_data_is_refused(learner, cycle, name, said, weights, tmp_path):
    module = captioning(weights, cycle) if learner == "captioner" else drawing(weights, cycle)
    shards = ShardData(batch_size=4, **{name: "nowhere"})
    module._trainer = SimpleNamespace(datamodule=shards, lightning_module=module)
    with pytest.raises(UserError, match=re.escape(said)):
        module.setup("fit")
    if module.cycle is not None:  # in alternation
        halves = {"captioner": ("image_cycle", "generator"), "generator": ("text_cycle", "captioner")}
        own, other = halves[learner]
        generator = module.generator if learner == "generator" else StableDiffusion(
            str(weights / "stable-diffusion"), steps=2, lora=Lora(4, 4.0)
        )  # fmt: skip
        alternating = AlternatingFinetune(
            Blip(str(weights / "blip"), trainable="decoder"), generator, module.scorer, **{own: module.cycle}
        )
        alternating.trainer = SimpleNamespace(datamodule=shards, lightning_module=alternating)
        refused = said if "needs" in said else f"data.{name} has .* the {other} has no cycle"
        with pytest.raises(UserError, match=refused if ".*" in refused else re.escape(refused)):
            alternating.setup("fit")


def test_num_images_counts_both_parts(weights):
    module = captioning(weights, PolicyGradient(**REWARD, num_images=7))
    for name, fine in ({"unpaired": "nowhere", "unpaired_batch_size": 3}, True), ({}, False):
        module._trainer = SimpleNamespace(datamodule=ShardData(batch_size=4, **name), lightning_module=module)
        if fine:
            module.setup("fit")
        else:
            with pytest.raises(UserError, match="num_images must be at most 4"):
                module.setup("fit")


def test_both_models_learn_from_both_and_go_on_where_they_stopped(launch, world):
    settings = ["--data.num_workers=1", "--model.text_cycle.steps=2", f"--data.unpaired={world / 'unpaired'}"]
    settings += [f"--data.prompts={world / 'prompts.txt'}", "--data.unpaired_batch_size=3", "--data.batch_size=4"]
    settings += ["--data.validation_size=4", "--model.validation_images=0"]
    settings += ["--model.image_cycle.num_images=4", "--model.text_cycle.num_images=4"]
    whole = launch("miniature_cycle_both.yaml", "whole", *settings, steps=4)
    launch("miniature_cycle_both.yaml", "part", *settings, steps=2)
    part = launch("miniature_cycle_both.yaml", "part", *settings, "--ckpt_path=last", steps=4)
    for model in ("captioner", "generator"):
        assert len(set(values(whole, f"train/{model}/cycle_unpaired").values())) == 2
    assert values(part, "train/loss") == values(whole, "train/loss")
    for name in PARTS:
        same(checkpoint(part)[name], checkpoint(whole)[name], name)


def test_a_dry_run_counts_what_the_cycle_has_more_to_do(weights):
    from cyclefit.train.dry_run import step_needs

    def needs(**more):
        with torch.device("meta"):
            module = captioning(weights, PolicyGradient(**REWARD))
        return step_needs(module, 4, 32, False, **more)

    alone, more = needs(), needs(unpaired=4)
    assert alone.flops < more.flops < 2 * alone.flops
    assert needs(prompts=4).flops == alone.flops


def test_images_of_novel_pairs_are_not_those_of_the_novel_split(world):
    from cyclefit.miniature.scenes import NOVEL_PAIRS, scenes

    drawn = {split: [scene for scene, _ in scenes(split)] for split in ("novel", "unpaired", "prompts")}
    assert {split: len(of) for split, of in drawn.items()} == {"novel": 400, "unpaired": 1000, "prompts": 1000}
    assert all(scene.pairs & NOVEL_PAIRS for scene in drawn["unpaired"] + drawn["prompts"])
    assert len({scene for of in drawn.values() for scene in of}) == 2400
    read = ShardData(str(world / "finetune"), unpaired=str(world / "unpaired"), image_size=32, num_workers=0)
    assert all(key.startswith("unpaired-") for key in next(iter(read.train_dataloader())).unpaired.keys)
    assert len((world / "prompts.txt").read_text().splitlines()) == 1000
