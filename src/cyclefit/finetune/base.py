"""The base class of finetunings: trained parameters, checkpoints, the optimizer, seeded steps, the sample grid."""

from abc import ABC, abstractmethod
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.config.ranges import OPTIMIZER, check
from cyclefit.data import latents_source
from cyclefit.finetune.grid import Sample, sample_grid
from cyclefit.finetune.unpaired import check_unpaired
from cyclefit.judges import place


def computed(means: nn.ModuleDict) -> dict[str, Tensor]:
    """The means of all ranks by name, without those of nothing; resets them."""
    found = {name: mean.compute() for name, mean in means.items()}
    for mean in means.values():
        mean.reset()
    return {name: value for name, value in found.items() if not value.isnan()}


class Finetune(L.LightningModule, ABC):
    """Finetunes the model in the attribute named by `learner`; checkpoints contain the trained parameters only."""

    learner: str
    """`captioner` or `generator`."""
    thaw: str
    """The learner's setting that selects what is trained, and its value; for an error message."""
    unpaired: str
    """`unpaired` or `prompts`, the part of a batch that only the cycle uses."""

    def __init__(self, optimizer: OptimizerCallable, warmup_steps: int, seed: int):
        super().__init__()
        try:
            (group,) = optimizer([nn.Parameter(torch.zeros(1))]).param_groups
        except (ValueError, TypeError) as error:
            raise UserError(f"optimizer: {error}") from error
        for name, hint in OPTIMIZER.items():
            check(f"optimizer: {name}", group.get(name), hint)
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.seed = seed
        self.samples: list[Sample] = []
        self._unchecked: list[tuple[int, list[str], Tensor]] = []
        self._last_keys: list[str] = []
        # The frozen models are not in the checkpoint; `load_state_dict` checks everything else.
        self.strict_loading = False

    @property
    def monitor(self) -> str | None:
        """The metric that is highest in `best.ckpt`."""
        return "val/CIDEr"

    @property
    def inner_epochs(self) -> int:
        """The number of updates on each batch, a setting of the cycle."""
        return 1 if self.cycle is None else self.cycle.inner_epochs

    @property
    def halves(self) -> list["Finetune"]:
        """The finetunings of single models that this one consists of."""
        return [self]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; names begin with `captioner.` or `generator.`."""
        named = getattr(self, self.learner).named_parameters(self.learner)
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    @override
    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        own = self.trained
        shared = own.keys() & state_dict.keys()
        odd = {
            "missing parameters": own.keys() - state_dict.keys(),
            "unexpected parameters": state_dict.keys() - own.keys(),
            "parameters of another shape": {name for name in shared if own[name].shape != state_dict[name].shape},
        }
        said = [f"{what} ({len(names)}: {', '.join(sorted(names)[:3])})" for what, names in odd.items() if names]
        if said:
            raise UserError(
                f"the checkpoint does not fit the configuration: {', '.join(said)}; use the config.yaml of the run "
                "that saved the checkpoint"
            )
        for name, parameter in own.items():
            parameter.data.copy_(state_dict[name])

    @override
    def configure_optimizers(self):
        optimizer = self.optimizer(list(self.trained.values()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.warm_up(optimizer), "interval": "step"}}

    def warm_up(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """A linear warm-up schedule over `warmup_steps`."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / (self.warmup_steps + 1)))

    @override
    def setup(self, stage: str) -> None:
        # Everything that can be checked before the first step.
        data = getattr(self._trainer, "datamodule", None)
        if data is not None and self._trainer.lightning_module is self:
            check_unpaired(self.halves, data)
        cached, own = getattr(data, "latents", None), getattr(self.generator, "pretrained", None)
        if cached and (own is None or latents_source(cached) != latents_source(own)):
            raise UserError(f"data.latents are those of {cached}, but model.generator is {own}: set both to the same")
        if not self.trained:
            raise UserError(f"the {self.learner} is frozen: set model.{self.learner}.{self.thaw}")
        if self.cycle is None:
            return
        for name in self.cycle.needs:
            if getattr(self, name) is None:
                raise UserError(f"{type(self.cycle).__name__} needs a {name}: set model.{name}")
        if (batch_size := getattr(data, "batch_size", None)) is not None:
            more = data.unpaired_batch_size if getattr(data, self.unpaired, None) else 0
            self.cycle.check_batch(batch_size + more)
        accumulated = getattr(self._trainer, "accumulate_grad_batches", 1)
        if self.inner_epochs > 1 and accumulated > 1:
            raise UserError(
                f"{type(self.cycle).__name__}: inner_epochs {self.inner_epochs} means several updates on one batch, "
                f"trainer.accumulate_grad_batches {accumulated} one update on several: set one of the two to 1"
            )
        if self.cycle.reads_rejected and (asked := getattr(data, "rejected", None)) is not None:
            asked.add("captions" if self.learner == "captioner" else "images")
        self.cycle.prepare(getattr(self, self.learner), self.partners)

    def reward_means(self) -> nn.ModuleDict:
        """Means for `reward_of`, by their names in validation."""
        reward = getattr(self.cycle, "reward", None)
        names = [] if reward is None else [f"reward/{name}" for name in reward.names] or ["reward"]
        return nn.ModuleDict({name: MeanMetric() for name in names})

    def reward_of(self, given, candidates, seeds: list[int]) -> dict[str, Float[Tensor, "b"]]:
        """What the cycle's reward makes of one candidate for each input of validation; of a sum, its parts.

        A sum's total is relative to an input's other candidates, of which there are none. Nothing without a reward, or
        where there are too few inputs to contrast with.
        """
        reward = getattr(self.cycle, "reward", None)
        if reward is None or len(seeds) <= reward.num_others:
            return {}
        scores, parts = reward.score_parts(self.partners, given, candidates, seeds)
        return {f"reward/{name}": of[:, 0] for name, of in parts.items()} or {"reward": scores[:, 0]}

    def place_reward(self) -> None:
        """Puts the own models of the cycle's reward, if it has some, beside the partners."""
        place(getattr(self.cycle, "reward", None), next(iter(self.trained.values())).device)

    def freeze_partner(self, name: str) -> None:
        """Checks that a partner, if there is one, is frozen; on a GPU, casts it to bf16."""
        module = getattr(self, name)
        if module is None:
            return
        training = [n for n, m in module.named_modules() if m.training]
        learning = [n for n, p in module.named_parameters() if p.requires_grad]
        if training or learning:
            raise RuntimeError(f"the {name} must be frozen: {(training + learning)[0] or name} is in training mode")
        module.half_on_gpu()

    @abstractmethod
    def objective(self, batch: Batch, seeds: list[int]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """The loss of a batch, scalars to log, and loss terms per sample (of all samples or of the first ones).

        The samples are those of the batch, followed by those of its part `unpaired`.
        """

    @abstractmethod
    def validation_results(self) -> dict[str, Tensor]:
        """The metrics of this validation by name; resets them."""

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, logs, losses = self.objective(batch, self.step_seeds(batch_idx, len(batch)))
        unpaired = getattr(batch, self.unpaired)
        self.note_finite(batch.keys if unpaired is None else [*batch.keys, *unpaired.keys], losses)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch))
        return loss

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        """One update for each inner epoch, all on the same batch; the closure runs `training_step` and its backward.

        The seeds are the same in all of them, so the cycle knows what it has sampled. `global_step` and the learning
        rate's schedule count the batch as one step.
        """
        for _ in range(self.inner_epochs):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.updated()

    def updated(self) -> None:
        """Called after every update of the trained parameters."""

    def step_seeds(self, batch_idx: int, count: int) -> list[int]:
        """Seeds of a step's samples, from the run's seed, the step and the rank only; a resumed run repeats them."""
        entropy = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        seeds = np.random.SeedSequence(entropy).generate_state(count + 1).tolist()
        torch.manual_seed(seeds[-1])
        return seeds[:-1]

    def over_ranks(self, value: Tensor) -> Tensor:
        """The mean of a number over all ranks, without gradient and without waiting for the device."""
        value, ranks = value.detach().clone(), self.trainer.world_size
        if ranks > 1:
            torch.distributed.all_reduce(value)
        return value / ranks

    def note_finite(self, keys: list[str], losses: list[Float[Tensor, "m"]]) -> None:
        """Records which losses are finite, for `check_finite` at logging steps; no other step waits for the device."""
        finite = torch.ones(len(keys), dtype=torch.bool, device=losses[0].device)
        for loss in losses:
            finite[: len(loss)] &= loss.detach().isfinite()
        if self._unchecked and self._unchecked[-1][:2] == (self.global_step, keys):  # an inner epoch before
            self._unchecked[-1][2].logical_and_(finite)
        else:
            self._unchecked.append((self.global_step, keys, finite))
        if len(self._unchecked) >= self.trainer.log_every_n_steps:
            self.check_finite()

    def check_finite(self) -> None:
        """Raises UserError, naming the step and the samples, if a loss since the last check was NaN or infinite."""
        steps, before = self._unchecked, self._last_keys
        if not steps:
            return
        if torch.cat([finite for _, _, finite in steps]).all():
            self._last_keys, self._unchecked = steps[-1][1], []
            return
        lost = next(i for i, (_, _, finite) in enumerate(steps) if not finite.all())
        step, keys, finite = steps[lost]
        samples = [key for key, fine in zip(keys, finite.tolist(), strict=True) if not fine]
        before = steps[lost - 1][1] if lost else before
        # If no sample has a finite loss, the step before may have broken the weights.
        suspects = f", or those of the step before: {', '.join(before)}" if before and not finite.any() else ""
        raise UserError(
            f"the loss is not finite at step {step}; samples: {', '.join(samples)}{suspects}. The last checkpoint is "
            "older: remove these samples or lower the learning rate, and continue with --ckpt_path last"
        )

    def restore_trained(self) -> None:
        """Restores the trained parameters if validation has replaced them (by a moving average)."""

    @override
    def on_validation_start(self) -> None:
        self.check_finite()

    @override
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.check_finite()  # refuses to save after a non-finite loss

    @override
    def on_validation_epoch_end(self) -> None:
        results = self.validation_results()
        self.log_dict({f"val/{name}": value for name, value in results.items()})
        if "CIDEr" in results:
            self.log("CIDEr", results["CIDEr"], prog_bar=True, logger=False)
        self.save_grid()

    def save_grid(self) -> None:
        """Saves this validation's samples as one image, on disk and with the loggers, and clears them."""
        samples, self.samples = self.samples, []
        if not samples or not self.trainer.is_global_zero or self.trainer.sanity_checking:
            return
        grid = sample_grid(samples)
        folder = Path(self.trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{self.global_step:07d}.png")
        for logger in self.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("val/samples", [grid], caption=[f"step {self.global_step}"])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/samples", np.asarray(grid), self.global_step, dataformats="HWC")
