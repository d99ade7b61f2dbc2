"""Every family keeps what a captioner promises: tiny models of the real classes with their processors."""

import copy
import json
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cyclefit import UserError
from cyclefit.finetune import CaptionerFinetune
from cyclefit.models import Decoding, VisionLanguage
from cyclefit.train.dry_run import step_needs, transformers_on_meta
from tests.conftest import ROOT
from tests.tiny import BUILT, PUBLISHED, tiny

SHARED = ROOT.parent / "shared" / "data"
CAPTIONS = ["A red ring", "Two small cats on a beach", "A"]


@pytest.fixture(scope="session", params=[*PUBLISHED, *BUILT])
def folder(request, tmp_path_factory):
    return tiny(request.param, SHARED, tmp_path_factory.mktemp("tiny"))


def side(folder):
    """The smallest square of more than one token where the tower takes any; None elsewhere."""
    return {"qwen2_5_vl": 84, "qwen3_vl": 64}.get(json.loads((folder / "config.json").read_text())["model_type"])


@pytest.fixture(scope="session")
def learner(folder):
    """With adapters that do something."""
    torch.manual_seed(0)
    captioner = VisionLanguage(str(folder), "lora", image_size=side(folder), lora_rank=2)
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    captioner.eval()  # no dropout between two runs of the same
    return captioner


@pytest.fixture(scope="session")
def images(learner):
    torch.manual_seed(1)
    return torch.rand(3, 3, learner.image_size, learner.image_size)


@pytest.fixture(scope="session")
def features(learner, images):
    with torch.no_grad():
        return learner.embed(images)


def own_inputs(captioner, images):
    """What the model's users give it: pixels and the prompt."""
    count = len(images)
    inputs = captioner.processor(
        images=[[image] for image in images] if captioner.family in ("idefics3", "gemma3") else list(images),
        text=[captioner.prompt] * count, do_rescale=False, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(inputs["input_ids"], captioner.ids.expand(count, -1))
    return {name: value for name, value in inputs.items() if name != "labels"}


def own_logits(captioner, images, tokens):
    """By the model's own forward pass."""
    inputs, rest = own_inputs(captioner, images), tokens[:, :-1]
    if captioner.encodes:
        begin = captioner.begin.expand(len(tokens), -1)
        logits = captioner.model(**inputs, decoder_input_ids=torch.cat([begin, rest], 1)).logits
        return logits[:, len(captioner.begin) - 1 :]
    for name, value in (("token_type_ids", int(captioner.family == "paligemma")), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(rest, value)], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], rest], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if captioner.family == "paligemma":  # its processor gives none without a suffix
        inputs["token_type_ids"] = torch.cat(
            [torch.zeros_like(captioner.ids).expand(len(rest), -1), torch.ones_like(rest)], 1
        )
    return captioner.model(**inputs).logits[:, len(captioner.ids) - 1 :]


