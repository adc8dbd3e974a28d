"""The op library under test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vimdeploy.errors import RuntimeMissing
from vimdeploy.runtimes.library import ort_library_path

ROOT = Path(__file__).resolve().parent.parent


def onnxruntime_headers() -> list[str]:
    """Those that `make setup` found or fetched, so that a test fetches nothing a second time."""
    fetched = sorted((ROOT / "build").glob("*/onnxruntime-headers"))
    return [] if os.environ.get("ONNXRUNTIME_ROOT") or not fetched else [f"-DONNXRUNTIME_ROOT={fetched[0] / 'usr'}"]


def ort_library() -> Path:
    """What VIMDEPLOY_ORT_LIBRARY names, else the installed one, else the newest in build/."""
    try:
        return ort_library_path()
    except RuntimeMissing as missing:
        built = sorted((ROOT / "build").rglob("libvimdeploy_ort.so"), key=lambda path: path.stat().st_mtime)
        if not built:
            pytest.skip(str(missing))
        return built[-1]
