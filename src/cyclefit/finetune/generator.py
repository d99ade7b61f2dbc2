"""Finetuning the adapters of a generator with a text cycle."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.config.ranges import BelowOne, Natural, Positive, Seed, Share, checked
from cyclefit.cycles import TextCycle
from cyclefit.finetune.base import Finetune, computed
from cyclefit.finetune.grid import Sample
from cyclefit.finetune.unpaired import Mixture
from cyclefit.judges import Partners
from cyclefit.metrics.aggregation import CaptionMetrics, FactMetrics
from cyclefit.metrics.reader import SceneReader
from cyclefit.models import Captioner, Decoding, Generator, Scorer
from cyclefit.rerank import sample_seed


@checked
class GeneratorFinetune(Finetune):
    """L = L_denoise(x, y) + weight L_cycle: adapters of a generator finetuned with a text cycle (Li et al., ICCV 2023).

    The cycle also uses the captions without images in `Batch.prompts`, if there are any; see `Mixture`.

    Args:
        generator: the model to finetune, with `lora`.
        captioner: frozen; may be None if neither the cycle nor validation needs one.
        scorer: frozen; may be None if neither the cycle nor validation needs one.
        held_out: a second scorer that is not used for training; validation reports it beside the first.
        cycle: the cycle loss; None for the baseline without one.
        optimizer: called with the trained parameters, returns the optimizer.
        warmup_steps: number of steps until the full learning rate is reached.
        snr_gamma: gamma of the denoising loss's min-SNR weighting; None weights all timesteps equally.
        caption_dropout: share of captions that the denoising loss replaces by the empty one, for classifier-free
            guidance.
        ema_decay: decay of a moving average of the trained parameters, which validation, evaluation and export use;
            None for no average. It moves at every update, also at those of inner epochs.
        validation_images: number of validation prompts to generate images for; 0 for none.
        seed: seed of all randomness in training steps.
        reader: reads the facts of validation images, which the prompts' statements are compared with.

    """

    learner, thaw = "generator", "lora, for instance to {rank: 8}"
    unpaired = "prompts"

    def __init__(
        self,
        generator: Generator,
        captioner: Captioner | None = None,
        scorer: Scorer | None = None,
        held_out: Scorer | None = None,
        cycle: TextCycle | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: Natural = 0,
        snr_gamma: Positive | None = 5.0,
        caption_dropout: Share = 0.1,
        ema_decay: BelowOne | None = None,
        validation_images: Natural = 64,
        seed: Seed = 0,
        reader: SceneReader | None = None,
    ):
        super().__init__(optimizer, warmup_steps, seed)
        self.generator = generator
        self.captioner = captioner
        self.scorer = scorer
        self.held_out = held_out
        self.cycle = cycle
        self.partners = Partners(scorer=scorer, captioner=captioner)
        self.snr_gamma = snr_gamma
        self.caption_dropout = caption_dropout
        self.ema_decay = ema_decay
        self.validation_images = validation_images
        self.caption_metrics = CaptionMetrics()
        self.scorers = {s.label: s for s in (scorer, held_out) if s is not None}
        compared = {"image_similarity": {"images"}, "image_text_similarity": {"images", "texts"}}
        if captioner is not None:
            compared["text_similarity"] = {"texts"}
        names = [f"{k}/{label}" for k, of in compared.items() for label, s in self.scorers.items() if of <= {*s.reads}]
        names += [] if captioner is None else ["caption_nll"]
        self.means = nn.ModuleDict({name: MeanMetric() for name in names})
        self.means.update(self.reward_means())
        self.reader, self.fact_metrics = reader, FactMetrics()
        self.ema = None
        self._averaged: list[nn.Parameter] = []
        self._validated = 0

    @property
    def monitor(self) -> str | None:
        """CIDEr of the captioner's captions of the generated images; without a captioner, the image similarity."""
        if not self.validation_images:
            return None
        if self.captioner is not None:
            return "val/CIDEr"
        return next((f"val/{name}" for name in self.means if name.startswith("image_similarity/")), None)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.ema_decay is not None and self.ema is None:
            from diffusers.training_utils import EMAModel

            self._averaged = list(self.trained.values())  # finding them takes a millisecond a step
            self.ema = EMAModel(self._averaged, decay=self.ema_decay, use_ema_warmup=True, power=0.75)

    @override
    def on_fit_start(self) -> None:
        for name in ("captioner", "scorer", "held_out"):
            self.freeze_partner(name)
        self.place_reward()
        half_frozen(self.generator)
        if self.ema is not None:
            self.ema.to(self.device)

    @override
    def objective(self, batch: Batch, seeds: list[int]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        if batch.latents is not None:
            self.generator.remember(batch.images, batch.latents)
        kept = (torch.rand(len(batch)) >= self.caption_dropout).tolist()
        captions = [caption if keep else "" for caption, keep in zip(batch.captions, kept, strict=True)]
        losses = self.generator.loss(batch.images, captions, self.snr_gamma)
        loss = losses.mean()
        logs, terms = {"denoising": loss.detach()}, [losses]
        if self.cycle is not None:
            asked, mixture = batch, None
            if batch.prompts is not None:
                mixture = Mixture.of(len(batch), len(batch.prompts), self.cycle.num_images)
                asked, seeds = mixture.prompts(batch), mixture.seeds(seeds)
            cycle, details = self.cycle(self.generator, self.partners, asked, seeds)
            loss = loss + self.cycle.weight * cycle.mean()
            logs |= {"cycle": cycle.detach().mean(), **details, **(mixture.logs(cycle) if mixture else {})}
            terms.append(mixture.by_place(cycle) if mixture else cycle)
        return loss, logs, terms

    @override
    def updated(self) -> None:
        if self.ema is not None:
            self.ema.step(self._averaged)

    @override
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()
        if self.cycle is not None and (state := self.cycle.state_dict()):
            checkpoint["cycle"] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if self.ema is not None and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
        if self.cycle is not None and self.cycle.state_dict():
            if "cycle" not in checkpoint:
                raise UserError(
                    f"the checkpoint has no state of {type(self.cycle).__name__}: use the config.yaml of the run that "
                    "saved the checkpoint"
                )
            self.cycle.load_state_dict(checkpoint["cycle"])

    @override
    def on_validation_epoch_start(self) -> None:
        if self.ema is not None:
            self.ema.store(self._averaged)
            self.ema.copy_to(self._averaged)

    @override
    def restore_trained(self) -> None:
        if self.ema is not None and self.ema.temp_stored_params is not None:
            self.ema.restore(self._averaged)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # Draws the first prompts, captions the drawn images, and compares both with every scorer.
        room = self.validation_images - self._validated
        self._validated += len(batch)
        if room <= 0:
            return
        images, prompts, references = batch.images[:room], batch.captions[:room], batch.references[:room]
        seeds = [sample_seed(key) for key in batch.keys[:room]]
        drawn, values = self.generator.generate(prompts, seeds), {}
        lines = [[f"prompt: {prompt}"] for prompt in prompts]
        if self.captioner is not None:
            features, tokens = self.captioner.embed(drawn), self.captioner.tokenize(prompts)
            values["caption_nll"] = -self.captioner.log_prob(features, tokens) / self.captioner.mask(tokens).sum(1)
            captions = self.captioner.decode(self.captioner.generate(features, Decoding(), seeds)[:, 0])
            self.caption_metrics.update(captions, references)
            for shown, caption in zip(lines, captions, strict=True):
                shown.append(f"captioner: {caption}")
        for label, scorer in self.scorers.items():
            embedded = scorer.embed_images(drawn) if "images" in scorer.reads else None
            texts = scorer.embed_texts(prompts) if "texts" in scorer.reads else None
            if embedded is not None:
                similarities = (scorer.embed_images(images) * embedded).sum(-1)
                values[f"image_similarity/{label}"] = similarities
                for shown, similarity in zip(lines, similarities.tolist(), strict=True):
                    shown.append(f"{similarity:.2f} image similarity, {label}")
            if embedded is not None and texts is not None:
                values[f"image_text_similarity/{label}"] = (texts * embedded).sum(-1)
            if texts is not None and self.captioner is not None:
                values[f"text_similarity/{label}"] = (texts * scorer.embed_texts(captions)).sum(-1)
        values |= self.reward_of(prompts, drawn[:, None], seeds)
        if self.reader is not None:
            self.fact_metrics.update(prompts, self.reader.read(drawn))
        for name, value in values.items():
            self.means[name].update(value)
        for i in range(min(len(prompts), 16 - len(self.samples))):
            self.samples.append(Sample(images[i].cpu(), drawn[i].cpu(), lines[i]))

    @override
    def validation_results(self) -> dict[str, Tensor]:
        self.restore_trained()
        if not self.validation_images:
            return {}
        results = computed(self.means)
        facts = {"truth": "truth", "false_captions": "false_images"}
        results |= {facts[name]: value for name, value in self.fact_metrics.compute().items() if name in facts}
        self.fact_metrics.reset()
        if self.captioner is not None:
            scores = self.caption_metrics.compute()
            self.caption_metrics.reset()
            results |= {name: scores[name] for name in ("CIDEr", "BLEU-4")}
        self._validated = 0
        return results


def half_frozen(model: nn.Module) -> None:
    """Casts trained parameters to float32 and, except on the CPU, all others to bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif parameter.device.type != "cpu":
            parameter.data = parameter.data.bfloat16()
