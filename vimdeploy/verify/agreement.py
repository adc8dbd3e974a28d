"""Two models on the same images: how far their scores are apart, how often they choose alike, which is right oftener.

What rounding to int8 costs is the difference of two accuracies on the same images, whose uncertainty is far less than
that of either: most images say the same of both.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """A model's scores against a reference's.

    ``points``: percentage points of top-1 lost (negative: gained), with their 95 % ``interval``; by labels where there
    are some, else the images on which the two choose differently. ``sqnr_db``: signal to noise of the scores.
    """

    n: int
    by: str  # labels | agreement
    points: float
    interval: tuple[float, float]
    top1_reference: float | None
    top1: float | None
    agreement: float
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "interval": list(self.interval), "text": self.text()}

    def text(self) -> str:
        """In one line."""
        low, high = self.interval
        said = f"top-1 agrees on {self.agreement:.2%}, SQNR {self.sqnr_db:.1f} dB"
        if self.top1 is None or self.top1_reference is None:
            return said
        change = f"{0 - self.points:+.2f} points (95 % interval {-high:+.2f} to {-low:+.2f})"
        return f"top-1 {self.top1_reference:.2%} -> {self.top1:.2%}, {change}; {said}"


def agreement(got: np.ndarray, reference: np.ndarray, targets: np.ndarray | None = None) -> Agreement:
    """Compare scores (n, classes); `targets` (n,) are the right classes.

    Raises ValueError when shapes differ or there is nothing to compare.
    """
    if got.shape != reference.shape:
        raise ValueError(f"shape {got.shape}, and the reference's is {reference.shape}")
    if not got.size:
        raise ValueError("nothing was compared")
    chosen, wanted = got.argmax(-1), reference.argmax(-1)
    same = float((chosen == wanted).mean())
    n = len(got)
    if targets is None:
        lost, gained = int((chosen != wanted).any(axis=tuple(range(1, chosen.ndim))).sum()), 0
        before = after = None
    else:
        right, was_right = chosen == targets, wanted == targets
        lost, gained = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        before, after = float(was_right.mean()), float(right.mean())
    low, high = paired_interval(lost, gained, n)
    by = "agreement" if targets is None else "labels"
    points = 100 * (lost - gained) / n
    return Agreement(n, by, points, (100 * low, 100 * high), before, after, same, sqnr(got, reference))


def sqnr(got: np.ndarray, reference: np.ndarray) -> float:
    """Signal to noise of `got`, in dB."""
    wide = reference.astype(np.float64)
    return decibels(float((wide**2).mean()), float(((got.astype(np.float64) - wide) ** 2).mean()))


def decibels(signal: float, noise: float) -> float:
    """10 log10 (signal / noise), between -200 and 200."""
    return float(10 * np.log10(np.clip(signal / max(noise, 1e-300), 1e-20, 1e20)))


def paired_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % interval of (lost - gained) / n over n pairs: Agresti and Min's, which adds half a pair to each cell.

    Source: Agresti, Min: Simple improved confidence intervals for comparing matched proportions, 2005.
    """
    z = 1.959963984540054
    a, b, total = lost + 0.5, gained + 0.5, n + 2
    middle = (a - b) / total
    spread = z * math.sqrt(max(a + b - (a - b) ** 2 / total, 0.0)) / total
    return middle - spread, middle + spread
