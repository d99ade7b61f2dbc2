"""The page of the report: one file, no request, every text from the evaluation escaped."""

import base64
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from cyclefit.files import safe_name, within
from cyclefit.report.figures import (
    comparison,
    count_curves,
    is_percentage,
    metric_names,
    rank_curves,
    render,
    score_bins,
    score_boxes,
    sorted_rows,
)
from cyclefit.report.tables import (
    LOWER_IS_BETTER,
    NONE,
    cell,
    correlations_table,
    count,
    differences_table,
    dot,
    facts_table,
    gains_table,
    limits,
    main_table,
    number,
    parts_table,
    plural,
    reading,
    row_name,
    short,
    table,
    trends_table,
)


@dataclass(frozen=True)
class Kind:
    """The words in which the page of one kind of evaluation differs from another's."""

    name: str
    """What is compared."""
    item: str
    """What is evaluated, one candidate kept of each."""
    kept: str
    """What is kept."""
    judge: str
    """The paper's."""
    calls: str
    """Header of the generator's calls."""
    selections: dict[str, str]
    metrics: dict[str, str]
    gallery: str
    """How to read it."""
    glance: tuple[str, ...]
    """Metrics of the first table."""
    scores: dict[str, str]
    """Scores that every candidate in the gallery shows, beside the one chosen there, and their short names."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation's folder holds."""

    folder: Path
    results: dict
    candidates: dict[str, list[dict]]
    """By split."""
    references: dict[str, dict]
    """By split."""

    @property
    def kind(self) -> Kind:
        """Its words."""
        return KINDS[self.results["kind"]]


