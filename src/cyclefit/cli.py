"""The command line: LightningCLI, bare config names, one run in one folder."""

import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from cyclefit import UserError
from cyclefit.data import ShardData
from cyclefit.data.read import look_for
from cyclefit.finetune import Finetune
from cyclefit.paths import Folder, NameOrPath, written_from
from cyclefit.runs import newest, saved, write_checkpoint
from cyclefit.start import resolve_configs

# What `auto` means on several devices: a rank that waits this long for another one gives up with an error; buffers are
# constants of the models and are not sent in every step.
StrategyRegistry.register(
    "ddp",
    DDPStrategy,
    "DDP",
    override=True,
    find_unused_parameters=False,
    broadcast_buffers=False,
    timeout=timedelta(minutes=10),
)


class JsonlLogger(Logger):
    """Every logged value as a line of `metrics.jsonl` in the run's folder."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.started = {"started": round(time.time(), 3)}
        """When the process began, and on how many GPUs the run is: said once."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def version(self) -> str:
        """There is one version of a run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one line.

        The first one of a process says when that began, and takes the place of what a killed run wrote of its step and
        later ones.
        """
        path = self.folder / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.started and path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step(line) < (step or 0)]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(path)
        with path.open("a") as file:
            said = self.started | {"gpus": _gpus()} if self.started else {}
            row = {"step": step, "time": round(time.time(), 3), **said, **metrics}
            file.write(json.dumps(row) + "\n")
        self.started = {}

    def log_hyperparams(self, *args, **kwargs) -> None:
        """The run's `config.yaml` holds them."""


