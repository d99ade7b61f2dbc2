"""ClipCap over the miniature's CLIP and a tiny GPT-2."""

import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from transformers import GPT2Config, GPT2LMHeadModel

from cyclefit import UserError
from cyclefit.finetune import CaptionerFinetune
from cyclefit.models import ClipCap, Decoding
from cyclefit.train.dry_run import step_needs
from tests.tiny import tokenizer


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    torch.manual_seed(0)
    folder, words = tmp_path_factory.mktemp("gpt"), tokenizer(eos_token="<|endoftext|>")
    config = GPT2Config(vocab_size=len(words), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(params=["mlp", "transformer"])
def make(request, gpt, weights):
    torch.manual_seed(0)

    def build(**settings):
        shape = {"mapper": request.param, "prefix_length": 3, "mapper_layers": 1, "mapper_heads": 2}
        return ClipCap(**{"language_model": str(gpt), "clip": str(weights / "clip"), **shape, **settings})

    return build


def test_captions_depend_on_images_and_seeds(make, batch):
    captioner = make()
    images = batch.images[:3]
    features = captioner.embed(images)
    tokens = captioner.tokenize(["a red ring", "two cats", "a"])
    logits = captioner.logits(features, tokens)
    assert logits.shape == (*tokens.shape, captioner.vocab_size)
    assert (logits[0] - logits[1])[0].abs().max() > 1e-4
    changed = tokens.clone()
    changed[:, 2] = 7
    torch.testing.assert_close(captioner.logits(features, changed)[:, :3], logits[:, :3])
    decoding = Decoding("nucleus", 2, max_new_tokens=6)
    together = captioner.generate(features, decoding, [1, 2, 3])
    alone = captioner.generate(features[1:2], decoding, [2])
    length = min(together.shape[2], alone.shape[2])
    assert torch.equal(alone[0, :, :length], together[1, :, :length])
    greedy = captioner.generate(features, Decoding(max_new_tokens=6), range(3))[:, 0]
    mask = captioner.mask(greedy).bool()
    assert torch.equal(captioner.logits(features, greedy).argmax(-1)[mask], greedy[mask])


def test_frozen_parameters_are_cast_to_half(gpt, weights):
    """On the meta device, which is no CPU either; the language model's buffers and the mapper are not."""
    with torch.device("meta"):
        captioner = ClipCap(None, str(gpt), str(weights / "clip"), trainable="mapper")
        captioner.model.register_buffer("frequencies", torch.ones(2))
    captioner.half_on_gpu()
    assert {p.dtype for part in (captioner.model, captioner.clip) for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in captioner.mapper.parameters()} == {torch.float32}
    assert captioner.model.frequencies.dtype == captioner.clip.image_mean.dtype == torch.float32


@pytest.mark.parametrize("trainable", ["mapper", "mapper and decoder"])
def test_what_was_trained_is_exported_and_read(make, batch, trainable, tmp_path):
    captioner = make(trainable=trainable)
    trained = {name.partition(".")[0] for name, p in captioner.named_parameters() if p.requires_grad}
    assert trained == ({"mapper"} if trainable == "mapper" else {"mapper", "model"})
    optimizer = torch.optim.SGD([p for p in captioner.parameters() if p.requires_grad], 0.1)
    tokens = captioner.tokenize(batch.captions[:4])
    captioner.loss(captioner.embed(batch.images[:4]), tokens).mean().backward()
    assert all(p.grad is not None for p in captioner.parameters() if p.requires_grad)
    assert all(p.grad is None for p in captioner.clip.parameters())
    optimizer.step()
    captioner.eval()
    usage = captioner.export("clipcap", tmp_path)
    printed = {"image": to_pil_image(batch.images[0])}
    exec(usage, printed)
    assert printed["caption"] == captioner.sample(batch.images[:1], Decoding(), seeds=[0])[0][0]
    assert (tmp_path / "model.safetensors").exists() == (trainable != "mapper")
    torch.manual_seed(5)
    again = make(pretrained=str(tmp_path))
    features = captioner.embed(batch.images[:4])
    torch.testing.assert_close(again.logits(features, tokens), captioner.logits(features, tokens))
    with pytest.raises(UserError, match="prefix_length 3"):
        make(pretrained=str(tmp_path), prefix_length=4)
    (tmp_path / "mapper.safetensors").unlink()
    with pytest.raises(UserError, match=r"mapper\.safetensors"):
        make(pretrained=str(tmp_path))


def test_gradient_reaches_the_image(make, batch):
    pixels = batch.images[:2].clone().requires_grad_()
    captioner = make(trainable="mapper")
    captioner.log_prob(captioner.embed(pixels), captioner.tokenize(["a red ring", "a"])).sum().backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_step_without_values(make):
    with torch.device("meta"):
        captioner = make(trainable="mapper")
    assert step_needs(CaptionerFinetune(captioner), 2, 32).flops > 0
    assert {p.dtype for p in captioner.model.parameters()} == {torch.bfloat16}
