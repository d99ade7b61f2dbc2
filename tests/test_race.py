"""Racing: the candidates that cannot win any more are not judged further."""

import itertools
import json
import math
import sys

import pytest
import torch

from cyclefit import UserError, evaluate
from cyclefit.cycles import PolicyGradient
from cyclefit.data.best_of import best_of
from cyclefit.judges import Denoising, ImageText, Partners, Race, Regeneration, Sum
from cyclefit.judges.captions import spread
from cyclefit.models import Decoding
from cyclefit.rerank import rerank
from tests.conftest import ROOT

JUDGES = [
    Denoising(num_timesteps=8),
    Denoising(num_timesteps=5, log=True),
    Denoising(num_timesteps=4, num_others=2, contrast=0.5),
    Regeneration(steps=4, num_regenerations=2),
]
WORDS = ["red", "blue", "green", "pink", "orange"]
NUMBER = 5


@pytest.fixture(scope="module")
def partners(generator, scorer):
    return Partners(generator, scorer)


@pytest.fixture
def case(batch):
    """Images, six captions of each of which two are the same, seeds, other images."""
    captions = [[f"a {word} circle" for word in WORDS] for _ in range(2)]
    for row, right in zip(captions, batch.captions, strict=False):
        row[3:4] = [right, row[0]]
    others = torch.stack([batch.images[4:6], batch.images[8:10]], 1)
    return batch.images[:2], captions, [10, 11], others


@pytest.fixture
def calls(generator, monkeypatch):
    """Counts the rows that go through the denoiser, and the images that are decoded."""
    found, predict, decode = {"denoiser_calls": 0, "generator_calls": 0}, generator.predict, generator.decode_latents

    def predicted(latents, *arguments):
        found["denoiser_calls"] += len(latents)
        return predict(latents, *arguments)

    def decoded(latents):
        found["generator_calls"] += len(latents)
        return decode(latents)

    monkeypatch.setattr(generator, "predict", predicted)
    monkeypatch.setattr(generator, "decode_latents", decoded)
    return found


def slowly(race, partners, images, captions, seeds, others):
    """Scores and rounds by definition, one image at a time, from judges of each effort."""
    scores, rounds = [], []
    efforts = race.efforts(partners)
    for i, row in enumerate(captions):
        alive, seen, own = list(dict.fromkeys(row)), [], {}
        for number, effort in enumerate(efforts, 1):
            values = at_effort(race.judge, effort, partners, images[i], alive, seeds[i], others[i])
            seen.append((alive, values))
            own |= {text: [number, values[text]] for text in alive}
            if number < len(efforts):
                alive = sorted(alive, key=lambda text: -values[text])[: math.ceil(race.keep * len(alive))]
        for (before, values), (after, _) in reversed(list(itertools.pairwise(seen))):
            lowest = min(own[text][1] for text in after)
            for text in before:
                if text not in after:
                    own[text][1] = lowest - (min(values[other] for other in after) - values[text])
        rounds.append([own[text][0] for text in row])
        scores.append([own[text][1] for text in row])
    return torch.tensor(scores), torch.tensor(rounds)


def at_effort(judge, effort, partners, image, texts, seed, others):
    """By caption, the score of a round."""
    more = image[None], [texts], [seed], others[None]
    if isinstance(judge, Regeneration):
        judges = [Regeneration(steps=effort, num_regenerations=judge.num_regenerations)]
    else:
        width, edges = 1000 / judge.num_timesteps, [1000 * k / judge.num_timesteps for k in range(judge.num_timesteps)]
        kept = {"num_others": judge.num_others, "contrast": judge.contrast, "log": judge.log, "num_timesteps": 1}
        places = [int(edges[k] + width / 2) for k in spread(judge.num_timesteps)[:effort]]
        judges = [Denoising(min_timestep=t, max_timestep=t + 1, **kept) for t in places]
    scores = sum(judge.score(partners, *more) for judge in judges) / len(judges)
    return dict(zip(texts, scores[0].tolist(), strict=True))


