"""What has to be installed, said before an import of something older fails with words of its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from qcompiler.errors import CaptureError

OLDEST_TRANSFORMERS = "5.16"


def check_transformers() -> None:
    """Raise `CaptureError` for a Transformers that is too old to capture models from, or that is not there."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "0"
    if Version(found) < Version(OLDEST_TRANSFORMERS):
        raise CaptureError(
            f"Transformers {found} is too old to capture models from",
            hint=f"install transformers>={OLDEST_TRANSFORMERS}",
        )
