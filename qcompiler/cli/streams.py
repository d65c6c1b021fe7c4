"""What goes to which stream: reports to standard output, bars to a terminal, and nothing of what libraries print."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

from qcompiler.errors import OutputError, printable

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


class _Output(TextIOWrapper):
    """Standard output, whose errors are told from those of files that a command reads or writes.

    They are told here and not below: an interrupt in Python code between the buffer and the file would have the buffer
    write again what it wrote.
    """

    @property
    def buffer(self) -> Any:
        """None: click writes to what lies below where it takes the encoding for a mistake."""
        return None

    def write(self, text: str, /) -> int:
        with _writing():
            return super().write(text)

    def flush(self) -> None:
        with _writing():
            super().flush()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"standard output cannot be written: {error.strerror or error}",
            hint="send it to a file on a disk with free space",
        ) from error


@contextmanager
def standard_error() -> Iterator[None]:
    """Where standard error is closed, what is printed to it within goes nowhere: else it might to standard output."""
    if sys.stderr is not None:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def standard_output() -> Iterator[None]:
    """What is printed within has been written at its end. What standard output has no character for is escaped.

    Raises `OutputError` where it is closed, and at once: the next file that is opened would take its place; or where it
    cannot be written.
    """
    stdout: TextIO | None = sys.stdout
    if stdout is None:
        raise OutputError("standard output is closed", hint="leave it open, or send it to /dev/null")
    if not isinstance(stdout, TextIOWrapper):
        yield  # a caller in this process reads it, and takes all text
        return
    try:
        descriptor = stdout.fileno()
    except OSError:  # the same, with bytes
        yield
        return
    stdout.flush()
    # A stream of its own: what it could not write goes with it, and does not fail again when the interpreter ends.
    output = _Output(
        BufferedWriter(FileIO(descriptor, "wb", closefd=False)),
        encoding=stdout.encoding,
        errors="backslashreplace" if stdout.errors in ("strict", "surrogateescape") else stdout.errors,
        line_buffering=stdout.line_buffering or stdout.write_through,
    )
    try:
        with redirect_stdout(output):
            yield
        output.flush()
    except SystemExit:
        output.flush()  # an error here counts for more than the exit code
        raise
    finally:
        with suppress(OutputError, OSError):
            output.close()


def print_error(error: Exception) -> None:
    """One message on standard error, if that can be written."""
    if sys.stderr is not None:  # where it is closed; `print` would take standard output instead
        with suppress(OSError):
            print("\n".join(map(printable, f"error: {error}".split("\n"))), file=sys.stderr)


def on_terminal(stream: TextIO | None) -> bool:
    """Whether a stream, if there is one, is a terminal."""
    return stream is not None and stream.isatty()


def print_json(data: Mapping[str, Any]) -> None:
    from json import dumps

    print(dumps(data, indent=2, default=str))


def print_json_text(text: str) -> None:
    """JSON in ASCII, as `print_json` writes it: no encoding of standard output changes it."""
    from json import dumps

    print(re.sub(r"[^\x00-\x7f]", lambda found: dumps(found[0])[1:-1], text.rstrip()))


def terminal_width() -> int | None:
    """Columns of the terminal; None where output is piped: for programs and files a row is one line, however long."""
    if not on_terminal(sys.stdout):
        return None
    from rich.console import Console

    return Console().width


def print_lines(lines: Sequence[Text]) -> None:
    """In colour on a terminal; piped, plain."""
    if not on_terminal(sys.stdout):
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

    if on_terminal(sys.stdout):
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
    if not on_terminal(sys.stderr):
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
    if not on_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=on_terminal(sys.stdout)
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
