import csv
import json
import re
import shutil
import sys
import threading
from html import escape

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from cyclefit import evaluate
from cyclefit.data import evaluation_batches
from cyclefit.evaluate import Captions
from cyclefit.judges import Denoising, ImageText, Partners, Regeneration
from cyclefit.metrics.aggregation import CaptionMetrics
from cyclefit.metrics.java import Java
from cyclefit.models import Decoding, OpenClip
from cyclefit.records import Difference
from cyclefit.report.tables import reading
from cyclefit.rerank import rerank, sample_seed, with_others
from cyclefit.runs import load_run
from cyclefit.train import cli
from tests.conftest import ROOT

JUDGES = {"image cycle": Regeneration(steps=3), "contrastive": Denoising(num_others=2), "image-text": ImageText()}


def reranked(captioner, partners, world, batch_size, count=24):
    """Captions and scores of the first validation images, by key."""
    found = {}
    stream = evaluation_batches(str(world / "validation"), image_size=32, batch_size=batch_size, limit=count)
    for batch, others in with_others(stream, 2):
        seeds = [sample_seed(key) for key in batch.keys]
        made = rerank(captioner, partners, JUDGES, batch.images, [Decoding(), Decoding("nucleus", 4)], seeds, others)
        for i, key in enumerate(batch.keys):
            found[key] = made.candidates[i], {name: scores[i] for name, scores in made.scores.items()}
    return found


def test_results_do_not_depend_on_the_batch_size(captioner, generator, scorer, world):
    partners = Partners(generator, scorer)
    expected = reranked(captioner, partners, world, 24)
    for batch_size in (1, 7):
        found = reranked(captioner, partners, world, batch_size)
        assert found.keys() == expected.keys()
        for key, (captions, scores) in expected.items():
            assert found[key][0] == captions
            for name, values in scores.items():
                torch.testing.assert_close(found[key][1][name], values, atol=2e-4, rtol=0)


def test_a_caption_has_the_score_that_the_judge_gives_it(captioner, generator, scorer, batch):
    seeds = [sample_seed(key) for key in batch.keys]
    made = rerank(
        captioner,
        Partners(generator, scorer),
        {"image-text": ImageText()},
        batch.images,
        [Decoding("nucleus", 5)],
        seeds,
    )
    places = made.scores["image-text"].argmax(1).tolist()
    texts = scorer.embed_texts([row[place] for row, place in zip(made.candidates, places, strict=True)])
    best = (scorer.embed_images(batch.images) * texts).sum(1)
    torch.testing.assert_close(best, made.scores["image-text"].max(1).values, atol=1e-5, rtol=0)


