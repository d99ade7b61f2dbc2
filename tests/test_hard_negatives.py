"""Hard negatives: the files of published benchmarks, how their scores are counted, and judges measured on them."""

import io
import json
import sys
from dataclasses import replace
from itertools import islice, permutations

import numpy as np
import pytest
import torch
from PIL import Image

from cyclefit import UserError, evaluate
from cyclefit.data.hard_negatives import Aro, Cola, Example, SugarCrepe, WhatsUp, Winoground, load_image
from cyclefit.judges import Denoising, Function, Likelihood, Partners, Sum
from cyclefit.miniature.negatives import Miniature, negatives, pairs
from cyclefit.miniature.scenes import render
from cyclefit.rerank import sample_seed
from tests.conftest import ROOT
from tests.own_judges import Longest
from tests.probes import ended, forked

VG = {"image_path": "7.jpg", "image_id": 7, "true_caption": "the cat sits on the mat", "bbox_x": 4, "bbox_y": 2,
      "false_caption": "the mat sits on the cat", "relation_name": "on", "bbox_w": 8, "bbox_h": 8}  # fmt: skip
ORDERED = {"image": "val2014/a.jpg", "caption_options": ["a b c", "b a c", "c b a", "a c b", "b c a"]}
SUGAR = {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}
PLUS = {"id": 9, "filename": "1.jpg", "caption": "a dog", "caption2": "one dog", "negative_caption": "a cat"}
WINO = {"id": 5, "image_0": "ex_5_img_0", "image_1": "ex_5_img_1", "caption_0": "a b", "caption_1": "b a",
        "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}  # fmt: skip
MUG = "data/controlled_images/mug_on_table.jpeg"
FOUR = ["A mug on a table", "A mug under a table", "A mug left of a table", "A mug right of a table"]
LINK = "https://cs-people.bu.edu/array/data/vg_gqa_images/"
COLA = "COLA_multiobjects_matching_benchmark.json"
FORMATS = [
    (SugarCrepe, "swap_obj.json", {"0": SUGAR}, ["val2017/1.jpg"], ("0", "swap_obj", ["a dog"], ["a cat"], "texts")),
    (SugarCrepe, "swap_obj.json", [PLUS], ["val2017/1.jpg"],
     ("0", "swap_obj", ["a dog", "one dog"], ["a cat"], "texts")),
    (Aro, "visual_genome_relation.json", [VG], ["images/7.jpg"],
     ("0", "relation", [VG["true_caption"]], [VG["false_caption"]], "texts")),
    (Aro, "visual_genome_attribution.json", [VG | {"attributes": ["a", "b"]}], ["images/7.jpg"],
     ("0", "attribution", [VG["true_caption"]], [VG["false_caption"]], "texts")),
    (Aro, "coco_order.json", [ORDERED], ["images/val2014/a.jpg"],
     ("0", "COCO order", ["a b c"], ["b a c", "c b a", "a c b", "b c a"], "texts")),
    (Winoground, "examples.jsonl", WINO, ["images/ex_5_img_0.png", "images/ex_5_img_1.png"],
     ("5", "Object", ["a b", "b a"], [], "groups")),
    (WhatsUp, "controlled_images_dataset.json", [{"image_path": MUG, "caption_options": FOUR}],
     ["controlled_images/mug_on_table.jpeg"], ("0", "A", FOUR[:1], FOUR[1:], "texts")),
    (WhatsUp, "coco_qa_one_obj.json", [[397133, "on the left", "on the right"]], ["val2017/000000397133.jpg"],
     ("0", "COCO, one object", ["on the left"], ["on the right"], "texts")),
    (WhatsUp, "vg_qa_two_obj.json", [["2317", "a left of b", "a right of b"]], ["vg_images/2317.jpg"],
     ("0", "GQA, two objects", ["a left of b"], ["a right of b"], "texts")),
    (Cola, COLA, [[f"{LINK}1.jpg", "a red cup", f"{LINK}2.jpg", "a blue cup"]],
     ["vg_gqa_images/1.jpg", "vg_gqa_images/2.jpg"],
     ("0", "multiple objects", ["a red cup", "a blue cup"], [], "images")),
]  # fmt: skip


def write(folder, file, content, images):
    (folder / file).write_text(json.dumps(content) + "\n")
    for place, image in enumerate(images):
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (10 * place, 200, 0)).save(path)


