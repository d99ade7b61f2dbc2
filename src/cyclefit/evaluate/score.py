"""Every caption metric of captions in plain files, without a captioner."""

import importlib.metadata
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from cyclefit import UserError
from cyclefit.config.ranges import Positive
from cyclefit.data import IMAGES
from cyclefit.files import check_out_file, within, write_atomic
from cyclefit.metrics.captions import References, describe, read_document_frequencies, self_bleu
from cyclefit.metrics.facts import chair, check_objects
from cyclefit.metrics.java import Java, Unavailable, fetch_corenlp
from cyclefit.metrics.objects import objects_by_image
from cyclefit.metrics.questions import Asking, read_image
from cyclefit.metrics.tokenizer import tokenize
from cyclefit.models import Captioner, Scorer
from cyclefit.progress import track
from cyclefit.report.tables import is_percentage


def score(
    candidates: str,
    references: str,
    out: str | None = None,
    tokenizer: Literal["own", "ptb"] = "own",
    document_frequencies: str | None = None,
    subset: bool = False,
    java: bool = True,
    corenlp: str | None = None,
    fetch_corenlp: bool = False,
    java_heap: str | None = None,
    java_timeout: Positive = 3600.0,
    images: str | None = None,
    scorer: Scorer | None = None,
    instances: str | None = None,
    captioner: Captioner | None = None,
) -> int:
    """Computes every caption metric of captions in one file against reference captions in another.

    Where something is missing (Java, CoreNLP, images, instances), the row says so; the other metrics are computed.

    Args:
        candidates: JSON: {image id: caption}, {image id: [captions]} or COCO results [{image_id, caption}].
        references: JSON: {image id: [captions]}, or COCO annotations {images, annotations}.
        out: a JSON file of the scores, of the corpus and of each image.
        tokenizer: ours, or Stanford's by Java, which agree on COCO's captions.
        document_frequencies: a file of them for CIDEr, `coco-val-df.p` or JSON; those of the references if not given.
        subset: score only the images that have a candidate.
        java: compute METEOR and SPICE.
        corenlp: the folder of CoreNLP 3.6.0, for SPICE.
        fetch_corenlp: fetch it (370 MB) if it is not there.
        java_heap: memory of Java, as `8G`; 2G for METEOR and 8G for SPICE if not given.
        java_timeout: seconds that METEOR or SPICE may take.
        images: the folder of the images, for what needs them: COCO's file names, else image id and suffix.
        scorer: CLIP, for CLIPScore and retrieval.
        instances: COCO's instances json, for CHAIR: what is in an image beside what its references name.
        captioner: a model with a chat template, for VQAScore.

    """
    if captioner is not None and images is None:
        raise UserError("VQAScore needs the images' folder: give --images, or leave --captioner out")
    if (images is None) != (scorer is None and captioner is None):
        raise UserError("CLIPScore needs both the images' folder and a scorer: give --images and --scorer, or neither")
    if out:
        check_out_file(Path(out), _is_result, "score file written by this command")
    files = _read_files(Path(candidates), Path(references), subset)
    objects = None
    if instances is not None:
        objects = objects_by_image([Path(instances)], dict(zip(files.ids, files.references, strict=True)))
    engine = Java(java_heap, java_timeout, Path(corenlp) if corenlp else None)
    tokenized = tokenize if tokenizer == "own" else _by_java(engine, files)
    frequencies = read_document_frequencies(Path(document_frequencies)) if document_frequencies else None

    texts, owner = files.flat()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = References(files.references, document_frequencies=frequencies, tokenizer=tokenized)
    measured = read.measure(texts, owner)
    each, corpus, unavailable = measured.each, measured.corpus(), {}

    def add(name: str, compute: Callable[[], tuple[float, np.ndarray]]) -> None:
        try:
            corpus[name], each[name] = compute()
        except Unavailable as error:
            unavailable[name] = str(error)

    if java:
        own = [tokenized(text) for text in texts]
        truths = [[tokenized(text) for text in captions] for captions in files.references]
        against = [truths[i] for i in owner]
        add("METEOR", lambda: _meteor(engine, own, against))
        add("SPICE", lambda: _spice(engine, fetch_corenlp, own, against))
    if min(map(len, files.candidates)) > 1:
        corpus["self-BLEU"] = float(self_bleu(files.candidates, tokenizer=tokenized).mean())
    else:
        unavailable["self-BLEU"] = "it needs several candidates of each image"
    if scorer is None:
        unavailable["CLIPScore"] = "it needs --images and --scorer"
    else:
        of_clip = _clip(Path(images), files, scorer)
        each |= of_clip
        corpus |= {name: float(column.mean()) for name, column in of_clip.items()}
    if captioner is None:
        unavailable["VQAScore"] = "it needs --images and --captioner"
    else:
        paths = [_image(Path(images), files.names.get(key), key) for key in files.ids]
        rows = Asking(captioner, "VQAScore", 32).vqascores(paths, files.candidates)
        each["VQAScore"] = np.array([value for row in rows for value in row])
        corpus["VQAScore"] = float(each["VQAScore"].mean())
    if objects is None:
        unavailable["CHAIRi"] = "it needs --instances"
    else:
        facts = [{"objects": objects[files.ids[i]]} for i in owner]
        of_corpus, of_each = chair(list(map(check_objects, texts, facts)))
        corpus |= of_corpus
        each |= of_each
        if "CHAIRi" not in of_corpus:
            unavailable["CHAIRi"] = "no candidate names an object"

    about_tokens = {} if tokenizer == "own" else {"tokenizer": "PTB, Stanford CoreNLP 3.4.1"}
    metadata = {
        **describe(read.document_frequencies, **about_tokens),
        "scorer": scorer.name if scorer is not None else None,
        **({} if captioner is None else {"captioner": str(getattr(captioner, "pretrained", type(captioner).__name__))}),
        "versions": {name: importlib.metadata.version(name) for name in ("cyclefit", "pycocoevalcap")},
        "candidates": candidates,
        "references": references,
        "instances": instances,
        "images": len(files.ids),
        "captions": len(texts),
    }
    if caught:
        metadata["warnings"] = [str(warning.message) for warning in caught]
    rounded = {name: [None if np.isnan(v) else round(float(v), 9) for v in column] for name, column in each.items()}
    by_image = {key: {name: [] for name in each} for key in files.ids}
    for place, i in enumerate(owner):
        for name, column in rounded.items():
            by_image[files.ids[i]][name].append(column[place])
    result = {"metadata": metadata, "corpus": corpus, "unavailable": unavailable, "images": by_image}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), json.dumps(result, indent=1))
    _print(result)
    return 0


