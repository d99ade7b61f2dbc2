"""What an evaluation writes and others read: its candidates, one to a line, and its results.

`candidates-SPLIT.jsonl` holds `Candidate`s, `metrics.json` an `Evaluation`; nothing else reads or writes either. What
is None by default and None is left out of the files.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from cyclefit import UserError
from cyclefit.files import check_names, write_atomic

Kind = Literal["captions", "images"]
"""What is evaluated: captions of images by captioners, or images of prompts by generators."""
UNITS: dict[Kind, str] = {"captions": "images", "images": "prompts"}
"""What the inputs are."""

GREEDY, BEAM, NUCLEUS = "greedy", "beam", "nucleus"  # decodings of captions
# Selections: one candidate as it comes, the one a judge likes best (the judge's name), or the one the references do.
SINGLE, ORACLE = "single", "oracle"
# Judges by the names of their rows.
IMAGE_CYCLE, TEXT_CYCLE, IMAGE_TEXT = "image cycle", "text cycle", "image-text"
DENOISING, LOG_DENOISING = "denoising", "log denoising"
# Metrics of facts, in percent.
TRUTH, COVERAGE = "truth", "coverage"
FALSE: dict[Kind, str] = {"captions": "false captions", "images": "false images"}  # with at least one false fact


def joined(*parts: str) -> str:
    """The name of a selection of a model, `base · nucleus`, as differences give it; empty parts are left out."""
    return " · ".join(filter(None, parts))


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[int | float | None, BeforeValidator(_finite)]
"""None where there is nothing to compute it from."""


@dataclass
class Candidate:
    """One caption of an image, or one image of a prompt."""

    key: str
    """Of the sample, in its shard."""
    model: str
    index: int
    """Among the candidates of this sample, model and decoding."""
    caption: str
    """The candidate itself, or what the captioner says of the drawn image."""
    of: int
    """How many candidates of the sample and the model there are, under all decodings."""
    scores: dict[str, int | float] = field(default_factory=dict)
    """By judge, higher is better."""
    metrics: dict[str, int | float] = field(default_factory=dict)
    """Against the references, by name."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of making and of each judge, per input."""
    decoding: str = ""
    """Of captions."""
    noise_seed: int | None = None
    """Of captions: of the noise its images are regenerated from."""
    prompt: str | None = None
    """Of images."""
    seed: int | None = None
    """Of images: of the noise it is drawn from."""
    image: str | None = None
    """The drawn or regenerated image, relative to the evaluation's folder."""
    facts: dict | None = None
    """`FactCheck.record` of what the caption, or the prompt of the image, states."""
    rounds: dict[str, int] | None = None
    """By judge that races, how many rounds the candidate was judged in; if not in all, its score only ranks it."""


@dataclass
class Estimate:
    """A mean, or the slope of a trend with its p-value, and its 95 % bootstrap interval."""

    value: Number
    low: Number = None
    high: Number = None
    p: Number = None


@dataclass
class Difference:
    """The paired difference a - b of a metric on the same samples, with its 95 % interval and p-value."""

    metric: str
    a: str
    b: str
    value: Number
    low: Number = None
    high: Number = None
    p: Number = None
    a_value: Number = None
    b_value: Number = None
    relative: Number = None
    """`value` as a share of `b_value`."""


@dataclass
class KindFacts:
    """Facts of one kind: how many are stated per caption, and shares in percent; a share of nothing is None."""

    stated: float
    truth: Estimate | None = None
    coverage: Estimate | None = None


@dataclass
class KindParts:
    """Facts of one kind on both sides of a difference."""

    a_stated: float
    b_stated: float
    truth: Difference | None = None
    coverage: Difference | None = None


@dataclass
class Parts:
    """A difference taken apart by kind of fact and by length."""

    a: str
    b: str
    kinds: dict[str, KindParts]
    words: Difference | None = None


@dataclass
class Row:
    """A row of the table: a model, how it decodes, and which candidate is kept."""

    model: str
    metrics: dict[str, Estimate]
    decoding: str = ""
    selection: str = SINGLE
    generator_calls: int | float | None = None
    """Images drawn per input, to choose a caption or to choose from."""
    denoiser_calls: int | float | None = None
    seconds: float | None = None
    facts: dict[str, KindFacts] | None = None

    @property
    def name(self) -> str:
        """As differences call it: the model, and the judge or, where none chooses, the decoding."""
        return joined(self.model, self.decoding or SINGLE if self.selection == SINGLE else self.selection)


@dataclass
class Analysis:
    """What an analysis is of: a metric of a model's candidates, chosen or ordered by a judge."""

    model: str
    selection: str
    metric: str


@dataclass
class Point(Estimate):
    """The mean at a `rank` (1 the best) with its quartiles over samples, or of the best of `n` candidates."""

    rank: int | None = None
    n: int | None = None
    q1: Number = None
    q3: Number = None


@dataclass
class Curve(Analysis):
    """A metric at each rank by the judge's score, with the trend over ranks, or by the number of candidates."""

    values: list[Point]
    trend: Estimate | None = None


@dataclass
class Correlations(Analysis):
    """How a score and a metric of all candidates go together; `within` samples is what reranking relies on."""

    pearson: Estimate
    spearman: Estimate
    within: Estimate
    candidates: int = 0


@dataclass
class Failure:
    """A candidate on which score and metric disagree, with the shares of candidates that rank below it in each."""

    key: str
    index: int
    caption: str
    score: Number = None
    score_rank: Number = None
    value: Number = None
    value_rank: Number = None


