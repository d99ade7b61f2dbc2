"""The notebooks of docs/notebooks, from the tutorials of the same names: `python .ci/notebooks.py`."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```\n', re.MULTILINE | re.DOTALL)
SETUP = """\
# In the project's folder. W&B is off here: everything that is logged is in metrics.jsonl too.
%cd ../..
%env WANDB_MODE=disabled"""


def cell(kind: str, text: str, number: int) -> dict:
    """One cell, without output."""
    extra = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}} | extra | {"source": text.splitlines(True)}


def code(kind: str, title: str | None, text: str) -> str:
    """A block of a tutorial for IPython: files are written, Python's commands run in the notebook's process."""
    if title:
        return f"%%writefile {title}\n{text}"
    if kind != "bash":
        return text
    text = re.sub(r"^(?!python )(?=.)", "!", text, flags=re.MULTILINE)
    text = re.sub(r"^python -m (\S+)", r"%run -m \1 --", text, flags=re.MULTILINE)
    return re.sub("^python ", "%run ", text, flags=re.MULTILINE)


def notebook(page: str) -> str:
    """The text of the notebook of a tutorial."""
    text = re.sub(r"\]\((\w+\.md)", r"](../tutorials/\1", (DOCS / "tutorials" / f"{page}.md").read_text())
    # Prose, then kind, title and text of a block, and so on.
    prose, *rest = BLOCK.split(text)
    title, prose = prose.split("\n\n", 1)
    found = [("markdown", title), ("code", SETUP), ("markdown", prose)]
    for kind, name, block, after in zip(*[iter(rest)] * 4, strict=True):
        found += [("code", code(kind, name, block)), ("markdown", after)]
    cells = [cell(kind, text.strip(), i) for i, (kind, text) in enumerate(found) if text.strip()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes those that exist anew."""
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        path.write_text(notebook(path.stem))


if __name__ == "__main__":
    main()
