"""Fetch the libraries that the inspection page ships: `python tools/vendor_page_libraries.py` (needs npm).

Takes each package's own minified file and licence as published, unchanged, and writes `libraries.json` beside them:
what is there, in loading order, with SHA-256. To take a newer release, change its version here and run it again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "qcompiler" / "inspection" / "page" / "vendor"


@dataclass(frozen=True)
class Library:
    """A package of the npm registry and the one file of it that a page loads."""

    package: str
    version: str
    file: str

    @property
    def name(self) -> str:
        return self.package.rpartition("/")[2]


# In loading order: each of d3's needs those before it.
LIBRARIES = (
    Library("@dagrejs/dagre", "3.1.3", "dist/dagre.min.js"),
    Library("d3-dispatch", "3.0.2", "dist/d3-dispatch.min.js"),
    Library("d3-selection", "3.0.0", "dist/d3-selection.min.js"),
    Library("d3-drag", "3.0.1", "dist/d3-drag.min.js"),
    Library("d3-color", "3.1.1", "dist/d3-color.min.js"),
    Library("d3-interpolate", "3.0.2", "dist/d3-interpolate.min.js"),
    Library("d3-timer", "3.0.2", "dist/d3-timer.min.js"),
    Library("d3-ease", "3.0.2", "dist/d3-ease.min.js"),
    Library("d3-transition", "3.0.2", "dist/d3-transition.min.js"),
    Library("d3-zoom", "3.0.0", "dist/d3-zoom.min.js"),
)


def main() -> None:
    VENDOR.mkdir(parents=True, exist_ok=True)
    for old in VENDOR.iterdir():
        old.unlink()
    listed = [_fetch(library) for library in LIBRARIES]
    (VENDOR / "libraries.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _fetch(library: Library) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{library.package}@{library.version}"]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
        with tarfile.open(Path(folder) / packed) as archive:
            script, licence, about = (_member(archive, name) for name in (library.file, "LICENSE", "package.json"))
    (VENDOR / f"{library.name}.js").write_bytes(script)
    (VENDOR / f"{library.name}.LICENSE").write_bytes(licence)
    return {
        "package": library.package,
        "version": library.version,
        "file": f"{library.name}.js",
        "source": library.file,
        "licence": str(json.loads(about)["license"]),
        "sha256": hashlib.sha256(script).hexdigest(),
    }


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(f"package/{name}")
    if found is None:
        raise FileNotFoundError(f"the package has no file {name}")
    return found.read()


if __name__ == "__main__":
    main()
