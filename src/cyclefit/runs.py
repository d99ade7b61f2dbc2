"""A finetuned run as it lies on disk: its configuration, what it trained, and its models with those weights."""

import os
import zipfile
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor

from cyclefit import UserError
from cyclefit.captioners import Captioner
from cyclefit.generators import Generator
from cyclefit.paths import found

Which = Literal["captioner", "generator"]


def write_checkpoint(checkpoint: dict, path: Path) -> None:
    """Writes a checkpoint that is there whole or not at all; what `last.ckpt` held becomes `previous.ckpt`.

    Raises:
        UserError: it could not be written; what was there before is untouched.

    """
    partial, previous = path.with_suffix(".partial"), path.with_name("previous.ckpt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.stem == "last" and path.exists():
            path.replace(previous)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch raises its own error over that of a full disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        partial.unlink(missing_ok=True)
        whole = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt"))) if path.parent.is_dir() else ""
        raise UserError(
            f"{path} could not be written: {cause.strerror}; whole are {whole or 'no checkpoints'}; make room, then "
            "continue with --ckpt_path last"
        ) from error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its own checksums; None if it is whole."""
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


def newest(folder: Path) -> tuple[Path, str | None]:
    """A run's newest whole checkpoint, and what is wrong with a newer one that is passed over.

    Raises:
        UserError: the run has saved none, or only damaged ones.

    """
    found = saved(folder)
    if not found:
        raise UserError(
            f"there is no checkpoint {folder}/checkpoints/last.ckpt: leave out --ckpt_path to start the run"
        )
    damages = [f"{path} is damaged ({reason})" for path in found if (reason := damage(path))]
    if len(damages) == len(found):
        raise UserError(f"{'; '.join(damages)}: delete {folder} and start the run again")
    return found[1 if damages and found[0].name in damages[0] else 0], "; ".join(damages) or None


def find_checkpoint(folder: Path, checkpoint: str = "last") -> Path:
    """A checkpoint of a run.

    Raises:
        FileNotFoundError: the folder holds no run, or no such checkpoint.

    """
    path = folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not (folder / "config.yaml").exists():
        runs = ", ".join(sorted(str(p.parent) for p in folder.parent.glob("*/config.yaml"))) or "none"
        raise FileNotFoundError(f"{folder} holds no run (no config.yaml in it); runs beside it: {runs}")
    if not path.exists():
        saved = ", ".join(sorted(p.stem for p in path.parent.glob("*.ckpt"))) or "none"
        raise FileNotFoundError(f"{path} does not exist; checkpoints the run has saved so far: {saved}")
    return path


def read_config(folder: Path) -> dict:
    """A run's configuration, with paths that are relative to its folder made absolute.

    Raises:
        FileNotFoundError: there is none.

    """

    def located(value):
        if isinstance(value, dict):
            return {key: located(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [located(inner) for inner in value]
        # As `paths.written` writes them.
        relative = isinstance(value, str) and (value == ".." or value.startswith(("./", "../")))
        return found(value, folder) if relative else value

    return located(yaml.safe_load((folder / "config.yaml").read_text()))


def read_run(folder: Path, checkpoint: str = "last") -> tuple[dict, dict[str, Tensor]]:
    """A run's configuration with its `folder` and `steps`, and what it trained by name, `captioner...`, `generator...`.

    Of a run with a moving average the parameters are the average.

    Raises:
        FileNotFoundError: the folder holds no run, or no such checkpoint.
        UserError: the checkpoint is damaged.

    """
    path = find_checkpoint(folder, checkpoint)
    config = read_config(folder)
    if reason := damage(path):
        others = sorted(p.stem for p in path.parent.glob("*.ckpt") if p != path and not damage(p))
        raise UserError(f"{path} is damaged ({reason}); whole checkpoints of the run: {', '.join(others) or 'none'}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    # The moving average lists the same parameters in the same order.
    tensors = state["ema"]["shadow_params"] if "ema" in state else state["state_dict"].values()
    # A run of both models holds each under one of its halves.
    names = [name.removeprefix("captioning.").removeprefix("drawing.") for name in state["state_dict"]]
    return config | {"steps": state["global_step"], "folder": str(folder)}, dict(zip(names, tensors, strict=True))


def load_run(folder: Path, checkpoint: str = "last", which: Which = "captioner") -> tuple[Captioner | Generator, dict]:
    """The captioner or the generator of a run with its trained weights, and the run's configuration.

    Raises:
        FileNotFoundError: the folder holds no run, or no such checkpoint.
        UserError: the run has finetuned the other model only, or the checkpoint does not fit the configuration.

    """
    from jsonargparse import ArgumentParser

    config, parameters = read_run(folder, checkpoint)
    trained = {name.removeprefix(f"{which}."): p for name, p in parameters.items() if name.startswith(f"{which}.")}
    if not trained:
        other = {"captioner": "images", "generator": "captions"}[which]
        raise UserError(
            f"the run {folder} has finetuned no {which}: leave it out, or evaluate it with `python evaluate.py {other}`"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments({"captioner": Captioner, "generator": Generator}[which], which)
    parsed = parser.parse_object({which: config["model"]["init_args"][which]})
    model = parser.instantiate_classes(parsed)[which]
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if different := expected ^ trained.keys():
        raise UserError(
            f"checkpoint {checkpoint} of {folder} does not fit its config.yaml: {min(different)} is in one of them only"
        )
    model.load_state_dict(trained, strict=False)
    return model, config
