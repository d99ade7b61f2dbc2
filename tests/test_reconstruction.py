"""Images redrawn or drawn, under scorers of images alone; distances between whole sets of images."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from cyclefit import UserError, evaluate, records
from cyclefit.evaluate import Images
from cyclefit.metrics.images import cmmd
from cyclefit.models import OpenClip, TransformersScorer
from cyclefit.report.tables import best_value, lower_is_better
from tests.conftest import ROOT

REDRAWN = "image similarity (DINOv2)"
SNIPPETS = [
    yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.S)
]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A small DINOv2 of transformers' own class, with the image processor that it is published with."""
    folder = tmp_path_factory.mktemp("models") / "dino"
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=28).save_pretrained(folder)
    return folder


def assess(kind, world, folder, settings, monkeypatch, **more):
    """evaluate.py on a few inputs, with a second config."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    monkeypatch.setenv("TORCH_HOME", str(folder / "nothing"))
    second = folder.with_suffix(".yaml")
    second.write_text(yaml.safe_dump(settings))
    config = {"captions": "miniature_evaluate.yaml", "images": "miniature_evaluate_images.yaml"}[kind]
    small = {"limit": 4, "num_candidates": 2, "generator.steps": 2, "batch_size": 4, "out": folder}
    small |= {"shards": json.dumps({"test": str(world / "test")})} | more
    assert (
        evaluate.main([kind, f"--config={config}", f"--config={second}", *[f"--{k}={v}" for k, v in small.items()]])
        == 0
    )
    return records.read_evaluation(folder).splits["test"], records.read_candidates(folder / "candidates-test.jsonl")


def picture(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def test_captions_are_measured_by_their_redrawn_images(dino, world, launch, tmp_path, monkeypatch):
    [settings] = [found for found in SNIPPETS if "judges" in found]
    settings["judges"][REDRAWN]["init_args"]["scorer"]["init_args"]["pretrained"] = str(dino)
    run = launch("miniature_blip.yaml", "plain")
    runs = json.dumps([str(run), str(launch("miniature_cycle_blip_reward.yaml", "cycle"))])
    split, candidates = assess(
        "captions", world, tmp_path / "out", settings, monkeypatch, runs=runs, java="false", gallery=4
    )  # fmt: skip
    scorer, shown = TransformersScorer(str(dino)), [one for one in candidates if one.image]
    assert {one.model for one in shown} == {"base", "plain", "cycle"}
    for one in shown:
        pair = [picture(tmp_path / "out" / name) for name in (f"images/test/source/{one.key}.png", one.image)]
        expected = scorer.embed_images(torch.cat(pair))
        assert one.metrics[REDRAWN] == pytest.approx((expected[0] @ expected[1]).item(), abs=2e-3)
    assert len({one.metrics[REDRAWN] for one in shown}) > 3
    rows = {row.name: row.metrics[REDRAWN] for row in split.rows}
    assert {"plain · greedy", "cycle · nucleus", "base · beam", f"base · {REDRAWN}"} <= rows.keys()
    assert all(of.low <= of.value <= of.high for of in rows.values())
    best = max(rows, key=lambda name: rows[name].value if name.startswith("base · ") else -1)
    assert rows[f"base · {REDRAWN}"].value >= rows["base · nucleus"].value, best
    compared = [(of.a, of.b) for of in split.differences if of.metric == REDRAWN]
    assert ("cycle · greedy", "plain · greedy") in compared
    assert len(compared) == len(set(compared))


def test_images_are_measured_by_further_scorers(dino, world, weights, tmp_path, monkeypatch):
    [settings] = [found for found in SNIPPETS if "further_scorers" in found]
    first, second = settings["further_scorers"]
    assert second["init_args"]["model"] in __import__("open_clip").list_models()
    first["init_args"]["pretrained"], settings["further_scorers"] = str(dino), [first]
    split, candidates = assess("images", world, tmp_path / "out", settings, monkeypatch)
    scorer = TransformersScorer(str(dino))
    embedded = {}
    for one in candidates:
        pair = [picture(tmp_path / "out" / name) for name in (f"images/test/source/{one.key}.png", one.image)]
        embedded[one.key, one.index] = expected = scorer.embed_images(torch.cat(pair))
        assert one.metrics["image similarity (dino)"] == pytest.approx((expected[0] @ expected[1]).item(), abs=2e-3)
        assert [name for name in one.metrics if name.endswith("(dino)")] == ["image similarity (dino)"]
        assert {"R@1 (clip)", "text similarity (clip-heldout)"} <= one.metrics.keys()
    rows = {row.name: row.metrics for row in split.rows}
    real, drawn = (torch.stack([pair[i] for (_, k), pair in embedded.items() if k == 0]) for i in (0, 1))
    found = rows["base · single"]["CMMD (dino)"]
    assert found.value == pytest.approx(published_cmmd(real.numpy(), drawn.numpy()), abs=1e-3)
    assert (found.low, found.high) == (None, None)
    for label in ("clip", "clip-heldout"):
        assert rows["base · single"][f"CMMD ({label})"].value > 0
    assert ("base · text cycle", "base · single", "image similarity (dino)") in {
        (of.a, of.b, of.metric) for of in split.differences
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Under dino" in page and "distance between the scorer" in page


def published_cmmd(x, y):
    """As the authors' distance.py has it: the means of three matrices, in one piece."""
    gamma = 1 / (2 * 10**2)

    def kernel(a, b):
        return np.exp(-gamma * (-2 * a @ b.T + np.diag(a @ a.T)[:, None] + np.diag(b @ b.T)[None])).mean()

    x, y = x.astype(float), y.astype(float)
    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_cmmd_is_as_published():
    random = np.random.default_rng(0)
    for n, m in ((1, 1), (7, 5), (1500, 300)):
        x, y = random.normal(size=(n, 12)), random.normal(0.3, 1, size=(m, 12))
        x, y = (of / np.linalg.norm(of, axis=1, keepdims=True) for of in (x, y))
        assert cmmd(torch.tensor(x), torch.tensor(y)) == pytest.approx(published_cmmd(x, y), abs=1e-9)
        assert cmmd(torch.tensor(x), torch.tensor(x)) == pytest.approx(0, abs=1e-9)
        single = cmmd(*(torch.tensor(of, dtype=torch.float32) for of in (x, y)))
        assert single == pytest.approx(published_cmmd(x, y), abs=1e-5)
    # Two opposite points: 1000 (1 + 1 - 2 exp(-4 / 200)).
    assert cmmd(torch.tensor([[1.0]]), torch.tensor([[-1.0]])) == pytest.approx(39.602653, abs=1e-6)


def test_less_cmmd_is_better():
    assert lower_is_better("CMMD (clip)") and lower_is_better("FID") and not lower_is_better("image similarity (clip)")
    rows = [records.Row(name, {"CMMD (clip)": records.Estimate(value)}) for name, value in (("a", 2.0), ("b", 1.0))]
    assert best_value(rows, "CMMD (clip)") == 1


def test_scorers_in_the_wrong_place_are_named(dino, captioner, generator, scorer, weights):
    alone = TransformersScorer(str(dino))
    models = {"generator": generator, "captioner": captioner, "shards": {}}
    with pytest.raises(UserError, match="held_out: dino embeds no texts: give a CLIP, and this one in further_scorers"):
        Images(**models, scorer=scorer, held_out=alone)
    with pytest.raises(UserError, match="further_scorers: clip is given twice: leave it out"):
        Images(**models, scorer=scorer, further_scorers=[OpenClip(str(weights / "clip"))])
    evaluation = Images(**models, scorer=scorer, further_scorers=[alone])
    assert evaluation.quality == "image similarity (clip)"
    evaluation.limit = None
    assert set(evaluation.depends("base", generator)) >= {"dino", "scorer"}
    assert "dino" not in Images(**models, scorer=scorer).depends("base", generator)
