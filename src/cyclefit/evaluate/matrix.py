"""Who understands whom: every captioner with every generator, in both directions: `python evaluate.py matrix`."""

import os
import re
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

from cyclefit import UserError
from cyclefit.config.paths import Folder
from cyclefit.config.ranges import Count, Natural, Seed
from cyclefit.config.start import command_line
from cyclefit.data import Shards, evaluation_batches, expand_shards
from cyclefit.digests import digest_of_shards
from cyclefit.evaluate.cells import counts, directions, print_tables
from cyclefit.evaluate.common import launch, log_tables, machine
from cyclefit.evaluate.round_trips import Made, Member, RoundTrips, Sample
from cyclefit.files import check_names
from cyclefit.metrics.captions import describe
from cyclefit.metrics.reader import SceneReader
from cyclefit.models import Captioner, Decoding, Generator, Scorer
from cyclefit.records import write_json
from cyclefit.report import matrix as page
from cyclefit.runs import load_run, read_run


def parse_part(part: str | None) -> tuple[int, int]:
    """Which of how many parts of the inputs `2/8` is; (1, 1) for None.

    Raises:
        UserError: the text has another form.

    """
    found = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"part must be I/N, the I-th of N parts counted from 1, such as 2/8, not {part!r}")
    return number, count


def part_folder(folder: Path, part: str | None) -> Path:
    """Where the captions and measurements of a part are."""
    return folder / "parts" / "{}-of-{}".format(*parse_part(part))


