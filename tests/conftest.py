import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import pytest
from jaxtyping import install_import_hook

# The shapes written on public methods are checked in the tests, and only there.
HOOK = install_import_hook(
    [f"cyclefit.{name}" for name in ("bridge", "captioners", "cycles", "generators", "judges", "rerank", "scorers")],
    "beartype.beartype",
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared():
    """The folder of real photographs, tokenizers and metric references; absent on most machines."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the folder of real data beside the project, which is not part of it")
    return folder


@pytest.fixture(scope="session")
def weights() -> Path:
    from cyclefit.miniature import WEIGHTS

    return WEIGHTS


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The finetuning, validation, test and novel splits of the miniature world as shards."""
    from cyclefit.miniature.scenes import write_splits

    folder = tmp_path_factory.mktemp("miniature")
    write_splits(folder, ["finetune", "validation", "test", "novel"])
    return folder


@pytest.fixture(scope="session")
def captioner(weights):
    from cyclefit.captioners import Blip

    return Blip(str(weights / "blip"))


@pytest.fixture(scope="session")
def generator(weights):
    from cyclefit.generators import StableDiffusion

    return StableDiffusion(str(weights / "stable-diffusion"), steps=8, guidance_scale=4.0)


@pytest.fixture(scope="session")
def scorer(weights):
    from cyclefit.scorers import OpenClip

    return OpenClip(str(weights / "clip"))


@pytest.fixture(scope="session")
def batch(world):
    """The first twelve validation images."""
    from cyclefit.data import evaluation_batches

    return next(iter(evaluation_batches(str(world / "validation"), image_size=32, batch_size=12)))
