"""Preference pairs as shards, as batches, and with the columns of TRL and Diffusion-DPO."""
# ruff: noqa: F811

import io
import json

import pytest
import torch
from PIL import Image

from cyclefit.data import Sample, ShardData, UnusableData, evaluation_batches, expand_shards, write_shards
from cyclefit.data.__main__ import main
from cyclefit.latents import with_latents
from tests.test_best_of import JUDGE, change, drawn, encoded, entries, photos, ranked  # noqa: F401


def pairs(folder, out, *more, judge=JUDGE) -> int:
    return main(["pairs", f"--evaluation={folder}", "--split=test", f"--judge={judge}", f"--out={out}", *more])


def jsons(folder):
    return {name.removesuffix(".json"): json.loads(text) for name, text in entries(folder).items() if "json" in name}


def skipped(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return {entry["key"]: entry["reason"] for entry in manifest["skipped"]["samples"]}


def train_batch(folder, *asked, **settings):
    settings = {"image_size": 32, "batch_size": 2, "epoch_size": 2, "num_workers": 0} | settings
    data = ShardData(train=str(folder), **settings)
    data.rejected |= set(asked)
    return next(iter(data.train_dataloader())).to("cpu")


def test_best_and_worst_are_a_pair(ranked, photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert pairs(ranked, out, f"--shards={photos}") == 0
    said = capsys.readouterr().out
    assert "mean score: 0.7333 of the chosen, 0.1000 of the rejected" in said
    assert "2 samples without a pair or unusable" in said
    files, records = entries(out), jsons(out)
    assert list(files) == [f"k{i}.{suffix}" for i in (0, 1, 3) for suffix in ("jpg", "json")]
    assert {key: (*of["captions"], of["rejected"]) for key, of in records.items()} == {
        "k0": ("base k0 2", "base k0 1"),
        "k1": ("base k1 0", "base k1 2"),
        "k3": ("base k3 1", "base k3 0"),
    }
    assert files["k3.jpg"] == encoded(3)
    assert records["k3"]["original_captions"] == ["old 3", "older 3"]
    assert records["k3"]["pair"] == {
        "margin": 0.8 - 0.1, "score": 0.8, "rejected_score": 0.1, "scores": [0.1, 0.8, 0.8], "index": 1,
        "rejected_index": 0, "noise_seed": 9, "rejected_noise_seed": 9, "judge": JUDGE, "model": "base",
        "split": "test", "scorer": "clip", "seed": 7, "candidates": 3,
    }  # fmt: skip
    assert main(["verify", str(out)]) == 0

    batch = train_batch(out, "captions", batch_size=3, epoch_size=3)
    assert dict(zip(batch.captions, batch.rejected_captions, strict=True)) == {
        of["captions"][0]: of["rejected"] for of in records.values()
    }
    assert batch.rejected_images is None
    assert train_batch(out).rejected_captions is None, "no cycle asks for them"


def test_candidates_too_close_make_no_pair(ranked, photos, tmp_path, capsys):
    assert pairs(ranked, tmp_path / "wide", f"--shards={photos}", "--min_margin=0.5") == 0
    assert list(jsons(tmp_path / "wide")) == ["k0", "k3"]
    assert skipped(tmp_path / "wide")["k1"] == "margin below 0.5"

    def alike(rows):
        for row in rows:
            if row["key"] == "k0":
                row["scores"][JUDGE] = 0.5
            if row["key"] == "k1" and row["decoding"] == "nucleus":
                row["caption"] = "the same"

    change(ranked, alike)
    assert pairs(ranked, tmp_path / "alike", f"--shards={photos}") == 0
    assert list(jsons(tmp_path / "alike")) == ["k3"]
    reasons = skipped(tmp_path / "alike")
    assert reasons["k0"] == reasons["k1"] == "no difference between the candidates"
    capsys.readouterr()
    assert pairs(ranked, tmp_path / "none", f"--shards={photos}", "--min_margin=9") == 2
    assert "nothing to write" in (said := capsys.readouterr().err)
    assert "1 x margin below 9" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shards={photos}", "--min_margin=-1"], "--min_margin must be a number of at least 0, not -1.0"),
        ([], "pairs captions needs --shards"),
        (["--direction=images"], "holds candidates of captions"),
    ],
)
def test_mistakes_are_one_sentence(ranked, photos, tmp_path, capsys, arguments, said):
    assert pairs(ranked, tmp_path / "pairs", *(argument.format(photos=photos) for argument in arguments)) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "pairs").glob("*"))


