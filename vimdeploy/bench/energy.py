"""Energy counters: NVML's of a card, RAPL's of a processor; None where the host has none or does not let us read it.

Both count what the whole device spends, idle power included, so a figure is what an inference costs on a host that does
nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any, Protocol

from vimdeploy.errors import VimDeployError
from vimdeploy.runtimes import cuda

#: below this much measured time a counter that moves a few times a second says little
LEAST_SECONDS = 0.5
_RAPL = Path("/sys/class/powercap")


class Meter(Protocol):
    name: str

    def joules(self) -> float:
        """Spent since some moment in the past."""


class NvmlMeter:
    """The card's own counter. Raises OSError or AttributeError without NVML, VimDeployError where it keeps none."""

    name = "NVML"

    def __init__(self, index: int = 0) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._check(self._nvml.nvmlInit_v2())
        bus = cuda.pci_bus_id(index).encode()
        self._check(self._nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(self._handle)))
        self.joules()

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self._check(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules)))
        return millijoules.value / 1e3

    def _check(self, status: int) -> None:
        if status:
            raise VimDeployError(f"NVML error {status}")


class RaplMeter:
    """All packages of the processor. Raises OSError where the counters are absent or not readable."""

    name = "RAPL"

    def __init__(self, root: Path = _RAPL) -> None:
        # intel-rapl:0, intel-rapl:1, ...: one a package; their parts have a second number.
        zones = [zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1]
        if not zones:
            raise FileNotFoundError(str(root))
        self._zones = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        self._last = [int(file.read_text()) for file, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        for i, (file, wraps_at) in enumerate(self._zones):
            now = int(file.read_text())
            self._total += (now - self._last[i]) % (wraps_at + 1)
            self._last[i] = now
        return self._total / 1e6


def meter(on_card: bool, index: int = 0) -> Any:
    """The meter of the card or of the processor, or None."""
    with contextlib.suppress(OSError, AttributeError, ValueError, VimDeployError):
        return NvmlMeter(index) if on_card else RaplMeter()
    return None
