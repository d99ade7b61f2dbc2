"""Questions to a captioner: P(yes) as a judge and a reward, VQAScore and Soft-TIFA as metrics."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cyclefit import UserError, evaluate, records
from cyclefit.config.start import resolve_configs
from cyclefit.cycles import PolicyGradient
from cyclefit.digests import digest
from cyclefit.finetune import CaptionerFinetune
from cyclefit.judges import Function, ImageText, Partners, Sum, YesProbability, place
from cyclefit.metrics.questions import Asking, Atom, VQAScore, means, read_questions
from cyclefit.models import Blip, VisionLanguage
from cyclefit.models.pretrained import freeze
from cyclefit.train.dry_run import step_needs
from tests.conftest import ROOT
from tests.test_settings import parsers

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
PUBLISHED = {
    "prompt": "four white bicycles in front of three plastic cows",
    "atom_count": 7,
    "vqa_list": [
        ["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"],
        ["Are there any bicycles in the image?", "Yes"], ["Are the bicycles in front of the cows?", "Yes"],
        ["How many cows are in the image?", "three"], ["Are the cows plastic?", "Yes"],
        ["Are there any cows in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object", "position", "count", "attribute", "object"],
}  # fmt: skip
"""The example in GenEval 2's README."""


@pytest.fixture(scope="module")
def chat(weights):
    return freeze(VisionLanguage(str(weights / "smolvlm")))


def probability(chat, image, text):
    return chat.answer_log_probs(chat.embed(image[None]), [QUESTION.replace("{}", text)], ["Yes"]).exp()[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4, 32])
def test_yes_is_as_probable_as_the_captioner_finds_it(chat, batch, size):
    images, texts = batch.images[:3], batch.captions[:3]
    captions = [[texts[0], "a {} star"], [texts[1], texts[1]], ["a", texts[2]]]
    found = YesProbability(captioner=chat, batch_size=size).score(Partners(), images, captions, [0, 1, 2])
    rows = zip(images, captions, strict=True)
    expected = torch.stack([torch.stack([probability(chat, image, text) for text in row]) for image, row in rows])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert ((found > 0) & (found < 1)).all()
    assert len(expected.flatten().unique()) > 3
    # Images of prompts, asked of the partners' captioner.
    judge, drawn = YesProbability(batch_size=size), batch.images[:6].unflatten(0, (2, 3))
    found = judge.score(Partners(captioner=chat), texts[:2], drawn, [0, 1])
    rows = zip(texts[:2], drawn, strict=True)
    expected = torch.stack([torch.stack([probability(chat, image, text) for image in row]) for text, row in rows])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_what_cannot_be_asked_is_refused(chat, captioner):
    assert YesProbability().needs == ("captioner",)
    assert YesProbability(captioner=chat).needs == ()
    with pytest.raises(UserError, match="^YesProbability: Blip answers no questions: use a VisionLanguage"):
        YesProbability().check(Partners(captioner=captioner))
    YesProbability(captioner=chat).check(Partners(captioner=captioner))
    for settings, what in (({"question": "Is it?"}, "question must contain {} once"), ({"answer": " "}, "answer must")):
        with pytest.raises(UserError, match=what):
            YesProbability(captioner=chat, **settings).check(Partners())
    with pytest.raises(UserError, match=r"a question has \d+ tokens, the image included, and .* reads 128$"):
        chat.answer_log_probs(chat.embed(torch.rand(1, 3, 32, 32)), ["what " * 128], ["Yes"])


def test_a_judges_own_captioner(weights, chat):
    own = VisionLanguage(str(weights / "smolvlm"), trainable="lora")
    both = Sum([ImageText(), YesProbability(captioner=own)])
    assert both.models == [own]
    assert both.needs == ("scorer",)
    place(both, torch.device("cpu"))
    assert not any(p.requires_grad for p in own.parameters())
    assert not own.training
    same = YesProbability(captioner=chat), YesProbability(captioner=chat, batch_size=2)
    assert digest(same[0]) == digest(same[1])
    assert len({digest(of) for of in (same[0], YesProbability(), YesProbability(captioner=own))}) == 3


