"""Metrics by a captioner's answers to questions about images: VQAScore and Soft-TIFA."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.paths import NameOrPath
from cyclefit.config.ranges import Count, checked
from cyclefit.metrics.metric import Metric
from cyclefit.models import Captioner, Features
from cyclefit.models.pretrained import freeze
from cyclefit.progress import track

VQASCORE = 'Does this figure show "{}"? Please answer yes or no.'
"""The question of VQAScore, as published; `{}` is the text."""
ONE_WORD = "{} Answer in one word."
"""What GenEval 2 asks: the question and how to answer it."""
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Atom:
    """A question about one thing that a prompt asks for."""

    question: str
    answer: str
    skill: str

    def words(self) -> list[str]:
        """The ways to write the answer: in lower case, capitalised, a number in digits; each also after a space."""
        answer = self.answer.lower()
        forms = [answer, answer.capitalize()]
        if self.question.startswith("How many") and answer in NUMBERS:
            forms.append(str(NUMBERS.index(answer) + 1))
        return [space + form for space in ("", " ") for form in forms]


@dataclass(frozen=True)
class Questions:
    """The questions about the image of a prompt."""

    atoms: tuple[Atom, ...]
    atom_count: int
    """The prompt's complexity; it can have more questions, as that for "a" is not counted."""


def read_questions(path: Path) -> dict[str, Questions]:
    """The questions about each prompt of a file in the format of GenEval 2 (`geneval2_data.jsonl`).

    A line is {"prompt": text, "atom_count": number, "vqa_list": [[question, answer], ...], "skills": [one each]}
    (facebookresearch/GenEval2; Kamath et al., 2025, arXiv 2512.16853).

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a line is something else, or a prompt appears twice.

    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of questions")
    found: dict[str, Questions] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, count = entry["prompt"], int(entry["atom_count"])
            pairs = zip(entry["vqa_list"], entry["skills"], strict=True)
            atoms = tuple(Atom(question, answer, skill) for (question, answer), skill in pairs)
            texts = [prompt, *(text for atom in atoms for text in vars(atom).values())]
            if not atoms or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("an empty or missing text")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: expected an object with prompt, atom_count, vqa_list (pairs of question and "
                f"answer) and skills (one for each pair), as in GenEval 2 ({error})"
            ) from None
        if prompt in found:
            raise UserError(f"{path}, line {number}: the prompt {prompt!r} appears twice")
        found[prompt] = Questions(atoms, count)
    if not found:
        raise UserError(f"{path} contains no prompts")
    return found


def check_template(who: str, question: str, answer: str) -> None:
    """Raises UserError if a question has no place for the text, or the answer is empty."""
    if question.count("{}") != 1:
        raise UserError(f"{who}: question must contain {{}} once, where the text belongs, not {question!r}")
    if not answer.strip():
        raise UserError(f"{who}: answer must not be empty")


def means(probabilities: Sequence[float]) -> tuple[float, float]:
    """Soft-TIFA of one image, in percent: the arithmetic mean of its questions' probabilities, and the geometric."""
    values = np.array(probabilities)
    with np.errstate(divide="ignore"):  # the geometric mean with a 0 is 0
        return 100 * float(values.mean()), 100 * float(np.exp(np.log(values).mean()))


