"""docs/how-to/tensorrt.md: its figures are those of the results files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import page_scripts
import pytest


@pytest.fixture
def page() -> ModuleType:
    return page_scripts.load("trt_page")


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
    lines = page_scripts.filled(page).splitlines()
    wanted = "| Vim-Ti fp16 | B | 1.0e-02 | 2.0e-03 | 0.999990 | 50.0% | - | 146 fp16 | 8.0 / 4.0 | 3.0 MB, 1.50 |"
    assert [line for line in lines if line.startswith("| Vim-Ti fp16 | ") and "MB" in line] == [wanted]
    monkeypatch.setattr(page, "PLANS", tmp_path / "none.json")
    assert "Not measured yet" in page_scripts.filled(page)