def test_a_reward_with_its_own_captioner(launch, weights):
    reward = ["--model.cycle.reward=YesProbability", "--model.cycle.reward.captioner=VisionLanguage"]
    reward += [f"--model.cycle.reward.captioner.pretrained={weights / 'smolvlm'}", "--model.cycle.kl_weight=0"]
    run = launch("miniature_cycle_blip_reward.yaml", "run", *reward)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row["train/reward"] < 1 for row in rows if "train/reward" in row)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("captioner.model.text_decoder") for name in state), "frozen weights are saved"


def test_a_dry_run_counts_the_answers(weights):
    def needs(own):
        with torch.device("meta"):
            captioner = Blip(str(weights / "blip"), trainable="decoder")
            asked = VisionLanguage(str(weights / "smolvlm")) if own else None
        nothing = Function(lambda _, images, *more: images.new_zeros(2, 2))
        reward = YesProbability(captioner=asked) if own else nothing
        module = CaptionerFinetune(captioner, cycle=PolicyGradient(reward, num_samples=2), round_trip_images=0)
        return step_needs(module, 2, 32)

    asked, without = needs(own=True), needs(own=False)
    assert asked.flops > 1.1 * without.flops
    assert asked.weights - without.weights > 1e6, "the captioner's are counted"


def written(path: Path, *entries) -> Path:
    path.write_text("\n".join(json.dumps(entry) if isinstance(entry, dict) else entry for entry in entries) + "\n")
    return path


def test_questions_as_published(tmp_path):
    found = read_questions(written(tmp_path / "q.jsonl", PUBLISHED, "", {**PUBLISHED, "prompt": "another"}))
    assert list(found) == [PUBLISHED["prompt"], "another"]
    of = found[PUBLISHED["prompt"]]
    assert of.atom_count == 7
    assert [[atom.question, atom.answer] for atom in of.atoms] == PUBLISHED["vqa_list"]
    assert [atom.skill for atom in of.atoms] == PUBLISHED["skills"]
    assert set(of.atoms[0].words()) == {"four", "Four", " four", " Four", "4", " 4"}
    assert set(of.atoms[1].words()) == {"yes", "Yes", " yes", " Yes"}
    assert set(Atom("What is it?", "Four", "object").words()) == {"four", "Four", " four", " Four"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"skills": ["count"]}, "shorter|longer"), ({"vqa_list": [["Is it?"]]}, "unpack"), ({"prompt": " "}, "empty"),
        ({"atom_count": None}, "NoneType"), ({"vqa_list": [], "skills": []}, "empty"), ("not json", "Expecting value"),
        ({}, None), ({"skills": None}, "NoneType"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, change, what):
    wrong = change if isinstance(change, str) else {**PUBLISHED, **change}
    path, expected = written(tmp_path / "q.jsonl", PUBLISHED, wrong), f"expected an object with prompt.*({what})"
    with pytest.raises(UserError, match=r"q\.jsonl, line 2: " + (expected if what else "the prompt .* appears twice")):
        read_questions(path)
    with pytest.raises(FileNotFoundError, match="there is no file .* of questions"):
        read_questions(tmp_path / "absent.jsonl")


def test_means_are_those_of_the_paper():
    answers = np.random.default_rng(0).uniform(size=7)
    assert means(answers) == pytest.approx((100 * answers.mean(), 100 * answers.prod() ** (1 / 7)))
    assert means([0.0, 1.0]) == (50.0, 0.0)


