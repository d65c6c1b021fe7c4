"""Run a job in a process of its own, and measure its wall time and memory from the end of its imports.

A job is a Python script that calls `measured` around what counts. The parent samples the child's anonymous memory (what
it allocated: `RssAnon`) and its whole resident set (mapped files included) every few milliseconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_MARK = "@@measured "
_PERIOD = 0.005  # seconds


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds, and MiB above what the process had once its imports were done. `values` are what the job reported."""

    seconds: float
    anonymous: float
    resident: float
    values: Mapping[str, float]


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """In the child: bracket what counts. Numbers put into the dict reach the parent."""
    values: dict[str, float] = {}
    _tell({"event": "start"})
    sys.stdin.readline()
    start = time.perf_counter()
    yield values
    _tell({"event": "stop", "seconds": time.perf_counter() - start, "values": values})
    sys.stdin.readline()


def _tell(message: Mapping[str, object]) -> None:
    print(_MARK + json.dumps(message), flush=True)


def run(python: Path, script: Path, *arguments: str, threads: int, timeout: float = 3600) -> Sample:
    """In the parent: run one job. Raises `RuntimeError` with its output when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    child = subprocess.Popen(
        [str(python), str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    lines: list[str] = []
    _await(child, lines)
    base = _memory(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    peak = base
    os.set_blocking(child.stdout.fileno(), False)
    stop: dict[str, object] | None = None
    deadline = time.monotonic() + timeout
    while stop is None:
        now = _memory(child.pid)
        peak = (max(peak[0], now[0]), max(peak[1], now[1]))
        line = child.stdout.readline()
        if line.startswith(_MARK):
            stop = json.loads(line.removeprefix(_MARK))
        elif line:
            lines.append(line)
        elif child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            raise RuntimeError(f"{script.name} {' '.join(arguments)} did not finish:\n{''.join(lines[-40:])}")
        else:
            time.sleep(_PERIOD)
    child.stdin.write("\n")
    child.stdin.close()
    child.wait()
    values = stop["values"]
    assert isinstance(values, dict)
    return Sample(float(str(stop["seconds"])), peak[0] - base[0], peak[1] - base[1], values)


def _await(child: subprocess.Popen[str], lines: list[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(_MARK):
            return
        lines.append(line)
    raise RuntimeError(f"the job failed before it started:\n{''.join(lines[-40:])}")


def _memory(pid: int) -> tuple[float, float]:
    """Anonymous and whole resident memory of a process, in MiB."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        )
        return tuple(int(fields[key].split()[0]) / 1024 for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return (0.0, 0.0)


def summary(samples: list[Sample]) -> str:
    """Medians in words."""
    return (
        f"{median(s.seconds for s in samples):8.2f} s   {median(s.anonymous for s in samples):8.0f} MiB anonymous   "
        f"{median(s.resident for s in samples):8.0f} MiB resident"
    )
