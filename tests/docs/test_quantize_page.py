"""docs/how-to/quantize.md: its figures are those of the results files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("int8_page", ROOT / "benchmarks" / "int8_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say(page: ModuleType) -> None:
    text = page.PAGE.read_text()
    assert page.fill(text) == text, "run: python benchmarks/int8_page.py"
    assert {f"<!-- figures: {name} -->" in text for name in page.REGIONS} == {True}


def test_another_result_makes_another_page(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": "rounded", "points": 0.4, "interval": [-0.3, 1.1], "sqnr_db": 20.83}
    steps = [{**row, "model": "clean"}, {**row, "model": "outliers", "points": -0.2, "sqnr_db": 12.0}]
    (tmp_path / "cpu.json").write_text(json.dumps({"accuracy": {"steps": steps}}))
    monkeypatch.setattr(page, "CPU", tmp_path / "cpu.json")
    line = "| rounded | -0.4 (-1.1 to +0.3) | 20.8 dB | +0.2 (-1.1 to +0.3) | 12.0 dB |"
    assert line in page.fill(page.PAGE.read_text()).splitlines()
    monkeypatch.setattr(page, "CPU", tmp_path / "none.json")
    assert "Not measured yet" in page.fill(page.PAGE.read_text())
