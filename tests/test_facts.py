"""Facts: what captions state and what images show."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from cyclefit.data import evaluation_batches
from cyclefit.metrics.facts import FactCheck, are_facts, by_kind, check, read_scene_caption, summarize
from cyclefit.metrics.reader import SceneReader, attributes
from cyclefit.metrics.statistics import paired_ratio_bootstrap, ratio_interval
from cyclefit.miniature import WEIGHTS, scenes
from cyclefit.miniature.negatives import changed

ONE = {"things": [{"shape": "cross", "colour": "green", "size": "large"}], "place": "middle", "background": "black"}
TWO = {
    "things": [
        {"shape": "circle", "colour": "red", "size": "small"},
        {"shape": "star", "colour": "blue", "size": "large"},
    ],
    "relation": "left",
    "background": "white",
}


def told(reading):
    """What a reading holds, as kinds and values in the order of the caption."""
    found = [(start, kind, value) for mention in reading.mentions for kind, value, start, _ in mention]
    found += [(start, "relation", value) for _, value, start, _ in reading.relations]
    found += [(start, "place", value) for _, value, start, _ in reading.places]
    found += [(start, "background", value) for value, start, _ in reading.backgrounds]
    return [(kind, value) for _, kind, value in sorted(found)]


@pytest.mark.parametrize("noise", ["web", "clean", "full"])
def test_what_the_writer_said_is_what_the_reader_finds(noise):
    for scene, rng in itertools.islice(scenes.scenes("pretrain", seed=3), 3000):
        text, stated = scenes.say(scene, noise, rng)
        assert told(read_scene_caption(text)) == stated, text
        found = check(text, scene.facts)
        assert Counter(of.kind for of in found.stated) == Counter(kind for kind, _ in stated)
        assert all(text[of.start : of.end] for of in found.stated)
        if noise != "web":
            assert not found.false, (text, scene.facts)
            assert found.covered == Counter(kind for kind, _ in stated)
        if noise == "full":
            assert found.covered == found.there


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_fact_is_found_false_and_no_other(seed):
    for scene, rng in itertools.islice(scenes.scenes("test", seed), 200):
        if len(scene.things) < 2:
            continue
        for kind, other in changed(scene, rng).items():
            text = scenes.caption(other, "full", np.random.default_rng(seed))
            wrong = [of for of in check(text, scene.facts).stated if not of.right]
            name, how = kind.split()
            if name == "relation":
                # The two may be taken for each other where that makes less wrong.
                assert wrong
            elif how == "replaced":
                assert [of.kind for of in wrong] == [name], (text, scene.facts)
            else:
                assert 1 <= len(wrong) <= 2, (text, scene.facts)


@pytest.mark.parametrize(
    ("caption", "facts", "wrong", "covered"),
    [
        ("a large green cross in the middle on a black background", ONE, [], 5),
        ("a green square on a black background", ONE, ["square"], 2),
        ("A GREEN cross, on black.", ONE, [], 3),
        ("a green cross and a green cross", ONE, ["green", "cross"], 2),
        ("a green cross left of a ring", ONE, ["left of", "ring"], 2),
        ("a green green cross", ONE, [], 2),
        ("a black cross", ONE, ["black"], 1),
        ("a dog", ONE, [], 0),
        ("", ONE, [], 0),
        ("a cross on the left on a green background", ONE, ["on the left", "green"], 1),
        ("a star right of a circle", TWO, [], 3),
        ("a star left of a circle", TWO, ["left of"], 2),
        ("a blue circle and a red star", TWO, ["blue", "red"], 2),
        ("a red star", TWO, ["red"], 1),
        ("a circle on the left", TWO, [], 1),
        ("a circle at the top", TWO, ["at the top"], 1),
        ("left of", TWO, ["left of"], 0),
        ("a blue star right of a small circle right of a red circle", TWO, ["right of", "red", "circle"], 5),
        ("a red thing", TWO, [], 1),
    ],
)
def test_any_text_is_held_against_a_scene(caption, facts, wrong, covered):
    found = check(caption, facts)
    assert [caption[of.start : of.end].lower() for of in found.stated if not of.right] == wrong
    assert found.covered.total() == covered
    assert FactCheck.read(json.loads(json.dumps(found.record()))) == found


def test_mentions_are_given_to_things_so_that_most_is_right():
    facts = TWO | {"things": [TWO["things"][0], TWO["things"][0] | {"colour": "blue"}]}
    assert not check("a blue circle and a red circle", facts).false
    assert check("a green circle and a red circle", facts).counts("colour") == {"truth": (1, 2), "coverage": (1, 2)}


def test_shares_are_of_all_facts_together():
    checks = [check("a green cross", ONE), check("a green square on a black background", ONE)]
    found = summarize(checks)
    assert found["truth"]["value"] == pytest.approx(100 * 4 / 5)
    assert found["coverage"]["value"] == pytest.approx(100 * 4 / 10)
    assert found["false captions"]["value"] == 50
    assert by_kind(checks)["shape"] == {
        "stated": 1.0,
        "truth": pytest.approx(summarize([check("a cross", ONE), check("a square", ONE)])["truth"]),
        "coverage": pytest.approx(summarize([check("a cross", ONE), check("a square", ONE)])["truth"]),
    }
    assert "truth" not in summarize([check("a dog", ONE)])
    assert "truth" not in by_kind([check("a dog", ONE)])["place"]


def test_intervals_of_ratios():
    rng = np.random.default_rng(0)
    wholes = rng.integers(1, 6, 400)
    parts = rng.binomial(wholes, 0.7)
    value, low, high = ratio_interval(parts, wholes)
    assert value == parts.sum() / wholes.sum()
    # The delta method's standard error of a ratio of means.
    error = np.sqrt(np.mean((parts - value * wholes) ** 2) / 400) / wholes.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    difference, low, high, p = paired_ratio_bootstrap((wholes, wholes), (parts, wholes))
    assert difference == pytest.approx(1 - value)
    assert 0 < low < difference < high
    assert p < 0.01
    same = paired_ratio_bootstrap((parts, wholes), (parts, wholes))
    assert same[:3] == (0, 0, 0)
    assert same[3] == 1
    assert np.isnan(ratio_interval([0, 0], [0, 0])).all()


def test_shards_hold_the_facts_of_their_scenes(world):
    batch = next(evaluation_batches(str(world / "test"), image_size=32, batch_size=20))
    wanted = [scene.facts for scene, _ in itertools.islice(scenes.scenes("test", 0), 20)]
    assert batch.facts == wanted


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"things": []},
        {"things": "red"},
        {"things": ["red"]},
        {"objects": "dog"},
        {"objects": [1]},
        ONE | {"relation": "left"},
        TWO | {"relation": "near"},
        ONE | {"place": 3},
    ],
)
def test_other_fields_are_not_taken_for_facts(facts):
    assert are_facts(ONE)
    assert are_facts(TWO)
    assert are_facts({"objects": ["dog"]})
    assert not are_facts(facts)


@pytest.mark.parametrize("split", ["test", "novel"])
def test_the_reader_of_images_is_right(split):
    drawn = [scene for scene, _ in scenes.scenes(split, 0)]
    images = torch.from_numpy(np.stack([np.asarray(scenes.render(s)) for s in drawn])).permute(0, 3, 1, 2) / 255
    reader = SceneReader(str(WEIGHTS / "reader"))
    rng = np.random.default_rng(0)
    read = reader.read(images)
    found = by_kind([check(scenes.caption(s, "full", rng), of) for s, of in zip(drawn, read, strict=True)])
    assert set(found) == {"shape", "colour", "size", "relation", "place", "background"}
    for kind, of in found.items():
        assert of["truth"]["value"] >= 99.5, kind
    assert all(are_facts(of) for of in read)
    assert (attributes(read) == attributes([s.facts for s in drawn])).float().mean() > 0.995
    # Noise is read as something, without an error.
    assert len(reader.read(torch.rand(50, 3, 48, 48))) == 50