@pytest.mark.parametrize(("kind", "file", "content", "images", "expected"), FORMATS)
def test_files_as_published(kind, file, content, images, expected, tmp_path):
    write(tmp_path, file, content, images)
    [example] = kind(str(tmp_path)).examples
    found = example.key, example.kind, list(example.right), list(example.wrong), example.counted
    assert found == expected
    assert list(example.images) == [tmp_path / image for image in images]
    assert (example.box == (4, 2, 8, 8)) == ("visual_genome" in file)
    for image in example.images:
        assert load_image(image, 6, example.box).shape == (3, 6, 6)

    (tmp_path / images[-1]).unlink()
    with pytest.raises(UserError, match=rf"{kind.__name__}: 1 of {len(images)} images are missing, for .*{images[-1]}"):
        kind(str(tmp_path))
    row = next(iter(content.values())) if file == "swap_obj.json" and isinstance(content, dict) else content
    row = row[0] if isinstance(row, list) else row
    for broken in (row[:2] if isinstance(row, list) else {"text": "a"}, 3, None):
        (tmp_path / file).write_text(json.dumps({"0": broken} if kind is not Winoground else broken))
        with pytest.raises(UserError, match=rf"{file}"):
            kind(str(tmp_path))


def test_what_is_wrong_with_files(tmp_path):
    with pytest.raises(UserError, match=r"SugarCrepe: .* has none of the published files add_obj.json, add_att.json"):
        SugarCrepe(str(tmp_path))
    write(tmp_path, "add_obj.json", {"4": SUGAR | {"caption": " "}}, ["val2017/1.jpg"])
    with pytest.raises(
        UserError, match=r"add_obj.json: entry 4 should be filename, caption, .*, not filename, caption"
    ):
        SugarCrepe(str(tmp_path))
    write(tmp_path, "add_obj.json", {"4": SUGAR | {"filename": "../../x.jpg"}}, [])
    with pytest.raises(UserError, match="lies outside"):
        SugarCrepe(str(tmp_path))
    for text, why in (("{", "is not valid JSON"), ("[]", "is empty")):
        (tmp_path / "add_obj.json").write_text(text)
        with pytest.raises(UserError, match=rf"add_obj.json {why}"):
            SugarCrepe(str(tmp_path))
    (tmp_path / "x.jpg").write_text("no image")
    for box in (None, (0, 0, 4, 4)):
        with pytest.raises(UserError, match=r"x.jpg cannot be read: broken image"):
            load_image(tmp_path / "x.jpg", 8, box)


def test_a_box_is_what_is_shown(tmp_path):
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 0, 0), (4, 2, 8, 6))
    picture.save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png", 4, (4, 2, 4, 4))[:, 0, 0], torch.tensor([1.0, 0, 0]))
    assert load_image(tmp_path / "a.png", 4, (4, 2, 4, 4))[1:].max() == 0
    assert load_image(tmp_path / "a.png", 4).mean() < 0.2


@pytest.mark.parametrize(
    ("right", "wrong", "counted"),
    [(1, 1, "texts"), (2, 1, "texts"), (1, 3, "texts"), (2, 0, "images"), (2, 0, "groups")],
)
def test_chance_is_what_random_scores_reach(right, wrong, counted):
    """All orders of the scores are equally likely; a tie is wrong."""
    rows = 1 if counted == "texts" else 2
    example = Example("k", "", [b""] * rows, ["a"] * right, ["b"] * wrong, counted)
    orders = list(permutations(range(rows * (right + wrong))))
    found = [example.correct(np.reshape(order, (rows, -1)).tolist()) for order in orders]
    for name, chance in example.chance.items():
        assert 100 * np.mean([one[name] for one in found]) == pytest.approx(chance)
    assert not any(example.correct([[0.0] * (right + wrong)] * rows).values())


def test_groups_are_counted_as_winoground_does():
    example = Example("k", "", [b"", b""], ["a", "b"], counted="groups")
    cases = {  # images in rows, texts in columns
        ((3, 1), (2, 4)): (True, True, True),
        ((2, 1), (3, 4)): (True, False, False),
        ((2, 3), (1, 4)): (False, True, False),
    }
    for scores, expected in cases.items():
        assert tuple(example.correct(scores)[name] for name in ("text", "image", "group")) == expected


@pytest.fixture(scope="module")
def models():
    from cyclefit.miniature import WEIGHTS
    from studies.pretrain.card import models

    generator, captioner = models(WEIGHTS, "first")
    return Partners(generator.requires_grad_(False), None, captioner.requires_grad_(False))


