"""Streams of batches from shards: a seeded, resumable one for training and one exact pass for evaluation."""

import logging
import os
import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, groupby, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cyclefit import UserError
from cyclefit.batch import Batch, Stack

from .samples import BadSample, BadSamples, UnusableData, decode
from .shards import expand_shards, is_remote, is_text, raw_samples

log = logging.getLogger("cyclefit.data")

_MOST_TRIES = 1000


@dataclass
class _Report:
    """What a worker has to say beside a batch; the main process counts, warns and raises."""

    seen: int = 0
    records: list[tuple[str, str, str]] = field(default_factory=list)
    remark: str | None = None
    error: str | None = None

    def add(self, other: "_Report") -> None:
        """Takes over what another stream of the same worker has to say."""
        self.seen += other.seen
        self.records += other.records
        self.remark, self.error = self.remark or other.remark, self.error or other.error


def _name(sample: dict) -> tuple[str, str]:
    return sample["__key__"], sample["__url__"]


@dataclass(eq=False)
class _Stream(IterableDataset):
    """Batches of one rank, each with a report."""

    urls: list[str]
    decoding: dict
    """Arguments of `samples.decode`."""
    batch_size: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[tuple[Batch | None, _Report]]:
        info = get_worker_info()
        self._report = _Report()
        try:
            for parts in self._batches(*((info.id, info.num_workers) if info else (0, 1))):
                yield self._batch(parts)
        except UnusableData as error:
            self._report.error = str(error)
            yield self._batch(())

    def _note(self, reason: str, key: str, shard: str) -> None:
        self._report.records.append((reason, key, shard))

    def _decoded(self, sample: dict, rng: random.Random | None = None) -> tuple | None:
        """The parts of a sample, None for a bad one; counted."""
        self._report.seen += 1
        try:
            return decode(sample, rng, **self.decoding)
        except BadSample as bad:
            self._note(str(bad), *_name(sample))
            return None

    def _batch(self, parts: Iterable[tuple]) -> tuple[Batch | None, _Report]:
        """The batch with its images as bytes, a quarter of the memory of floats."""
        images, beaten, rows = Stack(self.batch_size), Stack(self.batch_size), []
        for image, *rest, rejected_image in parts:
            images.add(image)
            beaten.add(rejected_image)
            rows.append(rest)
        report, self._report = self._report, _Report()
        if not rows:
            return None, report
        captions, references, keys, latents, facts, rejected = map(list, zip(*rows, strict=True))
        latents = None if latents[0] is None else torch.from_numpy(np.stack(latents))
        facts, rejected = facts if any(facts) else None, None if rejected[0] is None else rejected
        return Batch(images.made(), captions, references, keys, latents, facts, rejected, beaten.made()), report


class _ShuffleBuffer:
    """Encoded samples in random order; none appears twice within `apart` draws unless alone."""

    def __init__(self, samples: Iterator[dict], size: int, apart: int, rng: random.Random):
        self.samples, self.size, self.rng = samples, size, rng
        self.held: list[dict] = []
        self.names: set[tuple[str, str]] = set()
        self.drawn: deque[dict] = deque(maxlen=apart)
        self.waiting: dict | None = None

    def draw(self) -> dict:
        # In a small data set the next pass begins before all of this one is drawn. A sample then waits until
        # its last visit is over, so that visits stay even and no batch holds it twice.
        while len(self.held) < self.size:
            self.waiting = self.waiting or next(self.samples)
            name = _name(self.waiting)
            if self.held and (name in self.names or name in map(_name, self.drawn)):
                break
            self.held.append(self.waiting)
            self.names.add(name)
            self.waiting = None
        index = self.rng.randrange(len(self.held))
        self.held[index], self.held[-1] = self.held[-1], self.held[index]
        sample = self.held.pop()
        self.names.remove(_name(sample))
        self.drawn.append(sample)
        return sample


