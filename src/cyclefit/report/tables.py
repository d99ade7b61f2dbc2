"""The tables of a page: numbers and words, results, differences, and the analyses."""

import math
from html import escape

from cyclefit.report.figures import THEME, color, is_percentage, metric_names

NO_DIRECTION = {"words", "length"}
LOWER_IS_BETTER = {"FID", "KID", "captioner NLL", "self-BLEU", "CHAIRi", "CHAIRs", "false captions", "false images"}
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def number(value: float | None, metric: str = "", places: int | None = None) -> str:
    """A metric's value as the page writes it."""
    if value is None or not math.isfinite(value):
        return NONE
    if places is None:
        places = decimals(metric, value)
    return f"{value:.{places}f}".replace("-", MINUS)


def decimals(metric: str, value: float) -> int:
    """How many the metric is written with."""
    return 1 if is_percentage(metric) or metric in NO_DIRECTION or abs(value) >= 10 else 3


def limits(entry: dict, metric: str) -> tuple[str, str] | None:
    """Both ends of the interval; no decimals where it is wider than ten units."""
    low, high = entry.get("low"), entry.get("high")
    if low is None or high is None:
        return None
    places = 0 if high - low >= 10 else decimals(metric, high)
    return number(low, metric, places), number(high, metric, places)


def count(value: float | None) -> str:
    """A number of calls, seconds, samples."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def short(value: float) -> str:
    """A score beside an image."""
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def plural(value: float, noun: str) -> str:
    """`3 images`."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def row_name(row: dict) -> str:
    """Model, decoding and selection."""
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
    bounds = limits(difference, metric)
    if bounds is not None and difference["low"] <= 0 <= difference["high"]:
        low, high = bounds
        return f"No clear difference in {metric} between {a} and {b}: 95% interval {low} to {high}{under}."
    if bounds is None:
        interval, size = "no interval was computed", number(abs(value), metric)
    else:
        flipped = {"low": -difference["high"], "high": -difference["low"]} if value < 0 else difference
        interval = "95% interval {} to {}".format(*limits(flipped, metric))
        wide = difference["high"] - difference["low"] >= 10
        size = number(abs(value), metric, 0 if wide else None)
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


def dot(model: dict) -> str:
    """The model's colour."""
    return f'<i class="dot" style="background:{THEME.get(color(model), color(model))}"></i>'


