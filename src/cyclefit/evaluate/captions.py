"""Evaluation of captioners under greedy, beam and nucleus decoding."""

import itertools
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Annotated

import numpy as np
import torch
from typing_extensions import override

from cyclefit import records
from cyclefit.config.ranges import Count, Natural, Range
from cyclefit.digests import digest
from cyclefit.evaluate.analyses import Chosen, checks, estimate
from cyclefit.evaluate.base import Evaluate, Inputs
from cyclefit.evaluate.common import CandidateFile, save_image
from cyclefit.files import safe_name
from cyclefit.judges import Denoising, ImageText, Judge, Partners, Regeneration
from cyclefit.metrics.captions import References, caption_metrics, self_bleu
from cyclefit.metrics.clip import clip_scores, retrieval
from cyclefit.metrics.facts import check, summarize
from cyclefit.metrics.java import Java, Unavailable
from cyclefit.metrics.tokenizer import tokenize
from cyclefit.models import Captioner, Decoding, Generator, Scorer
from cyclefit.report.gallery import gallery_keys
from cyclefit.rerank import label, rerank, sample, sample_seed

JUDGES = {
    records.IMAGE_CYCLE: Regeneration(),
    records.DENOISING: Denoising(),
    records.LOG_DENOISING: Denoising(log=True),
    records.IMAGE_TEXT: ImageText(),
}
GAINS = ("CIDEr", "CIDEr-D", "BLEU-4", "ROUGE-L", "CLIPScore", "RefCLIPScore")
"""What the analyses look at; BLEU-4 is each sentence's."""
SHOWN_SIDE = 256
"""Longest side in pixels of the images kept for the report."""


