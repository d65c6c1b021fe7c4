"""`qcompiler inspect` of this checkout, whatever is installed.

python tools/inspect_graph.py MODEL --pipeline int4-int8 --tree
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from qcompiler.cli import main as run

    sys.argv.insert(1, "inspect")
    run()


if __name__ == "__main__":
    main()
