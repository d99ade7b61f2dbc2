"""Both directions of the page: captions of a photo and images of a prompt, by the models of an evaluation."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.config.settings import parameters
from cyclefit.data import BadSample, decode_image
from cyclefit.data.samples import opened
from cyclefit.evaluate import Captions, Evaluate, Images
from cyclefit.evaluate.common import describe_models, load_models, picture
from cyclefit.evaluate.run import check_settings
from cyclefit.judges import place
from cyclefit.metrics.facts import check
from cyclefit.metrics.reader import SIZE, SceneReader
from cyclefit.miniature import WEIGHTS
from cyclefit.models import Captioner
from cyclefit.models.pretrained import freeze
from cyclefit.records import Candidate, Kind
from cyclefit.report.gallery import SMALL, Thumbnail
from cyclefit.rerank import Drawing, rerank
from cyclefit.runs import read_run

EVALUATIONS: dict[Kind, type[Evaluate]] = {"captions": Captions, "images": Images}
FINETUNED: dict[Kind, str] = {"captions": "captioner", "images": "generator"}
LONGEST = 1000
"""Characters of a prompt."""
LAST_SEED = 2**32 - 1


@dataclass
class Shown:
    """A caption and the image drawn from it, or an image and the caption read from it."""

    candidate: Candidate
    image: Thumbnail
    best: Sequence[str]
    """The judges whose highest score of all on the page it has."""


@dataclass
class Answer:
    """What all models make of one input."""

    models: dict[str, str]
    """What each is, by name."""
    rows: dict[str, list[Shown]]
    """One of each model, by what they are: `greedy`, `nucleus 1`, `image 1 (seed 0)`."""
    judges: Sequence[str]
    photo: Thumbnail | None = None
    """The photo as the models read it."""
    facts: str | None = None
    """What the reader sees in the photo, if facts are known."""


class Side:
    """One direction: an evaluation, its models and those of the runs that have finetuned one of this kind.

    Args:
        evaluation: captions or images; its settings and partners are used.
        runs: folders of such runs.
        reader: reads the facts of scenes; None where none are known.

    Raises:
        UserError: a judge's settings are wrong, or a run cannot be loaded.

    """

    def __init__(self, evaluation: Evaluate, runs: list[str], reader: SceneReader | None):
        self.evaluation, self.reader, self.notes = evaluation, reader, []
        check_settings(evaluation)
        for name in [name for name, judge in evaluation.judges.items() if judge.num_others]:
            self.notes.append(f"{name} is left out, because it contrasts an input with others, and the page has one.")
            evaluation.judges = {other: judge for other, judge in evaluation.judges.items() if other != name}
        models = load_models(evaluation.base, runs, evaluation.checkpoint, evaluation.kind)
        self.models = {name: model for name, (model, _) in models.items()}
        self.about = {name: of.description for name, of in describe_models(models, evaluation.kind).items()}
        if not runs:
            self.notes.append(
                f"No run given has finetuned a {FINETUNED[evaluation.kind]}: the page shows the base alone."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for judge in evaluation.judges.values():
            place(judge, self.device)
        partners = evaluation.partners
        for model in (*self.models.values(), partners.generator, partners.captioner, partners.scorer, reader):
            if model is not None:
                freeze(model.to(self.device))
                # Captioners are evaluated in full precision.
                if model is not reader and not isinstance(model, Captioner):
                    model.half_on_gpu()

    @torch.no_grad()
    def captions(self, photo: bytes | None, count: int, seed: int | None) -> Answer:
        """Greedy and nucleus captions of a photo by all models, with the image drawn back from each.

        Raises:
            UserError: there is no photo, it cannot be read, or the seed is none.

        """
        evaluation, partners = self.evaluation, self.evaluation.partners
        if not photo:
            raise UserError("Choose a photo first.")
        seed = checked_seed(seed)
        try:
            pixels = decode_image(photo, evaluation.image_size)
            with opened(photo) as image:
                scene = image.size == (SIZE, SIZE)
        except BadSample as error:
            raise UserError(f"This photo cannot be read ({error}): choose a JPEG, a PNG or a WebP.") from None
        images = Batch(torch.from_numpy(pixels)[None], [""], [[]], [""]).to(self.device).images
        facts = self.reader.read(images)[0] if self.reader is not None and scene else None
        decodings = [evaluation.single[0], replace(evaluation.nucleus, num_samples=count)]
        candidates: dict[str, list[Candidate]] = {}
        for name, model in self.models.items():
            made = rerank(model, partners, evaluation.judges, images, decodings, [seed])
            texts = made.candidates[0]
            candidates[name] = [
                Candidate(
                    "", name, max(k - 1, 0), text, len(texts), scores_of(made, k),
                    decoding=decodings[min(k, 1)].method, noise_seed=seed + 1,
                    facts=check(text, facts).record() if facts else None,
                )
                for k, text in enumerate(texts)
            ]  # fmt: skip
        # The images that the judges compare: same caption, same noise.
        texts = list(dict.fromkeys(one.caption for of in candidates.values() for one in of))
        drawn = dict(zip(texts, partners.generator.generate(texts, [seed + 1] * len(texts)), strict=True))
        rows = ["greedy", *(f"nucleus {k + 1}" for k in range(count))]
        answer = self._answer(
            rows, candidates, {name: [drawn[one.caption] for one in of] for name, of in candidates.items()}
        )
        answer.photo, answer.facts = thumbnail(images[0]), in_words(facts) if facts else None
        return answer

    @torch.no_grad()
    def images(self, prompt: str | None, count: int, seed: int | None) -> Answer:
        """Images of a prompt by all models, from the same noise, with the caption read from each.

        Raises:
            UserError: there is no prompt, it is too long, or the seed is none.

        """
        evaluation, partners = self.evaluation, self.evaluation.partners
        prompt, seed = " ".join((prompt or "").split()), checked_seed(seed)
        if not prompt:
            raise UserError("Write a prompt first.")
        if len(prompt) > LONGEST:
            raise UserError(f"The prompt has {len(prompt)} characters: shorten it to {LONGEST} at most.")
        seeds = [seed + k for k in range(count)]
        candidates, drawn = {}, {}
        for name, model in self.models.items():
            how = Drawing(**evaluation.sampling)
            made = rerank(model, partners, evaluation.judges, [prompt], how, [seeds])
            captions = partners.captions_of(made.candidates, evaluation.max_new_tokens)
            drawn[name] = made.candidates[0]
            facts = self.reader.read(drawn[name]) if self.reader is not None else [None] * count
            candidates[name] = [
                Candidate(
                    "", name, k, captions[k], count, scores_of(made, k), prompt=prompt, seed=seeds[k],
                    facts=check(prompt, facts[k]).record() if facts[k] else None,
                )
                for k in range(count)
            ]  # fmt: skip
        return self._answer([f"seed {one}" for one in seeds], candidates, drawn)

    def _answer(self, rows: list[str], candidates: dict[str, list[Candidate]], images: dict) -> Answer:
        every = [one for of in candidates.values() for one in of]
        best = {
            judge: max(values)
            for judge in self.evaluation.judges
            if len(values := {one.scores[judge] for one in every if judge in one.scores}) > 1
        }
        shown = {
            row: [
                Shown(
                    one := candidates[name][k],
                    thumbnail(images[name][k]),
                    [judge for judge, score in one.scores.items() if score == best.get(judge)],
                )
                for name in self.models
            ]
            for k, row in enumerate(rows)
        }
        return Answer(self.about, shown, list(self.evaluation.judges))


def sides(kind: Kind, values: dict[str, Any]) -> dict[Kind, Side | str]:
    """Both directions with the settings of an evaluation of one kind; of the other, a sentence where it cannot be.

    Raises:
        UserError: something is wrong with the settings or a run.

    """
    given = values["judges"] or {}
    finetuned = {run: parts_of(run, values["checkpoint"]) for run in values["runs"] or []}
    found: dict[Kind, Side | str] = {}
    for each, cls in EVALUATIONS.items():
        own = {name: value for name, value in values.items() if name in parameters(cls)[0]}
        try:
            evaluation = cls(**(own if each == kind else own | {"judges": None}))
            if each != kind:  # those of the given judges that fit, if any
                fit = {
                    name: judge for name, judge in given.items()
                    if each in judge.kinds and all(getattr(evaluation.partners, need) for need in judge.needs)
                }  # fmt: skip
                evaluation.judges = fit or evaluation.judges
            generator = evaluation.base if each == "images" else evaluation.partners.generator
            reader = values.get("reader")
            if reader is None and generator.image_size == SIZE:
                reader = SceneReader(WEIGHTS / "reader")
            runs = [run for run, parts in finetuned.items() if FINETUNED[each] in parts]
            found[each] = Side(evaluation, runs, reader)
        except UserError as error:
            if each == kind:
                raise
            found[each] = str(error)
    return found


def parts_of(run: str, checkpoint: str) -> set[str]:
    """Which models a run has finetuned, `captioner` and `generator`."""
    return {name.partition(".")[0] for name in read_run(Path(run), checkpoint)[1]}


def checked_seed(seed: float | None) -> int:
    """A seed as the page gives it, as a number; raises UserError if it is none."""
    if seed is None or not 0 <= seed <= LAST_SEED or seed % 1:
        raise UserError(f"The seed must be a whole number from 0 to {LAST_SEED}.")
    return int(seed)


def scores_of(made, k: int) -> dict[str, float]:
    """The scores of the one input's candidate k; without those of a race that has dropped it."""
    scores = {judge: float(of[0, k]) for judge, of in made.scores.items()}
    return {judge: score for judge, score in scores.items() if math.isfinite(score)}


def thumbnail(image: Float[Tensor, "3 h w"]) -> Thumbnail:
    """An image in [0, 1] for the page."""
    buffer, small = io.BytesIO(), max(image.shape[-2:]) <= SMALL
    picture(image).save(buffer, "WEBP", lossless=small, quality=85)
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small)


def in_words(facts: dict) -> str:
    """A scene's facts: `small red circle, left of large blue star, on white`."""
    things = [" ".join(thing[what] for what in ("size", "colour", "shape") if thing.get(what) not in (None, "none"))
              for thing in facts["things"]]  # fmt: skip
    between = {"left": " left of ", "above": " above "}.get(facts.get("relation"), " and ")
    where = f", {facts['place']}" if "place" in facts else ""
    return f"{between.join(things)}{where}, {facts['background']} background"
