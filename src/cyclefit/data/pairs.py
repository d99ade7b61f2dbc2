"""Preference pairs: from an evaluation as shards, as folders with other projects' columns, and back from those."""

import json
from collections.abc import Iterator
from pathlib import Path

from cyclefit import UserError, records
from cyclefit.files import within, write_atomic

from .candidates import Choice, best, noise_of, write_choices
from .pack import STORED, Sample
from .samples import BadSample, image_of, opened, read_captions, read_record
from .shards import expand_shards, raw_samples

METADATA = "metadata.jsonl"
"""The file of a folder of images that `datasets` reads the columns from."""


def pairs(
    evaluation: str | Path,
    split: str,
    judge: str,
    out: str | Path,
    *,
    shards: str | None = None,
    model: str = "base",
    direction: records.Kind = "captions",
    min_margin: float = 0.0,
) -> dict:
    """Writes the judge's best and worst of the N candidates of each sample as shards of pairs.

    The chosen one is the best, as in `best_of`, the rejected one that of the lowest score, the highest index among
    equals; the margin is the difference of their scores. A sample whose candidates do not differ, in the score or in
    the caption, or whose margin is below `min_margin`, is left out and named in the manifest. What else is written, and
    what is raised: see `write_choices`. The rejected caption is `rejected` of the sample's json, a rejected image its
    second image, `KEY.rejected.png`; `pair` of the json has margin, score and index of both, and the scores of all N.

    Returns:
        `samples`, `shards`, `skipped`, `candidates` (N), `unmatched` (keys with candidates that the shards lack),
        and the judge's mean score of the `chosen` and of the `rejected` over the pairs written.

    """
    if not min_margin >= 0:
        raise UserError(f"--min_margin must be a number of at least 0, not {min_margin}.")

    def choose(pool: list[records.Candidate]) -> Choice:
        chosen, scores = best(pool, judge), [one.scores[judge] for one in pool]
        rejected = min(pool, key=lambda one: (one.scores[judge], -one.index))
        margin, lost = max(scores) - min(scores), ""
        if not margin or (direction == "captions" and chosen.caption.strip() == rejected.caption.strip()):
            lost = "no difference between the candidates"
        elif margin < min_margin:
            lost = f"margin below {min_margin:g}"
        note = {"margin": margin, "score": max(scores), "rejected_score": min(scores), "scores": scores}
        note |= {"index": chosen.index, "rejected_index": rejected.index}
        note |= {"noise_seed": noise_of(chosen), "rejected_noise_seed": noise_of(rejected)}
        return Choice(chosen, note, rejected, lost)

    made = write_choices(
        "pairs", evaluation, split, judge, out, choose, shards=shards, model=model, direction=direction
    )
    count = len(made.choices)
    return made.summary | {
        "chosen": sum(choice.chosen.scores[judge] for choice in made.choices) / count,
        "rejected": sum(choice.rejected.scores[judge] for choice in made.choices) / count,
    }


def export_pairs(shards: str, out: str | Path) -> int:
    """Writes pairs of captions with TRL's columns, pairs of images with Diffusion-DPO's; returns how many.

    `out` holds the images and a `metadata.jsonl` that `datasets.load_dataset("imagefolder", data_dir=out)` reads:
    `images`, `prompt`, `chosen` and `rejected` in TRL's conversational format, or `jpg_0` (the chosen image), `jpg_1`,
    `label_0` (1), `label_1` (0) and `caption`. Beside them are the sample's `key` and what its json has as `pair`.

    Raises:
        FileExistsError: `out` holds something already.
        UserError: a sample is no pair.

    """
    from cyclefit.models.chat import REQUEST

    out, urls, rows = Path(out), expand_shards(shards), []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: name a new folder for the exported pairs.")
    for url in urls:
        for sample in raw_samples(url):
            key, record = sample["__key__"], read_record(sample)
            try:
                (caption,) = read_captions(sample)[:1]
                names = [_written(out, key, image_of(sample) or b"")]
                if isinstance(rejected := record.get("rejected"), str):
                    turns = {"prompt": ("user", REQUEST), "chosen": ("assistant", caption)}
                    turns["rejected"] = ("assistant", rejected)
                    row = {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}
                    row = {"images_file_names": names, **row}
                else:
                    names.append(_written(out, f"{key}.rejected", image_of(sample, "rejected.") or b""))
                    row = {"jpg_0_file_name": names[0], "jpg_1_file_name": names[1], "label_0": 1, "label_1": 0}
                    row["caption"] = caption
            except BadSample as bad:
                raise UserError(
                    f"{url} has no pair in {key} ({bad}): make pairs with `python -m cyclefit.data pairs`."
                ) from None
            rows.append(row | {"key": key} | ({"pair": record["pair"]} if "pair" in record else {}))
    write_atomic(out / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _written(out: Path, key: str, data: bytes) -> str:
    """Writes an image; its name in the folder."""
    with opened(data) as image:
        name = f"images/{key.replace('/', '_')}.{STORED[image.format]}"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(data)
    return name


def pairs_source(folder: str | Path) -> Iterator[Sample]:
    """Pairs in a folder with a `metadata.jsonl` that has TRL's or Diffusion-DPO's columns, for `write_shards`.

    Images are named as `datasets` wants them, by `images_file_names`, `image_file_name` or `file_name`, and by
    `jpg_0_file_name` and `jpg_1_file_name`, relative to the folder. Of a conversation the last message counts. A pair
    whose `label_0` is neither 0 nor 1 is left out. Further columns go into the sample's json.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a line has other columns, or names an image outside of the folder.

    """
    path = Path(folder) / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {METADATA}, which has the columns of the pairs.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}).") from None
            yield _pair(Path(folder), row if isinstance(row, dict) else {}, f"{number:09d}", where)


def _pair(folder: Path, row: dict, number: str, where: str) -> Sample:
    """A row as a sample; its columns are taken out of it one by one."""
    columns, extra = ", ".join(row) or "none", dict(row)
    key = str(extra.pop("key", number))

    def image(name: str) -> Path:
        return within(folder, name, f"{where}: the image")

    if isinstance(row.get("jpg_0_file_name"), str) and isinstance(row.get("jpg_1_file_name"), str):
        sides = [image(extra.pop(f"jpg_{side}_file_name")) for side in (0, 1)]
        label, caption = extra.pop("label_0", None), extra.pop("caption", "")
        extra.pop("label_1", None)
        if label not in (0, 1):
            return Sample(key, b"", [], lost="label_0 is neither 0 nor 1")
        chosen, rejected = sides if label == 1 else reversed(sides)
        return Sample(key, chosen, [str(caption)], extra, rejected=rejected)
    names = next(([extra.pop(name)] for name in ("image_file_name", "file_name") if name in row), None)
    names = names or extra.pop("images_file_names", None)
    chosen, rejected = (_text(extra.pop(name, None)) for name in ("chosen", "rejected"))
    extra.pop("prompt", None)
    if not isinstance(names, list) or not names or chosen is None or rejected is None:
        raise UserError(
            f"{where} has the columns {columns}; pairs have images_file_names, chosen and rejected (TRL), or "
            "jpg_0_file_name, jpg_1_file_name, label_0 and caption (Diffusion-DPO)."
        )
    return Sample(key, image(str(names[0])), [chosen], extra | {"rejected": rejected})


def _text(answer: object) -> str | None:
    """A completion in TRL's plain or conversational format as text; None if it is neither."""
    while isinstance(answer, list | dict):
        if isinstance(answer, dict):
            answer = answer.get("text", answer.get("content"))
        else:
            answer = answer[-1] if answer else None
    return answer if isinstance(answer, str) else None
