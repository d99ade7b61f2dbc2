"""Checkpoints with the published key names and shapes load whole, and what does not fit is said."""

import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from benchmarks.rehearsal import TINY_CLIP
from cyclefit import UserError, latents
from cyclefit.models import Blip, OpenClip, StableDiffusion, TransformersScorer
from cyclefit.models import pretrained as loading
from cyclefit.models import repository as listing
from cyclefit.models.bridge import load_tokenizers
from cyclefit.models.pretrained import MissingModel

SMALL_UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 768, "attention_head_dim": 2, "sample_size": 8,
}  # fmt: skip


def write(keys, path, without=(), more=()):
    """Random values under the listed names, in half precision: the loader makes fp32 of them."""
    random = torch.Generator().manual_seed(0)
    kinds = {"F32": torch.float16, "F16": torch.float16, "I64": torch.int64}
    tensors = {}
    for key, (kind, shape) in keys.items():
        if key not in without:
            values = torch.empty(shape, dtype=torch.float16).uniform_(-0.1, 0.1, generator=random)
            tensors[key] = values.to(kinds[kind])
    tensors |= {key: torch.zeros(2) for key in more}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def listed(shared, name):
    return json.loads((shared / "checkpoint_keys" / f"{name}.json").read_text())


@pytest.fixture
def diffusion(shared, tmp_path):
    """A folder of Stable Diffusion 1.5 with a small UNet, whose keys are its library's own; writes the other parts."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "sd"
    shutil.copytree(shared / "architectures" / "stable-diffusion-v1-5", folder)
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel(**SMALL_UNET).save_pretrained(folder / "unet")

    def parts(vae, text, **more):
        return (
            write(listed(shared, vae), folder / "vae" / "diffusion_pytorch_model.safetensors", **more),
            write(listed(shared, text), folder / "text_encoder" / "model.safetensors"),
        )

    parts.folder = folder
    return parts


OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@pytest.mark.parametrize(
    ("vae", "text"),
    [
        ("sd15_vae_as_published_fp32_old_attention_names", "sd15_text_encoder_as_published"),
        ("sd15_vae_diffusers", "sd15_text_encoder_transformers5"),
    ],
)
def test_stable_diffusion_with_old_and_new_names(diffusion, vae, text):
    vae, text = diffusion(vae, text)
    model = StableDiffusion(str(diffusion.folder), steps=1)
    found = model.vae.state_dict()
    for key, values in vae.items():
        parts = key.split(".")
        new = ".".join(OLD.get(part, part) if "attentions" in parts else part for part in parts)
        assert torch.equal(found[new], values.float().view_as(found[new])), key
    found = model.text_encoder.state_dict()
    assert len(found) == 196
    for key, values in text.items():
        if not key.endswith("position_ids"):
            [own] = [name for name in found if name.removeprefix("text_model.") == key.removeprefix("text_model.")]
            assert torch.equal(found[own], values.float()), key


def test_the_unet_has_the_published_keys(shared):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(shared / "architectures" / "stable-diffusion-v1-5" / "unet")
        model = UNet2DConditionModel.from_config(config)
    published = listed(shared, "sd15_unet_diffusers")
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == {
        key: shape for key, (_, shape) in published.items()
    }


@pytest.mark.parametrize("size", ["base", "large"])
def test_blip(shared, tmp_path, size):
    folder = tmp_path / "blip"
    shutil.copytree(shared / "architectures" / "blip-image-captioning-base", folder)
    shutil.copy(shared / "architectures" / f"blip-image-captioning-{size}" / "config.json", folder)
    tensors = write(listed(shared, f"blip_{size}_captioning_transformers5"), folder / "model.safetensors")
    model = Blip(str(folder))
    found = model.model.state_dict()
    assert found.keys() >= tensors.keys()
    for key, values in tensors.items():
        assert torch.equal(found[key], values.float()), key
    assert all(tensor.is_floating_point() is False or tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize(
    ("without", "more", "sentence"),
    [
        (
            ["decoder.conv_in.weight"],
            [],
            r"they lack 1 weights \(decoder\.conv_in\.weight\)",
        ),
        ([], ["decoder.extra"], r"they hold what it has no place for 1 weights \(decoder\.extra\)"),
    ],
)
def test_files_that_do_not_fit_are_said(diffusion, without, more, sentence):
    diffusion("sd15_vae_diffusers", "sd15_text_encoder_transformers5", without=without, more=more)
    with pytest.raises(UserError, match=rf"^the files of '\S*sd/vae' do not fit AutoencoderKL: {sentence}"):
        StableDiffusion(str(diffusion.folder))


def test_the_miniature_captioner_without_a_weight_is_refused(tmp_path, weights):
    folder = tmp_path / "blip"
    shutil.copytree(weights / "blip", folder)
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "crossattention" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"blip' do not fit BlipForConditionalGeneration: they lack 1 weights \({name}\)"
    ):
        Blip(str(folder))


PUBLISHED = {
    "captioner": lambda: Blip("Salesforce/blip-image-captioning-base"),
    "generator": lambda: StableDiffusion("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "scorer": lambda: OpenClip("ViT-B-32", "laion2b_s34b_b79k"),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Sets the hub's address, with an empty cache, and undoes that tests run offline."""

    def at(port: int) -> str:
        address = f"http://127.0.0.1:{port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return address

    return at


