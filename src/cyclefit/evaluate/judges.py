"""Judges on trial: how often each one finds what is true of an image among hard negatives, and at what cost."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from cyclefit import UserError
from cyclefit.config.ranges import Count, Seed
from cyclefit.config.start import command_line
from cyclefit.data.hard_negatives import Benchmark, Example, load_image
from cyclefit.digests import digest
from cyclefit.evaluate.common import CandidateFile, launch, machine
from cyclefit.judges import ImageText, Judge, Partners, Sum, check_complete, check_judge
from cyclefit.metrics.statistics import bootstrap_interval
from cyclefit.models import Captioner, Generator, Scorer
from cyclefit.models.pretrained import freeze
from cyclefit.progress import progress_bar
from cyclefit.records import Candidate, Estimate, Row, Settings
from cyclefit.report.judges import Trial, write_trials
from cyclefit.report.tables import COSTS
from cyclefit.rerank import sample_seed

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Leaves = dict[str, tuple[Judge, Partners]]
"""Judges that are no sums, with their partners, by name."""


def judges(
    benchmarks: dict[str, Benchmark],
    judges: dict[str, Judge] | None = None,
    scorers: dict[str, Scorer] | None = None,
    generator: Generator | None = None,
    captioner: Captioner | None = None,
    out: str = "runs/judges",
    image_size: Count = 512,
    batch_size: Count = 32,
    limit: Count | None = None,
    seed: Seed = 0,
    devices: Count = 1,
    num_nodes: Count = 1,
) -> int:
    """Measures how often judges of captions put what is true of an image above hard negatives.

    Writes `metrics.json`, `candidates-BENCHMARK.jsonl` with every score, `table-BENCHMARK.csv`, figures and
    `report.html` into `out`. Interrupted, it goes on where it stopped.

    Args:
        benchmarks: the hard negatives by name.
        judges: the judges by name.
        scorers: by name; each is itself a judge, by its similarity of image and text, and the first one is the scorer
            of the other judges.
        generator: of judges that need one.
        captioner: of judges that need one.
        out: the folder of the results.
        image_size: side of the images.
        batch_size: examples that are scored together; no influence on the results.
        limit: examples of each kind, all if not given.
        seed: of the judges' noise.
        devices: GPUs of a node, or processes without one; no influence on the results.
        num_nodes: nodes.

    """
    started = time.perf_counter()
    scorers = scorers or {}
    partners = Partners(generator, next(iter(scorers.values()), None), captioner)
    on_trial: Leaves = {name: (ImageText(), Partners(scorer=scorer)) for name, scorer in scorers.items()}
    if twice := on_trial.keys() & (judges or {}).keys():
        raise UserError(f"a judge and a scorer are both called {min(twice)}: rename one")
    on_trial |= {name: (judge, partners) for name, judge in (judges or {}).items()}
    leaves = {leaf: (of, own) for name, (judge, own) in on_trial.items() for leaf, of in _leaves(name, judge)}
    _check(leaves)
    fabric = launch(devices, num_nodes)
    of_model = cache(digest)
    depends = {
        name: {"seed": seed, "image_size": image_size, "judge": digest(judge)}
        | {partner: of_model(getattr(own, partner)) for partner in judge.needs}
        for name, (judge, own) in leaves.items()
    }
    own = [scorer for judge, _ in leaves.values() if (scorer := getattr(judge, "scorer", None)) is not None]
    for model in (generator, captioner, *scorers.values(), *own):
        if model is not None:
            freeze(model.to(fabric.device))
            model.half_on_gpu()

    scoring, files, chosen = Scoring(leaves, partners, fabric, image_size, batch_size, seed), {}, {}
    for name, benchmark in benchmarks.items():
        images = _digest_of_examples(benchmark.examples)
        settings = Settings("judges", name, next(iter(scorers), ""), seed, images,
                            {judge: {"images": images} | of for judge, of in depends.items()})  # fmt: skip
        files[name] = CandidateFile(Path(out), name, settings, fabric)
        chosen[name] = [example for of in _by_kind(benchmark.examples).values() for example in of[:limit]]
        scoring.run(files[name], chosen[name], benchmark.examples)
    fabric.barrier()
    if not fabric.is_global_zero:
        return 0

    trials = {}
    for name, file in files.items():
        file.merge(leaves, list(map(_key, chosen[name])))
        trials[name] = _trial(chosen[name], file.candidates, on_trial)
    metadata = {
        "seed": seed,
        "image size": image_size,
        "devices": devices * num_nodes,
        "machine": machine(),
        "created": date.today().isoformat(),
        "commands": [command_line()],
        "seconds": round(time.perf_counter() - started),
    }
    page = write_trials(Path(out), trials, {name: judge.describe() for name, (judge, _) in on_trial.items()}, metadata)
    _print(trials)
    print(f"report: {page}")
    return 0


def _leaves(name: str, judge: Judge) -> Iterator[tuple[str, Judge]]:
    """The judges that a judge consists of, which are scored one by one: a sum's scale would depend on the batch."""
    if not isinstance(judge, Sum):
        yield name, judge
        return
    for part, of in zip(judge.names, judge.judges, strict=True):
        yield from _leaves(f"{name}: {part}", of)


