"""Write images and captions into WebDataset shards, and check shards once written."""

import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from PIL import Image, ImageOps

from cyclefit.files import atomic, sha256_of, write_atomic
from cyclefit.progress import progress_bar

from .samples import FORMATS, BadSample, opened
from .tars import read_tar

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats stored byte for byte, with their extension in the shard."""
REENCODED = ("BMP", "TIFF", "GIF")
"""Formats stored as PNG, their first frame."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

MANIFEST = "manifest.json"
BEGUN = ".begun.json"
"""What is being packed, as long as the manifest is not there."""


@dataclass
class Sample:
    """One image with its captions, on its way into a shard."""

    key: str
    """Unique within the data set; written with letters, digits, `_` and `-` only."""
    image: bytes | Path
    """The encoded image, or its file."""
    captions: list[str]
    extra: dict = field(default_factory=dict)
    """Further fields of the sample's json."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Further files of the sample, by extension."""
    rejected: bytes | Path | None = None
    """The image that lost to this one as an image of the same caption: the other half of a pair."""
    lost: str = ""
    """Why the source could not read it, if so; it is then left out and named in the manifest."""


@dataclass
class Packed:
    """The complete shards that an interrupted `write_shards` has left."""

    shards: list[dict] = field(default_factory=list)
    """As the manifest lists them."""
    keys: set[str] = field(default_factory=set)
    """Of the samples, as the source has them."""
    names: set[str] = field(default_factory=set)
    """Of the samples, as the shards have them."""


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    total: int | None = None,
    source: str = "",
    packed: Packed | None = None,
    without_captions: bool = False,
) -> dict:
    """Pack samples into `folder/000000.tar`, ... and return the manifest, also written as `manifest.json`.

    A sample is `KEY.jpg|png|webp`, stored as it came, `KEY.rejected.jpg|png|webp` if there is an image that lost to it,
    its further files, and `KEY.json` with `captions` and its extra fields. A sample that cannot be used is left out and
    named in the manifest with the reason. Shards take their names when complete, the manifest comes last; equal samples
    give equal bytes. What `find_packed` found in the folder is not written again. A sample needs a caption, unless
    `without_captions`.

    Raises:
        FileExistsError: the folder contains shards already.
        ValueError: no sample could be used, or `samples_per_shard` is below 1.

    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; a shard needs at least one sample.")
    folder, packed = Path(folder), packed or Packed()
    if not packed.shards:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tar.partial"):
        leftover.unlink()

    shards, skipped = [*packed.shards], []
    with progress_bar(stderr=True) as bar:
        tracked = bar.track(samples, total, description="packing")
        files = _files(tracked, packed, skipped, without_captions)
        while first := next(files, None):
            path = folder / f"{len(shards):06d}.tar"
            with atomic(path) as partial:
                entry = _write_shard(partial, chain([first], islice(files, samples_per_shard - 1)))
                (folder / BEGUN).write_text(json.dumps([source, samples_per_shard]))
            shards.append({"name": path.name} | entry)

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


def _files(
    samples: Iterable[Sample], packed: Packed, skipped: list[dict], without_captions: bool
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The name and files, by extension, of each sample that can be used; the others are added to `skipped`."""
    keys, names = set(), {*packed.names}
    for sample in samples:
        if sample.key in packed.keys:
            continue
        try:
            if sample.lost:
                raise BadSample(sample.lost)
            if sample.key in keys:
                raise BadSample("duplicate key")
            captions = [caption.strip() for caption in sample.captions if caption and caption.strip()]
            if not captions and not without_captions:
                raise BadSample("no caption")
            extension, image = _stored(sample.image)
            files = {extension: image}
            if sample.rejected is not None:
                extension, image = _stored(sample.rejected)
                files[f"rejected.{extension}"] = image
        except BadSample as bad:
            skipped.append({"key": sample.key, "reason": str(bad)})
            continue
        keys.add(sample.key)
        name = _safe_name(sample.key, names)
        names.add(name)
        record = {k: v for k, v in sample.extra.items() if k != "captions"}
        record = {"captions": captions} | record if captions else record
        if name != sample.key:
            record["source_key"] = sample.key
        # Half a surrogate pair has no UTF-8; its escape by a backslash is also JSON's.
        text = json.dumps(record, ensure_ascii=False, default=str).encode(errors="backslashreplace")
        yield name, files | sample.files | {"json": text}


