import io
import json
import logging
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from cyclefit.batch import Batch
from cyclefit.data import BadSamples, ShardData, evaluation_batches, expand_shards, folder_source, samples, write_shards
from cyclefit.data.stream import EvaluationStream, evaluation_loader

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"


def encoded(colour=(200, 30, 30), size=(12, 8), format="png", mode="RGB", **options) -> bytes:
    stored = io.BytesIO()
    Image.new(mode, size, colour).save(stored, format, **options)
    return stored.getvalue()


def decoded(stored: bytes, *options) -> np.ndarray:
    return samples.decode_image(stored, *options).transpose(1, 2, 0)


def tar(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def captions(*texts: str) -> bytes:
    return json.dumps({"captions": texts}).encode()


def make_shards(folder: Path, shards=4, samples=10, bad=()) -> Path:
    folder.mkdir(exist_ok=True)
    for s in range(shards):
        entries = {}
        for i in range(samples):
            key = f"s{s}_{i:02d}"
            entries[f"{key}.png"] = b"no image" if key in bad else encoded((s * 20, i * 20, 0))
            entries[f"{key}.json"] = captions(f"{key} a", f"{key} b", f"{key} c")
        tar(folder / f"{s:03d}.tar", entries)
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    return make_shards(tmp_path / "shards")


def data(train, **options) -> ShardData:
    settings = dict(image_size=8, batch_size=4, epoch_size=40, num_workers=0, shuffle_buffer=20)
    return ShardData(str(train), **(settings | options))


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


# the training stream


def test_batches_follow_the_convention(shards):
    loader = data(shards).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 10
    for batch in batches:
        assert isinstance(batch, Batch) and batch.images.shape == (4, 3, 8, 8)
        assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
        for image, caption, references, key in zip(
            batch.images, batch.captions, batch.references, batch.keys, strict=True
        ):
            assert references == [f"{key} {letter}" for letter in "abc"] and caption in references
            shard, index = int(key[1]), int(key[3:])
            expected = torch.tensor([shard * 20, index * 20, 0], dtype=torch.uint8)
            assert torch.equal(image, expected[:, None, None].expand(3, 8, 8))
    assert {caption[-1] for batch in batches for caption in batch.captions} == set("abc")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_gives_one_order_and_epochs_differ(shards, workers):
    loader = data(shards, num_workers=workers).train_dataloader()
    first, second = list(loader), list(loader)
    again = list(data(shards, num_workers=workers).train_dataloader())
    assert keys_of(first) == keys_of(again)
    assert [b.captions for b in first] == [b.captions for b in again]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert keys_of(first) != keys_of(second)
    assert keys_of(first) != keys_of(data(shards, num_workers=workers, seed=1).train_dataloader())


def test_crops_are_drawn_anew(tmp_path):
    wide = np.zeros((8, 64, 3), np.uint8)
    wide[:, :, 0] = np.arange(64) * 4
    stored = io.BytesIO()
    Image.fromarray(wide).save(stored, "png")
    tar(tmp_path / "0.tar", {"a.png": stored.getvalue(), "a.json": captions("a ramp")})
    options = dict(batch_size=1, epoch_size=20)
    lefts = {b.images[0, 0, 0, 0].item() for b in data(tmp_path / "0.tar", **options).train_dataloader()}
    assert len(lefts) > 10 and min(lefts) < 76 < 153 < max(lefts)
    centred = data(tmp_path / "0.tar", crop="center", **options).train_dataloader()
    assert len({b.images[0, 0, 0, 0].item() for b in centred}) == 1


def test_ranks_and_workers_see_different_samples(tmp_path, monkeypatch):
    shards = make_shards(tmp_path, samples=40)
    seen = {}
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        batches = list(data(shards, num_workers=2, epoch_size=16, shuffle_buffer=4).train_dataloader())
        assert len(batches) == 2  # epoch_size counts over the ranks; one batch of each worker
        for worker, batch in enumerate(batches):
            seen[rank, worker] = set(batch.keys)
    assert all(len(keys) == 4 for keys in seen.values())
    assert len(set.union(*seen.values())) == 16


def test_ranks_get_new_shards_every_epoch(shards, monkeypatch):
    as_rank(monkeypatch, 0, 4)
    loader = data(shards, epoch_size=16).train_dataloader()
    assert len({key[:2] for _ in range(12) for batch in loader for key in batch.keys}) == 4


def test_shards_mix(shards):
    batch = next(iter(data(shards, batch_size=20, shuffle_buffer=40, seed=3).train_dataloader()))
    assert len({key[:2] for key in batch.keys}) >= 3
    assert len(set(batch.keys)) == 20


def test_every_sample_is_visited_evenly(shards):
    loader = data(shards, epoch_size=400, shuffle_buffer=2000).train_dataloader()
    visits = Counter(keys_of(loader))
    assert len(visits) == 40 and min(visits.values()) >= 8 and max(visits.values()) <= 12


def test_epochs_shorter_than_a_shard_reach_its_end(tmp_path):
    make_shards(tmp_path, shards=1, samples=60)
    loader = data(tmp_path, epoch_size=4, shuffle_buffer=4).train_dataloader()
    assert len({key for _ in range(150) for batch in loader for key in batch.keys}) > 50


def test_fewer_shards_than_workers_is_said_and_works(shards, monkeypatch, caplog):
    as_rank(monkeypatch, 1, 3)
    batches = list(data(shards, num_workers=2, epoch_size=48).train_dataloader())
    assert len(batches) == 4
    assert "4 training shards for 3 ranks x 2 workers" in caplog.text


def test_images_become_floats_on_the_device():
    values = torch.arange(256, dtype=torch.uint8)
    images = values.view(4, 1, 8, 8).expand(4, 3, 8, 8)
    parts = ["c"] * 4, [["c"]] * 4, ["k"] * 4
    batch = Batch(images, *parts, rejected_images=images, unpaired=Batch(images, *parts)).to("cpu")
    expected = torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255)).view(4, 1, 8, 8).expand(4, 3, 8, 8)
    for made in (batch.images, batch.rejected_images, batch.unpaired.images):
        assert torch.equal(made, expected)
    assert batch.to("cpu").images is batch.images, "floats stay as they are"