def test_likelihood_less_that_without_the_image(models):
    images, captions = pairs("test", 3)
    rows, captioner = [of["colour replaced"] for of in captions], models.captioner
    plain = Likelihood().score(models, images, rows, [0] * 3)
    features = captioner.embed(images)
    for column in range(2):
        tokens = captioner.tokenize([row[column] for row in rows])
        assert torch.equal(plain[:, column], captioner.log_prob(features, tokens))
        by_token = Likelihood(per_token=True).score(models, images, rows, [0] * 3)[:, column]
        assert torch.allclose(by_token, plain[:, column] / captioner.mask(tokens).sum(1))
    whole, half = (Likelihood(alpha=alpha).score(models, images, rows, [0] * 3) for alpha in (1.0, 0.5))
    assert torch.allclose(half, (plain + whole) / 2, atol=1e-4)
    # What is subtracted does not depend on the image, nor on what else is scored.
    prior = plain - whole
    swapped = images.flip(0)
    again = [Likelihood(alpha=a).score(models, swapped, rows, [0] * 3) for a in (0.0, 1.0)]
    assert torch.allclose(prior, again[0] - again[1], atol=1e-3)
    alone = Likelihood(alpha=1.0).score(models, images[1:2], rows[1:2], [0])
    assert torch.allclose(alone, whole[1:2], atol=1e-3)
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    empty = captioner.embed((0.5 + 0.25 * noise).clamp(0, 1))
    tokens = captioner.tokenize([rows[0][1]] * 3)
    assert torch.allclose(prior[0, 1], captioner.log_prob(empty, tokens).exp().mean().log(), atol=1e-3)
    assert (prior < plain).all(), "the image makes its captions likelier"


def test_denoising_across_images_subtracts_the_unconditional_error(models):
    images, captions = pairs("test", 2)
    rows, seeds = [of["relation turned"] for of in captions], [3, 4]
    for judge in (Denoising(num_timesteps=2), Denoising(num_timesteps=2, log=True)):
        empty = judge.score(models, images, [[""], [""]], seeds)
        expected = judge.score(models, images, rows, seeds) - empty
        found = judge.score_across(models, images, rows, seeds)
        assert torch.allclose(found, expected, atol=1e-5)
        assert found.abs().max() > 1e-4
    likelihood = Likelihood()
    assert torch.equal(
        likelihood.score_across(models, images, rows, seeds), likelihood.score(models, images, rows, seeds)
    )


def test_the_miniature_is_that_of_the_studies():
    images, captions = pairs("test", 5)
    examples = Miniature(count=5).examples
    for kind in ("colours swapped", "background replaced"):
        places = [place for place, of in enumerate(captions) if kind in of]
        of_kind = [one for one in examples if one.kind == kind]
        assert [one.key for one in of_kind] == [f"test-{place}" for place in places]
        assert [one.texts for one in of_kind] == [captions[place][kind] for place in places]
        assert all(
            torch.equal(load_image(one.images[0], 32), images[p]) for one, p in zip(of_kind, places, strict=True)
        )


def winoground(folder, count=6):
    """Scenes beside the same with colours swapped, as Winoground's files."""
    (folder / "images").mkdir(parents=True)
    lines = []
    several = ((scene, of) for scene, of in negatives("test") if "colours swapped" in of)
    for place, (scene, captions) in enumerate(islice(several, count)):
        a, b = scene.things
        swapped = replace(scene, things=(replace(a, rgb=b.rgb), replace(b, rgb=a.rgb)))
        for number, shown in enumerate((scene, swapped)):
            render(shown).save(folder / "images" / f"ex_{place}_img_{number}.png")
        first, second = captions["colours swapped"]
        names = {f"image_{k}": f"ex_{place}_img_{k}" for k in (0, 1)}
        tag = ("Object", "Relation")[place % 2]
        lines.append({"id": place, **names, "caption_0": first, "caption_1": second, "collapsed_tag": tag})
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


JUDGES = {
    "denoising": {"class_path": "Denoising", "init_args": {"num_timesteps": 1}},
    "log": {"class_path": "Denoising", "init_args": {"num_timesteps": 1, "log": True}},
    "contrastive": {"class_path": "Denoising", "init_args": {"num_timesteps": 1, "num_others": 1}},
    "both": {"class_path": "Sum", "init_args": {"judges": [
        {"class_path": "Denoising", "init_args": {"num_timesteps": 1}}, {"class_path": "Likelihood"}]}},
}  # fmt: skip


