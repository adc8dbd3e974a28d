"""bench/measure.py: who runs when, what is counted, and that one contender's failure stays its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vimdeploy.bench import measure
from vimdeploy.bench.measure import Effort, HostClock, Timing, take_turns
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.base import Prepared


class Time:
    """A clock that moves only when a contender runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def contender(self, name: str, *durations_ms: float) -> Prepared:
        """Takes the durations in turn, the last one for ever."""
        left = list(durations_ms)

        def run() -> None:
            self.order.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return Prepared(run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: time.now)
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.0)
    return time


@pytest.mark.parametrize(
    "once_ms,calls",
    [(1.0, 100), (10.0, 10), (99.0, 1), (150.0, 1), (5000.0, 1), (0.001, measure.MOST_CALLS)],
)
def test_effort_shares_the_seconds_among_rounds_and_the_two_kinds(once_ms: float, calls: int) -> None:
    assert Effort(seconds=1.0, rounds=5).calls(once_ms) == calls


def test_percentiles_and_throughput() -> None:
    times = np.random.default_rng(0).gamma(3, 2, 1001)
    timing = Timing("host", latencies=list(times), bursts=[5.0, 1.0, 3.0])
    found = timing.latency()
    for key, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert found[key] == pytest.approx(np.sort(times)[int(q * 1000)])
    assert found["min"] == times.min() and found["samples"] == 1001 and timing.ms() == 3.0


def test_latency_is_of_each_call_and_throughput_of_the_mean(clock: Time) -> None:
    prepared = clock.contender("a", 2.0, 4.0, 6.0)
    assert HostClock().one_by_one(prepared.run, 3) == pytest.approx([2.0, 4.0, 6.0])
    prepared = clock.contender("a", 2.0, 4.0, 6.0)
    assert HostClock().in_a_row(prepared.run, 3) == pytest.approx(4.0)


def test_contenders_take_turns_and_another_begins_each_round(clock: Time) -> None:
    contenders = {name: clock.contender(name, 100.0) for name in "abc"}
    timings, failures = take_turns(contenders, Effort(seconds=0.8, rounds=2))
    assert not failures and {name: timing.ms() for name, timing in timings.items()} == pytest.approx(
        dict.fromkeys("abc", 100.0)
    )
    # Warm-up: two runs each. A turn: one not counted, two waited for, two in a row (0.8 s / 2 rounds / 2 kinds).
    assert "".join(clock.order) == "aabbcc" + "aaaaabbbbbccccc" + "bbbbbcccccaaaaa"
    assert all(len(timing.latencies) == 4 and len(timing.bursts) == 2 for timing in timings.values())


def test_a_slow_contender_runs_no_more_often_than_needed(clock: Time) -> None:
    timings, _ = take_turns({"a": clock.contender("a", 3000.0, 2000.0, 4000.0)}, Effort(seconds=1.0, rounds=2))
    assert len(clock.order) == 1 + 2 and timings["a"].latencies == pytest.approx([2000.0, 4000.0])
    assert timings["a"].ms() == pytest.approx(3000.0)


def test_a_slow_first_run_is_not_counted(clock: Time) -> None:
    timings, _ = take_turns({"a": clock.contender("a", 9000.0, 10.0)}, Effort(seconds=0.2, rounds=2))
    assert timings["a"].latency()["p99"] == pytest.approx(10.0) and timings["a"].ms() == pytest.approx(10.0)


def failing(after: int) -> Callable[[], None]:
    calls = iter(range(after))

    def run() -> None:
        if next(calls, None) is None:
            raise MemoryError("no room for the scores")

    return run


@pytest.mark.parametrize("after", [0, 3])
def test_a_contender_that_fails_does_not_stop_the_others(clock: Time, after: int) -> None:
    turns: list[int] = []
    timings, failures = take_turns(
        {"bad": Prepared(failing(after)), "good": clock.contender("good", 50.0)},
        Effort(seconds=0.2, rounds=3),
        turn=lambda: turns.append(1),
    )
    assert set(timings) == {"good"} and timings["good"].ms() == pytest.approx(50.0)
    assert isinstance(failures["bad"], MemoryError)
    assert len(turns) == 2 * (3 + 1)  # a progress bar still comes to its end


def test_energy_is_read_around_bursts_only(clock: Time) -> None:
    class Meter:
        name = "test"

        def joules(self) -> float:
            return 30.0 * clock.now  # 30 W

    timings, _ = take_turns({"a": clock.contender("a", 20.0)}, Effort(seconds=0.4, rounds=2), meters={"a": Meter()})
    timing = timings["a"]
    assert timing.joules is not None and timing.measured_inferences == 10
    assert timing.joules / timing.measured_inferences == pytest.approx(30.0 * 0.020)


def test_runs_on_a_stream_are_timed_by_the_cards_events(monkeypatch: pytest.MonkeyPatch, clock: Time) -> None:
    card = {"now": 0.0}
    alive = []

    class Event:
        def __init__(self) -> None:
            alive.append(self)

        def record(self, stream: int) -> None:
            assert stream == 7
            self.at = card["now"]

        def synchronize(self) -> None:
            pass

        def milliseconds_since(self, earlier: Event) -> float:
            return self.at - earlier.at

        def close(self) -> None:
            alive.remove(self)

    monkeypatch.setattr(cuda, "Event", Event)

    def run() -> None:
        card["now"] += 2.5
        clock.now += 0.001  # what the host took to start it

    timings, failures = take_turns({"a": Prepared(run, stream=7)}, Effort(seconds=0.1, rounds=2))
    assert not failures and timings["a"].clock == "CUDA events"
    assert timings["a"].ms() == pytest.approx(2.5) and timings["a"].latency()["p50"] == pytest.approx(2.5)
    assert not alive
