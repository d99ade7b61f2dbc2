"""The page of judges on trial."""

from dataclasses import dataclass
from pathlib import Path

from cyclefit.files import write_atomic
from cyclefit.records import Model, Row, write_json
from cyclefit.report import figures
from cyclefit.report.page import render_page
from cyclefit.report.tables import COSTS, write_csv


@dataclass
class Trial:
    """What judges did on one benchmark."""

    rows: list[Row]
    """One for each judge, whose metrics are its accuracies in percent by kind, and its costs per image and text."""
    chance: dict[str, float]
    """The accuracy of random scores in percent, by kind."""
    examples: dict[str, int]
    """Their number by kind."""


def write_trials(folder: Path, trials: dict[str, Trial], judges: dict[str, str], metadata: dict) -> Path:
    """Writes `metrics.json`, a table of each benchmark as CSV, figures and `report.html` into `folder`."""
    write_json(
        folder / "metrics.json", {"kind": "judges", "judges": judges, "benchmarks": trials, "metadata": metadata}
    )
    models = {name: Model(description, place) for place, (name, description) in enumerate(judges.items())}
    drawn = {}
    for name, trial in trials.items():
        write_csv(folder / f"table-{name}.csv", _flat(trial))
        drawn[name] = _figures(folder, name, trial, models)
    page = render_page(
        "judges.html.j2",
        title="Judges on hard negatives",
        byline=[metadata["created"], metadata["machine"]],
        trials=trials,
        models=models,
        figures=drawn,
        commands=metadata["commands"],
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _flat(trial: Trial) -> list[dict]:
    return [
        {"judge": row.model, "kind": kind, "accuracy": of.value, "low": of.low, "high": of.high}
        | {"chance": trial.chance[kind], "examples": trial.examples[kind]}
        | {f"{name} per pair": getattr(row, name) for name in COSTS}
        for row in trial.rows
        for kind, of in row.metrics.items()
    ]


def _figures(folder: Path, benchmark: str, trial: Trial, models: dict[str, Model]) -> list:
    rows = [
        Row(row.model, {"accuracy in percent": of}, kind, "") for row in trial.rows for kind, of in row.metrics.items()
    ]

    def render(name: str, label: str, draw, *inputs, data: list[dict]):
        return figures.render(
            folder / "figures" / f"{benchmark}-accuracy", f"{benchmark}-{name}", label, draw, *inputs, data=data
        )

    return figures.comparisons(render, rows, models)