def arguments(folder, data, judges, more):
    benchmarks = {
        "miniature": {"class_path": "cyclefit.miniature.negatives.Miniature", "init_args": {"count": 4}},
        "groups": {"class_path": "Winoground", "init_args": {"folder": str(data)}},
    }
    settings = {"config": "miniature_evaluate_judges.yaml", "out": folder, "benchmarks": json.dumps(benchmarks)}
    settings |= {"judges": json.dumps(judges)} | more
    return [sys.executable, "evaluate.py", "judges", *[f"--{name}={value}" for name, value in settings.items()]]


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"candidates-{name}.jsonl").read_text().splitlines()]


def test_judges_on_trial(models, tmp_path, monkeypatch, capsys):
    """Accuracies are those of the scores in the file; batches, ranks and interruptions make no difference."""
    winoground(tmp_path / "data")
    monkeypatch.chdir(ROOT)
    one, two = tmp_path / "one", tmp_path / "two"
    done = ended(forked(arguments(two, tmp_path / "data", JUDGES, {"batch_size": 3, "devices": 2})))
    assert done.returncode == 0, done.stdout[-3000:]
    command = arguments(one, tmp_path / "data", JUDGES, {"batch_size": 5})
    monkeypatch.setattr(sys, "argv", command[1:])
    assert evaluate.main(command[2:]) == 0
    assert "Object, group" in capsys.readouterr().out
    for name in ("miniature", "groups"):
        first, second = lines(one, name), lines(two, name)
        assert [(a["key"], a["model"], a["caption"]) for a in first] == [
            (a["key"], a["model"], a["caption"]) for a in second
        ]
        for a, b in zip(first, second, strict=True):
            assert a["scores"] == pytest.approx(b["scores"], abs=1e-3)
            assert a["metrics"] == b["metrics"]

    found = json.loads((one / "metrics.json").read_text())["benchmarks"]
    rows = {row["model"]: row for row in found["groups"]["rows"]}
    assert list(rows) == ["CLIP image-text (the control)", "held-out CLIP", *JUDGES]
    scores = {}
    for line in lines(one, "groups"):
        scores.setdefault(line["model"], {}).setdefault(line["key"], []).append(*line["scores"].values())
    assert {len(values) for of in scores.values() for values in of.values()} == {4}
    turned = [example for example in Miniature(count=4).examples if example.kind == "relation turned"]
    images = torch.stack([load_image(example.images[0], 32) for example in turned])
    seeds = [sample_seed(example.key) for example in turned]
    judge = Denoising(num_timesteps=1, num_others=1)
    expected = judge.score(
        models, images, [example.texts for example in turned], seeds
    )  # the next image of the same kind
    contrasted = [of["scores"]["contrastive"] for of in lines(one, "miniature")
                  if of["model"] == "contrastive" and "turned" in of["key"]]  # fmt: skip
    assert contrasted == pytest.approx(expected.flatten().tolist(), rel=1e-2, abs=1e-5)
    example = Winoground(str(tmp_path / "data")).examples[0]
    images = torch.stack([load_image(image, 32) for image in example.images])
    expected = Denoising(num_timesteps=1).score_across(models, images, [example.texts] * 2, [sample_seed("0")] * 2)
    assert scores["denoising"]["Object/0"] == pytest.approx(expected.flatten().tolist(), rel=1e-2, abs=1e-5)
    right = [(a > b and d > c, a > c and d > b) for a, b, c, d in scores["denoising"].values()]
    accuracies = {name: of["value"] for name, of in rows["denoising"]["metrics"].items()}
    assert accuracies["all, text"] == pytest.approx(100 * np.mean([text for text, _ in right]))
    assert accuracies["all, image"] == pytest.approx(100 * np.mean([image for _, image in right]))
    assert accuracies["all, group"] == pytest.approx(100 * np.mean([text and image for text, image in right]))
    assert accuracies["all, group"] > 50, "the generator knows which thing has which colour"
    assert rows["denoising"]["denoiser_calls"] == 1.5, "both texts and the empty one, of each image"
    assert {row["model"]: row["denoiser_calls"] for row in found["miniature"]["rows"]} == {
        "CLIP image-text (the control)": 0, "held-out CLIP": 0, "denoising": 1, "log": 1, "contrastive": 2, "both": 1,
    }  # fmt: skip
    assert found["groups"]["chance"]["all, group"] == pytest.approx(100 / 6)
    parts = [np.array(list(scores[f"both: {part}"].values())).reshape(-1, 2, 2) for part in ("Denoising", "Likelihood")]
    total = sum(of / np.sqrt(np.mean((of - of.mean(2, keepdims=True)) ** 2)) for of in parts)
    text = 100 * np.mean((total[:, 0, 0] > total[:, 0, 1]) & (total[:, 1, 1] > total[:, 1, 0]))
    assert rows["both"]["metrics"]["all, text"]["value"] == pytest.approx(text)

    for name in ("report.html", "table-groups.csv", "figures/miniature-accuracy.csv"):
        assert (one / name).exists()
    assert "held-out CLIP" in (one / "report.html").read_text()

    # What is there is kept; what is missing, or of other settings, is scored anew.
    file = one / "candidates-miniature.jsonl"
    kept = file.read_text().splitlines(keepends=True)
    marked = kept[0].replace('"seconds": {', '"seconds": {"kept": 1.0, ')
    file.write_text("".join([marked, *kept[1:-3]]))
    command = arguments(one, tmp_path / "data", JUDGES | {"log": JUDGES["denoising"]}, {"batch_size": 4})
    monkeypatch.setattr(sys, "argv", command[1:])
    assert evaluate.main(command[2:]) == 0
    said = capsys.readouterr().out
    assert "log is evaluated anew: changed since its last results: judge" in " ".join(said.split())
    again = lines(one, "miniature")
    assert len(again) == len(kept)
    assert "kept" in again[0]["seconds"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"judges": '{"held-out CLIP": {"class_path": "Likelihood"}}'}, "both called held-out CLIP"),
        ({"judges": '{"a": {"class_path": "Regeneration"}}', "scorers": "{}"}, "needs a scorer: set scorers"),
        ({"judges": '{"a": {"class_path": "TextCycle"}}'}, "judges.a: TextCycle judges images, not captions"),
        ({"judges": "{}", "scorers": "{}"}, "there is no judge"),
        ({"out": "tests"}, "tests is not empty and contains no evaluation of judges"),
        ({"judges": '{"a": {"class_path": "Denoising", "init_args": {"num_others": 4}}}', "scorers": "{}"},
         "contrasting with 4 other images needs more than the [0-3] others of colours swapped"),
    ],
)  # fmt: skip
def test_mistakes(more, message, tmp_path, monkeypatch):
    winoground(tmp_path / "data", 2)
    monkeypatch.chdir(ROOT)
    command = arguments(tmp_path / "out", tmp_path / "data", {}, more)
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(UserError, match=message):
        evaluate.main(command[2:])


