"""The training loader on generated shards: its rate, its memory, its shuffling.

    python -m benchmarks.loader [rate] [memory] [order]

The rate is in images a second of a core (of CPU time, all processes counted), beside decoding and resizing the same
bytes alone; both are measured in turns. Memory is that of the process and its workers over many samples. Shuffling is
how alike the source shards of consecutive samples are, beside a perfect shuffle.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cyclefit.data import Sample, ShardData, decode_image, expand_shards, raw_samples, write_shards

CONSOLE = Console(width=120)
TICKS = os.sysconf("SC_CLK_TCK")


def photograph(rng: np.random.Generator, width: int, height: int, quality: int) -> bytes:
    """A JPEG of noise with the spectrum of photographs: octaves that halve in amplitude as they double in frequency."""
    pixels = np.zeros((3, height, width), np.float32)
    for columns in (4 * 2**k for k in range(20) if 8 * 2**k <= width):
        coarse = rng.normal(size=(3, max(columns * height // width, 2), columns)).astype(np.float32) / columns
        pixels += [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse]
    pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0)).save(file, "jpeg", quality=quality)
    return file.getvalue()


def pack(folder: Path, number: int, shards: int, pictures: list[bytes]) -> str:
    """`number` samples, key n the n-th, the pictures over and over."""
    samples = (Sample(f"{n:08d}", pictures[n % len(pictures)], ["a picture"]) for n in range(number))
    write_shards(samples, folder, samples_per_shard=number // shards)
    return str(folder)


def cpu_seconds() -> float:
    """CPU time of this process and its living children."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


