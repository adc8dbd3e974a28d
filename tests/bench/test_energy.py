"""bench/energy.py: counters that wrap round, and hosts that have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from vimdeploy.bench import energy


def zone(root: Path, name: str, microjoules: int, wraps_at: int = 999_999) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl-mmio:0"):
        zone(tmp_path, name, 100_000)
    meter = energy.RaplMeter(tmp_path)
    assert meter.joules() == 0
    zone(tmp_path, "intel-rapl:0", 350_000)
    zone(tmp_path, "intel-rapl:1", 200_000)
    zone(tmp_path, "intel-rapl:0:0", 900_000)
    assert meter.joules() == pytest.approx(0.35)
    assert meter.joules() == pytest.approx(0.35)


def test_a_counter_that_wraps_round(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900_000)
    meter = energy.RaplMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 50_000)  # 100,000 to the wrap, 50,000 after it
    assert meter.joules() == pytest.approx(0.15)


def test_a_host_without_counters_has_no_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        energy.RaplMeter(tmp_path)
    monkeypatch.setattr(energy.RaplMeter.__init__, "__defaults__", (tmp_path,))
    assert energy.meter(on_card=False) is None
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert energy.meter(on_card=True) is None