@torch.no_grad()
def test_logits_are_the_models_own(learner, images, features):
    tokens = learner.tokenize(CAPTIONS)
    logits = learner.logits(features, tokens)
    assert logits.shape == (*tokens.shape, learner.vocab_size)
    assert (logits[0] - logits[2])[0].abs().max() > 1e-3, "the image says nothing"
    torch.testing.assert_close(logits, own_logits(learner, images, tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_token_sees_those_after_it(learner, features):
    tokens = learner.tokenize(CAPTIONS)
    before, changed = learner.logits(features, tokens), tokens.clone()
    changed[:, 2] = changed[:, 2] + 1
    after = learner.logits(features, changed)
    assert torch.equal(before[:, :3], after[:, :3]) or (before[:, :3] - after[:, :3]).abs().max() < 1e-5
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-4
    # Nor does what follows the end count.
    end = tokens.clone()
    end[2, learner.lengths(tokens)[2] + 1 :] = 5
    torch.testing.assert_close(learner.log_prob(features, end)[2], learner.log_prob(features, tokens)[2])


@torch.no_grad()
def test_what_is_generated_is_what_is_likely(learner, images, features):
    decoding, settings = Decoding(max_new_tokens=6), {"return_dict_in_generate": True, "output_logits": True}
    tokens = learner.generate(features, decoding, [1, 2, 3])[:, 0]
    mask = learner.mask(tokens)
    scores = learner.logits(features, tokens)
    assert torch.equal(scores.argmax(-1)[mask.bool()], tokens[mask.bool()])
    # The model's own, from pixels.
    inputs, ends = (
        own_inputs(learner, images),
        {"eos_token_id": learner.end_token_id, "pad_token_id": learner.pad_token_id},
    )
    if learner.encodes:
        inputs["decoder_input_ids"] = learner.begin.repeat(3, 1)
        ends["decoder_start_token_id"] = int(learner.begin[0])
    if learner.family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    theirs = learner.model.generate(**inputs, **ends, **settings, max_new_tokens=6, do_sample=False)
    steps = torch.stack(theirs.logits, 1).log_softmax(-1)
    assert torch.equal(theirs.sequences[:, -tokens.shape[1] :], tokens)
    summed = (steps.gather(-1, tokens[..., None])[..., 0] * mask).sum(1)
    torch.testing.assert_close(learner.log_prob(features, tokens), summed, atol=1e-3, rtol=1e-4)
    # Nothing stays behind: neither other images nor another length change what is found now.
    learner.generate(features[:1].repeat(2), decoding, [1, 2])
    torch.testing.assert_close(learner.logits(features, tokens), scores, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["nucleus", "beam"])
def test_decoding_does_not_depend_on_the_batch(learner, features, method):
    decoding = Decoding(method, 1 if method == "beam" else 2, max_new_tokens=5)
    together = learner.generate(features, decoding, [7, 8, 9])
    alone = learner.generate(features[1:2], decoding, [8])
    length = min(alone.shape[2], together.shape[2])
    assert torch.equal(alone[0, :, :length], together[1, :, :length])


def test_gradient_reaches_images_and_adapters_alone(learner, images):
    pixels = images.clone().requires_grad_()
    learner.zero_grad()
    learner.log_prob(learner.embed(pixels), learner.tokenize(CAPTIONS)).sum().backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    decoder = {id(p) for p in learner.decoder.parameters()}
    for name, parameter in learner.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert not parameter.requires_grad or id(parameter) in decoder, name
        assert (parameter.grad is not None) == parameter.requires_grad, name


QUESTIONS = ["Is it red?", 'Does this figure show "two cats on a beach"? Please answer yes or no.', "How many?\n"]
ANSWERS = ["Yes", "two small cats", "No"]


def own_chat(captioner, image, question, answer):
    """The processor's inputs for a question and its answer, and how many tokens the answer has."""
    processor, more = captioner.processor, {}
    if processor.chat_template:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        asked = processor.apply_chat_template(turns, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        whole = processor.apply_chat_template(turns)
        whole = whole[: whole.rindex(answer) + len(answer)]
    elif captioner.family == "paligemma":
        asked = whole = f"answer en {question}"
        more = {"suffix": answer}
    else:
        asked = f"Question: {question} Answer:"
        whole = f"{asked} {answer}"
    made = [processor(images=image, text=whole, do_rescale=False, return_tensors="pt", **more)]
    made.append(processor(images=image, text=asked, do_rescale=False, return_tensors="pt"))
    inputs, before = ({name: value for name, value in one.items() if name != "labels"} for one in made)
    if more:  # its processor adds the end token
        inputs |= {name: value[:, :-1] for name, value in inputs.items() if name != "pixel_values"}
    return inputs, inputs["input_ids"].shape[1] - before["input_ids"].shape[1]


def answers_no_questions(captioner):
    return captioner.encodes


@torch.no_grad()
def test_answers_are_as_likely_as_the_model_finds_them(learner, images, features):
    if answers_no_questions(learner):
        with pytest.raises(UserError, match=r"^mine: .* answers no questions: use a model with a chat template$"):
            learner.check_questions("mine")
        with pytest.raises(UserError, match="answers no questions"):
            learner.answer_log_probs(features, QUESTIONS, ANSWERS)
        return
    found = learner.answer_log_probs(features, QUESTIONS, ANSWERS)
    words = [["Yes", " Yes", "yes"], ["two"], ["No"]]
    first = learner.first_token_log_probs(features, QUESTIONS, words)
    for i, (image, question, answer) in enumerate(zip(images, QUESTIONS, ANSWERS, strict=True)):
        inputs, length = own_chat(learner, image, question, answer)
        ids = inputs["input_ids"][0]
        assert torch.equal(torch.cat(learner._encode_question(question, answer)), ids)
        steps = learner.model(**inputs).logits[0].log_softmax(-1)[-length - 1 : -1]
        assert 0 < length < 20
        expected = steps.gather(1, ids[-length:, None]).sum()
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-5)
        tokens = {learner.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words[i]}
        torch.testing.assert_close(first[i], steps[0, list(tokens)].logsumexp(0), atol=1e-4, rtol=1e-5)
    assert (found[0] - learner.answer_log_probs(features[1:2], QUESTIONS[:1], ANSWERS[:1])[0]).abs() > 1e-4, "blind"


def test_an_answer_carries_gradient_to_the_image_and_needs_few_logits(learner, images, monkeypatch):
    if answers_no_questions(learner):
        return
    rows, head = [], learner.head
    monkeypatch.setattr(learner, "head", lambda states: rows.append(states.shape[:-1].numel()) or head(states))
    pixels = images.clone().requires_grad_()
    features = learner.embed(pixels)
    answers = learner.answer_log_probs(features, QUESTIONS, ["Yes"] * 3)
    (answers + learner.first_token_log_probs(features, QUESTIONS, [["Yes"]] * 3)).sum().backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert max(rows) <= 3 * len(learner.tokenizer(" Yes").input_ids), "logits of more than the answers"


def test_checkpointed_layers_give_the_same_gradient(folder, learner, images):
    captioner = VisionLanguage(str(folder), "lora", image_size=side(folder), lora_rank=2, gradient_checkpointing=True)
    captioner.load_state_dict(learner.state_dict())
    captioner.eval()  # no dropout
    for layer in captioner.decoder.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.training = True

    def gradient():
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        captioner.zero_grad()
        torch.manual_seed(2)  # some layers drop out whatever their parts do
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = captioner.log_prob(captioner.embed(images), captioner.tokenize(CAPTIONS)).sum()
        loss.backward()
        return len(kept), [p.grad.clone() for p in captioner.parameters() if p.requires_grad]

    few, checkpointed = gradient()
    captioner.model.gradient_checkpointing_disable()
    many, plain = gradient()
    assert few < many
    for a, b in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_exported_it_says_the_same(learner, images, features, tmp_path):
    tokens = learner.generate(features, Decoding(max_new_tokens=5), [0, 0, 0])[:, 0]
    logits, exported = learner.logits(features, tokens), copy.deepcopy(learner)
    usage = exported.export("transformers", tmp_path)
    assert "AutoModelForImageTextToText" in usage
    compile(usage, "usage", "exec")
    # As others load it; its adapters are merged, and its processor cuts nothing into tiles.
    exported.model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    exported.processor = AutoProcessor.from_pretrained(tmp_path)
    assert not any("lora" in name for name, _ in exported.model.named_parameters())
    torch.testing.assert_close(own_logits(exported, images, tokens), logits, atol=1e-4, rtol=1e-4)


def test_a_step_without_values(folder):
    with torch.device("meta"):
        captioner = VisionLanguage(str(folder), "lora", image_size=side(folder))
    module = CaptionerFinetune(captioner)
    needs = step_needs(module, 2, 32)
    assert needs.flops > 0
    assert {p.dtype for p in captioner.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in captioner.parameters() if p.requires_grad} == {torch.float32}


FULL = {
    "smolvlm": 256_484_928, "qwen2.5-vl": 3_754_622_976, "qwen3-vl": 2_127_532_032, "blip-2": 3_744_761_856,
    "florence-2": 231_443_968,
}  # fmt: skip
"""Parameters, as published."""


@pytest.mark.parametrize("name", FULL)
def test_full_size(name, shared):
    folder = shared / "models" / PUBLISHED[name][0]
    if not folder.is_dir():
        pytest.skip(f"needs the configs of {folder.name}, which are not part of the project")
    with torch.device("meta"):
        captioner = VisionLanguage(str(folder))
    assert sum(p.numel() for p in captioner.parameters()) == FULL[name]
    tokens = captioner.tokenize(["A dog on a beach", "A cat"])
    assert captioner.pad_token_id < captioner.vocab_size > captioner.end_token_id
    with ExitStack() as stack:
        for change in transformers_on_meta():
            stack.enter_context(change)
        features = captioner.embed(torch.rand(2, 3, 300, 400, device="meta"))
        assert captioner.logits(features, tokens).shape == (*tokens.shape, captioner.vocab_size)
