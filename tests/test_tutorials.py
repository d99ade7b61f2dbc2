"""The tutorials are followed literally, in their order and in one folder: every file, command and piece of Python."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from cyclefit import UserError, evaluate, records
from tests.conftest import ROOT

TUTORIALS, NOTEBOOKS = ROOT / "docs" / "tutorials", ROOT / "docs" / "notebooks"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """In the order of the overview."""
    names = dict.fromkeys(re.findall(r"^\| \[.*?\]\((\w+\.md)\)", (TUTORIALS / "index.md").read_text(), re.MULTILINE))
    return [TUTORIALS / name for name in names]


def run(words: list[str]) -> None:
    """A command of a tutorial; Python's in this process, which has imported the libraries."""
    if words[0] != "python":
        subprocess.run(words, check=True)
        return
    module = words[1] == "-m"
    sys.argv = words[2:] if module else words[1:]
    try:
        runpy.run_module(words[2], run_name="__main__") if module else runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        assert not end.code, shlex.join(words)


def submit(words: list[str]) -> None:
    """A job's script is there, and what follows it are arguments that are understood."""
    place = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    assert Path(words[place]).is_file()
    kind, arguments = Path(words[place]).stem, words[place + 1 :]
    if kind == "sweep":
        for name, *of_run in map(shlex.split, Path(arguments[0]).read_text().splitlines()):
            submit(["slurm/train.sbatch", *of_run, "--name", name])
    elif kind == "train":
        run(["python", "train.py", *arguments, "--print_config"])
    else:  # the data is looked for once everything is parsed
        with pytest.raises(UserError, match="^shards.test: shard .* does not exist"):
            evaluate.main([*arguments, '--shards={"test": "nowhere"}'])


def follow(page: Path, names: dict) -> None:
    for kind, title, text in BLOCK.findall(page.read_text()):
        if title:
            Path(title).write_text(text)
        elif kind == "python":
            exec(compile(text, page.name, "exec"), names)
        else:
            for line in text.splitlines():
                {"bash": run, "sbatch": submit}[kind](shlex.split(line))


def test_every_tutorial_is_in_the_overview():
    assert sorted(pages()) == sorted(set(TUTORIALS.glob("*.md")) - {TUTORIALS / "index.md"})


def working(folder: Path, world: Path) -> Path:
    """Makes a folder like the project's, with the data that the first command would write."""
    for name in ("train.py", "evaluate.py", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "data" / "miniature").symlink_to(world)
    return folder


def execute(notebook: Path, folder: Path) -> None:
    """In a Jupyter kernel."""
    import nbclient
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    content = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(content, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]  # `%run` of a command that fails


@pytest.mark.parametrize("notebooks", [True, False], ids=["with notebooks", "without"])
def test_tutorials(notebooks, tmp_path, world, monkeypatch, capsys):
    """Those that are notebooks too are run as such, where there is Jupyter."""
    if notebooks != bool(find_spec("nbclient") and find_spec("ipykernel")):
        pytest.skip("Jupyter is not installed: `make docs` installs it" if notebooks else "they are run as notebooks")
    monkeypatch.chdir(working(tmp_path, world))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    names, said = {}, {}
    for page in pages():
        notebook = NOTEBOOKS / f"{page.stem}.ipynb"
        if notebooks and notebook.exists():
            execute(notebook, Path("docs/notebooks"))
        else:
            follow(page, names)
        said[page.stem] = capsys.readouterr().out

    trained = {path.parent.parent.name for path in Path("runs").glob("*/checkpoints/last.ckpt")}
    assert trained == {"plain", "cycle", "lora", "lora_cycle", "mine", "concise", "again"}
    for folder, models in (("comparison", "plain cycle"), ("images", "lora lora_cycle"), ("judged", "plain concise")):
        assert list(records.read_evaluation(Path("runs", folder)).models) == ["base", *models.split()]
    judged = records.read_evaluation(Path("runs/judged")).splits["test"].rows
    assert {row.selection for row in judged if row.model == "base"} >= {"concise", "image-text"}
    assert Path("runs/report.html").exists()
    assert Image.open("drawn.png").size == (256, 256)
    assert "it is runs/cycle with seed 0" in said["trace"]
    assert "- false:" in said["trace"]
    first, again = (last_losses(Path("runs", name)) for name in ("cycle", "again"))
    assert again == pytest.approx(first)


def last_losses(run: Path) -> dict[str, float]:
    row = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row][-1]
    return {name: value for name, value in row.items() if name.startswith("train/") and "second" not in name}


def test_notebooks_are_the_tutorials():
    """Written by `python .ci/notebooks.py`."""
    write = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))["notebook"]
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {"captioner", "lora"}
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert path.read_text() == write(path.stem), f"{path.name} is not its tutorial: run `python .ci/notebooks.py`"
