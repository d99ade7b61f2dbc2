"""How far long work is: rich's bars on a terminal; elsewhere, as in a job's log, lines with the time."""

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, Task, TaskID
from typing_extensions import override

T = TypeVar("T")

FIRST, EVERY = 2.0, 30.0
"""Seconds from the start of some work to its first line, and between lines."""


def on_terminal(stderr: bool = False) -> bool:
    """Whether the output can show bars: a terminal that moves its cursor, or a notebook."""
    console = Console(stderr=stderr)
    return console.is_jupyter or (console.is_interactive and console.file.isatty())


def write_line(text: str, stderr: bool = False) -> None:
    """Writes a line of ASCII with the time, at once: Python otherwise keeps what goes into a file or a pipe."""
    line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(text.split())}"
    print(line.encode("ascii", "backslashreplace").decode(), file=sys.stderr if stderr else sys.stdout, flush=True)


def standing(done: float, total: float | None, rate: float | None, left: float | None = None) -> str:
    """`120/500 (24%), 3.1/s, 0:02:03 left`, without what is unknown; the seconds `left` follow from `rate` if None."""
    parts = [f"{done:.0f}/{total:.0f} ({int(100 * done / total)}%)" if total else f"{done:.0f}"]
    if rate:
        parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if total and done < total:
            parts.append(f"{duration((total - done) / rate if left is None else left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`0:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def truth_first(values: dict[str, float]) -> dict[str, float]:
    """Values by name, those of truth before the others."""
    first = ("truth", "coverage", "false_captions", "false_images")
    last = {name: name.rpartition("/")[2] for name in values}
    return dict(sorted(values.items(), key=lambda x: first.index(last[x[0]]) if last[x[0]] in first else len(first)))


def in_words(values: dict[str, float]) -> str:
    """Values by name, those of truth first."""
    return ", ".join(f"{name} {value:.4g}" for name, value in truth_first(values).items())


class Lines(Progress):
    """A `Progress` that writes lines: after `FIRST` seconds of a task, then every `EVERY` seconds, and at its end."""

    def __init__(self, stderr: bool):
        # Without its thread, `track` reports each item as it is done.
        super().__init__(disable=True, auto_refresh=False, speed_estimate_period=300)
        self.stderr = stderr
        self.due: dict[TaskID, float] = {}
        """When each task's next line is."""

    @override
    def update(self, task_id: TaskID, **changes) -> None:
        super().update(task_id, **changes)
        self._look(self._tasks[task_id])

    @override
    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._look(self._tasks[task_id])

    @override
    def stop(self) -> None:
        for task in self.tasks:
            if task.visible:
                rate = task.completed / task.elapsed if task.elapsed else None
                self._write(task, rate, f", took {duration(task.elapsed)}")

    def _look(self, task: Task) -> None:
        if task.elapsed >= self.due.setdefault(task.id, FIRST):
            self.due[task.id] = task.elapsed + EVERY
            self._write(task, task.speed or task.completed / task.elapsed)

    def _write(self, task: Task, rate: float | None, more: str = "") -> None:
        write_line(f"{task.description}: {standing(task.completed, task.total, rate)}{more}", self.stderr)


def progress_bar(rank: int = 0, stderr: bool = False) -> Progress:
    """How far work is, on the first rank: a bar on a terminal, lines elsewhere."""
    if rank or on_terminal(stderr):
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        return Progress(*columns, console=Console(stderr=stderr), disable=bool(rank))
    return Lines(stderr)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """The items, with a `progress_bar` of how many are done."""
    with progress_bar() as progress:
        yield from progress.track(items, description=description)
