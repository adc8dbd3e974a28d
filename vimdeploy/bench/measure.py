"""Timing: contenders take turns, round by round, so that a slow minute of the host is every contender's.

Two figures of each. Latency: one inference at a time, each waited for; its percentiles. Throughput: inferences started
one after another without waiting, as a busy service does. On a CUDA stream both are read from events on the card's own
clock, elsewhere from the host's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vimdeploy.bench.energy import Meter
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.base import Prepared

WARM_UP_SECONDS = 0.3
#: a contender whose run takes so long is not run more often than needed
SLOW_SECONDS = 1.0
#: the threads of a runtime's pool go on spinning for a while after its last run, on cores that the next one needs
SETTLE_SECONDS = 0.05
#: calls of one contender in one round, of each kind
MOST_CALLS = 200


@dataclass(frozen=True)
class Effort:
    """How long to measure: `seconds` a contender and case in `rounds` turns; a slow contender gets one run a turn."""

    seconds: float = 2.0
    rounds: int = 5

    def calls(self, once_ms: float) -> int:
        """Calls of each kind in one turn of a contender that takes `once_ms`."""
        return int(min(MOST_CALLS, max(1, self.seconds * 1e3 / self.rounds / 2 // max(once_ms, 1e-3))))


@dataclass
class Timing:
    """Samples of one contender in one case, in milliseconds an inference."""

    clock: str
    latencies: list[float] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)  # mean of each turn's
    joules: float | None = None
    measured_inferences: int = 0  # those that `joules` were spent on

    def latency(self) -> dict[str, float]:
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99])
        return {
            "p50": float(p50),
            "p95": float(p95),
            "p99": float(p99),
            "min": min(self.latencies),
            "mean": float(np.mean(self.latencies)),
            "samples": len(self.latencies),
        }

    def ms(self) -> float:
        """Milliseconds an inference when busy: the median of the turns."""
        return float(np.median(self.bursts))


class Clock(Protocol):
    name: str

    def one_by_one(self, run: Callable[[], object], calls: int) -> list[float]:
        """Milliseconds of each of `calls` inferences, each waited for."""

    def in_a_row(self, run: Callable[[], object], calls: int) -> float:
        """Milliseconds an inference of `calls` started without waiting."""


class HostClock:
    """For runs that return when they are done."""

    name = "host"

    def one_by_one(self, run: Callable[[], object], calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            before = time.perf_counter()
            run()
            times.append((time.perf_counter() - before) * 1e3)
        return times

    def in_a_row(self, run: Callable[[], object], calls: int) -> float:
        before = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - before) * 1e3 / calls


class StreamClock:
    """For runs that are enqueued on a CUDA stream of the current context."""

    name = "CUDA events"

    def __init__(self, stream: int) -> None:
        self._stream, self._before, self._after = stream, cuda.Event(), cuda.Event()

    def _time(self, run: Callable[[], object], calls: int) -> float:
        self._before.record(self._stream)
        for _ in range(calls):
            run()
        self._after.record(self._stream)
        self._after.synchronize()
        return self._after.milliseconds_since(self._before)

    def one_by_one(self, run: Callable[[], object], calls: int) -> list[float]:
        return [self._time(run, 1) for _ in range(calls)]

    def in_a_row(self, run: Callable[[], object], calls: int) -> float:
        return self._time(run, calls) / calls

    def close(self) -> None:
        self._before.close()
        self._after.close()


def clock_of(prepared: Prepared) -> Clock:
    return HostClock() if prepared.stream is None else StreamClock(prepared.stream)


def take_turns(
    contenders: Mapping[str, Prepared],
    effort: Effort | None = None,
    *,
    meters: Mapping[str, Meter | None] | None = None,
    turn: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time all contenders, interleaved; what each gave, and the error of each that failed on the way.

    ``meters``: the energy meter of a contender's device, read around its bursts. ``turn`` is called after every turn of
    a contender, and rounds + 1 times for each in all, the first for its warm-up.
    """
    effort = effort or Effort()
    timings: dict[str, Timing] = {}
    failures: dict[str, Exception] = {}
    calls: dict[str, int] = {}
    clocks = {name: clock_of(prepared) for name, prepared in contenders.items()}
    for name, prepared in contenders.items():
        with _collecting(name, failures, turn):
            calls[name] = effort.calls(_warm_up(prepared, clocks[name]))
            timings[name] = Timing(clocks[name].name)
    for i in range(effort.rounds):
        # Another order each round: whoever runs after a heavy neighbour finds its caches and clocks.
        for name in _rotated(list(contenders), i):
            if name in failures:
                turn()
                continue
            with _collecting(name, failures, turn):
                meter = (meters or {}).get(name)
                _turn(timings[name], contenders[name], clocks[name], calls[name], meter)
    for clock in clocks.values():
        if isinstance(clock, StreamClock):
            with contextlib.suppress(Exception):  # after an error of the card nothing of it can be closed
                clock.close()
    return {name: timing for name, timing in timings.items() if name not in failures}, failures


def _warm_up(prepared: Prepared, clock: Clock) -> float:
    """Run until caches, clocks and lazy set-up have settled; milliseconds of an inference."""
    began = time.perf_counter()
    once = clock.in_a_row(prepared.run, 1)
    if time.perf_counter() - began > SLOW_SECONDS:
        return once
    began = time.perf_counter()
    once = clock.in_a_row(prepared.run, 1)
    while time.perf_counter() - began < WARM_UP_SECONDS:
        once = min(once, clock.in_a_row(prepared.run, 3))
    return once


def _turn(timing: Timing, prepared: Prepared, clock: Clock, calls: int, meter: Meter | None) -> None:
    if isinstance(clock, HostClock):
        time.sleep(SETTLE_SECONDS)
    if calls == 1:
        # So slow that one inference fills a turn: the caches are its own soon enough, and it serves for both figures.
        before = meter.joules() if meter else None
        timing.latencies += clock.one_by_one(prepared.run, 1)
        timing.bursts.append(timing.latencies[-1])
    else:
        clock.in_a_row(prepared.run, 1)
        timing.latencies += clock.one_by_one(prepared.run, calls)
        before = meter.joules() if meter else None
        timing.bursts.append(clock.in_a_row(prepared.run, calls))
    if meter is not None and before is not None:
        timing.joules = (timing.joules or 0.0) + meter.joules() - before
        timing.measured_inferences += calls


@contextlib.contextmanager
def _collecting(name: str, failures: dict[str, Exception], turn: Callable[[], None]) -> Iterator[None]:
    """One contender's failure, out of memory say, is its own: the others go on."""
    try:
        yield
    except Exception as error:
        failures[name] = error
    turn()


def _rotated(names: Sequence[Any], by: int) -> list[Any]:
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]