def _gpus() -> int:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return ranks if torch.cuda.is_available() else 0


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, see `runs.write_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Writes one."""
        write_checkpoint(checkpoint, Path(path))


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder and hands the same to W&B; rank 0 only."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the file whole or not at all, and logs the nested configuration."""
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with written_from(path.parent):
            partial.write_text(self.parser.dump(self.config, skip_none=False))
            config = self.parser.dump(self.config, format="json", skip_none=False)
        partial.replace(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(json.loads(config), allow_val_change=True)


class RunCheckpoint(ModelCheckpoint):
    """Knows its best score and file again where the run was moved, unlike ModelCheckpoint's own."""

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the state, with files in the folder they are in now."""

        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        files = {name: here(path) for name, path in state_dict.items() if name.endswith("model_path")}
        super().load_state_dict(state_dict | files | {"best_k_models": best, "dirpath": self.dirpath})


class LastCheckpoint(RunCheckpoint):
    """`last.ckpt`, the newest state: at the end of every validation, every 15 minutes, and wherever the fit ends.

    ModelCheckpoint's own `save_last` beside a `monitor` writes only where the metric improved; its own
    `train_time_interval` has the ranks agree, and the GPU wait, in every step: here they do in every logging step.
    """

    interval = 15 * 60.0
    """Seconds."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        """Saves where the last time is long ago, and where the fit is asked to stop.

        Once it has ended, Lightning counts the epoch as complete.
        """
        due = trainer.should_stop
        if not due and (batch_idx + 1) % trainer.log_every_n_steps == 0:
            late = time.monotonic() - self._saved_at > self.interval
            due = trainer.strategy.reduce_boolean_decision(late, all=False)
        if due:
            self._save_checkpoint(trainer, str(Path(self.dirpath) / f"{self.filename}.ckpt"))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step, if it is not saved yet."""
        path = Path(self.dirpath) / f"{self.filename}.ckpt"
        if self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, str(path))


class StopOnSignal(Callback):
    """A signal ends the fit after the optimizer step at hand, with a checkpoint.

    SIGINT, where a second one ends it at once; SIGUSR1, which Slurm sends before the time limit; SIGTERM, its signal
    of preemption. It may reach one rank of several, or all in different steps: they agree in logging steps, so that no
    other step waits for the device. `received` is the signal's number, 0 for none.
    """

    SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

    def __init__(self):
        self.received = 0
        self._agreed = 0
        self._before: dict[int, object] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers who had the signals."""
        self.trainer = trainer
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the signals; Lightning's own handler of SIGTERM broadcasts amid the collectives of a step."""
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

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        """Ends the fit where it was asked for; the checkpoint is written as at any end."""
        if trainer.world_size == 1:
            self._agreed = self.received
        elif (batch_idx + 1) % trainer.log_every_n_steps == 0:
            number = torch.tensor(self.received, device=pl_module.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self._agreed = self.received = int(number)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self._agreed and stepped:
            if not trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
                trainer.limit_val_batches = 0  # Lightning validates wherever a fit is stopped; there may be no time
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self.on_fit_end(trainer, pl_module)


class RunCLI(LightningCLI):
    """`train.py`'s command line: `--name`, `--ckpt_path`, and Lightning's own."""

    def add_arguments_to_parser(self, parser) -> None:
        """What a run is called, where runs lie, and what it continues from."""
        parser.add_argument("--name", type=str, help="the run's name: everything it writes is in RUNS/NAME")
        parser.add_argument("--runs", type=Folder, default="runs", help="the folder of all runs")
        parser.add_argument("--ckpt_path", type=NameOrPath | None, help="what to continue from: `last`, `auto`, a file")
        parser.add_argument("--group", type=str | None, help="the W&B group of this run")
        parser.add_argument(
            "--dry_run",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="print what a step needs; nothing is downloaded or trained",
        )

    def before_instantiate_classes(self) -> None:
        """Decides the run's folder before anything is built or downloaded."""
        config = self.config
        if not config.name:
            raise UserError("the run has no name: add `name: ...` to the config or --name NAME")
        self.folder = Path(config.runs) / config.name
        if config.dry_run:
            return
        self.ckpt_path = config.ckpt_path
        if self.ckpt_path == "auto":  # `last`, or from the start where nothing was saved yet
            self.ckpt_path = "last" if saved(self.folder) else None
        if self.ckpt_path == "last":
            path, passed_over = newest(self.folder)
            self.ckpt_path = str(path)
            if passed_over:
                rank_zero_warn(f"{passed_over}; continuing from {path}")
        elif self.ckpt_path and not Path(self.ckpt_path).exists():
            raise UserError(f"there is no checkpoint {self.ckpt_path}: leave out --ckpt_path to start the run")
        if not config.ckpt_path and (self.folder / "config.yaml").exists() and rank_zero_only.rank == 0:
            raise UserError(
                f"{self.folder} already holds a run: continue it with --ckpt_path last, choose another --name, or "
                "delete it"
            )
        if config.data.train is None:
            raise UserError("no training shards: set data.train to a folder or pattern of shards")
        # Before minutes are spent on loading models.
        look_for(**{f"data.{split}": config.data[split] for split in ("train", "validation")})
        config.trainer.default_root_dir = str(self.folder.absolute())

    def instantiate_classes(self) -> None:
        """The module, its data and the trainer; in a dry run the module alone, without weights."""
        if not self.config.dry_run:
            return super().instantiate_classes()
        logging.disable(logging.WARNING)  # open_clip regrets the weights
        try:
            with torch.device("meta"):
                self.model = self._get(self.parser.instantiate_classes(self.config), "model")
        finally:
            logging.disable(logging.NOTSET)

    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        """The trainer, with the run's own loggers and checkpoints unless the config says otherwise."""
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = [JsonlLogger(self.folder), self._wandb()]
        self.stop = StopOnSignal()
        checkpoints = self.folder / "checkpoints"
        monitor = self.model.monitor
        best = RunCheckpoint(checkpoints, "best", monitor=monitor, mode="max", enable_version_counter=False)
        last = LastCheckpoint(checkpoints, "last", enable_version_counter=False)
        self.trainer_defaults["callbacks"] = [self.stop, *([best] if monitor else []), last, *self._progress()]
        kwargs["plugins"] = [WholeCheckpoints(), *(self.config.trainer.plugins or [])]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            # StopOnSignal saves and the batch script requeues; Lightning would do both within its signal handler.
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        return super().instantiate_trainer(**kwargs)

    def _progress(self) -> list[Callback]:
        return [RichProgressBar()] if self.config.trainer.enable_progress_bar in (None, True) else []

    def _wandb(self) -> WandbLogger:
        from wandb.sdk.lib.runid import generate_id

        remembered = self.folder / "wandb_id.txt"
        run_id = remembered.read_text().strip() if remembered.exists() else ""
        if not run_id:
            run_id = os.environ.get("WANDB_RUN_ID") or generate_id()  # an agent of a sweep gives its own
            if rank_zero_only.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                remembered.write_text(run_id + "\n")
        return WandbLogger(
            name=self.config.name,
            save_dir=str(self.folder),
            id=run_id,
            project=os.environ.get("WANDB_PROJECT", "cyclefit"),
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or wandb_mode(self.folder),
            group=self.config.group,
        )


def wandb_mode(folder: Path) -> str:
    """`online` where somebody is logged in and W&B answers, else `offline`, with a log in `folder`."""
    import wandb

    try:
        return "online" if rank_zero_only.rank == 0 and wandb.login(prompt=False) else "offline"
    except wandb.Error as error:
        rank_zero_warn(
            f"W&B cannot be reached ({error}): this run is logged offline; send it later with "
            f"`wandb sync {folder}/wandb/offline-run-*`"
        )
        return "offline"


def train(arguments: list[str]) -> int:
    """Trains as the config says; returns the exit status: 128 + n after signal n, as a shell has it."""
    # Lightning relaunches sys.argv for further processes: names are resolved in place.
    sys.argv[1:] = resolve_configs(arguments)
    torch.set_float32_matmul_precision("high")
    # Frozen partners are in eval mode on purpose; the fit asserts it.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    cli = RunCLI(
        Finetune,
        ShardData,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        trainer_defaults={},
        run=False,
    )
    if cli.config.dry_run:
        from cyclefit.dry_run import report

        report(cli.model, cli.config)
        return 0
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    if cli.stop.received:
        command = " ".join(["python", *sys.argv])
        again = "" if "--ckpt_path" in command else " --ckpt_path last"
        rank_zero_info(f"stopped at step {cli.trainer.global_step}, saved; continue with: {command}{again}")
        return 128 + cli.stop.received
    rank_zero_info(f"finished: {cli.folder}")
    return 0
