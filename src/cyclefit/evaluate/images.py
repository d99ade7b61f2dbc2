"""Evaluation of generators: every model draws the same prompts."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.ranges import Count
from cyclefit.digests import digest
from cyclefit.evaluate.analyses import Chosen, checks, estimate
from cyclefit.evaluate.base import Evaluate, Inputs
from cyclefit.evaluate.common import save_image
from cyclefit.files import safe_name
from cyclefit.judges import ImageText, Judge, Partners, TextCycle
from cyclefit.metrics.captions import References
from cyclefit.metrics.facts import check, summarize
from cyclefit.metrics.images import cmmd, features, inception, inception_distances
from cyclefit.metrics.reader import SceneReader
from cyclefit.models import Captioner, Generator, Scorer
from cyclefit.models.pretrained import freeze
from cyclefit.records import FALSE, IMAGE_TEXT, SINGLE, TEXT_CYCLE, TRUTH, Candidate, Estimate, Split
from cyclefit.rerank import Drawing, rerank, sample_seed

NLL = "captioner NLL"
PER_SCORER = ("image similarity", "image-text similarity", "text similarity", "R@1", "R@5")
"""Metrics of an image under each scorer."""


class Images(Evaluate):
    """Evaluates generators: one image per prompt, the best of N by every judge, and the oracle.

    A prompt is the first reference caption of an image, which its drawings are compared with. Writes `metrics.json`,
    `candidates-SPLIT.jsonl`, every image, `table-SPLIT.csv`, figures and `report.html` into `out`. Interrupted, it goes
    on where it stopped.

    Args:
        generator: the base model, before finetuning; its steps and guidance are used for all models.
        captioner: frozen, before finetuning: captions the images for the text cycle.
        scorer: CLIP, which judges candidates.
        held_out: a second scorer, on which nothing is trained and which chooses nothing.
        further_scorers: scorers that only measure, such as DINOv2, which embeds images alone, or CMMD's own CLIP.
        reader: reads the facts of drawn images, which the prompts' statements are held against.
        out: the folder of the evaluation.
        judges: rerankers by name; the text cycle and image-text if not given.
        max_new_tokens: length limit of captions.

    """

    kind, cycle = "images", TEXT_CYCLE
    decodings = ("",)
    singles = (SINGLE,)
    shares = (TRUTH,)
    half = True
    inputs_of = attrgetter("captions")

    def __init__(
        self,
        generator: Generator,
        captioner: Captioner,
        scorer: Scorer,
        held_out: Scorer | None = None,
        further_scorers: list[Scorer] | None = None,
        reader: SceneReader | None = None,
        out: str = "runs/image_evaluation",
        judges: dict[str, Judge] | None = None,
        max_new_tokens: Count = 30,
        **common,
    ):
        super().__init__(out=out, **common)
        self.scorers = {one.label: one for one in (scorer, held_out) if one is not None}
        if held_out is not None and len(self.scorers) == 1:
            raise UserError(f"the held-out scorer is {scorer.name}, as the scorer is: give another one, or none")
        for name, one in (("scorer", scorer), ("held_out", held_out)):
            if one is not None and "texts" not in one.reads:
                raise UserError(f"{name}: {one.name} embeds no texts: give a CLIP, and this one in further_scorers")
        *_, held = self.scorers
        self.further_scorers = {}
        for one in further_scorers or []:
            if "images" not in one.reads or one.label in self.scorers | self.further_scorers:
                why = "is given twice" if "images" in one.reads else "embeds no images"
                raise UserError(f"further_scorers: {one.name} {why}: leave it out")
            self.further_scorers[one.label] = one
        self.scorers |= self.further_scorers
        self.base, self.partners = generator, Partners(scorer=scorer, captioner=captioner)
        self.judges = judges or {TEXT_CYCLE: TextCycle(max_new_tokens), IMAGE_TEXT: ImageText()}
        self.held_out, self.reader, self.max_new_tokens = held_out, reader, max_new_tokens
        self.about = {"held_out": held_out.name if held_out is not None else None}
        self.about["further_scorers"] = ", ".join(one.name for one in self.further_scorers.values()) or None
        self.oracle, self.quality = f"image similarity ({scorer.label})", f"image similarity ({held})"
        labels = dict.fromkeys([held, scorer.label, *self.scorers])
        similarities = [f"image similarity ({label})" for label in labels]
        self.compared = [*similarities, "CIDEr", f"image-text similarity ({held})"]
        self.columns = [
            ("truth %", TRUTH, 1),
            ("false images %", FALSE[self.kind], 1),
            ("CIDEr [95 %]", "CIDEr", 1),
            (f"image sim. ({held})", self.quality, 3),
            (f"image-text sim. ({held})", f"image-text similarity ({held})", 3),
            ("caption NLL", NLL, 2),
            (f"R@1 ({held})", f"R@1 ({held})", 0),
        ]

    @override
    def depends(self, name, model):
        models = {"captioner": self.partners.captioner, "scorer": self.partners.scorer}
        models |= {"held_out": self.held_out, "reader": self.reader, "generator": model}
        models |= self.further_scorers
        return {
            "max_new_tokens": self.max_new_tokens,
            "limit": self.limit,  # what is retrieved is chosen among all prompts
            **self.sampling,
            **{what: of and digest(of) for what, of in models.items()},
            "candidates": self.count(name),
            "judges": {judge: digest(of) for judge, of in self.judges_of(name).items()},
        }

    def count(self, name: str) -> int:
        """How many images of each prompt a model draws."""
        return self.num_candidates if self.reranked(name) else 1

    @override
    def batch_size_of(self, name):
        # As many images together whatever their number per prompt, for the seconds to compare.
        return max(1, self.batch_size * self.num_candidates // self.count(name))

    @override
    def prepare(self, inputs):
        if self.reader is not None:
            freeze(self.reader.to(self.fabric.device))
        # What retrieval chooses among: the prompts without repetition.
        self.place = {prompt: i for i, prompt in enumerate(dict.fromkeys(of[0] for of in inputs.references.values()))}
        with torch.no_grad():
            self.texts = {
                label: one.embed_texts(list(self.place)).cpu()
                for label, one in self.scorers.items() if "texts" in one.reads
            }  # fmt: skip

    @override
    def sample(self, inputs, name, model, batch, others):
        count, split = self.count(name), inputs.split
        seeds = [[sample_seed(f"{key}/{k}", self.seed) for k in range(count)] for key in batch.keys]
        drawing = Drawing(**self.sampling)
        made = rerank(model, self.partners, self.judges_of(name), batch.captions, drawing, seeds, others)
        # The text cycle has asked for the same captions.
        captions = self.partners.captions_of(made.candidates, self.max_new_tokens)
        images = made.candidates.flatten(0, 1)
        prompts = [prompt for prompt in batch.captions for _ in range(count)]
        metrics = self._measured(images, prompts, captions, batch.keys, inputs)
        facts = self.reader.read(images) if self.reader is not None else None
        seconds = {what: round(value / len(images), 6) for what, value in made.seconds.items()}
        candidates = []
        for j, image in enumerate(images):
            i, k = divmod(j, count)
            one = Candidate(
                batch.keys[i],
                name,
                k,
                captions[j],
                count,
                {judge: round(float(values[i, k]), 6) for judge, values in made.scores.items()},
                {metric: round(float(values[j]), 6) for metric, values in metrics.items()},
                seconds,
                prompt=prompts[j],
                seed=seeds[i][k],
                image=f"images/{split}/{name}/{safe_name(batch.keys[i])}-{k}.png",
            )
            if facts is not None:
                found = check(one.prompt, facts[j])
                one.facts = found.record()
                one.metrics[FALSE[self.kind]] = 100.0 * found.false
            save_image(image, self.folder / one.image)
            candidates.append(one)
        return candidates

    @torch.no_grad()
    def _measured(self, images: Tensor, prompts: list[str], captions: list[str], keys: list[str], inputs: Inputs):
        """What is measured of each image alone, by name."""
        captioner, order = self.partners.captioner, {key: i for i, key in enumerate(inputs.references)}
        tokens = captioner.tokenize(prompts)
        likelihood = captioner.log_prob(captioner.embed(images), tokens) / captioner.mask(tokens).sum(1)
        places = [order[key] for key in keys for _ in range(len(images) // len(keys))]
        own = torch.tensor([self.place[prompt] for prompt in prompts])
        values = {NLL: -likelihood.cpu()}
        for label, scorer in self.scorers.items():
            embedded = scorer.embed_images(images).cpu()
            values[f"image similarity ({label})"] = (embedded * inputs.images[label][places]).sum(-1)
            if label not in self.texts:
                continue
            said = scorer.embed_texts(captions).cpu()
            similarities = embedded @ self.texts[label].T
            matched = similarities.gather(1, own[:, None])
            rank = (similarities > matched).sum(1)
            values[f"image-text similarity ({label})"] = matched[:, 0]
            values[f"text similarity ({label})"] = (said * self.texts[label][own]).sum(-1)
            values |= {f"R@{k} ({label})": 100 * (rank < k).float() for k in (1, 5)}
        return values

    @override
    def measure(self, candidates, inputs):
        place = {key: i for i, key in enumerate(inputs.references)}
        texts, places = [one.caption for one in candidates], [place[one.key] for one in candidates]
        ciders = References(list(inputs.references.values())).measure(texts, places).each["CIDEr"]
        # Not the further metrics of an earlier evaluation.
        own = {NLL, FALSE[self.kind], *(f"{name} ({label})" for name in PER_SCORER for label in self.scorers)}
        for one, cider in zip(candidates, ciders, strict=True):
            kept = {name: value for name, value in one.metrics.items() if name in own}
            one.metrics = {"CIDEr": round(float(cider), 6)} | kept

    @override
    def summary(self, picked, samples, selection, inputs):
        shares = summarize(checks(picked)) if picked[0].facts else {}
        found = {TRUTH: Estimate(**shares[TRUTH])} if TRUTH in shares else {}
        return found | {name: estimate([one.metrics[name] for one in picked]) for name in picked[0].metrics}

    @override
    def cost(self, samples, decoding, selection):
        judges, count = self.judged_by(selection), 1 if selection == SINGLE else len(samples[0])
        seconds = sum(float(np.mean([sample[0].seconds[what] for sample in samples])) for what in ("drawing", *judges))
        costs = [self.judges[judge].cost(self.partners, count) for judge in judges]
        generated, denoised = (sum(cost[of] for cost in costs) for of in ("generator_calls", "denoiser_calls"))
        calls = count * self.base.calls_per_image(**self.sampling)
        return count + generated, calls + denoised, count * seconds

    @override
    def gained(self, single):
        return [name for name in single.metrics if name != NLL]

    @override
    def analysed(self, rankings, facts):
        return [(of, metric) for metric in (self.quality, "CIDEr") for of in rankings]

    @override
    def finish(self, files, inputs, results, chosen):
        device = self.fabric.device
        for label, scorer in self.scorers.items():
            self._add_distances(
                results, chosen, lambda pixels, scorer=scorer: scorer.embed_images(pixels.to(device) / 255),
                lambda real, drawn, label=label: {f"CMMD ({label})": cmmd(real, drawn)},
            )  # fmt: skip
        fewest = min(result.num_images for result in results.values())
        note = f"over {fewest} images or more, torchmetrics" + (", biased upwards on so few" if fewest < 2048 else "")
        if fewest < 2:
            note = "not computed, because they need two images: raise limit"
        else:
            try:
                network = inception().to(device)
            except UserError as error:
                note = f"not computed, because {error}"
            else:
                self._add_distances(results, chosen, lambda pixels: network(pixels.to(device)), inception_distances)
        print(f"FID and KID: {note}")
        return {"FID": note}

    def _add_distances(
        self,
        results: dict[str, Split],
        chosen: dict[str, Chosen],
        embed: Callable[[Tensor], Tensor],
        distances: Callable[[Tensor, Tensor], dict[str, float]],
    ) -> None:
        """Adds distances between all reference images and those of each row to the rows; they have no interval."""
        for split, result in results.items():
            picked = [chosen[split][row.name] for row in result.rows]
            sources = [f"images/{split}/source/{safe_name(one.key)}.png" for one in picked[0]]
            names = list(dict.fromkeys([*sources, *(one.image for kept in picked for one in kept)]))
            extracted = features(embed, [Path(self.folder, name) for name in names])
            place = {name: i for i, name in enumerate(names)}
            real = extracted[[place[name] for name in sources]]
            for row, kept in zip(result.rows, picked, strict=True):
                found = distances(real, extracted[[place[one.image] for one in kept]])
                row.metrics |= {name: Estimate(value) for name, value in found.items()}
