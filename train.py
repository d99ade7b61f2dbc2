"""Finetunes a captioner or a generator: `python train.py --config cycle_blip.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

# Found without installation, so that a Python without packages is told which one has them.
sys.path.append(str(Path(__file__).resolve().parent / "src"))

from cyclefit.config.start import importing, resolve_configs, run


def main(arguments: list[str]) -> int:
    """Trains; a missing config is reported before slow imports."""
    resolve_configs(arguments)
    with importing():
        from cyclefit.train.cli import train

    return train(arguments)


if __name__ == "__main__":
    run(main)
