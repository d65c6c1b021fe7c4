"""What goes to which stream: reports to standard output, bars to a terminal, and nothing of what libraries print."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from qcompiler.report import Report

_QUIET = {
    "TQDM_DISABLE": "1",
    "LOGURU_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
PIPED_WIDTH = 1000  # for programs and files: one row is one line, however long


def print_json(data: Mapping[str, Any]) -> None:
    from json import dumps

    print(dumps(data, indent=2, default=str))


def terminal_width() -> int | None:
    """Columns of the terminal; None where output is piped: for programs and files a row is one line, however long."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console().width


def print_lines(lines: Sequence[Text]) -> None:
    """In colour on a terminal; piped, plain."""
    if not sys.stdout.isatty():
        print("\n".join(line.plain for line in lines))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines:
        console.print(line, soft_wrap=True)


def print_result(report: Report) -> None:
    """As wide as the terminal; piped, as wide as the table, with no spaces at the ends of lines."""
    from io import StringIO

    from rich.console import Console

    from qcompiler.show import print_report

    if sys.stdout.isatty():
        print_report(report, Console(highlight=False))
        return
    text = StringIO()
    print_report(report, Console(file=text, width=PIPED_WIDTH, highlight=False))
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep bars, log lines and warnings of libraries off the streams; what matters of them reaches us as exceptions.

    Through the environment, because the libraries are not imported yet, and must not be for `--help`.
    """
    quiet = dict(_QUIET)
    if not sys.stderr.isatty():
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    added = {name: value for name, value in quiet.items() if name not in os.environ}
    os.environ.update(added)
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # who runs `python -W` wants to see them
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def progress_bar(*, downloads: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with the time left on a terminal, nothing where output is piped.

    Where a model may be downloaded first, it starts with the first partition: until then the hub shows its own bars.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    )  # graphs that are printed into a file stay out of the bar's stream
    task = bar.add_task("capture", total=None)

    def update(what: str, done: int, total: int) -> None:
        bar.start()
        bar.update(task, description=what, completed=done, total=total)

    if not downloads:
        bar.start()
    try:
        yield update
    finally:
        bar.stop()
