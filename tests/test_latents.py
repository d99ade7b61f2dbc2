import io
import tarfile

import pytest
import torch

from cyclefit import UserError, latents
from cyclefit.config import start
from cyclefit.cycles import SoftCaptionDenoising
from cyclefit.data import ShardData, UnusableData, verify_shards
from cyclefit.finetune import CaptionerFinetune, GeneratorFinetune
from cyclefit.models import Blip, Lora, StableDiffusion
from cyclefit.train import cli


@pytest.fixture(scope="module")
def folder(weights):
    return str(weights / "stable-diffusion")


@pytest.fixture(scope="module")
def encoded(world, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "validation"
    assert latents.main(["--shards", str(world / "validation"), "--generator", folder, "--out", str(out)]) == 0
    return out


@pytest.fixture
def counted(folder, monkeypatch):
    """A generator of its own, and the images that its VAE was asked to encode."""
    generator, calls = StableDiffusion(folder), []
    encode = generator.vae.encode
    monkeypatch.setattr(generator.vae, "encode", lambda x: calls.append(len(x)) or encode(x))
    return generator, calls


def data(shards, folder, **settings):
    settings = {"image_size": 32, "batch_size": 8, "epoch_size": 16, "num_workers": 0, "crop": "center"} | settings
    return ShardData(str(shards), latents=folder, **settings)


def test_shards_hold_what_they_held_and_the_latents(world, encoded, folder, generator):
    before, after = verify_shards(world / "validation"), verify_shards(encoded)
    assert before["samples"] == after["samples"]
    batch = next(iter(data(encoded, folder).train_dataloader())).to("cpu")
    assert batch.latents.dtype == torch.float16
    own = StableDiffusion(folder).encode_images(batch.images)
    torch.testing.assert_close(batch.latents.float(), own, atol=2e-3, rtol=2e-3)
    plain = next(iter(data(encoded, None).train_dataloader()))
    assert plain.latents is None
    assert plain.keys == batch.keys
    assert plain.captions == batch.captions


@pytest.mark.parametrize("kind", ["captioner", "generator"])
def test_a_step_is_the_same_without_the_vae(kind, weights, encoded, folder, counted, monkeypatch):
    generator, calls = counted
    # Noise is drawn in the order of memory, and the VAE's output is laid out otherwise than what was read.
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape))
    batch = next(iter(data(encoded, folder).train_dataloader())).to("cpu")
    captioner = Blip(str(weights / "blip"), trainable="cross-attention queries")
    if kind == "captioner":
        module = CaptionerFinetune(captioner, generator, cycle=SoftCaptionDenoising())
    else:
        generator._add_lora(Lora())
        module = GeneratorFinetune(generator)
    module.over_ranks = lambda value: value.detach()
    module.setup("fit")
    losses = []
    for known in (batch.latents, None):
        batch.latents = known
        batch.images = batch.images.clone()
        torch.manual_seed(0)
        losses.append(module.objective(batch, list(range(8)))[0].item())
        assert calls == ([] if known is not None else [8])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_batch_is_encoded_once(counted):
    generator, calls = counted
    images = torch.rand(4, 3, 32, 32)
    first = generator.encode_images(images)
    assert torch.equal(generator.encode_images(images[:2]), first[:2])
    assert calls == [4]
    generator.encode_images(images[1:])
    generator.encode_images(images.clone())
    assert calls == [4, 3, 4]
    generator.encode_images(images)
    images[0] = 0
    changed = generator.encode_images(images)
    assert calls == [4, 3, 4, 4, 4]
    assert not torch.equal(changed[0], first[0])
    torch.testing.assert_close(changed[1:], first[1:])
    flipped = generator.encode_images(images.flip(0))
    assert not torch.equal(flipped, changed)
    turned = generator.encode_images(images.transpose(2, 3))
    assert not torch.equal(turned, generator.encode_images(images))
    first = generator.encode_images(images[:1])
    generator.encode_images(images.clone())
    torch.testing.assert_close(generator.encode_images(images[:1]), first)
    assert len(generator.encode_images(images)) == len(images), "more rows than were remembered"


