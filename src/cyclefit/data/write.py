"""Write images and captions into WebDataset shards, and check shards once written."""

import hashlib
import io
import json
import re
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cyclefit.files import write_atomic

from .tars import read_tar

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats stored byte for byte, with their extension in the shard."""
REENCODED = ("BMP", "TIFF", "GIF")
"""Formats stored as PNG, their first frame."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

MANIFEST = "manifest.json"
BEGUN = ".begun.json"
"""What is being written, as long as the manifest is not there."""


@dataclass
class Sample:
    """One image with its captions, on its way into a shard."""

    key: str
    """Unique within the data set; written with letters, digits, `_` and `-` only."""
    image: bytes | Path
    """The encoded image file, or where it lies."""
    captions: list[str]
    extra: dict = field(default_factory=dict)
    """What else the sample's json shall hold."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Further files of the sample, by extension."""
    lost: str = ""
    """Why there is nothing to write of it, where the source knows; then it is left out and named."""


@dataclass
class Begun:
    """What a run of `write_shards` that was cut off has left complete."""

    shards: list[dict] = field(default_factory=list)
    """As the manifest lists them."""
    keys: set[str] = field(default_factory=set)
    """Of the samples, as the source has them."""
    names: set[str] = field(default_factory=set)
    """Of the samples, as the shards have them."""


class Unusable(Exception):
    """Why a sample is left out, in a few words that repeat from sample to sample."""


class _Hashed:
    """A write-only file that hashes what passes."""

    def __init__(self, path: Path):
        self.file, self.sha256, self.bytes = path.open("wb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class _Shard:
    """A tar under a temporary name that takes its own name when it is complete."""

    def __init__(self, folder: Path, name: str):
        self.path, self.partial = folder / name, folder / f".{name}.partial"
        self.file, self.samples = _Hashed(self.partial), 0
        self.tar = tarfile.open(fileobj=self.file, mode="w|", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, files: dict[str, bytes], record: dict) -> None:
        # Half a surrogate pair has no UTF-8; its escape by a backslash is also JSON's.
        text = json.dumps(record, ensure_ascii=False, default=str).encode(errors="backslashreplace")
        for extension, data in (files | {"json": text}).items():
            entry = tarfile.TarInfo(
                f"{key}.{extension}"
            )  # time, user and group 0: the same samples give the same bytes
            entry.size = len(data)
            self.tar.addfile(entry, io.BytesIO(data))
        self.samples += 1

    def finish(self) -> dict:
        self.tar.close()
        self.file.file.close()
        self.partial.replace(self.path)
        return {
            "name": self.path.name,
            "samples": self.samples,
            "bytes": self.file.bytes,
            "sha256": self.file.sha256.hexdigest(),
        }

    def discard(self) -> None:
        self.tar.close()
        self.file.file.close()
        self.partial.unlink(missing_ok=True)


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        return Text(f"{task.speed or 0:.0f}/s")


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    total: int | None = None,
    progress: bool = True,
    source: str = "",
    begun: Begun | None = None,
) -> dict:
    """Pack samples into `folder/000000.tar`, ... and return the manifest, also written as `manifest.json`.

    A sample is `KEY.jpg|png|webp`, stored as it came, its further files, and `KEY.json` with `captions` and its extra
    fields. A sample that cannot be used is left out and named in the manifest with the reason. Shards take their
    names when complete, the manifest comes last; equal samples give equal bytes. After the shards that `find_begun`
    found in the folder it goes on: `samples` are those that are left.

    Raises:
        FileExistsError: the folder holds shards already.
        ValueError: no sample could be used, or `samples_per_shard` is below 1.

    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; a shard needs at least one sample.")
    folder, begun = Path(folder), begun or Begun()
    if not begun.shards:
        _refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tar.partial"):
        leftover.unlink()

    settings = json.dumps([source, samples_per_shard])
    shards, skipped, sources, keys, shard = [*begun.shards], [], {*begun.keys}, {*begun.names}, None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("packing", total=total)
            for sample in samples:
                bar.advance(task)
                try:
                    if sample.lost:
                        raise Unusable(sample.lost)
                    if sample.key in sources:
                        raise Unusable("duplicate key")
                    captions = [caption.strip() for caption in sample.captions if caption and caption.strip()]
                    if not captions:
                        raise Unusable("no caption")
                    extension, image = _image_to_store(sample.image)
                except Unusable as unusable:
                    skipped.append({"key": sample.key, "reason": str(unusable)})
                    bar.update(task, description=f"packing ({len(skipped)} skipped)")
                    continue
                sources.add(sample.key)
                key = _safe_key(sample.key, keys)
                keys.add(key)
                record = {"captions": captions} | {k: v for k, v in sample.extra.items() if k != "captions"}
                if key != sample.key:
                    record["source_key"] = sample.key
                shard = shard or _Shard(folder, f"{len(shards):06d}.tar")
                shard.add(key, {extension: image} | sample.files, record)
                if shard.samples == samples_per_shard:
                    (folder / BEGUN).write_text(settings)
                    shards.append(shard.finish())
                    shard = None
            if shard:
                shards.append(shard.finish())
                shard = None
    finally:
        if shard:
            shard.discard()

    reasons = dict(Counter(entry["reason"] for entry in skipped).most_common())
    if not shards:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "the source is empty"
        raise ValueError(f"nothing to write into {folder}: no sample could be used ({why}).")
    manifest = {
        "source": source,
        "samples": sum(entry["samples"] for entry in shards),
        "samples_per_shard": samples_per_shard,
        "shards": shards,
        "skipped": {"total": len(skipped), "reasons": reasons, "samples": skipped},
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    (folder / BEGUN).unlink(missing_ok=True)
    return manifest


def find_begun(folder: str | Path, source: str, samples_per_shard: int) -> Begun:
    """The complete shards of a run of `write_shards` with the same source that was cut off; they may be none.

    Raises:
        ValueError: a shard is damaged or missing among them.

    """
    folder, found = Path(folder), Begun()
    try:
        same = (folder / BEGUN).read_text() == json.dumps([source, samples_per_shard])
    except OSError:
        same = False
    if not same or (folder / MANIFEST).exists():
        return found
    for number, path in enumerate(sorted(folder.glob("*.tar"))):
        try:
            samples = _read_shard(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (tarfile.TarError, EOFError):
            samples = {}
        if not samples or path.name != f"{number:06d}.tar":
            raise ValueError(f"cannot go on in {folder}: {number:06d}.tar is damaged or missing; empty the folder.")
        entry = {"name": path.name, "samples": len(samples), "bytes": path.stat().st_size, "sha256": digest}
        found.shards.append(entry)
        found.names |= samples.keys()
        found.keys |= {json.loads(files["json"]).get("source_key", name) for name, files in samples.items()}
    if found.shards:
        print(f"continuing after {len(found.shards)} shards of {len(found.keys)} samples", file=sys.stderr)
    return found


def verify_shards(folder: str | Path) -> dict:
    """Read every shard again and compare it with the manifest; the numbers of shards and samples that hold.

    Compared: sha256, number of samples, that each image's header can be read, that each json holds captions,
    that no key occurs twice, and that no shard is missing or unlisted.

    Raises:
        FileNotFoundError: the folder or its manifest is missing.
        ValueError: something differs; the first ten differences are named.

    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: packing did not finish, or another tool wrote them; pack again."
        )
    try:
        listed = {entry["name"]: entry for entry in json.loads((folder / MANIFEST).read_text())["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({error!r}); pack again.") from None
    present = {path.name for path in folder.glob("*.tar")}
    problems = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - listed.keys())]
    home: dict[str, str] = {}
    samples = 0
    for name in sorted(listed.keys() & present):
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != listed[name]["sha256"]:
                problems.append(f"{name} has another sha256 than the manifest")
            found = _read_shard(folder / name)
        except (tarfile.TarError, OSError, EOFError) as error:
            problems.append(f"{name} cannot be read ({error})")
            continue
        for key, files in found.items():
            if key in home:
                problems.append(f"key {key} is in {home[key]} and in {name}")
            home[key] = name
            if problem := _problem_of(files):
                problems.append(f"{key} in {name}: {problem}")
        if len(found) != listed[name]["samples"]:
            problems.append(f"{name} holds {len(found)} samples, the manifest says {listed[name]['samples']}")
        samples += len(found)
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{folder} differs from its manifest: {'; '.join(problems[:10])}{more}.")
    return {"shards": len(listed), "samples": samples}


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the shards.")
    shards = sorted(folder.glob("*.tar"))
    if shards or (folder / MANIFEST).exists():
        unfinished = "" if (folder / MANIFEST).exists() else f" of a run that did not finish (no {MANIFEST})"
        raise FileExistsError(f"{folder} already holds {len(shards)} shards{unfinished}; choose another or empty it.")