@pytest.mark.parametrize("judge", JUDGES, ids=["plain", "log", "contrastive", "regeneration"])
def test_a_race_is_its_definition_and_costs_what_it_says(judge, partners, case, calls):
    for keep, first in ((0.5, 1), (0.3, 2)):
        race = Race(judge, keep, first)
        calls |= dict.fromkeys(calls, 0)
        scores, rounds = race.score_rounds(partners, *case)
        spent = dict(calls)
        assert spent == {name: 2 * count for name, count in race.cost(partners, NUMBER).items()}
        expected, in_rounds = slowly(race, partners, *case)
        assert torch.equal(rounds, in_rounds)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0.0)
        calls |= dict.fromkeys(calls, 0)
        full = judge.score(partners, *case)
        assert all(spent[name] < count for name, count in calls.items() if name == "denoiser_calls")
        finalists = rounds == len(race.efforts(partners))
        torch.testing.assert_close(scores[finalists], full[finalists], atol=1e-5, rtol=0.0)
        assert 2 <= finalists.sum() < finalists.numel()
        for row, of in zip(scores, rounds, strict=True):
            for number in of.unique().tolist()[:-1]:
                assert row[of <= number].max() < row[of > number].min()
        alone = race.score(partners, case[0][1:], [case[1][1]], case[2][1:], case[3][1:])
        torch.testing.assert_close(alone[0], scores[1], atol=1e-4, rtol=0.0)


def test_the_first_timesteps_are_spread_over_the_range():
    assert spread(8) == [2, 6, 4, 0, 3, 7, 5, 1]
    for count in (1, 2, 3, 5, 12, 16, 100):
        order = spread(count)
        assert sorted(order) == list(range(count))
        for seen in range(2, count + 1):
            gaps = [b - a for a, b in itertools.pairwise([-1, *sorted(order[:seen]), count])]
            assert max(gaps) <= 2 * math.ceil(count / seen) + 1


def test_rounds(partners):
    assert Race(Denoising(num_timesteps=16)).efforts(partners) == [1, 2, 4, 8, 16]
    assert Race(Denoising(num_timesteps=12), 0.25, 2).efforts(partners) == [2, 8, 12]
    assert Race(Denoising(num_timesteps=10), 0.1).efforts(partners) == [1, 10]
    assert Race(Regeneration(), 0.5, 2).efforts(partners) == [2, 4, 8], "the generator's own steps"
    assert Race(Denoising(num_timesteps=16)).cost(partners, 10)["denoiser_calls"] == 10 + 5 + 2 * 3 + 4 * 2 + 8


def test_one_candidate_is_judged_in_full(partners, case):
    images, captions, seeds, _ = case
    one = [row[:1] for row in captions]
    scores, rounds = Race(JUDGES[0]).score_rounds(partners, images, one, seeds)
    torch.testing.assert_close(scores, JUDGES[0].score(partners, images, one, seeds))
    assert (rounds == 4).all()


def test_settings_that_make_no_race_are_refused(captioner, partners):
    with pytest.raises(UserError, match=r"^Race: judge must be Denoising or Regeneration, not ImageText$"):
        Race(ImageText())
    with pytest.raises(UserError, match=r"^Race: first must be below the effort of Denoising, 4, not 4$"):
        Race(Denoising(), first=4).check(partners)
    with pytest.raises(UserError, match=r"^Race: max_timestep|^Denoising: max_timestep must be at most 1000"):
        Race(Denoising(max_timestep=2000)).check(partners)
    with pytest.raises(UserError, match=r"^Race: keep must be a finite number above 0 and below 1, not 1.0$"):
        Race(Denoising(), keep=1.0)


