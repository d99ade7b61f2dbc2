"""Callbacks of a run: save its configuration and how it ended, count its time, write lines, stop it on signals."""

import json
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from cyclefit.config.paths import written_from
from cyclefit.files import write_atomic
from cyclefit.progress import EVERY, FIRST, duration, in_words, standing, write_line
from cyclefit.runs import ENDED, versions
from cyclefit.train.loggers import JsonlLogger


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` to the run's folder, logs the configuration, and records how the run ended, on rank 0 only.

    The comments at the head of the file are the command and the versions of the libraries.
    The file and W&B's run id are written just before the first optimizer step, so that a start that fails does not
    change an earlier run. From then on `ended.txt` is absent until the run ends, and still if it is killed.
    """

    written = False

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer) -> None:
        if self.written or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        made = "".join(f"# {' '.join(line.split())}\n" for line in (shlex.join(["python", *sys.argv]), versions()))
        write_atomic(folder / self.config_filename, made + self._dumped(folder, "yaml"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                (folder / "wandb_id.txt").write_text(logger._wandb_init["id"] + "\n")
        (folder / ENDED).unlink(missing_ok=True)
        self.written = True

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stop = next((x.received for x in trainer.callbacks if isinstance(x, StopOnSignal)), 0)
        self._end(trainer, f"stopped by {signal.Signals(stop).name}" if stop else "finished")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        interrupted = isinstance(exception, KeyboardInterrupt)
        self._end(trainer, "stopped by SIGINT" if interrupted else f"failed: {' '.join(str(exception).split())}")

    def _end(self, trainer: L.Trainer, how: str) -> None:
        if self.written:
            with suppress(OSError):  # such as a full disk, which may be why it has failed
                write_atomic(Path(trainer.default_root_dir) / ENDED, f"{how}\n")

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        config = self._dumped(Path(trainer.default_root_dir), "json")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(json.loads(config), allow_val_change=True)
            elif isinstance(logger, TensorBoardLogger):
                text = self._dumped(Path(trainer.default_root_dir), "yaml")
                logger.experiment.add_text("config", f"```yaml\n{text}\n```")
            else:
                logger.log_hyperparams(json.loads(config))

    def _dumped(self, folder: Path, form: str) -> str:
        with written_from(folder):
            return self.parser.dump(self.config, format=form, skip_none=False)


class TrainSeconds(Callback):
    """Counts the seconds that a run has trained, including validation and earlier parts; saved in checkpoints.

    Lightning's own Timer is not used because a trainer with one ignores `max_time`.
    """

    def __init__(self):
        self.before, self.started = 0.0, None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.monotonic()

    @override
    def state_dict(self) -> dict:
        return {"seconds": self.before + (time.monotonic() - self.started if self.started else 0.0)}

    @override
    def load_state_dict(self, state_dict: dict) -> None:
        self.before = state_dict["seconds"]


class ProgressLines(ProgressBar):
    """Writes how far the run is in lines, for an output that is no terminal, such as a job's log; on rank 0 only.

    The first line comes `progress.FIRST` seconds after the start, further ones every `progress.EVERY` seconds, after a
    validation and at the end. Losses are those that `JsonlLogger` wrote last, so no step waits for the device.
    """

    def __init__(self):
        super().__init__()
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._paused = time.monotonic()
        self._first, self._validated, self._due = trainer.global_step, 0.0, self._began + FIRST

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        if time.monotonic() >= self._due:
            self._write(self._logged("train/"))

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.monotonic()

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *_) -> None:
        if not trainer.sanity_checking and time.monotonic() >= self._due:
            done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.processed
            self._write(f"validating, {done} batches done", time.monotonic() - self._paused)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            took = time.monotonic() - self._paused
            self._validated += took
            self._write(f"validated in {duration(took)}: {self._logged('val/')}")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(f"took {duration(time.monotonic() - self._began)}; {self._logged('train/')}")

    def _logged(self, prefix: str) -> str:
        last = next((logger.last for logger in self.trainer.loggers if isinstance(logger, JsonlLogger)), {})
        return in_words({k.removeprefix(prefix): value for k, value in last.items() if k.startswith(prefix)})

    def _write(self, more: str, paused: float = 0.0) -> None:
        now, step, total = time.monotonic(), self.trainer.global_step, self.trainer.max_steps
        done, trained = step - self._first, now - self._began - self._validated - paused
        self._due = now + EVERY
        if self._enabled:
            left = (total - step) * (now - self._began) / done if done else None  # with the validations
            where = standing(step, total if total > 0 else None, done / trained if trained > 0 else None, left)
            write_line("; ".join(filter(None, (f"step {where}", more))))


class StopOnSignal(Callback):
    """Stops the fit on a signal, after the current optimizer step and with a checkpoint.

    The signals are SIGINT (a second one stops the fit at once), SIGUSR1, which Slurm sends before the time limit, and
    SIGTERM, which Slurm sends at preemption. A signal may reach a single rank, or all ranks in different steps, so the
    ranks agree in logging steps; no other step waits for the device. `received` is the signal's number, or 0.
    """

    SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

    def __init__(self):
        self.received = 0
        self._agreed = 0
        self._before: dict[int, object] = {}

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer = trainer
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Replaces Lightning's own handler of SIGTERM too, which broadcasts amid the collectives of a step.
        for number in self.SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, number: int, _) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        elif number == signal.SIGTERM:
            # Slurm sends it to all processes of a job, so W&B's own has ended too, and logging to it raises.
            self.trainer.loggers = [x for x in self.trainer.loggers if not isinstance(x, WandbLogger)]
        rank_zero_info("\nstopping after this step" + "; Ctrl-C again to stop at once" * (number == signal.SIGINT))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.world_size == 1:
            self._agreed = self.received
        elif (batch_idx + 1) % trainer.log_every_n_steps == 0:
            number = torch.tensor(self.received, device=pl_module.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self._agreed = self.received = int(number)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self._agreed and stepped:
            if not trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
                trainer.limit_val_batches = 0  # Lightning validates whenever a fit stops; there may be no time
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