# resuming


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple] = []

    def training_step(self, batch, batch_idx):
        assert batch.images.dtype == torch.float32 and batch.images.max() <= 1
        self.seen.append((batch_idx, batch.keys, batch.captions, batch.images.sum().item()))
        return self.layer(batch.images.mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.log("n", len(batch), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, datamodule, folder, ckpt_path=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("workers", "stop"), [(0, 2), (2, 3), (0, 5), (2, 5), (0, 7), (2, 8)])
def test_resuming_sees_the_same_batches_as_not_stopping(tmp_path, workers, stop):
    # Five batches an epoch: stops in the first epoch, at its end and in the second; bad samples on the way.
    folder = make_shards(tmp_path / "shards", bad=("s0_03", "s2_05", "s3_01"))
    options = dict(num_workers=workers, epoch_size=20, max_bad_fraction=0.5)
    straight = Recorder()
    fit(straight, data(folder, **options), tmp_path, max_steps=12)
    assert len(straight.seen) == 12
    first, second = Recorder(), Recorder()
    fit(first, data(folder, **options), tmp_path, max_steps=stop).save_checkpoint(tmp_path / "c.ckpt")
    fit(second, data(folder, **options), tmp_path, tmp_path / "c.ckpt", max_steps=12)
    assert first.seen + second.seen == straight.seen


@pytest.mark.parametrize("where", ["epoch_end", "batch_end", "validation_end"])
def test_resuming_from_checkpoints_of_the_trainer(tmp_path, where):
    folder = make_shards(tmp_path / "shards")
    kinds = {
        "epoch_end": dict(every_n_epochs=1, save_on_train_epoch_end=True),
        "batch_end": dict(every_n_train_steps=5),
        "validation_end": dict(every_n_epochs=1, save_on_train_epoch_end=False),
    }

    def run(module, epochs, ckpt_path=None):
        saving = ModelCheckpoint(tmp_path / where, "{epoch}", save_top_k=-1, **kinds[where])
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=epochs,
            limit_train_batches=5,
            callbacks=[saving],
        )
        datamodule = data(folder, validation=str(folder), num_workers=0)  # ten batches an epoch, five are used
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)

    straight, resumed = Recorder(), Recorder()
    run(straight, 3)
    run(resumed, 3, tmp_path / where / "epoch=0.ckpt")
    assert len(straight.seen) == 15 and resumed.seen == straight.seen[5:]


def test_a_restored_position_is_for_one_run(shards):
    first = data(shards)
    loader = first.train_dataloader()
    start = keys_of(islice(loader, 3))
    state = first.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 3)
    second = data(shards)
    second.load_state_dict(state)
    rest = keys_of(second.train_dataloader())
    assert start + rest == keys_of(data(shards).train_dataloader())
    assert keys_of(second.train_dataloader())[:12] == start


