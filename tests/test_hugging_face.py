"""Packing data sets in the layouts of the Hugging Face hub."""

import hashlib
import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from cyclefit import UserError
from cyclefit.data import evaluation_batches
from cyclefit.data.__main__ import main
from cyclefit.data.hugging_face import find_dataset
from cyclefit.hub import silence_of
from tests.test_data_write import encoded, entries

RED, GREEN, BLUE = (encoded(colour=colour) for colour in ("red", "green", "blue"))


def pyarrow():
    pytest.importorskip("pyarrow", reason="parquet files are read by pyarrow, an optional dependency")
    return pytest.importorskip("pyarrow.parquet")


def parquet(path: Path, rows: list[dict], **types) -> None:
    """Writes rows as `datasets` does: images as structs."""
    pq = pyarrow()
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    fields = [field.with_type((types | {"image": image}).get(field.name, field.type)) for field in table.schema]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), path, row_group_size=2)


def row(data, caption, **others) -> dict:
    return {"image": {"bytes": data, "path": others.pop("path", None)}, "caption": caption, **others}


def pack(*arguments: object) -> int:
    return main(["pack", "hf", *map(str, arguments)])


def captions(folder: Path) -> dict[str, list[str]]:
    found = entries(folder).items()
    return {name.removesuffix(".json"): json.loads(data)["captions"] for name, data in found if name.endswith("json")}


def skipped(folder: Path) -> dict[str, str]:
    return {
        each["key"]: each["reason"] for each in json.loads((folder / "manifest.json").read_text())["skipped"]["samples"]
    }


# folders


def test_an_imagefolder(tmp_path, capsys):
    for split, lines in {"train": ["a", "b"], "test": ["c"]}.items():
        (tmp_path / "data" / split / "sub").mkdir(parents=True)
        (tmp_path / "data" / split / "sub/x.jpg").write_bytes(RED)
        rows = [json.dumps({"file_name": "sub/x.jpg", "text": line, "licence": "free"}) for line in lines]
        (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join([*rows, '{"file_name": "gone.jpg"}']))
    assert pack("--images", tmp_path / "data", "--out", tmp_path / "out") == 2
    assert "data has several splits: --split names one of test, train." in capsys.readouterr().err
    assert pack("--images", tmp_path / "data", "--split=val", "--out", tmp_path / "out") == 2
    assert "data has no split val: --split names one of test, train." in capsys.readouterr().err
    assert pack("--images", tmp_path / "data", "--split=train", "--out", tmp_path / "out") == 0
    (stored,) = (json.loads(data) for name, data in entries(tmp_path / "out").items() if name.endswith("json"))
    assert stored == {"captions": ["a", "b"], "licence": "free", "source_key": "sub/x"}
    assert skipped(tmp_path / "out") == {"gone": "no caption"}
    # Without splits, as csv.
    (tmp_path / "data/test/metadata.jsonl").unlink()
    (tmp_path / "data/test/metadata.csv").write_text('file_name,additional,text\nsub/x.jpg,1,"d, e"\n')
    (sample,) = find_dataset(str(tmp_path / "data/test")).samples()
    assert (sample.captions, sample.extra) == (["d, e"], {"additional": "1"})


def test_parquet_files(tmp_path, capsys):
    """Rows that follow each other with one image are merged, columns of other kinds left out, broken ones named."""
    first = [
        row(RED, "one", path="r.jpg", score=0.5, label=None, mask=b"x"),
        row(RED, "two", path="r.jpg", score=0.25, label=None, mask=b"y"),
        row(GREEN, " ", path=None, score=0.5, label=1, mask=b""),
        row(b"broken", "four", path=None, score=0.5, label=1, mask=b""),
        row(None, "five", path=None, score=0.5, label=1, mask=b""),
        row(None, "six", path=None, score=0.5, label=1, mask=b""),
        row(RED, "again", path="r.jpg", score=0.5, label=3, mask=b""),
    ]
    data = tmp_path / "data"
    parquet(data / "data/train-00000-of-00003.parquet", first)
    parquet(data / "data/train-00002-of-00003.parquet", [row(BLUE, "last")])
    (data / "data/train-00001-of-00003.parquet").write_bytes(b"PAR1 cut")
    parquet(data / "data/test-00000-of-00001.parquet", [row(BLUE, "other")])
    arguments = ["--images", data, "--split", "train", "--image_column", "image", "--out"]
    assert pack(*arguments, tmp_path / "out", "--samples_per_shard", 1) == 0
    said = capsys.readouterr()
    assert "3 samples in 3 shards" in said.out and "5 samples skipped" in said.out
    name = "train-00000-of-00003-00000"
    assert captions(tmp_path / "out") == {
        f"{name}0": ["one", "two"],
        f"{name}6": ["again"],
        "train-00002-of-00003-000000": ["last"],
    }
    assert skipped(tmp_path / "out") == {
        f"{name}2": "no caption",
        f"{name}3": "broken image",
        f"{name}4": "empty image",
        f"{name}5": "empty image",
        "data/train-00001-of-00003.parquet": "unreadable parquet file",
    }
    found = entries(tmp_path / "out")
    assert found[f"{name}0.jpg"] == RED
    assert json.loads(found[f"{name}0.json"]) == {"captions": ["one", "two"], "score": 0.5, "file_name": "r.jpg"}
    (batch,) = evaluation_batches(str(tmp_path / "out"), image_size=8, batch_size=9)
    assert batch.captions == ["one", "again", "last"]
    # The rows of the files are the total, where all can be read.
    (data / "data/train-00001-of-00003.parquet").unlink()
    assert pack(*arguments, tmp_path / "total") == 0
    assert "/8" in capsys.readouterr().err


