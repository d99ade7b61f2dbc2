import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from cyclefit import UserError
from cyclefit.data import (
    BadSamples,
    Sample,
    coco_source,
    evaluation_batches,
    folder_source,
    img2dataset_source,
    nocaps_source,
    pack,
    table_source,
    verify_shards,
    write_shards,
)
from cyclefit.data.__main__ import main


def encoded(format="jpeg", mode="RGB", colour=(200, 30, 30), size=(16, 12), **options) -> bytes:
    stored = io.BytesIO()
    Image.new(mode, size, colour).save(stored, format, **options)
    return stored.getvalue()


def samples(number: int, start: int = 0) -> list[Sample]:
    image = encoded()
    return [Sample(f"k{i:03d}", image, [f"caption {i}"], {"id": i}) for i in range(start, start + number)]


def write(items, folder, **options) -> dict:
    return write_shards(items, folder, **options)


def entries(folder: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {entry.name: tar.extractfile(entry).read() for entry in tar}
    return found


def test_what_is_written(tmp_path):
    manifest = write(samples(7), tmp_path / "out", samples_per_shard=3, source="here")
    assert [s["name"] for s in manifest["shards"]] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [s["samples"] for s in manifest["shards"]] == [3, 3, 1]
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["source"], manifest["skipped"]["total"]) == (7, "here", 0)
    found = entries(tmp_path / "out")
    assert list(found)[:2] == ["k000.jpg", "k000.json"] and found["k000.jpg"] == encoded()
    assert json.loads(found["k004.json"]) == {"captions": ["caption 4"], "id": 4}
    assert verify_shards(tmp_path / "out") == {"shards": 3, "samples": 7}


