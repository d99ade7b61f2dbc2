"""What a command does before slow imports, and how it reports a user's mistakes.

This can be imported by a Python without any packages.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from cyclefit import UserError

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = (Path(__file__).parents[1] / "configs").resolve()
"""A link to the repository's folder; in an installed package, a folder."""

OPTIONS = {
    "name": "name of the run; its files are written to RUNS/NAME",
    "runs": "folder of all runs",
    "ckpt_path": "continue from `last`, `auto` (last, if any) or a file",
    "group": "W&B group of the run",
    "logger": "where the run logs, beside metrics.jsonl in its folder; `trainer.logger` replaces it",
    "dry_run": "print memory and time of a training step, without downloading weights or training",
}
"""Options of training that are no settings of its objects."""


@contextmanager
def importing() -> Iterator[None]:
    """Heavy imports without the garbage collector, which finds nothing there and takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def resolve_configs(arguments: list[str]) -> list[str]:
    """Arguments in which every `--config` names a file, the configs it is based on before it.

    A bare name is that of a file in the working folder, or else of a config that comes with the package. A yaml with
    `base: NAME` or `base: [NAME, ...]` on its first level is read on top of these, which are beside it or come with the
    package; those that were read before are not read again.

    Raises:
        UserError: there is no such file; the message lists those that exist.

    """
    resolved, rest, read = [], list(arguments), set()
    while rest:
        flag, equals, name = rest.pop(0).partition("=")
        if flag not in ("--config", "-c") or not (equals or rest):
            resolved.append(f"{flag}{equals}{name}")
            continue
        config = _config(name if equals else rest.pop(0))
        for path in (*_bases(config, read), config):
            resolved += [f"{flag}={path}"] if equals else [flag, path]
    return resolved


def _config(name: str, folder: Path = Path()) -> str:
    """The file that a config's name means in a folder."""
    if (folder / name).exists():
        return str(folder / name)
    names = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    for known in (name, f"{name}.yaml"):
        if known in names:
            return str(CONFIGS / known)
    near = get_close_matches(f"{Path(name).stem}.yaml", names, 1)
    said = f"did you mean {near[0]}? There are" if near else f"in {CONFIGS.name}/ are"
    raise UserError(f"there is no config {name!r}; {said} {', '.join(names)}")


def _bases(path: str, read: set[str]) -> Iterator[str]:
    """The configs that a config is based on and that were not read before, each after its own bases."""
    read.add(os.path.realpath(path))
    try:
        found = re.search(r"^base:([^#\n]*)", Path(path).read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return  # the parser says so
    names = [name.strip(" '\"") for name in found[1].strip(" []").split(",")] if found else []
    if "" in names:
        raise UserError(f"{path}: write base: NAME or base: [NAME, NAME] on one line")
    for base in (_config(name, Path(path).parent) for name in names):
        if os.path.realpath(base) not in read:
            yield from _bases(base, read)
            yield base


def run(function) -> None:
    """Runs a command; a user's mistake is one sentence on stderr and exit status 2, Ctrl-C one word and status 130."""
    if sys.version_info < (3, 11):  # noqa: UP036 a repository's scripts are started by any Python
        version = ".".join(map(str, sys.version_info[:2]))
        reason = f"{sys.executable} is Python {version}, and cyclefit needs 3.11 or newer"
        print(f"error: {reason}: {_way_out()}", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(function(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "cyclefit":
            raise
        print(f"error: {sys.executable} has no package {error.name!r}: {_way_out()}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, TypeError, OSError) as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        print("\n".join([f"error: {mistake}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(2)


def command_line() -> str:
    """The command that started this process, as it is typed."""
    program = Path(sys.argv[0])
    installed = program.name == "cyclefit" or program.parts[-2:] == ("cyclefit", "__main__.py")
    return shlex.join([*(["cyclefit"] if installed else ["python", sys.argv[0]]), *sys.argv[1:]])


def _way_out() -> str:
    """What to do if this Python does not suffice: which one has the packages, or how to make it."""
    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        return f"run it with {shlex.join([os.path.relpath(python), *sys.argv])}"
    if (ROOT / "Makefile").exists():
        return f"run `make setup` in {os.path.relpath(ROOT)}, which makes .venv/bin/python"
    return "install cyclefit with pip into an environment of Python 3.11 or newer"


def _mistake_behind(error: BaseException | None) -> BaseException | str | None:
    if isinstance(error, FileNotFoundError):
        return error
    # jsonargparse wraps a constructor's error in its own message about the types that were tried.
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return f"{error.filename or 'writing'}: {error.strerror}; make room there, or choose another --runs"
        error = error.__cause__ or error.__context__
    return error