def test_latents_of_something_else_are_refused(world, encoded, folder, weights, counted):
    for settings, said in (
        ({"image_size": 64}, "at 32 px, not of .* at 64"),
        ({"shards": world / "validation"}, "no latents: write them with"),
        ({"folder": "another/generator"}, "not of another/generator"),
    ):
        settings = {"shards": encoded, "folder": folder, "epoch_size": 80} | settings
        with pytest.raises(UnusableData, match=said):
            list(data(settings.pop("shards"), settings.pop("folder"), **settings).train_dataloader())
    with pytest.raises(UserError, match=r"data\.crop to center"):
        data(encoded, folder, crop="random")
    with pytest.raises(UserError, match=r"have shape \(4, 2, 2\)"):
        counted[0].remember(torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 2, 2))


def test_broken_latents_are_counted_as_such(encoded, folder, tmp_path):
    with tarfile.open(encoded / "000000.tar") as source, tarfile.open(tmp_path / "0.tar", "w") as broken:
        for entry in source:
            content = source.extractfile(entry).read()
            if entry.name.endswith("safetensors"):
                content = content[:-7]
                entry.size = len(content)
            broken.addfile(entry, io.BytesIO(content))
    with pytest.raises(UnusableData, match="broken latents"):
        list(data(tmp_path, folder, epoch_size=80).train_dataloader())


def test_a_run_reads_them_and_another_generator_is_named(world, encoded, tmp_path, weights, folder):
    arguments = [
        "--config", "miniature_cycle_blip.yaml", f"--data.train={encoded}", "--data.crop=center", "--name=cached",
        f"--runs={tmp_path}", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.num_workers=0",
        "--data.validation=null", "--trainer.enable_progress_bar=false", f"--model.generator.pretrained={folder}",
        f"--model.captioner.pretrained={weights / 'blip'}", f"--model.scorer.model={weights / 'clip'}",
        "--data.batch_size=4", "--trainer.logger=false",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"data\.latents are those of another/one, but model\.generator is"):
        cli.train([*arguments, "--data.latents=another/one"])
    arguments[arguments.index("--name=cached")] = "--name=right"
    assert cli.train([*arguments, f"--data.latents={folder}"]) == 0


def test_images_that_cannot_be_read_are_named(tmp_path, folder, capsys):
    shards = tmp_path / "in"
    shards.mkdir()
    picture = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (40, 32), "red").save(picture, "png")
    with tarfile.open(shards / "0.tar", "w") as tar:
        for name, content in (
            ("good.png", picture.getvalue()),
            ("good.txt", b"red"),
            ("bad.png", b"x"),
            ("bad.txt", b"y"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    out = tmp_path / "out"
    assert latents.main(["--shards", str(shards), "--generator", folder, "--out", str(out)]) == 0
    assert "1 samples cannot be used" in capsys.readouterr().out
    assert "bad" in (out / "manifest.json").read_text()


def test_an_interrupted_run_goes_on(world, folder, tmp_path, monkeypatch, capsys):
    arguments = ["--shards", str(world / "validation"), "--generator", folder, "--samples_per_shard", "100"]
    assert latents.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    encode, calls = StableDiffusion.encode_images, []

    def interrupted(self, images):
        calls.append(len(images))
        if sum(calls) > 250:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(StableDiffusion, "encode_images", interrupted)
    monkeypatch.setattr("sys.argv", ["latents", *arguments, "--out", str(tmp_path / "cut")])
    with pytest.raises(SystemExit, match="130"):
        start.run(latents.main)
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [".begun.json", "000000.tar", "000001.tar"]
    calls.clear()
    monkeypatch.setattr(StableDiffusion, "encode_images", lambda self, x: calls.append(len(x)) or encode(self, x))
    with pytest.raises(FileExistsError, match="did not finish"):
        latents.main([*arguments, "--out", str(tmp_path / "cut"), "--image_size", "64"])
    assert latents.main([*arguments, "--out", str(tmp_path / "cut")]) == 0
    assert "continuing after 2 shards of 200 samples" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert "manifest.json" in names
    whole, cut = (verify_shards(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut
    assert sum(calls) == whole["samples"] - 200
