"""A second evaluation into the same folder keeps what it depends on has not changed, and measures the rest anew."""

import copy
import importlib
import inspect
import json
import shutil
import sys

import pytest
import torch

from cyclefit import evaluate
from cyclefit.data import write_shards
from cyclefit.data.sources import img2dataset_source
from cyclefit.digests import digest, digest_of_shards
from cyclefit.judges import Denoising, ImageText, Regeneration
from tests.conftest import ROOT

KINDS = {"captions": evaluate.Captions, "images": evaluate.Images}
RUN = importlib.import_module("cyclefit.evaluate.run")
LIMIT = 6


@pytest.fixture(scope="module")
def project(tmp_path_factory, world, weights):
    """Shards, weights and a run of both models in a folder that a test may change."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(world / "test", folder / "test")
    shutil.copytree(weights, folder / "weights")
    from cyclefit.train import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["train.py"])
        small = {
            "runs": folder, "name": "run", "trainer.max_steps": 2, "trainer.enable_progress_bar": "false",
            "data.train": world / "finetune", "data.validation": world / "validation", "data.validation_size": 8,
            "model.validation_images": 0, "data.batch_size": 4, "model.image_cycle.num_images": 4,
            "model.text_cycle.num_images": 4,
            "model.generator.steps": 2,
        }  # fmt: skip
        cli.train(["--config", "miniature_cycle_both.yaml", *[f"--{k}={v}" for k, v in small.items()]])
    return folder


@pytest.fixture
def again(project, tmp_path, monkeypatch, capsys):
    """Runs an evaluation into one folder; returns how many images were worked on, what was said, and the rows."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])

    def run(kind, **more):
        real, worked = KINDS[kind].sample, []

        def counted(*arguments):
            worked.append(len(arguments[4]))
            return real(*arguments)

        models = {"captioner": "blip", "generator": "stable-diffusion"}
        settings = {f"{name}.pretrained": folder / "weights" / path for name, path in models.items()}
        settings |= {"scorer.model": folder / "weights" / "clip", "generator.steps": 2, "limit": LIMIT}
        settings |= {"num_candidates": 2, "shards": json.dumps({"test": str(folder / "test")})}
        settings |= {"runs": json.dumps([str(folder / "run")]), "out": folder / kind, "num_workers": 0}
        settings |= {"gallery": 1, "java": "false"} if kind == "captions" else {}
        config = {"captions": "miniature_evaluate.yaml", "images": "miniature_evaluate_images.yaml"}[kind]
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(KINDS[kind], "sample", counted)
            patch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
            arguments = [f"--{name}={value}" for name, value in (settings | more).items()]
            assert evaluate.main([kind, "--config", config, *arguments]) == 0
        rows = [json.loads(line) for line in (folder / kind / "candidates-test.jsonl").read_text().splitlines()]
        if kind == "captions":  # which of them the gallery shows depends on all models
            rows = [{name: value for name, value in row.items() if name != "image"} for row in rows]
        # The first image of each session and model warms up.
        return sum(worked) - worked.count(1), capsys.readouterr().out, rows

    run.folder = folder
    return run


def of(rows, model):
    return [row for row in rows if row["model"] == model]


def changed_weights(path, by=0.05):
    """Adds to every trained weight; name and number of steps stay what they were."""
    state = torch.load(path, weights_only=True)
    state["state_dict"] = {name: tensor + by for name, tensor in state["state_dict"].items()}
    torch.save(state, path)