CAPTIONS = Kind(
    name="Captioners",
    item="image",
    kept="caption",
    judge="image cycle",
    calls="generator calls",
    selections={
        "single": "the first caption the decoding gives; nothing is chosen.",
        "image cycle": "an image is regenerated from every candidate; the caption whose image is most similar to "
        "the source is kept (the paper's reranking).",
        "denoising": "the caption under which the generator denoises the source image best is kept; no image is made.",
        "log denoising": "as denoising, by the logarithm of the errors: what a detail explains counts by its share of "
        "the error that is left.",
        "contrastive": "as denoising, minus the error on other images: the caption that tells the generator most "
        "about this image and least about others is kept.",
        "image-text": "the control without a generator: the caption most similar to the image under the scorer is "
        "kept.",
        "image cycle + image-text": "the caption whose sum of both similarities is greatest is kept.",
        "oracle": "the candidate with the best metric against the references; no method can pass this bound.",
    },
    metrics={
        "truth": "of the facts that captions state the share that is right, over all captions together.",
        "coverage": "of the facts of the images the share that is stated rightly, over all images together.",
        "false captions": "share of captions with at least one false fact; lower is better.",
        "CIDEr": "agreement with the references in words that are rare elsewhere.",
        "CIDEr-D": "CIDEr with clipped counts and a penalty on length, as coco-caption computes it.",
        "BLEU-4": "precision of word groups of up to four words.",
        "ROUGE-L": "longest common subsequence with a reference.",
        "CLIPScore": "2.5 times the cosine similarity of image and caption, at least 0 (Hessel et al., 2021).",
        "RefCLIPScore": "harmonic mean of CLIPScore and the caption's similarity to the closest reference.",
        "METEOR": "agreement with a reference in words, stems and synonyms.",
        "SPICE": "agreement of the scene graphs of caption and references.",
        "R@1": "share of captions to which their own image is the most similar of all of the split under the scorer.",
        "R@5": "share of captions whose own image is among the five most similar.",
        "R@10": "share of captions whose own image is among the ten most similar.",
        "distinct-1": "different words over all words of all captions.",
        "distinct-2": "different pairs of words over all of them.",
        "self-BLEU": "BLEU-4 of an image's sampled captions against each other; lower is more diverse.",
        "words": "mean length of a caption; neither more nor fewer is better.",
        "image similarity": "cosine similarity of the source image and the one regenerated from the caption.",
    },
    gallery="left the source and its references; right each model's captions, the greedy one first, then the "
    "candidates from the best score to the worst, each with the image regenerated from it. What is false of the source "
    "is struck through.",
    glance=("false captions", "truth", "coverage"),
    scores={},
)
IMAGES = Kind(
    name="Generators",
    item="prompt",
    kept="image",
    judge="text cycle",
    calls="images drawn",
    selections={
        "single": "the first image drawn; nothing is chosen.",
        "text cycle": "every candidate is captioned; the image whose caption is most similar to the prompt under the "
        "scorer is kept (the paper's reranking).",
        "image-text": "the control without a captioner: the image most similar to the prompt under the scorer is kept.",
        "text cycle + image-text": "the image whose sum of both similarities is greatest is kept.",
        "oracle": "the candidate most similar to the reference image under the scorer; the bound of its image "
        "similarity.",
    },
    metrics={
        "truth": "of the facts that prompts state the share that the images show, over all prompts together, as the "
        "reader of images sees it.",
        "false images": "share of images that do not show at least one fact of the prompt; lower is better.",
        "CIDEr": "agreement of the image's caption with all references of the prompt.",
        "captioner NLL": "negative log-likelihood of the prompt given the image under the captioner, in nats per "
        "token; lower is better.",
        "image similarity": "cosine similarity of the image and the reference image, under the scorer named.",
        "image-text similarity": "cosine similarity of the image and the prompt.",
        "text similarity": "cosine similarity of the prompt and the image's caption: the round trip.",
        "R@1": "share of images whose own prompt is the most similar of all prompts of the split.",
        "R@5": "share of images whose own prompt is among the five most similar.",
        "FID": "distance of the Inception features of all images from those of the references; lower is better.",
        "KID": "the same by a kernel, unbiased on few images; lower is better.",
    },
    gallery="left the reference image, the prompt in bold and the other references; right each model's images from "
    "the best score to the worst, each with what the captioner says of it, and what of the prompt it does not show.",
    glance=("false images", "truth"),
    scores={"text cycle": "text cycle", "image-text": "image-text"},
)
FAILURES = {"overrated": "failures: high score, low metric", "underrated": "failures: low score, high metric"}
TABLE_ONLY = {"CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "R@5", "R@10", "distinct-1", "distinct-2", "self-BLEU"}
"""Metrics whose figure would say what that of a sibling says."""
PINNED = ("greedy", "beam")
"""Decodings of one caption, which stand before the sampled ones."""
KINDS = {"captions": CAPTIONS, "images": IMAGES}
SHOWN_IMAGES = 24
SHOWN_CANDIDATES = 12
IMAGE_BUDGET = 3_200_000
# (longest side of a thumbnail in pixels, WebP quality), largest first; sources get twice the side, images up
# to SMALL are kept exactly.
THUMBNAILS = ((224, 80), (160, 74), (112, 68))
SMALL = 64
GENERATOR = '<meta name="generator" content="cyclefit">'
"""What tells a page of ours from other files."""


def page(evaluations: list[Evaluation], title: str | None) -> str:
    """The whole page, its figures drawn into each evaluation's `figures` on the way."""
    budget = IMAGE_BUDGET // max(1, sum(bool(rows) for e in evaluations for rows in e.candidates.values()))
    parts = [_part(evaluation, budget, alone=len(evaluations) == 1) for evaluation in evaluations]
    results = evaluations[0].results
    return assemble(
        title or str(results.get("title") or "Evaluation"),
        _byline(results),
        "\n".join(summary for summary, _, _ in parts),
        "\n".join(contents for _, contents, _ in parts),
        [sections for _, _, sections in parts],
    )


def is_page(text: str) -> bool:
    """Whether a file's text is a page of `assemble`."""
    return GENERATOR in text[:2000]


def assemble(title: str, byline: str, summaries: str, contents: str, sections: list[str]) -> str:
    """A page of its parts, all but the title as HTML, with the one style and script."""
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    fields = {
        "generator": GENERATOR,
        "title": escape(title),
        "byline": byline,
        "summaries": summaries,
        "contents": contents,
        "sections": "\n".join(sections),
        "style": (here / "report.css").read_text(encoding="utf-8"),
        "script": script,
        # The policy admits this one script, so that nothing from a caption could ever run.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    template = (here / "template.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _part(evaluation: Evaluation, budget: int, alone: bool) -> tuple[str, str, str]:
    """One evaluation's summary, contents and sections; headed by its kind where it is not alone."""
    results, kind = evaluation.results, evaluation.kind
    head = "" if alone else f"{kind.name}: "
    summary = "" if alone else f"<h2>{kind.name}</h2>\n"
    summary += f"{_verdict(results.get('verdict'))}\n{_glance(results, kind)}\n"
    summary += f'<ul class="headline">\n{_headline(results, kind)}\n</ul>'
    sections, contents = [], []
    for split in results["splits"]:
        section, links = _split(evaluation, split, budget, head)
        sections.append(section)
        contents.append(f"<div><span>{head}{escape(split)}</span>{links}</div>")
    sections.append(_setup(results, kind, head))
    contents.append(f'<div><span></span><a href="#{results["kind"]}-setup">{head}Setup and terms</a></div>')
    return summary, "\n".join(contents), "\n".join(sections)


# ---- top of the page


def _byline(results: dict) -> str:
    metadata = results["metadata"]
    parts = [results.get("created"), metadata.get("machine"), metadata.get("scorer")]
    return " · ".join(escape(str(part)) for part in parts if part)


def _verdict(verdict: dict | None) -> str:
    if not verdict:
        return ""

    def paragraph(found: dict, more: str = "") -> str:
        kind, word = {True: ("better", "Better"), False: ("worse", "Not better")}.get(
            found.get("better"), ("", "Undecided")
        )
        return f'<p class="verdict {kind}"><strong>{word}</strong>{escape(found["sentence"])}{more}</p>'

    changes = f"<br>{escape(verdict['changes'])}" if verdict.get("changes") else ""
    control = paragraph(verdict["control"]) if verdict.get("control") else ""
    return paragraph(verdict, changes) + control


def _glance(results: dict, kind: Kind) -> str:
    """Truth and cost of every model on the first split, one row each; nothing where no facts are known."""
    split, content = next(iter(results["splits"].items()))
    singles = [row for row in content["rows"] if row["selection"] == "single" and row.get("facts")]
    if not singles:
        return ""
    decodings = [name for name in ("nucleus", "greedy", "") if any(row["decoding"] == name for row in singles)]
    columns = [(decoding, metric) for decoding in decodings for metric in kind.glance]
    rows = []
    for name, model in results["models"].items():
        of = {row["decoding"]: row for row in singles if row["model"] == name}
        cells = [f'<td class="name">{dot(model)}{escape(name)}</td>']
        for decoding, metric in columns:
            entry = of.get(decoding, {"metrics": {}})["metrics"].get(metric, {"value": None})
            bounds = limits(entry, metric)
            interval = f"<small>[{bounds[0]}, {bounds[1]}]</small>" if bounds else ""
            cells.append(cell(entry["value"], number(entry["value"], metric) + interval))
        seconds = model.get("train_seconds")
        rows.append(f"<tr>{''.join(cells)}{cell(seconds, count(seconds and round(seconds)))}</tr>")
    heads = [(" ".join(filter(None, (decoding, metric))), True) for decoding, metric in columns]
    how = (
        f"{plural(content['num_images'], kind.item)} of {split}. Truth: of the stated facts the share that is right, "
        f"in percent{'; coverage: of the facts there the share that is stated' if 'coverage' in kind.glance else ''}; "
        f"{kind.glance[0]}: the share with at least one false fact."
    )
    head = [("model", False), *heads, ("seconds of finetuning", True)]
    return f'{table(head, rows)}<p class="how">{escape(how)}</p>'


def _headline(results: dict, kind: Kind) -> str:
    """Three lines: what was compared, what came out, what it cost."""
    models = ", ".join(
        f"<b>{escape(name)}</b>" + (f" ({escape(str(model['description']))})" if model.get("description") else "")
        for name, model in results["models"].items()
    )
    sizes = [
        (f"{plural(content['num_images'], kind.item)} of " if content.get("num_images") else "")
        + f"<i>{escape(split)}</i>"
        for split, content in results["splits"].items()
    ]
    lines = [("Compared", f"{models or 'models'}, on {' and '.join(sizes)}.")]
    outcomes = [
        (f"On <i>{escape(split)}</i>: " if len(results["splits"]) > 1 else "") + outcome
        for split, content in results["splits"].items()
        if (outcome := _outcome(content))
    ]
    if outcomes:
        lines.append(("Came out", " ".join(outcomes[:3])))
    cost = _cost(results, kind)
    if cost:
        lines.append(("Cost", cost))
    return "\n".join(f"<li><b>{name}</b><span>{text}</span></li>" for name, text in lines)


def _outcome(content: dict) -> str:
    if content["differences"]:
        first = content["differences"][0]

        def of(difference: dict) -> tuple:
            return difference["metric"], *(difference[side].split(" · ")[0] for side in ("a", "b"))

        # The same two models under every decoding.
        return escape(" ".join(reading(row) for row in content["differences"] if of(row) == of(first)))
    metrics = metric_names(content["rows"])
    rows = [
        row for row in content["rows"]
        if row["selection"] != "oracle" and row["metrics"].get(metrics[0], {}).get("value") is not None
    ]  # fmt: skip
    if not rows:
        return ""
    best = (min if metrics[0] in LOWER_IS_BETTER else max)(rows, key=lambda row: row["metrics"][metrics[0]]["value"])
    entry = best["metrics"][metrics[0]]
    bounds = limits(entry, metrics[0])
    interval = f", 95% interval {bounds[0]} to {bounds[1]}" if bounds else ""
    value = number(entry["value"], metrics[0])
    return escape(f"the best {metrics[0]} is {value}, by {row_name(best)}{interval}.")


def _cost(results: dict, kind: Kind) -> str:
    rows = [row for content in results["splits"].values() for row in content["rows"]]

    def calls(row: dict) -> str:
        parts = [plural(row[f"{name}_calls"], f"{name} call") for name in ("generator", "denoiser")
                 if row.get(f"{name}_calls")]  # fmt: skip
        return " and ".join(parts) or "no generator call"

    def seconds(row: dict) -> str:
        return f", {count(row['seconds'])} s" if row.get("seconds") is not None else ""

    sentences = []
    cycles = [row for row in rows if row["selection"] == kind.judge and row.get("generator_calls")]
    singles = [row for row in rows if row["selection"] == "single" and row.get("generator_calls") is not None]
    if cycles:
        article = "an" if kind.kept[0] in "aeiou" else "a"
        what = f"{article} {kind.kept} kept by {kind.judge}"
        sentences.append(f"{what} takes {calls(cycles[0])}{seconds(cycles[0])} per {kind.item}")
    if singles:
        sentences.append(f"a single one takes {calls(singles[0])}{seconds(singles[0])}")
    trained = [(name, model) for name, model in results["models"].items() if model.get("train_seconds")]
    if trained:
        runs = ", ".join(
            f"{escape(name)} {count(model['train_seconds'])} s"
            + (f" for {plural(model['steps'], 'step')}" if model.get("steps") else "")
            for name, model in trained
        )
        sentences.append(f"finetuning took {runs}")
    text = "; ".join(sentences)
    return text[:1].upper() + text[1:] + "." if text else ""


def _setup(results: dict, kind: Kind, head: str) -> str:
    metadata = dict(results["metadata"])
    commands = metadata.pop("commands", None) or []
    shown = {name.replace("_", " "): escape(str(value)) for name, value in metadata.items() if value is not None}
    if commands:
        lines = [commands] if isinstance(commands, str) else commands
        shown["commands"] = f"<pre>{escape(chr(10).join(map(str, lines)))}</pre>"
    rows = []
    for name, model in results["models"].items():
        facts = [str(model["description"])] if model.get("description") else []
        for key, value in model.items():
            if key in ("description", "color_index") or value is None:
                continue
            facts.append(f"{key.replace('_', ' ')} {count(value) if isinstance(value, float) else value}")
        rows.append((f"{dot(model)}{escape(name)}", escape("; ".join(facts))))
    present = {row["selection"] for content in results["splits"].values() for row in content["rows"]}
    rows_of_all = [row for content in results["splits"].values() for row in content["rows"]]
    # The scorer stands in brackets behind a metric's name.
    metrics = {name.split(" (")[0] for name in metric_names(rows_of_all)}
    parts = [f'<section id="{results["kind"]}-setup"><h2>{head}Setup and terms</h2>']
    for heading, entries in (
        ("Models", rows),
        ("Selections", [(name, text) for name, text in kind.selections.items() if name in present]),
        ("Metrics", [(name, text) for name, text in kind.metrics.items() if name in metrics]),
        ("Evaluation", [(escape(name), value) for name, value in shown.items()]),
    ):
        if entries:
            items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in entries)
            parts.append(f"<h3>{heading}</h3><dl>{items}</dl>")
    return "\n".join([*parts, "</section>"])


# ---- one split


def _split(evaluation: Evaluation, split: str, budget: int, head: str) -> tuple[str, str]:
    results, folder, kind = evaluation.results, evaluation.folder, evaluation.kind
    candidates = evaluation.candidates[split]
    content, models, prefix = results["splits"][split], results["models"], f"{results['kind']}-{split}"
    size = content.get("num_images")
    small = f" <small>{plural(size, kind.item)}</small>" if size else ""

    def figure(name: str, label: str, draw, *inputs, data: list[dict]) -> str:
        stem = folder / "figures" / f"{split}-{name}"
        return render(stem, f"{prefix}-{name}", f"{label}, {split}", draw, *inputs, data=data)

    blocks = {
        "Results": main_table(content["rows"], models, split, kind.calls, kind.item),
        "Facts by kind": facts_table(content["rows"], models),
        "Differences": differences_table(content["differences"]) + parts_table(content["parts"]),
        "Comparison": _comparison(figure, content["rows"], models),
        "Gain by choosing": gains_table(content["gains"]),
        "Number of candidates": _count_curves(figure, content["count_curves"], models, kind),
        "Reconstruction rank": _rank_curves(figure, content, models, kind) + trends_table(content["rank_curves"]),
        "Score and quality": _score_boxes(figure, candidates, models, kind)
        + correlations_table(content["correlations"]),
        "Gallery": _gallery(evaluation, split, figure, budget),
    }
    blocks = {name: block for name, block in blocks.items() if block}
    parts = [f'<section id="{prefix}"><h2>{head}{escape(split)}{small}</h2>']
    links = []
    for name, block in blocks.items():
        anchor = f"{prefix}-{name.lower().replace(' ', '-')}"
        parts.append(f'<h3 id="{anchor}">{name}</h3>\n{block}')
        links.append(f'<a href="#{anchor}">{name}</a>')
    return "\n".join([*parts, "</section>"]), "".join(links)


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "x"


def panels(how: str, figures: list[str]) -> str:
    """Figures side by side under how to read them."""
    if not figures:
        return ""
    items = "".join(f"<figure>{figure}</figure>" for figure in figures)
    return f'<p class="how">How to read this: {how}</p><div class="panels">{items}</div>'


def _comparison(figure: Callable[..., str], rows: list[dict], models: dict[str, dict]) -> str:
    figures = []
    for metric in metric_names(rows):
        drawn = metric.split(" (")[0] not in TABLE_ONLY
        if drawn and any(row["metrics"].get(metric, {}).get("value") is not None for row in rows):
            name = f"comparison-{slug(metric)}"
            data = [
                {name: row[name] for name in ("model", "decoding", "selection")} | row["metrics"][metric]
                for row in rows
                if metric in row["metrics"]
            ]
            figures.append(figure(name, f"{metric} of every row", comparison, rows, metric, models, data=data))
    return panels(
        "one dot per row of the table with its 95% interval; colours and markers are models; the oracle is hollow.",
        figures,
    )


def _rank_curves(figure: Callable[..., str], content: dict, models: dict[str, dict], kind: Kind) -> str:
    figures = []
    kinds = dict.fromkeys((curve["metric"], curve["selection"]) for curve in content["rank_curves"])
    for metric, selection in kinds:
        curves = [c for c in content["rank_curves"] if (c["metric"], c["selection"]) == (metric, selection)]
        if any(entry["value"] is not None for curve in curves for entry in curve["values"]):
            name = f"rank-{slug(metric)}-{slug(selection)}"
            label = f"{metric} against the rank by {selection}"
            inputs = (curves, content["rows"], metric, selection, models)
            figures.append(figure(name, label, rank_curves, *inputs, data=_points(curves)))
    return panels(
        f"each {kind.item}'s candidates are ranked by the score, rank 1 is the {kind.kept} that is kept; a line that "
        "falls to the right says that the score knows quality. Bands are 95% intervals, of a single model the wide one "
        f"holds the middle half of the {kind.item}s; dashed lines are one sample without choice.",
        figures,
    )


def _points(curves: list[dict]) -> list[dict]:
    return [
        {name: curve[name] for name in ("model", "selection", "metric")} | entry
        for curve in curves
        for entry in curve["values"]
    ]


def _count_curves(figure: Callable[..., str], curves: list[dict], models: dict[str, dict], kind: Kind) -> str:
    figures = []
    for model, metric in dict.fromkeys((curve["model"], curve["metric"]) for curve in curves):
        of = [curve for curve in curves if (curve["model"], curve["metric"]) == (model, metric)]
        name, label = f"counts-{slug(metric)}-{slug(model)}", f"{metric} of the best of n for {model}"
        figures.append(figure(name, label, count_curves, of, metric, models[model], data=_points(of)))
    return panels(
        f"what the {kind.kept} that is kept is worth if the choice is among n, the mean over all draws of n from each "
        f"{kind.item}'s candidates. Bands are 95% intervals; the oracle chooses with the references in hand.",
        figures,
    )


def _primary(candidates: list[dict], field: str, first: str) -> str | None:
    names = list(dict.fromkeys(name for row in candidates for name in row[field]))
    return first if first in names else names[0] if names else None


def _score_boxes(figure: Callable[..., str], candidates: list[dict], models: dict[str, dict], kind: Kind) -> str:
    score, metric = _primary(candidates, "scores", kind.judge), _primary(candidates, "metrics", "CIDEr")
    if score is None or metric is None:
        return ""
    bins = {}
    for name in models:
        rows = [
            (row["scores"][score], row["metrics"][metric])
            for row in candidates
            if row["model"] == name and score in row["scores"] and metric in row["metrics"]
        ]
        if len(rows) >= 20:
            bins[name] = score_bins(*np.array(rows, dtype=float).T)
    if not bins:
        return ""
    top = max(float(np.percentile(values, 95)) for model in bins.values() for _, values in model) * 1.05 or 1.0
    figures = [
        figure(
            f"score-{slug(metric)}-{slug(score)}-{slug(name)}",
            f"{metric} in bins of {score} for {name}",
            *(score_boxes, groups, score, metric, name, models[name], top),
            data=[_bin(place, center, values) for place, (center, values) in enumerate(groups, 1)],
        )
        for name, groups in bins.items()
    ]
    return panels(
        f"all candidates of a model in bins of equal count along the score ({escape(score)}; the axis names "
        "each bin's mean score). Boxes hold the middle half of the candidates, whiskers reach from the 5th "
        "to the 95th percentile, the line joins the means.",
        figures,
    )


def _bin(place: int, center: float, values: np.ndarray) -> dict:
    names = ("5th percentile", "1st quartile", "median", "3rd quartile", "95th percentile")
    shown = dict(zip(names, map(float, np.percentile(values, (5, 25, 50, 75, 95))), strict=True))
    return {"bin": place, "mean score": center, "candidates": len(values), "mean": float(values.mean())} | shown


# ---- gallery


def _outcomes(rows: list[dict], metric: str, score: str | None) -> dict[str, float]:
    """Per model the metric of its greedy caption, or of the one the score keeps, or of its first."""
    outcome: dict[str, tuple] = {}
    for row in rows:
        if metric not in row["metrics"]:
            continue
        preference = (row["decoding"] == "greedy", row["scores"].get(score, -math.inf))
        if row["model"] not in outcome or preference > outcome[row["model"]][0]:
            outcome[row["model"]] = (preference, row["metrics"][metric])
    return {model: value for model, (_, value) in outcome.items()}


def gallery_keys(candidates: list[dict], failures: list[dict], kind: Kind, most: int) -> list[str]:
    """Keys taken in turn from the best, the worst, those on which the models differ most, and each kind of failure."""
    score, metric = _primary(candidates, "scores", kind.judge), _primary(candidates, "metrics", "CIDEr")
    values = {key: _outcomes(rows, metric, score) for key, rows in _by(candidates, "key").items()}
    mean = {key: sum(v.values()) / len(v) if v else -math.inf for key, v in values.items()}
    change = {key: max(v.values()) - min(v.values()) if len(v) > 1 else 0.0 for key, v in values.items()}
    orders = [sorted(values, key=lambda k: -mean[k]), sorted(values, key=lambda k: mean[k])]
    if any(change.values()):
        orders.append(sorted(values, key=lambda k: -change[k]))
    orders += [[row["key"] for row in found[name] if row["key"] in values] for found in failures for name in FAILURES]
    chosen: dict[str, None] = {}
    for order in itertools.cycle(orders):
        if len(chosen) == min(most, len(values)):
            return list(chosen)
        if (key := next((key for key in order if key not in chosen), None)) is not None:
            chosen[key] = None
    return list(chosen)


class _Images:
    """Thumbnails as data URIs, one encoding per file; counts what could not be read."""

    def __init__(self, folder: Path, side: int, quality: int):
        self.folder, self.side, self.quality = folder, side, quality
        self.encoded: dict[Path, tuple[str, bool] | None] = {}
        self.unreadable: set[str] = set()

    @property
    def size(self) -> int:
        return sum(len(image[0]) for image in self.encoded.values() if image)

    def element(self, name: str | None, text: str, factor: int = 1) -> str:
        image = self._encode(name, factor * self.side) if name else None
        if image is None:
            return ""
        uri, small = image
        kind = ' class="pixels"' if small else ""
        return f'<img{kind} src="{uri}" alt="{escape(text)}" tabindex="0" loading="lazy">'

    def _encode(self, name: str, side: int) -> tuple[str, bool] | None:
        path = within(self.folder, name, links=False)
        if path not in self.encoded:
            self.encoded[path] = None
            if os.path.isfile(path):
                try:
                    self.encoded[path] = self._thumbnail(path, side)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                    self.unreadable.add(name)
        return self.encoded[path]

    def _thumbnail(self, path: Path, side: int) -> tuple[str, bool]:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        small = max(rgb.size) <= SMALL
        if not small:
            rgb.thumbnail((side, side), Image.Resampling.LANCZOS)
        rgb.save(buffer, "WEBP", lossless=small, quality=self.quality)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small


def _gallery(evaluation: Evaluation, split: str, figure: Callable[..., str], budget: int) -> str:
    candidates, references = evaluation.candidates[split], evaluation.references[split]
    if not candidates:
        return ""
    folder, kind, models = evaluation.folder, evaluation.kind, evaluation.results["models"]
    failures = evaluation.results["splits"][split]["failures"]
    score, metric = _primary(candidates, "scores", kind.judge), _primary(candidates, "metrics", "CIDEr")
    by_key, failed = _by(candidates, "key"), {}
    for found in failures:
        for name in FAILURES:
            for row in found[name]:
                failed.setdefault(row["key"], {})[name] = None
    keys = gallery_keys(candidates, failures, kind, SHOWN_IMAGES)
    _sorted_rows(folder, split, figure, [by_key[key] for key in keys], references, score, metric)
    # Smaller thumbnails before fewer images; what the smallest cannot fit is left out.
    for side, quality in THUMBNAILS:
        images, cards = _Images(folder, side, quality), []
        for key in keys:
            of = split, failed.get(key, ()), references.get(key, [])
            card = _card(key, *of, by_key[key], models, images, score, metric, kind)
            if images.size > budget and cards:
                break
            cards.append(card)
        if len(cards) == len(keys):
            break
    metrics = list(dict.fromkeys(name for row in candidates for name in row["metrics"]))
    scores = list(dict.fromkeys(name for row in candidates for name in row["scores"]))
    present = [name for name in models if any(row["model"] == name for row in candidates)]
    shows = {
        "all": "all, best first",
        "best": "best third",
        "worst": "worst third",
        "change": "biggest change",
    } | {name: text for name, text in FAILURES.items() if any(name in failed.get(key, ()) for key in keys)}
    controls = [
        _select("show", "show", shows),
        _select("metric", "by", {name: name for name in ([metric, *metrics] if metric else [""])}),
        _select("model", "model", {"": "all models", **{name: name for name in present}}),
        _select("score", "candidates by", {name: name for name in ([score, *scores] if score else [""])}),
    ]
    note = f"{len(cards)} of {plural(len(by_key), kind.item)}"
    if len(cards) < len(by_key):
        note += (
            f", chosen in turn from the best, the worst, those on which the models differ most in {metric} and "
            "those on which score and metric disagree most"
            if metric
            else ", the first ones"
        )
    greedy = any(row["decoding"] == "greedy" for row in candidates)
    note += f". Each {kind.item} counts with "
    note += (
        "its greedy caption if there is one, else with the one the score keeps."
        if greedy
        else (f"the {kind.kept} the score keeps.")
    )
    if any(len(group) > SHOWN_CANDIDATES for rows in by_key.values() for group in _by(rows, "model").values()):
        note += f" Of more than {SHOWN_CANDIDATES} candidates, {SHOWN_CANDIDATES} evenly spread ranks are shown."
    if images.unreadable:
        note += f" {plural(len(images.unreadable), 'image')} could not be read: {sorted(images.unreadable)[0]}."
    how = f"How to read this: {kind.gallery} A click enlarges an image. For print: figures/{split}-sorted.svg."
    return (
        f'<p class="how">{how}</p><p class="note">{escape(note)}</p><div class="gallery">'
        f'<form class="controls" hidden>{"".join(controls)}<output></output></form>\n'
        f"{chr(10).join(cards)}</div>"
    )


def _places(metric: str | None) -> int:
    """Decimals of one candidate's metric."""
    return 0 if is_percentage(metric or "") else 2


def _select(name: str, label: str, options: dict[str, str]) -> str:
    items = "".join(
        f'<option value="{escape(value)}" data-places="{_places(value)}">{escape(text or NONE)}</option>'
        for value, text in options.items()
    )
    # A browser restores choices on reload but not the order they had made.
    return f'<label>{label} <select name="{name}" autocomplete="off">{items}</select></label>'


def _by(rows: list[dict], name: str) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _sorted_rows(folder, split, figure, samples: list[list[dict]], references: dict, score, metric) -> None:
    """The first samples that have images as a figure on disk; the page shows them in its gallery."""
    shown, data = [], []
    for rows in samples:
        model = rows[0]["model"]
        found = [row for row in rows if row["model"] == model and row.get("image") and score in row["scores"]]
        found = sorted((row for row in found if row["decoding"] not in PINNED), key=lambda row: -row["scores"][score])
        if len(found) < 2 or len(shown) == 4:
            continue
        places = sorted({round(place) for place in np.linspace(0, len(found) - 1, 6)})
        key, candidates = rows[0]["key"], []
        for place in places:
            row = found[place]
            numbers = f"{score} {short(row['scores'][score])}"
            if metric in row["metrics"]:
                numbers += f"\n{metric} {number(row['metrics'][metric], metric)}"
            candidates.append((within(folder, row["image"], links=False), row["caption"], numbers))
            data.append(
                {"key": key, "model": model, "rank": place + 1, "caption": row["caption"]}
                | {score: row["scores"][score], metric or "metric": row["metrics"].get(metric, "")}
            )
        text = (references.get(key) or [""])[0]
        shown.append((folder / f"images/{split}/source/{safe_name(key)}.png", text, candidates))
    if shown:
        figure("sorted", "candidates from the best score to the worst", sorted_rows, shown, data=data)


def _card(
    key: str,
    split: str,
    failed: Iterable[str],
    references: list[str],
    rows: list[dict],
    models: dict[str, dict],
    images: _Images,
    score: str | None,
    metric: str | None,
    kind: Kind,
) -> str:
    groups, strips = _by(rows, "model"), []
    for name, model in models.items():
        if name not in groups:
            continue
        sampled = [row for row in groups[name] if row["decoding"] not in PINNED]
        pinned = [row for row in groups[name] if row["decoding"] in PINNED]
        sampled.sort(key=lambda row: -row["scores"].get(score, -math.inf))
        ranks = range(len(sampled))
        if len(sampled) > SHOWN_CANDIDATES:
            ranks = np.linspace(0, len(sampled) - 1, SHOWN_CANDIDATES).round().astype(int)
        items = [_candidate(row, images, score, metric, row["decoding"], "pinned", kind) for row in pinned]
        for i in ranks:
            tag = "sample" if score not in sampled[i]["scores"] else "kept" if i == 0 else f"rank {i + 1}"
            items.append(_candidate(sampled[i], images, score, metric, tag, "kept" if tag == "kept" else "", kind))
        strips.append(
            f'<div class="strip" data-model="{escape(name)}"><h5>{dot(model)}{escape(name)}</h5>'
            f'<ol tabindex="0">{"".join(items)}</ol></div>'
        )
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    values = escape(json.dumps({name: _outcomes(rows, name, score) for name in names}))
    source = images.element(f"images/{split}/source/{safe_name(key)}.png", f"source {key}", factor=2)
    captions = "".join(f"<li>{escape(caption)}</li>" for caption in references)
    if kind is IMAGES and references:
        captions = captions.replace("<li>", "<li><b>", 1).replace("</li>", "</b></li>", 1)
    return (
        f'<article class="card" data-values="{values}" data-failed="{" ".join(failed)}">'
        f'<div class="source">{source}<h4>{escape(key)}</h4>'
        f"<ul>{captions}</ul></div><div>{''.join(strips)}</div></article>"
    )


def _candidate(
    row: dict, images: _Images, score: str | None, metric: str | None, tag: str, style: str, kind: Kind
) -> str:
    names = {"image cycle": "similarity"} | kind.scores
    also = list(kind.scores)
    numbers = {"scores": row["scores"], "metrics": row["metrics"], "names": names, "also": also}
    scores = [name for name in dict.fromkeys([score, *also]) if name in row["scores"]]
    shown = [f"{names.get(name, name)} {short(row['scores'][name])}" for name in scores]
    if metric in row["metrics"]:
        shown.append(f"{metric} {number(row['metrics'][metric], metric, _places(metric))}")
    return (
        f'<li class="{style}" data-numbers="{escape(json.dumps(numbers))}"><div class="tag">{escape(tag)}</div>'
        f"{images.element(row.get('image'), row['caption'])}"
        f'<div class="caption">{_marked(row, kind)}</div>'
        f'<div class="values">{escape(chr(10).join(shown))}</div></li>'
    )


def _marked(row: dict, kind: Kind) -> str:
    """A caption with what is false in it struck through; of an image, what of the prompt it does not show."""
    text, false = row["caption"], [of for of in (row.get("facts") or {}).get("stated", []) if not of[3]]
    if kind is IMAGES:
        missing = ", ".join(row.get("prompt", "")[start:end] for _, start, end, _ in false)
        return escape(text) + (f"<br><s>{escape(missing)}</s>" if missing else "")
    parts, at = [], 0
    for fact, start, end, _ in false:
        parts += [escape(text[at:start]), f'<s title="false {escape(fact)}">{escape(text[start:end])}</s>']
        at = end
    return "".join([*parts, escape(text[at:])])
