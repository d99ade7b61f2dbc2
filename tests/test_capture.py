"""CAPTURE through its authors' package, and what is said where that is missing."""

import collections
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from cyclefit import UserError
from cyclefit.metrics.capture import Capture
from cyclefit.records import Candidate

installed = find_spec("capture_metric") is not None


@pytest.mark.skipif(installed, reason="the package is installed")
def test_without_the_package_the_way_out_is_named():
    with pytest.raises(UserError, match="CAPTURE needs its package: `pip install capture_metric`"):
        Capture()


@pytest.mark.skipif(not installed, reason="needs `pip install capture_metric`, which is no dependency")
def test_each_candidate_has_the_score_that_the_package_gives_it_alone(monkeypatch):
    """The package's own matching and score; words in place of its parser, which is a network to be downloaded."""
    from capture_metric import capture

    parsed = []

    def words(self, parts, desc=""):
        found = collections.defaultdict(list)
        for key, text in (sample for part in parts for sample in part):
            parsed.append(text)
            things = text.split()
            found[key].append((things, {things[0]: {things[-1]}}, {(things[0], "by", things[-1])}))
        return found

    exact = partial(capture.CAPTURE, synonym_matching=False, soft_matching=False)
    monkeypatch.setattr(capture.CAPTURE, "process_samples_multiprocessing", words)
    references = {"a": ["dog ball grass", "dog red grass"], "b": ["cat sofa blue"]}
    said = [("a", "dog ball"), ("a", "cat grass"), ("b", "cat blue"), ("a", "dog ball"), ("b", "dog"), ("a", "red")]
    candidates = [Candidate(key, "base", i, text, 3) for i, (key, text) in enumerate(said)]
    alone = [exact().compute_score({key: references[key]}, {key: [text]})[0] for key, text in said]
    parsed.clear()
    monkeypatch.setattr(capture, "CAPTURE", exact)
    metric = object.__new__(Capture)  # without its check for a GPU
    assert metric.measure(candidates, [references[key] for key, _ in said]) == pytest.approx([100 * of for of in alone])
    assert len(set(alone)) > 3
    assert all(parsed.count(text) == 1 for row in references.values() for text in row), "references are parsed once"


@pytest.mark.skipif(not installed or torch.cuda.is_available(), reason="needs the package, and no GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(UserError, match="CAPTURE needs a GPU"):
        Capture()