def _check(leaves: Leaves) -> None:
    if not leaves:
        raise UserError("there is no judge: set judges, or scorers, each of which is a judge")
    for name, (judge, partners) in leaves.items():
        check_judge(judge, "captions", f"judges.{name}")
        check_complete(judge, f"judges.{name}")
        for partner in judge.needs:
            if getattr(partners, partner) is None:
                key = "scorers" if partner == "scorer" else partner
                raise UserError(f"judges.{name}: {type(judge).__name__} needs a {partner}: set {key}")
        judge.check(partners)


def _digest_of_examples(examples: list[Example]) -> str:
    """A hash of the texts and images; of a file its name and size stand for it."""
    return digest(
        [
            [one.kind, one.key, one.texts, one.counted, one.box,
             [[image.name, image.stat().st_size] if isinstance(image, Path) else image for image in one.images]]
            for one in examples
        ]
    )  # fmt: skip


def _key(example: Example) -> str:
    return f"{example.kind}/{example.key}"


def _by_kind(examples: list[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.kind, []).append(example)
    return found


@dataclass
class Scoring:
    """Scores examples with every judge, in batches that have no influence on the scores."""

    judges: Leaves
    partners: Partners
    fabric: "Fabric"
    image_size: int
    batch_size: int
    seed: int

    def run(self, file: CandidateFile, examples: list[Example], everything: list[Example]) -> None:
        """Appends the scores of this rank's batches that the file does not have yet.

        Images to contrast with are the next ones of the same kind in `everything`.
        """
        done, rank = {name: file.done(name) for name in self.judges}, self.fabric.global_rank
        self.pools = _by_kind(everything)
        self.places = {_key(one): place for of in self.pools.values() for place, one in enumerate(of)}
        with progress_bar(rank) as progress:
            task = progress.add_task(file.split, total=len(examples))
            for number, batch in enumerate(self._batches(examples)):
                groups: dict[tuple[int, ...], list[str]] = {}
                for name in self.judges if number % self.fabric.world_size == rank else ():
                    todo = tuple(i for i, one in enumerate(batch) if _key(one) not in done[name])
                    groups.setdefault(todo, []).append(name)
                for todo, names in groups.items():
                    if todo:
                        file.append(self._score([batch[i] for i in todo], names, file.folder))
                progress.update(task, advance=len(batch))

    def _batches(self, examples: list[Example]) -> Iterator[list[Example]]:
        """Examples with as many images and texts, together."""
        for _, alike in groupby(examples, key=lambda one: (len(one.images), len(one.texts))):
            while batch := list(islice(alike, self.batch_size)):
                yield batch

    @torch.no_grad()
    def _score(self, examples: list[Example], names: Sequence[str], folder: Path) -> list[Candidate]:
        count = len(examples[0].images)
        images = self._load([(image, one.box) for one in examples for image in one.images])
        texts = [one.texts for one in examples for _ in one.images]
        seeds = [sample_seed(one.key, self.seed) for one in examples for _ in one.images]
        contrasts = {0: None}
        for number in {self.judges[name][0].num_others for name in names} - {0}:
            others = [picture for one in examples for _ in one.images for picture in self._others(one, number)]
            contrasts[number] = self._load(others).unflatten(0, (len(images), number))
        found, longest = [], {}
        with self.partners.sharing():
            for name in names:
                judge, partners = self.judges[name]
                score, start = judge.score_across if count > 1 else judge.score, time.perf_counter()
                scores = score(partners, images, texts, seeds, contrasts[judge.num_others]).float().cpu()
                seconds = time.perf_counter() - start
                if judge.basis is not None:  # alone, each would take as long as the one that computed what they share
                    seconds = longest[judge.basis] = max(seconds, longest.get(judge.basis, 0.0))
                for place, one in enumerate(examples):
                    rows = scores[place * count : (place + 1) * count].tolist()
                    found += self._candidates(one, name, rows, seconds / scores.numel(), folder)
        return found

    def _candidates(
        self, one: Example, name: str, scores: list[list[float]], seconds: float, folder: Path
    ) -> Iterator[Candidate]:
        """A line for each image and text, image by image."""
        for place, (image, row) in enumerate(zip(one.images, scores, strict=True)):
            for number, (text, score) in enumerate(zip(one.texts, row, strict=True)):
                right = number == place if len(scores) > 1 else number < len(one.right)
                yield Candidate(
                    key=_key(one),
                    model=name,
                    index=place * len(row) + number,
                    caption=text,
                    of=len(scores) * len(row),
                    scores={name: score},
                    metrics={"right": int(right)},
                    seconds={name: seconds},
                    noise_seed=sample_seed(one.key, self.seed),
                    image=os.path.relpath(image, folder) if isinstance(image, Path) else None,
                )

    def _load(self, pictures: list[tuple]) -> torch.Tensor:
        loaded = {picture: load_image(picture[0], self.image_size, picture[1]) for picture in dict.fromkeys(pictures)}
        return torch.stack([loaded[picture] for picture in pictures]).to(self.fabric.device)

    def _others(self, example: Example, number: int) -> list[tuple]:
        pool, place = self.pools[example.kind], self.places[_key(example)]
        following = (pool[(place + k) % len(pool)] for k in range(1, len(pool)))
        found = list(islice(((o.images[0], o.box) for o in following if o.images[0] not in example.images), number))
        if len(found) < number:
            raise UserError(
                f"contrasting with {number} other images needs more than the {len(found)} others of {example.kind}"
            )
        return found


def _trial(examples: list[Example], candidates: list[Candidate], on_trial: Leaves) -> Trial:
    """The table of a benchmark."""
    by_key, rows = {_key(one): one for one in examples}, []
    scores: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for one in candidates:
        scores.setdefault(one.model, {}).setdefault(one.key, []).append(one.scores[one.model])
        seconds.setdefault(one.model, []).append(one.seconds[one.model])
    shaped = {
        leaf: [np.reshape(values, (len(by_key[key].images), -1)) for key, values in of.items()]
        for leaf, of in scores.items()
    }
    kinds = _by_kind(examples)
    kinds |= {"all": examples} if len(kinds) > 1 else {}
    chance, counts = {}, {}
    for name, (judge, partners) in on_trial.items():
        total = dict(zip(by_key, _total(name, judge, shaped), strict=True))
        correct = {key: by_key[key].correct(of.tolist()) for key, of in total.items()}
        accuracies = {}
        for kind, of in kinds.items():
            for score in of[0].chance:
                label = ", ".join(filter(None, (kind, score)))
                accuracies[label] = Estimate(*bootstrap_interval([100.0 * correct[_key(one)][score] for one in of]))
                chance[label] = float(np.mean([one.chance[score] for one in of]))
                counts[label] = len(of)
        leaves = list(_leaves(name, judge))
        cost = np.mean([[_cost(of, partners, one) for one in examples] for _, of in leaves], 1).sum(0)
        taken = sum(float(np.median(seconds[leaf])) for leaf, _ in leaves)  # the first batch warms up
        rows.append(Row(name, accuracies, "", "", *map(float, cost), taken))
    return Trial(rows, chance, counts)


def _total(name: str, judge: Judge, scores: dict[str, list[np.ndarray]]) -> list[np.ndarray]:
    """A judge's scores; a sum's are on a common scale by the spread of each part over all examples."""
    if not isinstance(judge, Sum):
        return scores[name]
    total = 0
    weights = judge.weights or [1.0] * len(judge.judges)
    for part, of, weight in zip(judge.names, judge.judges, weights, strict=True):
        found = _total(f"{name}: {part}", of, scores)
        around = np.concatenate([(one - one.mean(1, keepdims=True)).ravel() for one in found])
        scaled = np.concatenate([one.ravel() for one in found]) * weight / (np.sqrt(np.mean(around**2)) + 1e-12)
        total = total + scaled
    edges = np.cumsum([one.size for one in found])[:-1]
    return [flat.reshape(one.shape) for flat, one in zip(np.split(total, edges), found, strict=True)]


def _cost(judge: Judge, partners: Partners, example: Example) -> tuple[float, float]:
    """Generated images and denoiser calls for each pair of image and text."""
    texts = len(example.texts)
    compared = len(example.images) > 1 and judge.baseline is not None
    cost = judge.cost(partners, texts + compared)
    return cost["generator_calls"] / texts, cost["denoiser_calls"] / texts


def _print(trials: dict[str, Trial]) -> None:
    """Prints a table of each benchmark with a column for each judge."""
    console = Console()
    for name, trial in trials.items():
        console.width = max(console.width, 50 + 19 * len(trial.rows))
        table = Table(
            Column("kind", no_wrap=True), title=f"{name}: accuracy in percent [95 %]; cost per image and text"
        )
        for title in ("examples", "chance", *(row.model for row in trial.rows)):
            table.add_column(title, justify="right")
        for kind, chance in trial.chance.items():
            found = (row.metrics[kind] for row in trial.rows)
            cells = (f"{of.value:.1f} [{of.low:.0f}, {of.high:.0f}]" for of in found)
            table.add_row(kind, str(trial.examples[kind]), f"{chance:.1f}", *cells)
        table.add_section()
        for cost in COSTS:
            table.add_row(cost.replace("_", " "), "", "", *(f"{getattr(row, cost):.3g}" for row in trial.rows))
        console.print(table)
