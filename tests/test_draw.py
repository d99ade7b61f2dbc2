"""`evaluate.py draw`: a benchmark's prompts, in the folder that its own evaluation reads."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cyclefit import UserError, evaluate
from cyclefit.rerank import sample_seed
from tests.conftest import ROOT

# Lines as GenEval's create_prompts.py writes them.
PROMPTS = [
    {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a photo of a red bench"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cup left of a dog",
    },
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "a photo of two cups",
    },
]


@pytest.fixture
def draw(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])

    def run(prompts, out="out", **more):
        own = {"prompts": prompts, "out": tmp_path / out, "generator": "StableDiffusion"}
        own |= {"generator.pretrained": weights / "stable-diffusion", "generator.steps": 2, "num_images": 2}
        assert evaluate.main(["draw", *[f"--{name}={value}" for name, value in (own | more).items()]]) == 0
        return tmp_path / out

    return run


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in PROMPTS))
    return path


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def read_as_geneval(folder):
    """The images with their metadata, found as GenEval's evaluate_images.py finds them."""
    for subfolder in os.listdir(folder):
        if (folder / subfolder).is_dir() and subfolder.isdigit():
            with (folder / subfolder / "metadata.jsonl").open() as file:
                metadata = json.load(file)
            for name in os.listdir(folder / subfolder / "samples"):
                assert re.match(r"\d+\.png", name)
                yield int(subfolder), int(name[:4]), metadata, folder / subfolder / "samples" / name


def test_geneval_reads_what_is_drawn(draw, geneval, generator, launch):
    run = launch("miniature_sd_lora.yaml", "tuned")
    folder = draw(geneval, runs=json.dumps([str(run)]), batch_size=2)
    found = {model: {(i, k): path for i, k, _, path in read_as_geneval(folder / model)} for model in ("base", "tuned")}
    assert found["base"].keys() == found["tuned"].keys() == {(i, k) for i in range(3) for k in range(2)}
    assert [metadata for i, k, metadata, _ in sorted(read_as_geneval(folder / "base"), key=str) if not k] == PROMPTS
    for (i, k), path in found["base"].items():
        seed = sample_seed(f"{i:05d}/{k}", 0)
        [expected] = generator.generate([PROMPTS[i]["prompt"]], [seed], 2, 7.5)
        torch.testing.assert_close(pixels(path), expected, atol=0.5 / 255 + 1e-4, rtol=0)
    different = [(pixels(path) - pixels(found["tuned"][name])).abs().max() for name, path in found["base"].items()]
    assert max(different) > 0, "the run's weights are not used"


def test_an_interrupted_drawing_continues(draw, geneval, tmp_path):
    folder = draw(geneval)
    lost, kept = folder / "base/00001/samples/0001.png", folder / "base/00002/samples/0000.png"
    before, times = pixels(lost), kept.stat().st_mtime_ns
    lost.unlink()
    draw(geneval)
    torch.testing.assert_close(pixels(lost), before, atol=1.1 / 255, rtol=0)
    assert kept.stat().st_mtime_ns == times
    with pytest.raises(UserError, match=r"base has images with other settings \(num_images, seed\): choose another"):
        draw(geneval, seed=1, num_images=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="mine is not empty and contains no images drawn by this command"):
        draw(geneval, "mine")


def test_t2i_compbench_reads_what_is_drawn(draw, tmp_path):
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\n\nThe cat is on the left of the car.\n")
    folder = draw(tmp_path / "color_val.txt")
    names = sorted(os.listdir(folder / "base" / "samples"), key=lambda name: name[-10:])
    # Its question_id is the last six digits.
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == [0, 1, 2, 3]
    assert [name.rpartition("_")[0] for name in names] == [
        *["a green bench and a blue bowl"] * 2,
        *["The cat is on the left of the car."] * 2,
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}', r'a.jsonl, line 1: expected an object with a "prompt", as in GenEval'),
        ("a.txt", "a\n../b", r"a.txt, line 2: '../b' cannot be a file name"),
        ("a.txt", "a" * 241, r"a.txt, line 1: 'aaaa.* cannot be a file name"),
        ("a.txt", "\n", r"prompts: .*a.txt is empty"),
        ("a.csv", "a", r"a.csv is neither a .jsonl file, as GenEval's, nor a .txt"),
        ("a.jsonl", None, r"prompts: there is no file .*a.jsonl"),
    ],
)
def test_mistakes_are_named(draw, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        draw(tmp_path / name)
    assert not (tmp_path / "out").exists()