class Asking:
    """A frozen captioner that answers questions about image files, on the GPU if there is one.

    Raises:
        UserError: the captioner answers no questions, or an image cannot be read.

    """

    def __init__(self, captioner: Captioner, who: str, batch_size: int):
        captioner.check_questions(who)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.captioner, self.who, self.batch_size = freeze(captioner.to(device)), who, batch_size
        captioner.half_on_gpu()

    def vqascores(self, images: Sequence[Path], rows: Sequence[Sequence[str]]) -> list[list[float]]:
        """P("Yes") for each text of each image, to VQAScore's question."""

        def ask(features: Features, texts: list[str]) -> Float[Tensor, "b"]:
            questions = [VQASCORE.replace("{}", text) for text in texts]
            return self.captioner.answer_log_probs(features, questions, ["Yes"] * len(texts))

        return self._each(images, rows, ask)

    def atoms(self, images: Sequence[Path], rows: Sequence[Sequence[Atom]]) -> list[list[float]]:
        """The probability of the right answer to each question about each image.

        As in GenEval 2 the sum of the probabilities of the first tokens of all ways to write it.
        """

        def ask(features: Features, atoms: list[Atom]) -> Float[Tensor, "b"]:
            questions = [ONE_WORD.replace("{}", atom.question) for atom in atoms]
            return self.captioner.first_token_log_probs(features, questions, [atom.words() for atom in atoms])

        return self._each(images, rows, ask)

    @torch.no_grad()
    def _each(self, images: Sequence[Path], rows: Sequence[Sequence], ask: Callable) -> list[list[float]]:
        size, found = self.batch_size, []
        for start in track(range(0, len(images), size), self.who):
            part = rows[start : start + size]
            pixels = [read_image(path).to(self.captioner.device)[None] for path in images[start : start + size]]
            alike = len({image.shape for image in pixels}) == 1
            batches = [torch.cat(pixels)] if alike else pixels
            features = Features.cat([self.captioner.embed(batch) for batch in batches])
            asked = [(owner, one) for owner, of in enumerate(part) for one in of]
            answers = []
            for first in range(0, len(asked), size):
                owners, questions = zip(*asked[first : first + size], strict=True)
                at = torch.tensor(owners, device=self.captioner.device)
                answers += ask(features[at], list(questions)).exp().tolist()
            left = iter(answers)
            found += [[next(left) for _ in of] for of in part]
        return found


def read_image(path: Path) -> Float[Tensor, "3 h w"]:
    """An image file as RGB in [0, 1]; raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {path} cannot be read: {error}") from None


@checked
class VQAScore(Metric):
    """P("Yes" | image, 'Does this figure show "{prompt}"? Please answer yes or no.') of drawn images, in [0, 1].

    Lin et al., ECCV 2024 (arXiv 2404.01291). The probability is that of the word alone: of CLIP-FlanT5 the authors take
    the geometric mean with the end token after it, of chat models the word's as well.

    Args:
        captioner: is asked; it should neither have been trained nor have chosen images in this evaluation.
        batch_size: images, and questions, at a time; no influence on the results.

    Raises:
        UserError: the captioner answers no questions.

    """

    kinds = ("images",)

    def __init__(self, captioner: Captioner, batch_size: Count = 32):
        captioner.check_questions("VQAScore")
        self.captioner, self.batch_size = captioner, batch_size

    @override
    def measure(self, candidates, references):
        images = [self.folder / one.image for one in candidates]
        asking = Asking(self.captioner, "VQAScore", self.batch_size)
        return [score for [score] in asking.vqascores(images, [[one.prompt] for one in candidates])]


@checked
class SoftTIFA(Metric):
    """Soft-TIFA of drawn images, in percent: means of the probabilities of the right answers to a prompt's questions.

    AM is the arithmetic mean, an estimate by atom, and GM the geometric one, by prompt (GenEval 2, Kamath et al., 2025,
    arXiv 2512.16853). The probability of an answer is that of its first token, summed over the ways to write it.

    Args:
        captioner: is asked; see VQAScore.
        questions: a file in the format of GenEval 2 with every prompt of the evaluation, see `read_questions`.
        batch_size: images, and questions, at a time; no influence on the results.

    Raises:
        UserError: the captioner answers no questions, or a prompt of the evaluation is not in the file.

    """

    kinds = ("images",)
    columns = ("AM", "GM")

    def __init__(self, captioner: Captioner, questions: NameOrPath | str, batch_size: Count = 32):
        captioner.check_questions("Soft-TIFA")
        self.captioner, self.path, self.batch_size = captioner, Path(questions), batch_size
        self.questions = read_questions(self.path)

    @override
    def measure(self, candidates, references):
        images = [self.folder / one.image for one in candidates]
        if missing := next((one.prompt for one in candidates if one.prompt not in self.questions), None):
            raise UserError(f"{self.path} has no questions about the prompt {missing!r}")
        asking = Asking(self.captioner, "Soft-TIFA", self.batch_size)
        answers = asking.atoms(images, [self.questions[one.prompt].atoms for one in candidates])
        return list(zip(*map(means, answers), strict=True))
