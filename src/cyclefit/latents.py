"""Caches the latents of images in their shards: `python -m cyclefit.latents`.

A frozen VAE encodes an image to the same latents in every epoch as long as its crop is fixed, and encoding is two
fifths of the work of a denoising step. Training reads the latents with `data.latents` and `data.crop: center`.
"""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import numpy as np
import torch
from safetensors.numpy import save

from cyclefit import UserError
from cyclefit.config.paths import packaged
from cyclefit.config.settings import Problem, class_named, parameters
from cyclefit.config.start import run
from cyclefit.data import (
    LATENTS,
    BadSample,
    Sample,
    decode_image,
    expand_shards,
    find_packed,
    image_of,
    latents_source,
    raw_samples,
    read_captions,
    read_extra,
    write_shards,
)
from cyclefit.models import Generator
from cyclefit.models.pretrained import freeze, loading
from cyclefit.models.repository import adapter_of


def with_latents(
    urls: list[str], generator: Generator, batch_size: int, done: set[str], without_captions: bool = False
) -> Iterator[Sample]:
    """The samples of shards that are not `done`, with the latents of the centre of their images in half precision."""
    size = generator.image_size
    made = {"generator": latents_source(generator.pretrained), "image_size": str(size)}

    def decoded() -> Iterator[tuple[Sample, np.ndarray | None]]:
        for sample in (sample for url in urls for sample in raw_samples(url) if sample["__key__"] not in done):
            image, captions, pixels = image_of(sample) or b"", [], None
            with suppress(BadSample):
                captions = read_captions(sample)
            if captions or without_captions:  # otherwise it is left out and named, as with a broken image
                with suppress(BadSample):
                    pixels = decode_image(image, size)
            rejected = image_of(sample, "rejected.")
            yield Sample(sample["__key__"], image, captions, read_extra(sample), rejected=rejected), pixels

    samples = decoded()
    while batch := list(islice(samples, batch_size)):
        if good := [pixels for _, pixels in batch if pixels is not None]:
            images = torch.from_numpy(np.stack(good)).to(generator.device).float() / 255
            latents = iter(generator.encode_images(images).half().cpu().contiguous().numpy())
        for sample, pixels in batch:
            if pixels is not None:
                sample.files = {LATENTS: save({"latents": next(latents)}, made)}
            yield sample


def main(arguments: list[str]) -> int:
    """Writes new shards with the latents of their images; an interrupted run continues."""
    parser = argparse.ArgumentParser(prog="cyclefit latents", description=main.__doc__)
    parser.add_argument("--shards", required=True, help="folder, pattern or URL of shards")
    hub = "hub id or folder, as in model.generator.pretrained"
    parser.add_argument("--generator", type=packaged, required=True, help=hub)
    parser.add_argument("--class_path", help="as in model.generator.class_path; default: by the model's family")
    parser.add_argument("--revision", help="as in model.generator.revision")
    parser.add_argument("--variant", help="as in model.generator.variant")
    parser.add_argument("--image_size", type=int, help="as in data.image_size; default: the generator's")
    parser.add_argument("--out", required=True, help="folder for the shards; must not contain others")
    parser.add_argument("--without_captions", action="store_true", help="keep images without captions too")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--samples_per_shard", type=int, default=1000)
    options = parser.parse_args(arguments)
    urls = expand_shards(options.shards)
    path = options.class_path
    if path is None:
        with loading("generator", options.generator):
            path = adapter_of(options.generator, options.revision) or "StableDiffusion"
    cls = class_named(path, (Generator,), "--class_path")
    if isinstance(cls, Problem):
        raise UserError(cls.sentence)
    chosen = {name: value for name in ("revision", "variant") if (value := getattr(options, name)) is not None}
    known, others = parameters(cls)
    if unknown := [name for name in chosen if name not in known and not others]:
        raise UserError(f"{cls.__name__} has no {unknown[0]}: leave out --{unknown[0]}")
    generator = freeze(cls(options.generator, image_size=options.image_size, **chosen))
    generator.to("cuda" if torch.cuda.is_available() else "cpu").half_on_gpu()
    source = f"{options.shards} with latents of {options.generator} at {generator.image_size} px"
    source += "".join(f", {name} {value}" for name, value in chosen.items())
    packed = find_packed(options.out, source, options.samples_per_shard)
    manifest = write_shards(
        with_latents(urls, generator, options.batch_size, packed.keys, options.without_captions),
        options.out,
        samples_per_shard=options.samples_per_shard,
        source=source,
        packed=packed,
        without_captions=options.without_captions,
    )
    print(f"{manifest['samples']} samples in {len(manifest['shards'])} shards in {options.out}.")
    if manifest["skipped"]["total"]:
        print(f"{manifest['skipped']['total']} samples cannot be used; each is named in {options.out}/manifest.json.")
    same = "".join(f" --model.generator.{name}={value}" for name, value in chosen.items())
    setting = "unpaired" if options.without_captions else "train"
    print(f"train with --data.{setting}={options.out} --data.crop=center --data.latents={options.generator}{same}")
    return 0


if __name__ == "__main__":
    run(main)
