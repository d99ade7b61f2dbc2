"""Make the installed torchvision importable beside a CPU build of torch.

The registry's torchvision is built against CUDA. Beside a CPU build of torch its compiled operators do not load, and
`import torchvision` then fails on the two operators it describes without asking whether they exist. Nothing here uses
compiled torchvision operators; open_clip, torchmetrics and transformers only import the package. So, in the project's
own environment and only where the import fails, those two operators are declared. Called by `make setup`.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

PATCH = """

if not _has_ops():
    for _op in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    extension = Path(importlib.util.find_spec("torchvision").origin).with_name("extension.py")
    extension.write_text(extension.read_text() + PATCH)
    subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
