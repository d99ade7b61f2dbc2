"""Metrics of one's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from cyclefit.records import Candidate, Kind


class Metric(ABC):
    """A number for each candidate of an evaluation; the table has its mean over the inputs with an interval."""

    kinds: tuple[Kind, ...] = ("captions", "images")
    """What it measures: `captions` of images, `images` of prompts, or both."""
    columns: Sequence[str] = ()
    """What is added to its name in the table, if it gives several numbers for each candidate."""
    folder: Path
    """The evaluation's, which the candidates' images are in; set before `measure`."""

    def named(self, name: str) -> list[str]:
        """The names of its columns in the table."""
        return [f"{name} {column}" for column in self.columns] or [name]

    @abstractmethod
    def measure(
        self, candidates: Sequence[Candidate], references: Sequence[Sequence[str]]
    ) -> Sequence[float] | Sequence[Sequence[float]]:
        """The numbers of captions of images, or of images of prompts, in their order; one sequence for each column.

        Args:
            candidates: of all models and inputs of a split; `caption` is that of a drawn image where it is one.
            references: the captions that come with each candidate's input; the first is the prompt.

        """
