"""Pages of the site that are files of the project's folder: README.md is its first page (a hook of mkdocs)."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config) -> Files:
    """Adds README.md and the pages beside it; their links into docs/ become links within the site."""
    for path in sorted(ROOT.glob("*.md")):
        page = "index.md" if path.name == "README.md" else path.name
        files.append(File.generated(config, page, content=path.read_text().replace("](docs/", "](")))
    return files