def _is_result(text: str) -> bool:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == {"metadata", "corpus", "unavailable", "images"}


def _meteor(engine: Java, own: list[str], against: list[list[str]]) -> tuple[float, np.ndarray]:
    [corpus], each = engine.meteor(own, against, [range(len(own))])
    return corpus, each


def _spice(engine: Java, fetch: bool, own: list[str], against: list[list[str]]) -> tuple[float, np.ndarray]:
    if fetch and engine.corenlp is None:
        fetch_corenlp()
    return engine.spice(own, against)


def _by_java(engine: Java, files: "Files") -> Callable[[str], str]:
    texts = list(dict.fromkeys(t for rows in (files.candidates, files.references) for row in rows for t in row))
    return dict(zip(texts, engine.tokenize(texts), strict=True)).__getitem__


def _clip(folder: Path, files: "Files", scorer: Scorer) -> dict[str, np.ndarray]:
    import torch

    from cyclefit.metrics.clip import clip_scores, retrieval

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer, embedded = scorer.to(device), []
    texts, owner = files.flat()
    with torch.no_grad():
        for key in track(files.ids, "CLIP"):
            pixels = read_image(_image(folder, files.names.get(key), key))
            embedded.append(scorer.embed_images(pixels[None].to(device)))
        images, at = torch.cat(embedded), torch.tensor(owner, device=device)
        found = clip_scores(scorer.embed_texts, images[at], texts, [files.references[i] for i in owner])
        found |= retrieval(scorer.embed_texts(texts), images, at)
    return {name: column.cpu().numpy() for name, column in found.items()}