@pytest.mark.parametrize("accepts", [False, True])
def test_a_hub_that_does_not_answer_is_said_at_once(hub, accepts, caplog):
    """It refuses connections, or accepts them and says nothing."""
    for build in PUBLISHED.values():
        with pytest.raises(MissingModel):  # offline: imports what it takes
            build()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if accepts:
            listener.listen()
        address = hub(listener.getsockname()[1])
        for kind, build in PUBLISHED.items():
            with pytest.raises(MissingModel, match=f"^cannot load the {kind} .*{address} does not answer: .*") as said:
                build()
            assert ("no answer within 4 s" in str(said.value)) == accepts
        if accepts:  # it was asked once, by no client that asks again and again
            listener.settimeout(0)
            listener.accept()[0].close()
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert not caplog.records


def commit(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """A hub of the folders that the server holds by model and revision; it keeps what it was asked for."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        time.sleep(self.server.delay if self.path == "/" else 0)
        listing = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/(\w+))?", self.path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.*)", self.path)
        found, revision = listing or file, None
        revisions = self.server.models.get(found[1], {}) if found else {}
        for name in revisions:
            if found[2] in (name, commit(name)) or (found[2] is None and name == "main"):
                revision = name
        headers = {"X-Repo-Commit": commit(revision or "")}
        if found and found[1].startswith("gated/") and file:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if not revisions:
            return self.answer(200 if self.path == "/" else 404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = revisions[revision]
        if listing:
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            said = {"id": found[1], "sha": commit(revision), "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})
        if not (path := folder / file[3]).is_file():
            return self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, path.read_bytes(), headers | {"ETag": f'"{commit(str(path))}"'})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(hub):
    """A hub with models, its answer to the first question delayed if need be."""
    forget()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.models, server.asked, server.delay = {}, [], 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub(server.server_port)
        yield server
        server.shutdown()
    forget()


def forget():
    """Forgets what the hub has answered, as a new process."""
    loading.silence_of.cache_clear()
    listing._on_hub.cache_clear()


def same(found, expected, half=False):
    """Whether two models have the same weights in float32, those of the second rounded if need be."""
    expected = expected.state_dict()
    for name, value in found.state_dict().items():
        assert value.dtype == expected[name].dtype
        wanted = expected[name].half().float() if half and expected[name].is_floating_point() else expected[name]
        assert torch.equal(value, wanted), name


def test_a_slow_hub_is_waited_for(served, weights):
    served.delay, served.models = 2.5, {"any/blip": {"main": weights / "blip"}}
    local = Blip(str(weights / "blip"))
    same(Blip("any/blip"), local)
    # What is cached needs no hub.
    served.shutdown()
    served.server_close()
    forget()
    same(Blip("any/blip"), local)


def part(folder, end, sharded, variant=None):
    """Rewrites a part's weights as `.safetensors` or `.bin`, whole or in two shards, in half precision if a variant."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    stem = path.stem if end == "safetensors" or "diffusion" in path.stem else "pytorch_model"
    mark = f".{variant}" if variant else ""
    if variant:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    names = sorted(tensors)
    shards = [names[::2], names[1::2]] if sharded else [names]
    where = {}
    for k, keys in enumerate(shards, 1):
        name = f"{stem}{mark}-{k:05}-of-00002.{end}" if sharded else f"{stem}{mark}.{end}"
        held = {key: tensors[key].contiguous() for key in keys}
        if end == "bin":
            torch.save(held, folder / name)
        else:
            save_file(held, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
    if sharded:
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{stem}.{end}.index{mark}.json").write_text(json.dumps(index))


LAYOUTS = {
    "bin": ("bin", False),
    "bin_shards": ("bin", True),
    "shards": ("safetensors", True),
    "fp16": ("safetensors", False, "fp16"),
    "fp16_shards": ("safetensors", True, "fp16"),
    "fp16_bin": ("bin", False, "fp16"),
}


@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [(Blip, "blip", [""]), (StableDiffusion, "stable-diffusion", ["unet", "vae", "text_encoder"])],
)
def test_every_layout_of_weights_from_a_folder_the_hub_and_its_cache(
    served, weights, tmp_path, monkeypatch, kind, name, parts
):
    """The hub is asked whether it answers, for lists of files, and for files: nothing is converted or uploaded."""
    started = []
    monkeypatch.setattr("transformers.modeling_utils.auto_conversion", lambda *args, **_: started.append(args))
    local = kind(str(weights / name))
    for layout, settings in LAYOUTS.items():
        folder = tmp_path / layout
        shutil.copytree(weights / name, folder)
        for subfolder in parts:
            part(folder / subfolder, *settings)
        served.models[f"any/{layout}"] = {"main": folder}
        build = partial(kind, **({"variant": "fp16"} if "fp16" in layout else {}))
        same(build(str(folder)), local, "fp16" in layout)
        same(build(f"any/{layout}"), local, "fp16" in layout)
        asked, served.asked[:] = served.asked[:], []
        files = rf"/any/{layout}/resolve/({commit('main')}|main)/[\w./-]+"
        allowed = re.compile(rf"HEAD /|GET /api/models/any/{layout}(/revision/main)?|(HEAD|GET) {files}")
        assert [line for line in asked if not allowed.fullmatch(line)] == []
        assert any(line.startswith("GET") and line.endswith((".bin", ".safetensors")) for line in asked)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        same(build(f"any/{layout}"), local, "fp16" in layout)
        assert served.asked == []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert started == []


def test_a_revision_is_pinned(served, weights, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    shutil.copytree(weights / "blip", folder)
    [path] = folder.glob("*.safetensors")
    other = {key: value + 1 for key, value in load_file(path).items()}
    save_file(other, path, metadata={"format": "pt"})
    served.models["any/blip"] = {"main": weights / "blip", "v2": folder}
    expected = {"main": Blip(str(weights / "blip")), "v2": Blip(str(folder))}
    revisions = {None: "main", "v2": "v2", commit("v2"): "v2"}
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for revision, name in revisions.items():
            same(Blip("any/blip", revision=revision), expected[name])
    with pytest.raises(UserError, match=r"^the cache \S+ holds any/blip at main, v2, not at 'v3'"):
        Blip("any/blip", revision="v3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"^any/blip has no branch, tag or commit 'v3' on the hub$"):
        Blip("any/blip", revision="v3")


def test_the_hub_is_asked_once(served, weights):
    """For its list of files in a process, and for a file until it is in the cache."""
    served.models["any/sd"] = {"main": weights / "stable-diffusion"}
    local = StableDiffusion(str(weights / "stable-diffusion"))
    same(StableDiffusion("any/sd"), local)
    asked = [line for line in served.asked if line.startswith("GET") and "any/sd" in line]
    assert asked[0] == "GET /api/models/any/sd" and all("/resolve/" in line for line in asked[1:])
    assert len(asked) == len(set(asked)) > 5
    for new_process in (False, True):
        served.asked.clear()
        if new_process:
            forget()
        same(StableDiffusion("any/sd"), local)
        asked = [line for line in served.asked if "any/sd" in line]
        assert asked == (["GET /api/models/any/sd"] if new_process else [])
    # The branch was at another commit when the cache was filled.
    forget()
    reference = Path(constants.HF_HUB_CACHE) / "models--any--sd" / "refs" / "main"
    reference.write_text(commit("before"))
    assert listing.repository("any/sd").fetch(["model_index.json"]).name == commit("main")
    assert reference.read_text() == commit("main")


def test_a_local_folder_is_read_anew(tmp_path):
    for count in (1, 2):
        (tmp_path / f"{count}.json").write_text("{}")
        assert len(listing.repository(str(tmp_path)).files) == count


def eyes(folder, value):
    """A tiny DINOv2 whose weights are all the same, and its processor's mean too."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(image_size=32, patch_size=16, **tower))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[value] * 3).save_pretrained(folder)
    return folder


def test_a_revision_of_a_scorer(served, tmp_path, monkeypatch):
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY_CLIP)
    tags = {"published": open_clip.pretrained._pcfg(hf_hub="any/clip/")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    clips = {name: open_clip.create_model("tiny") for name in ("main", "v2")}
    for name, clip in clips.items():
        (tmp_path / "clip" / name).mkdir(parents=True)
        save_file(clip.state_dict(), tmp_path / "clip" / name / "open_clip_model.safetensors")
    served.models["any/clip"] = {name: tmp_path / "clip" / name for name in clips}
    served.models["any/eyes"] = {name: eyes(tmp_path / name, len(name)) for name in clips}
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for revision, name in ((None, "main"), ("v2", "v2")):
            same(OpenClip("tiny", "published", revision=revision).model, clips[name])
            scorer = TransformersScorer("any/eyes", revision=revision)
            assert scorer.name == "any/eyes"
            found = {p.unique().item() for p in scorer.model.parameters()}
            assert found == {*scorer.processor.image_mean} == {len(name)}
        assert ("GET /api/models/any/eyes/revision/v2" in served.asked) == (not offline)
        served.asked.clear()
    assert "file" not in tags["published"]


def test_tokenizers_come_without_weights(served, weights):
    served.models["any/sd"] = {"main": weights / "stable-diffusion"}
    ((folder, tokenizer),) = load_tokenizers("any/sd").items()
    assert folder == "tokenizer"
    (own,) = load_tokenizers(str(weights / "stable-diffusion")).values()
    assert tokenizer.get_vocab() == own.get_vocab()
    places = [line.rpartition("/resolve/")[2] for line in served.asked if line.startswith("GET /any")]
    assert places and all("/tokenizer/" in place for place in places)


def test_latents_of_a_revision_and_a_variant(served, weights, world, tmp_path, capsys):
    folder = tmp_path / "sd"
    shutil.copytree(weights / "stable-diffusion", folder)
    for subfolder in ("unet", "vae", "text_encoder"):
        part(folder / subfolder, "safetensors", False, "fp16")
    served.models["any/sd"] = {"v2": folder}
    shards, more = str(world / "validation"), ["--revision", "v2", "--variant", "fp16"]
    command = ["--shards", shards, "--generator", "any/sd", "--out", str(tmp_path / "out")]
    assert latents.main([*command, *more]) == 0
    assert " --model.generator.revision=v2 --model.generator.variant=fp16\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="any/sd has no branch, tag or commit 'v3'"):
        latents.main([*command, "--revision", "v3"])
    with pytest.raises(UserError, match="^Plain has no revision: leave out --revision$"):
        latents.main([*command, "--class_path", "Plain", *more])


class Plain(StableDiffusion):
    """Takes no revision."""

    def __init__(self, pretrained: str, image_size: int | None = None):
        super().__init__(pretrained, image_size=image_size)


def test_what_the_hub_refuses_is_said(served, weights):
    served.models["gated/blip"] = {"main": weights / "blip"}
    with pytest.raises(MissingModel, match=r"'gated/blip': its files are given only to those who have accepted"):
        Blip("gated/blip")
    with pytest.raises(MissingModel, match=r"'any/none': .* \(the hub has no such model, or a private one: "):
        Blip("any/none")


def test_a_variant_that_a_part_lacks(weights, tmp_path):
    """SD 1.5 has its UNet alone without the moving average; the other parts are taken as they are."""
    folder = tmp_path / "sd"
    shutil.copytree(weights / "stable-diffusion", folder)
    [path] = (folder / "unet").glob("*.safetensors")
    save_file({k: v.float() + 1 for k, v in load_file(path).items()}, path.with_suffix(".non_ema.safetensors"))
    plain, found = StableDiffusion(str(folder)), StableDiffusion(str(folder), variant="non_ema")
    name, weight = next(iter(plain.unet.state_dict().items()))
    assert torch.equal(found.unet.state_dict()[name], weight + 1)
    same(found.vae, plain.vae)
    with pytest.raises(UserError, match=r"sd has no variant 'fp16': its variants are non_ema; without `variant`"):
        StableDiffusion(str(folder), variant="fp16")
    path.unlink()
    with pytest.raises(UserError, match=r"sd/unet has weights of variants alone, non_ema: name one as `variant`"):
        StableDiffusion(str(folder))


def test_weights_of_another_library_are_named(weights, tmp_path):
    folder = tmp_path / "blip"
    shutil.copytree(weights / "blip", folder)
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    with pytest.raises(MissingModel, match=r"holds neither model\.safetensors nor pytorch_model\.bin.*tf_model\.h5"):
        Blip(str(folder))


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("kind", "name", "subfolder"), [(Blip, "blip", ""), (StableDiffusion, "stable-diffusion", "vae")]
)
def test_a_bin_that_would_run_code_is_refused(weights, tmp_path, monkeypatch, kind, name, subfolder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights / name, "model")
    part(Path("model") / subfolder, "bin", False)
    [path] = (Path("model") / subfolder).glob("*.bin")
    torch.save(torch.load(path, weights_only=True) | {"more": Harm()}, path)
    with pytest.raises(UserError, match=r"one of its `\.bin` files calls \w*\.mkdir, and nothing is unpickled"):
        kind("model")
    assert not Path("harm").exists()


def test_pointers_of_git_lfs_are_said(weights, tmp_path):
    folder = tmp_path / "blip"
    shutil.copytree(weights / "blip", folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors is a pointer of Git LFS, .* run `git lfs pull`"):
        Blip(str(folder))


@pytest.mark.parametrize(
    ("build", "name", "config", "sentence"),
    [
        (Blip, "config.json", {"model_type": "blip-2"}, r"^Blip loads blip, .* is a model for VisionLanguage: set"),
        (Blip, "config.json", {"model_type": "qwen2_5_vl"}, r"is a model for VisionLanguage: set"),
        (Blip, "model_index.json", {"_class_name": "StableDiffusionPipeline"}, r": set class_path to StableDiffusion$"),
        (
            StableDiffusion, "model_index.json", {"_class_name": "StableDiffusionXLPipeline"},
            r"^StableDiffusion loads StableDiffusionPipeline, .* for StableDiffusionXL: set",
        ),
        (StableDiffusion, "config.json", {"model_type": "blip"}, r": set class_path to Blip$"),
        (
            StableDiffusion, "model_index.json", {"_class_name": "WanPipeline"},
            r"family WanPipeline, which is not supported: Blip loads blip; StableDiffusion loads Stable",
        ),
    ],
)  # fmt: skip
def test_another_family_is_sent_to_its_adapter(tmp_path, build, name, config, sentence):
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        build(str(tmp_path))