def test_skipping_decodes_nothing(shards, monkeypatch):
    calls = []
    decode = samples.decode_image
    monkeypatch.setattr(samples, "decode_image", lambda *args: calls.append(1) or decode(*args))
    datamodule = data(shards)
    datamodule.load_state_dict({"epoch": 0, "batch": 9, "order": {}})
    assert len(list(datamodule.train_dataloader())) == 1 and len(calls) == 4


def test_resuming_with_another_order_is_said(shards, caplog):
    datamodule = data(shards)
    datamodule.train_dataloader()
    other = data(shards, seed=5, num_workers=2)
    other.load_state_dict(datamodule.state_dict())
    other.train_dataloader()
    assert "seed 0 -> 5" in caplog.text and "workers 1 -> 2" in caplog.text


def test_the_random_state_of_the_model_is_left_alone(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data(shards, num_workers=2).train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


# evaluation


def test_evaluation_is_in_shard_order_with_the_first_caption(shards):
    expected = [f"s{s}_{i:02d}" for s in range(4) for i in range(10)]
    for workers in (0, 2, 3):
        batches = list(evaluation_batches(str(shards), image_size=8, batch_size=7, num_workers=workers))
        assert keys_of(batches) == expected
        assert [c for b in batches for c in b.captions] == [f"{key} a" for key in expected]
        assert batches[0].images.dtype == torch.float32 and batches[0].images.max() <= 1


@pytest.mark.parametrize("limit", [None, 1, 17])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1), (3, 2), (5, 0)])
def test_evaluation_has_each_sample_once(shards, ranks, workers, limit):
    per_rank = [
        keys_of(
            evaluation_loader(
                EvaluationStream(expand_shards(str(shards)), {"image_size": 8}, 3, rank, ranks, limit),
                workers,
                BadSamples(0),
            )
        )
        for rank in range(ranks)
    ]
    every = [f"s{s}_{i:02d}" for s in range(4) for i in range(10)][:limit]
    assert sorted(key for keys in per_rank for key in keys) == every
    assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not here")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1), (3, 2)])
def test_the_photos_come_back_each_once(tmp_path, ranks, workers):
    manifest = write_shards(folder_source(PHOTOS), tmp_path, samples_per_shard=25)
    assert manifest["samples"] == 108 and manifest["skipped"]["total"] == 0
    listed = {entry["file"][:-4]: entry for entry in json.loads((PHOTOS / "captions.json").read_text())}
    batches = [
        batch
        for rank in range(ranks)
        for batch in evaluation_loader(
            EvaluationStream(expand_shards(str(tmp_path)), {"image_size": 32}, 16, rank, ranks, None),
            workers,
            BadSamples(0),
        )
    ]
    assert sorted(keys_of(batches)) == sorted(listed)
    for batch in batches:
        for key, references in zip(batch.keys, batch.references, strict=True):
            assert references == [caption.strip() for caption in listed[key]["captions"]]


def test_validation_through_the_trainer(shards):
    datamodule = ShardData(validation=str(shards), image_size=8, batch_size=8, validation_size=20, num_workers=0)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        barebones=False,
    )
    module = Recorder()
    seen = []
    module.validation_step = lambda batch, batch_idx: seen.extend(batch.keys)
    trainer.validate(module, datamodule=datamodule)
    assert seen == [f"s{s}_{i:02d}" for s in range(2) for i in range(10)]


# decoding


def test_shorter_side_is_resized_and_the_longer_cropped():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "png")
    assert (decoded(stored.getvalue(), 20) == 255).all()
    assert (decoded(stored.getvalue(), 10)[:, 2:-2] > 250).all()
    assert (decoded(stored.getvalue(), 20, (0, 0)) == 0).all()
    assert (decoded(stored.getvalue(), 20, (0.999999, 0.999999)) == 0).all()
    assert decoded(stored.getvalue(), 33, (0.3, 0.9)).shape == (33, 33, 3)


def test_crop_in_one_step_equals_resize_then_crop():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 160, 3), np.uint8))
    stored = io.BytesIO()
    image.save(stored, "png")
    resized = np.asarray(image.resize((80, 45), Image.Resampling.BICUBIC)).astype(int)
    left = int(0.25 * 36)
    assert np.abs(decoded(stored.getvalue(), 45, (0.25, 0.0)) - resized[:, left : left + 45]).max() <= 1