@pytest.mark.parametrize("kind", ["captions", "images"])
def test_results_are_those_of_the_models_at_hand(again, kind, capsys):
    """The command stays the same; what lies under its names changes."""
    folder, text = again.folder, "caption" if kind == "captions" else "metrics"
    _, _, first = again(kind)
    none, said, same = again(kind)
    assert (none, same) == (0, first)
    assert "anew" not in said

    changed_weights(folder / "run" / "checkpoints" / "last.ckpt")
    work, said, rows = again(kind)
    assert "test: run is evaluated anew: changed since its last results: " in said
    assert "test: kept are the results of base\n" in said
    assert of(rows, "base") == of(first, "base")
    assert [row[text] for row in of(rows, "run")] != [row[text] for row in of(first, "run")], "the old model's"
    assert work == len({row["key"] for row in rows})

    # The base models' files, at the same place: all rows rest on them.
    name = {"captions": "stable-diffusion/unet/diffusion_pytorch_model", "images": "blip/model"}[kind]
    path = folder / "weights" / f"{name}.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k: v * 1.05 if v.is_floating_point() else v for k, v in load_file(path).items()}, path)
    _, said, rows = again(kind)
    partner = {"captions": "generator", "images": "captioner"}[kind]
    for model in ("base", "run"):
        assert f"test: {model} is evaluated anew: changed since its last results: {partner}" in said
    assert of(rows, "base") != of(first, "base")

    # Other images under the same name, which the report must show too.
    source = folder / kind / "images" / "test" / "source"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    shards = sorted(folder.joinpath("test").glob("*.tar"))
    samples = [s for s in img2dataset_source(folder / "test")]
    keys = [sample.key for sample in samples]
    for sample, key in zip(samples, reversed(keys), strict=True):
        sample.key = key
    for path in (*shards, folder / "test" / "manifest.json"):
        path.unlink()
    write_shards(sorted(samples, key=lambda s: s.key), folder / "test")
    _, said, rows = again(kind)
    assert "test: base is evaluated anew: changed since its last results: images" in said
    after = {path.name: path.read_bytes() for path in source.iterdir()}
    assert {row["key"] for row in rows} <= {name.removesuffix(".png") for name in after}
    assert all(after[name] != content for name, content in before.items() if name in after)


def test_source_images_of_an_evaluation_that_was_cut_off_are_not_taken_for_other_images(again, monkeypatch):
    """Images are read and saved before the first row is there."""

    class CutOff(Exception):
        pass

    def cut_off(*_, **__):
        raise CutOff

    folder = again.folder
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RUN, "_make", cut_off)
        again("images")
    source = folder / "images" / "images" / "test" / "source"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert len(before) == LIMIT
    samples = list(img2dataset_source(folder / "test"))
    keys = [sample.key for sample in samples]
    shutil.rmtree(folder / "test")
    for sample, key in zip(samples, keys[1:] + keys[:1], strict=True):
        sample.key = key
    write_shards(sorted(samples, key=lambda s: s.key), folder / "test")
    again("images")
    assert all((source / name).read_bytes() != content for name, content in before.items())


def test_a_run_that_is_left_out_or_comes_in_changes_nothing_of_the_others(again):
    _, _, first = again("captions")
    work, said, rows = again("captions", runs="[]")
    assert work == 0
    assert "test: the results of run are dropped: it is not among the models any more" in said
    assert rows == of(first, "base")
    work, _, rows = again("captions")
    assert work == LIMIT
    assert of(rows, "base") == of(first, "base")
    work, _, rows = again("captions", limit=LIMIT + 8, num_candidates=2)  # more images than others contrast with
    kept = {(row["key"], row["decoding"], row["index"]): row["caption"] for row in of(rows, "run")}
    assert work >= 8
    for row in of(first, "run"):
        assert kept[row["key"], row["decoding"], row["index"]] == row["caption"]


# Settings that change no candidate's row.
WITHOUT_INFLUENCE = {
    "out",
    "runs",
    "batch_size",
    "num_workers",
    "checkpoint",
    "gallery",
    "java",
    "devices",
    "num_nodes",
}
WITHOUT_INFLUENCE |= {"rerank_runs"}  # of the base
WITHOUT_INFLUENCE |= {"metrics"}  # measured of all candidates at every evaluation
OTHER = {
    "num_candidates": 3, "nucleus_p": 0.5, "min_new_tokens": 2, "max_new_tokens": 7, "image_size": 16, "limit": 3,
    "seed": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["captions", "images"])
