"""VQAScore and Soft-TIFA of drawn images in plain files, without a generator."""

import importlib.metadata
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cyclefit import UserError
from cyclefit.config.ranges import Count
from cyclefit.evaluate.analyses import estimate
from cyclefit.files import check_out_file, write_atomic
from cyclefit.metrics.questions import Asking, Questions, means, read_questions
from cyclefit.metrics.statistics import ratio_interval
from cyclefit.models import Captioner
from cyclefit.records import Estimate, read_candidates

KEYS = {"metadata", "models"}


def questions(
    prompts: str,
    images: str,
    captioner: Captioner,
    out: str | None = None,
    subset: bool = False,
    batch_size: Count = 32,
) -> int:
    """Asks a captioner the questions of a file of prompts about their drawn images: Soft-TIFA, and VQAScore.

    As in GenEval 2 (Kamath et al., 2025, arXiv 2512.16853): each skill has the mean probability of the right answers to
    its questions, each number of atoms the mean over its prompts of the geometric mean over their questions.

    Args:
        prompts: JSON lines of GenEval 2 (prompt, atom_count, vqa_list, skills).
        images: JSON {prompt: image file}, or candidates-SPLIT.jsonl of an evaluation of images: each model's first.
        captioner: a model with a chat template.
        out: a JSON file of the results, of all prompts and of each.
        subset: leave out prompts without an image, and images of other prompts.
        batch_size: images, and questions, at a time; no influence on the results.

    """
    if out:
        check_out_file(Path(out), _is_result, "file written by this command")
    asked, models = read_questions(Path(prompts)), _read_images(Path(images))
    results = {}
    for model, found in models.items():
        if not subset and (odd := found.keys() ^ asked.keys()):
            prompt = min(odd)
            lacks, where = ("image", images) if prompt in asked else ("questions", prompts)
            raise UserError(f"the prompt {prompt!r} has no {lacks} in {where}; to leave such out, give --subset true")
        kept = {prompt: asked[prompt] for prompt in asked if prompt in found}
        if not kept:
            raise UserError(f"{images} has no image of a prompt of {prompts}")
        asking, paths = Asking(captioner, model, batch_size), [found[prompt] for prompt in kept]
        scores = asking.vqascores(paths, [[prompt] for prompt in kept])
        answers = asking.atoms(paths, [of.atoms for of in kept.values()])
        results[model] = _summary(kept, [score for [score] in scores], answers)
    metadata = {
        "captioner": str(getattr(captioner, "pretrained", type(captioner).__name__)),
        "prompts": prompts,
        "images": images,
        "version": importlib.metadata.version("cyclefit"),
    }
    result = {"metadata": metadata, "models": results}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), json.dumps(result, indent=1))
    _print(results)
    return 0


def _is_result(text: str) -> bool:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == KEYS


def _read_images(path: Path) -> dict[str, dict[str, Path]]:
    """The image of each prompt, by model."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of images")
    models: dict[str, dict[str, Path]] = defaultdict(dict)
    if path.suffix == ".jsonl":
        for one in read_candidates(path):
            if one.prompt is None or one.image is None:
                raise UserError(f"{path} contains captions: give that of an evaluation of images")
            if one.index == 0:
                models[one.model].setdefault(one.prompt, path.parent / one.image)
        return models
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        models[path.stem] = {prompt: Path(image) for prompt, image in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON {{prompt: image file}} ({error})") from None
    return models


def _summary(kept: dict[str, Questions], scores: list[float], answers: list[list[float]]) -> dict:
    both = np.array([means(row) for row in answers])
    skills = list(dict.fromkeys(atom.skill for of in kept.values() for atom in of.atoms))
    each = [[atom.skill for atom in of.atoms] for of in kept.values()]
    found = {"VQAScore": estimate(scores), "Soft-TIFA AM": estimate(both[:, 0]), "Soft-TIFA GM": estimate(both[:, 1])}
    by_skill, by_atoms = {}, {}
    for skill in skills:
        counts = [[name == skill for name in row] for row in each]
        sums = [np.dot(row, of) for row, of in zip(answers, counts, strict=True)]
        by_skill[skill] = Estimate(*(100 * np.array(ratio_interval(sums, list(map(sum, counts))))).tolist())
    numbers = np.array([of.atom_count for of in kept.values()])
    for count in sorted(set(numbers.tolist())):
        by_atoms[str(count)] = estimate(both[numbers == count, 1])
    prompts = {
        prompt: {"VQAScore": score, "answers": row} for prompt, score, row in zip(kept, scores, answers, strict=True)
    }
    plain = {
        name: {key: asdict(value) for key, value in of.items()}
        for name, of in {"scores": found, "skills": by_skill, "atoms": by_atoms}.items()
    }
    return plain | {"prompts": prompts}


def _print(results: dict[str, dict]) -> None:
    table = Table("", *results)
    first = next(iter(results.values()))
    titles = {"scores": "{}", "skills": "Soft-TIFA AM of {}", "atoms": "Soft-TIFA GM of prompts with {} atoms"}
    for part, title in titles.items():
        for name in first[part]:
            cells = (_cell(name, of[part].get(name)) for of in results.values())
            table.add_row(title.format(name), *cells)
    Console().print(table)


def _cell(name: str, found: dict | None) -> str:
    if found is None:
        return ""
    places = 3 if name == "VQAScore" else 1
    return f"{found['value']:.{places}f} [{found['low']:.{places}f}, {found['high']:.{places}f}]"
