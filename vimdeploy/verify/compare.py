"""How far two arrays are apart, and how far they may be: values, each with its name, its limit and its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Errors:
    """The distance of a result from its reference, over a set of images. `top1` is None where there is no ranking.

    scale: rms(reference). rel_rms: rms(error) / scale. cosine: the worst image's. top1: share of images with the same
    first class; lead_lost: where the first class differs, the most by which the reference preferred its own.
    """

    n: int
    max_abs: float
    rel_rms: float
    cosine: float
    scale: float = 0.0
    top1: float | None = None
    lead_lost: float = 0.0
    finite: bool = True

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in dB, between -200 and 200."""
        return -20 * math.log10(min(max(self.rel_rms, 1e-10), 1e10))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no Infinity: None where a number is not finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def errors(got: np.ndarray, want: np.ndarray, *, ranked: bool) -> Errors:
    """Compare (n, ...) results in float64. Raises ValueError when shapes differ or nothing is there to compare."""
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, and the reference's is {want.shape}")
    if want.size == 0:
        raise ValueError("nothing was compared")
    n = len(want)
    # Several rows an image (pool "all") count as so many samples.
    a, b = (x.astype(np.float64).reshape(-1, x.shape[-1]) if ranked else x.astype(np.float64).reshape(n, -1)
            for x in (got, want))  # fmt: skip
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Errors(n, float("inf"), float("inf"), -1.0, top1=0.0 if ranked else None, finite=False)
    difference = a - b
    max_abs = float(np.abs(difference).max())
    scale = np.sqrt((b * b).mean())
    rel_rms = float(np.sqrt((difference * difference).mean()) / scale) if scale else float(max_abs > 0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(axis=1)
    # Two zero vectors agree; one zero vector does not.
    cosines = np.divide(dots, norms, out=(np.linalg.norm(difference, axis=1) == 0).astype(np.float64), where=norms > 0)
    top1, lead_lost = None, 0.0
    if ranked:
        differs = a.argmax(1) != b.argmax(1)
        lead = b.max(1) - np.take_along_axis(b, a.argmax(1)[:, None], 1)[:, 0]
        top1, lead_lost = float(1 - differs.mean()), float(lead.max(where=differs, initial=0.0))
    return Errors(n, max_abs, rel_rms, float(cosines.min()), float(scale), top1, lead_lost)


@dataclass(frozen=True)
class Tolerance:
    """Limits for one comparison; None means not limited. `reason` says where they come from.

    Without max_abs, classes closer than 6 rel_rms x scale count as tied: the difference of two errors of that size
    reaches 4 sigma there.
    """

    rel_rms: float
    cosine: float
    max_abs: float | None
    reason: str

    def failures(self, e: Errors) -> list[str]:
        """What does not hold, in words, with the limit that would have passed."""
        if not e.finite:
            return ["NaN or Inf in the outputs"]
        failed = []
        if self.max_abs is not None and e.max_abs > self.max_abs:
            failed.append(f"max abs {e.max_abs:.2e} > {self.max_abs:.0e}")
        if e.rel_rms > self.rel_rms:
            failed.append(f"rel rms {e.rel_rms:.2e} > {self.rel_rms:.2e}")
        if e.cosine < self.cosine:
            failed.append(f"cosine {e.cosine:.8f} < {self.cosine:.8f}")
        # Two classes that the reference itself hardly tells apart may change places; no others.
        tie = 2 * self.max_abs if self.max_abs is not None else 6 * self.rel_rms * e.scale
        if e.top1 is not None and e.lead_lost > tie:
            failed.append(f"top-1 agrees on {e.top1:.1%} only, over a lead of up to {e.lead_lost:.2e} (> {tie:.2e})")
        return failed


#: fp32 against the fp32 reference: two orders of summation of the same fp32 sums. Measured on Vim-Ti to Vim-B with
#: random weights: 1e-6; the limits leave room for trained weights and fast-math libraries (vim-spec.md 7.6).
FP32 = Tolerance(rel_rms=1e-4, cosine=0.999999, max_abs=1e-3, reason="reassociation of fp32 sums")

#: fp16 and bf16: at most this many times the error that plain PyTorch makes in the same type, both against fp64 ...
LOW_FACTOR = 2.0
#: ... but never tighter than two units in the last place of the type, which a final rounding alone can cost.
LOW_FLOOR = {"fp16": 2 * 2.0**-11, "bf16": 2 * 2.0**-8}


#: int8: at most twice (6 dB) the error its maker measured on the calibration images; they are not the ones looked at
#: now. Where that was not measured, what still lets most images keep their class.
INT8_FACTOR, INT8_UNKNOWN = 2.0, 0.1


def int8(quantization: Mapping[str, Any]) -> Tolerance:
    """The limits for an int8 file or a plan of one, from what the file says of its own making."""
    sqnr = quantization.get("sqnr_db")
    limit = INT8_UNKNOWN if sqnr is None else INT8_FACTOR * 10 ** (-float(sqnr) / 20)
    reason = (
        "nothing was measured when it was quantized"
        if sqnr is None
        else (f"{INT8_FACTOR:g} x the error on the calibration images, {sqnr:.1f} dB")
    )
    # The worst of many images may be four times as far off as all together.
    return Tolerance(rel_rms=limit, cosine=1 - 8 * limit**2, max_abs=None, reason=reason)


def low_precision(precision: str, plain: Errors) -> Tolerance:
    """The limits for a typed graph, measured from `plain`, the error of PyTorch in that type."""
    limit = max(LOW_FACTOR * plain.rel_rms, LOW_FLOOR[precision])
    return Tolerance(
        rel_rms=limit,
        cosine=1 - 2 * limit**2,  # 1 - cos is about half the squared relative error; one image may be 2x the mean
        max_abs=None,
        reason=f"{LOW_FACTOR:g} x PyTorch {precision} ({plain.rel_rms:.1e}), both against fp64",
    )
