"""Evaluation of finetuned models: every model on the same inputs, a table, figures and a report."""

import json
from pathlib import Path

from cyclefit.data.read import look_for
from cyclefit.evaluate.captions import JUDGES, captions
from cyclefit.evaluate.compare import compare
from cyclefit.evaluate.images import images
from cyclefit.evaluate.score import score
from cyclefit.runs import find_checkpoint

__all__ = ["JUDGES", "captions", "compare", "images", "main", "report", "score"]


def report(evaluations: list[str], out: str | None = None, title: str | None = None) -> int:
    """Writes one page of an evaluation of captions and one of images.

    Args:
        evaluations: folders that `evaluate.py captions` and `evaluate.py images` wrote.
        out: the page; report.html in the first folder if not given.
        title: of the page.

    """
    from cyclefit.report import write_report

    print(f"report: {write_report(*evaluations, out=out, title=title)}")
    return 0


COMMANDS = {"captions": captions, "images": images, "score": score, "compare": compare, "report": report}


def main(arguments: list[str]) -> int:
    """`evaluate.py captions --config NAME [--runs RUN ...]`, `images`, `score`, `compare RUN ...` or `report`."""
    from jsonargparse import ArgumentParser

    from cyclefit.start import resolve_configs

    parser = ArgumentParser(prog="evaluate.py", description="Evaluates finetuned models against reranked inference.")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.__doc__.split("\n\n")[0])
        sub.add_argument("--config", action="config", help="a yaml file, or the bare name of one in configs/")
        sub.add_function_arguments(command)
        commands.add_subcommand(name, sub)
    if arguments[:1] == ["compare"]:
        # Runs stand by themselves, `compare runs/a runs/b`.
        count = next((i for i, a in enumerate(arguments[1:]) if a.startswith("-")), len(arguments) - 1)
        if count:
            arguments = ["compare", f"--runs={json.dumps(arguments[1 : count + 1])}", *arguments[count + 1 :]]
    parsed = parser.parse_args(resolve_configs(arguments))
    if parsed.subcommand in ("captions", "images"):
        # Before minutes are spent on loading models.
        wanted = parsed[parsed.subcommand]
        look_for(**{f"shards.{split}": shards for split, shards in wanted.shards.items()})
        for run in wanted.runs or []:
            find_checkpoint(Path(run), wanted.checkpoint)
    values = parser.instantiate_classes(parsed)[parsed.subcommand].as_dict()
    values.pop("config", None)
    return COMMANDS[parsed.subcommand](**values)
