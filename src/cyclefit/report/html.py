"""The page of the report: one file, no request, every text from the evaluation escaped."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from cyclefit import UserError
from cyclefit.report.figures import (
    THEME,
    color,
    comparison,
    metric_names,
    rank_curves,
    render,
    scale,
    score_bins,
    score_boxes,
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
        "contrastive": "as denoising, minus the error on other images: the caption that tells the generator most "
        "about this image and least about others is kept.",
        "image-text": "the control without a generator: the caption most similar to the image under the scorer is "
        "kept.",
        "oracle": "the candidate with the best metric against the references; no method can pass this bound.",
    },
    metrics={
        "CIDEr": "agreement with the references in words that are rare elsewhere.",
        "CIDEr-D": "CIDEr with clipped counts and a penalty on length, as coco-caption computes it.",
        "BLEU-4": "precision of word groups of up to four words.",
        "ROUGE-L": "longest common subsequence with a reference.",
        "words": "mean length of a caption; neither more nor fewer is better.",
        "image similarity": "cosine similarity of the source image and the one regenerated from the caption.",
    },
    gallery="left the source and its references; right each model's captions, the greedy one first, then the "
    "candidates from the best score to the worst, each with the image regenerated from it.",
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
        "oracle": "the candidate most similar to the reference image under the scorer; the bound of its image "
        "similarity.",
    },
    metrics={
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
    "the best score to the worst, each with what the captioner says of it.",
    scores={"text cycle": "text cycle", "image-text": "image-text"},
)
KINDS = {"captions": CAPTIONS, "images": IMAGES}
NO_DIRECTION = {"words", "length"}
LOWER_IS_BETTER = {"FID", "KID", "captioner NLL"}
NONE, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
SHOWN_IMAGES = 24
SHOWN_CANDIDATES = 12
IMAGE_BUDGET = 3_200_000
# (longest side of a thumbnail in pixels, WebP quality), largest first; sources get twice the side, images up
# to SMALL are kept exactly.
THUMBNAILS = ((224, 80), (160, 74), (112, 68))
SMALL = 64


def page(evaluations: list[Evaluation], title: str | None) -> str:
    """The whole page, its figures drawn into each evaluation's `figures` on the way."""
    here = Path(__file__).parent
    budget = IMAGE_BUDGET // max(1, sum(bool(rows) for e in evaluations for rows in e.candidates.values()))
    parts = [_part(evaluation, budget, alone=len(evaluations) == 1) for evaluation in evaluations]
    script = (here / "report.js").read_text(encoding="utf-8")
    results = evaluations[0].results
    fields = {
        "title": escape(title or str(results.get("title") or "Evaluation")),
        "byline": _byline(results),
        "summaries": "\n".join(summary for summary, _, _ in parts),
        "contents": "\n".join(contents for _, contents, _ in parts),
        "sections": "\n".join(sections for _, _, sections in parts),
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
    summary += f'{_verdict(results.get("verdict"))}\n<ul class="headline">\n{_headline(results, kind)}\n</ul>'
    sections, contents = [], []
    for split in results["splits"]:
        section, links = _split(evaluation, split, budget, head)
        sections.append(section)
        contents.append(f"<div><span>{head}{escape(split)}</span>{links}</div>")
    sections.append(_setup(results, kind, head))
    contents.append(f'<div><span></span><a href="#{results["kind"]}-setup">{head}Setup and terms</a></div>')
    return summary, "\n".join(contents), "\n".join(sections)


# ---- numbers and words


def _number(value: float | None, metric: str = "", places: int | None = None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    value *= scale(metric)
    if places is None:
        places = _places(metric, value)
    return f"{value:.{places}f}".replace("-", MINUS)


def _places(metric: str, value: float) -> int:
    return 1 if scale(metric) == 100 or metric in NO_DIRECTION or abs(value) >= 10 else 3


def _bounds(entry: dict, metric: str) -> tuple[str, str] | None:
    """Both ends of the interval; no decimals where it is wider than ten units."""
    low, high = entry.get("low"), entry.get("high")
    if low is None or high is None:
        return None
    places = 0 if (high - low) * scale(metric) >= 10 else _places(metric, high)
    return _number(low, metric, places), _number(high, metric, places)


def _count(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def _plural(count: float, noun: str) -> str:
    return f"{_count(count)} {noun}{'' if count == 1 else 's'}"


def _row_name(row: dict) -> str:
    return " · ".join(filter(None, (row["model"], row["decoding"], row["selection"])))


def reading(difference: dict) -> str:
    """One difference in plain words, unescaped: `cycle beats plain by 41 CIDEr, 95% interval 33 to 50`."""
    metric, value = difference["metric"], difference["value"]
    (a, *details), (b, *others) = difference["a"].split(" · "), difference["b"].split(" · ")
    if details == others:
        under = f" ({', '.join(details)})" if details else ""
    else:
        a, b, under = difference["a"], difference["b"], ""
    if value is None:
        return f"{a} and {b} could not be compared in {metric}{under}."
    bounds = _bounds(difference, metric)
    if bounds is not None and difference["low"] <= 0 <= difference["high"]:
        low, high = bounds
        return f"No clear difference in {metric} between {a} and {b}: 95% interval {low} to {high}{under}."
    if bounds is None:
        interval, size = "no interval was computed", _number(abs(value), metric)
    else:
        flipped = {"low": -difference["high"], "high": -difference["low"]} if value < 0 else difference
        interval = "95% interval {} to {}".format(*_bounds(flipped, metric))
        wide = (difference["high"] - difference["low"]) * scale(metric) >= 10
        size = _number(abs(value), metric, 0 if wide else None)
    if metric in NO_DIRECTION:
        return f"{a} has {size} {'more' if value > 0 else 'fewer'} {metric} than {b}, {interval}{under}."
    if (value > 0) != (metric in LOWER_IS_BETTER):
        verb = "beats"
    else:
        verb = "falls behind"
    if value == 0:
        return f"{a} equals {b} in {metric}, {interval}{under}."
    noun = "" if metric[:1].isupper() else " in"
    return f"{a} {verb} {b} by {size}{noun} {metric}, {interval}{under}."


# ---- top of the page


def _byline(results: dict) -> str:
    metadata = results["metadata"]
    parts = [results.get("created"), metadata.get("machine"), metadata.get("scorer")]
    return " · ".join(escape(str(part)) for part in parts if part)


def _verdict(verdict: dict | None) -> str:
    if not verdict:
        return ""
    kind, word = {True: ("better", "Better"), False: ("worse", "Not better")}.get(
        verdict.get("better"), ("", "Undecided")
    )
    return f'<p class="verdict {kind}"><strong>{word}</strong>{escape(verdict["sentence"])}</p>'


def _headline(results: dict, kind: Kind) -> str:
    """Three lines: what was compared, what came out, what it cost."""
    models = ", ".join(
        f"<b>{escape(name)}</b>" + (f" ({escape(str(model['description']))})" if model.get("description") else "")
        for name, model in results["models"].items()
    )
    sizes = [
        (f"{_plural(content['num_images'], kind.item)} of " if content.get("num_images") else "")
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
        return escape(reading(content["differences"][0]))
    metrics = metric_names(content["rows"])
    rows = [
        row for row in content["rows"]
        if row["selection"] != "oracle" and row["metrics"].get(metrics[0], {}).get("value") is not None
    ]  # fmt: skip
    if not rows:
        return ""
    best = (min if metrics[0] in LOWER_IS_BETTER else max)(rows, key=lambda row: row["metrics"][metrics[0]]["value"])
    entry = best["metrics"][metrics[0]]
    bounds = _bounds(entry, metrics[0])
    interval = f", 95% interval {bounds[0]} to {bounds[1]}" if bounds else ""
    value = _number(entry["value"], metrics[0])
    return escape(f"the best {metrics[0]} is {value}, by {_row_name(best)}{interval}.")


def _cost(results: dict, kind: Kind) -> str:
    rows = [row for content in results["splits"].values() for row in content["rows"]]

    def calls(row: dict) -> str:
        parts = [_plural(row[f"{name}_calls"], f"{name} call") for name in ("generator", "denoiser")
                 if row.get(f"{name}_calls")]  # fmt: skip
        return " and ".join(parts) or "no generator call"

    def seconds(row: dict) -> str:
        return f", {_count(row['seconds'])} s" if row.get("seconds") is not None else ""

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
            f"{escape(name)} {_count(model['train_seconds'])} s"
            + (f" for {_plural(model['steps'], 'step')}" if model.get("steps") else "")
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
            facts.append(f"{key.replace('_', ' ')} {_count(value) if isinstance(value, float) else value}")
        rows.append((f"{_dot(model)}{escape(name)}", escape("; ".join(facts))))
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
    candidates, references = evaluation.candidates[split], evaluation.references[split]
    content, models, prefix = results["splits"][split], results["models"], f"{results['kind']}-{split}"
    size = content.get("num_images")
    small = f" <small>{_plural(size, kind.item)}</small>" if size else ""

    def figure(name: str, label: str, draw, *inputs) -> str:
        return render(folder / "figures" / f"{split}-{name}", f"{prefix}-{name}", f"{label}, {split}", draw, *inputs)

    blocks = {
        "Results": _main_table(content["rows"], models, split, kind),
        "Differences": _differences(content["differences"]),
        "Comparison": _comparison(figure, content["rows"], models),
        "Reconstruction rank": _rank_curves(figure, content, models, kind),
        "Score and quality": _score_boxes(figure, candidates, models, kind),
        "Gallery": _gallery(folder, split, candidates, references, models, budget, kind),
    }
    blocks = {name: block for name, block in blocks.items() if block}
    parts = [f'<section id="{prefix}"><h2>{head}{escape(split)}{small}</h2>']
    links = []
    for name, block in blocks.items():
        anchor = f"{prefix}-{name.lower().replace(' ', '-')}"
        parts.append(f'<h3 id="{anchor}">{name}</h3>\n{block}')
        links.append(f'<a href="#{anchor}">{name}</a>')
    return "\n".join([*parts, "</section>"]), "".join(links)


def _dot(model: dict) -> str:
    return f'<i class="dot" style="background:{THEME.get(color(model), color(model))}"></i>'


def _table(headers: list[tuple[str, bool]], rows: list[str], kind: str = "wide") -> str:
    head = "".join(
        f'<th scope="col"{" class=number" if numeric else ""}><button type="button">{escape(name)}</button></th>'
        for name, numeric in headers
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable {kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _cell(value: float | None, text: str) -> str:
    key = "" if value is None or not math.isfinite(value) else repr(value)
    return f'<td class="number" data-v="{key}">{text}</td>'


def _main_table(rows: list[dict], models: dict[str, dict], split: str, kind: Kind) -> str:
    """What needs no scorer and the costs in one table; the same columns under each scorer in one of its own."""
    if not rows:
        return ""
    costs = [
        (name, header)
        for name, header in (
            ("generator_calls", kind.calls),
            ("denoiser_calls", "denoiser calls"),
            ("seconds", "seconds"),
        )
        if any(row.get(name) is not None for row in rows)
    ]
    order = list(models)
    rows = sorted(rows, key=lambda row: order.index(row["model"]))
    groups: dict[str, list[str]] = {"": []}
    for metric in metric_names(rows):
        groups.setdefault(_scorer(metric), []).append(metric)
    scaled = list(dict.fromkeys(m.split(" (")[0] for metrics in groups.values() for m in metrics if scale(m) == 100))
    how = "How to read this: brackets hold the 95% interval; the best value of each metric is bold"
    how += ", oracle rows (italic) aside, which choose with the references in hand. "
    how += f"{', '.join(scaled)} are shown {TIMES} 100. " if scaled else ""
    how += f"Calls and seconds are per {kind.item}. " if costs else ""
    how += "A click on a header sorts."
    parts = [f'<p class="how">{escape(how)} The same numbers: <code>table-{escape(split)}.csv</code>.</p>']
    for scorer, metrics in groups.items():
        shown = [] if scorer else costs
        if metrics or shown:
            parts += [f"<h4>Under {escape(scorer)}</h4>"] * bool(scorer) + [_rows(rows, models, metrics, shown)]
    return "\n".join(parts)


def _scorer(metric: str) -> str:
    """It stands in brackets behind a metric's name."""
    return metric[metric.index(" (") + 2 : -1] if metric.endswith(")") and " (" in metric else ""


def _rows(rows: list[dict], models: dict[str, dict], metrics: list[str], costs: list[tuple[str, str]]) -> str:
    names = [name for name in ("decoding", "selection") if any(row[name] for row in rows)]
    best = {}
    for metric in metrics:
        values = [
            row["metrics"][metric]["value"]
            for row in rows
            if row["selection"] != "oracle" and row["metrics"].get(metric, {}).get("value") is not None
        ]
        if values and metric not in NO_DIRECTION:
            best[metric] = (min if metric in LOWER_IS_BETTER else max)(values)
    lines, previous = [], None
    for row in rows:
        classes = ["first"] * (row["model"] != previous) + ["bound"] * (row["selection"] == "oracle")
        previous = row["model"]
        cells = [f'<td class="name">{_dot(models[row["model"]])}{escape(row["model"])}</td>']
        cells += [f'<td class="name">{escape(row[name])}</td>' for name in names]
        for metric in metrics:
            entry = row["metrics"].get(metric, {"value": None})
            text = _number(entry["value"], metric)
            if entry["value"] is not None and entry["value"] == best.get(metric) and row["selection"] != "oracle":
                text = f"<b>{text}</b>"
            bounds = _bounds(entry, metric)
            text += f"<small>[{bounds[0]}, {bounds[1]}]</small>" if bounds else ""
            cells.append(_cell(entry["value"], text))
        cells += [_cell(row.get(name), _count(row.get(name))) for name, _ in costs]
        lines.append(f'<tr class="{" ".join(classes)}">{"".join(cells)}</tr>')
    headers = [(name, False) for name in ("model", *names)]
    headers += [(metric.split(" (")[0], True) for metric in metrics] + [(header, True) for _, header in costs]
    return _table(headers, lines)


def _differences(differences: list[dict]) -> str:
    if not differences:
        return ""
    relative = any(entry.get("relative") is not None for entry in differences)
    p = any(entry.get("p") is not None for entry in differences)
    lines = []
    for entry in differences:
        metric, value = entry["metric"], entry["value"]
        bounds = _bounds(entry, metric)
        text = ("+" if value is not None and value > 0 else "") + _number(value, metric)
        text += f"<small>[{bounds[0]}, {bounds[1]}]</small>" if bounds else ""
        cells = [f'<td class="name">{escape(entry[name])}</td>' for name in ("metric", "a", "b")]
        cells.append(_cell(None if value is None else value * scale(metric), text))
        if relative:
            ratio = entry.get("relative")
            percent = NONE if ratio is None else f"{100 * ratio:+.1f}%".replace("-", MINUS)
            cells.append(_cell(ratio, percent))
        if p:
            chance = entry.get("p")
            shown = NONE if chance is None else "< 0.001" if chance < 0.001 else f"{chance:.3f}"
            cells.append(_cell(chance, escape(shown)))
        lines.append(f'<tr>{"".join(cells)}<td class="reading">{escape(reading(entry))}</td></tr>')
    headers = [("metric", False), ("a", False), ("b", False), (f"a {MINUS} b", True)]
    headers += [("relative", True)] * relative + [("p", True)] * p + [("in words", False)]
    return (
        '<p class="how">How to read this: both models are compared on the same images (paired); where the '
        "95% interval includes 0, the data do not tell them apart.</p>" + _table(headers, lines)
    )


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "x"


def _panels(how: str, figures: list[str]) -> str:
    if not figures:
        return ""
    items = "".join(f"<figure>{figure}</figure>" for figure in figures)
    return f'<p class="how">How to read this: {how}</p><div class="panels">{items}</div>'


def _comparison(figure: Callable[..., str], rows: list[dict], models: dict[str, dict]) -> str:
    figures = []
    for metric in metric_names(rows):
        if any(row["metrics"].get(metric, {}).get("value") is not None for row in rows):
            name = f"comparison-{_slug(metric)}"
            figures.append(figure(name, f"{metric} of every row", comparison, rows, metric, models))
    return _panels(
        "one dot per row of the table with its 95% interval; colours and markers are models; the oracle is hollow.",
        figures,
    )


def _rank_curves(figure: Callable[..., str], content: dict, models: dict[str, dict], kind: Kind) -> str:
    figures = []
    kinds = dict.fromkeys((curve["metric"], curve["selection"]) for curve in content["rank_curves"])
    for metric, selection in kinds:
        curves = [c for c in content["rank_curves"] if (c["metric"], c["selection"]) == (metric, selection)]
        if any(entry["value"] is not None for curve in curves for entry in curve["values"]):
            name = f"rank-{_slug(metric)}-{_slug(selection)}"
            label = f"{metric} against the rank by {selection}"
            figures.append(figure(name, label, rank_curves, curves, content["rows"], metric, selection, models))
    return _panels(
        f"each {kind.item}'s candidates are ranked by the score, rank 1 is the {kind.kept} that is kept; a line that "
        "falls to the right says that the score knows quality. Bands are 95% intervals, dashed lines one "
        "sample without choice.",
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
            f"score-{_slug(metric)}-{_slug(score)}-{_slug(name)}",
            f"{metric} in bins of {score} for {name}",
            *(score_boxes, groups, score, metric, name, models[name], top),
        )
        for name, groups in bins.items()
    ]
    return _panels(
        f"all candidates of a model in bins of equal count along the score ({escape(score)}; the axis names "
        "each bin's mean score). Boxes hold the middle half of the candidates, whiskers reach from the 5th "
        "to the 95th percentile, the line joins the means.",
        figures,
    )


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


def _choose(values: dict[str, dict[str, float]], most: int) -> list[str]:
    """Keys taken in turn from the best, the worst and those on which the models differ most."""
    mean = {key: sum(v.values()) / len(v) if v else -math.inf for key, v in values.items()}
    change = {key: max(v.values()) - min(v.values()) if len(v) > 1 else 0.0 for key, v in values.items()}
    orders = [sorted(values, key=lambda k: -mean[k]), sorted(values, key=lambda k: mean[k])]
    if any(change.values()):
        orders.append(sorted(values, key=lambda k: -change[k]))
    chosen: dict[str, None] = {}
    for turn in range(min(most, len(values)) * len(orders)):
        if len(chosen) == min(most, len(values)):
            break
        order = orders[turn % len(orders)]
        chosen[next(key for key in order if key not in chosen)] = None
    return list(chosen)


class _Images:
    """Thumbnails as data URIs, one encoding per file; counts what could not be read."""

    def __init__(self, folder: Path, side: int, quality: int):
        self.folder, self.side, self.quality = folder.resolve(), side, quality
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
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise UserError(f"The image {name!r} lies outside {self.folder}; paths are relative to that folder.")
        if path not in self.encoded:
            self.encoded[path] = None
            if path.is_file():
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


def _gallery(
    folder: Path,
    split: str,
    candidates: list[dict],
    references: dict,
    models: dict[str, dict],
    budget: int,
    kind: Kind,
) -> str:
    if not candidates:
        return ""
    score, metric = _primary(candidates, "scores", kind.judge), _primary(candidates, "metrics", "CIDEr")
    by_key: dict[str, list[dict]] = {}
    for row in candidates:
        by_key.setdefault(row["key"], []).append(row)
    values = {key: _outcomes(rows, metric, score) for key, rows in by_key.items()}
    keys = _choose(values, SHOWN_IMAGES)
    # Smaller thumbnails before fewer images; what the smallest cannot fit is left out.
    for side, quality in THUMBNAILS:
        images, cards = _Images(folder, side, quality), []
        for key in keys:
            card = _card(key, split, by_key[key], references.get(key, []), models, images, score, metric, kind)
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
    }
    controls = [
        _select("show", "show", shows),
        _select("metric", "by", {name: name for name in ([metric, *metrics] if metric else [""])}, scaled=True),
        _select("model", "model", {"": "all models", **{name: name for name in present}}),
        _select("score", "candidates by", {name: name for name in ([score, *scores] if score else [""])}),
    ]
    note = f"{len(cards)} of {_plural(len(by_key), kind.item)}"
    if len(cards) < len(by_key):
        note += (
            f", chosen in turn from the best, the worst and those on which the models differ most in {metric}"
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
    if any(len(group) > SHOWN_CANDIDATES for rows in by_key.values() for group in _by_model(rows).values()):
        note += f" Of more than {SHOWN_CANDIDATES} candidates, {SHOWN_CANDIDATES} evenly spread ranks are shown."
    if images.unreadable:
        note += f" {_plural(len(images.unreadable), 'image')} could not be read: {sorted(images.unreadable)[0]}."
    how = f"How to read this: {kind.gallery} A click enlarges an image."
    return (
        f'<p class="how">{how}</p><p class="note">{escape(note)}</p><div class="gallery">'
        f'<form class="controls" hidden>{"".join(controls)}<output></output></form>\n'
        f"{chr(10).join(cards)}</div>"
    )


def _select(name: str, label: str, options: dict[str, str], scaled: bool = False) -> str:
    items = "".join(
        f'<option value="{escape(value)}"'
        + (f' data-scale="{scale(value)}"' if scaled else "")
        + f">{escape(text or NONE)}</option>"
        for value, text in options.items()
    )
    # A browser restores choices on reload but not the order they had made.
    return f'<label>{label} <select name="{name}" autocomplete="off">{items}</select></label>'


def _by_model(rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    return groups


def _card(
    key: str,
    split: str,
    rows: list[dict],
    references: list[str],
    models: dict[str, dict],
    images: _Images,
    score: str | None,
    metric: str | None,
    kind: Kind,
) -> str:
    groups, strips = _by_model(rows), []
    for name, model in models.items():
        if name not in groups:
            continue
        sampled = [row for row in groups[name] if row["decoding"] not in ("greedy", "beam")]
        pinned = [row for row in groups[name] if row["decoding"] in ("greedy", "beam")]
        sampled.sort(key=lambda row: -row["scores"].get(score, -math.inf))
        ranks = range(len(sampled))
        if len(sampled) > SHOWN_CANDIDATES:
            ranks = np.linspace(0, len(sampled) - 1, SHOWN_CANDIDATES).round().astype(int)
        items = [_candidate(row, images, score, metric, row["decoding"], "pinned", kind) for row in pinned]
        for i in ranks:
            tag = "sample" if score not in sampled[i]["scores"] else "kept" if i == 0 else f"rank {i + 1}"
            items.append(_candidate(sampled[i], images, score, metric, tag, "kept" if tag == "kept" else "", kind))
        strips.append(
            f'<div class="strip" data-model="{escape(name)}"><h5>{_dot(model)}{escape(name)}</h5>'
            f'<ol tabindex="0">{"".join(items)}</ol></div>'
        )
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    values = escape(json.dumps({name: _outcomes(rows, name, score) for name in names}))
    source = images.element(f"images/{split}/source/{key}.png", f"source {key}", factor=2)
    captions = "".join(f"<li>{escape(caption)}</li>" for caption in references)
    if kind is IMAGES and references:
        captions = captions.replace("<li>", "<li><b>", 1).replace("</li>", "</b></li>", 1)
    return (
        f'<article class="card" data-values="{values}"><div class="source">{source}<h4>{escape(key)}</h4>'
        f"<ul>{captions}</ul></div><div>{''.join(strips)}</div></article>"
    )


def _candidate(
    row: dict, images: _Images, score: str | None, metric: str | None, tag: str, style: str, kind: Kind
) -> str:
    names = {"image cycle": "similarity"} | kind.scores
    also = list(kind.scores)
    numbers = {"scores": row["scores"], "metrics": row["metrics"], "names": names, "also": also}
    scores = [name for name in dict.fromkeys([score, *also]) if name in row["scores"]]
    shown = [f"{names.get(name, name)} {_short(row['scores'][name])}" for name in scores]
    if metric in row["metrics"]:
        places = 0 if scale(metric) == 100 else 2
        shown.append(f"{metric} {_number(row['metrics'][metric], metric, places)}")
    return (
        f'<li class="{style}" data-numbers="{escape(json.dumps(numbers))}"><div class="tag">{escape(tag)}</div>'
        f"{images.element(row.get('image'), row['caption'])}"
        f'<div class="caption">{escape(row["caption"])}</div>'
        f'<div class="values">{escape(chr(10).join(shown))}</div></li>'
    )
