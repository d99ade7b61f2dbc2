"""Imports point one way, heavy libraries load late, nothing is too large."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "cyclefit"
LAYERS = [
    {"batch", "files", "config", "digests", "hub", "progress"},
    {"models", "records"},
    {"metrics"},
    {"data"},
    {"judges", "runs", "latents"},
    {"cycles", "rerank"},
    {"report"},
    {"finetune"},
    {"train"},
    {"evaluate", "miniature", "card"},
    {"export"},
    {"status"},
    {"app"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
CORE = ("models", "judges", "cycles", "rerank", "finetune", "train")
MODULES = {
    ".".join(("cyclefit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
COMMANDS = ("score", "judges")
"""Functions whose parameters are the options of a command."""


def imported(path):
    """The modules that a file imports, wherever in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module):
    """`models` of `cyclefit.models.blip`."""
    return module.split(".")[1]


GRAPH = {name: {other for other in imported(path) if other in MODULES} - {"cyclefit"} for name, path in MODULES.items()}
ROOMS = {(room(a), room(b)) for a, others in GRAPH.items() if a != "cyclefit" for b in others if room(a) != room(b)}


def test_imports_point_one_way():
    assert {pair for pair in ROOMS if LEVEL[pair[1]] >= LEVEL[pair[0]]} == set()


def test_no_modules_import_each_other():
    list(TopologicalSorter(GRAPH).static_order())  # raises where there is a circle


def test_the_core_knows_neither_evaluation_nor_report():
    assert {(a, b) for a, b in ROOMS if a in CORE and b in ("evaluate", "report")} == set()


@pytest.mark.parametrize(
    ("rooms", "libraries"),
    [
        (("models", "judges", "cycles", "rerank"), {"lightning", "pytorch_lightning"}),
        (("report", "records", "files"), {"torch", "lightning", "transformers", "diffusers"}),
    ],
)
def test_rooms_do_without_libraries(rooms, libraries):
    for name, path in MODULES.items():
        if name != "cyclefit" and room(name) in rooms:
            assert not {other.split(".")[0] for other in imported(path)} & libraries, name


def large(path):
    """What of a file is above 400 lines, or 80 lines or 10 parameters of a function that is no command.

    The parameters of `__init__` are the settings of a configuration.
    """
    text, place = path.read_text(), str(path.relative_to(ROOT))
    if len(text.splitlines()) > 400:
        yield place
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            many = len([name for name in names if name != "self"]) > 10 and node.name != "__init__"
            if (many or node.end_lineno - node.lineno >= 80) and node.name not in COMMANDS:
                yield f"{place}: {node.name}"


def test_nothing_is_too_large():
    files = [path for folder in ("src", "benchmarks", "studies") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [name for path in files for name in large(path)] == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cyclefit", ["torch"]),
        ("cyclefit.config.start", ["torch", "lightning", "jsonargparse"]),
        ("cyclefit.__main__", ["torch", "lightning", "jsonargparse"]),
        ("cyclefit.report", ["torch", "matplotlib.pyplot"]),
        ("cyclefit.records", ["torch", "jsonargparse"]),
        ("cyclefit.data.pack", ["torch", "lightning"]),
        ("cyclefit.models", ["transformers.models.blip.modeling_blip", "peft", "diffusers", "open_clip", "lightning"]),
    ],
)
def test_heavy_libraries_load_late(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_no_unsafe_loading():
    others = (path for folder in ("benchmarks", "studies") for path in (ROOT / folder).rglob("*.py"))
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *others]:
        text = path.read_text()
        for word in ("trust_remote_code=True", "weights_only=False", "pickle.load", "shell=True", "except:"):
            assert word not in text, (path, word)
