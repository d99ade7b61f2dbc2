"""Images of a benchmark's prompts, in the folder that the benchmark's own evaluation reads."""

import json
from pathlib import Path

import torch

from cyclefit import UserError
from cyclefit.config.paths import Folder
from cyclefit.config.ranges import Count, Seed
from cyclefit.digests import digest
from cyclefit.evaluate.common import load_models, save_image
from cyclefit.files import check_out_folder, sha256_of, write_atomic
from cyclefit.models import Generator
from cyclefit.models.pretrained import freeze
from cyclefit.progress import track
from cyclefit.records import write_json
from cyclefit.rerank import sample_seed
from cyclefit.runs import hold

SETTINGS = "drawing.json"


def draw(
    generator: Generator,
    prompts: str,
    out: str,
    runs: list[Folder] | None = None,
    checkpoint: str = "last",
    num_images: Count = 4,
    batch_size: Count = 8,
    seed: Seed = 0,
) -> int:
    """Draws a benchmark's prompts into the folder that its own evaluation reads.

    GenEval's (Ghosh et al., NeurIPS 2023, arXiv 2310.11513) from a `.jsonl` file with an object with a `prompt` on each
    line: `OUT/MODEL/00000/metadata.jsonl`, the line, and `OUT/MODEL/00000/samples/0000.png` onwards. T2I-CompBench's
    (Huang et al., NeurIPS 2023, arXiv 2307.06350) from a `.txt` file with a prompt on each line:
    `OUT/MODEL/samples/PROMPT_000000.png`, the images of all prompts numbered in their order. Nothing is scored.
    Interrupted, it continues where it stopped.

    Args:
        generator: the base model, before finetuning; its steps and guidance are used for all models.
        prompts: the benchmark's file.
        out: the folder of the images.
        runs: folders of finetuned models, which draw the same prompts from the same noise.
        checkpoint: `last` or `best` of each run.
        num_images: images of each prompt; GenEval takes 4, T2I-CompBench 10.
        batch_size: prompts that are drawn together; no influence on the images.
        seed: of the noise.

    """
    lines, folder = _read(Path(prompts)), Path(out)
    check_out_folder(folder, lambda path: any(path.glob(f"*/{SETTINGS}")), "images drawn by this command")
    sampling = {"steps": generator.steps, "guidance_scale": generator.guidance_scale}
    with hold(folder, "--out"):
        for name, (model, _) in load_models(generator, runs, checkpoint, "images").items():
            settings = {"prompts": sha256_of(Path(prompts)), "model": digest(model), "num_images": num_images}
            _check(folder / name / SETTINGS, settings | sampling | {"seed": seed})
            freeze(model.to("cuda" if torch.cuda.is_available() else "cpu")).half_on_gpu()
            paths = _paths(folder / name, lines, num_images)
            todo = [i for i in range(len(lines)) if not all(path.exists() for path in paths[i])]
            for start in track(range(0, len(todo), batch_size), name):
                part = todo[start : start + batch_size]
                seeds = [sample_seed(f"{i:05d}/{k}", seed) for i in part for k in range(num_images)]
                texts = [lines[i][0] for i in part for _ in range(num_images)]
                images = model.generate(texts, seeds, **sampling)
                for image, path in zip(images, (path for i in part for path in paths[i]), strict=True):
                    save_image(image, path)
            model.to("cpu")
            print(f"{name}: {num_images * len(lines)} images of {len(lines)} prompts in {folder / name}")
    return 0


def _read(path: Path) -> list[tuple[str, str | None]]:
    """Prompts, and the lines of a `.jsonl` that they come from; None of a `.txt`, whose prompts name files."""
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"prompts: {path} is neither a .jsonl file, as GenEval's, nor a .txt, as T2I-CompBench's")
    if not path.is_file():
        raise UserError(f"prompts: there is no file {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not (line := line.strip()):
            continue
        if path.suffix == ".txt":
            if set(line) & set("/\\\0") or len(line.encode()) > 240:
                raise UserError(f"{path}, line {number}: {line!r:.60} cannot be a file name, as T2I-CompBench's are")
            found.append((line, None))
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
        prompt = content.get("prompt") if isinstance(content, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number}: expected an object with a "prompt", as in GenEval\'s file')
        found.append((prompt, line))
    if not found:
        raise UserError(f"prompts: {path} is empty")
    return found


def _check(path: Path, settings: dict) -> None:
    """Writes the settings of a model's images, or checks them against those of the images that are there."""
    if path.exists():
        before = json.loads(path.read_text())
        if changed := ", ".join(name for name, value in settings.items() if before.get(name) != value):
            raise UserError(f"{path.parent} has images with other settings ({changed}): choose another --out")
    write_json(path, settings)


def _paths(folder: Path, lines: list[tuple[str, str | None]], count: int) -> list[list[Path]]:
    """Where the images of each prompt belong; writes GenEval's metadata beside them."""
    found = []
    for i, (prompt, line) in enumerate(lines):
        if line is None:
            names = [f"samples/{prompt}_{i * count + k:06d}.png" for k in range(count)]
        else:
            names = [f"{i:05d}/samples/{k:04d}.png" for k in range(count)]
            write_atomic(folder / f"{i:05d}" / "metadata.jsonl", line + "\n")
        found.append([folder / name for name in names])
    return found
