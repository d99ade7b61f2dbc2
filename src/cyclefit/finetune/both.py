"""Finetuning a captioner and a generator in alternation."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from cyclefit.batch import Batch
from cyclefit.config.ranges import Natural, Positive, Seed, Share, checked
from cyclefit.cycles import ImageCycle, TextCycle
from cyclefit.finetune.base import Finetune
from cyclefit.finetune.captioner import CaptionerFinetune
from cyclefit.finetune.generator import GeneratorFinetune, half_frozen
from cyclefit.finetune.unpaired import check_unpaired
from cyclefit.metrics.reader import SceneReader
from cyclefit.models import Captioner, Generator, Scorer


@checked
class AlternatingFinetune(Finetune):
    """Finetunes both models, alternating between a step of each, as in Li et al.'s released code.

    The loss of a step is that of CaptionerFinetune or GeneratorFinetune; the other model is frozen in that step. Each
    model has its own optimizer; `global_step` counts the steps of both, whatever a step's number of inner epochs. The
    captioner's steps use `Batch.unpaired`, the generator's `Batch.prompts`.

    Args:
        captioner: finetuned in even steps.
        generator: finetuned in odd steps, with `lora`.
        scorer: frozen; may be None if neither a cycle nor validation needs one.
        held_out: a second scorer that is not used for training.
        image_cycle: the captioner's cycle loss; None for the baseline without one.
        text_cycle: the generator's cycle loss; None for the baseline without one.
        captioner_optimizer: called with the captioner's trained parameters, returns the optimizer.
        generator_optimizer: called with the generator's trained parameters, returns the optimizer.
        warmup_steps: number of steps of each model until its full learning rate is reached.
        gradient_clip_norm: maximum norm of each model's gradient.
        snr_gamma: see GeneratorFinetune.
        caption_dropout: see GeneratorFinetune.
        validation_images: number of images and prompts for round trips at validation.
        seed: seed of all randomness in training steps.
        reader: see GeneratorFinetune.

    """

    def __init__(
        self,
        captioner: Captioner,
        generator: Generator,
        scorer: Scorer | None = None,
        held_out: Scorer | None = None,
        image_cycle: ImageCycle | None = None,
        text_cycle: TextCycle | None = None,
        captioner_optimizer: OptimizerCallable = torch.optim.AdamW,
        generator_optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: Natural = 0,
        gradient_clip_norm: Positive = 1.0,
        snr_gamma: Positive | None = 5.0,
        caption_dropout: Share = 0.1,
        validation_images: Natural = 16,
        seed: Seed = 0,
        reader: SceneReader | None = None,
    ):
        super().__init__(captioner_optimizer, warmup_steps, seed)
        self.automatic_optimization = False
        self.gradient_clip_norm = gradient_clip_norm
        self.captioner_half = CaptionerFinetune(
            captioner, generator, scorer, image_cycle, captioner_optimizer, warmup_steps, validation_images, seed=seed,
            held_out=held_out,
        )  # fmt: skip
        self.generator_half = GeneratorFinetune(
            generator, captioner, scorer, held_out, text_cycle, generator_optimizer, warmup_steps, snr_gamma,
            caption_dropout, validation_images=validation_images, seed=seed, reader=reader,
        )  # fmt: skip
        # Kept from the start: in a step, the other model's parameters ask for no gradient.
        self._trained = [half.trained for half in self.halves]

    @property
    def halves(self) -> list[Finetune]:
        """The captioner's finetuning and the generator's, in the order of their steps."""
        return [self.captioner_half, self.generator_half]

    @property
    def unpaired(self) -> str:
        """The part of a batch that only the cycle of this step's model uses."""
        return self.halves[self.global_step % 2].unpaired

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters of both models by name."""
        return self._trained[0] | self._trained[1]

    @override
    def setup(self, stage: str) -> None:
        check_unpaired(self.halves, getattr(self._trainer, "datamodule", None))
        for half in self.halves:
            half.setup(stage)

    @override
    def on_fit_start(self) -> None:
        for name in ("scorer", "held_out"):
            self.generator_half.freeze_partner(name)
        for half in self.halves:
            half.place_reward()
        half_frozen(self.generator_half.generator)

    @override
    def configure_optimizers(self):
        optimizers = [half.optimizer([*own.values()]) for half, own in zip(self.halves, self._trained, strict=True)]
        return optimizers, [self.warm_up(optimizer) for optimizer in optimizers]

    @override
    def objective(self, batch: Batch, seeds: list[int]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        turn = self.global_step % 2
        for k, parameters in enumerate(self._trained):
            for parameter in parameters.values():
                parameter.requires_grad_(k == turn)
        half = self.halves[turn]
        loss, logs, losses = half.objective(batch, seeds)
        # Every rank's reducer waits for a gradient of every parameter, those at rest too.
        if self.trainer.world_size > 1:
            for parameter in self._trained[1 - turn].values():
                parameter.requires_grad_(True)
                loss = loss + 0.0 * parameter.sum()
        return loss, {f"{half.learner}/{key}": value for key, value in logs.items()}, losses

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        turn = self.global_step % 2
        optimizer, schedule = self.optimizers()[turn], self.lr_schedulers()[turn]
        for left in reversed(range(self.halves[turn].inner_epochs)):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_norm)
            if left:  # not counted in `global_step`, by which the models take turns
                self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
            else:
                optimizer.step()
        schedule.step()

    @override
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        self.generator_half.on_save_checkpoint(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.generator_half.on_load_checkpoint(checkpoint)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for half in self.halves:
            half.validation_step(batch, batch_idx)

    @override
    def validation_results(self) -> dict[str, Tensor]:
        # The captioner's results under their own names, the generator's under `generator/`.
        for half in self.halves:
            self.samples += half.samples
            half.samples = []
        drawn = {f"generator/{name}": value for name, value in self.generator_half.validation_results().items()}
        return self.captioner_half.validation_results() | drawn
