"""Evaluates finetuned models against reranked inference: `python evaluate.py captions --config NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

# Found without installation, so that a Python without packages is told which one has them.
sys.path.append(str(Path(__file__).resolve().parent / "src"))

from cyclefit.config.start import importing, resolve_configs, run


def main(arguments: list[str]) -> int:
    """Evaluates; a missing config is reported before slow imports."""
    arguments = resolve_configs(arguments)
    with importing():
        from cyclefit import evaluate

    return evaluate.main(arguments)


if __name__ == "__main__":
    run(main)
