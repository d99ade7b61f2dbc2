"""Files that list images and captions: csv, tsv, json and jsonl."""

import ast
import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from cyclefit import UserError

FILE_FIELDS = ("file", "file_name", "filename", "filepath", "image", "path", "image_path")
CAPTION_FIELDS = ("captions", "caption", "text", "title")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_annotations(path: Path) -> dict[str, tuple[list[str], dict]]:
    """Captions and further fields of each file that a captions file of a folder names."""
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        entries = _read_pairs(path, DELIMITERS[suffix])
    elif suffix == ".jsonl":
        entries = [entry for _, entry in _lines(path)]
    elif suffix == ".json":
        entries = load_json(path)
    else:
        raise ValueError(f"{path}: captions come as .json, .jsonl, .csv or .tsv.")
    if isinstance(entries, dict):
        return {name: (_as_list(captions), {}) for name, captions in entries.items()}
    listed: dict[str, tuple[list[str], dict]] = {}
    for n, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        file = _first(entry, FILE_FIELDS) if isinstance(entry, dict) else None
        if file is None:
            raise ValueError(f"{path}, entry {n}: expected an object with one of {', '.join(FILE_FIELDS)}.")
        extra = {k: v for k, v in entry.items() if k not in (file, *CAPTION_FIELDS)}
        caption = _first(entry, CAPTION_FIELDS)
        known, _ = listed.setdefault(entry[file], ([], extra))
        known += _as_list(entry[caption]) if caption else []
    return listed


def _read_pairs(path: Path, delimiter: str) -> list[dict[str, str]]:
    rows = [row for row in csv.reader(io.StringIO(_text(path, newline=""), newline=""), delimiter=delimiter) if row]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    file, caption = _first(header, FILE_FIELDS), _first(header, CAPTION_FIELDS)
    if file is None or caption is None:
        raise ValueError(
            f"{path}: the first row must name a column of files ({', '.join(FILE_FIELDS)}) and one of "
            f"captions ({', '.join(CAPTION_FIELDS)}); it is {', '.join(header) or 'empty'}."
        )
    places = header.index(file), header.index(caption)
    for n, row in enumerate(rows[1:], 2):
        if len(row) <= max(places):
            raise ValueError(f"{path}, row {n}: {len(row)} columns, the header has {len(header)}.")
    return [{"file": row[places[0]], "caption": row[places[1]]} for row in rows[1:]]


def read_table(path: Path) -> tuple[list[str], list[tuple[str, dict]]]:
    """The columns of a table and its rows, each with where it is.

    A json file is a list of objects, or `{file: caption or captions}`. Columns of a csv file may also be separated by
    semicolons, bars or tabs, whichever its first line has most of.

    Raises:
        UserError: the file is not UTF-8 or no such table; the message names the line.

    """
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        return _delimited(path, DELIMITERS[suffix])
    if suffix == ".jsonl":
        rows = list(_lines(path))
    elif suffix == ".json":
        entries = load_json(path)
        if isinstance(entries, dict):
            entries = [{"file": name, "captions": captions} for name, captions in entries.items()]
        if not isinstance(entries, list):
            raise UserError(f"{path}: expected a list of objects with the file of an image and its caption.")
        rows = [(f"{path}, entry {n}", entry) for n, entry in enumerate(entries, 1)]
    else:
        raise UserError(f"{path}: a table is a .csv, .tsv, .json or .jsonl file.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with the file of an image and its caption.")
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _delimited(path: Path, delimiter: str) -> tuple[list[str], list[tuple[str, dict]]]:
    text = _text(path, newline="")
    first = text.lstrip().partition("\n")[0]
    delimiter = max(f"{delimiter},;|\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, rows = [], []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
            elif len(row) == len(header):
                rows.append((where, dict(zip(header, row, strict=True))))
            else:
                raise UserError(
                    f"{where}: {len(row)} columns, the header has {len(header)}; a caption that contains {delimiter!r} "
                    "or a line break must be in double quotes."
                )
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; a caption that begins with a double quote must be in double "
            "quotes, and those within it doubled."
        ) from None
    return header, rows


def choose_column(names: Iterable[str], chosen: str | None, known: Iterable[str], kind: str, where: object) -> str:
    """The column that `--{kind}_column` names, or without it the first that has a known name, in any case.

    Raises:
        UserError: there is none; the message lists those there are.

    """
    names = list(names)
    usual = {name.lower(): name for name in reversed(names)}
    found = chosen if chosen else next((usual[name] for name in known if name in usual), None)
    if found not in names:
        missing = f"column {chosen!r}" if chosen else f"column for the {kind} ({', '.join(known)})"
        columns = ", ".join(names) or "none"
        raise UserError(f"{where} has no {missing}: --{kind}_column names one of its columns, {columns}.")
    return found


def captions_in(cell: object) -> list[str]:
    """The captions in a cell: a text, a list of texts, or such a list written as JSON or as Python writes it."""
    if isinstance(cell, str) and cell.strip()[:1] == "[":
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                if isinstance(listed := read(cell.strip()), list) and all(isinstance(one, str) for one in listed):
                    return listed
    return _as_list(cell)


def load_json(path: Path):
    """The contents of a json file; ValueError if it is none."""
    return _parse(_text(path), str(path))


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    # Not by `splitlines`: a text in JSON may contain what Unicode calls a line separator.
    for n, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {n}", _parse(line, f"{path}, line {n}")


def _text(path: Path, newline: str | None = None) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from None


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not json ({error}).") from None


def _first(present, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in present), None)


def _as_list(captions) -> list[str]:
    captions = [captions] if isinstance(captions, str) else captions
    return [c for c in captions if isinstance(c, str)] if isinstance(captions, list) else []
