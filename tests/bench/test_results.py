"""bench/results.py: what is kept, what may be set side by side, and the arithmetic of comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vimdeploy.bench.host import describe_host, difference
from vimdeploy.bench.results import Results, Row, crossover, load, memory_fraction, merge, speedup
from vimdeploy.errors import UsageError

H100 = {"cpu": {"name": "EPYC", "cores": 16}, "card": {"name": "NVIDIA H100", "sm": 90}, "versions": {}, "date": "x"}


def row(contender: str = "vim", ms: float | None = 10.0, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "role": "artifact", "family": "vim", "model": "Vim-Ti", "runtime": "r", "precision": "fp16", "batch": 1,
        "img_size": (224, 224), "tokens": 197, "on_card": True, "clock": "CUDA events", "peak_mib": 100.0,
        "memory": "torch", "latency_ms": {"p50": ms, "p95": ms, "p99": ms, "min": ms, "mean": ms, "samples": 5},
    }  # fmt: skip
    return Row(contender=contender, ms=ms, **{**values, **changes})


def other(**changes: Any) -> dict[str, Any]:
    return {**H100, **changes}


def test_results_survive_a_file(tmp_path: Path) -> None:
    results = Results(H100, {"batches": [1]}, (row(), row("deit", 20.0, role="baseline", notices=("n",))), ("note",))
    results.save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == results
    (comparison,) = json.loads((tmp_path / "r.json").read_text())["comparisons"]
    assert comparison["speedup"] == 2.0 and comparison["memory_fraction"] == 1.0
    assert (comparison["subject"], comparison["against"]) == ("vim", "deit")


@pytest.mark.parametrize(
    "content,said",
    [
        ("{", "cannot be read"),
        ("[]", "holds no results"),
        ("{}", "holds no results"),
        ('{"format": 2}', "is of format 2"),
        ('{"format": 1, "host": {}, "settings": {}, "rows": [{"x": 1}], "notices": []}', "holds no results"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        load(tmp_path / "r.json")
    assert caught.value.hint


@pytest.mark.parametrize(
    "changed,reason",
    [
        ({"card": {"name": "NVIDIA A100"}}, "the card is NVIDIA H100 in one and NVIDIA A100 in the other"),
        ({"card": None}, "the card is NVIDIA H100 in one and none in the other"),
        ({"cpu": {"name": "Xeon", "cores": 16}}, "the processor is EPYC in one and Xeon in the other"),
        ({"cpu": {"name": "EPYC", "cores": 2}}, "one had 16 cores and the other 2"),
    ],
)
def test_results_of_two_machines_are_not_merged(changed: dict[str, Any], reason: str) -> None:
    assert difference(H100, other(**changed)) == reason
    with pytest.raises(UsageError) as caught:
        merge([Results(H100, {}, (row(),)), Results(other(**changed), {}, (row(),))], ["a.json", "b.json"])
    assert caught.value.message == f"a.json and b.json cannot be compared: {reason}"


def test_results_of_one_machine_are_and_the_later_row_stays() -> None:
    newer = other(date="later", versions={"torch": "2"})
    merged = merge(
        [
            Results(H100, {}, (row("a", 1.0), row("b", 2.0))),
            Results(newer, {}, (row("b", 3.0), row("b", 4.0, batch=8))),
        ],
        ["1", "2"],
    )
    assert [(r.contender, r.batch, r.ms) for r in merged.rows] == [("a", 1, 1.0), ("b", 1, 3.0), ("b", 8, 4.0)]
    assert merged.host == newer and "several runs" in merged.notices[0]
    assert merge([merged], ["1"]) == merged


def test_this_host_can_be_compared_with_itself() -> None:
    host = describe_host()
    assert difference(host, json.loads(json.dumps(host))) is None
    assert host["cpu"]["cores"] >= 1 and host["versions"]["numpy"]


def test_the_subject_is_the_first_artifact_that_ran() -> None:
    rows = (row("deit", 1.0, role="baseline"), row("broken", None, failed="no"), row("b", 2.0), row("c", 3.0))
    results = Results(H100, {}, rows)
    subject = results.subject((1, (224, 224)))
    assert subject is not None and subject.contender == "b"
    assert results.subject((2, (224, 224))) is None


def test_speed_and_memory_are_of_the_subject_over_the_other() -> None:
    subject, slow = row("vim", 5.0, peak_mib=50.0), row("deit", 20.0, peak_mib=200.0)
    assert speedup(slow, subject) == 4.0 and memory_fraction(slow, subject) == 0.25
    # What PyTorch's allocator counts and what a driver does are two things.
    assert memory_fraction(dataclasses.replace(slow, memory="driver"), subject) is None
    assert memory_fraction(dataclasses.replace(slow, peak_mib=None), subject) is None


def test_the_crossover_of_two_power_laws_is_where_they_meet() -> None:
    """Ours grows with side^2, theirs with side^4: they meet where they were made to, whichever sizes were measured."""
    meet = 1100.0
    rows = []
    for side in (224, 512, 1024, 2048):
        rows.append(row("vim", (side / meet) ** 2, img_size=(side, side)))
        rows.append(row("deit", (side / meet) ** 4, img_size=(side, side)))
    assert crossover(rows, "vim", "deit", 1) == pytest.approx(meet)
    assert crossover(rows, "deit", "vim", 1) is None  # that one falls behind
    assert crossover(rows, "vim", "deit", 8) is None
    assert crossover(rows[:4], "vim", "deit", 1) is None  # not reached among these