def see_through_palette() -> bytes:
    image = Image.new("P", (12, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    stored = io.BytesIO()
    image.save(stored, "png", transparency=1)
    return stored.getvalue()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (encoded(100, mode="L"), (100, 100, 100)),
        (encoded((0, 255, 255, 0), mode="CMYK", format="jpeg", quality=95), (255, 0, 0)),
        (encoded((255, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (encoded((255, 0, 0, 128), mode="RGBA", format="webp", lossless=True), (255, 127, 127)),
        (encoded((0, 0), mode="LA"), (255, 255, 255)),
        (see_through_palette(), (255, 255, 255)),
        (encoded(1, mode="1"), (255, 255, 255)),
        (encoded(257 * 90, mode="I;16"), (90, 90, 90)),
    ],
)
def test_modes_are_converted(stored, expected):
    assert np.abs(decoded(stored, 8).astype(int) - np.array(expected)).max() <= 3


LAID = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
"""How a camera lays an upright image down for the orientations 2 to 8."""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed(orientation):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turn = [None, None, *(Image.Transpose[name] for name in LAID)][orientation]
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = io.BytesIO()
    (image.transpose(turn) if turn is not None else image).save(stored, "png", exif=exif)
    assert (decoded(stored.getvalue(), 16) == upright).all()


def test_large_jpegs_are_decoded_at_a_fraction(monkeypatch):
    drawn = []
    rgb = samples._rgb
    monkeypatch.setattr(samples, "_rgb", lambda image: drawn.append(image.size) or rgb(image))
    assert decoded(encoded(size=(1600, 1200), format="jpeg"), 64).shape == (64, 64, 3)
    assert drawn == [(200, 150)]


def test_a_bomb_is_never_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for size in ((12, 12), (30, 30)):  # PIL warns above its limit and raises above twice the limit
        with pytest.raises(samples.BadSample, match="pixel limit"):
            decoded(encoded_before[size], 8)


encoded_before = {size: encoded(size=size) for size in ((12, 12), (30, 30))}


# bad samples


@pytest.fixture
def faulty(tmp_path) -> Path:
    folder = make_shards(tmp_path / "faulty", shards=2, samples=30)
    good = encoded()
    jpeg = encoded(size=(64, 64), format="jpeg")
    tar(
        folder / "bad.tar",
        {
            "broken.png": b"not an image",
            "broken.json": captions("x"),
            "cut.jpg": jpeg[: len(jpeg) // 2],
            "cut.json": captions("x"),
            "zero.jpg": b"",
            "zero.json": captions("x"),
            "silent.png": good,
            "silent.json": captions(" ", ""),
            "mute.png": good,
            "garbled.png": good,
            "garbled.json": b"{",
            "imageless.json": captions("x"),
            "gif.gif": encoded(format="gif"),
            "gif.txt": b"x",
            "evil.pyd": b"cos\nsystem\n(S'touch evil'\ntR.",
            "evil.txt": b"x",
            "one.PNG": good,
            "one.txt": b"\n one \n\ntwo\n",
            "two.webp": encoded(format="webp"),
            "two.json": json.dumps({"caption": "a caption", "status": "success"}).encode(),
            "two.txt": b"another",
        },
    )
    whole = tar(folder / "whole", {"x0.png": good, "x0.txt": b"x", "x1.png": b"0" * 4000, "x1.txt": b"x"})
    (folder / "cut.tar").write_bytes(whole.read_bytes()[:4096])
    (folder / "nonsense.tar").write_bytes(b"nonsense" * 200)
    return folder


EXPECTED = {
    "broken image": 2,
    "empty image": 1,
    "no caption": 3,
    "no image": 3,
    "truncated shard": 1,
    "unreadable shard": 1,
}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_named(faulty, workers, caplog):
    bad = BadSamples(0.5)
    batches = list(evaluation_batches(str(faulty), image_size=8, batch_size=4, num_workers=workers, bad=bad))
    keys = keys_of(batches)
    assert len(keys) == len(set(keys)) == 63 and {"one", "two", "x0"} <= set(keys)
    assert bad.reasons == EXPECTED and bad.seen == 72
    assert f"skipped zero in {faulty / 'bad.tar'}: empty image" in caplog.text
    references = dict(pair for batch in batches for pair in zip(batch.keys, batch.references, strict=True))
    assert references["one"] == ["one", "two"] and references["two"] == ["a caption"]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_bad_samples(faulty, workers):
    datamodule = data(faulty, num_workers=workers, epoch_size=400, max_bad_fraction=0.5)
    batches = list(datamodule.train_dataloader())
    assert [len(batch) for batch in batches] == [4] * 100
    assert set(EXPECTED) == set(datamodule.bad.reasons)
    good = {"one", "two", "x0"}
    assert all(key in good or (key[0] == "s" and key[1].isdigit()) for key in keys_of(batches))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tmp_path, workers):
    folder = make_shards(
        tmp_path, shards=4, samples=30, bad=[f"s{s}_{i:02d}" for s in range(4) for i in range(0, 30, 4)]
    )
    sentence = r"of \d+ samples \(\d+%\) cannot be used, more than max_bad_fraction=0.1 .*s\d_\d\d in .*tar"
    with pytest.raises(ValueError, match=sentence):
        list(data(folder, num_workers=workers, epoch_size=800, seed=1).train_dataloader())
    with pytest.raises(ValueError, match=sentence):
        list(evaluation_batches(str(folder), image_size=8, batch_size=8, num_workers=workers))
    list(data(folder, num_workers=workers, epoch_size=800, max_bad_fraction=0.5).train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_ends_with_a_sentence(tmp_path, workers):
    make_shards(tmp_path / "bad", 1, 8, bad=[f"s0_{i:02d}" for i in range(8)])
    with pytest.raises(ValueError, match=r"samples in a row cannot be used: \d+ x broken image"):
        list(data(tmp_path / "bad", num_workers=workers).train_dataloader())
    (tmp_path / "nonsense.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(ValueError, match=r"shards in a row gave no sample.*nonsense.tar"):
        list(data(tmp_path / "nonsense.tar", num_workers=workers).train_dataloader())
    with pytest.raises(ValueError, match="no sample in"):
        list(evaluation_batches(str(tmp_path / "nonsense.tar"), image_size=8, batch_size=2, num_workers=workers))


def test_warnings_are_few(tmp_path, caplog):
    make_shards(tmp_path, shards=1, samples=60, bad=[f"s0_{i:02d}" for i in range(25)])
    list(evaluation_batches(str(tmp_path), image_size=8, batch_size=8, bad=BadSamples(0.5)))
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 5  # 1, 2, 3, 10, 20


def test_halves_of_two_shards_are_never_joined(tmp_path):
    # The first shard breaks off after an image whose key the second one uses too.
    first = tar(tmp_path / "first", {"a.png": encoded((255, 0, 0)), "a.json": captions("red") + b" " * 3000})
    (tmp_path / "0.tar").write_bytes(first.read_bytes()[:2048])
    tar(tmp_path / "1.tar", {"a.json": captions("blue"), "a.png": encoded((0, 0, 255))})
    (batch,) = evaluation_batches(str(tmp_path), image_size=8, batch_size=4)
    assert batch.captions == ["blue"] and batch.images[0, 2].min() == 1


# which shards


def test_names_of_shards(shards, monkeypatch):
    paths = [str(shards / f"{n:03d}.tar") for n in range(4)]
    assert expand_shards(str(shards)) == paths
    assert expand_shards(f"{shards}/{{000..003}}.tar") == paths
    assert expand_shards(f"{shards}/*.tar") == paths
    assert expand_shards([paths[1], f"file://{paths[0]}", paths[1]]) == [paths[1], paths[0]]
    assert expand_shards("pipe:cat {1..2}.tar") == ["pipe:cat 1.tar", "pipe:cat 2.tar"]
    assert expand_shards("https://host/{0..1}.tar?x=1") == [
        "https://host/0.tar?x=1",
        "https://host/1.tar?x=1",
    ]


def test_missing_shards_are_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"shard .*004.tar does not exist"):
        data(f"{shards}/{{000..009}}.tar").train_dataloader()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder .*empty contains no shards"):
        data(tmp_path / "empty").train_dataloader()
    with pytest.raises(FileNotFoundError, match=r"pattern .*x\*.tar contains no shards"):
        expand_shards(f"{shards}/x*.tar")
    with pytest.raises(ValueError, match="no training shards"):
        ShardData().train_dataloader()


def test_pipes(shards, caplog):
    url = f"pipe:cat {shards}/{{000..001}}.tar"
    batches = list(evaluation_batches(url, image_size=8, batch_size=5, num_workers=2))
    assert keys_of(batches) == [f"s{s}_{i:02d}" for s in range(2) for i in range(10)]
    list(data(url, epoch_size=4, shuffle_buffer=4).train_dataloader())
    assert "only the beginning is seen" in caplog.text


@pytest.mark.parametrize(
    "wrong", [dict(image_size=0), dict(batch_size=0), dict(num_workers=-1), dict(max_bad_fraction=2)]
)
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShardData("x", **wrong)
