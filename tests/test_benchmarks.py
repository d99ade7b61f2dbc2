"""The benchmarks run and say what they measured; how long things take is not tested."""

import json
import sys

import pytest
import torch

from benchmarks import full_size, means, rerank, reuse, text_cycle, training


@pytest.fixture
def said(monkeypatch, capsys):
    """What a benchmark prints with these arguments."""

    def run(benchmark, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, arguments)])
        monkeypatch.setattr("rich.console.Console.size", property(lambda _: (150, 50)))
        benchmark.main()
        return capsys.readouterr().out

    return run


@torch.no_grad()
def test_reused_features_are_those_of_the_last_full_step(generator):
    conditioning = generator.encode_texts(["a red star on the left of a blue ring"] * 2)
    latents, times = generator.noise([0, 1]), torch.tensor([500, 500])
    reused = reuse.Reuse(generator, 2)
    full = reused(latents, times, conditioning)
    torch.testing.assert_close(full, generator.predict(latents, times, conditioning))
    torch.testing.assert_close(reused(latents, times, conditioning), full)
    other = reused(latents, times - 300, conditioning)
    torch.testing.assert_close(other, generator.predict(latents, times - 300, conditioning))