def test_other_columns_of_parquet_files(tmp_path):
    (tmp_path / "x.jpg").write_bytes(RED)
    parquet(tmp_path / "a.parquet", [{"jpg": RED, "txt": "one", "key": "k"}, {"jpg": None, "txt": None, "key": "l"}])
    one, failed = find_dataset(str(tmp_path)).samples(None, "txt")
    assert (one.key, one.image, one.captions, one.extra) == ("a-000000", RED, ["one"], {"key": "k"})
    assert failed.lost == "empty image"
    for content, image in (({"image_path": "x.jpg"}, tmp_path / "x.jpg"), ({"image": {"bytes": RED}}, RED)):
        rows = [content | {"captions": ["one", None, "two"], "numbers": [1, 2]}]
        (tmp_path / "a.parquet").unlink()
        parquet(tmp_path / "a.parquet", rows)
        (sample,) = find_dataset(str(tmp_path)).samples()
        assert (sample.image, sample.captions, sample.extra) == (image, ["one", "two"], {})
    mistakes = [
        ({"image": "../x.jpg", "text": "one"}, r"a-000000: the image '../x.jpg' lies outside"),
        ({"image": "https://x/x.jpg", "text": "one"}, r"addresses of images; download them with img2dataset"),
        ({"image": 3, "text": "one"}, r"column image has int64, neither encoded images nor their paths"),
        ({"image": "x.jpg", "text": 3}, r"column text has int64, neither texts nor lists of texts"),
        ({"image": "x.jpg", "alt": "one"}, r"no column for the caption .* its columns, image, alt\."),
        ({"left": RED, "right": RED, "text": "one"}, r"no column for the image .* its columns, left, right\."),
    ]
    for content, message in mistakes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([content]), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=message):
            list(find_dataset(str(tmp_path)).samples())


