"""Distances between sets of images: CMMD over a scorer's embeddings, FID and KID over Inception features.

FID and KID through torchmetrics, their features through torch-fidelity where it is installed.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from cyclefit import UserError
from cyclefit.progress import track

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def inception() -> nn.Module:
    """The Inception network of the FID's reference implementation: uint8 images (b, 3, h, w) to features (b, 2048).

    Raises:
        UserError: torch-fidelity or the network's weights are not there.

    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    way_out = f"`pip install torch-fidelity` and put its {WEIGHTS} into {path.parent}, then run this again"
    if not path.exists():
        raise UserError(f"the weights of the Inception network are missing; {way_out}")
    # torch-fidelity unpickles whatever the file holds: it must hold tensors alone.
    torch.load(path, map_location="cpu", weights_only=True)
    try:
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    except ModuleNotFoundError as error:
        raise UserError(f"torch-fidelity is missing; {way_out}") from error


@torch.no_grad()
def features(
    embed: Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b d"]], paths: Sequence[Path], batch_size: int = 32
) -> Float[Tensor, "n d"]:
    """The features of image files, on the CPU."""
    rows = []
    for start in track(range(0, len(paths), batch_size), "features of all images"):
        pixels = []
        for path in paths[start : start + batch_size]:
            with Image.open(path) as image:
                pixels.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        if len({image.shape for image in pixels}) > 1:
            rows += [embed(image[None]).cpu() for image in pixels]
        else:
            rows.append(embed(torch.stack(pixels)).cpu())
    return torch.cat(rows)


def inception_distances(real: Float[Tensor, "n d"], drawn: Float[Tensor, "m d"]) -> dict[str, float]:
    """FID and KID between two sets of features, at least two each; lower is better.

    FID = |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) (Heusel et al., NeurIPS 2017, arXiv 1706.08500), biased upwards on
    fewer images than features. KID is the unbiased squared MMD under (x.y / d + 1)^3 (Binkowski et al., ICLR 2018,
    arXiv 1801.01401), averaged over 100 subsets of at most 1000 images, the same at every call; it can be negative.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given = nn.Identity()  # the features are there already
    given.num_features = real.shape[1]
    size = min(1000, len(real), len(drawn))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        metrics = {"FID": FrechetInceptionDistance(given), "KID": KernelInceptionDistance(given, subset_size=size)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for metric in metrics.values():
            metric.update(real, real=True)
            metric.update(drawn, real=False)
        return {"FID": float(metrics["FID"].compute()), "KID": float(metrics["KID"].compute()[0])}


def cmmd(real: Float[Tensor, "n d"], drawn: Float[Tensor, "m d"]) -> float:
    """CMMD between two sets of unit-length embeddings; lower is better, 0 for equal sets.

    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k(x, y) = exp(-|x - y|^2 / (2 * 10^2)): the squared MMD,
    estimated with the pairs (x, x), which raises it a little on few images (Jayasumana et al., CVPR 2024, arXiv
    2401.09603, and the authors' google-research/cmmd). Published numbers are of CLIP ViT-L/14 at 336 pixels and are
    comparable only with that.
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        rows = [torch.exp(-torch.cdist(part, b).square() / (2 * 10**2)).mean(1) for part in a.split(1024)]
        return torch.cat(rows).mean()

    # In single precision the sum of terms near 1 would keep four digits.
    x, y = real.double(), drawn.double()
    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))
