"""The report of an evaluation: a folder of numbers, captions and images in, figures and one page out."""

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from cyclefit import UserError
from cyclefit.files import check_names, check_out_file, write_atomic

if TYPE_CHECKING:
    from cyclefit.report.html import Evaluation

__all__ = ["write_report"]


def write_report(folder: Path, *others: Path, out: Path | None = None, title: str | None = None) -> Path:
    """Write the self-contained page of one evaluation, or of evaluations of different kinds, and what belongs to it.

    `figures/` and `table-<split>.csv` are written beside each `metrics.json`, the page into `out`, else into
    `folder`/report.html. Whatever a folder lacks (splits, images, scores, differences) the page leaves out. The CSV
    files hold the numbers of the main tables in the same units, unrounded. Returns the path of the page.

    Raises FileNotFoundError where there is no `metrics.json`, UserError naming the file and the entry where
    one cannot be read, where two evaluations are of the same kind, or where `out` is any file but a report.
    """
    from cyclefit.report.html import is_page, page

    if out is not None:
        check_out_file(Path(out), is_page, "report that this command wrote")
    evaluations = [_read(Path(path)) for path in (folder, *others)]
    kinds: dict[str, Path] = {}
    for evaluation in evaluations:
        if (first := kinds.setdefault(evaluation.results["kind"], evaluation.folder)) != evaluation.folder:
            raise UserError(
                f"{first} and {evaluation.folder} both evaluate {evaluation.results['kind']}: one page holds one "
                "evaluation of each kind; evaluate all runs together."
            )
        for split, content in evaluation.results["splits"].items():
            _write_table(evaluation.folder / f"table-{split}.csv", content["rows"])
            _write_analyses(evaluation.folder, split, content)
    path = Path(out or evaluations[0].folder / "report.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(evaluations, title))
    return path


def _read(folder: Path) -> "Evaluation":
    from cyclefit.report.html import Evaluation

    results = _read_metrics(folder / "metrics.json")
    candidates = {split: _read_candidates(folder / f"candidates-{split}.jsonl", results) for split in results["splits"]}
    references = {split: _read_references(folder / f"references-{split}.json") for split in results["splits"]}
    _add_unlisted_models(results, candidates)
    return Evaluation(folder, results, candidates, references)


def _load(path: Path, text: str, where: str = "") -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = where or f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not valid JSON ({at}: {error.msg}); run the evaluation again.") from None


def _expect(value: object, kind: type | tuple[type, ...], path: Path, where: str) -> None:
    names = {dict: "an object", list: "a list", str: "a text", int: "an integer", (int, float): "a number"}
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise UserError(f"{path}: {where} should be {names[kind]}, not {shown}; run the evaluation again.")


def _expect_estimate(entry: object, path: Path, where: str) -> None:
    """An object with `value` and perhaps `low` and `high`; null, NaN and infinity stand for no number."""
    _expect(entry, dict, path, where)
    if "value" not in entry:
        raise UserError(f"{path}: {where} has no 'value'; run the evaluation again.")
    for name in ("value", "low", "high", "p", "relative"):
        if entry.get(name) is not None:
            _expect(entry[name], (int, float), path, f"{where}.{name}")
            if not math.isfinite(entry[name]):
                entry[name] = None


def _expect_keys(entry: object, names: tuple[str, ...], path: Path, where: str) -> None:
    _expect(entry, dict, path, where)
    for name in names:
        _expect(entry.get(name), str, path, f"{where}.{name}")


def _read_metrics(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"No metrics.json in {path.parent}: give the folder that an evaluation wrote, or run evaluate.py first."
        )
    results = _load(path, path.read_text(encoding="utf-8"))
    _expect(results, dict, path, "the top level")
    for name in ("metadata", "models", "splits"):
        _expect(results.setdefault(name, {}), dict, path, name)
    if results.setdefault("kind", "captions") not in ("captions", "images"):
        raise UserError(f"{path}: kind should be 'captions' or 'images', not {results['kind']!r}.")
    if not results["splits"]:
        raise UserError(f"{path} has no splits: nothing was evaluated, so there is nothing to report.")
    for name, model in results["models"].items():
        _expect(model, dict, path, f"models.{name}")
        if "color_index" in model:
            _expect(model["color_index"], int, path, f"models.{name}.color_index")
    if results.get("verdict") is not None:
        _expect_keys(results["verdict"], ("sentence",), path, "verdict")
    check_names(results["splits"], f"{path}: the split name")
    for split, content in results["splits"].items():
        where = f"splits.{split}"
        _expect(content, dict, path, where)
        lists = ("rows", "differences", "parts", "gains", "rank_curves", "count_curves", "correlations", "failures")
        for name in lists:
            _expect(content.setdefault(name, []), list, path, f"{where}.{name}")
        for i, row in enumerate(content["rows"]):
            at = f"{where}.rows[{i}]"
            _expect_keys(row, ("model",), path, at)
            _expect(row.setdefault("metrics", {}), dict, path, f"{at}.metrics")
            for metric, entry in row["metrics"].items():
                _expect_estimate(entry, path, f"{at}.metrics.{metric}")
            _expect(row.setdefault("facts", {}), dict, path, f"{at}.facts")
            for name in ("generator_calls", "denoiser_calls", "seconds"):
                if row.get(name) is not None:
                    _expect(row[name], (int, float), path, f"{at}.{name}")
            for name, default in (("decoding", ""), ("selection", "single")):
                _expect(row.setdefault(name, default), str, path, f"{at}.{name}")
        for name in ("differences", "gains"):
            for i, difference in enumerate(content[name]):
                at = f"{where}.{name}[{i}]"
                _expect_keys(difference, ("metric", "a", "b"), path, at)
                _expect_estimate(difference, path, at)
                for mean in ("a_value", "b_value") if name == "gains" and difference["value"] is not None else ():
                    _expect(difference.get(mean), (int, float), path, f"{at}.{mean}")
        for name, place in (("rank_curves", "rank"), ("count_curves", "n")):
            for i, curve in enumerate(content[name]):
                at = f"{where}.{name}[{i}]"
                _expect_keys(curve, ("model", "selection", "metric"), path, at)
                _expect(curve.get("values"), list, path, f"{at}.values")
                for j, entry in enumerate(curve["values"]):
                    _expect_estimate(entry, path, f"{at}.values[{j}]")
                    _expect(entry.get(place), int, path, f"{at}.values[{j}].{place}")
                if curve.get("trend") is not None:
                    _expect_estimate(curve["trend"], path, f"{at}.trend")
        for i, entry in enumerate(content["correlations"]):
            at = f"{where}.correlations[{i}]"
            _expect_keys(entry, ("model", "selection", "metric"), path, at)
            for name in ("pearson", "spearman", "within"):
                _expect_estimate(entry.get(name), path, f"{at}.{name}")
        for i, entry in enumerate(content["failures"]):
            at = f"{where}.failures[{i}]"
            _expect_keys(entry, ("model", "selection", "metric"), path, at)
            for name in ("overrated", "underrated"):
                _expect(entry.get(name), list, path, f"{at}.{name}")
                for j, row in enumerate(entry[name]):
                    _expect_keys(row, ("key", "caption"), path, f"{at}.{name}[{j}]")
    return results


def _read_candidates(path: Path, results: dict) -> list[dict]:
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _load(path, line, f"line {number}")
            where = f"line {number}"
            _expect_keys(row, ("key", "model", "caption"), path, where)
            _expect(row.setdefault("decoding", ""), str, path, f"{where}: decoding")
            for name in ("scores", "metrics"):
                values = row[name] = row.get(name) or {}
                _expect(values, dict, path, f"{where}: {name}")
                for key, value in values.items():
                    if value is not None:
                        _expect(value, (int, float), path, f"{where}: {name}.{key}")
                row[name] = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
            if row.get("image") is not None:
                _expect(row["image"], str, path, f"{where}: image")
            rows.append(row)
    return rows


def _read_references(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    references = _load(path, path.read_text(encoding="utf-8"))
    _expect(references, dict, path, "the top level")
    for key, captions in references.items():
        _expect(captions, list, path, key)
        for caption in captions:
            _expect(caption, str, path, key)
    return references


def _add_unlisted_models(results: dict, candidates: dict[str, list[dict]]) -> None:
    """Models that only appear in rows get an entry of their own, so that every model has a colour."""
    models = results["models"]
    for split, content in results["splits"].items():
        for row in content["rows"] + content["rank_curves"] + candidates[split]:
            models.setdefault(row["model"], {})
    for position, model in enumerate(models.values()):
        model.setdefault("color_index", position)


def _write_analyses(folder: Path, split: str, content: dict) -> None:
    """What the page has in tables beside the main one, without change of unit; those of figures lie beside them."""
    from cyclefit.report.figures import write_csv

    correlations = [
        {name: entry[name] for name in ("model", "selection", "metric")}
        | {f"{kind} {end}".removesuffix(" value"): entry[kind].get(end) for kind in ("pearson", "spearman", "within")
           for end in ("value", "low", "high")}
        for entry in content["correlations"]
    ]  # fmt: skip
    failures = [
        {"kind": kind} | {name: found[name] for name in ("model", "selection", "metric")} | row
        for found in content["failures"]
        for kind in ("overrated", "underrated")
        for row in found[kind]
    ]
    trends = [
        {name: curve[name] for name in ("model", "selection", "metric")} | curve["trend"]
        for curve in content["rank_curves"]
        if curve.get("trend")
    ]
    tables = {"differences": content["differences"], "gains": content["gains"], "trends": trends}
    for name, rows in (tables | {"correlations": correlations, "failures": failures}).items():
        if rows:
            write_csv(folder / f"{name}-{split}.csv", rows)


def _write_table(path: Path, rows: list[dict]) -> None:
    from cyclefit.report.figures import metric_names

    metrics = metric_names(rows)
    costs = ("generator_calls", "denoiser_calls", "seconds")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        columns = [name for m in metrics for name in (m, f"{m} low", f"{m} high")]
        table.writerow(["model", "decoding", "selection", *columns, *costs])
        for row in rows:
            cells = [row["model"], row["decoding"], row["selection"]]
            for metric in metrics:
                entry = row["metrics"].get(metric, {})
                values = (entry.get(name) for name in ("value", "low", "high"))
                cells += ["" if v is None else f"{v:.8g}" for v in values]
            table.writerow(cells + [row.get(name, "") for name in costs])
