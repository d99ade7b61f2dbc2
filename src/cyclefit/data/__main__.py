"""Write and verify shards of images and captions: `python -m cyclefit.data pack|best-of|pairs|export-pairs|verify`."""

import argparse
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from cyclefit.config.start import run

from .hugging_face import find_dataset
from .pack import Sample, find_packed, refuse_existing, verify_shards, write_shards
from .sources import add_objects, coco_source, folder_source, img2dataset_source, nocaps_source, table_source
from .tables import load_json

CHOICES = {
    "best-of": "the best candidates of an evaluation",
    "pairs": "the best and the worst candidates of an evaluation as preference pairs",
}
"""Commands that write some candidates of an evaluation, and what those are."""
TAKES = {
    "folder": "images annotations without_captions",
    "table": "images annotations image_column caption_column",
    "coco": "images annotations split instances",
    "nocaps": "images annotations split",
    "hf": "images split revision image_column caption_column",
    "img2dataset": "images",
    "pairs": "images",
}
"""The options of each source that not all have."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cyclefit data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write shards")
    pack.add_argument("source", choices=list(TAKES))
    pack.add_argument(
        "--images",
        help="folder of images (table: by default the table's; img2dataset: of its shards; hf: or a hub id, ORG/NAME)",
    )
    pack.add_argument(
        "--annotations",
        help="file of captions (table: the csv, tsv, json or jsonl); .txt files beside a folder's images also work",
    )
    pack.add_argument(
        "--split", help="coco: split of Karpathy's file (train+restval for two); nocaps: domain; hf: split"
    )
    pack.add_argument("--revision", help="hf: branch, tag or commit on the hub")
    pack.add_argument("--image_column", help="table, hf: column of images; by default found by its name")
    pack.add_argument("--caption_column", help="table, hf: column of captions; by default found by its name")
    pack.add_argument("--instances", nargs="+", help="COCO's instances_*.json, to store the objects in each image")
    pack.add_argument("--out", required=True, help="folder for the shards; must not contain others")
    pack.add_argument("--samples_per_shard", type=int, default=1000)
    pack.add_argument("--without_captions", action="store_true", help="folder: pack images without captions too")
    pack.add_argument("--limit", type=int, help="pack only this many samples")
    for name, what in CHOICES.items():
        made = commands.add_parser(name, help=f"write {what}, by a judge, as shards")
        made.add_argument("--evaluation", required=True, help="folder written by evaluate.py")
        made.add_argument("--split", required=True, help="split of the evaluation")
        made.add_argument("--shards", help="the evaluated shards, for their images (captions only)")
        made.add_argument("--judge", required=True, help='judge whose scores decide, such as "image cycle"')
        made.add_argument("--out", required=True, help="folder for the shards; must not contain others")
        made.add_argument("--model", default="base", help="model whose candidates are used")
        made.add_argument("--direction", choices=["captions", "images"], default="captions", help="what was evaluated")
        if name == "pairs":
            made.add_argument("--min_margin", type=float, default=0.0, help="least difference of the two scores")
    export = commands.add_parser("export-pairs", help="write pairs as a folder with TRL's or Diffusion-DPO's columns")
    export.add_argument("--shards", required=True, help="shards of pairs")
    export.add_argument("--out", required=True, help="folder for images and metadata.jsonl; must be new or empty")
    verify = commands.add_parser("verify", help="read shards again and check them against their manifest")
    verify.add_argument("folder")
    return parser


def _check_options(args: argparse.Namespace) -> None:
    for option in dict.fromkeys(" ".join(TAKES.values()).split()):
        if getattr(args, option) not in (None, False) and option not in TAKES[args.source].split():
            raise ValueError(f"pack {args.source} takes no --{option}; leave it out.")
    if args.images is None and args.source != "table":
        raise ValueError(f"pack {args.source} needs --images, a folder{' or a hub id' * (args.source == 'hf')}.")
    if args.source in ("coco", "nocaps") and args.annotations is None:
        raise ValueError(f"pack {args.source} needs --annotations, the json of captions.")
    if args.source == "table" and args.annotations is None:
        raise ValueError("pack table needs --annotations, a .csv, .tsv, .json or .jsonl file.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} leaves nothing to pack.")


def _source(args: argparse.Namespace) -> Iterator[Sample]:
    if args.source == "img2dataset":
        return img2dataset_source(args.images)
    if args.source == "pairs":
        from .pairs import pairs_source  # it reads shards too, and so loads torch

        return pairs_source(args.images)
    if args.source == "folder":
        return folder_source(args.images, args.annotations)
    if args.source == "table":
        return table_source(args.annotations, args.images, args.image_column, args.caption_column)
    return {"coco": coco_source, "nocaps": nocaps_source}[args.source](args.images, args.annotations, args.split)


def _pack(args: argparse.Namespace) -> None:
    _check_options(args)
    dataset = find_dataset(args.images, args.split, args.revision) if args.source == "hf" else None
    words = [args.source, args.images, args.annotations, args.split, *(args.instances or [])]
    words += [dataset and dataset.commit, args.image_column, args.caption_column]
    source = " ".join(filter(None, [*words, "without captions" * args.without_captions]))
    packed = find_packed(args.out, source, args.samples_per_shard)
    if dataset and not packed.shards:
        refuse_existing(Path(args.out))  # before anything is downloaded
    samples = dataset.samples(args.image_column, args.caption_column) if dataset else _source(args)
    samples = islice(samples, args.limit)
    if args.source == "img2dataset" or (dataset and dataset.is_parquet):
        # Samples hold the image itself: one at a time, the source's own count as total.
        if dataset:
            total = dataset.rows()
        else:
            stats = [load_json(path) for path in Path(args.images).glob("*_stats.json")]
            total = sum(entry.get("successes", 0) for entry in stats)
        total = min(filter(None, (total, args.limit)), default=None)
        samples = chain([*islice(samples, 1)], samples)  # what is wrong with the folder shows before the bar does
    else:
        samples = list(samples)
        total = len(samples)
        if args.instances is not None:
            add_objects(samples, args.instances)
    manifest = write_shards(
        samples,
        args.out,
        samples_per_shard=args.samples_per_shard,
        total=total,
        source=source,
        packed=packed,
        without_captions=args.without_captions,
    )
    skipped = manifest["skipped"]
    verified = verify_shards(args.out)
    print(f"{verified['samples']} samples in {verified['shards']} shards in {args.out}, verified.")
    if skipped["total"]:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped["reasons"].items())
        print(f"{skipped['total']} samples skipped: {reasons}; each is named in {args.out}/manifest.json.")


def _choices(args: argparse.Namespace) -> None:
    from .best_of import best_of  # they read shards, and so load torch
    from .pairs import pairs

    chosen = {"shards": args.shards, "model": args.model, "direction": args.direction}
    if args.command == "best-of":
        made = best_of(args.evaluation, args.split, args.judge, args.out, **chosen)
        means = f"{made['first']:.4f} of the first candidate, {made['chosen']:.4f} of the best of {made['candidates']}"
    else:
        made = pairs(args.evaluation, args.split, args.judge, args.out, **chosen, min_margin=args.min_margin)
        means = f"{made['chosen']:.4f} of the chosen, {made['rejected']:.4f} of the rejected"
    print(f"{made['samples']} samples in {made['shards']} shards in {args.out}, verified.")
    print(f"{args.judge}, mean score: {means}.")
    if made["skipped"]["total"]:
        what = "candidates" if args.command == "best-of" else "a pair"
        print(f"{made['skipped']['total']} samples without {what} or unusable; named in {args.out}/manifest.json.")
    if made["unmatched"]:
        print(f"{made['unmatched']} keys have candidates but no sample in {args.shards}.")


def _export_pairs(args: argparse.Namespace) -> None:
    from .pairs import export_pairs

    count = export_pairs(args.shards, args.out)
    print(f'{count} pairs in {args.out}; read them with datasets.load_dataset("imagefolder", data_dir={args.out!r}).')


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "pack":
            _pack(args)
        elif args.command in CHOICES:
            _choices(args)
        elif args.command == "export-pairs":
            _export_pairs(args)
        else:
            verified = verify_shards(args.folder)
            print(f"{verified['samples']} samples in {verified['shards']} shards, all as written.")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run(main)