@pytest.fixture(scope="module")
def assessed(tmp_path_factory, world, weights):
    """An evaluation of images with the judge and both metrics, and its file of questions."""
    from cyclefit.data import evaluation_batches

    folder = tmp_path_factory.mktemp("questions")
    read = next(iter(evaluation_batches(str(world / "test"), image_size=32, batch_size=4)))
    entries = [
        {"prompt": prompt, "atom_count": 2 + i % 2, "skills": ["object", "count"][: 1 + i % 2],
         "vqa_list": [["Is there anything?", "Yes"], ["How many are there?", "two"]][: 1 + i % 2]}
        for i, prompt in enumerate(dict.fromkeys(read.captions))
    ]  # fmt: skip
    path = written(folder / "q.jsonl", *entries)
    own = {"class_path": "VisionLanguage", "init_args": {"pretrained": str(weights / "smolvlm")}}
    metrics = {
        name: {"class_path": f"cyclefit.metrics.questions.{cls}", "init_args": {"captioner": own, **more}}
        for name, cls, more in (("VQA", "VQAScore", {}), ("Soft-TIFA", "SoftTIFA", {"questions": str(path)}))
    }
    judges = {"yes": {"class_path": "YesProbability", "init_args": {"captioner": own}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["evaluate.py"])
        patch.setenv("TORCH_HOME", str(folder / "nothing"))
        small = {"limit": 4, "num_candidates": 2, "generator.steps": 2, "out": folder / "out"}
        small |= {"shards": json.dumps({"test": str(world / "test")}), "judges": json.dumps(judges)}
        arguments = [f"--{name}={value}" for name, value in (small | {"metrics": json.dumps(metrics)}).items()]
        assert evaluate.main(["images", "--config", "miniature_evaluate_images.yaml", *arguments]) == 0
    return folder / "out", path


def test_metrics_and_the_judge_in_an_evaluation(assessed, chat):
    out, path = assessed
    [split], questions = records.read_evaluation(out).splits.values(), read_questions(path)
    candidates = records.read_candidates(records.candidates_path(out, "test"))
    rows = {row.selection: row for row in split.rows}
    assert {"single", "yes", "oracle"} == set(rows)
    for row in rows.values():
        assert {"VQA", "Soft-TIFA AM", "Soft-TIFA GM"} <= row.metrics.keys()
        assert row.metrics["Soft-TIFA AM"].low <= row.metrics["Soft-TIFA AM"].value <= row.metrics["Soft-TIFA AM"].high
    assert rows["yes"].metrics["VQA"].value >= rows["single"].metrics["VQA"].value
    assert {"VQA", "Soft-TIFA GM"} <= {difference.metric for difference in split.differences}
    asking = Asking(chat, "test", 1)
    for one in candidates:
        assert one.metrics["VQA"] == pytest.approx(one.scores["yes"], abs=2e-2), "pixels are rounded to 8 bits"
        [answers] = asking.atoms([out / one.image], [questions[one.prompt].atoms])
        assert (one.metrics["Soft-TIFA AM"], one.metrics["Soft-TIFA GM"]) == pytest.approx(means(answers), abs=1e-3)
    assert "Soft-TIFA AM" in (out / "report.html").read_text()


def test_a_metric_of_images_is_none_of_captions(world, captioner, weights, monkeypatch, tmp_path):
    own = {"class_path": "VisionLanguage", "init_args": {"pretrained": str(weights / "smolvlm")}}
    metrics = {"VQA": {"class_path": "cyclefit.metrics.questions.VQAScore", "init_args": {"captioner": own}}}
    monkeypatch.chdir(ROOT)
    shards = json.dumps({"test": str(world / "test")})
    arguments = [f"--metrics={json.dumps(metrics)}", f"--shards={shards}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"^metrics\.VQA: VQAScore measures images, not captions: leave it out$"):
        evaluate.main(["captions", "--config", "miniature_evaluate.yaml", *arguments])
    with pytest.raises(UserError, match="^VQAScore: Blip answers no questions"):
        VQAScore(captioner)


def test_drawn_images_in_files(assessed, weights, tmp_path, capsys):
    out, path = assessed
    candidates = records.read_candidates(records.candidates_path(out, "test"))
    firsts = {one.prompt: one for one in candidates if one.index == 0}
    captioner = ["--captioner=VisionLanguage", f"--captioner.pretrained={weights / 'smolvlm'}"]

    def scored(images, *more):
        arguments = [f"--prompts={path}", f"--images={images}", f"--out={tmp_path / 's.json'}", *captioner, *more]
        assert evaluate.main(["questions", *arguments]) == 0
        return json.loads((tmp_path / "s.json").read_text())["models"]

    by_evaluation = scored(records.candidates_path(out, "test"))["base"]
    (tmp_path / "images.json").write_text(json.dumps({prompt: str(out / one.image) for prompt, one in firsts.items()}))
    found = scored(tmp_path / "images.json")["images"]
    assert found == by_evaluation
    printed = capsys.readouterr().out
    assert "Soft-TIFA AM of count" in printed
    assert "Soft-TIFA GM of prompts with 3 atoms" in printed
    questions = read_questions(path)
    for name, column in (("VQAScore", "VQA"), ("Soft-TIFA AM",) * 2, ("Soft-TIFA GM",) * 2):
        expected = np.mean([firsts[prompt].metrics[column] for prompt in questions])
        assert found["scores"][name]["value"] == pytest.approx(expected, abs=1e-3)
    answers = [of["answers"] for of in found["prompts"].values()]
    counts = [row[1] for row in answers if len(row) > 1]
    assert found["skills"]["count"]["value"] == pytest.approx(100 * np.mean(counts))
    twos = [means(row)[1] for row, of in zip(answers, questions.values(), strict=True) if of.atom_count == 2]
    assert found["atoms"]["2"]["value"] == pytest.approx(np.mean(twos))
    # Fewer images than prompts.
    kept = dict(list(json.loads((tmp_path / "images.json").read_text()).items())[1:])
    (tmp_path / "images.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"the prompt '.*' has no image in .*images\.json; .*--subset true"):
        scored(tmp_path / "images.json")
    assert scored(tmp_path / "images.json", "--subset=true")["images"]["prompts"].keys() == kept.keys()
    (tmp_path / "images.json").write_text("[1]")
    with pytest.raises(UserError, match="expected JSON {prompt: image file}"):
        scored(tmp_path / "images.json")


def test_captions_in_files(assessed, chat, weights, tmp_path):
    from cyclefit.metrics.questions import read_image

    out, _ = assessed
    images = sorted((out / "images" / "test" / "source").glob("*.png"))[:2]
    captions = {path.stem: [f"a star {i}", "two red squares"] for i, path in enumerate(images)}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    arguments = [f"--{name}={tmp_path / 'c.json'}" for name in ("candidates", "references")]
    arguments += ["--java=false", "--captioner=VisionLanguage", f"--captioner.pretrained={weights / 'smolvlm'}"]
    assert evaluate.main(["score", *arguments, f"--images={images[0].parent}", f"--out={tmp_path / 's.json'}"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    pixels = torch.stack([read_image(path) for path in images])
    expected = YesProbability(captioner=chat).score(Partners(), pixels, list(captions.values()), [0, 1])
    assert [found["images"][key]["VQAScore"] for key in captions] == [pytest.approx(row) for row in expected.tolist()]
    assert found["corpus"]["VQAScore"] == pytest.approx(expected.mean().item())
    with pytest.raises(UserError, match="VQAScore needs the images' folder: give --images"):
        evaluate.main(["score", *arguments])


def test_the_documented_settings_are_read(tmp_path, monkeypatch):
    from cyclefit.config.settings import parse

    known = parsers(pytest.MonkeyPatch())
    snippets = re.findall("```yaml\n# (.*)\n([^`]*)```", (ROOT / "docs" / "questions.md").read_text())
    assert len(snippets) == 3
    monkeypatch.chdir(ROOT)
    for command, text in snippets:
        (tmp_path / "own.yaml").write_text(text)
        script, *arguments = command.split()
        name = "train" if script == "train.py" else arguments.pop(0)
        parse(known[name], resolve_configs([*arguments, f"--config={tmp_path / 'own.yaml'}"]))
