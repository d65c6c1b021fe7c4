"""Where a model's files are: a local folder, or the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qcompiler.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*"]
_UNWANTED = ["*/*.safetensors", "consolidated*", "adapter_*", "onnx/*", "original/*"]


def resolve_model(model: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The local folder of a model: `model` itself if it is a folder, else the hub model of that id, downloaded.

    Raises `CheckpointError` when it is neither, or when the hub cannot be reached and its cache lacks the model.
    """
    if not model.strip():
        raise CheckpointError(
            f"the model's name is empty: {model!r}", hint="give a folder or a hub id; `.` is this folder"
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{model}: a folder has no revisions, but {revision!r} was asked for",
                hint="leave --revision (Python: revision=) out, or give a hub id",
            )
        return folder
    if folder.exists():
        raise CheckpointError(f"{model}: this is a file", hint="give the folder that holds the model's files")
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise CheckpointError(
            f"{model}: there is no such folder, and it is not a hub id", hint="a hub id looks like `owner/name`"
        )
    at = f"{model}@{revision}" if revision else model
    try:
        path = snapshot_download(
            model, revision=revision, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except GatedRepoError as error:
        raise CheckpointError(f"{at}: the model is gated", hint="ask for access on the hub, then log in") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: the model has no such revision", hint="give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: there is no such folder, and no such model on the hub", hint="check the spelling; log in if private"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{at}: there is no such folder, the hub cannot be reached, and its cache does not hold the model",
            hint="go online once, or give a local folder",
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{at}: not a hub id ({error})", hint="a hub id looks like `owner/name`") from error
    return Path(path)
