"""Hard negatives: what the judges and the captioner know of a changed fact."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cyclefit.judges import Denoising, ImageText, Likelihood, Partners
from cyclefit.metrics.facts import COLOURS
from cyclefit.miniature import WEIGHTS, scenes
from cyclefit.miniature.negatives import changed, pairs
from cyclefit.models import OpenClip
from studies.negatives import accuracy, of_judge
from studies.pretrain.card import CARDS, models


def test_hard_negatives_differ_in_one_fact():
    images, captions = pairs("test", 30)
    assert images.shape == (30, 3, 32, 32)
    for of in captions:
        for kind, (true, false) in of.items():
            different = [w for w in zip(true.split(), false.split(), strict=False) if w[0] != w[1]]
            assert true != false
            if kind == "background replaced":
                assert len(different) == 1
            if kind == "colours swapped":
                assert Counter(w for w in true.split() if w in COLOURS) == Counter(
                    w for w in false.split() if w in COLOURS
                )


RECOGNITION = ("colour replaced", "shape replaced", "background replaced")


def bounds(score, split, limits, count=150):
    for kind, value in accuracy(score, split, count).items():
        low, high = limits(kind)
        assert low <= value <= high, (kind, value)


@pytest.mark.parametrize("pair", CARDS)
def test_the_captioner_sees(pair):
    def limits(kind):
        return (95 if kind.split()[0] in ("colour", "shape", "size", "background") else 90), 100

    captioner = of_judge(Likelihood(), Partners(captioner=models(WEIGHTS, pair)[1]))
    bounds(captioner, "test", limits)
    bounds(captioner, "novel", lambda kind: (90, 100))


def test_clip_is_the_bag_of_words_that_real_ones_are():
    def limits(kind):
        if kind in RECOGNITION:
            return 85, 100
        # A margin of two standard errors of 300 pairs around .50 to .65 and .50 to .70.
        return {"colours swapped": (44, 70), "sizes swapped": (44, 70), "relation turned": (44, 75)}.get(kind, (50, 90))

    clip = Partners(None, OpenClip(str(WEIGHTS / "clip")))
    bounds(of_judge(ImageText(), clip), "test", limits, count=300)


@pytest.mark.parametrize("pair", CARDS)
def test_the_generator_knows_who_is_what_and_where(pair):
    partners = Partners(models(WEIGHTS, pair)[0])
    bounds(of_judge(Denoising(), partners), "test", lambda kind: (95, 100), count=60)


def test_a_turned_relation_is_another_scene():
    scene = next(s for s, _ in scenes.scenes("test", 0) if len(s.things) == 2)
    turned = changed(scene, np.random.default_rng(0))["relation turned"]
    assert turned == replace(scene, place={"left": "right", "above": "below"}[scene.place])
