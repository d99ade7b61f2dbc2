"""The app: a local page on which a photo or a prompt goes through an evaluation's models.

`cyclefit app --config NAME --runs '[RUN, ...]'`. The settings are those of `evaluate.py captions` or
`evaluate.py images`, and the page shows both directions with either; `--out` is the folder whose reports it shows.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cyclefit import UserError
from cyclefit.config.start import importing, resolve_configs


def main(arguments: list[str]) -> int:
    """Serves the page until it is interrupted; returns the exit status.

    Raises:
        UserError: gradio is missing, or a setting or a run is wrong.

    """
    arguments = resolve_configs(arguments)
    if find_spec("gradio") is None:
        raise UserError("the app needs gradio: install it with `pip install 'cyclefit[app]'`")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    with importing():
        from cyclefit.app.page import page, serve
        from cyclefit.app.sides import sides

    kind, values = read(arguments)
    return serve(page(sides(kind, values), Path(values["out"]), values["seed"]))


def read(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Which evaluation a command line is one of, `captions` or `images`, and its settings, with the models.

    Raises:
        UserError: a setting is wrong.

    """
    from jsonargparse import ArgumentParser

    from cyclefit.app.sides import EVALUATIONS
    from cyclefit.config.settings import parameters, parse

    # Some settings are those of images only.
    images = parameters(EVALUATIONS["images"])[0].keys() - parameters(EVALUATIONS["captions"])[0].keys()
    kind = "images" if _given(arguments) & images else "captions"
    about = "Shows a photo's captions and a prompt's images by the models of an evaluation, on a page of this machine."
    parser = ArgumentParser(prog="cyclefit app", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a yaml file, or the bare name of one in configs/")
    parser.add_class_arguments(EVALUATIONS[kind])
    values = parser.instantiate_classes(parse(parser, arguments)).as_dict()
    values.pop("config", None)
    return kind, values


def _given(arguments: list[str]) -> set[str]:
    """The names of the settings that configs and command line set."""
    names, rest = set(), list(arguments)
    while rest:
        flag, _, value = rest.pop(0).partition("=")
        names.add(flag.lstrip("-").split(".")[0])
        path = Path(value or (rest[0] if rest else ""))
        if flag in ("-c", "--config") and path.is_file():
            names |= set(re.findall(r"^(\w+):", path.read_text(errors="replace"), re.MULTILINE))
    return names
