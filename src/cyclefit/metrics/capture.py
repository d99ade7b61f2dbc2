"""CAPTURE, a metric of detailed captions, through its authors' package where that is installed."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from typing_extensions import override

from cyclefit import UserError
from cyclefit.metrics.metric import Metric
from cyclefit.records import Candidate


class Capture(Metric):
    """CAPTURE of long captions, in [0, 100]: agreement of objects, attributes and relations with the references.

    (5 F_objects + 5 F_attributes + 2 F_relations) / 12, averaged over the references; F is the harmonic mean of
    precision and recall, with matches that are exact, by synonyms, or for the rest by the similarity of embeddings
    (Dong et al. 2024, arXiv 2405.19092, package capture_metric). A T5 parses the captions and all-mpnet-base-v2 embeds
    what is left; the package downloads both by itself and runs on GPUs only. It is no dependency of this project.

    Raises:
        UserError: the package, its nltk data or a GPU is missing.

    """

    def __init__(self):
        if find_spec("capture_metric") is None:
            raise UserError("the metric CAPTURE needs its package: `pip install capture_metric`, then run this again")
        if not torch.cuda.is_available():
            raise UserError("the metric CAPTURE needs a GPU, as its package capture_metric does: leave it out")
        import nltk

        try:
            # The package's own handler of such an error waits for a debugger.
            nltk.pos_tag(nltk.word_tokenize("a cat"))
            nltk.corpus.wordnet.synsets("cat")
        except LookupError as error:
            data = "punkt punkt_tab averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet"
            raise UserError(f"the metric CAPTURE needs nltk's data: `python -m nltk.downloader {data}`") from error

    @override
    def measure(self, candidates: Sequence[Candidate], references: Sequence[Sequence[str]]) -> list[float]:
        from capture_metric.capture import CAPTURE

        metric, scores, parsed = CAPTURE(), {}, {}
        against = {one.key: list(captions) for one, captions in zip(candidates, references, strict=True)}
        # It takes one candidate for each set of references; the references are parsed with the first.
        pairs = list(dict.fromkeys((one.key, one.caption) for one in candidates))
        first = list({key: (key, text) for key, text in reversed(pairs)}.values())
        for part in (first, [pair for pair in pairs if pair not in set(first)]):
            if not part:
                continue
            _, found, results = metric.compute_score(
                {pair: against[pair[0]] for pair in part},
                {pair: [pair[1]] for pair in part},
                prev_gt_parsed={pair: parsed[pair[0]] for pair in part} if parsed else None,
                return_parse_results=True,
            )
            for score, result in zip(found, results, strict=True):
                scores[result["sample_key"]] = 100 * score
                parsed[result["sample_key"][0]] = result["gt_parsed"]
        return [scores[one.key, one.caption] for one in candidates]
