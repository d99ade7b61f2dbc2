"""What is evaluated: the settings that every evaluation has, and what differs between captioners and generators."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from cyclefit.batch import Batch
from cyclefit.config.paths import Folder
from cyclefit.config.ranges import Count, Natural, Seed
from cyclefit.data import Shards
from cyclefit.evaluate.analyses import Chosen, Samples
from cyclefit.evaluate.common import CandidateFile
from cyclefit.judges import Judge, Partners, Regeneration
from cyclefit.metrics.metric import Metric
from cyclefit.models import Captioner, Generator, Scorer
from cyclefit.records import IMAGE_TEXT, ORACLE, SINGLE, Candidate, Estimate, Kind, Split

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Ranking = tuple[str, str, Samples]
"""A model, a judge, and the candidates of the model."""


@dataclass
class Inputs:
    """What is known of a split's samples, in the order of the shards."""

    split: str
    references: dict[str, list[str]] = field(default_factory=dict)
    """By key; the first is the prompt."""
    facts: dict[str, dict | None] = field(default_factory=dict)
    """By key."""
    images: dict[str, Float[Tensor, "n d"]] = field(default_factory=dict)
    """Embeddings of the images, by scorer, on the CPU."""


class Evaluate(ABC):
    """The settings of an evaluation, and what differs between captioners and generators; `run` evaluates.

    Args:
        shards: the splits by name; the first is the one the verdict is about.
        out: the folder of the evaluation.
        runs: folders of finetuned models.
        num_candidates: N candidates of each input.
        rerank_runs: rerank the finetuned models too, not only the base.
        image_size: side of the images that are read.
        batch_size: inputs that are worked on together; no influence on the results.
        num_workers: processes that read images.
        limit: inputs of each split, all if not given.
        checkpoint: `last` or `best` of each run.
        seed: of sampling and of the noise.
        devices: GPUs of a node, or processes without one; no influence on the results.
        num_nodes: nodes.
        metrics: further ones, by the names of their columns.

    """

    kind: ClassVar[Kind]
    cycle: ClassVar[str]
    """The paper's judge."""
    decodings: ClassVar[Sequence[str]]
    """Of single candidates; judges choose among several of the last."""
    singles: ClassVar[Sequence[str]]
    """What single candidates of runs are compared by, in the names of differences; the first decides the verdict."""
    shares: ClassVar[Sequence[str]]
    """Metrics that are shares of all facts together."""
    half: ClassVar[bool]
    """Whether the models evaluated run in half precision on a GPU."""
    source_side: ClassVar[int | None] = None
    """Longest side in pixels of the source images that are kept."""
    inputs_of: ClassVar[Callable[[Batch], Tensor | list]]
    """The inputs of a batch, for judges that contrast."""

    base: Captioner | Generator
    partners: Partners
    """Frozen models of judges and metrics."""
    scorers: dict[str, Scorer]
    """By label; where there are two, the first judges and the second is held out."""
    judges: dict[str, Judge]
    """By name; the first is the one that failures are of."""
    about: dict[str, Any]
    """Settings for the report."""
    quality: str
    """The metric of curves, and of the verdict where no facts are known."""
    oracle: str
    """The metric by which the oracle chooses."""
    compared: Sequence[str]
    """Metrics of differences, beside those of facts."""
    columns: Sequence[tuple[str, str, int]]
    """Of the printed table: title, metric, decimals."""
    gallery: int = 24
    """How many samples of each split the report shows."""
    fabric: "Fabric"
    """Set when it runs."""
    rewards: Sequence[str] = ()
    """The judges that measure what runs were rewarded by; set when it runs."""

    def __init__(
        self,
        shards: dict[str, Shards],
        out: str,
        runs: list[Folder] | None = None,
        num_candidates: Count = 10,
        rerank_runs: bool = False,
        image_size: Count = 512,
        batch_size: Count = 32,
        num_workers: Natural = 0,
        limit: Count | None = None,
        checkpoint: str = "last",
        seed: Seed = 0,
        devices: Count = 1,
        num_nodes: Count = 1,
        metrics: dict[str, Metric] | None = None,
    ):
        self.shards, self.folder, self.runs, self.checkpoint = shards, Path(out), runs, checkpoint
        self.num_candidates, self.rerank_runs, self.seed = num_candidates, rerank_runs, seed
        self.image_size, self.batch_size, self.num_workers, self.limit = image_size, batch_size, num_workers, limit
        self.devices, self.num_nodes, self.metrics = devices, num_nodes, metrics or {}

    @abstractmethod
    def depends(self, name: str, model: Captioner | Generator) -> dict[str, Any]:
        """What a model's candidates depend on beside the images, as digests and plain values."""

    def prepare(self, inputs: Inputs) -> None:  # noqa: B027
        """Called once for each split, before its first candidate."""

    def batch_size_of(self, name: str) -> int:
        """A model's."""
        return self.batch_size

    @abstractmethod
    def sample(
        self, inputs: Inputs, name: str, model: Captioner | Generator, batch: Batch, others: Tensor | list | None
    ) -> list[Candidate]:
        """A model's judged candidates of a batch."""

    @abstractmethod
    def measure(self, candidates: list[Candidate], inputs: Inputs) -> None:
        """Adds metrics to all candidates of a split."""

    @abstractmethod
    def summary(self, picked: list[Candidate], samples: Samples, selection: str, inputs: Inputs) -> dict[str, Estimate]:
        """The metrics of a row of the table, which has picked one candidate of each sample."""

    @abstractmethod
    def cost(self, samples: Samples, decoding: str, selection: str) -> tuple[float, float, float]:
        """Images drawn, denoiser calls and seconds per input."""

    @abstractmethod
    def gained(self, single: Candidate) -> Sequence[str]:
        """The metrics of gains by choosing, beside those of facts, of which a candidate has some."""

    @abstractmethod
    def analysed(self, rankings: list[Ranking], facts: bool) -> list[tuple[Ranking, str]]:
        """Which rankings curves and correlations are of, and by which metric."""

    @abstractmethod
    def finish(self, files: dict[str, CandidateFile], inputs: dict[str, Inputs], results: dict[str, Split],
               chosen: dict[str, Chosen]) -> dict[str, str]:  # fmt: skip
        """Adds what is computed of all splits together; returns notes on it."""

    def reranked(self, name: str) -> bool:
        """Whether a model gives candidates to choose from, beside one at a time."""
        return name == "base" or self.rerank_runs

    def judges_of(self, name: str) -> dict[str, Judge]:
        """Of a model that is not reranked those of round trips, which its table shows, and of the runs' rewards.

        Judges that race choose among several candidates, which it does not have.
        """
        if self.reranked(name):
            return self.judges
        names = (self.cycle, IMAGE_TEXT, *self.reconstructions, *self.rewards)
        return {judge: self.judges[judge] for judge in names if judge in self.judges and not self.judges[judge].races}

    @property
    def reconstructions(self) -> list[str]:
        """The judges that compare redrawn images with their sources by their own scorer: metrics of every model."""
        round_trips = {name: judge for name, judge in self.judges.items() if isinstance(judge, Regeneration)}
        return [name for name, judge in round_trips.items() if judge.scorer is not None and name != self.cycle]

    @property
    def further(self) -> list[str]:
        """The columns of `metrics`."""
        return [column for name, metric in self.metrics.items() for column in metric.named(name)]

    def num_others(self, name: str) -> int:
        """How many other inputs the judges of a model contrast an input with, at most."""
        return max((judge.num_others for judge in self.judges_of(name).values()), default=0)

    @property
    def sum(self) -> str:
        """The sum of both similarities, judged without further cost."""
        return f"{self.cycle} + {IMAGE_TEXT}"

    def judged_by(self, selection: str) -> list[str]:
        """The judges whose scores a selection is by."""
        return {self.sum: [self.cycle, IMAGE_TEXT], SINGLE: [], ORACLE: []}.get(selection, [selection])

    @property
    def sampling(self) -> dict:
        """How the generator draws, if it says so."""
        generator = self.partners.generator or self.base
        return {name: getattr(generator, name, None) for name in ("steps", "guidance_scale")}
