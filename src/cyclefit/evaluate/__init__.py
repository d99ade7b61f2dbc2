"""Evaluation of finetuned models: every model on the same inputs, a table, figures and a report."""

from cyclefit.evaluate.captions import JUDGES, captions
from cyclefit.evaluate.images import images

__all__ = ["JUDGES", "captions", "images", "main"]

COMMANDS = {"captions": captions, "images": images}


def main(arguments: list[str]) -> int:
    """`evaluate.py captions --config NAME [--runs RUN ...]`, or `evaluate.py images`."""
    from jsonargparse import ArgumentParser

    from cyclefit.cli import resolve_configs

    parser = ArgumentParser(prog="evaluate.py", description="Evaluates finetuned models against reranked inference.")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.__doc__.split("\n\n")[0])
        sub.add_argument("--config", action="config", help="a yaml file, or the bare name of one in configs/")
        sub.add_function_arguments(command)
        commands.add_subcommand(name, sub)
    parsed = parser.parse_args(resolve_configs(arguments))
    values = parser.instantiate_classes(parsed)[parsed.subcommand].as_dict()
    values.pop("config", None)
    return COMMANDS[parsed.subcommand](**values)
