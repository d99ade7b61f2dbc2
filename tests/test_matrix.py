"""Every captioner with every generator, through evaluate.py's own entry point."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cyclefit import UserError, evaluate
from cyclefit.evaluate.cells import Counts, interaction
from cyclefit.evaluate.matrix import parse_part
from cyclefit.metrics.facts import check
from cyclefit.models import Blip, OpenClip, StableDiffusion, StableDiffusion3, VisionLanguage
from cyclefit.records import Estimate
from cyclefit.report.matrix import TO_EACH_OTHER, TO_SOURCE, Cells, Direction, heat_map
from cyclefit.report.tables import NONE
from tests.conftest import ROOT
from tests.probes import ended, forked

INPUTS = 6
SIMILARITY = "similarity (clip-heldout)"
METHODS = {Blip: "sample", VisionLanguage: "sample", StableDiffusion: "generate", StableDiffusion3: "generate",
           OpenClip: "embed_images"}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory, world):
    """The miniature's config on small numbers, changed as a test asks."""
    folder = tmp_path_factory.mktemp("configs")

    def write(name, **changes):
        content = yaml.safe_load((ROOT / "configs" / "miniature_matrix.yaml").read_text())
        content |= {"shards": {"test": str(world / "test")}, "limit": INPUTS, "batch_size": 4, "gallery": 2}
        for generator in content["generators"].values():
            generator["init_args"]["steps"] = 2
        for keys, value in changes.items():
            *above, last = keys.split("__")
            inner = content
            for key in above:
                inner = inner[key]
            inner[last] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def assess(config, folder, *more):
    """What was made: the captions by captioner's class, the images by generator's class, and the images embedded."""
    made = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["evaluate.py"])
        for kind, name in METHODS.items():

            def counted(self, given, *rest, of=kind.__name__, method=getattr(kind, name)):  # noqa: B008
                made[of] += len(given)
                return method(self, given, *rest)

            patch.setattr(kind, name, counted)
        assert evaluate.main(["matrix", "--config", str(config), f"--out={folder}", *more]) == 0
    return made


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an evaluation in one go, and what was made for it."""
    folder = tmp_path_factory.mktemp("matrix") / "whole"
    return folder, assess(config("whole"), folder)


def cells(folder):
    """Values by direction, metric, row and column."""
    directions = json.loads((folder / "metrics.json").read_text())["splits"]["test"]["directions"]
    return {
        (direction, metric, row, column): cell["value"]
        for direction, of in directions.items()
        for metric, table in of["metrics"].items()
        for row, columns in table["cells"].items()
        for column, cell in columns.items()
    }


def everything(folder):
    """All captions and measurements, and all pixels."""
    lines = [line for path in folder.glob("parts/*/made.rank*.jsonl") for line in path.read_text().splitlines()]
    pixels = {str(path.relative_to(folder)): Image.open(path).tobytes() for path in folder.glob("images/**/*.png")}
    return dict(json.loads(line) for line in lines if line), pixels


def test_everything_is_made_once(whole):
    """Of two captioners and two generators: a caption of the source, an image of the prompt, both for both others."""
    folder, made = whole
    assert made["Blip"] == made["VisionLanguage"] == INPUTS * (1 + 2)
    assert made["StableDiffusion"] == made["StableDiffusion3"] == INPUTS * (1 + 2)
    assert made["OpenClip"] == INPUTS * (1 + 4)
    assert len(list(folder.glob("images/**/*.png"))) == INPUTS * (1 + 2 + 4)


def test_cells_are_what_the_files_say(whole, world, weights):
    """Similarities and truth of a cell, computed again from the images and from captions of them."""
    from cyclefit.data import evaluation_batches
    from cyclefit.metrics.captions import References
    from cyclefit.metrics.reader import SceneReader

    folder, _ = whole
    batch = next(iter(evaluation_batches(str(world / "test"), image_size=32, batch_size=INPUTS)))
    scorer, found = OpenClip(str(weights / "clip-heldout")), cells(folder)
    reader, captioner = SceneReader(str(weights / "reader")), Blip(str(weights / "blip"), prompt="")

    def images(name):
        paths = [folder / "images" / "test" / name / f"{key}.png" for key in batch.keys]
        return torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths]) / 255

    def captions(of):
        from cyclefit.models import Decoding

        return [caption for [caption] in captioner.sample(of, Decoding(), [0] * INPUTS)]

    def truth(texts, facts):
        counts = np.array([check(*pair).counts()["truth"] for pair in zip(texts, facts, strict=True)]).sum(0)
        return 100 * counts[0] / counts[1]

    assert torch.equal(images("source"), batch.images)
    again, drawn = images("of-captions/blip/sd3"), images("of-prompts/sd3")
    said, first = captions(drawn), captions(batch.images)
    similar = (scorer.embed_images(batch.images) * scorer.embed_images(again)).sum(-1)
    expected = {
        ("images", f"image {SIMILARITY}", "blip", "sd3"): similar.mean().item(),
        ("images", TO_SOURCE, "blip", "sd3"): truth(batch.captions, reader.read(again)),
        ("images", TO_EACH_OTHER, "blip", "sd3"): truth(first, reader.read(again)),
        ("texts", f"text {SIMILARITY}", "sd3", "blip"): (
            (scorer.embed_texts(batch.captions) * scorer.embed_texts(said)).sum(-1).mean().item()
        ),
        ("texts", "CIDEr", "sd3", "blip"): References(batch.references).measure(said).each["CIDEr"].mean(),
        ("texts", TO_SOURCE, "sd3", "blip"): truth(said, batch.facts),
        ("texts", TO_EACH_OTHER, "sd3", "blip"): truth(said, reader.read(drawn)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-4), name
    assert len(found) == 4 * (3 + 4)


def test_parts_and_ranks_find_what_one_process_finds(whole, config, tmp_path, capsys):
    """One part on two ranks, the other in this process; the call without a part then makes nothing but the report."""
    folder, path = tmp_path / "parts", config("parts")
    arguments = ["matrix", f"--config={path}", f"--out={folder}", "--part=1/2", "--devices=2"]
    done = ended(forked([sys.executable, "evaluate.py", *arguments], ranks=2))
    assert done.returncode == 0, done.stdout[-3000:]
    made = assess(path, folder, "--part=2/2")
    assert made["Blip"] == INPUTS // 2 * (1 + 2)
    assert not (folder / "report.html").exists()
    assert len(list(folder.glob("parts/*/made.rank*.jsonl"))) == 3
    capsys.readouterr()
    assert assess(path, folder) == {}
    said = capsys.readouterr().out
    assert "test, image → caption → image: 6 images" in said
    assert "of a kind understand each other" in said
    for found, expected in zip(everything(folder), everything(whole[0]), strict=True):
        assert found.keys() == expected.keys()
    assert everything(folder)[1] == everything(whole[0])[1]
    assert cells(folder) == pytest.approx(cells(whole[0]), abs=2e-3)


def test_what_was_cut_off_or_has_changed_is_made_anew(whole, config, tmp_path):
    """A torn line, a torn image, and a generator with other settings: with it, its images and the captions of them."""
    folder, path = tmp_path / "again", config("whole")
    assess(path, folder)
    made = folder / "parts" / "1-of-1" / "made.rank0.jsonl"
    lines = made.read_text().rstrip("\n").split("\n")
    made.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    torn = sorted(folder.glob("images/test/of-captions/blip/sd/*.png"))[0]
    torn.write_bytes(torn.read_bytes()[:40])
    assert assess(path, folder) == {"StableDiffusion": 1}
    assert set(made.read_text().split("\n")) > set(lines)
    assert cells(folder) == cells(whole[0])

    changed = assess(config("changed", generators__sd__init_args__guidance_scale=5.0), folder)
    assert changed["StableDiffusion"] == 3 * INPUTS
    assert changed["Blip"] == changed["VisionLanguage"] == INPUTS
    assert "StableDiffusion3" not in changed
    same = {name: value for name, value in cells(folder).items() if "sd" not in name}
    assert same == {name: value for name, value in cells(whole[0]).items() if "sd" not in name}
    assert cells(folder) != cells(whole[0])


def test_a_run_is_a_member_and_kinds_are_optional(config, launch, tmp_path, world):
    """A finetuned captioner beside one generator: no kinds, no reader, no second column to be best."""
    run = launch("miniature_blip.yaml", "tuned")
    path = config("run", captioners={}, kinds={}, reader=None, runs=[str(run)], limit=2)
    content = yaml.safe_load(path.read_text())
    del content["generators"]["sd3"]
    path.write_text(yaml.safe_dump(content))
    made = assess(path, tmp_path / "out")
    assert made["Blip"] == 2 * 2
    assert {name[2:] for name in cells(tmp_path / "out") if name[0] == "images"} == {("tuned", "sd")}
    tables = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]["test"]["directions"]
    assert all("kinds" not in of and not of["best"] for way in tables.values() for of in way["metrics"].values())
    assert TO_SOURCE in tables["texts"]["metrics"]
    assert TO_EACH_OTHER not in tables["texts"]["metrics"]


def test_the_page(whole):
    folder, _ = whole
    page = (folder / "report.html").read_text()
    assert page.count('<article class="card">') == 2
    assert page.count("<img") == 2 * (1 + 4 + 2)
    assert page.count('role="img"') == 3 + 4
    assert "smolvlm → sd" in page
    assert "pairs of a kind" in page
    assert (folder / "table-test.csv").read_text().count("\n") == 1 + 4 * (3 + 4)


def test_heat_map():
    first, second = {"x": Estimate(0.5, 0.4, 0.6), "y": Estimate(None)}, {"x": Estimate(0.25), "y": Estimate(1.0)}
    estimates = {"a": first, "b": second}
    direction = Direction(["a", "b"], ["x", "y"], {"m": Cells(estimates, [])})
    [axes] = heat_map("m", "images", direction).axes
    placed = {text.get_position(): text.get_text() for text in axes.texts}
    assert placed[0.5, 0.46] == "0.500"
    assert placed[0.5, 0.76] == "0.400 to 0.600"
    assert placed[1.5, 0.46] == NONE
    assert [label.get_text() for label in (*axes.get_yticklabels(), *axes.get_xticklabels())] == ["a", "b", "x", "y"]
    assert axes.yaxis_inverted()


def test_interaction():
    """Quality of rows and columns is no interaction; what pairs of a kind gain is, with the interval of its noise."""
    random = np.random.default_rng(0)
    values = np.array([0.3, 0.7])[:, None, None] + np.array([0.0, 0.2])[:, None] + random.normal(size=300) / 10
    same = np.eye(2, dtype=bool)
    ones = np.ones_like(values)
    assert interaction(Counts(values, ones), same).value == pytest.approx(0, abs=1e-12)
    noisy = values + 0.1 * same[..., None] + random.normal(size=values.shape) / 10
    found, m = interaction(Counts(noisy, ones), same), noisy.mean(-1)
    assert found.value == pytest.approx((m[0, 0] - m[0, 1] - m[1, 0] + m[1, 1]) / 4)
    each = (noisy[0, 0] - noisy[0, 1] - noisy[1, 0] + noisy[1, 1]) / 4
    assert found.high - found.low == pytest.approx(2 * 1.96 * each.std() / np.sqrt(300), rel=0.1)
    assert found.low < 0.05 < found.high
    assert found.p < 0.01
    # A cell is a ratio of sums, not a mean of ratios.
    wholes = random.integers(1, 5, values.shape).astype(float)
    m = noisy.sum(-1) / wholes.sum(-1)
    assert interaction(Counts(noisy, wholes), same).value == pytest.approx((m[0, 0] - m[0, 1] - m[1, 0] + m[1, 1]) / 4)
    assert interaction(Counts(noisy[:1], ones[:1]), same[:1]) is None
    assert interaction(Counts(noisy, ones), np.zeros((2, 2), bool)) is None
    assert interaction(Counts(noisy, np.zeros_like(ones)), same) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part=3/2"], "part must be I/N, the I-th of N parts counted from 1, such as 2/8, not '3/2'"),
        (["--part=2"], "part must be I/N"),
        (["--kinds={x: first}"], "kinds.x: there is no such member; there are blip, smolvlm, sd, sd3"),
        (["--captioners={}"], "captioners is empty: name at least one model"),
        (["--captioners={a: {class_path: Blipp}}"], "captioners.a: there is no class Blipp; did you mean Blip?"),
        (["--captioners={a/b: {class_path: Blip}}"], "captioners: the name 'a/b' cannot be part of a file name"),
        (["--captioners={a: {class_path: Blip, init_args: {lora_rank: 0}}}"], "captioners.a.lora_rank must be a whole"),
    ],
)
def test_mistakes(arguments, said, config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises((UserError, ValueError, TypeError)) as raised:
        evaluate.main(["matrix", f"--config={config('mistakes')}", f"--out={tmp_path / 'out'}", *arguments])
    assert said in str(raised.value) or said in str(raised.value.__cause__ or raised.value.__context__)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_not_overwritten(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is not empty and contains no evaluation of matrix"):
        evaluate.main(["matrix", f"--config={config('other')}", f"--out={tmp_path / 'out'}"])


def test_parts():
    assert parse_part(None) == (1, 1)
    assert parse_part("2/8") == (2, 8)