def test_every_setting_counts(kind, project, world, captioner, generator, scorer, weights, monkeypatch, tmp_path):
    """A new parameter of an evaluation is either without influence on the rows, or part of what they depend on."""

    class Read(Exception):
        pass

    def file(folder, split, settings, fabric):
        raise Read(settings.depends["base"])

    monkeypatch.setattr(RUN, "CandidateFile", file)
    from cyclefit.metrics.reader import SceneReader
    from cyclefit.models import OpenClip

    more = {"held_out": OpenClip(str(weights / "clip-heldout")), "reader": SceneReader(str(weights / "reader"))}
    given = {"shards": {"test": str(project / "test")}, "out": str(tmp_path / "out")}
    models = {"captioner": captioner, "generator": generator, "scorer": scorer}

    def depends(**changed):
        with pytest.raises(Read) as found:
            # One judge contrasts, so that the limit counts.
            judges = {"judges": {"contrastive": Denoising(num_others=1)}} if kind == "captions" else more
            settings = given | models | judges
            RUN.run(KINDS[kind](**settings | changed))
        return json.dumps(found.value.args[0], sort_keys=True)

    first = depends()
    assert depends() == first
    other = OTHER | {"shards": {"test": str(world / "novel")}, "judges": {"image-text": ImageText()}}
    other |= {name: _other(model) for name, model in (models | more).items()}
    further = copy.deepcopy(scorer)
    further.name = "another"
    other["further_scorers"] = [further]
    own, common = (inspect.signature(of).parameters for of in (KINDS[kind], evaluate.Evaluate))
    for name in own.keys() | common.keys():
        if name not in WITHOUT_INFLUENCE | {"common"}:
            assert depends(**{name: other[name]}) != first, name


