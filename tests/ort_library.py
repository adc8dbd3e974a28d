"""The op library under test."""

from __future__ import annotations

from pathlib import Path

import pytest

from vimdeploy.errors import RuntimeMissing
from vimdeploy.runtimes.library import ort_library_path

ROOT = Path(__file__).resolve().parent.parent


def ort_library() -> Path:
    """What VIMDEPLOY_ORT_LIBRARY names, else the installed one, else the newest in build/."""
    try:
        return ort_library_path()
    except RuntimeMissing as missing:
        built = sorted((ROOT / "build").rglob("libvimdeploy_ort.so"), key=lambda path: path.stat().st_mtime)
        if not built:
            pytest.skip(str(missing))
        return built[-1]