def test_a_second_round_leaves_nothing_of_the_first(ranked, photos, tmp_path):
    assert pairs(ranked, tmp_path / "pairs", f"--shards={photos}") == 0
    arguments = ["--split=test", f"--judge={JUDGE}", f"--shards={tmp_path / 'pairs'}", f"--out={tmp_path / 'best'}"]
    assert main(["best-of", f"--evaluation={ranked}", *arguments]) == 0
    for record in jsons(tmp_path / "best").values():
        assert not {"rejected", "pair"} & record.keys()
        assert "best_of" in record


@pytest.fixture
def image_pairs(drawn, tmp_path):
    assert pairs(drawn, tmp_path / "image_pairs", "--direction=images", judge="text cycle") == 0
    return tmp_path / "image_pairs"


def test_pairs_of_images(image_pairs, drawn, tmp_path):
    files, images = entries(image_pairs), drawn / "images/test/base"
    assert list(files) == [f"{key}.{suffix}" for key in "ab" for suffix in ("png", "rejected.png", "json")]
    for key, chosen, rejected in (("a", 0, 1), ("b", 1, 0)):
        assert files[f"{key}.png"] == (images / f"{key}-{chosen}.png").read_bytes()
        assert files[f"{key}.rejected.png"] == (images / f"{key}-{rejected}.png").read_bytes()
    record = jsons(image_pairs)["b"]
    assert (record["captions"], record["reference_key"], "rejected" in record) == (["draw b"], "b", False)
    assert [record["pair"][name] for name in ("noise_seed", "rejected_noise_seed")] == [11, 10]

    batch = train_batch(image_pairs, "images", crop="center")
    assert batch.rejected_images.dtype == torch.float32
    assert batch.rejected_images.shape == batch.images.shape == (2, 3, 32, 32)
    # Of one colour each: 20 times the row's number of red.
    reds = {"a": (3, 4), "b": (1, 0)}
    for key, image, rejected in zip(batch.keys, batch.images, batch.rejected_images, strict=True):
        assert [round(x[0].mean().item() * 255 / 20) for x in (image, rejected)] == list(reds[key])
    assert batch[:1].rejected_images.shape == (1, 3, 32, 32)
    assert train_batch(image_pairs).rejected_images is None
    assert next(evaluation_batches(str(image_pairs), image_size=32, batch_size=2)).rejected_images is None


def test_a_random_crop_is_the_same_for_both_images(tmp_path):
    wide = io.BytesIO()
    Image.linear_gradient("L").rotate(90).convert("RGB").resize((64, 16)).save(wide, "PNG")
    write_shards([Sample("k", wide.getvalue(), ["c"], rejected=wide.getvalue())], tmp_path)
    settings = {"image_size": 16, "batch_size": 1, "epoch_size": 1}
    batch = train_batch(tmp_path, "images", **settings, crop="random")
    assert torch.equal(batch.images, batch.rejected_images)
    assert not torch.equal(batch.images, train_batch(tmp_path, "images", **settings, crop="center").images)


def test_broken_halves_are_named(tmp_path, ranked, photos):
    made = [Sample("good", encoded(1), ["c"], rejected=encoded(2)), Sample("bad", encoded(1), ["c"], rejected=b"no")]
    write_shards(made, tmp_path / "out")
    assert skipped(tmp_path / "out") == {"bad": "broken image"}


@pytest.mark.parametrize(("asked", "option"), [("captions", ""), ("images", " --direction images")])
def test_shards_without_pairs_are_named_with_the_command(photos, asked, option):
    with pytest.raises(UnusableData, match="photos/000") as caught:
        train_batch(photos, asked)
    assert f"no rejected {asked[:-1]}: make pairs with `python -m cyclefit.data pairs{option}`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_latents_are_cached_beside_pairs(image_pairs, generator):
    (url,) = expand_shards(str(image_pairs))
    files = entries(image_pairs)
    for sample in with_latents([url], generator, 2, set()):
        assert sample.rejected == files[f"{sample.key}.rejected.png"]


