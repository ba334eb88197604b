"""Environments of their own for the peers, made once below `.cache/envs` from the package registry."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path(".cache/envs")


def python(name: str) -> Path:
    """The interpreter of a peer's environment, which is installed where it is missing."""
    folder = FOLDER / name
    interpreter = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {name} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for arguments in _packages(name):
            subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *arguments], check=True)
        (folder / "ready").touch()
    return interpreter


def _packages(name: str) -> list[list[str]]:
    """What pip is asked for, call by call; libraries that both sides use have the same version."""
    shared = [f"{library}=={version(library).partition('+')[0]}" for library in ("torch", "transformers", "peft")]
    if name == "trl":
        return [[*shared, "trl==1.16.0", "pillow", "psutil"], ["--no-deps", "--editable", str(ROOT)]]
    raise ValueError(f"no peer is called {name}")