def test_a_sum_is_that_of_one_batch():
    """Its parts are scored apart and added afterwards, on the scale that they have over all examples."""
    from cyclefit.evaluate.judges import _leaves, _total

    scores = {"small": torch.rand(5, 3) / 100, "large": 50 * torch.rand(5, 3)}

    def small(*_):
        return scores["small"]

    def large(*_):
        return scores["large"]

    judge = Sum([Function(small), Sum([Function(large), Function(small)], [2.0, 1.0])], [1.0, 0.5])
    leaves = dict(_leaves("sum", judge))
    assert list(leaves) == ["sum: small", "sum: Sum: large", "sum: Sum: small"]
    parts = {name: [row[None].numpy() for row in scores[of.label]] for name, of in leaves.items()}
    found = np.concatenate(_total("sum", judge, parts))
    expected = judge.score(None, torch.rand(5, 3, 2, 2), [["a", "b", "c"]] * 5, [0] * 5).numpy()
    assert found - found.mean(1, keepdims=True) == pytest.approx(expected, abs=1e-5)


def test_a_judge_without_a_baseline_compares_images_directly():
    images = torch.rand(2, 3, 8, 8)
    assert Longest().score_across(None, images, [["a b", "c"]] * 2, [0, 0]).tolist() == [[2, 1], [2, 1]]


def test_examples_are_encoded_without_loss():
    scene, _ = next(negatives("test"))
    render(scene).save(file := io.BytesIO(), "PNG")
    shown = torch.from_numpy(np.array(render(scene))).permute(2, 0, 1).float() / 255
    assert torch.equal(load_image(file.getvalue(), 32), shown)
