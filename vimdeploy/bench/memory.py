"""How much memory a contender takes at its peak.

On a card, in this process while nothing else of ours runs: PyTorch's allocator counts its own bytes; for other runtimes
it is what the driver has less of. On the CPU, in a fresh process: the peak of its resident set above what it had before
the model was opened, so that neither Python nor the runtime's own code counts.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vimdeploy.bench.contenders import Contender, contender_from
from vimdeploy.bench.measure import SLOW_SECONDS
from vimdeploy.errors import VimDeployError
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.base import Prepared

MIB = 1 << 20
_RUNS = 3


class ProbeFailed(VimDeployError):
    """The process that was to measure a contender's memory ended without an answer."""


@dataclass
class Peak:
    mib: float = 0.0


@contextlib.contextmanager
def torch_peak() -> Iterator[Peak]:
    """What PyTorch's allocator held at most on the current card during the block, above what it held before."""
    import torch

    peak = Peak()
    _collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        yield peak
    finally:
        torch.cuda.synchronize()
        peak.mib = (torch.cuda.max_memory_allocated() - before) / MIB


@contextlib.contextmanager
def driver_peak() -> Iterator[Peak]:
    """What the card had less of at the end of the block than before: sessions keep what they once took."""
    peak = Peak()
    context = cuda.Context()
    try:
        _collect()
        before, _ = cuda.free_memory()
        yield peak
        context.enter()
        after, _ = cuda.free_memory()
        peak.mib = max(0, before - after) / MIB
    finally:
        context.close()


def counter_of(contender: Contender) -> contextlib.AbstractContextManager[Peak]:
    """The counter for a contender on the card; its opening and first runs belong in the block."""
    return torch_peak() if contender.memory == "torch" else driver_peak()


def first_runs(prepared: Prepared) -> None:
    """Run until whatever is allocated on the way has been, and wait for it."""
    began = time.perf_counter()
    for _ in range(_RUNS):
        prepared.run()
        if time.perf_counter() - began > SLOW_SECONDS:
            break
    if prepared.stream is not None:
        event = cuda.Event()
        event.record(prepared.stream)
        event.synchronize()
        event.close()


def _collect() -> None:
    """Let PyTorch give back what no one holds, cuBLAS's workspaces included: the next contender makes its own."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def in_a_fresh_process(contender: Contender, batch: int, threads: int | None, timeout: float = 600) -> float:
    """MiB of a process of its own. Raises ProbeFailed with the last line that process wrote."""
    request = json.dumps({"contender": contender.to_dict(), "batch": batch, "threads": threads})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vimdeploy.bench.memory"],
            input=request,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeFailed(f"no answer within {timeout:.0f} s", hint="leave memory out with --no-memory") from error
    answer = done.stdout.strip().splitlines()
    if done.returncode or not answer:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"ended with {done.returncode}"
        raise ProbeFailed(f"memory could not be measured: {reason}", hint="leave memory out with --no-memory")
    return float(json.loads(answer[-1])["mib"])


def _probe(request: Mapping[str, Any]) -> float:
    contender = contender_from(request["contender"])
    _import_runtime(contender)
    before = _status("VmRSS")
    opened = contender.open(request["batch"], request["threads"])
    first_runs(opened.prepared)
    peak = _status("VmHWM")
    opened.close()
    return max(0.0, peak - before)


def _import_runtime(contender: Contender) -> None:
    """What is imported whatever the model, before the first reading."""
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401

    runtime = getattr(contender, "runtime", "torch")
    if runtime.startswith("torch"):
        import torch

        import vimdeploy.models.vim  # noqa: F401

        torch.ones(64, 64) @ torch.ones(64, 64)
        if contender.family == "deit":
            with contextlib.suppress(ImportError):
                import timm  # noqa: F401
    elif runtime.startswith("onnxruntime"):
        import onnxruntime  # noqa: F401


def _status(field: str) -> float:
    """VmRSS, resident now, or VmHWM, at the peak, in MiB.

    Not getrusage's ru_maxrss, which in a fresh process still counts the one it was started from.
    """
    with open("/proc/self/status") as stream:
        return next((int(line.split()[1]) / 1024 for line in stream if line.startswith(field + ":")), 0.0)


if __name__ == "__main__":
    print(json.dumps({"mib": _probe(json.load(sys.stdin))}))
