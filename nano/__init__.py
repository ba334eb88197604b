"""The embedded default model: its recipe, its evaluation and its weights."""

if __name__ != "servetune.nano":
    raise ImportError("import servetune.nano, not the nano/ folder")

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
