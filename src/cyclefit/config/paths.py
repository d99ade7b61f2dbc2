"""Paths in a yaml are relative to its folder, those on the command line to the working directory.

jsonargparse changes into the folder of a yaml while it reads it, so either is relative to the working directory when
a value is parsed: these types make paths absolute then, and write them relative to the folder of a run.

`cyclefit:FILE` is a file of the package, wherever it is installed, and is written like this too. An installed package
contains no data and nothing is written into it: the paths in its configs are those of a folder `configs` in the working
directory.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import yaml
from jsonargparse.typing import register_type

PACKAGE = Path(__file__).resolve().parents[1]
IN_PACKAGE = "cyclefit:"

_written_from: ContextVar[Path | None] = ContextVar("_written_from", default=None)
_working: ContextVar[Path | None] = ContextVar("_working", default=None)


def is_path(text: str) -> bool:
    """Whether a text can only be a path, not the name of a model."""
    return text.startswith((".", "/", "~", IN_PACKAGE))


def packaged(text: str) -> str:
    """The path of a file in the package; any other text as it is."""
    return os.path.normpath(PACKAGE / text.removeprefix(IN_PACKAGE)) if text.startswith(IN_PACKAGE) else text


def found(text: str, folder: Path | None = None, exists: Callable[[str], bool] = os.path.exists) -> str:
    """The absolute path of a text in a file of `folder`, or in the working directory.

    If the folder is that of a run that was moved, and nothing exists there, the path is looked up from where the run
    was trained.
    """
    folder, text = Path(os.path.realpath(folder or Path.cwd())), os.path.expanduser(packaged(text))
    if folder == PACKAGE / "configs":  # in a repository, a link to its folder
        folder = (_working.get() or Path.cwd()) / "configs"
    path = os.path.abspath(folder / text)
    if not os.path.isabs(text) and not exists(path) and (trained := _trained_in(folder)):
        before = os.path.normpath(os.path.join(trained, text))
        return before if exists(before) else path
    return path


def _trained_in(folder: Path) -> str | None:
    """Where the run in this folder was trained, by its configuration; None for any other folder."""
    try:
        root = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["default_root_dir"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return root if isinstance(root, str) and os.path.isabs(root) else None


@contextmanager
def working() -> Iterator[None]:
    """Remembers the working directory, which a parser leaves while it reads a yaml."""
    token = _working.set(Path.cwd())
    try:
        yield
    finally:
        _working.reset(token)


@contextmanager
def written_from(folder: Path) -> Iterator[None]:
    """Makes a parser dump paths relative to a folder: they stay right if it is moved together with their targets."""
    token = _written_from.set(Path(os.path.realpath(folder)))
    try:
        yield
    finally:
        _written_from.reset(token)


def written(path: str) -> str:
    """A path as a parser dumps it: a relative one begins with a dot, one in the package with `cyclefit:`."""
    if not isinstance(path, str):
        raise TypeError(f"{path!r} is no path")
    folder = _written_from.get()
    if folder is None or not os.path.isabs(path):
        return str(path)
    if Path(path).is_relative_to(PACKAGE):
        return IN_PACKAGE + os.path.relpath(path, PACKAGE)
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith("..") else os.path.join(".", relative)


class Folder(str):
    """The path of a folder; parsing makes it absolute."""

    @classmethod
    def parse(cls, text: str) -> "Folder":
        """From a yaml or the command line."""
        if not isinstance(text, str) or not text:
            raise ValueError(f"{text!r} is no path")
        return cls(found(text))


class NameOrPath(str):
    """A name, such as a hub id, or a path; parsing makes paths absolute.

    Whatever exists, or begins with `.`, `/`, `~` or `cyclefit:`, is a path.
    """

    @classmethod
    def parse(cls, text: str) -> "NameOrPath":
        """From a yaml or the command line."""
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is neither a name nor a path")
        path = found(text) if text else text
        return cls(path if is_path(text) or os.path.exists(path) else text)


def register_path(kind: type[str]) -> None:
    """Makes jsonargparse parse and dump a type of paths."""
    register_type(kind, written, kind.parse, type_check=isinstance)


register_path(Folder)
register_path(NameOrPath)
