"""A finetuned run on disk: its configuration, its checkpoints, and its models with the trained weights."""

import errno
import importlib.metadata
import logging
import os
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from cyclefit import UserError, __version__
from cyclefit.config.paths import IN_PACKAGE, found
from cyclefit.digests import digest
from cyclefit.files import atomic
from cyclefit.models import Captioner, Generator

Which = Literal["captioner", "generator"]

ENDED = "ended.txt"
"""The file of a run that says how it ended: finished, stopped by a signal, or failed and why."""

log = logging.getLogger(__name__)

READABLE = {"state_dict": dict, "global_step": int}
"""The entries of a checkpoint that its readers need."""
RESUMABLE = READABLE | {"loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
RESUMABLE |= {"pytorch-lightning_version": str}
"""The entries that continuing a run needs."""


def versions() -> str:
    """The versions of cyclefit and of the libraries that results depend on most."""
    names = ("torch", "lightning", "transformers", "diffusers", "peft")
    return ", ".join([f"cyclefit {__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in names)])


@contextmanager
def hold(folder: Path, option: str) -> Iterator[None]:
    """Locks a folder for this process until the block is left or the process ends, however it ends.

    The lock is the kernel's, on the file `.lock`, which also records the process. `option` is the command-line option
    that sets the folder, for the error message.

    Raises:
        UserError: another process holds it, or a file is in its place.

    """
    if in_place := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"{folder} cannot be a folder, because {in_place} is a file: choose another {option}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock, locked = FileLock(path, timeout=1, fallback_to_soft=False), True
    try:
        lock.acquire()
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    except Timeout:
        holder = path.read_text().strip() or "another process"
        raise UserError(
            f"{folder} is in use by {holder}: wait until it ends, stop it, or choose another {option}"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        log.warning("%s is on a file system without locks: make sure that no other process writes into it", folder)
        locked = False
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if locked:
            lock.release()
        with suppress(OSError):  # a folder in which nothing was written goes again
            for folder in made:
                folder.rmdir()


def holder(folder: Path) -> str | None:
    """Which process holds a folder, `process 12 on HOST since ...`; None if none does. Changes nothing."""
    try:
        file = (folder / ".lock").open()
    except OSError:
        return None
    with file:
        said = file.read().strip() or "another process"
        with suppress(ImportError, OSError):  # not on Windows; locked, or a file system without locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # a killed process has left the file
    return said


def write_checkpoint(checkpoint: dict, path: Path) -> None:
    """Writes a checkpoint atomically; the earlier `last.ckpt` becomes `previous.ckpt`.

    Raises:
        UserError: it could not be written; the earlier files are untouched.

    """
    try:
        with atomic(path) as partial:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.stem == "last" and path.exists():
                path.replace(path.with_name("previous.ckpt"))
    except (OSError, RuntimeError) as error:
        # torch raises an error of its own while it handles that of a full disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        whole = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt"))) if path.parent.is_dir() else ""
        raise UserError(
            f"{path} could not be written: {cause.strerror}; intact checkpoints: {whole or 'none'}; make room, then "
            "continue with --ckpt_path last"
        ) from error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint according to its checksums; None if it is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        return str(error)
    return f"{broken} does not match its checksum" if broken else None


def saved(folder: Path) -> list[Path]:
    """The checkpoints a run can continue from, the newest first."""
    paths = [folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous")]
    return [path for path in paths if path.exists()]


def has_trained(folder: Path) -> bool:
    """Whether a run in this folder has taken a step."""
    metrics = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("*.ckpt")) or (metrics.exists() and metrics.stat().st_size > 0)


def read_checkpoint(path: Path, needed: dict[str, type] = READABLE, verify: bool = True) -> dict:
    """Reads a run's checkpoint, memory-mapped, without executing anything in the file.

    Without `verify`, the checksums are not checked, which would read the whole file.

    Raises:
        UserError: it does not exist, is damaged, or is not a checkpoint of a run.

    """
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a checkpoint" if path.exists() else f"there is no checkpoint {path}")
    none = f"{path} is not a checkpoint saved by a run"
    if verify and (reason := damage(path)):
        others = ", ".join(sorted(p.stem for p in path.parent.glob("*.ckpt") if p != path and not damage(p)))
        raise UserError(
            f"{path} is damaged or not a checkpoint saved by a run ({reason}); intact checkpoints in the same folder: "
            f"{others or 'none'}"
        )
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling raises whatever strange bytes lead to
        with suppress(Exception):
            if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise UserError(
                    f"{none}: it requires {', '.join(sorted(foreign)[:3])}; such a file can run any code and is not "
                    "loaded"
                ) from error
        raise UserError(f"{none}: its contents cannot be read") from error
    state = state if isinstance(state, dict) else {}
    missing = [key for key, kind in needed.items() if not isinstance(state.get(key), kind)]
    if missing or not all(isinstance(tensor, Tensor) for tensor in state["state_dict"].values()):
        raise UserError(f"{none}: it lacks {missing[0] if missing else 'a state_dict of tensors'}")
    return state


def newest(folder: Path) -> tuple[Path, str | None]:
    """A run's newest intact checkpoint, and what is wrong with a newer one that is skipped, if any.

    Raises:
        UserError: the run has saved none, or only damaged ones.

    """
    paths = saved(folder)
    if not paths:
        how = (
            "restart the run with --ckpt_path auto" if has_trained(folder) else "leave out --ckpt_path to start the run"
        )
        raise UserError(f"there is no checkpoint {folder}/checkpoints/last.ckpt: {how}")
    damages = []
    for path in paths:
        if not (reason := damage(path)):
            return path, "; ".join(damages) or None
        damages.append(f"{path} is damaged ({reason})")
    raise UserError(f"{'; '.join(damages)}: delete {folder} and start the run again")


def find_checkpoint(folder: Path, checkpoint: str = "last") -> Path:
    """A checkpoint of a run.

    Raises:
        FileNotFoundError: the folder is not a run, or has no such checkpoint.

    """
    path = folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not (folder / "config.yaml").exists():
        runs = ", ".join(sorted(str(p.parent) for p in folder.parent.glob("*/config.yaml"))) or "none"
        raise FileNotFoundError(f"{folder} is not a run (it has no config.yaml); runs in the same folder: {runs}")
    if not path.exists():
        saved = ", ".join(sorted(p.stem for p in path.parent.glob("*.ckpt"))) or "none"
        raise FileNotFoundError(f"{path} does not exist; checkpoints the run has saved so far: {saved}")
    return path


def read_config(folder: Path) -> dict:
    """A run's configuration, with paths that are relative to its folder or to the package made absolute.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file is not a configuration.

    """

    def located(value):
        if isinstance(value, dict):
            return {key: located(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [located(inner) for inner in value]
        # Paths begin like this where `paths.written` wrote them.
        relative = isinstance(value, str) and (value == ".." or value.startswith(("./", "../", IN_PACKAGE)))
        return found(value, folder) if relative else value

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.yaml is not a configuration written by a run")
    return located(config)


def read_run(folder: Path, checkpoint: str = "last") -> tuple[dict, dict[str, Tensor]]:
    """A run's configuration and its trained parameters by name, `captioner...` or `generator...`.

    In addition to the settings, the configuration has `folder`, `steps`, `train_seconds` and the `digest` of the
    parameters. If the run has a moving average, it replaces the parameters.

    Raises:
        FileNotFoundError: the folder is not a run, or has no such checkpoint.
        UserError: the checkpoint or the configuration was not written by a run.

    """
    path = find_checkpoint(folder, checkpoint)
    config, state = read_config(folder), read_checkpoint(path)
    parameters = state["state_dict"]
    if "ema" in state:  # lists the same parameters in the same order
        parameters = dict(zip(parameters, state["ema"]["shadow_params"], strict=True))
    about = {"steps": state["global_step"], "folder": str(folder), "digest": digest(parameters)}
    if "TrainSeconds" in state.get("callbacks", {}):
        about["train_seconds"] = state["callbacks"]["TrainSeconds"]["seconds"]
    return config | about, parameters


def load_run(folder: Path, checkpoint: str = "last", which: Which = "captioner") -> tuple[Captioner | Generator, dict]:
    """The captioner or the generator of a run with its trained weights, and the run's configuration.

    Raises:
        FileNotFoundError: the folder is not a run, or has no such checkpoint.
        UserError: the run has finetuned the other model only, or the checkpoint does not fit the configuration.

    """
    from jsonargparse import ArgumentParser

    config, parameters = read_run(folder, checkpoint)
    trained = {name.removeprefix(f"{which}."): p for name, p in parameters.items() if name.startswith(f"{which}.")}
    if not trained:
        other = {"captioner": "images", "generator": "captions"}[which]
        raise UserError(
            f"the run {folder} did not finetune a {which}: leave it out, or evaluate it by `cyclefit evaluate {other}`"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments({"captioner": Captioner, "generator": Generator}[which], which)
    parsed = parser.parse_object({which: config["model"]["init_args"][which]})
    model = parser.instantiate_classes(parsed)[which]
    expected = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {name: parameter.shape for name, parameter in trained.items()}
    if different := dict(expected.items() ^ shapes.items()):
        name = min(different)
        how = "has another shape in each" if name in expected and name in shapes else "is in only one of them"
        raise UserError(f"checkpoint {checkpoint} of {folder} does not fit its config.yaml: {name} {how}")
    model.load_state_dict(trained, strict=False)
    return model, config