def test_a_race_is_no_reward(captioner):
    with pytest.raises(UserError, match=r"^reward: Race drops candidates before .*: set the judge that races itself$"):
        PolicyGradient(reward=Race(Denoising())).prepare(captioner, Partners())
    with pytest.raises(UserError, match=r"^Sum: Race drops candidates before .*: set the judge that races itself$"):
        Sum([ImageText(), Race(Denoising())])


def test_only_the_last_decoding_is_raced(captioner, partners, batch):
    """A greedy caption neither takes the place of a sample nor costs anything."""
    images, seeds, race = batch.images[:3], [1, 2, 3], Race(Denoising(num_timesteps=4))
    made = rerank(captioner, partners, {"race": race}, images, [Decoding(), Decoding("nucleus", 5)], seeds)
    samples = [row[1:] for row in made.candidates]
    scores, rounds = race.score_rounds(partners, images, samples, [seed + 1 for seed in seeds])
    torch.testing.assert_close(made.scores["race"][:, 1:], scores)
    assert torch.equal(made.rounds["race"][:, 1:], rounds)
    assert made.scores["race"][:, 0].isnan().all()
    assert (made.rounds["race"][:, 0] == 0).all()


def test_an_evaluation_races(partners, world, tmp_path, monkeypatch):
    """From a config; its calls are those of its rounds, and what is dropped is recorded as such."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    judge = {"class_path": "Denoising", "init_args": {"num_timesteps": 4}}
    race = {"class_path": "Race", "init_args": {"judge": judge, "keep": 0.4}}
    judges = {"image cycle": {"class_path": "Race", "init_args": {"judge": {"class_path": "Regeneration"}}}}
    judges |= {"race": race, "denoising": judge, "image-text": {"class_path": "ImageText"}}
    config = tmp_path / "race.yaml"
    config.write_text(json.dumps({"judges": judges}))
    small = {"limit": 6, "num_candidates": 6, "gallery": 2, "generator.steps": 2, "java": "false"}
    small |= {"shards": json.dumps({"test": str(world / "test")}), "out": tmp_path / "out"}
    arguments = ["captions", "--config", "miniature_evaluate.yaml", "--config", str(config)]
    assert evaluate.main([*arguments, *[f"--{k}={v}" for k, v in small.items()]]) == 0

    table = [json.loads(line) for line in (tmp_path / "out" / "candidates-test.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]["test"]
    samples = [row for row in table if row["decoding"] == "nucleus"]
    for row in table:
        assert ("race" in row["scores"]) == (row["decoding"] == "nucleus") == ("rounds" in row)
        assert "denoising" in row["scores"]
    full = [row for row in samples if row["rounds"]["race"] == 3]
    assert 6 <= len(full) < len(samples)
    for row in full:
        assert row["scores"]["race"] == pytest.approx(row["scores"]["denoising"], abs=1e-5)
    rows = {row["selection"]: row for row in result["rows"] if row["decoding"] == "nucleus"}
    assert set(rows) == {"single", "oracle", *judges}, "no sum with scores that only rank"
    different = [{row["caption"] for row in samples if row["key"] == key} for key in {row["key"] for row in samples}]
    spent = [Race(Denoising(), 0.4).cost(partners, len(captions))["denoiser_calls"] for captions in different]
    assert rows["race"]["denoiser_calls"] == pytest.approx(sum(spent) / 6, abs=0.06)
    assert rows["race"]["denoiser_calls"] < rows["denoising"]["denoiser_calls"]
    assert rows["image cycle"]["generator_calls"] > 6 * 0.9, "drafts and the finalists' images"
    assert "image similarity" not in rows["race"]["metrics"]
    about = json.loads((tmp_path / "out" / "metrics.json").read_text())["judges"]["race"]
    assert about.startswith("Successive halving")
    assert about.endswith("on the source latents.")

    shards = tmp_path / "best"
    made = best_of(tmp_path / "out", "test", "race", shards, shards=str(world / "test"))
    assert made["samples"] == 6
