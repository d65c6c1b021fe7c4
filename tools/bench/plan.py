"""How long a plan takes, and how much memory, for configs without weights.

python tools/bench/plan.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from measure import run, summary
from models import LLAMA_8B, LLAMA_405B, write_config

HERE = Path(__file__).parent


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in (("Llama-3-8B", LLAMA_8B), ("Llama-3.1-405B", LLAMA_405B)):
            folder = write_config(config, Path(temporary) / name)
            job = (Path(sys.executable), HERE / "job_ours.py", "plan", str(folder), "int4-int8", "-", "-")
            samples = [run(*job, threads=2) for _ in range(3)]
            print(f"plan {name:<16} {summary(samples)}", flush=True)


if __name__ == "__main__":
    main()
