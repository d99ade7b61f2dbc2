"""Finetunes a captioner or a generator: `python train.py --config cycle_blip.yaml`."""

from cyclefit.cli import run, train

if __name__ == "__main__":
    run(train)