def _write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict:
    number = 0
    with tarfile.open(path, "w|", format=tarfile.USTAR_FORMAT) as tar:
        for name, files in samples:
            number += 1
            for extension, data in files.items():
                entry = tarfile.TarInfo(f"{name}.{extension}")  # of no time or owner: equal samples give equal bytes
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return _listed(path, number)


def _listed(path: Path, samples: int) -> dict:
    """A shard as the manifest lists it, beside its name."""
    return {"samples": samples, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def find_packed(folder: str | Path, source: str, samples_per_shard: int) -> Packed:
    """The complete shards of an interrupted `write_shards` of the same source, if any.

    Raises:
        ValueError: a shard is damaged or missing among them.

    """
    folder, packed = Path(folder), Packed()
    begun = folder / BEGUN
    same = begun.is_file() and begun.read_text() == json.dumps([source, samples_per_shard])
    if not same or (folder / MANIFEST).exists():
        return packed
    lost: list[tuple] = []
    for number, path in enumerate(sorted(folder.glob("*.tar"))):
        with path.open("rb") as file:
            samples = list(read_tar(file, path.name, lambda *loss: lost.append(loss), ["json"]))
        if lost or path.name != f"{number:06d}.tar":
            raise ValueError(f"cannot go on in {folder}: {number:06d}.tar is damaged or missing; empty the folder.")
        packed.shards.append({"name": path.name} | _listed(path, len(samples)))
        packed.names |= {sample["__key__"] for sample in samples}
        packed.keys |= {json.loads(sample["json"]).get("source_key", sample["__key__"]) for sample in samples}
    if packed.shards:
        print(f"continuing after {len(packed.shards)} shards of {len(packed.keys)} samples", file=sys.stderr)
    return packed


def verify_shards(folder: str | Path) -> dict:
    """Read every shard again and compare it with the manifest, by sha256; the numbers of shards and samples.

    Raises:
        FileNotFoundError: the folder or its manifest is missing.
        ValueError: a shard is missing, unlisted or differs; the first ten are named.

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
    for name in sorted(listed.keys() & present):
        if sha256_of(folder / name) != listed[name]["sha256"]:
            problems.append(f"{name} has another sha256 than the manifest")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{folder} differs from its manifest: {'; '.join(problems[:10])}{more}.")
    return {"shards": len(listed), "samples": sum(entry["samples"] for entry in listed.values())}


def refuse_existing(folder: Path) -> None:
    """Raises FileExistsError if a folder contains shards, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the shards.")
    shards = sorted(folder.glob("*.tar"))
    if shards or (folder / MANIFEST).exists():
        unfinished = "" if (folder / MANIFEST).exists() else f" of a run that did not finish (no {MANIFEST})"
        raise FileExistsError(f"{folder} already holds {len(shards)} shards{unfinished}; choose another or empty it.")


def _safe_name(key: str, taken: set[str]) -> str:
    # A dot would end the key, a slash would make a folder, and ustar holds names of at most 100 bytes.
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:80].strip("_") or "sample"
    if safe in taken:
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:16]
        safe = f"{safe[:63]}-{digest}"
    return safe


def _stored(image: bytes | Path) -> tuple[str, bytes]:
    """The extension and the bytes that an image is stored with; raises BadSample."""
    suffix = ""
    if isinstance(image, Path):
        suffix = image.suffix.lower()
        try:
            image = image.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeEncodeError):
            raise BadSample("missing file") from None
        except OSError:
            raise BadSample("unreadable file") from None
    try:
        with opened(image, (*FORMATS, *REENCODED)) as picture:
            if picture.format in STORED:
                # An eighth of the size costs half the time and still meets every truncation.
                picture.draft(None, (32, 32))
                picture.load()
                return STORED[picture.format], image
            return "png", _as_png(picture)
    except BadSample:
        if suffix and suffix not in IMAGE_SUFFIXES:
            raise BadSample(f"unknown image format {suffix}") from None
        raise


def _as_png(picture: Image.Image) -> bytes:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    stored = io.BytesIO()
    picture.save(stored, format="png")
    return stored.getvalue()
