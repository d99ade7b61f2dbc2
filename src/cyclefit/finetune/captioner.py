"""Finetuning a captioner with an image cycle."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from cyclefit.batch import Batch
from cyclefit.config.ranges import Count, Natural, Seed, checked
from cyclefit.cycles import ImageCycle, Reading
from cyclefit.finetune.base import Finetune, computed
from cyclefit.finetune.grid import Sample
from cyclefit.finetune.unpaired import Mixture
from cyclefit.judges import Partners
from cyclefit.metrics.aggregation import CaptionMetrics, FactMetrics
from cyclefit.models import Captioner, Decoding, Features, Generator, Scorer
from cyclefit.models.pretrained import Adapter
from cyclefit.rerank import sample_seed


@checked
class CaptionerFinetune(Finetune):
    """L = L_LM(x, y) + weight L_cycle: a captioner finetuned with an image cycle (Li et al., ICCV 2023).

    The cycle also uses the images without captions in `Batch.unpaired`, if there are any; see `Mixture`.

    Args:
        captioner: the model to finetune.
        generator: frozen; may be None if neither the cycle nor validation needs one.
        scorer: frozen; may be None if neither the cycle nor validation needs one.
        cycle: the cycle loss; None for the baseline without one.
        optimizer: called with the trained parameters, returns the optimizer.
        warmup_steps: number of steps until the full learning rate is reached.
        round_trip_images: number of validation images that are regenerated from their greedy captions, for the
            round-trip similarity and the sample grid; 0 for none.
        max_new_tokens: length limit of validation captions.
        seed: seed of all randomness in training steps.
        held_out: a second scorer that is not used for training; validation reports its similarity of images and
            captions, and that of the round trip beside the first scorer's.
        reward_images: number of validation images whose greedy captions the cycle's reward scores; 0 for none.

    """

    learner, thaw = "captioner", "trainable to the part to finetune"
    unpaired = "unpaired"

    def __init__(
        self,
        captioner: Captioner,
        generator: Generator | None = None,
        scorer: Scorer | None = None,
        cycle: ImageCycle | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: Natural = 0,
        round_trip_images: Natural = 16,
        max_new_tokens: Count = 30,
        seed: Seed = 0,
        held_out: Scorer | None = None,
        reward_images: Natural = 64,
    ):
        super().__init__(optimizer, warmup_steps, seed)
        self.captioner = captioner
        self.generator = generator
        self.scorer = scorer
        self.cycle = cycle
        self.partners = Partners(generator, scorer)
        self.round_trip_images = round_trip_images
        self.decoding = Decoding(max_new_tokens=max_new_tokens)
        self.caption_metrics, self.fact_metrics = CaptionMetrics(), FactMetrics()
        self.held_out = held_out
        self.scorers = {s.label: s for s in (scorer, held_out) if s is not None and "images" in s.reads}
        names = [f"image_similarity/{label}" for label in self.scorers if round_trip_images and generator is not None]
        if held_out is not None and {"images", "texts"} <= {*held_out.reads}:
            names.append(f"image_text_similarity/{held_out.label}")
        self.means = nn.ModuleDict({name: MeanMetric() for name in names})
        self.reward_images = reward_images
        if reward_images:
            self.means.update(self.reward_means())
        self._rewarded = 0

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.captioner.check(self.decoding)

    @override
    def on_fit_start(self) -> None:
        for name in ("generator", "scorer", "held_out"):
            self.freeze_partner(name)
        self.place_reward()
        for module in (self.captioner, *(self.cycle.children() if self.cycle is not None else ())):
            if isinstance(module, Adapter):
                module.half_on_gpu()
        trains = {name.rpartition(".")[0] for name, p in self.captioner.named_parameters() if p.requires_grad}
        modes = dict(self.captioner.named_modules())
        if idle := [name for name in trains if not modes[name].training]:
            raise RuntimeError(f"captioner.{idle[0]} is to be trained but in eval mode")

    @override
    def objective(self, batch: Batch, seeds: list[int]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        # One pass of the captioner over the reference captions serves the language loss and the cycle.
        if batch.latents is not None:
            self.generator.remember(batch.images, batch.latents)
        features = self.captioner.embed(batch.images)
        tokens = self.captioner.tokenize(batch.captions)
        logits = None
        if self.cycle is not None and self.cycle.reads_logits:
            logits = self.captioner.logits(features, tokens)
        if logits is None:
            losses = self.captioner.loss(features, tokens)
        else:
            losses = self.captioner.loss_of(logits, tokens)
        # The mean over all ranks' tokens, whichever rank has the long captions.
        length = self.captioner.mask(tokens).sum(1).mean()
        losses = losses * (length / self.over_ranks(length))
        loss = losses.mean()
        logs, terms = {"lm": loss.detach()}, [losses]
        if self.cycle is not None:
            reading, mixture = Reading(batch.images, features, tokens, logits, batch.rejected_captions), None
            if batch.unpaired is not None:
                mixture = Mixture.of(len(batch), len(batch.unpaired), self.cycle.num_images)
                reading, seeds = self.mixed_reading(batch, features, mixture), mixture.seeds(seeds)
            cycle, details = self.cycle(self.captioner, self.partners, reading, seeds)
            loss = loss + self.cycle.weight * cycle.mean()
            logs |= {"cycle": cycle.detach().mean(), **details, **(mixture.logs(cycle) if mixture else {})}
            terms.append(mixture.by_place(cycle) if mixture else cycle)
        return loss, logs, terms

    def mixed_reading(self, batch: Batch, features: Features, mixture: Mixture) -> Reading:
        """The reading of the images of a mixture, given the features of the paired ones."""
        alone, rows = batch.unpaired[: mixture.used], torch.tensor(mixture.rows, device=batch.images.device)
        images = torch.cat([batch.images, alone.images])[rows]
        if batch.latents is not None:
            self.generator.remember(images, torch.cat([batch.latents, alone.latents])[rows])
        return Reading(images, Features.cat([features, self.captioner.embed(alone.images)])[rows], None)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # Greedy captions against all references; the first images are regenerated from their captions.
        seeds = [sample_seed(key) for key in batch.keys]
        captions = [row[0] for row in self.captioner.sample(batch.images, self.decoding, seeds)]
        self.caption_metrics.update(captions, batch.references)
        self.fact_metrics.update(captions, batch.facts)
        self._judge(batch, captions, seeds)
        room = self.round_trip_images - len(self.samples)
        if room <= 0 or self.generator is None or not self.scorers:
            return
        images = batch.images[:room]
        drawn = self.generator.generate(captions[:room], seeds[:room])
        texts = [[f"caption: {captions[i]}", f"reference: {batch.captions[i]}"] for i in range(len(images))]
        for label, scorer in self.scorers.items():
            similarities = (scorer.embed_images(images) * scorer.embed_images(drawn)).sum(-1)
            self.means[f"image_similarity/{label}"].update(similarities)
            for lines, similarity in zip(texts, similarities.tolist(), strict=True):
                lines.append(f"{similarity:.2f} image similarity, {label}")
        for i, lines in enumerate(texts):
            self.samples.append(Sample(images[i].cpu(), drawn[i].cpu(), lines))

    def _judge(self, batch: Batch, captions: list[str], seeds: list[int]) -> None:
        """The held-out scorer's similarity of images and captions, and what the cycle's reward makes of the first."""
        held = self.held_out
        if held is not None and (name := f"image_text_similarity/{held.label}") in self.means:
            self.means[name].update((held.embed_images(batch.images) * held.embed_texts(captions)).sum(-1))
        room = self.reward_images - self._rewarded
        self._rewarded += len(batch)
        if room > 0:
            found = self.reward_of(batch.images[:room], [[caption] for caption in captions[:room]], seeds[:room])
            for name, values in found.items():
                self.means[name].update(values)

    @override
    def validation_results(self) -> dict[str, Tensor]:
        scores = self.caption_metrics.compute()
        self.caption_metrics.reset()
        results = {name: scores[name] for name in ("CIDEr", "CIDEr-D", "BLEU-4", "ROUGE-L", "words")}
        results |= self.fact_metrics.compute()
        self.fact_metrics.reset()
        self._rewarded = 0
        return results | computed(self.means)