def test_others_are_never_the_image_itself(world):
    stream = evaluation_batches(str(world / "validation"), image_size=32, batch_size=5, limit=30)
    for batch, others in with_others(stream, 3):
        assert others.shape == (len(batch), 3, 3, 32, 32)
        assert ((others - batch.images[:, None]).abs().flatten(2).amax(2) > 0).all()
    few = evaluation_batches(str(world / "validation"), image_size=32, batch_size=5, limit=2)
    with pytest.raises(ValueError, match="more than the 2 images"):
        next(with_others(few, 3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """A plainly finetuned run and one with the cycle, two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    for name, config in {"plain": "miniature_blip.yaml", "cycle": "miniature_cycle_blip_reward.yaml"}.items():
        patch.setattr(sys, "argv", ["train.py"])
        small = {"runs": folder, "name": name, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
        small |= {"data.train": world / "finetune", "data.validation": world / "validation", "data.validation_size": 20}
        small |= {"model.round_trip_images": 0, "trainer.enable_progress_bar": "false"}
        cli.train(["--config", config, *[f"--{k}={v}" for k, v in small.items()]])
    patch.undo()
    return folder


@pytest.fixture
def assess(runs, world, tmp_path, monkeypatch):
    """Runs evaluate.py's own entry point on small numbers."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])

    def run(out="evaluation", **more):
        settings = {
            "limit": 24,
            "num_candidates": 3,
            "gallery": 6,
            "generator.steps": 2,
            "batch_size": 9,
            "java": "false",
        } | more
        arguments = [f"--{k}={v}" for k, v in settings.items()]
        folder = tmp_path / out
        splits = json.dumps({name: str(world / name) for name in ("test", "novel")})
        code = evaluate.main(
            ["captions", "--config", "miniature_evaluate.yaml", f"--shards={splits}", f"--out={folder}",
             f"--runs={json.dumps([str(runs / 'plain'), str(runs / 'cycle')])}", *arguments]
        )  # fmt: skip
        assert code == 0
        return folder

    return run


def candidates(folder, split="test"):
    lines = (folder / f"candidates-{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    keep = ("caption", "scores", "metrics", "image")
    places = [tuple(row[k] for k in ("model", "key", "decoding", "index")) for row in rows]
    return {place: {k: row.get(k) for k in keep} for place, row in zip(places, rows, strict=True)}


def test_evaluation_end_to_end(assess, drawn_figures, monkeypatch, capsys):
    drawing, meteor, draw = threading.Event(), Java.meteor, Captions._draw_gallery

    def waits(self, *arguments):
        assert drawing.wait(60), "Java measures while the gallery is drawn"
        return meteor(self, *arguments)

    def draws(self, *arguments):
        drawing.set()
        draw(self, *arguments)

    monkeypatch.setattr(Java, "meteor", waits)
    monkeypatch.setattr(Captions, "_draw_gallery", draws)
    folder = assess(java="true")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["models"]) == {"base", "plain", "cycle"}
    for split in ("test", "novel"):
        result = metrics["splits"][split]
        assert result["num_images"] == 24
        rows = {(r["model"], r["decoding"], r["selection"]): r for r in result["rows"]}
        single = {(m, d, "single") for m in metrics["models"] for d in ("greedy", "beam", "nucleus")}
        judged = {*evaluate.JUDGES, "image cycle + image-text"}
        picked = {("base", "nucleus", s) for s in (*judged, "oracle")}
        assert set(rows) == single | picked
        oracle = rows["base", "nucleus", "oracle"]["metrics"]["CIDEr"]["value"]
        assert all(oracle >= rows[k]["metrics"]["CIDEr"]["value"] for k in picked)
        for row in rows.values():
            c = row["metrics"]["CIDEr"]
            assert c["low"] <= c["value"] <= c["high"]
        cycle = rows["base", "nucleus", "image cycle"]
        assert 0 < cycle["generator_calls"] <= 3
        assert cycle["denoiser_calls"] == pytest.approx(4 * cycle["generator_calls"], abs=0.5)
        assert rows["base", "nucleus", "image-text"]["denoiser_calls"] == 0
        assert {c["selection"] for c in result["rank_curves"]} == judged
        assert all([v["rank"] for v in c["values"]] == [1, 2, 3] for c in result["rank_curves"])
        assert {(g["a"], g["b"]) for g in result["gains"]} == {
            (f"base · {judge}", "base · nucleus") for judge in judged
        }
        assert {c["selection"] for c in result["count_curves"]} == {*judged, "oracle"}
        assert all([v["n"] for v in c["values"]] == [1, 2, 3] for c in result["count_curves"])
        for name, most in {"CLIPScore": 2.5, "RefCLIPScore": 10 / 7, "R@1": 100, "R@10": 100, "distinct-2": 1}.items():
            assert all(0 <= row["metrics"][name]["value"] <= most for row in rows.values()), name
        hits = [rows["base", "greedy", "single"]["metrics"][f"R@{k}"]["value"] for k in (1, 5, 10)]
        assert 100 * 5 / 24 < hits[0] <= hits[1] <= hits[2]  # chance is 1 / 24
        assert 1 < rows["base", "nucleus", "single"]["metrics"]["self-BLEU"]["value"] < 100
        if shutil.which("java"):
            values = [row["metrics"]["METEOR"]["value"] for row in rows.values()]
            assert 1 < min(values) < max(values) < 100
        else:
            assert "no `java`" in metrics["metadata"]["METEOR"]
        assert result["differences"][0]["a"] == "cycle · nucleus"
        assert result["differences"][0]["b"] == "plain · nucleus"
    rows = candidates(folder)
    assert len(rows) == 24 * (5 + 3 + 3)
    shown = [row["image"] for row in rows.values() if row["image"]]
    assert shown
    assert all((folder / path).exists() for path in shown)
    page = (folder / "report.html").read_text()
    assert metrics["verdict"]["sentence"] in page
    came_out = page[page.index("<b>Result</b>") : page.index("<b>Cost</b>")]
    for split in ("test", "novel"):
        assert f"24 images of {split}, one nucleus sample" in metrics["verdict"]["sentence"]
        for decoding in ("nucleus", "greedy"):
            pair = (f"cycle · {decoding}", f"plain · {decoding}")
            row = next(d for d in metrics["splits"][split]["differences"] if (d["a"], d["b"]) == pair)
            assert escape(reading(Difference(**row))) in came_out, (split, decoding)
    assert "data:image/webp;base64," in page
    said = capsys.readouterr().out
    assert "oracle" in said
    assert "report.html" in said
    check_scale(folder, metrics["splits"]["test"], said)


def check_scale(folder, result, said):
    """A number is the same in every file, on the page and on the terminal."""
    row = result["rows"][0]
    value = row["metrics"]["CIDEr"]["value"]
    assert 50 < value < 400, "as papers print it"
    with (folder / "table-test.csv").open(newline="") as file:
        written = next(csv.DictReader(file))
    assert (written["model"], written["decoding"]) == (row["model"], row["decoding"]) == ("base", "greedy")
    assert float(written["CIDEr"]) == pytest.approx(value)
    with (folder / "figures" / "test-comparison-CIDEr.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["value"]) == pytest.approx(value)
    greedy = [r["metrics"] for (m, _, d, _), r in candidates(folder).items() if (m, d) == ("base", "greedy")]
    assert np.mean([metrics["CIDEr"] for metrics in greedy]) == pytest.approx(value, abs=1e-3)
    texts = [r["caption"] for (m, _, d, _), r in candidates(folder).items() if (m, d) == ("base", "greedy")]
    references = json.loads((folder / "references-test.json").read_text())
    validation = CaptionMetrics()  # what training logs as val/CIDEr
    validation.update(texts, list(references.values()))
    assert validation.compute()["CIDEr"] == pytest.approx(value, abs=1e-3)
    for text in (said, (folder / "report.html").read_text()):
        assert f"{value:.1f}" in text


def test_an_interrupted_evaluation_continues_where_it_stopped(assess, monkeypatch):
    small = {"limit": 12, "batch_size": 5}
    whole = assess("whole", **small)
    real, seen = Captions.sample, []

    def dies(*arguments):
        seen.append(len(arguments[4]))
        if len(seen) == 6:  # base on test: a warm-up and three batches; another warm-up
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Captions, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        assess("part", **small)
    table = next(path for path in (whole.parent / "part").glob("candidates-test.jsonl"))
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(rows[:-1]) + rows[-1][:20])  # a write that the kill cut off: one sample is short of a row
    again = []
    monkeypatch.setattr(Captions, "sample", lambda *a: again.append(len(a[4])) or real(*a))
    part = assess("part", **small)
    total, warm_ups = 2 * 3 * 12, 6
    assert sum(again) == total - 12 + 1 + warm_ups, "work was repeated or lost"
    found, expected = candidates(part), candidates(whole)
    assert found.keys() == expected.keys()
    for place, row in found.items():
        for name, value in row.items():  # scores to what the size of a batch changes
            assert value == (
                pytest.approx(expected[place][name], abs=2e-4) if isinstance(value, dict) else expected[place][name]
            )
    first, second = (
        json.loads((f / "metrics.json").read_text())["splits"]["test"]["rank_curves"] for f in (whole, part)
    )
    for left, right in zip(first, second, strict=True):
        assert [v["value"] for v in left["values"]] == pytest.approx([v["value"] for v in right["values"]], abs=1e-3)


def test_a_run_that_is_none_lists_those_beside_it(assess, runs, capsys):
    with pytest.raises(FileNotFoundError, match=r"is not a run .*runs in the same folder: .*plain"):
        load_run(runs / "plane")
    with pytest.raises(FileNotFoundError, match=r"best2\.ckpt does not exist"):
        load_run(runs / "plain", "best2")


def test_a_run_is_loaded_with_its_weights(runs, captioner, monkeypatch):
    monkeypatch.chdir(ROOT)
    trained, config = load_run(runs / "cycle")
    state = torch.load(runs / "cycle" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in state.items():
        assert torch.equal(tensor, trained.get_parameter(name.removeprefix("captioner.")))
    assert config["steps"] == 2
    before = captioner.model.text_decoder.bert.encoder.layer[0].crossattention.self.query.weight
    assert not torch.equal(before, trained.model.text_decoder.bert.encoder.layer[0].crossattention.self.query.weight)


def test_the_settings_are_printed_on_request(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["captions", "--config", "miniature_evaluate.yaml", "--print_config"])
    assert not ended.value.code
    assert yaml.safe_load(capsys.readouterr().out)["generator"]["init_args"]["steps"] == 8


def test_evaluation_configs_name_their_command():
    for path in (ROOT / "configs").glob("*evaluate*.yaml"):
        text = path.read_text()
        if path.name == "miniature_modern_evaluate.yaml":  # the models of a pair, for both commands
            assert re.search(rf"evaluate.py captions --config miniature_evaluate.yaml --config {path.name}", text)
            assert re.search(rf"evaluate.py images --config miniature_evaluate_images.yaml --config {path.name}", text)
            continue
        command = next((name for name in ("images", "judges") if name in path.name), "captions")
        assert re.search(rf"python evaluate.py {command} --config {path.name}", text)
        inputs = {"benchmarks", "scorers"} if command == "judges" else {"shards", "scorer"}
        assert set(yaml.safe_load(text)) >= {"captioner", "generator", *inputs}


ABLATIONS = sorted(path.name for path in (ROOT / "configs").glob("*ablation*.yaml"))


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_one_command(name, tmp_path, world, monkeypatch, weights):
    """On top of the evaluation's own configuration, as the file's head says; smaller here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    content = yaml.safe_load((ROOT / "configs" / name).read_text())
    head = (ROOT / "configs" / name).read_text().splitlines()[1]
    assert re.fullmatch(rf"#   python evaluate.py captions --config \w*evaluate\w*.yaml --config {name}", head)
    if name == "ablation_scorers.yaml":
        text = (ROOT / "configs" / name).read_text().replace("          pretrained: openai\n", "")
        for model, folder in (("ViT-L-14-quickgelu", "clip"), ("ViT-B-32-quickgelu", "clip-heldout")):
            text = text.replace(model, str(weights / folder))
        name = str(tmp_path / name)
        (tmp_path / "ablation_scorers.yaml").write_text(text)
    shards = json.dumps({"test": str(world / "test")})
    small = {"limit": 8, "gallery": 2, "generator.steps": 2, "batch_size": 8, "java": "false", "out": tmp_path / "out"}
    if "judges" in content:
        small |= {"num_candidates": 2}
    arguments = [f"--{k}={v}" for k, v in small.items()]
    code = evaluate.main(
        ["captions", "--config", "miniature_evaluate.yaml", "--config", name, f"--shards={shards}", *arguments]
    )
    assert code == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]["test"]
    chosen = {row["selection"] for row in result["rows"]}
    if "judges" in content:
        assert set(content["judges"]) == chosen - {"single", "oracle"}
        ours = {title: judge["init_args"] for title, judge in content["judges"].items()}
        costs = {row["selection"]: row["denoiser_calls"] / row["generator_calls"] for row in result["rows"]
                 if row["selection"] in ours}  # fmt: skip
        for title, arguments in ours.items():
            if "steps" in arguments:
                assert costs[title] == pytest.approx(2 * arguments["steps"], rel=0.1)  # with guidance, two calls a step
    else:
        assert {"image cycle", "image-text", "image cycle + image-text"} < chosen
    if "num_candidates" in content:
        assert [v["n"] for v in result["count_curves"][0]["values"]] == [1, 2, 4, 8, 16, 32]
    if "min_new_tokens" in content:
        words = [row["metrics"]["words"]["value"] for row in result["rows"]]
        assert min(words) >= 8


def test_images_are_compared_as_the_judge_says(captioner, generator, scorer, batch, weights):
    held_out = OpenClip(str(weights / "clip-heldout"))
    candidates = [["a red circle", "a blue square"]] * len(batch)
    seeds = list(range(len(batch)))
    drawn = generator.generate(
        [text for row in candidates for text in row], [s for s in seeds for _ in range(2)], steps=2
    )
    for own in (scorer, held_out):
        for euclidean in (False, True):
            judge = Regeneration(steps=2, scorer=None if own is scorer else own, euclidean=euclidean)
            found = judge.score(Partners(generator, scorer), batch.images, candidates, seeds)
            left, right = (own.model.encode_image((F.interpolate(x, own.image_size) - own.image_mean) / own.image_std)
                           for x in (batch.images.repeat_interleave(2, 0), drawn))  # fmt: skip
            expected = -(left - right).norm(dim=-1) if euclidean else F.cosine_similarity(left, right)
            torch.testing.assert_close(found.flatten(), expected.detach(), atol=2e-3, rtol=1e-3)