def resident() -> list[float]:
    """MB of this process and of each living child."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]


def decoding(images: list[bytes], size: int, number: int) -> tuple[float, float]:
    """Images a second, by the clock and by CPU time, of `decode_image` alone."""
    start, cpu = time.perf_counter(), time.process_time()
    for image in itertools.islice(itertools.cycle(images), number):
        decode_image(image, size)
    return number / (time.perf_counter() - start), number / (time.process_time() - cpu)


def reading(shards: str) -> tuple[float, float]:
    """Samples a second, by the clock and by CPU time, of taking the shards apart without decoding."""
    start, cpu = time.perf_counter(), time.process_time()
    number = sum(1 for url in expand_shards(shards) for _ in raw_samples(url, print))
    return number / (time.perf_counter() - start), number / (time.process_time() - cpu)


def loading(data: ShardData) -> tuple[float, float]:
    """Images a second, by the clock and by CPU time, of one epoch once every worker is busy."""
    marks = [(time.perf_counter(), cpu_seconds()) for _ in data.train_dataloader()]
    # The first batches were prefetched before they were asked for, at the last the workers have ended.
    first, last = 2 * data.num_workers + 1, len(marks) - 2 * data.num_workers - 1
    number = (last - first) * data.batch_size
    return tuple(number / (b - a) for a, b in zip(marks[first], marks[last], strict=True))


def rate(folder: Path, arguments: argparse.Namespace) -> None:
    """Rates with and without workers, many small shards and few large ones."""
    rng = np.random.default_rng(0)
    pictures = [photograph(rng, 640, 480, 95) for _ in track(range(64), "drawing", transient=True)]
    number, size = 2048, arguments.image_size
    layouts = {f"{n} shards": pack(folder / f"{n}", number, n, pictures) for n in (128, 4)}
    rates: dict[str, list[tuple[float, float]]] = {}
    for seed in track(range(arguments.rounds), "rates", transient=True):
        rates.setdefault("decoding alone", []).append(decoding(pictures, size, 320))
        for layout, shards in layouts.items():
            rates.setdefault(f"reading alone, {layout}", []).append(reading(shards))
            for workers in arguments.workers:
                data = ShardData(
                    shards,
                    image_size=size,
                    batch_size=16,
                    epoch_size=16 * (40 + 4 * workers),
                    num_workers=workers,
                    shuffle_buffer=256,
                    seed=seed,
                )
                rates.setdefault(f"{workers} workers, {layout}", []).append(loading(data))
    kilobytes = statistics.mean(map(len, pictures)) / 1e3
    made = Table(
        title=f"JPEGs of 640 x 480, {kilobytes:.0f} kB, loaded at {size} px; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; medians of {arguments.rounds} rounds"
    )
    for column in ("", "images/s", "images/s a core", "of decoding", "range", "MB/s a core"):
        made.add_column(column, justify="right" if column else "left")
    for name, values in rates.items():
        clock, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        # The ratio within a round, so that a busy moment of the machine weighs on both of its sides.
        ratios = [v[1] / d[1] for v, d in zip(values, rates["decoding alone"], strict=True)]
        cells = (f"{clock:.0f}", f"{cpu:.0f}", f"{statistics.median(ratios):.2f}")
        made.add_row(name, *cells, f"{min(ratios):.2f}-{max(ratios):.2f}", f"{cpu * kilobytes / 1e3:.1f}")
    CONSOLE.print(made)


def memory(shards: str, arguments: argparse.Namespace) -> None:
    """Resident memory over one epoch of 100,000 samples."""
    workers, batch_size, number = 2, 100, arguments.samples
    data = ShardData(shards, image_size=32, batch_size=batch_size, epoch_size=number, num_workers=workers)
    seen, sizes, place = [], [], 0
    for batch in track(data.train_dataloader(), "memory", total=number // batch_size, transient=True):
        place += len(batch)
        if place % (number // 10) == 0 or not seen:
            seen.append(place)
            sizes.append(resident())
    made = Table(title=f"Resident MB; shuffle buffer {data.shuffle_buffer}, {workers} workers")
    for column in ("samples", "process", *(f"worker {w}" for w in range(workers))):
        made.add_column(column, justify="right")
    sizes = [row for row in sizes if len(row) == workers + 1]  # at the very end a worker may be gone
    for place, row in zip(seen, sizes, strict=False):
        made.add_row(f"{place:,}", *(f"{size:.1f}" for size in row))
    settled = [k for k in range(len(sizes)) if seen[k] >= number // 5]
    slopes = np.polyfit([seen[k] / number for k in settled], [sizes[k] for k in settled], 1)[0]
    made.add_row(f"growth over {number:,}", *(f"{slope:+.2f}" for slope in slopes), style="bold")
    CONSOLE.print(made)


def likeness(places: np.ndarray, samples_per_shard: int, batch_size: int) -> tuple[float, float, float]:
    """Correlation of the numbers of consecutive source shards, share of equal ones, distinct ones in a batch."""
    shards = places // samples_per_shard
    batches = shards[: len(shards) // batch_size * batch_size].reshape(-1, batch_size)
    distinct = np.mean([len(set(row)) for row in batches.tolist()])
    return np.corrcoef(shards[:-1], shards[1:])[0, 1], np.mean(shards[:-1] == shards[1:]), distinct


def order(layouts: dict[int, str], number: int) -> None:
    """How well source shards are mixed, for many small and few large ones."""
    batch_size = 32
    made = Table(title=f"Source shards of consecutive samples, one rank, batches of {batch_size}")
    for column in ("shards", "samples each", "workers", "buffer", "correlation", "same", "shards in a batch"):
        made.add_column(column, justify="right")
    rng = np.random.default_rng(0)

    def add(count: int, workers: str, buffer: str, places: np.ndarray) -> None:
        correlation, same, distinct = likeness(places, number // count, batch_size)
        cells = (f"{correlation:+.3f}", f"{same:.3f}", f"{distinct:.1f}")
        made.add_row(f"{count}", f"{number // count}", workers, buffer, *cells)

    for count, shards in track(layouts.items(), "order", transient=True):
        for workers, buffer in itertools.product((1, 4), (0, 2000, 10000)):
            data = ShardData(
                shards,
                image_size=16,
                batch_size=batch_size,
                epoch_size=number // 4,
                num_workers=workers,
                shuffle_buffer=buffer,
            )
            places = np.array([int(key) for batch in data.train_dataloader() for key in batch.keys])
            add(count, f"{workers}", f"{buffer}", places)
        add(count, "", "perfect", rng.permutation(number)[: number // 4])
    CONSOLE.print(made)


def main() -> None:
    """Print the tables asked for, all if none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="rate|memory|order", help="all if none is given")
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="of rate")
    parser.add_argument("--samples", type=int, default=100_000, help="of memory and order")
    arguments = parser.parse_args()
    parts = arguments.parts or ["rate", "memory", "order"]
    if unknown := set(parts) - {"rate", "memory", "order"}:
        parser.error(f"{', '.join(unknown)}: not one of rate, memory, order")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, on purpose
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "rate" in parts:
            rate(folder / "rate", arguments)
        if {"memory", "order"} & set(parts):
            rng = np.random.default_rng(0)
            tiny = [photograph(rng, 32, 32, 90) for _ in range(256)]
            with CONSOLE.status("packing"):
                layouts = {n: pack(folder / f"{n}", arguments.samples, n, tiny) for n in (1000, 10)}
            if "memory" in parts:
                memory(layouts[1000], arguments)
            if "order" in parts:
                order(layouts, arguments.samples)


if __name__ == "__main__":
    main()
