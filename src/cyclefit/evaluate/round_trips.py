"""Round trips through captioners and generators: every caption and image is made once, with one model in memory."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cyclefit.digests import digest
from cyclefit.evaluate.common import save_image
from cyclefit.files import safe_name
from cyclefit.metrics.reader import SceneReader
from cyclefit.models import Decoding
from cyclefit.models.pretrained import Adapter, freeze
from cyclefit.progress import progress_bar
from cyclefit.rerank import sample_seed

Of = tuple[str, ...]
"""An image: `()` the source, `(generator,)` drawn from the prompt, `(generator, captioner)` from a caption of it."""


@dataclass
class Sample:
    """An image with its captions; the first one is the prompt."""

    split: str
    key: str
    references: list[str]
    facts: dict | None


class Member:
    """A model that is loaded when it is needed."""

    def __init__(self, load: Callable[[], Adapter]):
        self.load = load
        self._model: Adapter | None = None

    @cached_property
    def digest(self) -> str:
        """The hash of its weights and settings; loads it."""
        self._model = self.load()
        return digest(self._model)

    def on(self, device: torch.device) -> Adapter:
        """The frozen model on a device, in half precision on a GPU."""
        if self.digest and self._model is None:  # the digest is taken before the precision changes
            self._model = self.load()
        freeze(self._model.to(device)).half_on_gpu()
        return self._model

    def release(self) -> None:
        """Frees its memory."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Made:
    """Captions and measurements by the digest of everything they depend on, in files that are only appended to.

    Each part and rank writes to a file of its own and reads all: an interrupted evaluation continues on any number.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.own = folder, folder / f"made.rank{rank}.jsonl"
        self.values: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Adds what the files of all parts and ranks contain; a line that was cut off is skipped."""
        for path in sorted(self.folder.parent.glob("*/made.rank*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError):
                    self.values |= dict([json.loads(line)])

    def add(self, found: Iterable[tuple[str, Any]]) -> None:
        """Adds values by their digests; they are on disk when this returns."""
        found = list(found)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.own.open("a") as file:
            # Begins with a new line, because the last one may have been cut off.
            file.write("".join(f"\n{json.dumps(pair)}" for pair in found) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.values |= dict(found)


@dataclass
class RoundTrips:
    """Makes and measures what the members say and draw; everything is found again by what it depends on."""

    captioners: dict[str, Member]
    generators: dict[str, Member]
    scorers: dict[str, Member]
    reader: SceneReader | None
    folder: Path
    decoding: Decoding
    image_size: int
    batch_size: int
    seed: int
    made: Made
    digests: dict[str, str]
    """Of the shards, by split."""
    device: torch.device
    rank: int

    def __post_init__(self):
        self.drawings = [(g, *c) for g in self.generators for c in ((), *((c,) for c in self.captioners))]
        self.pairs = [(g, c) for g in self.generators for c in self.captioners]
        self.reader_digest = digest(self.reader)

    # ---- what things depend on, and where they are

    def image_id(self, sample: Sample, of: Of) -> str:
        """The digest of what an image depends on."""
        if not of:
            return digest(self.digests[sample.split], self.image_size, sample.key)
        generator, *captioner = of
        return digest(self.generators[generator].digest, self.seed, sample.key, self.text(sample, *captioner))

    def caption_id(self, sample: Sample, captioner: str, of: Of) -> str:
        """The digest of what a captioner's caption of an image depends on."""
        return digest(self.captioners[captioner].digest, self.decoding.max_new_tokens, self.image_id(sample, of))

    def measured_id(self, by: str, sample: Sample) -> str:
        """The digest of what all measurements of a sample depend on, `by` being that of the model."""
        images, texts = [(), *self.drawings], [self.text(sample, c, (g,)) for g, c in self.pairs]
        return digest(by, [self.image_id(sample, of) for of in images], sample.references[0], texts, self.pairs)

    def text(self, sample: Sample, captioner: str | None = None, of: Of = ()) -> str:
        """The prompt, or what a captioner says of an image."""
        return self.made.values[self.caption_id(sample, captioner, of)] if captioner else sample.references[0]

    def similarities(self, sample: Sample, scorer: str) -> dict[str, dict[str, float]]:
        """Of `images` with the source and of `texts` with the prompt, by `generator/captioner`."""
        return self.made.values[self.measured_id(self.scorers[scorer].digest, sample)]

    def facts(self, sample: Sample, of: Of) -> dict:
        """What the reader sees in a drawn image."""
        return self.made.values[self.measured_id(self.reader_digest, sample)]["/".join(of)]

    def image_name(self, sample: Sample, of: Of) -> str:
        """Where an image is, relative to the folder of the evaluation."""
        folder = "/".join((("source", "of-prompts", "of-captions")[len(of)], *reversed(of)))
        return f"images/{sample.split}/{folder}/{safe_name(sample.key)}.png"

    def there(self, sample: Sample, of: Of) -> bool:
        """Whether an image is there, made from what it depends on now."""
        try:
            with Image.open(self.folder / self.image_name(sample, of)) as image:
                return image.info.get("digest") == self.image_id(sample, of)
        except (OSError, SyntaxError, ValueError):
            return False

    def save(self, image: Float[Tensor, "3 h w"], sample: Sample, of: Of) -> None:
        """Saves an image together with the digest of what it depends on."""
        save_image(image, self.folder / self.image_name(sample, of), digest=self.image_id(sample, of))

    def _images(self, samples: Sequence[Sample], of: Of) -> Float[Tensor, "b 3 h w"]:
        pixels = []
        for sample in samples:
            with Image.open(self.folder / self.image_name(sample, of)) as image:
                pixels.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        return torch.stack(pixels).to(self.device) / 255

    # ---- the work, one model after the other

    def make(self, samples: list[Sample]) -> None:
        """Makes and measures what is missing of some samples, whose source images are saved."""
        for name, member in self.captioners.items():
            self._caption(member, name, samples, ())
            member.release()
        for name, member in self.generators.items():
            for of in self.drawings:
                if of[0] == name:
                    self._draw(member, samples, of)
            member.release()
        for name, member in self.captioners.items():
            for generator in self.generators:
                self._caption(member, name, samples, (generator,))
            member.release()
        for name, member in self.scorers.items():
            self._measure(name, member.digest, samples, partial(self._similarities, member))
            member.release()
        if self.reader is not None:
            freeze(self.reader.to(self.device))
            self._measure("the reader", self.reader_digest, samples, self._facts)

    def _parts(self, what: str, todo: list[Sample]) -> Iterator[list[Sample]]:
        """Batches of what is to be done, with a bar."""
        with progress_bar(self.rank) as progress:
            task = progress.add_task(what, total=len(todo), visible=bool(todo))
            for start in range(0, len(todo), self.batch_size):
                part = todo[start : start + self.batch_size]
                yield part
                progress.update(task, advance=len(part))

    def _caption(self, member: Member, name: str, samples: list[Sample], of: Of) -> None:
        todo = [one for one in samples if self.caption_id(one, name, of) not in self.made.values]
        for part in self._parts(f"{name} captions {of[0] if of else 'the source'}", todo):
            captions = member.on(self.device).sample(self._images(part, of), self.decoding, [0] * len(part))
            self.made.add((self.caption_id(one, name, of), text) for one, [text] in zip(part, captions, strict=True))

    def _draw(self, member: Member, samples: list[Sample], of: Of) -> None:
        todo = [one for one in samples if not self.there(one, of)]
        for part in self._parts(f"{of[0]} draws {of[1] if of[1:] else 'the prompt'}", todo):
            texts = [self.text(one, *of[1:]) for one in part]
            images = member.on(self.device).generate(texts, [sample_seed(one.key, self.seed) for one in part])
            for one, image in zip(part, images, strict=True):
                self.save(image, one, of)

    @torch.no_grad()
    def _measure(self, name: str, by: str, samples: list[Sample], measure: Callable) -> None:
        todo = [one for one in samples if self.measured_id(by, one) not in self.made.values]
        for part in self._parts(f"{name} measures", todo):
            ids = [self.measured_id(by, one) for one in part]
            self.made.add(zip(ids, measure(part), strict=True))

    def _similarities(self, member: Member, part: list[Sample]) -> list[dict]:
        scorer, found = member.on(self.device), [{} for _ in part]

        def add(direction: str, given: Tensor, embed: Callable[[str, str], Tensor]) -> None:
            for g, c in self.pairs:
                for of, value in zip(found, (given * embed(g, c)).sum(-1).tolist(), strict=True):
                    of.setdefault(direction, {})[f"{g}/{c}"] = round(value, 6)

        if "images" in scorer.reads:
            source = scorer.embed_images(self._images(part, ()))
            add("images", source, lambda g, c: scorer.embed_images(self._images(part, (g, c))))
        if "texts" in scorer.reads:
            prompts = scorer.embed_texts([self.text(one) for one in part])
            add("texts", prompts, lambda g, c: scorer.embed_texts([self.text(one, c, (g,)) for one in part]))
        return found

    def _facts(self, part: list[Sample]) -> list[dict[str, dict]]:
        read = {"/".join(of): self.reader.read(self._images(part, of)) for of in self.drawings}
        return [{name: facts[i] for name, facts in read.items()} for i in range(len(part))]
