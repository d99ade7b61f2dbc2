"""The command line of `train.py`: a LightningCLI that writes each run to one folder."""

import logging
import sys
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.paths import Folder, NameOrPath
from cyclefit.config.settings import parse
from cyclefit.config.start import OPTIONS, resolve_configs
from cyclefit.data import ShardData, check_shards
from cyclefit.files import check_name
from cyclefit.finetune import Finetune
from cyclefit.progress import on_terminal
from cyclefit.runs import RESUMABLE, has_trained, hold, newest, read_checkpoint, saved
from cyclefit.train.callbacks import ProgressLines, SaveRunConfig, StopOnSignal, TrainSeconds
from cyclefit.train.checkpoints import (
    FitWithLastValidation,
    LastCheckpoint,
    RunCheckpoint,
    WholeCheckpoints,
    continuation,
)
from cyclefit.train.loggers import Choice, JsonlLogger, check_logger, chosen_loggers

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


class RunCLI(LightningCLI):
    """LightningCLI with `--name`, `--runs`, `--ckpt_path`, `--group`, `--logger` and `--dry_run`.

    `held` keeps the lock on the run's folder until it is closed.
    """

    def __init__(self, held: ExitStack, *args, **kwargs):
        self.held = held
        super().__init__(*args, **kwargs)

    @override
    def add_arguments_to_parser(self, parser) -> None:
        parser.add_argument("--name", type=str, help=OPTIONS["name"])
        parser.add_argument("--runs", type=Folder, default="runs", help=OPTIONS["runs"])
        parser.add_argument("--ckpt_path", type=NameOrPath | None, help=OPTIONS["ckpt_path"])
        parser.add_argument("--group", type=str | None, help=OPTIONS["group"])
        parser.add_argument("--logger", type=Choice, default="wandb", help=OPTIONS["logger"])
        parser.add_argument("--dry_run", type=bool, nargs="?", const=True, default=False, help=OPTIONS["dry_run"])

    @override
    def parse_arguments(self, parser, args) -> None:
        self.config = parse(parser, resolve_configs(args))
        gpu = self.config.trainer.accelerator in ("gpu", "cuda")
        if gpu and not self.config.dry_run and not torch.accelerator.is_available():
            raise UserError("trainer.accelerator asks for a GPU, but torch finds none: set it to auto or cpu")

    @override
    def before_instantiate_classes(self) -> None:
        # Everything that can be checked before models are built or downloaded.
        config = self.config
        if not config.name:
            raise UserError("the run has no name: add `name: ...` to the config or --name NAME")
        check_name(config.name, "the run's name")
        if config.group:
            check_name(config.group, "the W&B group")
        self.folder = Path(config.runs) / config.name
        if config.dry_run:
            return
        if config.trainer.logger in (None, True):
            check_logger(config.logger)
        if rank_zero_only.rank == LightningEnvironment().node_rank() == 0:  # one process of a launch
            self.held.enter_context(hold(self.folder, "--name or --runs"))
        self.ckpt_path = self._checkpoint(config.ckpt_path)
        if not config.ckpt_path and has_trained(self.folder):
            how = (
                "continue it with --ckpt_path last"
                if saved(self.folder)
                else "it has saved nothing, so restart it with --ckpt_path auto"
            )
            raise UserError(f"{self.folder} already holds a run: {how}, choose another --name, or delete it")
        if config.data.train is None:
            raise UserError("no training shards: set data.train to a folder or pattern of shards")
        check_shards(**{f"data.{name}": config.data[name] for name in ("train", "validation", "unpaired", "prompts")})
        config.trainer.default_root_dir = str(self.folder.absolute())

    def _checkpoint(self, wanted: str | None) -> str | None:
        """The file to continue from, or None to start; `auto` means `last`, or None if nothing was saved yet."""
        path = wanted
        if wanted == "auto":
            path = "last" if saved(self.folder) else None
        if path == "last":
            path, passed_over = newest(self.folder)
            if passed_over:
                rank_zero_warn(f"{passed_over}; continuing from {path}")
        elif path and not Path(path).exists():
            raise UserError(f"there is no checkpoint {path}: leave out --ckpt_path to start the run")
        if path:
            read_checkpoint(Path(path), RESUMABLE, verify=wanted not in ("last", "auto"))
        return path and str(path)

    @override
    def instantiate_classes(self) -> None:
        if not self.config.dry_run:
            return super().instantiate_classes()
        logging.disable(logging.WARNING)  # open_clip warns of missing weights
        try:
            with torch.device("meta"):  # the module alone, without weights
                self.model = self._get(self.parser.instantiate_classes(self.config), "model")
        finally:
            logging.disable(logging.NOTSET)

    @override
    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        settings, logger = self.config.trainer, self.config_init.trainer.logger
        if logger in (None, True):
            logger = chosen_loggers(self.config.logger, self.folder, self.config.name, self.config.group)
        if logger is not False:
            kwargs["logger"] = [JsonlLogger(self.folder), *(logger if isinstance(logger, list) else [logger])]
        self.stop = StopOnSignal()
        checkpoints, monitor = self.folder / "checkpoints", self.model.monitor
        best = RunCheckpoint(checkpoints, "best", monitor=monitor, mode="max", enable_version_counter=False)
        last = LastCheckpoint(checkpoints, "last", enable_version_counter=False)
        callbacks = [self.stop, TrainSeconds(), *([best, last] if monitor else [last])]
        if settings.enable_progress_bar in (None, True):
            callbacks.append(RichProgressBar() if on_terminal() else ProgressLines())
        self.trainer_defaults["callbacks"] = callbacks
        kwargs["plugins"] = [WholeCheckpoints(), *(settings.plugins or [])]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            # StopOnSignal saves and the batch script requeues; Lightning would do both within its signal handler.
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        trainer.fit_loop.__class__ = FitWithLastValidation  # the trainer builds its loop from arguments of its own
        return trainer


def train(arguments: list[str]) -> int:
    """Trains according to the config and returns the exit status: 128 + n after signal n, as in a shell."""
    if sys.argv[1:] != ["train", *arguments]:  # `cyclefit train`
        sys.argv[1:] = arguments  # which Lightning runs again for further processes
    torch.set_float32_matmul_precision("high")
    # Frozen partners are in eval mode on purpose; the fit asserts it.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    with ExitStack() as held:
        cli = RunCLI(
            held,
            Finetune,
            ShardData,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={},
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            run=False,
            args=arguments,
        )
        if cli.config.dry_run:
            from cyclefit.train.dry_run import report

            report(cli.model, cli.config)
            return 0
        return _fit(cli)


def _fit(cli: RunCLI) -> int:
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)):
            raise
        notes = getattr(error, "__notes__", None) or [f"continue with: {continuation('auto')}"]
        raise UserError(
            f"rank {cli.trainer.global_rank} of {cli.trainer.world_size} has lost contact with another rank, which was "
            f"killed or has failed with an error of its own; {notes[0]}"
        ) from error
    if cli.stop.received:
        rank_zero_info(f"stopped at step {cli.trainer.global_step}, saved; continue with: {continuation()}")
        return 128 + cli.stop.received
    rank_zero_info(f"finished: {cli.folder}")
    return 0
