"""For one layer: how far to smooth its input, and where to cut it off, by what that does to the layer's output.

Smoothing by s_c = bound_c^alpha / weight_c^(1 - alpha), brought to mean 1 by its geometric mean: alpha 0.5 shares the
spread of channel c between activation and weight, larger ones leave more of it to the weight. The cut is the largest
|x|, a percentile of |x|, or the bound of least information loss; the last two by ONNX Runtime's own calibrator.
"auto" leaves the last one out: it won in no layer of the models tried, and takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np

from vimdeploy.errors import CheckFailed
from vimdeploy.passes.projections import DEFAULT_KINDS, Projection
from vimdeploy.passes.quantize import LEVELS, quantized_weight, scale_of
from vimdeploy.quantize.observe import Observation
from vimdeploy.verify.agreement import decibels

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PERCENTILES = (99.999, 99.99, 99.9)
#: `percentile` alone is the one of ONNX Runtime's calibrator.
METHODS = ("auto", "minmax", "percentile", "entropy")
_BINS = 512


@dataclass(frozen=True)
class Choice:
    """`bound`: the largest |x / factors| told apart. `factors` (K,) and `alpha` are None without smoothing.

    `sqnr_db`: of the layer's output on the sample, against the layer in fp32.
    """

    bound: float
    method: str
    alpha: float | None
    factors: np.ndarray | None
    sqnr_db: float


def choose(layer: Projection, seen: Observation, method: str = "auto", *, smooth: bool = True) -> Choice:
    """The choice of least output error for one layer.

    `method` "auto" tries the largest |x| and PERCENTILES; the others take theirs. Bounds are rounded up to 4 digits and
    factors to 3, so that hosts whose sums differ in the last bit write the same. Raises CheckFailed for a layer that
    reads only zeros.
    """
    if not seen.bounds.max() > 0:
        raise CheckFailed(
            f"the input of {layer.name} is zero on every calibration image", hint="calibrate on other images"
        )
    weight = _matrix(layer)
    wanted = seen.rows @ weight
    power = float((wanted.astype(np.float64) ** 2).mean())

    def result(bound: float, name: str, alpha: float | None, factors: np.ndarray | None) -> Choice:
        rounded = _up(bound)
        error = output_error(seen.rows, weight, wanted, rounded, factors)
        return Choice(rounded, name, alpha, factors, decibels(power, error))

    def bound(name: str, factors: np.ndarray | None) -> float:
        divisor = 1.0 if factors is None else factors
        # Of all tokens where only the largest counts, of the sample where a distribution does.
        return float((seen.bounds / divisor).max()) if name == "minmax" else bound_of(seen.rows / divisor, name)

    ways: list[tuple[float | None, np.ndarray | None]] = [(None, None)]
    if smooth and layer.kind in DEFAULT_KINDS:
        ways += [(alpha, smoothing(seen.bounds, weight, alpha)) for alpha in ALPHAS]
    # By turns, not every way with every cut: the second turn over the ways finds what the other cut makes worth while.
    first, *others = _cuts(method)
    best = max((result(bound(first, factors), first, alpha, factors) for alpha, factors in ways), key=_quality)
    tried = [best, *(result(bound(name, best.factors), name, best.alpha, best.factors) for name in others)]
    best = max(tried, key=_quality)
    if best.method != first:
        tried += [result(bound(best.method, factors), best.method, alpha, factors) for alpha, factors in ways]
    return max(tried, key=_quality)


def _quality(choice: Choice) -> float:
    return choice.sqnr_db


def smoothing(bounds: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """(K,) factors that a layer's input is divided by, from its channels' bounds (K,) and its weight (K, N)."""
    rows = np.abs(weight).max(axis=1).astype(np.float64)
    live = (bounds > 0) & (rows > 0)
    factors = np.ones(len(bounds))
    factors[live] = bounds[live].astype(np.float64) ** alpha / rows[live] ** (1 - alpha)
    factors[live] /= np.exp(np.log(factors[live]).mean()) if live.any() else 1.0
    return np.array([float(f"{factor:.3g}") for factor in factors])


def output_error(
    rows: np.ndarray, weight: np.ndarray, wanted: np.ndarray, bound: float, factors: np.ndarray | None
) -> float:
    """The mean square of (int8 layer on `rows`) - `wanted`."""
    x, w = (rows, weight) if factors is None else (rows / factors.astype(np.float32), weight * factors[:, None])
    scale = scale_of(bound)
    levels, scales = quantized_weight(w, 1)
    rounded = np.clip(np.rint(x / scale), -LEVELS - 1, LEVELS).astype(np.float32)
    difference = (rounded @ levels.astype(np.float32)) * (scales * scale) - wanted
    return float((difference.astype(np.float64) ** 2).mean())


def bound_of(rows: np.ndarray, method: str) -> float:
    """Where `method` cuts |rows|: "minmax", "entropy", or "percentile 99.99"."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    largest = float(np.abs(rows).max())
    if method == "minmax" or largest == 0:
        return largest
    name, _, percentile = method.partition(" ")
    # A hundredth of the rounding step of int8 per bin keeps the percentile from being rounded itself.
    bins = _BINS if name == "entropy" else 25 * _BINS
    collector = HistogramCollector(name, True, bins, 128, float(percentile or 99.99), "same")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        collector.collect({"x": np.ascontiguousarray(rows, np.float32)})
        low, high, *_ = collector.compute_collection_result()["x"]
    return min(float(max(-low, high)), largest)


def _cuts(method: str) -> tuple[str, ...]:
    percentiles = tuple(f"percentile {p:g}" for p in PERCENTILES)
    if method == "auto":
        return ("minmax", *percentiles)
    return {"minmax": ("minmax",), "percentile": ("percentile 99.99",), "entropy": ("entropy",)}[method]


def _matrix(layer: Projection) -> np.ndarray:
    """The weight as (K, N), whatever the node."""
    weight = layer.weight
    if layer.node.op_type == "MatMul":
        return weight
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def _up(value: float) -> float:
    """Rounded up to 4 significant digits."""
    rounded = float(f"{value:.3e}")
    return rounded if rounded >= value else float(f"{value * (1 + 5e-4):.3e}")
