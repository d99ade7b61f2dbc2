"""Finetuning as LightningModules: a model's own loss plus a cycle reconstruction loss through frozen partners."""

import textwrap
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from PIL import Image, ImageDraw
from torch import Tensor
from torchmetrics import MeanMetric

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.captioners import Captioner, Decoding
from cyclefit.cycles import ImageCycle, Reading
from cyclefit.generators import Generator
from cyclefit.judges import Partners
from cyclefit.loading import half_on_gpu
from cyclefit.metrics.aggregation import CaptionMetrics
from cyclefit.scorers import Scorer


class Finetune(L.LightningModule):
    """What finetuning either model shares: what is trained and saved, the optimizer, reproducible steps.

    A checkpoint holds the parameters that are trained and no others.
    """

    def __init__(self, optimizer: OptimizerCallable, warmup_steps: int, seed: int):
        super().__init__()
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.seed = seed
        # The frozen models are not in the checkpoint; `load_state_dict` checks that all the rest is.
        self.strict_loading = False

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The trained parameters."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Loads what `state_dict` gave.

        Raises:
            UserError: the checkpoint holds other parameters than this configuration trains.

        """
        missing, unknown = self.trained.keys() - state_dict.keys(), state_dict.keys() - self.trained.keys()
        if missing or unknown:
            raise UserError(
                f"the checkpoint does not fit the configuration: {len(missing)} trained parameters are not in it "
                f"({', '.join(sorted(missing)[:3])}), {len(unknown)} in it are not trained "
                f"({', '.join(sorted(unknown)[:3])}); use the config.yaml of the run the checkpoint comes from"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def configure_optimizers(self):
        """The optimizer over what is trained, with linear warm-up."""
        optimizer = self.optimizer(list(self.trained.values()))
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / (self.warmup_steps + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def freeze_partner(self, name: str) -> None:
        """Checks that a frozen model is there and frozen, in bf16 where the run is on a GPU."""
        module = getattr(self, name)
        if module is None:
            return
        training = [n for n, m in module.named_modules() if m.training]
        learning = [n for n, p in module.named_parameters() if p.requires_grad]
        if training or learning:
            raise RuntimeError(f"the {name} must be frozen: {(training + learning)[0] or name} is in training mode")
        half_on_gpu(module)

    def step_seeds(self, batch_idx: int, count: int) -> list[int]:
        """Seeds by the run's seed, the step and the rank alone, so that a resumed run repeats them."""
        entropy = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        seeds = np.random.SeedSequence(entropy).generate_state(count + 1).tolist()
        torch.manual_seed(seeds[-1])
        return seeds[:-1]