@dataclass
class Failures(Analysis):
    """Candidates with a high score and a low metric (`overrated`), and the reverse."""

    overrated: list[Failure]
    underrated: list[Failure]


@dataclass
class Split:
    """The results of one split."""

    rows: list[Row]
    num_images: int = 0
    differences: list[Difference] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    gains: list[Difference] = field(default_factory=list)
    rank_curves: list[Curve] = field(default_factory=list)
    count_curves: list[Curve] = field(default_factory=list)
    correlations: list[Correlations] = field(default_factory=list)
    failures: list[Failures] = field(default_factory=list)


@dataclass
class Model:
    """What is known of a model: the base, or a run's."""

    description: str = ""
    color_index: int = 0
    steps: int | None = None
    folder: str | None = None
    digest: str | None = None
    """Of the trained parameters."""
    train_seconds: float | None = None


@dataclass
class Finding:
    """Whether one run is better than another, None if undecided, in words."""

    better: bool | None
    sentence: str


@dataclass
class Verdict(Finding):
    """The first run with a cycle against the first without."""

    control: Finding | None = None
    """Against the image-text control."""
    changes: str = ""  # which kinds of fact changed
    hacked: list[Finding] = field(default_factory=list)
    """Runs that are less true while their reward rises."""


@dataclass
class Evaluation:
    """All results of an evaluation."""

    splits: dict[str, Split]
    kind: Kind = "captions"
    title: str = ""
    created: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    judges: dict[str, str] = field(default_factory=dict)
    """What each judge keeps, in words."""
    gallery: int = 24
    """How many samples of each split the report shows."""
    verdict: Verdict | None = None
    format: Literal[1] = 1
    """Raised where an older reader would misread the file."""


@dataclass
class Settings:
    """What the candidates of a split are of, and what each model's depend on, as digests and plain values."""

    kind: Kind | Literal["judges"]
    shards: str | list[str]
    scorer: str
    seed: int
    images: str
    """Digest of the shards."""
    depends: dict[str, dict[str, Any]]
    """By model."""


_adapter = cache(TypeAdapter)


def _read(kind: type, path: Path, text: str, where: str = "") -> Any:
    try:
        return _adapter(kind).validate_python(json.loads(text))
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({where or f'line {error.lineno}, column {error.colno}'}: {error.msg})"
    except ValidationError as error:
        first = error.errors()[0]
        at = ": ".join(filter(None, (where, ".".join(map(str, first["loc"])))))
        reason = f"not written by this version ({at}: {first['msg']})"
    raise UserError(f"{path} is {reason}; run the evaluation again.")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        known = {one.name: (getattr(value, one.name), one.default) for one in fields(value)}
        return {name: _plain(of) for name, (of, default) in known.items() if of is not None or default is not None}
    if isinstance(value, dict):
        return {name: _plain(of) for name, of in value.items()}
    return list(map(_plain, value)) if isinstance(value, list) else value


def candidates_path(folder: Path, split: str) -> Path:
    """Where the candidates of a split are."""
    return folder / f"candidates-{split}.jsonl"


def read_candidates(path: Path) -> list[Candidate]:
    """All candidates of a file, without a last line that was cut off; none where there is no file.

    Raises:
        UserError: a line is not a candidate.

    """
    if not path.is_file():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    found = [_read(Candidate, path, line, f"line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*found, _read(Candidate, path, last)]
    except UserError:
        return found


def write_candidates(path: Path, candidates: Iterable[Candidate]) -> None:
    """Replaces the file."""
    write_atomic(path, "".join(json.dumps(_plain(one)) + "\n" for one in candidates))


def append_candidates(path: Path, candidates: Iterable[Candidate]) -> None:
    """Appends to the file; they are on disk when this returns."""
    with path.open("a") as file:
        file.write("".join(json.dumps(_plain(one)) + "\n" for one in candidates))
        file.flush()
        os.fsync(file.fileno())


def read_evaluation(folder: Path) -> Evaluation:
    """The results in a folder.

    Raises:
        FileNotFoundError: there are none.
        UserError: the file is damaged, of another version, or empty of splits.

    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"No metrics.json in {folder}: name the folder of an evaluation, or run evaluate.py.")
    evaluation = _read(Evaluation, path, path.read_text(encoding="utf-8"))
    if not evaluation.splits:
        raise UserError(f"{path} has no splits: nothing was evaluated, so there is nothing to report.")
    check_names(evaluation.splits, f"{path}: the split name")
    return evaluation


def write_json(path: Path, value: Any) -> None:
    """Writes records, or containers of them, into a file that is either whole or not there."""
    write_atomic(path, json.dumps(_plain(value), indent=1))


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes `metrics.json`."""
    write_json(folder / "metrics.json", evaluation)


def read_settings(folder: Path, split: str) -> Settings | None:
    """The settings of a split; None where its evaluation has not begun."""
    path = folder / f"candidates-{split}.settings.json"
    return _read(Settings, path, path.read_text(encoding="utf-8")) if path.is_file() else None


def write_settings(folder: Path, split: str, settings: Settings) -> None:
    """Writes the settings of a split."""
    write_json(folder / f"candidates-{split}.settings.json", settings)


def read_references(folder: Path, split: str) -> dict[str, list[str]]:
    """The reference captions of a split by key, as evaluated; empty where they were not kept."""
    path = folder / f"references-{split}.json"
    return _read(dict[str, list[str]], path, path.read_text(encoding="utf-8")) if path.is_file() else {}
