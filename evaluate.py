"""Evaluates finetuned models against reranked inference: `python evaluate.py captions --config NAME`."""

from cyclefit.cli import run
from cyclefit.evaluate import main

if __name__ == "__main__":
    run(main)
