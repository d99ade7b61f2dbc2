"""Images a second of the training loader against decoding and resizing the same bytes alone.

    python -m benchmarks.loader

Uses `--shards` where given, else a folder of real photographs beside the project where there is one, else
generated JPEGs.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from cyclefit.data import Sample, ShardData, folder_source, write_shards
from cyclefit.data.read import IMAGES, _raw_samples, decode_image, expand_shards

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"


def photographs(folder: Path) -> str:
    """Shards of the photographs, or of as many generated JPEGs of their size."""
    if PHOTOS.is_dir():
        samples = folder_source(PHOTOS)
    else:
        rng = np.random.default_rng(0)
        blurred = (rng.integers(0, 255, (12, 18, 3), np.uint8) for _ in range(108))
        pictures = [Image.fromarray(small).resize((384, 256), Image.Resampling.BICUBIC) for small in blurred]
        files = [io.BytesIO() for _ in pictures]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file, "jpeg", quality=90)
        samples = (Sample(str(n), file.getvalue(), ["a picture"]) for n, file in enumerate(files))
    write_shards(samples, folder, samples_per_shard=27, progress=False)
    return str(folder)


def decoding(images: list[bytes], size: int, number: int) -> float:
    """Images a second of `decode_image` alone."""
    start = time.perf_counter()
    for n in range(number):
        decode_image(images[n % len(images)], size)
    return number / (time.perf_counter() - start)


def loading(data: ShardData) -> float:
    """Images a second of one epoch of the training loader, from its second batch on."""
    loader = iter(data.train_dataloader())
    next(loader)  # starts the workers and fills the shuffle buffer
    start = time.perf_counter()
    number = sum(len(batch) for batch in loader)
    return number / (time.perf_counter() - start)


def main() -> None:
    """Print a table: the medians over rounds in which all are measured one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="shards to read instead")
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--images", type=int, default=320, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or photographs(Path(folder) / "shards")
        raw = [sample for url in expand_shards(shards) for sample in _raw_samples(url, lambda *record: None)]
        images = [sample[extension] for sample in raw for extension in IMAGES if extension in sample]
        rates: dict[str, list[float]] = {"decoding alone": [], "loader, 0 workers": [], "loader, 1 worker": []}
        for number in range(args.rounds):
            rates["decoding alone"].append(decoding(images, args.image_size, args.images))
            for workers, name in enumerate(("loader, 0 workers", "loader, 1 worker")):
                data = ShardData(
                    shards,
                    image_size=args.image_size,
                    batch_size=args.batch_size,
                    epoch_size=args.images + args.batch_size,
                    num_workers=workers,
                    seed=number,
                )
                rates[name].append(loading(data))
    table = Table(title=f"{len(images)} images, {args.image_size} px, median of {args.rounds} rounds")
    for column in ("", "images/s", "of decoding"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in rates.items():
        # The ratio within a round, so that a busy moment of the machine weighs on both of its sides.
        ratio = statistics.median(v / d for v, d in zip(values, rates["decoding alone"], strict=True))
        table.add_row(name, f"{statistics.median(values):.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