def test_captions_go_to_trl_and_back(ranked, photos, tmp_path, capsys):
    made, out, back = tmp_path / "pairs", tmp_path / "trl", tmp_path / "back"
    assert pairs(ranked, made, f"--shards={photos}") == 0
    assert main(["export-pairs", f"--shards={made}", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"images_file_names", "prompt", "chosen", "rejected", "key", "pair"}] * 3
    assert rows[0]["prompt"] == [{"role": "user", "content": "Describe the image in one sentence."}]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "base k0 2"}]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "base k0 1"}]
    assert [(out / row["images_file_names"][0]).read_bytes() for row in rows] == [encoded(i) for i in (0, 1, 3)]
    assert main(["pack", "pairs", f"--images={out}", f"--out={back}"]) == 0
    for key, record in jsons(made).items():
        assert jsons(back)[key] == {name: record[name] for name in ("captions", "rejected", "pair")}
        assert entries(back)[f"{key}.jpg"] == entries(made)[f"{key}.jpg"]
    assert main(["export-pairs", f"--shards={made}", f"--out={out}"]) == 2
    assert "name a new folder" in capsys.readouterr().err
    assert main(["export-pairs", f"--shards={photos}", f"--out={tmp_path / 'none'}"]) == 2
    assert "has no pair in k0" in capsys.readouterr().err


def test_images_go_to_diffusion_dpo_and_back(image_pairs, tmp_path):
    out, back = tmp_path / "diffusion", tmp_path / "back"
    assert main(["export-pairs", f"--shards={image_pairs}", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    columns = {"jpg_0_file_name", "jpg_1_file_name", "label_0", "label_1", "caption", "key", "pair"}
    assert [set(row) for row in rows] == [columns] * 2
    assert [(row["caption"], row["label_0"], row["label_1"]) for row in rows] == [("draw a", 1, 0), ("draw b", 1, 0)]
    assert main(["pack", "pairs", f"--images={out}", f"--out={back}"]) == 0
    files, others = entries(image_pairs), entries(back)
    assert list(files) == list(others)
    for name, data in files.items():
        if name.endswith("png"):
            assert others[name] == data
        else:
            record = json.loads(data)
            assert json.loads(others[name]) == {field: record[field] for field in ("captions", "pair")}


def folder_of(tmp_path, *rows):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(encoded(i))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_pairs_of_others_are_read(tmp_path):
    blocks = [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}]
    whole = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "bad"}]
    picks = {"jpg_0_file_name": "0.jpg", "jpg_1_file_name": "1.jpg", "caption": "a boat"}
    folder = folder_of(
        tmp_path,
        {"images_file_names": ["0.jpg"], "prompt": "what?", "chosen": blocks, "rejected": whole, "origin": "test"},
        {"image_file_name": "1.jpg", "prompt": "what?", "chosen": "good", "rejected": "bad"},
        picks | {"label_0": 0.0, "label_1": 1.0, "model_0": "a"},
        picks | {"label_0": 0.5, "label_1": 0.5},
    )
    out = tmp_path / "out"
    assert main(["pack", "pairs", f"--images={folder}", f"--out={out}"]) == 0
    records, files = jsons(out), entries(out)
    assert records["000000001"] == {"captions": ["good"], "rejected": "bad", "origin": "test"}
    assert records["000000002"] == {"captions": ["good"], "rejected": "bad"}
    assert records["000000003"] == {"captions": ["a boat"], "model_0": "a"}
    assert (files["000000003.jpg"], files["000000003.rejected.jpg"]) == (encoded(1), encoded(0))
    assert skipped(out) == {"000000004": "label_0 is neither 0 nor 1"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "text": "b"}, "line 1 has the columns prompt, text; pairs have images_file_names"),
        ({"file_name": "../secret.png", "chosen": "a", "rejected": "b"}, "line 1: the image"),
        ([1], "has the columns none"),
    ],
)
def test_columns_that_are_no_pairs_are_one_sentence(tmp_path, capsys, row, said):
    (tmp_path / "secret.png").write_bytes(encoded(1, "png"))
    assert main(["pack", "pairs", f"--images={folder_of(tmp_path, row)}", f"--out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
