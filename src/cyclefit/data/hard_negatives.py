"""Hard negatives: images with texts that are true of them and texts that are nearly so.

Each reader takes the files of a benchmark as its authors published them; the images are the user's.
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit import UserError
from cyclefit.config.paths import Folder
from cyclefit.data.samples import BadSample, decode_image, opened
from cyclefit.files import within


@dataclass
class Example:
    """Images and texts of which a judge has to find out what belongs together."""

    key: str
    """Within its kind; the judges' noise depends on it."""
    kind: str
    images: Sequence[Path | bytes]
    """One, or two; a file, or its contents."""
    right: Sequence[str]
    """Texts that are true of the one image, or the first text that of the first image and the second of the second."""
    wrong: Sequence[str] = ()
    """Texts that are false of the image."""
    counted: Literal["texts", "images", "groups"] = "texts"
    """How accuracy is counted, as `correct` says."""
    box: tuple[int, int, int, int] | None = None
    """The part of the image that is shown: left, top, width and height in pixels."""

    def __post_init__(self):
        if not all(isinstance(text, str) and text.strip() for text in self.texts):
            raise ValueError("an empty text")

    @property
    def texts(self) -> list[str]:
        """All texts, the right ones first."""
        return [*self.right, *self.wrong]

    def correct(self, scores: Sequence[Sequence[float]]) -> dict[str, bool]:
        """Whether the scores (images, texts) put everything right, by the name of the score; ties are wrong.

        `texts`: every right text above every wrong one. `images`: of both images each text's own has the higher score.
        `groups`: Winoground's three scores (Thrush et al., CVPR 2022): `text`, of both texts each image's own has the
        higher score; `image`, as above; `group`, both.
        """
        if self.counted == "texts":
            [row] = scores
            return {"": min(row[: len(self.right)]) > max(row[len(self.right) :])}
        (a, b), (c, d) = scores
        text, image = a > b and d > c, a > c and d > b
        return {"": image} if self.counted == "images" else {"text": text, "image": image, "group": text and image}

    @property
    def chance(self) -> dict[str, float]:
        """The accuracy of random scores in percent."""
        if self.counted == "texts":
            return {"": 100 / comb(len(self.texts), len(self.right))}
        return {"": 25.0} if self.counted == "images" else {"text": 25.0, "image": 25.0, "group": 100 / 6}


def load_image(image: Path | bytes, size: int, box: tuple[int, int, int, int] | None = None) -> Float[Tensor, "3 h w"]:
    """An image in [0, 1]: the box, its shorter side resized to `size`, and of that the central square.

    Raises:
        UserError: the file is no image that can be decoded.

    """
    data = image.read_bytes() if isinstance(image, Path) else image
    try:
        if box is not None:
            left, top, width, height = box
            with opened(data) as whole, io.BytesIO() as file:
                whole.convert("RGB").crop((left, top, left + width, top + height)).save(file, "PNG")
                data = file.getvalue()
        return torch.from_numpy(decode_image(data, size)).float() / 255
    except BadSample as error:
        raise UserError(f"{image if isinstance(image, Path) else 'an image'} cannot be read: {error}") from None


class Benchmark(ABC):
    """Hard negatives of one source."""

    examples: list[Example]


@dataclass
class Published(Benchmark):
    """A benchmark in files as published.

    Raises:
        UserError: the folder has none of the files, one is in another format, or images are missing.

    """

    folder: Folder
    """Of the published files; those that are there are read."""
    images: Folder | None = None
    """Of the images, if they are not where they were published."""

    files: ClassVar[Mapping[str, str]]
    """The kind of each file's examples, by the file's name."""
    place: ClassVar[str]
    """Of the images, in `folder`."""
    entry: ClassVar[str]
    """What a file's entries are, in words."""

    def __post_init__(self):
        folder, name = Path(self.folder), type(self).__name__
        self.place_of_images = Path(self.images) if self.images else folder / self.place
        found = [file for file in self.files if (folder / file).is_file()]
        if not found:
            raise UserError(f"{name}: {folder} has none of the published files {', '.join(self.files)}")
        self.examples = [example for file in found for example in self._read(folder / file, self.files[file])]
        paths = dict.fromkeys(image for example in self.examples for image in example.images)
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"{name}: {len(missing)} of {len(paths)} images are missing, for example {missing[0]}: set `images` to "
                "the folder they are in"
            )

    def _read(self, path: Path, kind: str) -> Iterator[Example]:
        try:
            text = path.read_text(encoding="utf-8-sig")
            lines = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else []
            content = lines or json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        rows = list(content.items() if isinstance(content, dict) else enumerate(content))
        for key, row in rows:
            try:
                yield self.read(str(key), kind, row)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, UserError):
                    raise
                shown = ", ".join(row) if isinstance(row, dict) else repr(row)
                raise UserError(f"{path}: entry {key} should be {self.entry}, not {shown:.120}") from None
        if not rows:
            raise UserError(f"{path} is empty")

    @abstractmethod
    def read(self, key: str, kind: str, row: Any) -> Example:
        """The example of a file's entry; errors of lookups and types mean another format."""

    def image(self, name: str) -> Path:
        """The path of an image that a file names."""
        return within(self.place_of_images, name)


