"""docs/how-to/quantize.md: its figures are those of the results files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import page_scripts
import pytest


@pytest.fixture
def page() -> ModuleType:
    return page_scripts.load("int8_page")


def test_another_result_makes_another_page(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": "rounded", "points": 0.4, "interval": [-0.3, 1.1], "sqnr_db": 20.83}
    steps = [{**row, "model": "clean"}, {**row, "model": "outliers", "points": -0.2, "sqnr_db": 12.0}]
    (tmp_path / "cpu.json").write_text(json.dumps({"accuracy": {"steps": steps}}))
    monkeypatch.setattr(page, "CPU", tmp_path / "cpu.json")
    line = "| rounded | -0.4 (-1.1 to +0.3) | 20.8 dB | +0.2 (-1.1 to +0.3) | 12.0 dB |"
    assert line in page_scripts.filled(page).splitlines()
    monkeypatch.setattr(page, "CPU", tmp_path / "none.json")
    assert "Not measured yet" in page_scripts.filled(page)
