"""Which CUDA kernels are compiled, read from where they are listed. No torch, no numpy: tests/gpu uses it too."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instances(macro: str) -> list[tuple[int, ...]]:
    """What an X(...) list of kernels/cuda/choose_variant.h holds."""
    text = (ROOT / "kernels/cuda/choose_variant.h").read_text()
    listed = re.search(rf"#define {macro}\(X\)((?:.*\\\n)*.*\n)", text)
    assert listed, macro
    return [tuple(map(int, each.split(","))) for each in re.findall(r"X\(([\d, ]+)\)", listed[1])]