class SugarCrepe(Published):
    """SugarCrepe (Hsieh et al., NeurIPS 2023, arXiv 2306.14610) and SugarCrepe++ (Dumpala et al., arXiv 2406.11171).

    The json files of github.com/RAIVNLab/sugar-crepe, `data/`, in the format that its `main_eval.py` reads, or those of
    github.com/Sri-Harsha/scpp, `data/`; the images are COCO's val2017. SugarCrepe++ has two right captions for each
    image: in its image-to-text task both must be above the wrong one. Its text-only task concerns no images.
    """

    files = {f"{kind}.json": kind for kind in ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel",
                                               "swap_obj", "swap_att")}  # fmt: skip
    place = "val2017"
    entry = "filename, caption, negative_caption and, in SugarCrepe++, caption2"

    def read(self, key, kind, row):
        """`{"0": {filename, caption, negative_caption}}`, or a list with `caption2` besides."""
        right = [row["caption"], *([row["caption2"]] if "caption2" in row else [])]
        return Example(key, kind, [self.image(row["filename"])], right, [row["negative_caption"]])


class Aro(Published):
    """ARO (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936): relations, attributes and word order.

    `visual_genome_relation.json` and `visual_genome_attribution.json` as `dataset_zoo/aro_datasets.py` of
    github.com/mertyg/vision-language-models-are-bows fetches and reads them, each image cropped to its box. The wrong
    orders of COCO's and Flickr30k's captions are in no published file: that code shuffles the words anew whenever it
    runs. Its `test_cases`, written as json, are read from `coco_order.json` and `flickr30k_order.json`.
    """

    files = {
        "visual_genome_relation.json": "relation",
        "visual_genome_attribution.json": "attribution",
        "coco_order.json": "COCO order",
        "flickr30k_order.json": "Flickr30k order",
    }
    place = "images"
    entry = (
        "image_path, true_caption, false_caption, bbox_x, bbox_y, bbox_w and bbox_h, or image and caption_options in "
        "files of word order"
    )

    def read(self, key, kind, row):
        """One right and one wrong caption, or the right one and four orders of its words."""
        if "order" in kind:
            right, *wrong = row["caption_options"]
            return Example(key, kind, [self.image(row["image"])], [right], _some(wrong))
        box = tuple(int(row[f"bbox_{side}"]) for side in "xywh")
        return Example(
            key, kind, [self.image(row["image_path"])], [row["true_caption"]], [row["false_caption"]], box=box
        )


class Winoground(Published):
    """Winoground (Thrush et al., CVPR 2022, arXiv 2204.03162): two images and two captions of the same words.

    `examples.jsonl` and `images/ex_ID_img_0.png` of the data set facebook/winoground, which asks for a login. The kinds
    are its `collapsed_tag`.
    """

    files = {"examples.jsonl": ""}
    place = "images"
    entry = "id, image_0, image_1, caption_0, caption_1 and collapsed_tag"

    def read(self, key, kind, row):
        """The first caption is that of the first image."""
        images = [self.image(f"{row[name]}.png") for name in ("image_0", "image_1")]
        captions = [row["caption_0"], row["caption_1"]]
        return Example(str(row["id"]), row["collapsed_tag"], images, captions, counted="groups")


class WhatsUp(Published):
    """What's Up (Kamath et al., EMNLP 2023, arXiv 2310.19785): prepositions, in their own photographs, COCO and GQA.

    The `data/` folder of github.com/amitakamath/whatsup_vlms, in the formats that its `dataset_zoo/aro_datasets.py`
    reads; the first caption is right. Accuracy is that of single images, not of the paper's pairs and sets.
    """

    files = {
        "controlled_images_dataset.json": "A",
        "controlled_clevr_dataset.json": "B",
        "coco_qa_one_obj.json": "COCO, one object",
        "coco_qa_two_obj.json": "COCO, two objects",
        "vg_qa_one_obj.json": "GQA, one object",
        "vg_qa_two_obj.json": "GQA, two objects",
    }
    place = "."
    entry = "image_path and caption_options in files of controlled images, or [image id, right caption, wrong caption]"

    def read(self, key, kind, row):
        """Four captions of a controlled image, two of another."""
        if kind in ("A", "B"):
            right, *wrong = row["caption_options"]
            return Example(key, kind, [self.image(row["image_path"].removeprefix("data/"))], [right], _some(wrong))
        image, right, wrong = row
        name = f"val2017/{image:0>12}.jpg" if kind.startswith("COCO") else f"vg_images/{image}.jpg"
        return Example(key, kind, [self.image(name)], [right], [wrong])


class Cola(Published):
    """COLA's multi-object setting (Ray et al., NeurIPS 2023, arXiv 2305.03689): two images with swapped attributes.

    `data/COLA_multiobjects_matching_benchmark.json` of github.com/arijitray1993/COLA. Images have the names that their
    links end in. As in its `scripts/eval.py`, both captions must score higher with their own image.
    """

    files = {"COLA_multiobjects_matching_benchmark.json": "multiple objects"}
    place = "vg_gqa_images"
    entry = "[link to image 1, caption 1, link to image 2, caption 2]"

    def read(self, key, kind, row):
        """The first caption is that of the first image."""
        first, caption, second, other = row
        images = [self.image(link.rpartition("/")[2]) for link in (first, second)]
        return Example(key, kind, images, [caption, other], counted="images")


def _some(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("no wrong text")
    return texts
