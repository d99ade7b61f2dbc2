"""A first run with real models, but for their weights: every shipped configuration on a cache as the hub leaves it.

Architectures are tiny, everything else is as published: file names, configs, tokenizers, photographs.
"""

import sys
from copy import deepcopy

import pytest
import torch
import yaml
from huggingface_hub import constants

from benchmarks.rehearsal import CLIPS, PUBLISHED, TINY_CLIP, Cache, composed, repositories, steps
from cyclefit import evaluate, export, models
from cyclefit.data.__main__ import main as pack
from cyclefit.records import read_candidates
from cyclefit.runs import read_run
from tests.conftest import ROOT

CONFIGS = {
    path.stem: composed(path.stem)
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if not path.stem.startswith("miniature")
}
TRAINED = [name for name, config in CONFIGS.items() if "trainer" in config]
IMAGES = 8


def needed(config):
    """The repositories of a configuration; skips where the adapter of one is not there."""
    found = repositories(config)
    for published in found:
        adapter(published)
    return found


def adapter(published):
    """The class that loads a repository."""
    kind = getattr(models, published.adapter, None)
    return kind or pytest.skip(f"there is no cyclefit.models.{published.adapter}")


@pytest.fixture(scope="module")
def cache(shared, tmp_path_factory):
    """A cache of the hub, which fills with what is asked for, nothing else to be had."""
    import open_clip

    folder, sources = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("sources")
    for path in [*(shared / "architectures").iterdir(), *(shared / "models").iterdir()]:
        (sources / path.name).symlink_to(path)
    made = Cache(folder, sources, tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.chdir(ROOT)
        torch.manual_seed(0)
        for model, tag in CLIPS:
            config = TINY_CLIP | {"quick_gelu": "quickgelu" in model}
            patch.setitem(open_clip.factory._MODEL_CONFIGS, model, config)
            made.add_clip(model, tag)
        yield made


@pytest.fixture(scope="module")
def published(cache):
    """Puts repositories into the cache, once each."""
    done = set()

    def put(*repositories):
        for repository in repositories:
            if repository.name not in done:
                cache.add(repository)
                done.add(repository.name)

    return put


@pytest.fixture(scope="module")
def photos(shared, tmp_path_factory):
    """Shards of photographs, packed by the documented command."""
    folder = tmp_path_factory.mktemp("shards") / "coco"
    command = ["pack", "folder", "--images", str(shared / "photos"), "--out", str(folder), f"--limit={IMAGES}"]
    assert pack([*command, "--samples_per_shard=4"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(published, photos, tmp_path_factory):
    """Two steps of a configuration, once; the run's folder."""
    folder, done = tmp_path_factory.mktemp("runs"), set()

    def trained(name):
        published(*needed(CONFIGS[name]))
        if name not in done:
            small = {
                "runs": folder, "trainer.max_steps": 2, "trainer.val_check_interval": 2, "data.num_workers": 0,
                "trainer.accumulate_grad_batches": 1, "model.generator.steps": 2, "model.generator.image_size": 64,
                "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
                "data.train": photos, "data.validation": photos,
            }  # fmt: skip
            if "policy" in name or "nft" in name:
                small |= {f"model.cycle.{key}": 2 for key in ("num_samples", "num_images", "steps")}
                small |= {"model.cycle.num_timesteps": 1}
            steps(["--config", f"{name}.yaml", *[f"--{key}={value}" for key, value in small.items()]])
            done.add(name)
        return folder / name

    return trained


FP16 = [published for published in PUBLISHED if any(".fp16." in str(files) for files in published.parts.values())]
UNUSED = [published for published in PUBLISHED if not any(published in repositories(c) for c in CONFIGS.values())]
"""What the configs do not load: a half of the files, or none of them."""


@pytest.mark.parametrize("repository", [*FP16, *UNUSED], ids=lambda repository: repository.folder)
def test_published_files_load(published, repository):
    kind = adapter(repository)
    published(repository)
    model = kind(repository.name)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())
    if repository in FP16:
        half = kind(repository.name, variant="fp16").state_dict()
        for name, value in model.state_dict().items():
            published_half = any(".fp16." in file for file in repository.parts.get(name.partition(".")[0], ()))
            wanted = value.half().float() if published_half and value.is_floating_point() else value
            assert torch.equal(half[name], wanted), name


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps_and_their_export(run, name, tmp_path):
    folder = run(name)
    about, trained = read_run(folder)
    assert about["steps"] >= 2
    for kind in {key.partition(".")[0] for key in trained}:
        adapter_name = CONFIGS[name]["model"]["init_args"][kind]["class_path"]
        form = {"Blip": "blip", "VisionLanguage": "transformers"}.get(adapter_name, "diffusers")
        assert export.main([str(folder), f"--format={form}", f"--out={tmp_path / kind}"]) == 0
        assert list((tmp_path / kind).glob("*.safetensors"))


def evaluated(kind, configs, shards, out, *more):
    arguments = [kind, *[part for name in configs for part in ("--config", f"{name}.yaml")]]
    small = {
        "shards": f"{{test: {shards}}}", "out": out, "limit": 2, "batch_size": 2, "num_workers": 0,
        "generator.steps": 2, "generator.image_size": 64,
    }  # fmt: skip
    if kind == "captions":
        small["java"] = "false"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py"])
        assert evaluate.main([*arguments, *more, *[f"--{key}={value}" for key, value in small.items()]]) == 0
    assert (out / "report.html").is_file()
    return read_candidates(out / "candidates-test.jsonl")


def replacing(name):
    """The models of an evaluation's config replaced by those of a run."""
    models = CONFIGS[name]["model"]["init_args"]
    for part in ("captioner", "generator"):
        yield f"--{part}={models[part]['class_path']}"
        for key, value in models[part]["init_args"].items():
            if key not in ("trainable", "lora"):
                yield f"--{part}.{key}={'null' if value is None else value}"


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("captions", ["cycle_smolvlm_sana", "cycle_blip"]), ("images", ["cycle_sana_smolvlm", "cycle_sd"])],
)
def test_evaluation(published, run, photos, tmp_path, kind, runs):
    """Of runs of two families, in a table with what one of them started from."""
    folders = ", ".join(str(run(one)) for one in runs)
    name = f"evaluate_{kind}"
    published(*needed(CONFIGS[name]))
    found = evaluated(
        kind, [name], photos, tmp_path / "out", f"--runs=[{folders}]", "--num_candidates=2", *replacing(runs[0])
    )
    assert {one.model for one in found} == {"base", *runs}


def test_ablation(published, photos, tmp_path):
    """The one that names further models."""
    published(*needed(CONFIGS["evaluate_captions"]))
    configs = ["evaluate_captions", "ablation_scorers"]
    found = evaluated("captions", configs, photos, tmp_path / "out", "--runs=[]", "--num_candidates=2")
    assert {one.model for one in found} == {"base"}


def test_matrix(published, photos, tmp_path):
    """Its captioners and generators, but for Stable Diffusion 3 in the place of 3.5."""
    config = deepcopy(CONFIGS["matrix"])
    config["generators"]["sd35"]["init_args"]["pretrained"] = "stabilityai/stable-diffusion-3-medium-diffusers"
    for generator in config["generators"].values():
        generator["init_args"] |= {"steps": 2, "image_size": 64}
    config |= {"shards": {"test": str(photos)}, "limit": 2, "num_workers": 0, "out": str(tmp_path / "out")}
    published(*needed(config))
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py"])
        assert evaluate.main(["matrix", f"--config={tmp_path / 'matrix.yaml'}"]) == 0
    assert len(list((tmp_path / "out").glob("images/**/*.png"))) == 2 * (1 + 3 + 9)
    assert (tmp_path / "out" / "report.html").is_file()