def test_damage_within_a_parquet_file_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", [row(encoded(colour=(i, 0, 0)), f"caption {i}") for i in range(200)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    half = len(content) // 2
    content[half : half + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(content)
    *_, lost = find_dataset(str(tmp_path)).samples()
    assert re.fullmatch(r"damaged parquet file, after row \d+", lost.lost) and lost.key == "a.parquet"


def test_without_pyarrow(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert pack("--images", tmp_path, "--out", tmp_path / "out") == 2
    assert (
        capsys.readouterr().err
        == "error: parquet files are read by pyarrow, which is not installed: pip install pyarrow\n"
    )


def test_folders_without_a_data_set(tmp_path, capsys):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/metadata.jsonl").touch()
    assert pack("--images", tmp_path, "--out", tmp_path / "out") == 2
    assert "contains neither parquet files nor metadata.jsonl or metadata.csv." in capsys.readouterr().err
    assert pack("--images", tmp_path / "no", "--out", tmp_path / "out") == 2
    assert "no is not a folder; give one, or the id of a data set on the hub" in capsys.readouterr().err
    assert pack("--images", tmp_path, "--revision=v1", "--out", tmp_path / "out") == 2
    assert "--revision v1 is for a data set on the hub" in capsys.readouterr().err


# the hub


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """A hub of the data sets that the server has by revision; it keeps what it was asked for."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        listing = re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/revision/([\w%]+))?", self.path)
        file = re.fullmatch(r"/datasets/(\w+/\w+)/resolve/(\w+)/(.*)", self.path)
        found = listing or file
        revisions = self.server.datasets.get(found[1]) if found else None
        if self.path == "/" or revisions is None:
            error = "GatedRepo" if found and "gated" in found[1] else "RepoNotFound"
            return self.answer(
                200 if self.path == "/" else 403 if "Gated" in error else 404, b"", {"X-Error-Code": error}
            )
        wanted = (found[2] or "main").replace("%2F", "/")
        revision = next((name for name in revisions if wanted in (name, commit(name))), None)
        if revision is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = revisions[revision]
        if listing:
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            said = {"id": found[1], "sha": commit(revision), "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})
        headers = {"X-Repo-Commit": commit(revision), "ETag": f'"{commit(file[0])}"'}
        return self.answer(200, (folder / file[3]).read_bytes(), headers)

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Sets the hub's address, with an empty cache, and undoes that tests run offline."""

    def at(port: int) -> str:
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return address

    silence_of.cache_clear()
    yield at
    silence_of.cache_clear()


@pytest.fixture
def hub(at):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.datasets, server.asked = {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at(server.server_port)
        yield server
        server.shutdown()


def test_a_data_set_on_the_hub(hub, tmp_path, capsys):
    """Its files are fetched one by one, no more than are needed, and all at the commit that was listed."""
    main_, converted = tmp_path / "main", tmp_path / "converted"
    for number, colour in enumerate([RED, GREEN, BLUE]):
        rows = [row(colour, f"caption {number}"), row(RED + bytes(number + 1), "further")]
        parquet(main_ / f"data/train-{number:05d}-of-00003.parquet", rows)
    parquet(main_ / "data/test-00000-of-00001.parquet", [row(BLUE, "test")])
    (main_ / "loading_script.py").write_text("raise SystemExit(3)")
    parquet(converted / "default/train/0000.parquet", [row(None, "no bytes", path="x.jpg"), row(BLUE, "converted")])
    hub.datasets["org/name"] = {"main": main_, "refs/convert/parquet": converted}
    arguments = ["--images", "org/name", "--split", "train"]
    assert pack(*arguments, "--limit", 3, "--out", tmp_path / "out") == 0
    names = [f"train-0000{file}-of-00003-00000{number}" for file, number in ((0, 0), (0, 1), (1, 0))]
    assert list(captions(tmp_path / "out")) == names
    assert json.loads((tmp_path / "out/manifest.json").read_text())["source"] == f"hf org/name train {commit('main')}"
    fetched = [path.rpartition("/")[2] for path in hub.asked if path.startswith("GET /datasets")]
    assert fetched == ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet"]
    assert all(commit("main") in path for path in hub.asked if "/resolve/" in path)
    # What is written already is refused before anything is downloaded.
    revision = ["--revision", "refs/convert/parquet"]
    assert pack("--images", "org/name", *revision, "--out", tmp_path / "out") == 2
    assert "already holds 1 shards" in capsys.readouterr().err
    assert not [path for path in hub.asked if "0000.parquet" in path]
    # Files in the cache are not fetched again.
    hub.asked.clear()
    assert pack(*arguments, "--out", tmp_path / "whole") == 0
    assert len(captions(tmp_path / "whole")) == 6
    assert [path for path in hub.asked if path.startswith("GET /datasets")] == [
        f"GET /datasets/org/name/resolve/{commit('main')}/data/train-00002-of-00003.parquet"
    ]
    # A revision.
    assert pack("--images", "org/name", *revision, "--out", tmp_path / "converted_out") == 0
    assert captions(tmp_path / "converted_out") == {"0000-000001": ["converted"]}
    assert skipped(tmp_path / "converted_out") == {"0000-000000": "the path of an image instead of its bytes"}


def test_what_the_hub_does_not_have(hub, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(RED)
    hub.datasets["org/images"] = {"main": tmp_path / "images"}
    with pytest.raises(
        UserError, match=r"^org/images has no parquet files on the hub: --revision refs/convert/parquet"
    ):
        find_dataset("org/images")
    with pytest.raises(UserError, match=r"^org/images has no branch, tag or commit 'v9' on the hub$"):
        find_dataset("org/images", revision="v9")
    with pytest.raises(UserError, match=r"^cannot read the data set 'org/none': .* \(the hub has no such data set"):
        find_dataset("org/none")
    with pytest.raises(UserError, match=r"^cannot read the data set 'org/gated': .* accepted its terms"):
        find_dataset("org/gated")


def test_a_hub_that_does_not_answer_is_said_at_once(at, tmp_path, capsys):
    """Offline, with connections refused, and with connections that nothing answers."""
    arguments = ["--images", "org/name", "--out", tmp_path / "out"]
    said = r"error: cannot read the data set 'org/name': give the id .* or a local folder .*\({}.*\)\n"
    assert pack(*arguments) == 2
    assert re.fullmatch(said.format("HF_HUB_OFFLINE is set"), capsys.readouterr().err)
    for listens in (False, True):
        silence_of.cache_clear()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            if listens:
                listener.listen()
            address = at(listener.getsockname()[1])
            assert pack(*arguments) == 2
            assert re.fullmatch(said.format(f"{address} does not answer: "), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
