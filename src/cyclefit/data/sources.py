"""Where samples come from: folders, tables, COCO and NoCaps annotations, and img2dataset's output."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from cyclefit import UserError
from cyclefit.files import within
from cyclefit.metrics.objects import objects_by_image

from .pack import IMAGE_SUFFIXES, Sample
from .samples import BadSample, read_captions, read_extra
from .tables import (
    CAPTION_FIELDS,
    DELIMITERS,
    FILE_FIELDS,
    captions_in,
    choose_column,
    load_json,
    read_annotations,
    read_table,
)
from .tars import read_tar, warn_of_loss


def folder_source(images: str | Path, annotations: str | Path | None = None) -> Iterator[Sample]:
    """Images of a folder and its subfolders, captions from one file or from a `.txt` beside each image.

    The file is json (`{file: caption or captions}`, or a list of objects with `file` and `captions`), jsonl
    (one such object a line), csv or tsv (a column of files and one of captions, several rows a file allowed);
    without one, a `captions.json|jsonl|csv|tsv` in the folder is taken, else `.txt` files, a caption a line.
    Images without captions and captions without images are passed on, to be counted by the writer.
    """
    images = _existing_folder(images)
    if annotations is None:
        found = [images / f"captions{suffix}" for suffix in (".json", ".jsonl", *DELIMITERS)]
        annotations = next((path for path in found if path.is_file()), None)
    listed = read_annotations(_existing_file(annotations)) if annotations is not None else None
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    files = {path.relative_to(images).as_posix(): path for path in paths}
    if not files and not listed:
        raise FileNotFoundError(f"{images} contains no images ({', '.join(IMAGE_SUFFIXES)}).")
    files |= {name: within(images, name, f"{annotations}: the image") for name in listed or () if name not in files}
    for key, (name, path) in zip(_keys(files), files.items(), strict=True):
        captions, extra = (listed or {}).get(name, ([], {}))
        if listed is None and (text := path.with_suffix(".txt")).is_file():
            captions = text.read_text(encoding="utf-8-sig").splitlines()
        yield Sample(key, path, captions, extra)


def _keys(names: Iterable[str]) -> list[str]:
    """Names of files without their suffix where that is unique."""
    stems = {name: name.rpartition(".")[0] or name for name in names}
    counts = Counter(stems.values())
    return [stem if counts[stem] == 1 else name for name, stem in stems.items()]


def table_source(
    table: str | Path,
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Iterator[Sample]:
    """Images and captions of a csv, tsv, json or jsonl file with a row or object for each image, or for each caption.

    Images are named relative to `images`, by default the table's own folder. Without a column's name the first one with
    a usual name is taken. A caption is text, or a list of texts as JSON; rows of the same image are merged, and further
    columns of its first row are kept.

    Raises:
        FileNotFoundError: the table or the folder is missing.
        UserError: the table cannot be read or has no such column, or an image lies outside the folder.

    """
    path = _existing_file(table)
    images = path.parent if images is None else _existing_folder(images)
    names, rows = read_table(path)
    image = choose_column(names, image_column, FILE_FIELDS, "image", path)
    caption = choose_column(names, caption_column, CAPTION_FIELDS, "caption", path)
    found: dict[str, tuple[list[str], dict]] = {}
    for where, row in rows:
        name = row.get(image)
        if not isinstance(name, str) or not name.strip():
            yield Sample(where, b"", [], lost="no image named")
            continue
        if name.strip().startswith(("http://", "https://")):
            raise UserError(
                f"{where}: {image} is an address, not a file; download the images with img2dataset and pack its shards."
            )
        name = os.path.relpath(within(images, name.strip(), f"{where}: the image"), images)
        extra = {k: v for k, v in row.items() if k not in ("", image, caption) and v not in (None, "")}
        captions, _ = found.setdefault(name, ([], extra))
        captions += captions_in(row.get(caption))
    for key, (name, (captions, extra)) in zip(_keys(found), found.items(), strict=True):
        yield Sample(key, images / name, captions, extra)


def coco_source(images: str | Path, annotations: str | Path, split: str | None = None) -> Iterator[Sample]:
    """Images of a captions json: COCO's own (`images`, `annotations`) or Karpathy's (`images[].sentences`).

    `split` selects one split of Karpathy's file, or several joined by `+` (`train+restval`); COCO's own files
    are one split each.
    """
    images, path = _existing_folder(images), _existing_file(annotations)
    data = _load_images(path, "COCO's captions json or Karpathy's")
    if any("sentences" in entry for entry in data["images"]):
        yield from _karpathy(images, path, data["images"], split)
    elif split is not None:
        raise ValueError(f"{path} is not divided into splits; leave split={split} out, or use Karpathy's file.")
    else:
        yield from _coco(images, path, data)


def add_objects(samples: list[Sample], instances: Iterable[str | Path]) -> None:
    """Gives each sample of `coco_source` the `facts` of its photograph; see `cyclefit.metrics.objects`.

    Its `objects` are the sorted categories of its instances and those that its captions name.

    Raises:
        FileNotFoundError: a file of instances is missing.
        ValueError: a file is not COCO's `instances_*.json`, or they do not list every image.

    """
    captions: dict[str, list[str]] = {}
    for sample in samples:
        captions.setdefault(str(sample.extra.get("image_id")), []).extend(filter(None, sample.captions))
    objects = objects_by_image(map(Path, instances), captions)
    for sample in samples:
        sample.extra["facts"] = {"objects": objects[str(sample.extra.get("image_id"))]}


def nocaps_source(images: str | Path, annotations: str | Path, domain: str | None = None) -> Iterator[Sample]:
    """Images of a NoCaps captions json, all or one domain (`in-domain`, `near-domain`, `out-domain`).

    The image's domain and Open Images id are kept beside the captions.
    """
    images, path = _existing_folder(images), _existing_file(annotations)
    data = _load_images(path, "the captions json of NoCaps")
    if domain is not None:
        domains = sorted({str(entry["domain"]) for entry in data["images"] if entry.get("domain")})
        if domain not in domains:
            raise ValueError(f"{path} has no domain {domain}; it has {', '.join(domains) or 'none'}.")
        data["images"] = [entry for entry in data["images"] if entry.get("domain") == domain]
    yield from _coco(images, path, data, keep=("domain", "open_images_id"))


def _load_images(path: Path, expected: str) -> dict:
    data = load_json(path)
    entries = data.get("images") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list of images; expected {expected}.")
    return data


def _coco(images: Path, path: Path, data: dict, keep: tuple[str, ...] = ()) -> Iterator[Sample]:
    captions: dict = {}
    for annotation in data.get("annotations") or []:
        if "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    if not captions:
        raise ValueError(f"{path} contains no captions; use a captions file (captions_*.json), not instances.")
    for entry in data["images"]:
        name = entry.get("file_name")
        if not name:
            raise ValueError(f"{path}: image {entry.get('id')} has no file_name.")
        extra = {"image_id": entry.get("id")} | {name: entry.get(name) for name in keep}
        image = within(images, name, f"{path}: the image")
        yield Sample(Path(name).stem, image, captions.get(entry.get("id"), []), _present(extra))


def _karpathy(images: Path, path: Path, entries: list[dict], split: str | None) -> Iterator[Sample]:
    if split is not None:
        splits = {str(entry.get("split")) for entry in entries}
        wanted = set(split.split("+"))
        if missing := sorted(wanted - splits):
            raise ValueError(f"{path} has no split {', '.join(missing)}; it has {', '.join(sorted(splits))}.")
        entries = [entry for entry in entries if entry.get("split") in wanted]
    for entry in entries:
        name = entry.get("filename")
        if not name:
            raise ValueError(f"{path}: an image has no filename; expected Karpathy's layout.")
        # The same file serves images in train2014/ and val2014/ and images in one folder.
        nested = within(images, os.path.join(entry.get("filepath", ""), name), f"{path}: the image")
        extra = {"image_id": entry.get("cocoid", entry.get("imgid")), "split": entry.get("split")}
        captions = [sentence.get("raw", "") for sentence in entry.get("sentences", [])]
        beside = within(images, name, f"{path}: the image")
        yield Sample(Path(name).stem, nested if os.path.isfile(nested) else beside, captions, _present(extra))


def img2dataset_source(folder: str | Path) -> Iterator[Sample]:
    """Samples of img2dataset's shards (image, txt and json with `status`), to be packed again.

    What a shard that cannot be read, or not to its end, has lost is a sample that the writer counts and names.
    """
    folder = _existing_folder(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"{folder} contains no .tar files.")
    extensions = [suffix.removeprefix(".") for suffix in (*IMAGE_SUFFIXES, ".json", ".txt")]
    empty, lost = True, []

    def note(reason: str, key: str, url: str) -> None:
        warn_of_loss(reason, key, url)
        lost.append(Sample(f"{url}, {key}", b"", [], lost=reason))

    for shard in shards:
        with shard.open("rb") as file:
            for sample in read_tar(file, str(shard), note, extensions):
                empty = False
                yield _img2dataset_sample(sample)
        yield from lost
        lost.clear()
    if empty:
        raise ValueError(
            f"the {len(shards)} .tar files of {folder} hold no sample: a sample is KEY.jpg with KEY.json or KEY.txt."
        )


def _img2dataset_sample(files: dict) -> Sample:
    try:
        captions = read_captions(files)
    except BadSample:
        captions = []  # the writer names it
    image = next((data for extension, data in files.items() if f".{extension}" in IMAGE_SUFFIXES), b"")
    extra = read_extra(files)
    if extra.pop("status", "success") != "success":
        image = b""
    for name in ("error_message", "exif", "key"):
        extra.pop(name, None)
    return Sample(files["__key__"], image, captions, _present(extra))


def _present(extra: dict) -> dict:
    return {name: value for name, value in extra.items() if value is not None}


def _existing_folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is not a folder.")
    return Path(path)


def _existing_file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; name the file of captions.")
    return Path(path)
