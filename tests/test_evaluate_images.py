import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cyclefit import evaluate
from cyclefit.data import evaluation_batches
from cyclefit.evaluate import Images
from cyclefit.evaluate.base import Inputs
from cyclefit.judges import ImageText, Partners, TextCycle
from cyclefit.metrics.facts import FactCheck
from cyclefit.metrics.images import inception_distances
from cyclefit.models import Decoding
from cyclefit.records import Candidate
from cyclefit.rerank import Drawing, rerank, sample_seed
from cyclefit.runs import load_run
from cyclefit.train import cli
from tests.conftest import ROOT

PROMPTS, COUNT = 8, 3
JUDGES = {"text cycle": TextCycle(), "image-text": ImageText()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """A plain run with a moving average, one with the cycle, and one of both models; a few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    configs = {
        "plain": ("miniature_sd_lora.yaml", {"model.ema_decay": 0.9}),
        "cycle": ("miniature_cycle_sd.yaml", {"model.cycle.num_images": 4}),
        "both": ("miniature_cycle_both.yaml", {"model.image_cycle.num_images": 4, "model.text_cycle.num_images": 4}),
    }
    for name, (config, more) in configs.items():
        patch.setattr(sys, "argv", ["train.py"])
        small = {"runs": folder, "name": name, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
        small |= {"data.train": world / "finetune", "data.validation": world / "validation", "data.validation_size": 20}
        small |= {"model.validation_images": 4, "model.generator.steps": 2, "data.batch_size": 4}
        small |= {"trainer.enable_progress_bar": "false", **more}
        cli.train(["--config", config, *[f"--{k}={v}" for k, v in small.items()]])
    patch.undo()
    return folder


def assess(folder, world, runs=(), **more):
    """Runs evaluate.py's own entry point on small numbers."""
    settings = {"limit": PROMPTS, "num_candidates": COUNT, "generator.steps": 2, "batch_size": 64} | more
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", ["evaluate.py"])
    patch.setenv("TORCH_HOME", str(folder.parent / "nothing"))
    arguments = [f"--{k}={v}" for k, v in settings.items()]
    shards = json.dumps({"test": str(world / "test")})
    try:
        code = evaluate.main(
            ["images", "--config", "miniature_evaluate_images.yaml", f"--shards={shards}", f"--out={folder}",
             f"--runs={json.dumps([str(run) for run in runs])}", *arguments]
        )  # fmt: skip
    finally:
        patch.undo()
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world, runs):
    return assess(tmp_path_factory.mktemp("images") / "whole", world, [runs / "plain", runs / "cycle"])