def _safe_key(key: str, taken: set[str]) -> str:
    # A dot would end the key, a slash would make a folder, and ustar holds names of at most 100 bytes.
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:80].strip("_") or "sample"
    if safe in taken:
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:16]
        safe = f"{safe[:63]}-{digest}"
    return safe


def _image_to_store(image: bytes | Path) -> tuple[str, bytes]:
    """Extension and bytes; raises Unusable."""
    suffix = ""
    if not isinstance(image, bytes):
        suffix, path = Path(image).suffix.lower(), Path(image)
        try:
            image = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeEncodeError):
            raise Unusable("missing file") from None
        except OSError:
            raise Unusable("unreadable file") from None
    if not image:
        raise Unusable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(image), formats=["JPEG", "PNG", "WEBP", *REENCODED])
            if picture.format in STORED:
                # An eighth of the size costs half the time and still meets every truncation.
                picture.draft(None, (32, 32))
                picture.load()
                return STORED[picture.format], image
            return "png", _as_png(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable("larger than PIL's pixel limit") from None
    except UnidentifiedImageError:
        known = not suffix or suffix in IMAGE_SUFFIXES
        raise Unusable("unreadable image" if known else f"unknown image format {suffix}") from None
    except Exception:  # Pillow's plugins raise whatever the broken bytes lead to
        raise Unusable("unreadable image") from None


def _as_png(picture: Image.Image) -> bytes:
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    stored = io.BytesIO()
    picture.save(stored, format="png")
    return stored.getvalue()


def _read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    lost: list[str] = []
    with path.open("rb") as file:
        for sample in read_tar(file, str(path), lambda reason, *_: lost.append(reason)):
            files = {name: data for name, data in sample.items() if not name.startswith("__")}
            found.setdefault(sample["__key__"], {}).update(files)
    if lost:
        raise tarfile.ReadError(lost[0])
    return found


def _problem_of(files: dict[str, bytes]) -> str | None:
    images = [extension for extension in files if extension in STORED.values()]
    if len(images) != 1 or "json" not in files:
        return f"one image and one json expected, found {sorted(files)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(files[images[0]]), formats=["JPEG", "PNG", "WEBP"])
    except Exception as error:
        return f"the image's header cannot be read ({error})"
    try:
        captions = json.loads(files["json"])["captions"]
    except (ValueError, KeyError, TypeError):
        captions = None
    return None if captions else "its json holds no captions"
