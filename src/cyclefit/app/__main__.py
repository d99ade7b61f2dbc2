"""`python -m cyclefit.app`."""

from cyclefit.app import main
from cyclefit.config.start import run

if __name__ == "__main__":
    run(main)