def _other(model):
    """The same class with one weight more than it was."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    return model


def test_a_digest_is_of_what_a_model_does_and_not_of_where_it_lies(captioner, generator, scorer, weights, tmp_path):
    from cyclefit.models import Blip, Lora, OpenClip, StableDiffusion

    shutil.copytree(weights, tmp_path / "moved")
    moved = {
        captioner: Blip(str(tmp_path / "moved" / "blip")),
        generator: StableDiffusion(str(tmp_path / "moved" / "stable-diffusion"), 8, 4.0, batch_size=3),
        scorer: OpenClip(str(tmp_path / "moved" / "clip"), batch_size=7),
    }
    images = torch.rand(2, 3, 32, 32)
    for model, copied in moved.items():
        assert digest(copied) == digest(model)
        if hasattr(copied, "embed_texts"):
            copied.embed_texts(["a red circle"]), copied.embed_images(images)
        elif hasattr(copied, "generate") and copied is not moved[captioner]:
            copied.generate(["a red circle"], [0], 2), copied.encode_images(images)
        else:
            copied.tokenize(["a red circle", "a dog"]), copied.sample(images, evaluate_decoding(), [1, 2])
        assert digest(copied) == digest(model), "use has changed it"
    base = digest(generator)
    for changed in ({"steps": 9}, {"guidance_scale": 4.5}, {"lora": Lora()}):
        assert (
            digest(StableDiffusion(str(weights / "stable-diffusion"), **{"steps": 8, "guidance_scale": 4.0} | changed))
            != base
        )
    alphas = [digest(_with_alpha(weights, alpha)) for alpha in (8.0, 4.0)]
    assert alphas[0] != alphas[1], "the same weights, scaled otherwise"
    assert digest(Blip(str(weights / "blip"), prompt="a picture of ")) != digest(captioner)
    vocabulary = tmp_path / "moved" / "blip" / "tokenizer.json"
    text = json.loads(vocabulary.read_text())
    words = text["model"]["vocab"]
    a, b = list(words)[20:22]
    words[a], words[b] = words[b], words[a]
    vocabulary.write_text(json.dumps(text))
    assert digest(Blip(str(tmp_path / "moved" / "blip"))) != digest(captioner), "another tokenizer"


def _with_alpha(weights, alpha):
    from cyclefit.models import Lora, StableDiffusion

    torch.manual_seed(0)
    return StableDiffusion(str(weights / "stable-diffusion"), lora=Lora(alpha=alpha))


def evaluate_decoding():
    from cyclefit.models import Decoding

    return Decoding(max_new_tokens=4)


def test_a_digest_of_judges_and_of_shards(scorer, world, tmp_path):
    same = [Denoising(num_others=1), Denoising(num_others=1), Denoising(num_others=1, batch_size=3)]
    assert len({digest(judge) for judge in same}) == 1
    others = [ImageText(), Regeneration(), Regeneration(steps=3), Regeneration(scorer=scorer), Denoising()]
    assert len({digest(judge) for judge in (*others, same[0])}) == 6

    shutil.copytree(world / "test", tmp_path / "test")
    shards = sorted(tmp_path.glob("test/*.tar"))
    first = digest_of_shards(map(str, shards))
    assert digest_of_shards(sorted(map(str, world.glob("test/*.tar")))) == first
    (tmp_path / "test" / "manifest.json").unlink()
    assert digest_of_shards(map(str, shards)) == first, "by content, as the manifest has it"
    content = bytearray(shards[0].read_bytes())
    content[600] ^= 1
    shutil.copy(world / "test" / "manifest.json", tmp_path / "test")
    shards[0].write_bytes(content)
    assert digest_of_shards(map(str, shards)) != first, "a manifest that is older than its shard"


def test_each_decoding_and_judge_has_its_own_seconds(again, monkeypatch):
    """On a clock that only the work moves: what a row of the table costs is what its decoding and judge took."""
    from cyclefit import rerank
    from cyclefit.models import Blip

    now = [0.0]
    monkeypatch.setattr(rerank.time, "perf_counter", lambda: now[0])
    cost = {"greedy": 1.0, "beam": 3.0, "nucleus": 2.0}
    generate, started = Blip.generate, []

    def sampling(self, features, decoding, seeds):
        started.append(decoding.method)
        first = 100 * (started.count(decoding.method) == 1)  # whatever comes first is slow
        now[0] += len(features) * cost[decoding.method] * decoding.num_samples + first
        return generate(self, features, decoding, seeds)

    def judging(seconds):
        def score(self, partners, images, candidates, seeds, others=None):
            now[0] += seconds * sum(len(set(row)) for row in candidates)
            return torch.rand(len(candidates), len(candidates[0]))

        return score

    monkeypatch.setattr(Blip, "generate", sampling)
    monkeypatch.setattr(Denoising, "score", judging(5.0))
    monkeypatch.setattr(Regeneration, "score", judging(20.0))
    monkeypatch.setattr(ImageText, "score", judging(0.5))
    _, _, rows = again("captions")
    results = json.loads((again.folder / "captions" / "metrics.json").read_text())["splits"]["test"]["rows"]
    seconds = {(r["model"], r["decoding"], r["selection"]): r["seconds"] for r in results}
    for model in ("base", "run"):
        for decoding, expected in cost.items():
            assert seconds[model, decoding, "single"] == pytest.approx(expected, abs=1e-5)
    pools = {}
    for row in of(rows, "base"):
        if row["decoding"] == "nucleus":
            pools.setdefault(row["key"], set()).add(row["caption"])
    different = sum(map(len, pools.values())) / len(pools)
    each = {"image cycle": 20.0, "denoising": 5.0, "log denoising": 5.0, "image-text": 0.5}
    for judge, expected in (each | {"image cycle + image-text": 20.5}).items():
        assert seconds["base", "nucleus", judge] == pytest.approx(2 * 2.0 + expected * different, abs=1e-4), judge
    assert seconds["base", "nucleus", "oracle"] == pytest.approx(4.0, abs=1e-5)
