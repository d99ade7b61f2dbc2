"""Evaluation of finetuned models: every model on the same inputs, a table, figures and a report."""

from cyclefit.evaluate.captions import JUDGES, captions
from cyclefit.evaluate.images import images
from cyclefit.evaluate.score import score

__all__ = ["JUDGES", "captions", "images", "main", "report", "score"]


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


COMMANDS = {"captions": captions, "images": images, "score": score, "report": report}


def main(arguments: list[str]) -> int:
    """`evaluate.py captions --config NAME [--runs RUN ...]`, `images`, `score` or `report`."""
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