def test_equal_samples_give_equal_bytes(tmp_path):
    first, second = (write(samples(5), tmp_path / name, samples_per_shard=2) for name in "ab")
    assert first == second
    assert (tmp_path / "a/000000.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()


def test_unusable_samples_are_named_and_counted(tmp_path):
    jpeg = encoded(size=(200, 200))
    (tmp_path / "x.xyz").write_bytes(b"what is this")
    (tmp_path / "x.jpg").write_bytes(b"what is this")
    bad = [
        Sample("gone", tmp_path / "gone.jpg", ["c"]),
        Sample("cut", jpeg[: len(jpeg) // 2], ["c"]),
        Sample("noise", tmp_path / "x.jpg", ["c"]),
        Sample("strange", tmp_path / "x.xyz", ["c"]),
        Sample("silent", encoded(), [" ", ""]),
        Sample("k001", encoded(), ["again"]),
        Sample("nothing", b"", ["c"]),
    ]
    skipped = write(samples(3) + bad, tmp_path / "out")["skipped"]
    assert {entry["key"]: entry["reason"] for entry in skipped["samples"]} == {
        "gone": "missing file",
        "cut": "broken image",
        "noise": "broken image",
        "strange": "unknown image format .xyz",
        "silent": "no caption",
        "k001": "duplicate key",
        "nothing": "empty image",
    }
    assert skipped["reasons"]["broken image"] == 2 and skipped["total"] == 7
    assert verify_shards(tmp_path / "out")["samples"] == 3


def test_a_bomb_is_skipped(tmp_path, monkeypatch):
    bombs = [Sample("large", encoded(size=(12, 12)), ["c"]), Sample("larger", encoded(size=(40, 40)), ["c"])]
    small = Sample("small", encoded(size=(8, 8)), ["c"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    manifest = write([*bombs, small], tmp_path / "out")
    assert manifest["samples"] == 1
    assert manifest["skipped"]["reasons"] == {"above PIL's pixel limit": 2}


def test_formats(tmp_path):
    frames = [Image.new("P", (9, 9), colour) for colour in (1, 2)]
    gif = io.BytesIO()
    frames[0].save(gif, "gif", save_all=True, append_images=frames[1:])
    images = {
        "jpg": encoded("jpeg", "CMYK", (0, 0, 0, 0)),
        "png": encoded("png", "LA", (3, 4)),
        "webp": encoded("webp"),
        "bmp": encoded("bmp"),
        "tiff": encoded("tiff", "CMYK", (0, 255, 255, 0)),
        "gif": gif.getvalue(),
    }
    write([Sample(name, data, ["c"]) for name, data in images.items()], tmp_path)
    found = entries(tmp_path)
    for name in ("jpg", "png", "webp"):
        assert found[f"{name}.{name}"] == images[name]
    for name in ("bmp", "tiff", "gif"):
        assert Image.open(io.BytesIO(found[f"{name}.png"])).format == "PNG"
    assert Image.open(io.BytesIO(found["tiff.png"])).getpixel((0, 0)) == (255, 0, 0)


def test_keys_are_made_safe_and_stay_apart(tmp_path):
    keys = ["a/b.c", "a_b_c", "ünï", "../../etc/passwd", "long" * 60, "..."]
    write([Sample(key, encoded(), [key]) for key in keys], tmp_path)
    found = {name: data for name, data in entries(tmp_path).items() if name.endswith(".json")}
    assert len(found) == len(keys)
    assert all(name.count(".") == 1 and "/" not in name and len(name) < 100 for name in found)
    assert json.loads(found["a_b_c.json"]) == {"captions": ["a/b.c"], "source_key": "a/b.c"}
    assert sorted(json.loads(data)["captions"][0] for data in found.values()) == sorted(keys)


def test_a_folder_with_shards_is_refused(tmp_path):
    write(samples(2), tmp_path)
    with pytest.raises(FileExistsError, match="already holds 1 shards; choose another"):
        write(samples(2), tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match="of a run that did not finish"):
        write(samples(2), tmp_path)


def test_an_error_leaves_no_half_shard(tmp_path):
    def failing():
        yield from samples(5)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(failing(), tmp_path, samples_per_shard=3)
    assert {path.name for path in tmp_path.iterdir()} == {".begun.json", "000000.tar"}


def test_a_killed_run_leaves_no_half_shard_under_a_final_name(tmp_path):
    out = tmp_path / "out"
    code = (
        "import io, itertools, sys, time\nfrom PIL import Image\n"
        "from cyclefit.data import Sample, write_shards\n"
        "b = io.BytesIO(); Image.effect_noise((300, 300), 90).save(b, 'png')\n"
        "def s():\n    for i in itertools.count():\n"
        "        time.sleep(0.01)\n        yield Sample(str(i), b.getvalue(), ['c'])\n"
        "write_shards(s(), sys.argv[1], samples_per_shard=5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)])
    try:
        deadline = time.time() + 60
        while time.time() < deadline:
            if (out / "000001.tar").exists() and list(out.glob(".*.partial")):
                break
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    shards = sorted(out.glob("*.tar"))
    assert len(shards) >= 2 and list(out.glob(".*.partial")) and not (out / "manifest.json").exists()
    for shard in shards:
        with tarfile.open(shard) as tar:
            assert len(tar.getnames()) == 10
        shard.unlink()
    write(samples(1), out)
    assert {path.name for path in out.iterdir()} == {"000000.tar", "manifest.json"}


def test_packing_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for name in (*(f"x {k}" for k in range(6)), "x_0"):  # the last one's key in the shard would be the first one's
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"caption of {name}")
    command = ["pack", "folder", f"--images={tmp_path / 'images'}", "--samples_per_shard=2"]
    assert main([*command, f"--out={tmp_path / 'whole'}"]) == 0
    stored, added = pack._stored, []

    def interrupted(image):
        added.append(image)
        if len(added) == 6:
            raise KeyboardInterrupt
        return stored(image)

    monkeypatch.setattr(pack, "_stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*command, f"--out={tmp_path / 'cut'}"])
    shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
    (tmp_path / "damaged" / "000000.tar").write_bytes(b"")
    assert main([*command, f"--out={tmp_path / 'damaged'}"]) == 2
    assert "000000.tar is damaged or missing; empty the folder" in capsys.readouterr().err
    assert main([*command, f"--out={tmp_path / 'cut'}"]) == 0
    assert "continuing after 2 shards of 4 samples" in capsys.readouterr().err
    assert len(added) == 6 + 3
    whole, cut = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert whole == cut


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no sample could be used \(1 x no caption\)"):
        write([Sample("a", encoded(), [])], tmp_path)
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        write(samples(1), tmp_path, samples_per_shard=0)


# verification


def rewrite(shard: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(shard, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "000001.tar").unlink(), "000001.tar is missing"),
        (lambda d: (d / "9.tar").write_bytes(b""), "9.tar is not in the manifest"),
        (lambda d: (d / "000000.tar").open("ab").write(b"x"), "000000.tar has another sha256"),
        (
            lambda d: (d / "000001.tar").write_bytes((d / "000001.tar").read_bytes()[:700]),
            "000001.tar has another sha256",
        ),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_verification_finds(tmp_path, change, message):
    write(samples(4), tmp_path, samples_per_shard=2)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        verify_shards(tmp_path)


def test_verification_needs_a_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        verify_shards(tmp_path)


# sources


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (folder / name).write_bytes(encoded())
    return folder


def simple(source) -> dict[str, list[str]]:
    return {sample.key: sample.captions for sample in source}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '{"a.jpg": ["one", "two"], "b.jpg": "three", "gone.jpg": "four"}'),
        (
            "c.json",
            '[{"file": "a.jpg", "captions": ["one", "two"], "id": 7}, {"file": "b.jpg", "caption": "three"},'
            ' {"file": "gone.jpg", "caption": "four"}]',
        ),
        (
            "c.jsonl",
            '{"file_name": "a.jpg", "text": "one"}\n{"file_name": "a.jpg", "text": "two"}\n\n'
            '{"file_name": "b.jpg", "text": "three"}\n{"file_name": "gone.jpg", "text": "four"}',
        ),
        ("c.csv", '\ufefffile,caption\na.jpg,one\na.jpg,two\nb.jpg,"three"\ngone.jpg,four\n'),
        ("c.tsv", "caption\timage\none\ta.jpg\ntwo\ta.jpg\nthree\tb.jpg\nfour\tgone.jpg\n"),
    ],
)
def test_folder_with_a_captions_file(images, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = simple(folder_source(images, tmp_path / name))
    assert found == {"a": ["one", "two"], "b": ["three"], "sub/c": [], "gone": ["four"]}
    manifest = write(folder_source(images, tmp_path / name), tmp_path / "out")
    assert manifest["skipped"]["reasons"] == {"no caption": 1, "missing file": 1}


def test_folder_with_text_files(images):
    (images / "a.txt").write_text("one\n\n two \n")
    (images / "sub" / "c.txt").write_text("three")
    assert simple(folder_source(images)) == {"a": ["one", "", " two "], "b": [], "sub/c": ["three"]}


def test_images_of_one_name_stay_apart(images):
    (images / "a.png").write_bytes(encoded("png"))
    assert sorted(sample.key for sample in folder_source(images)) == ["a.jpg", "a.png", "b", "sub/c"]


def test_coco(images, tmp_path):
    path = tmp_path / "captions.json"
    layout = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "two"}],
    }
    path.write_text(json.dumps(layout))
    found = list(coco_source(images, path))
    assert simple(found) == {"a": ["one", "two"], "b": []} and found[0].extra == {"image_id": 1}
    with pytest.raises(ValueError, match="is not divided into splits"):
        list(coco_source(images, path, "val"))
    path.write_text(json.dumps(layout | {"annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}))
    with pytest.raises(ValueError, match="not instances"):
        list(coco_source(images, path))


def test_karpathy(images, tmp_path):
    path = tmp_path / "dataset.json"
    entry = {"filename": "a.jpg", "split": "val", "cocoid": 9, "sentences": [{"raw": "one"}, {"raw": "two"}]}
    other = {"filename": "c.jpg", "filepath": "sub", "split": "restval", "sentences": [{"raw": "three"}]}
    path.write_text(json.dumps({"images": [entry, other, entry | {"split": "train"}]}))
    (sample,) = coco_source(images, path, "val")
    assert (sample.key, sample.captions) == ("a", ["one", "two"])
    assert sample.extra == {"image_id": 9, "split": "val"}
    train, rest = coco_source(images, path, "restval+train")
    assert {train.image.name, rest.image.name} == {"a.jpg", "c.jpg"} and train.image.is_file()
    with pytest.raises(ValueError, match="no split test; it has restval, train, val"):
        list(coco_source(images, path, "test"))


def test_nocaps(images, tmp_path):
    path = tmp_path / "nocaps.json"
    entries = [
        {"id": 0, "file_name": "a.jpg", "domain": "in-domain", "open_images_id": "f00"},
        {"id": 1, "file_name": "b.jpg", "domain": "out-domain", "open_images_id": "f01"},
    ]
    annotations = [{"image_id": 0, "caption": "one"}, {"image_id": 1, "caption": "two"}]
    path.write_text(json.dumps({"images": entries, "annotations": annotations}))
    assert simple(nocaps_source(images, path)) == {"a": ["one"], "b": ["two"]}
    (sample,) = nocaps_source(images, path, "out-domain")
    assert sample.extra == {"image_id": 1, "domain": "out-domain", "open_images_id": "f01"}
    with pytest.raises(ValueError, match="no domain near-domain; it has in-domain, out-domain"):
        list(nocaps_source(images, path, "near-domain"))


def test_img2dataset(tmp_path, caplog):
    source = tmp_path / "source"
    source.mkdir()
    files = {}
    for i in range(4):
        record = {"caption": f"c{i}", "url": f"u{i}", "status": "success", "error_message": None, "key": i}
        record |= {"status": "failed_to_download"} if i == 3 else {}
        files |= {f"0000{i}.jpg": encoded(), f"0000{i}.json": json.dumps(record).encode()}
        files[f"0000{i}.txt"] = f"c{i}".encode()
    rewrite(source / "00000.tar", files)
    rewrite(source / "00001.tar", {"00010.jpg": encoded(), "00010.txt": b"only text", "00010.pyd": b"x"})
    rewrite(source / "whole", {"00020.jpg": encoded(), "00020.txt": b"c", "00021.jpg": b"0" * 9000})
    (source / "00002.tar").write_bytes((source / "whole").read_bytes()[:5000])
    found = {sample.key: sample for sample in img2dataset_source(source)}
    assert found["00001"].captions == ["c1"] and found["00001"].extra == {"url": "u1"}
    assert found["00010"].captions == ["only text"]
    assert "00002.tar: truncated shard, from 00020 on" in caplog.text
    manifest = write(img2dataset_source(source), tmp_path / "out")
    assert manifest["samples"] == 5 and manifest["skipped"]["reasons"] == {"empty image": 1, "truncated shard": 1}


def test_img2dataset_as_it_is(tmp_path, capsys):
    """The layout of its webdataset writer: failed downloads are only in the parquet files beside the shards."""
    shards = {"00000": ["one", "two", None], "00001": ["three"]}
    for shard, captions in shards.items():
        files = {}
        for i, caption in enumerate(captions):
            key = f"{shard}{2 * i:04d}"
            record = {"url": f"https://x/{i}.jpg", "caption": caption, "similarity": 0.3, "key": key}
            record |= {"status": "success", "error_message": None, "width": 16, "height": 12, "exif": "{}"}
            files |= {f"{key}.jpg": encoded(), f"{key}.txt": (caption or "").encode()}
            files[f"{key}.json"] = json.dumps(record | {"sha256": "0" * 64}, indent=4).encode()
        rewrite(tmp_path / f"{shard}.tar", files)
        (tmp_path / f"{shard}.parquet").write_bytes(b"PAR1 is not opened PAR1")
        stats = {"count": 2 * len(captions), "successes": len(captions), "failed_to_download": len(captions)}
        stats |= {"failed_to_resize": 0, "status_dict": {"success": len(captions), "HTTP Error 404": len(captions)}}
        (tmp_path / f"{shard}_stats.json").write_text(json.dumps(stats, indent=4))
    bad = BadSamples(1)
    (batch,) = evaluation_batches(str(tmp_path), image_size=8, batch_size=9, bad=bad)
    assert batch.captions == ["one", "two", "three"] and batch.keys == ["000000000", "000000002", "000010000"]
    assert bad.reasons == {"no caption": 1}
    assert main(["pack", "img2dataset", f"--images={tmp_path}", f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    assert "4/4" in said.err and "3 samples in 1 shards" in said.out and "1 x no caption" in said.out
    record = json.loads(entries(tmp_path / "out")["000000002.json"])
    assert record["captions"] == ["two"] and record["similarity"] == 0.3 and "status" not in record
    (tmp_path / "00001_stats.json").write_text("")
    assert main(["pack", "img2dataset", f"--images={tmp_path}", f"--out={tmp_path / 'again'}"]) == 2
    assert "00001_stats.json: not json" in capsys.readouterr().err


TABLES = {
    "c.csv": '\ufeffID,Image,Caption\r\n7,a.jpg,"one, two"\r\n\r\n8,b.jpg,"say ""three""\nor four"\r\n'
    "9,./a.jpg,five\r\n,gone.jpg,\r\n",
    "semicolons.csv": 'id; image ;caption\n7;a.jpg;one, two\n8;b.jpg;"say ""three""\nor four"\n9;a.jpg;five\n'
    ";gone.jpg;\n",
    "c.tsv": 'path\tid\ttext\na.jpg\t7\t["one, two", "five"]\nb.jpg\t8\t"say ""three""\nor four"\ngone.jpg\t\t[]\n',
    "pandas.csv": "image_path,caption,id\na.jpg,\"['one, two', 'five']\",7\n"
    'b.jpg,"say ""three""\nor four",8\ngone.jpg,,\n',
    "c.jsonl": '\ufeff{"id": "7", "filename": "a.jpg", "captions": ["one, two", "five"]}\n\n'
    '{"filename": "b.jpg", "captions": "say \\"three\\"\\nor four", "id": "8"}\n'
    '{"filename": "gone.jpg", "captions": null}',
    "c.json": '[{"image": "a.jpg", "id": "7", "caption": "one, two"}, {"image": "a.jpg", "caption": ["five"]},'
    '{"image": "b.jpg", "caption": "say \\"three\\"\\nor four", "id": "8"}, {"image": "gone.jpg"}]',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(images, name):
    """Several rows of an image and lists of captions are the same; further columns are kept."""
    (images / name).write_bytes(TABLES[name].encode())
    a, b, gone = table_source(images / name)
    assert (a.key, a.image, a.captions) == ("a", images / "a.jpg", ["one, two", "five"])
    assert {k.lower(): v for k, v in a.extra.items()} == {"id": "7"} and list(b.extra.values()) == ["8"]
    assert b.captions == ['say "three"\nor four'] and not any(gone.captions)
    manifest = write(table_source(images / name), images / "out")
    assert manifest["samples"] == 2 and manifest["skipped"]["reasons"] == {"no caption": 1}


def test_a_table_of_files_to_captions_and_texts_that_look_like_lists(images):
    (images / "c.json").write_text('{"a.jpg": ["one", "two"], "b.jpg": "[three", "sub/c.jpg": "[4, 5]"}')
    found = simple(table_source(images / "c.json"))
    assert found == {"a": ["one", "two"], "b": ["[three"], "sub/c": ["[4, 5]"]}
    (images / "c.jsonl").write_text(json.dumps({"image": "a.jpg", "text": "one\u2028two"}, ensure_ascii=False))
    assert simple(table_source(images / "c.jsonl")) == {"a": ["one\u2028two"]}


def test_packing_a_table(images, tmp_path, capsys):
    (images / "b.jpg").write_bytes(b"no image")
    (images / "a.png").write_bytes(encoded("png"))
    rows = ["a.jpg,1,one", "a.png,2,two", "b.jpg,3,three", "gone.jpg,4,four", ",5,five", "sub/c.jpg,6, ", "a.jpg,7,six"]
    (tmp_path / "t.csv").write_text("\n".join(["picture,text,told", *rows]))
    out = tmp_path / "out"
    command = ["pack", "table", f"--annotations={tmp_path / 't.csv'}", f"--images={images}", f"--out={out}"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "t.csv has no column for the image (file, " in said and "one of its columns, picture, text, told." in said
    command += ["--image_column=picture", "--caption_column=told"]
    assert main(command) == 0
    assert "2 samples in 1 shards" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert {Path(entry["key"]).name: entry["reason"] for entry in manifest["skipped"]["samples"]} == {
        "t.csv, line 6": "no image named",
        "b": "broken image",
        "gone": "missing file",
        "c": "no caption",
    }
    stored = [json.loads(data) for name, data in entries(out).items() if name.endswith("json")]
    assert stored == [
        {"captions": ["one", "six"], "text": "1", "source_key": "a.jpg"},
        {"captions": ["two"], "text": "2", "source_key": "a.png"},
    ]
    before = (out / "000000.tar").read_bytes()
    assert main(command) == 2 and "already holds 1 shards" in capsys.readouterr().err
    assert (out / "000000.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", b"image,text\na.jpg,one\nb.jpg,two, three\n", r"line 3: 3 columns, the header has 2; a caption that"),
        ("t.csv", b'image,text\na.jpg,"one\nb.jpg,two\n', r"line 3: unexpected end of data; a caption that begins"),
        ("t.tsv", "image\ttext\na.jpg\tün\n".encode("latin-1"), r"not in UTF-8 \(.* byte 17\)"),
        ("t.csv", b"", r"no column for the image .* its columns, none\."),
        ("t.csv", b"image,text\nhttps://x/a.jpg,one\n", r"line 2: image is an address.* with img2dataset"),
        ("t.jsonl", b'{"image": "../../etc/passwd", "text": "x"}', r"line 1: the image .* lies outside"),
        ("t.jsonl", b'{"image": "a.jpg", "text": "x"}\n[]', r"line 2: expected an object"),
        ("t.json", b"7", r"t\.json: expected a list of objects"),
        ("t.xlsx", b"PK", r"t\.xlsx: a table is a \.csv, \.tsv, \.json or \.jsonl file"),
    ],
)
def test_tables_that_cannot_be_read(images, name, text, message):
    (images / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        list(table_source(images / name))


# the command


def test_the_command(images, tmp_path, capsys):
    (images / "captions.json").write_text('{"a.jpg": "one", "b.jpg": "two"}')
    out = str(tmp_path / "out")
    assert main(["pack", "folder", "--images", str(images), "--out", out, "--samples_per_shard", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 samples in 2 shards" in printed and "1 samples skipped: 1 x no caption" in printed
    assert main(["verify", out]) == 0
    assert "2 samples in 2 shards" in capsys.readouterr().out
    limited = ["pack", "folder", "--images", str(images), "--out", str(tmp_path / "one"), "--limit", "1"]
    assert main(limited) == 0 and len(entries(tmp_path / "one")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "folder", "--images", "nowhere", "--out", "OUT"], "nowhere is not a folder"),
        (["pack", "coco", "--images", "IMAGES", "--out", "OUT"], "needs --annotations"),
        (
            ["pack", "coco", "--images", "IMAGES", "--annotations", "no.json", "--out", "OUT"],
            "no.json does not",
        ),
        (["pack", "folder", "--images", "IMAGES", "--annotations", "BAD.json", "--out", "OUT"], "not json"),
        (["pack", "folder", "--images", "IMAGES", "--annotations", "BAD.csv", "--out", "OUT"], "first row"),
        (["pack", "folder", "--images", "IMAGES", "--split", "val", "--out", "OUT"], "takes no --split"),
        (["pack", "coco", "--out", "OUT"], "pack coco needs --images, a folder."),
        (["pack", "table", "--images", "IMAGES", "--out", "OUT"], "pack table needs --annotations, a .csv"),
        (["pack", "coco", "--images", "IMAGES", "--revision", "v1", "--out", "OUT"], "takes no --revision"),
        (["pack", "folder", "--images", "IMAGES", "--limit", "0", "--out", "OUT"], "--limit 0"),
        (["pack", "img2dataset", "--images", "IMAGES", "--out", "OUT"], "contains no .tar files"),
        (["verify", "OUT"], "has no manifest.json"),
    ],
)
def test_mistakes_end_with_one_sentence(images, tmp_path, capsys, arguments, message):
    (tmp_path / "BAD.json").write_text("{")
    (tmp_path / "BAD.csv").write_text("a,b\n1,2\n")
    places = {"OUT": "out", "BAD.json": "BAD.json", "BAD.csv": "BAD.csv", "IMAGES": "images"}
    arguments = [str(tmp_path / places[a]) if a in places else a for a in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_packing_needs_no_torch():
    code = "import sys; import cyclefit.data.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# other people's tars


def strange_tar(path: Path, format=tarfile.PAX_FORMAT) -> set[str]:
    """A tar with samples under all sorts of names, and members that are none; the keys of the samples."""
    keys = {"./000", "dir.v1/000", "dir.v1/.hidden/001", "/absolute/002", "../003", "a b", "ünï"}
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("./dir.v1")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, key in enumerate(sorted(keys)):
            record = json.dumps({"caption": f"c{i}"}).encode()
            for name, content in ((f"{key}.JPG", encoded()), (f"{key}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            hidden = tarfile.TarInfo(f"{Path(key).parent}/._{Path(key).name}.jpg")  # macOS
            hidden.size = 3
            tar.addfile(hidden, io.BytesIO(b"mac"))
        for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"{name}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    return keys


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_packing_and_training_read_the_same_of_a_tar(tmp_path, format):
    """Dots and slashes before a name lose nothing; what has no file of its own is named."""
    (tmp_path / "source").mkdir()
    keys = strange_tar(tmp_path / "source/0.tar", format)
    manifest = write(img2dataset_source(tmp_path / "source"), tmp_path / "out")
    assert manifest["samples"] == len(keys) == verify_shards(tmp_path / "out")["samples"]
    assert {entry["key"] for entry in manifest["skipped"]["samples"]} == {"soft", "hard", "pipe"}
    bad = BadSamples(1)
    settings = {"image_size": 8, "batch_size": 50, "bad": bad}
    (batch,) = evaluation_batches(str(tmp_path / "source"), **settings)
    assert set(batch.keys) == keys
    assert bad.reasons == {"no caption": 3}


def test_a_tar_that_breaks_off_between_two_samples_is_noticed(tmp_path):
    """Python's tarfile takes a missing end and a broken header for the end."""
    write(samples(4), tmp_path / "whole")
    whole = (tmp_path / "whole/000000.tar").read_bytes()
    with tarfile.open(tmp_path / "whole/000000.tar") as tar:
        third = tar.getmembers()[4].offset
    breaks = {"cut": whole[:third], "header": whole[: third + 300], "garbage": whole[:third] + b"\xff" * 2048}
    for name, content in breaks.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "000000.tar").write_bytes(content)
        skipped = write(img2dataset_source(tmp_path / name), tmp_path / f"{name}-out")["skipped"]
        assert skipped["reasons"] == {"truncated shard": 1}
        assert skipped["samples"][0]["key"] == f"{tmp_path / name / '000000.tar'}, from k001 on"
        bad = BadSamples(1)
        list(evaluation_batches(str(tmp_path / name), image_size=8, batch_size=9, bad=bad))
        assert bad.reasons == {"truncated shard": 1}


@pytest.mark.parametrize("members", [{}, {"readme": b"x", "dir/x.pyd": b"x"}, {"._000.jpg": b"x"}])
def test_tars_without_a_sample_are_one_sentence(tmp_path, capsys, members):
    (tmp_path / "source").mkdir()
    rewrite(tmp_path / "source/0.tar", members)
    command = ["pack", "img2dataset", "--images", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "1 .tar files of" in said and "hold no sample: a sample is KEY.jpg" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_is_no_loss(tmp_path):
    """JSON and the names in a tar can hold it, UTF-8 cannot."""
    write([Sample("\ud800", encoded(), ["one \udcff"]), Sample("_", encoded(), ["two"])], tmp_path)
    stored = [json.loads(content) for name, content in entries(tmp_path).items() if name.endswith("json")]
    assert [(record["captions"], record["source_key"]) for record in stored] == [
        (["one \udcff"], "\ud800"),
        (["two"], "_"),
    ]
