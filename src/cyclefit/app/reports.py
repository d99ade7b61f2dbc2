"""The reports that the page shows, and pieces of HTML."""

from pathlib import Path

from markupsafe import Markup

from cyclefit import UserError
from cyclefit.files import within
from cyclefit.report.page import is_page


def pages_in(folder: Path) -> list[Path]:
    """The reports in a folder and in the folders in it."""
    paths = [*folder.glob("*.html"), *folder.glob("*/*.html")]
    return sorted(path for path in paths if path.resolve().is_relative_to(folder.resolve()) and _is_page(path))


def framed(folder: Path, name: str | None) -> str:
    """A report of the folder in a frame of its own, which reaches neither this page nor the network."""
    if name is None:
        return ""
    try:
        path = within(folder, name, "the report", links=False)
    except UserError as error:
        return mistake(error)
    if not _is_page(path):
        return mistake(UserError(f"{name} is no report."))
    # Links to its own sections would lead to this page otherwise.
    text = path.read_text(encoding="utf-8").replace("<head>", '<head><base href="about:srcdoc">', 1)
    return html(Markup('<iframe title="report" sandbox="allow-scripts" srcdoc="{}"></iframe>').format(text))


def _is_page(path: Path) -> bool:
    return path.is_file() and is_page(path.read_text(encoding="utf-8", errors="replace"))


def mistake(error: UserError) -> str:
    """A sentence on what is wrong."""
    return html(Markup('<p class="mistake" role="alert">{}</p>').format(str(error)))


def html(content: Markup) -> str:
    """What the style of the app applies to."""
    return str(Markup('<div class="cyclefit">{}</div>').format(content))