def table(headers: list[tuple[str, bool]], rows: list[str], kind: str = "wide") -> str:
    """A sortable table."""
    head = "".join(
        f'<th scope="col"{" class=number" if numeric else ""}><button type="button">{escape(name)}</button></th>'
        for name, numeric in headers
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable {kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def cell(value: float | None, text: str) -> str:
    """A number that sorts by its value."""
    key = "" if value is None or not math.isfinite(value) else repr(value)
    return f'<td class="number" data-v="{key}">{text}</td>'


def main_table(
    rows: list[dict], models: dict[str, dict], split: str, calls: str, item: str, file: str | None = None
) -> str:
    """What needs no scorer and the costs in one table; the same columns under each scorer in one of its own."""
    if not rows:
        return ""
    costs = [
        (name, header)
        for name, header in (
            ("generator_calls", calls),
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
    how = "How to read this: brackets hold the 95% interval; the best value of each metric is bold"
    how += ", oracle rows (italic) aside, which choose with the references in hand. "
    how += f"Calls and seconds are per {item}. " if costs else ""
    how += "A click on a header sorts."
    parts = [f'<p class="how">{escape(how)} The same numbers: <code>{escape(file or f"table-{split}.csv")}</code>.</p>']
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
        cells = [f'<td class="name">{dot(models[row["model"]])}{escape(row["model"])}</td>']
        cells += [f'<td class="name">{escape(row[name])}</td>' for name in names]
        for metric in metrics:
            entry = row["metrics"].get(metric, {"value": None})
            text = number(entry["value"], metric)
            if entry["value"] is not None and entry["value"] == best.get(metric) and row["selection"] != "oracle":
                text = f"<b>{text}</b>"
            bounds = limits(entry, metric)
            text += f"<small>[{bounds[0]}, {bounds[1]}]</small>" if bounds else ""
            cells.append(cell(entry["value"], text))
        cells += [cell(row.get(name), count(row.get(name))) for name, _ in costs]
        lines.append(f'<tr class="{" ".join(classes)}">{"".join(cells)}</tr>')
    headers = [(name, False) for name in ("model", *names)]
    headers += [(metric.split(" (")[0], True) for metric in metrics] + [(header, True) for _, header in costs]
    return table(headers, lines)


def facts_table(rows: list[dict], models: dict[str, dict]) -> str:
    """Of each kind of fact how often it is stated, and how much of that is right."""
    rows = [row for row in rows if row.get("facts")]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["facts"]))
    if not kinds:
        return ""
    names = [name for name in ("decoding", "selection") if any(row[name] for row in rows)]
    lines, previous = [], None
    for row in sorted(rows, key=lambda row: list(models).index(row["model"])):
        first, previous = row["model"] != previous, row["model"]
        cells = [f'<td class="name">{dot(models[row["model"]])}{escape(row["model"])}</td>']
        cells += [f'<td class="name">{escape(row[name])}</td>' for name in names]
        for kind in kinds:
            found = row["facts"].get(kind, {})
            value = found.get("truth", {}).get("value")
            stated = found.get("stated", 0.0)
            cells.append(cell(value, f"{number(value, 'truth')}<small>{stated:.2f} stated</small>"))
        lines.append(f'<tr class="{"first" if first else ""}">{"".join(cells)}</tr>')
    return (
        '<p class="how">How to read this: of the stated facts of a kind the share that is right, in percent; below it '
        "how many are stated on average.</p>"
        + table([*[(name, False) for name in ("model", *names)], *[(kind, True) for kind in kinds]], lines)
    )


def parts_table(parts: list[dict]) -> str:
    """Differences taken apart by kind of fact and by length."""
    if not parts:
        return ""
    lines = []
    for entry in parts:
        names = [name for name in ("coverage", "truth") if any(name in of for of in entry["kinds"].values())]
        for kind, of in entry["kinds"].items():
            cells = [f'<td class="name">{escape(text)}</td>' for text in (entry["a"], entry["b"], kind)]
            cells.append(cell(of["a_stated"], f"{of['b_stated']:.2f} → {of['a_stated']:.2f}"))
            for name in ("coverage", "truth"):
                found = of.get(name) if name in names else None
                cells.append(_from_to(found) if found else cell(None, NONE))
            lines.append(f"<tr>{''.join(cells)}</tr>")
        if words := entry.get("words"):
            cells = [f'<td class="name">{escape(text)}</td>' for text in (entry["a"], entry["b"], "words")]
            told = cell(words["a_value"], f"{words['b_value']:.1f} → {words['a_value']:.1f}")
            lines.append(f"<tr>{''.join(cells)}{told}{cell(None, NONE) * 2}</tr>")
    headers = [("a", False), ("b", False), ("what", False), ("stated, b → a", True)]
    return (
        '<p class="how">How to read this: each comparison taken apart by kind of fact and by length. Stated: facts (or '
        "words) on average; rightly: of the facts there the share that is stated; right: of those stated; b → a, with "
        "the 95% interval of the difference.</p>"
        + table([*headers, ("rightly, b → a", True), ("right, b → a", True)], lines)
    )


def _from_to(entry: dict) -> str:
    if entry["value"] is None:
        return cell(None, NONE)
    low, high = limits(entry, "truth")
    values = f"{number(entry['b_value'], 'truth')} → {number(entry['a_value'], 'truth')}"
    return cell(entry["value"], f"{values}<small>[{low}, {high}]</small>")


def differences_table(differences: list[dict]) -> str:
    """Paired differences, each read out in words."""
    if not differences:
        return ""
    relative = any(entry.get("relative") is not None for entry in differences)
    p = any(entry.get("p") is not None for entry in differences)
    lines = []
    for entry in differences:
        cells = [f'<td class="name">{escape(entry[name])}</td>' for name in ("metric", "a", "b")]
        cells.append(_signed(entry, entry["metric"]))
        if relative:
            cells.append(cell(entry.get("relative"), _percent(entry.get("relative"))))
        if p:
            cells.append(_chance(entry.get("p")))
        lines.append(f'<tr>{"".join(cells)}<td class="reading">{escape(reading(entry))}</td></tr>')
    headers = [("metric", False), ("a", False), ("b", False), (f"a {MINUS} b", True)]
    headers += [("relative", True)] * relative + [("p", True)] * p + [("in words", False)]
    return (
        '<p class="how">How to read this: both models are compared on the same images (paired); where the '
        "95% interval includes 0, the data do not tell them apart.</p>" + table(headers, lines)
    )


def gains_table(gains: list[dict]) -> str:
    """Choosing among candidates against one sample, absolute and relative: Table 1 of arXiv 2212.12249."""
    if not gains:
        return ""
    lines = []
    for entry in gains:
        metric = entry["metric"]
        cells = [f'<td class="name">{escape(entry[name])}</td>' for name in ("b", "a", "metric")]
        cells += [cell(entry.get(name), number(entry.get(name), metric)) for name in ("b_value", "a_value")]
        relative = entry.get("relative")
        cells += [_signed(entry, metric), cell(relative, _percent(relative)), _chance(entry.get("p"))]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    headers = [("sampled", False), ("chosen", False), ("metric", False), ("sampled ", True), ("chosen ", True)]
    headers += [("gain", True), ("relative", True), ("p", True)]
    return (
        '<p class="how">How to read this: what the candidate that is kept gains over one sample of the same model, the '
        "paper's Table 1; brackets hold the 95% interval of the paired bootstrap.</p>" + table(headers, lines)
    )


def trends_table(curves: list[dict]) -> str:
    """The slopes of the rank curves."""
    lines = []
    for curve in curves:
        if not curve.get("trend"):
            continue
        entry, metric = curve["trend"], curve["metric"]
        cells = [f'<td class="name">{escape(curve[name])}</td>' for name in ("model", "selection", "metric")]
        lines.append(
            f"<tr>{''.join(cells)}{_signed(entry, metric, 2 if is_percentage(metric) else 4)}{_chance(entry['p'])}</tr>"
        )
    if not lines:
        return ""
    headers = [("model", False), ("ranked by", False), ("metric", False), ("per rank", True), ("p", True)]
    return (
        '<p class="how">How to read this: the mean slope of the metric along the ranks; below 0, what ranks higher is '
        "better.</p>" + table(headers, lines)
    )


def correlations_table(correlations: list[dict]) -> str:
    """How the scores go together with the metrics."""
    if not correlations:
        return ""
    kinds = ("pearson", "spearman", "within")
    lines = []
    for entry in correlations:
        cells = [f'<td class="name">{escape(entry[name])}</td>' for name in ("model", "selection", "metric")]
        cells += [_signed(entry[kind], "", 2) for kind in kinds]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    headers = [("model", False), ("score", False), ("metric", False), ("Pearson", True), ("Spearman", True)]
    return (
        '<p class="how">How to read this: correlation of a score and a metric over all candidates, and of their '
        "deviations from the means of each one's siblings, which is what choosing lives on.</p>"
        + table([*headers, ("within", True)], lines)
    )


def _signed(entry: dict, metric: str, places: int | None = None) -> str:
    value = entry["value"]
    if value is None:
        return cell(None, NONE)
    text = ("+" if value > 0 else "") + number(value, metric, places)
    if bounds := limits(entry, metric):
        low, high = bounds if places is None else (number(entry[k], metric, places) for k in ("low", "high"))
        text += f"<small>[{low}, {high}]</small>"
    return cell(value, text)


def _percent(ratio: float | None) -> str:
    return NONE if ratio is None else f"{100 * ratio:+.1f}%".replace("-", MINUS)


def _chance(p: float | None) -> str:
    return cell(p, escape(NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"))