class CaptionerFinetune(Finetune):
    """L = L_LM(x, y) + weight L_cycle: a captioner finetuned with an image cycle (Li et al., ICCV 2023).

    Args:
        captioner: what is finetuned.
        generator: frozen; None where neither the cycle nor validation needs one.
        scorer: frozen; as the generator.
        cycle: None is the baseline.
        optimizer: from the trained parameters to an optimizer.
        warmup_steps: steps until the full learning rate.
        round_trip_images: validation images that are regenerated from their greedy captions, for the round-trip
            similarity and the sample grid; 0 for none.
        max_new_tokens: length limit of validation captions.
        seed: of everything random in a step.

    """

    def __init__(
        self,
        captioner: Captioner,
        generator: Generator | None = None,
        scorer: Scorer | None = None,
        cycle: ImageCycle | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        round_trip_images: int = 16,
        max_new_tokens: int = 30,
        seed: int = 0,
    ):
        super().__init__(optimizer, warmup_steps, seed)
        self.captioner = captioner
        self.generator = generator
        self.scorer = scorer
        self.cycle = cycle
        self.round_trip_images = round_trip_images
        self.decoding = Decoding(max_new_tokens=max_new_tokens)
        self.caption_metrics = CaptionMetrics()
        self.image_similarity = MeanMetric()
        self._samples: list[tuple[Tensor, Tensor | None, str, float]] = []

    @property
    def partners(self) -> Partners:
        """The frozen models."""
        return Partners(self.generator, self.scorer)

    def setup(self, stage: str) -> None:
        """Checks that everything the cycle needs is there, and lets it prepare."""
        if not any(p.requires_grad for p in self.captioner.parameters()):
            raise UserError("the captioner is frozen: set model.captioner.trainable to what is to be finetuned")
        if self.cycle is None:
            return
        for name in self.cycle.needs:
            if getattr(self, name) is None:
                raise UserError(f"{type(self.cycle).__name__} needs a {name}: set model.{name}")
        self.cycle.prepare(self.captioner, self.partners)

    def on_fit_start(self) -> None:
        """Asserts that what is frozen is frozen and what is trained trains."""
        self.freeze_partner("generator")
        self.freeze_partner("scorer")
        trains = {name.rpartition(".")[0] for name, p in self.captioner.named_parameters() if p.requires_grad}
        modes = dict(self.captioner.named_modules())
        if idle := [name for name in trains if not modes[name].training]:
            raise RuntimeError(f"captioner.{idle[0]} is to be trained but in eval mode")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """L_LM + weight L_cycle, one pass of the captioner over the reference captions for both."""
        seeds = self.step_seeds(batch_idx, len(batch))
        features = self.captioner.embed(batch.images)
        tokens = self.captioner.tokenize(batch.captions)
        logits = self.captioner.logits(features, tokens)
        language = self.captioner.loss_of(logits, tokens).mean()
        logs = {"train/lm": language.detach()}
        loss = language
        if self.cycle is not None:
            reading = Reading(batch.images, features, tokens, logits)
            cycle, details = self.cycle(self.captioner, self.partners, reading, seeds)
            loss = language + self.cycle.weight * cycle.mean()
            logs["train/cycle"] = cycle.detach().mean()
            logs |= {f"train/{name}": value for name, value in details.items()}
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict(logs, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Greedy captions against all references; the first images are regenerated from theirs."""
        seeds = list(range(batch_idx * len(batch), (batch_idx + 1) * len(batch)))
        captions = [row[0] for row in self.captioner.sample(batch.images, self.decoding, seeds)]
        self.caption_metrics.update(captions, batch.references)
        room = self.round_trip_images - len(self._samples)
        if room <= 0 or self.generator is None or self.scorer is None:
            return
        images = batch.images[:room]
        drawn = self.generator.generate(captions[:room], seeds[:room])
        similarities = (self.scorer.embed_images(images) * self.scorer.embed_images(drawn)).sum(-1)
        self.image_similarity.update(similarities)
        self._samples += zip(images.cpu(), drawn.cpu(), captions[:room], similarities.tolist(), strict=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics and saves the sample grid."""
        scores = self.caption_metrics.compute()
        self.caption_metrics.reset()
        logged = {f"val/{name}": scores[name] for name in ("CIDEr", "CIDEr-D", "BLEU-4", "ROUGE-L", "words")}
        if self.round_trip_images and self.generator is not None and self.scorer is not None:
            logged[f"val/image_similarity/{self.scorer.name.replace('/', '-')}"] = self.image_similarity.compute()
            self.image_similarity.reset()
        self.log_dict(logged)
        self.log("CIDEr", scores["CIDEr"], prog_bar=True, logger=False)
        if self._samples and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._save_grid()
        self._samples = []

    def _save_grid(self) -> None:
        grid = sample_grid(self._samples)
        folder = Path(self.trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{self.global_step:07d}.png")
        for logger in self.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("val/samples", [grid], caption=[f"step {self.global_step}"])


def sample_grid(
    samples: list[tuple[Float[Tensor, "3 h w"], Float[Tensor, "3 h2 w2"], str, float]],
) -> Image.Image:
    """Sources, what was regenerated from their captions, the captions and the similarities, as one picture."""
    side, columns, text = 128, 4, 46
    rows = -(-len(samples) // columns)
    grid = Image.new("RGB", (columns * (2 * side + 8), rows * (side + text)), "white")
    draw = ImageDraw.Draw(grid)
    for k, (source, drawn, caption, similarity) in enumerate(samples):
        x, y = k % columns * (2 * side + 8), k // columns * (side + text)
        for offset, image in ((0, source), (side, drawn)):
            pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            resample = Image.Resampling.NEAREST if pixels.shape[0] < side else Image.Resampling.LANCZOS
            grid.paste(Image.fromarray(pixels).resize((side, side), resample), (x + offset, y))
        lines = textwrap.wrap(f"{similarity:.2f}  {caption}", 42)[:3]
        draw.multiline_text((x + 2, y + side + 2), "\n".join(lines), fill="black")
    return grid
