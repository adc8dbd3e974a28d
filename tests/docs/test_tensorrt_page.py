"""docs/how-to/tensorrt.md: its figures are those of the results files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trt_page", ROOT / "benchmarks" / "trt_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say(page: ModuleType) -> None:
    text = page.PAGE.read_text()
    assert page.fill(text) == text, "run: python benchmarks/trt_page.py"
    assert {f"<!-- figures: {name} -->" in text for name in page.REGIONS} == {True}


def test_of_a_plan_measured_twice_the_later_one_is_shown(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "model": "vim_tiny", "precision": "fp16", "build_s_cold": 9.0, "build_s_warm": 4.0, "plan_bytes": 3_000_000,
        "weight_bytes": 2_000_000, "found": {"projections": {"fp16": 146}},
        "batches": {"64": {"max_abs": 0.01, "rel_rms": 0.002, "cosine": 0.99999, "top1": 0.5}},
    }  # fmt: skip
    for name, card, cold in (("earlier", "NVIDIA A", 9.0), ("later", "NVIDIA B", 8.0)):
        values = {"card": card, "builds": [{**row, "build_s_cold": cold}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    monkeypatch.setattr(page, "EARLIER", tmp_path / "earlier.json")
    monkeypatch.setattr(page, "PLANS", tmp_path / "later.json")
    lines = page.fill(page.PAGE.read_text()).splitlines()
    wanted = "| Vim-Ti fp16 | B | 1.0e-02 | 2.0e-03 | 0.999990 | 50.0% | - | 146 fp16 | 8.0 / 4.0 | 3.0 MB, 1.50 |"
    assert [line for line in lines if line.startswith("| Vim-Ti fp16 | ") and "MB" in line] == [wanted]
    monkeypatch.setattr(page, "PLANS", tmp_path / "none.json")
    assert "Not measured yet" in page.fill(page.PAGE.read_text())
