"""The page of a comparison of runs."""

from html import escape
from pathlib import Path

from cyclefit.files import write_atomic
from cyclefit.report.figures import comparison, metric_names, render
from cyclefit.report.html import TABLE_ONLY, assemble, panels, slug
from cyclefit.report.tables import cell, count, differences_table, main_table, table

CALLS = {"captions": ("generator calls", "image"), "images": ("images drawn", "prompt")}


def write_page(content: dict, folder: Path) -> Path:
    """Writes `comparison.html` and its figures into `folder`; the numbers are those of `comparison.json`."""
    sections, contents = [], []
    for place, entry in enumerate(content["evaluations"]):
        anchor, title = f"evaluation-{place}", f"{entry['kind'].capitalize()}: {entry['split']}"
        sections.append(_evaluation(entry, folder, anchor, title))
        contents.append(f'<div><a href="#{anchor}">{escape(title)}</a></div>')
    first = content["runs"][0]["run"]
    summary = (
        f"<p>{len(content['runs'])} runs. Differences are from <b>{escape(first)}</b>, on the same inputs, with 95% "
        "intervals.</p>"
    )
    sections.insert(0, f'<section id="runs"><h2>Runs</h2>{_runs(content["runs"])}</section>')
    page = assemble(
        "Comparison of runs", "", summary, '<div><a href="#runs">Runs</a></div>' + "".join(contents), sections
    )
    path = folder / "comparison.html"
    write_atomic(path, page)
    return path


def _runs(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
    lines = []
    for row in rows:
        cells = [
            cell(row.get(name), count(row.get(name)))
            if number
            else f'<td class="name">{escape(str(row.get(name, "")))}</td>'
            for name, number in zip(columns, numeric, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    how = '<p class="how">How to read this: a run each row; the settings are those in which the runs differ.</p>'
    return how + table(list(zip(columns, numeric, strict=True)), lines)


def _evaluation(entry: dict, folder: Path, anchor: str, title: str) -> str:
    models = {name: model | {"color_index": place} for place, (name, model) in enumerate(entry["models"].items())}
    rows = [{"decoding": ""} | row for row in entry["rows"]]
    figures = []
    for metric in metric_names(rows):
        if metric.split(" (")[0] in TABLE_ONLY:
            continue
        name = f"{entry['kind']}-{entry['split']}-{slug(metric)}"
        data = [{k: row[k] for k in ("model", "decoding")} | row["metrics"].get(metric, {}) for row in rows]
        drawn = render(
            folder / "figures" / name, name, f"{metric} of every run", comparison, rows, metric, models, data=data
        )
        figures.append(drawn)
    differences = [
        {k: v for k, v in row.items() if k != "decoding"}
        | (
            {side: f"{row[side]} \N{MIDDLE DOT} {row['decoding']}" for side in ("a", "b")}
            if row.get("decoding")
            else {}
        )
        for row in (*entry["over_seeds"], *entry["differences"])
    ]
    calls, item = CALLS[entry["kind"]]
    parts = [
        f'<section id="{anchor}"><h2>{escape(title)} <small>{entry["num_images"]} {item}s</small></h2>',
        main_table(rows, models, entry["split"], calls, item, "comparison.csv"),
        f"<h3>Differences</h3>{differences_table(differences)}" if differences else "",
        f"<h3>Figures</h3>{panels('one dot per run and decoding with its 95% interval.', figures)}",
        "</section>",
    ]
    return "\n".join(parts)
