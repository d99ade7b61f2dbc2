"""The command `cyclefit`, also `python -m cyclefit`: `cyclefit train --config NAME`.

A subcommand's modules are imported when it runs, so `cyclefit --help` and `cyclefit train --help` answer at once.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from cyclefit import UserError
from cyclefit.config.start import OPTIONS, importing, resolve_configs, run

COMMANDS = {
    "train": ("cyclefit.train.cli:train", "finetune a captioner, a generator or both"),
    "evaluate": ("cyclefit.evaluate:main", "compare finetuned models with reranked inference, and other evaluations"),
    "data": ("cyclefit.data.__main__:main", "write and verify shards of images and captions"),
    "scenes": ("cyclefit.miniature.scenes:main", "write the data of the miniature world"),
    "latents": ("cyclefit.latents:main", "cache the latents of images in their shards"),
    "export": ("cyclefit.export:main", "export the trained weights of a run for other software"),
    "status": ("cyclefit.status:main", "say what a run is, how far it is, what it measured, and how to go on"),
    "app": ("cyclefit.app:main", "show photos and prompts going through an evaluation's models, in a browser"),
    "bridge": ("cyclefit.models.bridge:main", "count the tokens that two models' vocabularies share"),
}
"""The function of each subcommand, and what it does."""

HELP = ("-h", "--help")


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<14}{what}" for name, what in rows.items())


def _usage() -> str:
    commands = _table({name: what for name, (_, what) in COMMANDS.items()})
    return f"usage: cyclefit COMMAND ...\n\n{commands}\n\n`cyclefit COMMAND --help` lists the options of a command."


def _usage_of_train() -> str:
    options = {"config": "a yaml file, or the name of one that comes with cyclefit; may be repeated", **OPTIONS}
    rows = _table({f"--{name}": what for name, what in options.items()})
    return (
        f"usage: cyclefit train --config NAME [--KEY=VALUE ...]\n\n{rows}\n\n"
        "Every setting of a config is an option too, such as --model.cycle.weight=0.3 or --trainer.max_steps=100;\n"
        "`cyclefit train --config NAME --help` lists them all."
    )


def main(arguments: list[str]) -> int:
    """Runs a subcommand; a missing config is reported before slow imports."""
    name, *rest = arguments or HELP[:1]
    if name in HELP:
        print(_usage())
        return 0
    if name not in COMMANDS:
        near = "".join(f"; did you mean {known}?" for known in get_close_matches(name, COMMANDS, 1))
        raise UserError(f"cyclefit takes one of {', '.join(COMMANDS)}, not {name!r}{near}")
    if name == "train" and rest in ([], *([flag] for flag in HELP)):
        print(_usage_of_train())
        return 0
    if name in ("train", "evaluate"):
        resolve_configs(rest)
    module, _, function = COMMANDS[name][0].partition(":")
    with importing():
        function = getattr(import_module(module), function)
    return function(rest)


def cyclefit() -> None:
    """The console script."""
    run(main)


if __name__ == "__main__":
    cyclefit()