class Captions(Evaluate):
    """Evaluates captioners under greedy, beam and nucleus decoding, reranked by every judge, and the oracle.

    Writes `metrics.json`, `candidates-SPLIT.jsonl`, `table-SPLIT.csv`, figures and `report.html` into `out`.
    Interrupted, it goes on where it stopped.

    Args:
        captioner: the base model, before finetuning.
        generator: draws the images of the round trip and judges by denoising error.
        scorer: CLIP for image-image and image-text similarity.
        out: the folder of the evaluation.
        judges: rerankers by name; all four if not given.
        nucleus_p: probability mass of the nucleus.
        min_new_tokens: least length of captions, in tokens.
        max_new_tokens: their greatest length.
        gallery: images of each split shown in the report.
        java: METEOR and SPICE too, where Java and its jars are there.

    """

    kind, cycle = "captions", records.IMAGE_CYCLE
    decodings = (records.GREEDY, records.BEAM, records.NUCLEUS)
    singles = (records.NUCLEUS, records.GREEDY)
    shares = (records.TRUTH, records.COVERAGE)
    half, source_side = False, SHOWN_SIDE
    inputs_of = attrgetter("images")
    quality = oracle = "CIDEr"
    compared = ("CIDEr",)
    columns = (
        ("truth %", records.TRUTH, 1),
        ("coverage %", records.COVERAGE, 1),
        ("false captions %", records.FALSE["captions"], 1),
        ("CIDEr [95 %]", "CIDEr", 1),
        ("BLEU-4", "BLEU-4", 1),
        ("ROUGE-L", "ROUGE-L", 1),
        ("words", "words", 1),
        ("image sim.", "image similarity", 3),
    )

    def __init__(
        self,
        captioner: Captioner,
        generator: Generator,
        scorer: Scorer,
        out: str = "runs/evaluation",
        judges: dict[str, Judge] | None = None,
        nucleus_p: Annotated[float, Range(0, 1, above=True)] = 0.9,
        min_new_tokens: Natural = 0,
        max_new_tokens: Count = 30,
        gallery: Natural = 24,
        java: bool = True,
        **common,
    ):
        super().__init__(out=out, **common)
        self.base, self.partners, self.scorers = captioner, Partners(generator, scorer), {scorer.label: scorer}
        self.judges, self.gallery, self.java = judges or JUDGES, gallery, java
        self.about = {"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
        self.single = [Decoding(**self.about), Decoding(records.BEAM, **self.about)]
        self.nucleus = Decoding(records.NUCLEUS, self.num_candidates, top_p=nucleus_p, **self.about)

    def plan(self, name: str) -> list[Decoding]:
        """A model's decodings; sampling N captions is the expensive part."""
        return [*self.single, self.nucleus if self.reranked(name) else replace(self.nucleus, num_samples=1)]

    @override
    def depends(self, name, model):
        return {
            "generator": digest(self.partners.generator),
            "scorer": digest(self.partners.scorer),
            "captioner": digest(model),
            "decodings": list(map(asdict, self.plan(name))),
            "judges": {judge: digest(of) for judge, of in self.judges_of(name).items()},
            "images to contrast with": min(self.limit or sys.maxsize, 4 * self.num_others(name)),
        }

    @override
    def prepare(self, inputs):
        if self.fabric.is_global_zero:
            records.write_json(self.folder / f"facts-{inputs.split}.json", inputs.facts)

    @override
    def sample(self, inputs, name, model, batch, others):
        decodings, judges, device = self.plan(name), self.judges_of(name), self.fabric.device
        *_, nucleus = decodings
        names = [decoding.method for decoding in decodings for _ in range(decoding.num_samples)]
        images, seeds = batch.images.to(device), [sample_seed(key, self.seed) for key in batch.keys]
        others = others.to(device) if others is not None else None
        made = rerank(model, self.partners, judges, images, decodings, seeds, others)
        seconds = {what: value / len(batch) for what, value in made.seconds.items()}
        if nucleus.num_samples > 1:
            # What one sample costs; and of judging, which is in proportion to different captions, the candidates'.
            seconds[records.NUCLEUS] = sample(model, images, replace(nucleus, num_samples=1), seeds)[1] / len(batch)
            different, candidates = (
                sum(len(set(row[k:])) for row in made.candidates) for k in (0, len(names) - nucleus.num_samples)
            )
            seconds |= {name: seconds[name] * candidates / different for name, of in judges.items() if not of.races}
        seconds = {what: round(value, 6) for what, value in seconds.items()}
        return [
            records.Candidate(
                key,
                name,
                k - names.index(names[k]),
                made.candidates[i][k],
                len(names),
                {
                    judge: round(float(scores[i, k]), 6)
                    for judge, scores in made.scores.items()
                    if judge not in made.rounds or made.rounds[judge][i, k]
                },
                rounds={judge: int(rounds[i, k]) for judge, rounds in made.rounds.items() if rounds[i, k]} or None,
                seconds=seconds,
                decoding=names[k],
                noise_seed=seeds[i] + 1,
            )
            for i, key in enumerate(batch.keys)
            for k in range(len(names))
        ]

    @override
    @torch.no_grad()
    def measure(self, candidates, inputs):
        references, scorer, device = inputs.references, self.partners.scorer, self.fabric.device
        place = {key: i for i, key in enumerate(references)}
        pairs = list(dict.fromkeys((one.caption, one.key) for one in candidates))
        texts, places = [text for text, _ in pairs], [place[key] for _, key in pairs]
        values = References(list(references.values())).measure(texts, places).each
        images, at = inputs.images[scorer.label].to(device), torch.tensor(places, device=device)
        values |= clip_scores(scorer.embed_texts, images[at], texts, [references[key] for _, key in pairs])
        values |= retrieval(scorer.embed_texts(texts), images, at)
        rounded = {name: [round(float(value), 6) for value in column] for name, column in values.items()}
        measured = {pair: {name: column[i] for name, column in rounded.items()} for i, pair in enumerate(pairs)}
        # What a caption states is held against the facts where every image of the split has some.
        facts = inputs.facts if all(inputs.facts.values()) else {}
        checked = {(text, key): check(text, facts[key]) for text, key in pairs if facts}
        for one in candidates:
            pair = one.caption, one.key
            one.metrics = measured[pair] | {"words": len(one.caption.split())}
            one.facts = None
            if facts:
                one.facts = checked[pair].record()
                one.metrics[records.FALSE[self.kind]] = 100.0 * checked[pair].false

    @override
    def summary(self, picked, samples, selection, inputs):
        values = caption_metrics([one.caption for one in picked], list(inputs.references.values()))
        found = (
            {name: records.Estimate(**of) for name, of in summarize(checks(picked)).items()} if picked[0].facts else {}
        )
        corpus = ("CIDEr", "CIDEr-D", *[f"BLEU-{n}" for n in (1, 2, 3, 4)], "ROUGE-L", "distinct-1", "distinct-2")
        found |= {name: records.Estimate(values[name]) for name in corpus}
        each = ("CIDEr", "CIDEr-D", "words", "ROUGE-L", "CLIPScore", "RefCLIPScore", "R@1", "R@5", "R@10")
        found |= {name: estimate([one.metrics[name] for one in picked]) for name in each}
        for judge, name in ((records.IMAGE_CYCLE, "image similarity"), (records.IMAGE_TEXT, "image-text similarity")):
            if judge in picked[0].scores and not self.judges[judge].races:
                found[name] = estimate([one.scores[judge] for one in picked])
        if selection == records.SINGLE and len(samples[0]) > 1:
            texts = [[one.caption for one in sample] for sample in samples]
            found["self-BLEU"] = records.Estimate(float(self_bleu(texts).mean()))
        return found

    @override
    def cost(self, samples, decoding, selection):
        def seconds(what: str) -> float:
            return float(np.mean([sample[0].seconds[what] for sample in samples]))

        if selection == records.SINGLE:
            return 0, 0, seconds(decoding)
        sampling, judges = seconds(label(self.nucleus)), self.judged_by(selection)
        if selection == records.ORACLE:
            return 0, 0, sampling
        different = Counter(len({one.caption for one in sample}) for sample in samples)
        calls = Counter()
        for judge, (count, times) in itertools.product(judges, different.items()):
            calls.update({name: of * times for name, of in self.judges[judge].cost(self.partners, count).items()})
        spent = [round(calls[name] / len(samples), 1) for name in ("generator_calls", "denoiser_calls")]
        return *spent, sampling + sum(map(seconds, judges))

    @override
    def gained(self, single):
        return [*[records.FALSE[self.kind]] * (single.facts is not None), *GAINS]

    @override
    def analysed(self, rankings, facts):
        # The first judge by every metric, every judge by CIDEr.
        first = next(iter(self.judges))
        told = [(of, metric) for of in rankings for metric in GAINS if of[1] == first or metric == "CIDEr"]
        return told + [(of, records.FALSE[self.kind]) for of in rankings if facts]

    @override
    def finish(self, files, inputs, results, chosen):
        # SPICE of many captions takes minutes in Java, and drawing needs none of it.
        with ThreadPoolExecutor(1) as pool:
            notes = pool.submit(_add_java_metrics, inputs, results, chosen) if self.java else None
            for split, file in files.items():
                self._draw_gallery(file, results[split])
        return notes.result() if notes else {}

    def _draw_gallery(self, file: CandidateFile, result: records.Split) -> None:
        """Regenerates the images of the samples the report shows.

        They are the images the scores were computed on: same caption, same noise.
        """
        shown = set(gallery_keys(file.candidates, result.failures, records.IMAGE_CYCLE, self.gallery))
        for one in file.candidates:
            one.image = None
        wanted = [one for one in file.candidates if one.key in shown and one.decoding != records.BEAM]
        distinct = {(one.caption, one.noise_seed): one.key for one in wanted}
        if not distinct:
            return
        drawn = self.partners.generator.generate([text for text, _ in distinct], [seed for _, seed in distinct])
        names = {}
        for number, ((pair, key), image) in enumerate(zip(distinct.items(), drawn, strict=True)):
            names[pair] = f"images/{file.split}/regenerated/{safe_name(key)}-{number:05d}.png"
            save_image(image, self.folder / names[pair], SHOWN_SIDE)
        for one in wanted:
            one.image = names[one.caption, one.noise_seed]


def _add_java_metrics(
    inputs: dict[str, Inputs], results: dict[str, records.Split], chosen: dict[str, Chosen]
) -> dict[str, str]:
    """Adds METEOR and SPICE to the rows of all splits' tables; returns why one could not be."""
    engine, missing = Java(), {}
    rows = [(row, split, chosen[split][row.name]) for split, result in results.items() for row in result.rows]
    place = dict.fromkeys((split, one.key, one.caption) for _, split, kept in rows for one in kept)
    place = {caption: i for i, caption in enumerate(place)}
    corpora = [[place[split, one.key, one.caption] for one in kept] for _, split, kept in rows]
    texts = [tokenize(caption) for _, _, caption in place]
    tokenized = {
        (split, key): [tokenize(caption) for caption in captions]
        for split, of in inputs.items() for key, captions in of.references.items()
    }  # fmt: skip
    against = [tokenized[split, key] for split, key, _ in place]
    try:
        values, _ = engine.meteor(texts, against, corpora)
        for (row, _, _), value in zip(rows, values, strict=True):
            row.metrics["METEOR"] = records.Estimate(value)
    except Unavailable as error:
        missing["METEOR"] = f"not computed: {error}"
    try:
        _, each = engine.spice(texts, against)
        for (row, _, _), places in zip(rows, corpora, strict=True):
            row.metrics["SPICE"] = estimate(each[places])
    except Unavailable as error:
        missing["SPICE"] = f"not computed: {error}"
    return missing
