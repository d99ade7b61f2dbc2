"""The documentation as a site: it builds without a warning and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?([^"'\s>]+)|<link[^>]*\shref=["']?([^"'\s>]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    said = built.stdout + built.stderr
    assert not built.returncode and "WARNING" not in said, said  # `--quiet` would drop warnings about links
    return folder


def test_every_document_is_a_page(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site) for path in site.rglob("*.html")} >= pages
    start = (site / "index.html").read_text()
    assert "cycle losses" in start and 'href="models.html"' in start and 'src="report.png"' in start


def test_the_reference_has_every_exported_name(site):
    from cyclefit import cycles, finetune, judges, models

    for package in (cycles, finetune, judges, models):
        page = (site / "reference" / f"{package.__name__.split('.')[1]}.html").read_text()
        missing = [name for name in package.__all__ if f'id="{package.__name__}.{name}"' not in page]
        assert not missing, (package.__name__, missing)
    assert 'id="cyclefit.rerank.rerank"' in (site / "reference" / "rerank.html").read_text()


def test_a_page_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for source in map("".join, LOADED.findall(page.read_text())):
            assert not re.match(r"(https?:)?//", source), (page.name, source)
    for style in site.rglob("*.css"):
        assert not re.search(r"""url\(["']?(https?:)?//|@import""", style.read_text()), style.name
