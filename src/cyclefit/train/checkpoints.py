"""A run's checkpoints, written atomically and up to date with the last step however the run ends."""

import copy
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as L
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver, _launch_process_observer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.start import command_line
from cyclefit.runs import write_checkpoint


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints with `runs.write_checkpoint`, which is atomic."""

    @override
    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        write_checkpoint(checkpoint, Path(path))


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that restores its best value and file even if the run's folder was moved."""

    @override
    def load_state_dict(self, state_dict: dict) -> None:
        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        files = {name: here(path) for name, path in state_dict.items() if name.endswith("model_path")}
        super().load_state_dict(state_dict | files | {"best_k_models": best, "dirpath": self.dirpath})


class LastCheckpoint(RunCheckpoint):
    """Saves the newest state as `last.ckpt`: after every validation, every 15 minutes, and whenever the fit ends.

    If an error ends the fit, the state after the last optimizer step is saved; if the error was in a validation, that
    validation will be repeated. Lightning's counters are inconsistent at that moment, so they are recorded after each
    step.

    ModelCheckpoint's `save_last` is not used because with a `monitor` it writes only if the metric has improved, and
    its `train_time_interval` synchronises ranks and GPU in every step instead of in every logging step.
    """

    interval = 15 * 60.0
    """Seconds between checkpoints."""
    _position: dict | None = None
    _unvalidated = False
    _updating = False
    """Whether the optimizer is updating the weights."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer) -> None:
        self._updating = True

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        # A fit that is asked to stop is saved here: once it has ended, Lightning counts the epoch as complete.
        if self._updating:
            self._note(trainer)
        due = trainer.should_stop
        if not due and (batch_idx + 1) % trainer.log_every_n_steps == 0:
            late = time.monotonic() - self._saved_at > self.interval
            due = trainer.strategy.reduce_boolean_decision(late, all=False)
        if due and self._position:
            self._save_position(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unvalidated = False
        super().on_validation_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._last_global_step_saved == trainer.global_step:
            return
        # Lightning has counted an epoch as complete that `max_steps` cut short: it would not be continued.
        if self._position is not None and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save_position(trainer)
        else:
            self._save_checkpoint(trainer, str(self._path))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Saves the last step and adds a note to the error; on the first rank, without asking the others. A second
        # Ctrl-C is to end the run at once.
        if isinstance(exception, KeyboardInterrupt) or not trainer.is_global_zero:
            return
        note = f"saved as of step {trainer.global_step}; continue with: {continuation()}"
        try:
            with unobserved(trainer):
                if not self._rescue(trainer, pl_module):
                    return
        except Exception as error:  # whatever it is, the first error is the one to show
            if str(error) == str(exception):
                return
            note = f"the steps after the last checkpoint could not be saved: {error}"
        exception.add_note(note)

    def _rescue(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Saves the last step unless it is saved already; returns whether there is a step to save."""
        batch = trainer.fit_loop.epoch_loop.batch_progress.current
        if self._updating:
            if batch.processed < batch.ready:
                raise UserError("the error occurred during an update of the weights")
            self._note(trainer)
        if self._position is None:
            return False
        pl_module.restore_trained()
        if self._last_global_step_saved != trainer.global_step:
            if not all(parameter.isfinite().all() for parameter in pl_module.state_dict().values()):
                raise UserError("the weights are not finite")
            self._save_position(trainer)
        if batch.completed < batch.processed == batch.ready:  # the step is taken, but its line not yet written
            with suppress(Exception):
                trainer._logger_connector.on_batch_end()
                trainer._logger_connector.update_train_step_metrics()
        return True

    @property
    def _path(self) -> Path:
        return Path(self.dirpath) / f"{self.filename}.ckpt"

    def _note(self, trainer: L.Trainer) -> None:
        loop = trainer.fit_loop
        data = trainer.datamodule
        self._unvalidated = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        self._position = {"epoch": trainer.current_epoch, type(data).__qualname__: data.state_dict()}
        if self._unvalidated:  # the validation changes the callbacks' states, and will be repeated
            self._position["callbacks"] = copy.deepcopy(_call_callbacks_state_dict(trainer))
        self._loops, self._updating = loop.state_dict(), False

    def _save_position(self, trainer: L.Trainer) -> None:
        """Saves the step recorded last, without synchronising the ranks."""
        checkpoint = trainer._checkpoint_connector.dump_checkpoint() | self._position
        loops = checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._loops)
        if self._unvalidated:
            # Lightning's own state amid a validation, which it repeats if no batch of it is complete.
            for progress in (loops["epoch_loop.batch_progress"][key] for key in ("total", "current")):
                progress["completed"] = progress["processed"]
            validation = loops["epoch_loop.val_loop.batch_progress"]
            validation["current"] = dict.fromkeys(validation["current"], 0)
            validation["total"] = validation["current"] | {"ready": 1, "started": 1}
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self._path)
        self._saved_at = time.monotonic()
        if not self._unvalidated:
            self._last_global_step_saved = trainer.global_step

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()


class FitWithLastValidation(_FitLoop):
    """A fit loop that is not done before its last validation: if that failed, continuing the run repeats it."""

    @property
    def done(self) -> bool:
        """Whether all steps and validations are done."""
        validation = self.epoch_loop.val_loop.batch_progress.total
        amid = self.restarting and validation.processed < validation.started
        return not (amid and self.epoch_loop._should_check_val_fx(self._data_fetcher)) and super().done


@contextmanager
def unobserved(trainer: L.Trainer) -> Iterator[None]:
    """Gives rank 0 time to save: Lightning kills it within five seconds after a process that it launched has ended."""
    observers = [thread for thread in threading.enumerate() if isinstance(thread, _ChildProcessObserver)]
    for thread in observers:
        thread._child_processes = []
    try:
        yield
    finally:
        if observers:
            _launch_process_observer(trainer.strategy.launcher.procs)


def continuation(checkpoint: str = "last") -> str:
    """The command that continues this run."""
    again = "" if re.search(r"--ckpt_path[= ](last|auto)\b", " ".join(sys.argv)) else f" --ckpt_path {checkpoint}"
    return command_line() + again