def _image(folder: Path, name: str | None, key: str) -> Path:
    tried = [within(folder, file) for file in ([name] if name else [f"{key}.{suffix}" for suffix in IMAGES])]
    for path in tried:
        if os.path.isfile(path):
            return path
    raise UserError(f"there is no image of {key} in {folder}: expected {tried[0].name}")


def _print(result: dict) -> None:
    metadata, table = result["metadata"], Table("metric", "score", "note")
    for name, value in result["corpus"].items():
        table.add_row(name, f"{value:.2f}" if is_percentage(name) else f"{value:.3f}", "")
    for name, reason in result["unavailable"].items():
        table.add_row(name, "-", reason)
    console = Console()
    console.print(table)
    console.print(
        f"{metadata['captions']} captions of {metadata['images']} images; tokenizer: {metadata['tokenizer']}; document "
        f"frequencies: {metadata['document frequencies']}",
        highlight=False,
    )
    for warning in metadata.get("warnings", []):
        console.print(f"warning: {warning}", highlight=False)


@dataclass
class Files:
    """Candidates and references of the same images, in the order of the references."""

    ids: list[str]
    candidates: list[list[str]]
    references: list[list[str]]
    names: dict[str, str | None]
    """File names by id, where the files name them."""

    def flat(self) -> tuple[list[str], list[int]]:
        """All candidates, and of each the place of its image."""
        owner = [i for i, captions in enumerate(self.candidates) for _ in captions]
        return [text for captions in self.candidates for text in captions], owner


def _read_files(candidates: Path, references: Path, subset: bool) -> Files:
    found, names = read_captions(candidates, "candidates")
    expected, more = read_captions(references, "references")
    if extra := [key for key in found if key not in expected]:
        raise UserError(f"{candidates}: image {extra[0]} has no references in {references}{_more(extra)}")
    missing = [key for key in expected if key not in found]
    if missing and not subset:
        raise UserError(
            f"{candidates}: image {missing[0]} of {references} has no candidate{_more(missing)}; to score only those "
            "that have one, give --subset true"
        )
    ids = [key for key in expected if key in found]
    return Files(ids, [found[key] for key in ids], [expected[key] for key in ids], names | more)


def _more(keys: list[str]) -> str:
    return f" (nor have {len(keys) - 1} others)" if len(keys) > 1 else ""


def read_captions(path: Path, what: str) -> tuple[dict[str, list[str]], dict[str, str | None]]:
    """Captions by image id of a file in any of the formats, and file names by id where it has them.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds something else.

    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with {what}")

    def unique(entries: list[tuple[str, object]]) -> dict:
        keys = Counter(key for key, _ in entries)
        if twice := next((key for key, times in keys.items() if times > 1), None):
            raise UserError(f"{path}: {twice!r} appears twice")
        return dict(entries)

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        at = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not valid JSON{at}: {getattr(error, 'msg', error)}") from None
    names: dict[str, str | None] = {}
    captions: dict[str, list[str]] = {}
    results = isinstance(content, list)
    try:
        if not results and "annotations" in content:
            names = {str(image["id"]): image.get("file_name") for image in content.get("images", [])}
            content = content["annotations"]
        if isinstance(content, list):
            for entry in content:
                captions.setdefault(str(entry["image_id"]), []).append(entry["caption"])
        else:
            captions = {key: [row] if isinstance(row, str) else row for key, row in content.items()}
    except (TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path} is in none of the formats ({error}): expected {{image id: caption or captions}}, a list of "
            "{image_id, caption}, or COCO's annotations"
        ) from None
    if not captions:
        raise UserError(f"{path} contains no captions")
    for key, row in captions.items():
        if not isinstance(row, list) or not row or not all(isinstance(text, str) and text.strip() for text in row):
            raise UserError(f"{path}: image {key} should have a caption or a list of captions, not {row!r:.60}")
        if results and what == "candidates" and len(row) > 1:
            raise UserError(
                f"{path}: image {key} appears twice; several candidates of an image are {{image id: [captions]}}"
            )
    return captions, names
