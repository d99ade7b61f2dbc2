"""Caption metrics and facts as torchmetrics Metrics, aggregated over ranks."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cyclefit.metrics.captions import (
    DocumentFrequencies,
    Tokenizer,
    caption_metrics,
    check_pairs,
    describe,
    tokenize,
)
from cyclefit.metrics.facts import check


class CaptionMetrics(Metric):
    """`caption_metrics` over every sample of every rank, which may hold unequal numbers of samples or none.

    The state is the captions themselves, as bytes, since neither corpus BLEU nor CIDEr is a mean over ranks.
    Without `document_frequencies` they are those of all references seen.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    captions: list[torch.Tensor] | torch.Tensor

    def __init__(
        self,
        *,
        document_frequencies: DocumentFrequencies | None = None,
        tokenizer: Tokenizer = tokenize,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.document_frequencies = document_frequencies
        self.tokenizer = tokenizer
        self.add_state("captions", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A rank without samples would otherwise gather torchmetrics' placeholder, floats among bytes.
        self.captions.append(torch.zeros(0, dtype=torch.uint8, device=self.device))

    def update(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add one candidate and a list of references per sample; raises ValueError as `caption_scores`."""
        check_pairs(candidates, references)
        pairs = zip(candidates, map(list, references), strict=True)
        data = np.frombuffer("".join(json.dumps(pair) + "\n" for pair in pairs).encode(), dtype=np.uint8)
        self.captions.append(torch.from_numpy(data.copy()).to(self.device))

    def compute(self) -> dict[str, float]:
        """The metrics of `caption_metrics`; raises ValueError where no rank has a sample."""
        lines = dim_zero_cat(self.captions).cpu().numpy().tobytes().decode().splitlines()
        pairs = [json.loads(line) for line in lines]
        candidates = [candidate for candidate, _ in pairs]
        references = [captions for _, captions in pairs]
        return caption_metrics(
            candidates,
            references,
            document_frequencies=self.document_frequencies,
            tokenizer=self.tokenizer,
        )

    def describe(self) -> dict[str, str]:
        """What the metrics depend on, for the head of a table: tokenizer and document frequencies."""
        return describe(self.document_frequencies, tokenizer=self.tokenizer)


class FactMetrics(Metric):
    """Truth, coverage and false captions in percent, as `cyclefit.metrics.facts.summarize`, over all ranks' samples.

    Samples whose facts are not known (None) do not count.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    sums: torch.Tensor

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Right and stated facts, covered facts and those there, false captions and all.
        self.add_state("sums", default=torch.zeros(6, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, captions: Sequence[str], facts: Sequence[dict | None] | None) -> None:
        """Adds captions of images with these facts."""
        for caption, of in zip(captions, facts or (), strict=bool(facts)):
            if of is not None:
                found = check(caption, of)
                counts = [*found.counts()["truth"], *found.counts()["coverage"], found.false, 1]
                self.sums += torch.tensor(counts, device=self.sums.device)

    def compute(self) -> dict[str, float]:
        """The shares of something; empty where no facts are known."""
        parts = self.sums.tolist()
        names = ("truth", "coverage", "false_captions")
        return {name: 100 * parts[2 * i] / parts[2 * i + 1] for i, name in enumerate(names) if parts[2 * i + 1]}
