"""The loggers of a run: `metrics.jsonl` in its folder, W&B and TensorBoard."""

import importlib.util
import itertools
import json
import os
import time
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from typing_extensions import override

from cyclefit import UserError
from cyclefit.files import write_atomic

Choice = Literal["wandb", "tensorboard", "both"]
"""Where a run logs, beside `metrics.jsonl`."""


class JsonlLogger(Logger):
    """Writes logged values as lines of `metrics.jsonl` in the run's folder.

    The first line of a process records when the process started and on how many GPUs it runs. It replaces the line of
    the same step, and all later lines, that a killed process has left.
    """

    version = ""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.began: float | None = round(time.time(), 3)
        """When the process started; None once it is written."""
        self.last: dict[str, float] = {}
        """The last value of everything logged by this process, by name."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.last |= metrics
        path = self.folder / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"step": step, "time": round(time.time(), 3)}
        if self.began is not None:
            if path.exists():
                before = path.read_text().splitlines(keepends=True)
                kept = itertools.takewhile(lambda line: not _repeats(line, step or 0, metrics), before)
                write_atomic(path, "".join(kept))
            row |= {"started": self.began, "gpus": _gpus()}
            self.began = None
        with path.open("a") as file:
            file.write(json.dumps(row | metrics) + "\n")

    @override
    def log_hyperparams(self, *args, **kwargs) -> None:
        pass  # the run's `config.yaml` has them


def _gpus() -> int:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return ranks if torch.cuda.is_available() else 0


def _repeats(line: str, step: int, metrics: dict) -> bool:
    """Whether a line has these metrics at this step, belongs to a later step, or is incomplete."""
    try:
        row = json.loads(line)
    except ValueError:
        return True
    # A validation has the number of the step before it.
    return row["step"] > step or (row["step"] == step and bool(row.keys() & metrics.keys() - {"epoch"}))


def check_logger(choice: Choice) -> None:
    """Raises UserError if TensorBoard is chosen and neither of the packages that write its files is installed."""
    if choice != "wandb" and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise UserError(
            f"--logger {choice} needs the package tensorboard, which is not installed: run `pip install tensorboard`, "
            "or choose --logger wandb"
        )


def chosen_loggers(choice: Choice, folder: Path, name: str, group: str | None) -> list[Logger]:
    """The run's loggers beside `JsonlLogger`."""
    made = [] if choice == "tensorboard" else [wandb_logger(folder, name, group)]
    return made if choice == "wandb" else [*made, tensorboard_logger(folder)]


def tensorboard_logger(folder: Path) -> TensorBoardLogger:
    """Writes event files into `tensorboard/` in a folder; those of a continued run are one log."""
    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)


def wandb_logger(folder: Path, name: str, group: str | None) -> WandbLogger:
    """The run's W&B logger, with the id saved in `wandb_id.txt` in its folder, if any."""
    from wandb.sdk.lib.runid import generate_id

    remembered = folder / "wandb_id.txt"
    run_id = remembered.read_text().strip() if remembered.exists() else ""
    return WandbLogger(
        name=name,
        save_dir=str(folder),
        id=run_id or os.environ.get("WANDB_RUN_ID") or generate_id(),  # an agent of a sweep sets WANDB_RUN_ID
        project=os.environ.get("WANDB_PROJECT", "cyclefit"),
        resume="allow",
        mode=os.environ.get("WANDB_MODE") or wandb_mode(folder),
        group=group,
    )


def wandb_mode(folder: Path) -> str:
    """`online` if the user is logged in and W&B responds, else `offline`, with the log in `folder`."""
    import wandb

    try:
        return "online" if rank_zero_only.rank == 0 and wandb.login(prompt=False) else "offline"
    except wandb.Error as error:
        rank_zero_warn(
            f"W&B cannot be reached ({error}): this run is logged offline; send it later with "
            f"`wandb sync {folder}/wandb/offline-run-*`"
        )
        return "offline"
