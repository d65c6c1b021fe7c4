"""The command line. Errors are one message on standard error and exit code 2; an interrupt is one line and 130.

Where the reader of standard output goes away, the command ends without a word, and with 141.

All else is imported inside `main`, so that whoever interrupts the imports is answered too.
"""

from __future__ import annotations

import sys
from contextlib import suppress

INTERRUPTED = 130
"""What shells call a process that SIGINT ended."""


def main() -> None:
    """Entry point of the `qcompiler` command."""
    try:
        from qcompiler.cli.commands import run

        run()
    except KeyboardInterrupt:
        _say_interrupted()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        _say_interrupted()


def _say_interrupted() -> None:
    if sys.stderr is not None:  # where it is closed; `print` would take standard output instead
        with suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)
