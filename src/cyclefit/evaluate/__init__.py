"""Evaluation of finetuned models: every model on the same inputs, a table, figures and a report."""

import json
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from cyclefit import UserError
from cyclefit.data import check_shards
from cyclefit.evaluate.base import Evaluate
from cyclefit.evaluate.captions import JUDGES, Captions
from cyclefit.evaluate.common import check_out
from cyclefit.evaluate.compare import compare
from cyclefit.evaluate.draw import draw
from cyclefit.evaluate.images import Images
from cyclefit.evaluate.judges import judges
from cyclefit.evaluate.matrix import Matrix, part_folder
from cyclefit.evaluate.questions import questions
from cyclefit.evaluate.run import run as run_evaluation
from cyclefit.evaluate.score import score
from cyclefit.runs import find_checkpoint, hold

__all__ = [
    "JUDGES", "Captions", "Evaluate", "Images", "Matrix", "compare", "draw", "judges", "main", "questions", "report",
    "score",
]  # fmt: skip


def report(evaluations: list[str], out: str | None = None) -> int:
    """Writes one page of an evaluation of captions and one of images.

    Args:
        evaluations: folders that `evaluate.py captions` and `evaluate.py images` wrote.
        out: the page; report.html in the first folder if not given.

    """
    from cyclefit.report import write_report

    print(f"report: {write_report(*evaluations, out=out)}")
    return 0


EVALUATIONS = {"captions": Captions, "images": Images, "matrix": Matrix}
COMMANDS = EVALUATIONS | {
    "judges": judges, "score": score, "questions": questions, "draw": draw, "compare": compare, "report": report,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """`evaluate.py captions --config NAME [--runs RUN ...]`, `images`, `compare RUN ...`, and the other COMMANDS."""
    from jsonargparse import ArgumentParser

    from cyclefit.config.settings import parse
    from cyclefit.config.start import resolve_configs

    description = "Evaluates finetuned models against reranked inference."
    parser = ArgumentParser(prog="cyclefit evaluate", description=description, exit_on_error=False, allow_abbrev=False)
    commands, parsers = parser.add_subcommands(), {}
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.__doc__.split("\n\n")[0])
        sub.add_argument("--config", action="config", help="a yaml file, or the bare name of one in configs/")
        add = sub.add_class_arguments if name in EVALUATIONS else sub.add_function_arguments
        add(command)
        commands.add_subcommand(name, sub)
        parsers[name] = sub
    name, *arguments = resolve_configs(arguments) or [""]
    if name.startswith("-"):
        parser.parse_args([name])
    if name not in COMMANDS:
        near = "".join(f"; did you mean {known}?" for known in get_close_matches(name, COMMANDS, 1))
        raise UserError(f"evaluate.py takes one of {', '.join(COMMANDS)}, not {name!r}{near}")
    if name == "compare":
        # Runs stand by themselves, `compare runs/a runs/b`.
        count = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
        if count:
            arguments = [f"--runs={json.dumps(arguments[:count])}", *arguments[count:]]
    del parsers[name].parent_parser  # which --print_config would look for
    parsed = parse(parsers[name], arguments)
    with ExitStack() as held:
        if name in (*EVALUATIONS, "judges"):  # before models are loaded
            check_out(Path(parsed.out), name, parsed.benchmarks if name == "judges" else parsed.shards)
            if name in EVALUATIONS:
                check_shards(**{f"shards.{split}": shards for split, shards in parsed.shards.items()})
                for run in parsed.runs or []:
                    find_checkpoint(Path(run), parsed.checkpoint)
            if rank_zero_only.rank == 0:  # of a launch
                folder = Path(parsed.out)
                # The parts of a matrix are worked on at the same time.
                held.enter_context(hold(part_folder(folder, parsed.part) if name == "matrix" else folder, "--out"))
        values = parsers[name].instantiate_classes(parsed).as_dict()
        values.pop("config", None)
        done = COMMANDS[name](**values)
        if name == "matrix":
            return done.run()
        return run_evaluation(done) if name in EVALUATIONS else done