def candidates(folder):
    lines = (folder / "candidates-test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(row["model"], row["key"], row["index"]) for row in rows}) == len(rows)
    return {(row["model"], row["key"], row["index"]): row for row in rows}


def assert_same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        for field in ("prompt", "seed", "caption", "image", "of"):
            assert found[name][field] == row[field]
        for field in ("scores", "metrics"):
            assert found[name][field] == pytest.approx(row[field], abs=tolerance)


def table(folder):
    result = json.loads((folder / "metrics.json").read_text())["splits"]["test"]
    return result, {(row["model"], row["selection"]): row for row in result["rows"]}


def test_images_and_scores_do_not_depend_on_the_batch(generator, captioner, scorer, batch):
    seeds = [[sample_seed(f"{key}/{k}") for k in range(2)] for key in batch.keys]

    def made(size):
        drawn, captions = [], []
        for part in (slice(start, start + size) for start in range(0, len(seeds), size)):
            partners = Partners(scorer=scorer, captioner=captioner)
            drawn.append(rerank(generator, partners, JUDGES, batch.captions[part], Drawing(steps=2), seeds[part]))
            captions += partners.captions_of(drawn[-1].candidates, 30)
        scores = {name: torch.cat([d.scores[name] for d in drawn]) for name in JUDGES}
        return torch.cat([d.candidates for d in drawn]), captions, scores

    images, captions, scores = made(64)
    assert (images[:, 0] - images[:, 1]).abs().flatten(1).amax(1).min() > 0.05, "candidates of a prompt are alike"
    for size in (1, 7):
        found = made(size)
        torch.testing.assert_close(found[0], images, atol=1e-4, rtol=0)
        assert found[1] == captions
        torch.testing.assert_close(found[2], scores, atol=1e-4, rtol=0)


def test_the_judges_are_what_they_say(generator, captioner, scorer, batch):
    seeds, partners = [[sample_seed(key)] for key in batch.keys], Partners(scorer=scorer, captioner=captioner)
    made = rerank(generator, partners, JUDGES, batch.captions, Drawing(steps=2), seeds)
    captions = captioner.sample(made.candidates[:, 0], Decoding(), [0] * len(seeds))
    for i, prompt in enumerate(batch.captions):
        text, caption = scorer.embed_texts([prompt]), scorer.embed_texts(captions[i])
        assert made.scores["text cycle"][i].item() == pytest.approx((text * caption).sum().item(), abs=1e-5)
        image = scorer.embed_images(made.candidates[i])
        assert made.scores["image-text"][i].item() == pytest.approx((text * image).sum().item(), abs=1e-5)


def test_evaluation_end_to_end(whole, capsys):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["kind"] == "images"
    result, rows = table(whole)
    assert result["num_images"] == PROMPTS
    total = "text cycle + image-text"
    selections = ("single", "text cycle", "image-text", total, "oracle")
    assert set(rows) == {("base", s) for s in selections} | {("plain", "single"), ("cycle", "single")}
    found = candidates(whole)
    assert len(found) == PROMPTS * (COUNT + 2)
    keys = {key for _, key, _ in found}

    for selection, score in (
        ("single", lambda row: -row["index"]),
        ("text cycle", lambda row: row["scores"]["text cycle"]),
        ("image-text", lambda row: row["scores"]["image-text"]),
        (total, lambda row: row["scores"]["text cycle"] + row["scores"]["image-text"]),
        ("oracle", lambda row: row["metrics"]["image similarity (clip)"]),
    ):
        kept = [max((found["base", key, k] for k in range(COUNT)), key=score) for key in keys]
        checks = [FactCheck.read(row["facts"]) for row in kept]
        for name, entry in rows["base", selection]["metrics"].items():
            if name == "truth":
                right, stated = np.array([check.counts()["truth"] for check in checks]).sum(0)
                assert entry["value"] == pytest.approx(100 * right / stated)
                continue
            if name.startswith("CMMD"):  # of the whole set
                assert set(entry) == {"value"}
                continue
            assert entry["value"] == pytest.approx(np.mean([row["metrics"][name] for row in kept]), abs=1e-5)
            assert entry["low"] <= entry["value"] <= entry["high"]
    names = {f"{kind} ({label})" for label in ("clip", "clip-heldout")
             for kind in ("image similarity", "image-text similarity", "text similarity", "R@1", "R@5", "CMMD")
             }  # fmt: skip
    assert set(rows["base", "single"]["metrics"]) == names | {"CIDEr", "captioner NLL", "truth", "false images"}
    cost = rows["base", "text cycle"]
    assert (cost["generator_calls"], cost["denoiser_calls"]) == (COUNT, COUNT * 2 * 2)
    assert rows["cycle", "single"]["generator_calls"] == 1
    assert cost["seconds"] > rows["base", "oracle"]["seconds"] > rows["base", "single"]["seconds"] > 0

    curves = {(c["metric"], c["selection"]): c["values"] for c in result["rank_curves"]}
    measured = ("image similarity (clip-heldout)", "CIDEr")
    assert set(curves) == {(m, s) for m in measured for s in ("text cycle", "image-text", total)}
    for (metric, selection), values in curves.items():
        assert [v["rank"] for v in values] == [1, 2, 3]
        assert values[0]["value"] == pytest.approx(rows["base", selection]["metrics"][metric]["value"])

    pairs = {(d["a"], d["b"], d["metric"]): d for d in result["differences"]}
    for metric in (*measured, "image-text similarity (clip-heldout)"):
        for a, b in ((("cycle", "single"), ("plain", "single")), (("base", "text cycle"), ("base", "single"))):
            expected = rows[a]["metrics"][metric]["value"] - rows[b]["metrics"][metric]["value"]
            assert pairs[" · ".join(a), " · ".join(b), metric]["value"] == pytest.approx(expected)
    sentence = metrics["verdict"]["sentence"]
    gain = pairs["cycle · single", "plain · single", "truth"]
    assert metrics["verdict"]["better"] == (True if gain["low"] > 0 else False if gain["high"] < 0 else None)
    assert f"truth {gain['b_value']:.1f} to {gain['a_value']:.1f}" in sentence

    page = (whole / "report.html").read_text()
    assert "data:image/webp;base64," in page
    assert "images drawn" in page
    assert "8 prompts" in page
    assert ">decoding<" not in page
    prompt = found["base", min(keys), 0]["prompt"]
    assert f"<li><b>{prompt}</b></li>" in page
    assert (whole / "table-test.csv").exists()


def test_fid_says_why_it_is_not_there(whole):
    note = json.loads((whole / "metrics.json").read_text())["metadata"]["FID"]
    assert note.startswith("not computed, because the weights of the Inception network are missing; `pip install")
    assert "not computed, because the weights" in (whole / "report.html").read_text()


def test_every_candidate_is_drawn_from_its_own_seed_and_measured(whole, world, generator, captioner, scorer):
    rows = [row for (model, _, _), row in candidates(whole).items() if model == "base"]
    stream = evaluation_batches(str(world / "test"), image_size=32, batch_size=PROMPTS, limit=PROMPTS)
    batch = next(iter(stream))
    place = {key: i for i, key in enumerate(batch.keys)}
    texts, sources = scorer.embed_texts(batch.captions), scorer.embed_images(batch.images)
    for row in rows:
        i = place[row["key"]]
        assert row["prompt"] == batch.captions[i]
        assert row["seed"] == sample_seed(f"{row['key']}/{row['index']}", 0)
        drawn = generator.generate([row["prompt"]], [row["seed"]], steps=2, guidance_scale=3.0)
        with Image.open(whole / row["image"]) as picture:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        assert pixels.shape == (3, 32, 32)
        torch.testing.assert_close(pixels, drawn[0], atol=0.5 / 255 + 1e-4, rtol=0)
        embedded = scorer.embed_images(drawn)
        metrics = {name: value for name, value in row["metrics"].items() if "heldout" not in name}
        similarities = (embedded @ texts.T)[0]
        rank = int((similarities > similarities[i]).sum())
        tokens = captioner.tokenize([row["prompt"]])
        nll = -captioner.log_prob(captioner.embed(drawn), tokens) / tokens.shape[1]
        assert metrics["image similarity (clip)"] == pytest.approx((embedded[0] @ sources[i]).item(), abs=1e-4)
        assert metrics["image-text similarity (clip)"] == pytest.approx(row["scores"]["image-text"], abs=1e-4)
        assert metrics["text similarity (clip)"] == pytest.approx(row["scores"]["text cycle"], abs=1e-4)
        assert metrics["captioner NLL"] == pytest.approx(nll.item(), abs=1e-3)
        assert (metrics["R@1 (clip)"], metrics["R@5 (clip)"]) == (100 * (rank < 1), 100 * (rank < 5))


@pytest.mark.parametrize(("batch_size", "together"), [(1, 2), (7, 5)])
def test_the_batch_size_changes_nothing(whole, world, tmp_path, batch_size, together):
    more = {"batch_size": batch_size, "generator.batch_size": together}
    found = candidates(assess(tmp_path / "small", world, **more))
    expected = {name: row for name, row in candidates(whole).items() if name[0] == "base"}
    assert_same(found, expected)


def test_an_interrupted_evaluation_continues_where_it_stopped(whole, world, runs, tmp_path, monkeypatch):
    real, drawn = Images.sample, []

    def dies(*arguments):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(arguments[4]))
        return real(*arguments)

    models, more = [runs / "plain", runs / "cycle"], {"batch_size": 3}
    monkeypatch.setattr(Images, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        assess(tmp_path / "part", world, models, **more)
    assert drawn == [1, 3]  # a warm-up, and a batch
    with (tmp_path / "part" / "candidates-test.jsonl").open("a") as file:
        file.write('{"key": "torn')  # a write that the kill cut off
    monkeypatch.setattr(Images, "sample", lambda *a: drawn.append(len(a[4])) or real(*a))
    part = assess(tmp_path / "part", world, models, **more)
    assert sum(drawn) == 3 * PROMPTS + 4, "work was repeated or lost"
    assert_same(candidates(part), candidates(whole))


def test_a_generator_is_loaded_with_its_weights(runs, generator, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, prefix in (("cycle", "generator."), ("both", "generator.")):
        state = torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        trained, config = load_run(runs / name, which="generator")
        values = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        assert values
        for key, value in values.items():
            assert torch.equal(trained.get_parameter(key), value)
        assert any(value.abs().max() > 0 for key, value in values.items() if "lora_B" in key), "nothing was trained"
        assert config["steps"] == 2
    drawn = [
        model.generate(["a red circle"], [3], 2)
        for model in (generator, load_run(runs / "cycle", which="generator")[0])
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 0


def test_the_moving_average_is_what_is_evaluated(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    state = torch.load(runs / "plain" / "checkpoints" / "last.ckpt", weights_only=True)
    trained, _ = load_run(runs / "plain", which="generator")
    differ = 0
    for (key, last), average in zip(state["state_dict"].items(), state["ema"]["shadow_params"], strict=True):
        assert torch.equal(trained.get_parameter(key.removeprefix("generator.")), average)
        differ += not torch.equal(last, average)
    assert differ


def test_a_captioner_of_both_models_is_loaded_too(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    state = torch.load(runs / "both" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained, _ = load_run(runs / "both")
    values = {key: value for key, value in state.items() if key.startswith("captioner.")}
    assert values
    for key, value in values.items():
        assert torch.equal(trained.get_parameter(key.removeprefix("captioner.")), value)


def test_mistakes_are_named(runs, world, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"cycle did not finetune a captioner: .*cyclefit evaluate images"):
        load_run(runs / "cycle")
    captioning = tmp_path / "captioning"
    (captioning / "checkpoints").mkdir(parents=True)
    (captioning / "config.yaml").write_text((runs / "both" / "config.yaml").read_text())
    state = torch.load(runs / "both" / "checkpoints" / "last.ckpt", weights_only=True)
    state["state_dict"] = {k: v for k, v in state["state_dict"].items() if not k.startswith("generator.")}
    torch.save(state, captioning / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"captioning did not finetune a generator: .*cyclefit evaluate captions"):
        assess(tmp_path / "out", world, [captioning])
    with pytest.raises(ValueError, match=r"the name of the run .*cycle is taken"):
        assess(tmp_path / "out", world, [runs / "cycle", runs / "cycle"])
    with pytest.raises(ValueError, match="the held-out scorer is clip, as the scorer is"):
        assess(tmp_path / "out", world, **{"held_out.model": "src/cyclefit/miniature/weights/clip"})


def test_inception_distances():
    random = np.random.default_rng(0)
    real = random.normal(size=(400, 6)) @ random.normal(size=(6, 6))
    drawn = random.normal(1, 2, size=(300, 6))
    covariance = np.cov(real.T), np.cov(drawn.T)
    root = np.sqrt(np.linalg.eigvals(covariance[0] @ covariance[1]).real.clip(0)).sum()
    fid = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(covariance[0] + covariance[1]) - 2 * root
    kernels = [(a @ b.T / 6 + 1) ** 3 for a, b in ((real, real), (drawn, drawn), (real, drawn))]
    found = inception_distances(torch.tensor(real), torch.tensor(drawn))
    assert found["FID"] == pytest.approx(fid, rel=1e-6)
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2])
    assert found["KID"] == pytest.approx(within - 2 * kernels[2].mean(), rel=0.3)
    assert found == inception_distances(torch.tensor(real), torch.tensor(drawn))
    same = inception_distances(torch.tensor(real), torch.tensor(real))
    assert same["FID"] == pytest.approx(0, abs=1e-6)


def test_a_further_metric_that_is_left_out_leaves_the_candidates(captioner, generator, scorer):
    evaluation = Images(generator, captioner, scorer, shards={})
    one = Candidate("key", "base", 0, "a red circle", 1, metrics={"captioner NLL": 1.5, "commas": 3.0})
    with pytest.warns(UserWarning, match="CIDEr over 1 images"):
        evaluation.measure([one], Inputs("test", {"key": ["a red circle"]}))
    assert one.metrics == {"CIDEr": 0.0, "captioner NLL": 1.5}