class Matrix:
    """Evaluates every captioner with every generator: image to caption to image, and prompt to image to caption.

    Captions of a captioner are made once for all generators, images of a generator once for all captioners. Writes
    `metrics.json`, `table-SPLIT.csv`, every image, figures and `report.html` into `out`. Interrupted, it goes on where
    it stopped.

    Args:
        shards: the splits by name. A prompt is the first reference caption of an image.
        captioners: by name; one model at a time is loaded.
        generators: by name.
        scorers: by name, of images, texts or both; the members should not have been trained on them.
        reader: reads the facts of drawn images.
        runs: folders of finetuned models; what a run has finetuned is a member under the name of its folder.
        kinds: labels of members by name, such as `first` and `modern`, to ask whether those of a kind understand each
            other better.
        out: the folder of the evaluation.
        part: `2/8` works on the second of eight parts of the inputs and writes no report; the call without it makes
            what is missing and writes the report.
        image_size: side of the images that are read.
        batch_size: inputs that are worked on together; no influence on the results.
        num_workers: processes that read images.
        limit: inputs of each split, all if not given.
        checkpoint: `last` or `best` of each run.
        max_new_tokens: length limit of captions, which are greedy.
        gallery: inputs of each split shown in the report.
        seed: of the noise.
        devices: GPUs of a node, or processes without one; no influence on the results.
        num_nodes: nodes.

    """

    def __init__(
        self,
        shards: dict[str, Shards],
        captioners: dict[str, Callable[[], Captioner]],
        generators: dict[str, Callable[[], Generator]],
        scorers: dict[str, Callable[[], Scorer]],
        reader: SceneReader | None = None,
        runs: list[Folder] | None = None,
        kinds: dict[str, str] | None = None,
        out: str = "runs/matrix",
        part: str | None = None,
        image_size: Count = 512,
        batch_size: Count = 32,
        num_workers: Natural = 0,
        limit: Count | None = None,
        checkpoint: str = "last",
        max_new_tokens: Count = 30,
        gallery: Natural = 6,
        seed: Seed = 0,
        devices: Count = 1,
        num_nodes: Count = 1,
    ):
        self.shards, self.reader, self.folder = shards, reader, Path(out)
        self.captioners = {name: Member(load) for name, load in captioners.items()}
        self.generators = {name: Member(load) for name, load in generators.items()}
        self.scorers = {name: Member(load) for name, load in scorers.items()}
        self.configs: list[dict] = []
        self._add_runs(runs or [], checkpoint)
        for what in ("captioners", "generators", "scorers"):
            check_names(getattr(self, what), f"{what}: the name")
            if not getattr(self, what):
                raise UserError(f"{what} is empty: name at least one model")
        self.kinds, self.part, members = kinds or {}, part, self.captioners | self.generators
        if unknown := next((name for name in self.kinds if name not in members), None):
            raise UserError(f"kinds.{unknown}: there is no such member; there are {', '.join(members)}")
        self.image_size, self.batch_size, self.num_workers, self.limit = image_size, batch_size, num_workers, limit
        self.decoding, self.gallery, self.seed = Decoding(max_new_tokens=max_new_tokens), gallery, seed
        self.devices, self.num_nodes = devices, num_nodes

    def _add_runs(self, runs: list[str], checkpoint: str) -> None:
        for run in runs:
            config, trained = read_run(Path(run), checkpoint)
            self.configs.append(config)
            name = Path(os.path.abspath(run)).name
            for which, members in (("captioner", self.captioners), ("generator", self.generators)):
                if any(parameter.startswith(f"{which}.") for parameter in trained):
                    if name in members:
                        raise UserError(f"the name of the run {run} is taken by another {which}: rename its folder")
                    members[name] = Member(partial(_model_of_run, Path(run), checkpoint, which))

    def run(self) -> int:
        """Evaluates; returns the exit status."""
        number, parts = parse_part(self.part)
        fabric = launch(self.devices, self.num_nodes)
        trips = RoundTrips(
            self.captioners,
            self.generators,
            self.scorers,
            self.reader,
            self.folder,
            self.decoding,
            self.image_size,
            self.batch_size,
            self.seed,
            Made(part_folder(self.folder, self.part), fabric.global_rank),
            {split: digest_of_shards(expand_shards(urls)) for split, urls in self.shards.items()},
            fabric.device,
            fabric.global_rank,
        )
        own = slice(number - 1 + parts * fabric.global_rank, None, parts * fabric.world_size)
        samples = list(self._read(trips, own))
        trips.make(samples[own])
        fabric.barrier()
        if self.part is None and fabric.is_global_zero:
            trips.made.read()
            self._report(trips, samples)
        return 0

    def _read(self, trips: RoundTrips, own: slice) -> Iterator[Sample]:
        """All samples; the images of this process's own are saved."""
        place = 0
        for split, urls in self.shards.items():
            for batch in evaluation_batches(
                urls,
                image_size=self.image_size,
                batch_size=self.batch_size,
                limit=self.limit,
                num_workers=self.num_workers,
            ):
                facts = batch.facts or [None] * len(batch)
                for image, *known in zip(batch.images, batch.keys, batch.references, facts, strict=True):
                    sample = Sample(split, *known)
                    if place % own.step == own.start and not trips.there(sample, ()):
                        trips.save(image, sample, ())
                    place += 1
                    yield sample

    def _report(self, trips: RoundTrips, samples: list[Sample]) -> None:
        splits = {split: [one for one in samples if one.split == split] for split in self.shards}
        results = page.Matrix(
            {
                split: page.Split(len(of), directions(counts(trips, of), trips, self.kinds))
                for split, of in splits.items()
            },
            created=date.today().isoformat(),
            kinds=self.kinds,
            digests={name: member.digest for name, member in (self.captioners | self.generators).items()},
            metadata={
                **describe(),
                "scorers": ", ".join(self.scorers),
                "seed": self.seed,
                "max_new_tokens": self.decoding.max_new_tokens,
                "machine": machine(),
                "command": command_line(),
            },
        )
        write_json(self.folder / "metrics.json", results)
        shown = {split: [_trip(trips, one) for one in of[: self.gallery]] for split, of in splits.items()}
        path = page.write_page(self.folder, results, shown)
        print_tables(results)
        tables = {f"matrix/{split}": page.table(of) for split, of in results.splits.items()}
        log_tables(tables, self.folder, configs=self.configs, job_type="matrix", config=results.metadata)
        print(f"report: {path}")


def _model_of_run(*run) -> Captioner | Generator:
    return load_run(*run)[0]


def _trip(trips: RoundTrips, sample: Sample) -> page.Trip:
    """What the report shows of an input."""
    return page.Trip(
        sample.key,
        sample.references,
        trips.image_name(sample, ()),
        {
            c: (trips.text(sample, c), {g: trips.image_name(sample, (g, c)) for g in trips.generators})
            for c in trips.captioners
        },
        {
            g: (trips.image_name(sample, (g,)), {c: trips.text(sample, c, (g,)) for c in trips.captioners})
            for g in trips.generators
        },
    )
