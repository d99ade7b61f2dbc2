"""Judges: score how well candidates match an input, either captions of an image or images of a prompt.

The same judge is a reward during finetuning and a reranker at inference.
"""

from cyclefit.judges.base import Judge, Partners, check_complete, check_judge, distinct, place
from cyclefit.judges.both import Function, ImageText, Sum, YesProbability
from cyclefit.judges.captions import Denoising, Likelihood, Regeneration
from cyclefit.judges.images import CaptionLikelihood, SceneFacts, TextCycle
from cyclefit.judges.race import Race

__all__ = [
    "CaptionLikelihood",
    "Denoising",
    "Function",
    "ImageText",
    "Judge",
    "Likelihood",
    "Partners",
    "Race",
    "Regeneration",
    "SceneFacts",
    "Sum",
    "TextCycle",
    "YesProbability",
    "check_complete",
    "check_judge",
    "distinct",
    "place",
]