@dataclass(eq=False)
class TrainStream(_Stream):
    """An epoch's batches from batch `start` on; their order depends on nothing but the fields and the worker.

    Batch j belongs to worker j mod W, which draws from a stream of its own: the shards, shuffled for all, are
    dealt out to ranks and workers (with fewer shards than workers each reads all, in its own order), shuffled
    and dealt out again when a worker is through. The n-th place of a batch is the n-th draw from the shuffle
    buffer; where that sample is bad another one of the buffer stands in. So batch j is known without decoding
    the batches before it.
    """

    seed: int | str
    batches: int
    """In an epoch."""
    shuffle_buffer: int
    """Encoded samples in each worker, at least a batch."""
    epoch: int = 0
    start: int = 0
    beside: dict[str, "TrainStream"] = field(default_factory=dict)
    """Streams of as many batches, by the field of this stream's batch that each batch of them goes into."""

    def go_to(self, epoch: int, start: int) -> None:
        """Sets the position at which the next iteration begins."""
        for stream in (self, *self.beside.values()):
            stream.epoch, stream.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Batch | None, _Report]]:
        others = {name: iter(stream) for name, stream in self.beside.items()}
        for batch, report in super().__iter__():
            for name, batches in others.items():
                part, its_report = next(batches, (None, _Report()))
                report.add(its_report)
                if batch is not None:
                    setattr(batch, name, part)
            yield batch, report

    def _batches(self, worker: int, workers: int) -> Iterator[Iterable[tuple]]:
        worker = (worker + self.start) % workers
        lot, lots = self.rank * workers + worker, self.ranks * workers
        name = f"{self.seed} {self.epoch} {self.rank} {worker}"
        self._unfinished: str | None = None
        samples, rng = self._samples(lot, lots), random.Random(f"{name} buffer")
        buffer = _ShuffleBuffer(samples, self.shuffle_buffer, self.batch_size, rng)
        for j in range(worker, self.batches, workers):
            if j >= self.start:
                yield self._parts(buffer, lot, lots, f"{name} {j}", last=j + workers >= self.batches)
                continue
            for _ in range(self.batch_size):
                buffer.draw()
            self._report = _Report()

    def _parts(self, buffer: _ShuffleBuffer, lot: int, lots: int, name: str, last: bool) -> Iterator[tuple]:
        for place in range(self.batch_size):
            sample, rng = buffer.draw(), random.Random(f"{name} {place}")
            yield self._decoded(sample, rng) or self._stand_in(buffer, lot, lots, rng)
        if last and self._unfinished:
            self._report.remark = (
                f"an epoch ends within its first shard, {self._unfinished}: of shards this long "
                "only the beginning is seen; raise epoch_size, lower num_workers or make shorter shards."
            )

    def _stand_in(self, buffer: _ShuffleBuffer, lot: int, lots: int, rng: random.Random) -> tuple:
        # From the buffer, which is the same whatever was bad before; where all of it is bad, from a stream of
        # its own. Not counted: beside a bad sample others are often bad too.
        tried = BadSamples(1)
        held = rng.sample(buffer.held, len(buffer.held))
        samples = chain(held, self._samples(lot, lots, f" {rng.random()}"))
        for sample in islice(samples, len(held) + _MOST_TRIES):
            try:
                return decode(sample, rng, **self.decoding)
            except BadSample as bad:
                tried.add(1, [(str(bad), *_name(sample))])
        raise UnusableData(f"{tried.seen} samples in a row cannot be used: {tried.worst()}.")

    def _samples(self, lot: int, lots: int, apart: str = "") -> Iterator[dict]:
        """One of the lots that the shards are dealt into, without end; all shards where `apart` names an order."""
        dealt = len(self.urls) >= lots and not apart
        empty = 0
        for number in count():
            urls = list(self.urls)
            name = f"{self.seed} {self.epoch} {number}" + ("" if dealt else f" {lot}{apart}")
            random.Random(f"{name} shards").shuffle(urls)
            for place, url in enumerate(urls[lot::lots] if dealt else urls):
                samples = raw_samples(url, self._note)
                if number == place == 0:
                    samples = self._entered(url, samples, random.Random(f"{name} {lot} entry"))
                    self._unfinished = url if is_remote(url) else None
                empty += 1
                for sample in samples:
                    empty = 0
                    yield sample
                self._unfinished = None
                if empty > len(self.urls) + 1:
                    bad = BadSamples(1)
                    bad.add(0, self._report.records)
                    what = bad.worst() if bad.reasons else f"{url} and others are empty"
                    raise UnusableData(f"{empty} shards in a row gave no sample: {what}.")

    def _entered(self, url: str, samples: Iterator[dict], rng: random.Random) -> Iterator[dict]:
        # An epoch that always began at a shard's first sample would, if shorter than the shard, never see its
        # end. The length of a remote shard is unknown before it is read: there epochs must be long enough.
        skip = rng.random() * os.path.getsize(url) if os.path.isfile(url) else 0
        for sample in samples:
            if skip <= 0:
                yield sample
            files = [value for name, value in sample.items() if not name.startswith("__")]
            # As a tar lays them out, or as a line.
            skip -= len(files[0]) + 1 if is_text(url) else sum(512 + -(-len(value) // 512) * 512 for value in files)


@dataclass(eq=False)
class EvaluationStream(_Stream):
    """One pass in shard order: sample i belongs to rank i mod R, a rank's batches go round its workers.

    Every worker reads all shards and decodes its own samples only: any number of ranks and workers gets each
    sample exactly once, whatever the number of shards.
    """

    limit: int | None

    def _batches(self, worker: int, workers: int) -> Iterator[Iterable[tuple]]:
        # Every worker meets the same broken shards; one reports them.
        note = self._note if worker == 0 else lambda *record: None
        samples = islice((sample for url in self.urls for sample in raw_samples(url, note)), self.limit)
        batch = None
        for batch, numbered in groupby(enumerate(samples), lambda item: item[0] // self.ranks // self.batch_size):
            if batch % workers == worker:
                own = (sample for number, sample in numbered if number % self.ranks == self.rank)
                yield filter(None, map(self._decoded, own))
        if batch is None:
            raise UnusableData(f"no sample in {', '.join(self.urls[:3])}{' ...' if self.urls[3:] else ''}.")
        yield ()  # what was noted since the last batch


def _outlast_signals(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, Slurm's signals every process of a job; the fit ends in its own time
    # and still needs its batches. SIGTERM is also how the loader ends a worker that hangs: it does so with delay.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class Loader:
    """The batches of a stream, images as bytes; raises UnusableData where too many samples are bad."""

    def __init__(self, stream: IterableDataset, num_workers: int, bad: BadSamples):
        self.stream, self.num_workers, self.bad = stream, num_workers, bad

    def __iter__(self) -> Iterator[Batch]:
        # A generator of its own: the loader would draw its base seed from the model's random state.
        generator = torch.Generator()
        for batch, report in DataLoader(
            self.stream, None, num_workers=self.num_workers, generator=generator, worker_init_fn=_outlast_signals
        ):
            self.bad.add(report.seen, report.records, warn=True)
            self.bad.check()
            if report.remark:
                log.warning("%s", report.remark)
            if report.error:
                raise UnusableData(report.error)
            if batch is not None:
                yield batch


class TrainLoader(Loader):
    """The batches of one rank, epoch after epoch; iterating again goes on where the last iteration stopped.

    The position is (epoch, batches handed out). Within a fit, `batches_done` returns how many batches of its
    epoch Lightning has counted.
    """

    def __init__(self, stream: TrainStream, num_workers: int, bad: BadSamples, batches_done: Callable[[], int | None]):
        super().__init__(stream, num_workers, bad)
        self.batches_done = batches_done
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator: this runs when the first batch is asked for, when Lightning has settled where it is.
        # Its epoch number is of no use: it counts an epoch that max_steps cut short as a whole one.
        done = self.batches_done()
        if done == 0 and self.batch > 0:
            self.epoch, self.batch = self.epoch + 1, 0
        elif done:
            self.batch = done
        self.stream.go_to(self.epoch, self.batch)
        for batch in super().__iter__():
            self.batch += 1
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict:
        """The position, and what the order depends on."""
        names = ("seed", "batch_size", "batches", "shuffle_buffer", "ranks")
        order = {name: getattr(self.stream, name) for name in names}
        order |= {"workers": max(self.num_workers, 1), "shards": len(self.stream.urls)}
        for name, stream in self.stream.beside.items():
            order |= {f"batch_size of {name}": stream.batch_size, f"shards of {name}": len(stream.urls)}
        return {"epoch": self.epoch, "batch": self.batch, "order": order}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position; warn where the data that follow cannot be those of the run that saved it."""
        before, order = state["order"], self.state_dict()["order"]
        names = (k for k in before | order if before.get(k) != order.get(k))
        changed = [f"{k} {before.get(k, 'none')} -> {order.get(k, 'none')}" for k in names]
        if changed:
            log.warning("resuming with another order of the training data: %s.", ", ".join(changed))
        self.epoch, self.batch = state["epoch"], min(state["batch"], len(self))


def evaluation_loader(stream: EvaluationStream, num_workers: int, bad: BadSamples) -> Loader:
    """A loader for one pass; each worker would fetch every remote shard, so one reads those."""
    return Loader(stream, min(num_workers, 1) if any(map(is_remote, stream.urls)) else num_workers, bad)


def evaluation_batches(
    shards: str | list[str],
    *,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    num_workers: int = 0,
    bad: BadSamples | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """One pass in shard order over the first `limit` samples, each with its first caption; centre crop.

    Batches are on the device, images as floats.

    A batch that holds bad samples is smaller by them. `bad` collects what was skipped and says how much may be; a tenth
    unless given.

    Raises:
        FileNotFoundError: a shard or pattern matches nothing.
        UserError: too many of the samples cannot be used, or there are none, or a key appears twice.

    """
    stream = EvaluationStream(expand_shards(shards), {"image_size": image_size}, batch_size, 0, 1, limit)
    loader = evaluation_loader(stream, num_workers, bad or BadSamples(0.1))
    return (batch.to(device) for batch in _unique(loader, shards))


def _unique(batches: Loader, shards: str | list[str]) -> Iterator[Batch]:
    seen: set[str] = set()
    for batch in batches:
        for key in batch.keys:
            if key in seen:
                raise UserError(
                    f"key {key} appears twice in {shards}: results are kept by key, so keys must be unique; pack the "
                    "data again with `python -m cyclefit.data pack`, which names what it leaves out."
                )
            seen.add(key)
        yield batch
