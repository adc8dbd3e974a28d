"""What a benchmark found: rows, the host they belong to, and how they compare. JSON in and out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vimdeploy.bench.host import difference
from vimdeploy.bundle import replacing_file
from vimdeploy.errors import UsageError

FORMAT = 1
ARTIFACT, BASELINE = "artifact", "baseline"


@dataclass(frozen=True)
class Row:
    """One contender in one case. A row with `failed` has no figures, and says why.

    Times are milliseconds an inference of the whole batch, sizes bytes, memory MiB. ``memory`` says which counter was
    read: "torch" (its allocator's peak), "driver" (what the card had less of), "process" (peak resident set of a fresh
    process above what its runtime takes before a model is loaded).
    """

    contender: str
    role: str  # artifact | baseline
    family: str  # vim | deit
    model: str
    runtime: str  # as the runtime describes itself
    precision: str
    batch: int
    img_size: tuple[int, int]  # (height, width)
    tokens: int
    on_card: bool
    clock: str = ""
    latency_ms: Mapping[str, float] | None = None  # p50, p95, p99, min, mean, samples
    ms: float | None = None  # when busy
    images_per_s: float | None = None
    peak_mib: float | None = None
    memory: str | None = None
    model_bytes: int | None = None
    engine_bytes: int | None = None
    joules_per_image: float | None = None
    energy: str | None = None  # which meter
    notices: tuple[str, ...] = ()
    failed: str | None = None

    @property
    def case(self) -> tuple[int, tuple[int, int]]:
        return self.batch, self.img_size


@dataclass(frozen=True)
class Results:
    """Rows of one run, or of several on one host. ``settings`` is what the run was told."""

    host: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    notices: tuple[str, ...] = field(default=())

    def cases(self) -> list[tuple[int, tuple[int, int]]]:
        """(batch, image size), by size and then by batch."""
        return sorted({row.case for row in self.rows}, key=lambda case: (case[1], case[0]))

    def of(self, case: tuple[int, tuple[int, int]]) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def subject(self, case: tuple[int, tuple[int, int]]) -> Row | None:
        """The row others are compared with: the case's first artifact that ran."""
        return next((row for row in self.of(case) if row.role == ARTIFACT and row.failed is None), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "host": dict(self.host),
            "settings": dict(self.settings),
            "rows": [{**dataclasses.asdict(row), "img_size": list(row.img_size)} for row in self.rows],
            "comparisons": [comparison for case in self.cases() for comparison in self._comparisons(case)],
            "notices": list(self.notices),
        }

    def _comparisons(self, case: tuple[int, tuple[int, int]]) -> list[dict[str, Any]]:
        subject = self.subject(case)
        if subject is None:
            return []
        return [
            {
                "batch": case[0],
                "img_size": list(case[1]),
                "subject": subject.contender,
                "against": row.contender,
                "speedup": speedup(row, subject),
                "memory_fraction": memory_fraction(row, subject),
            }
            for row in self.of(case)
            if row is not subject and row.failed is None
        ]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Results:
        """The inverse of `to_dict`. Raises UsageError naming `source` when it is something else."""
        try:
            if values["format"] != FORMAT:
                raise UsageError(
                    f"{source} is of format {values['format']!r}; this vimdeploy reads {FORMAT}", hint="measure again"
                )
            rows = tuple(
                Row(
                    **{
                        **row,
                        "img_size": (row["img_size"][0], row["img_size"][1]),
                        "notices": tuple(row["notices"]),
                    }
                )
                for row in values["rows"]
            )
            return cls(values["host"], values["settings"], rows, tuple(values["notices"]))
        except (KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"{source} holds no results of `vimdeploy bench` ({type(error).__name__}: {error})",
                hint="name a file that `vimdeploy bench --output` wrote",
            ) from error

    def save(self, path: Path) -> None:
        with replacing_file(path) as scratch:
            scratch.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def load(path: Path) -> Results:
    """Results that `save` wrote. Raises UsageError."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as results: {error}", hint="name a file of --output") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no results of `vimdeploy bench`", hint="name a file of --output")
    return Results.from_dict(values, str(path))


def merge(parts: Sequence[Results], names: Sequence[str]) -> Results:
    """The rows of all, of one host. Raises UsageError when two are of different cards or processors.

    A contender measured twice in the same case keeps its last row.
    """
    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        reason = difference(first.host, part.host)
        if reason:
            raise UsageError(
                f"{names[0]} and {name} cannot be compared: {reason}",
                hint="measure both on one host, in one run where you can",
            )
    kept: dict[tuple[str, int, tuple[int, int]], Row] = {}
    for part in parts:
        for row in part.rows:
            kept[(row.contender, row.batch, row.img_size)] = row
    notices = tuple(dict.fromkeys(notice for part in parts for notice in part.notices))
    if len(parts) > 1:
        notices += ("rows of several runs: the host may have been busier in one than in another",)
    return Results(parts[-1].host, parts[-1].settings, tuple(kept.values()), notices)


def speedup(row: Row, subject: Row) -> float | None:
    """How many times faster `subject` is, in throughput."""
    return row.ms / subject.ms if row.ms and subject.ms else None


def memory_fraction(row: Row, subject: Row) -> float | None:
    """What part of row's memory `subject` takes; None when they were read from different counters."""
    if not row.peak_mib or subject.peak_mib is None or row.memory != subject.memory:
        return None
    return subject.peak_mib / row.peak_mib


def crossover(rows: Iterable[Row], ours: str, theirs: str, batch: int) -> float | None:
    """The image side, in pixels, from which on `ours` is faster than `theirs` at that batch.

    Read between the two measured sizes where the ratio passes 1, on logarithmic scales; None when it does not pass.
    """
    times: dict[str, dict[int, float]] = {ours: {}, theirs: {}}
    for row in rows:
        if row.batch == batch and row.contender in times and row.ms and row.img_size[0] == row.img_size[1]:
            times[row.contender][row.img_size[0]] = row.ms
    sides = sorted(set(times[ours]) & set(times[theirs]))
    points = [(math.log(side), math.log(times[theirs][side] / times[ours][side])) for side in sides]
    for (low, before), (high, after) in itertools.pairwise(points):
        if before <= 0 < after:
            return math.exp(low - before / (after - before) * (high - low))
    return None
