"""Inputs for the fused ops, and how far from the reference a result may be. Shared by kernel and runtime tests."""

from __future__ import annotations

import numpy as np
from fused_c import Arrays
from golden import add_rms_norm_f64, bi_causal_conv1d_f64, selective_scan_f64, selective_scan_magnitude
from scan_cases import DTYPES, INSIDE, OUTPUT_ROUNDING, SMALLEST, assert_within, make_inputs

# fp32 sums of a few terms, and silu's 2.7e-7. Largest seen over these tests: 3e-7 of the magnitude.
CONV_INSIDE = 1e-6
# A mean of squares, a square root and a quotient. Largest seen: 4e-7.
NORM_INSIDE = 1.5e-6

BI_OPTIONAL = ("D", "z", "delta_bias", "y_scale")
SILU_SLOPE = 1.1  # the largest there is


def make_bi_scan(
    batch: int,
    length: int,
    channels: int,
    states: int,
    groups: int = 1,
    dtype: str = "fp32",
    optional: tuple[str, ...] = BI_OPTIONAL,
    seed: int = 0,
) -> Arrays:
    """Pairs (forward, backward) of scan_cases.make_inputs, and one z and y_scale for both."""
    pair = [make_inputs(batch, length, channels, states, groups, dtype, seed=2 * seed + i) for i in range(2)]
    inputs: Arrays = {name: (pair[0][name], pair[1][name]) for name in pair[0] if name != "z"}
    inputs["z"] = pair[0]["z"]
    inputs["y_scale"] = np.random.default_rng(seed).uniform(0.25, 4, channels).astype(np.float32)
    return {name: value for name, value in inputs.items() if name not in BI_OPTIONAL or name in optional}


def make_bi_conv(
    batch: int, length: int, channels: int, taps: int = 4, dtype: str = "fp32", width: int | None = None, seed: int = 0
) -> Arrays:
    """x is the first `channels` columns of rows of `width`."""
    rng = np.random.default_rng(seed)
    rows = (2 * rng.standard_normal((batch, length, width or channels))).astype(DTYPES[dtype])
    return {
        "x": rows[..., :channels],
        "weight": tuple(rng.standard_normal((taps, channels)).astype(np.float32) for _ in range(2)),
        "bias": tuple(rng.standard_normal(channels).astype(np.float32) for _ in range(2)),
    }


def make_norm(*shape: int, dtype: str = "fp32", scale: float = 1.0, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "h": (scale * rng.standard_normal(shape)).astype(DTYPES[dtype]),
        "r": (scale * rng.standard_normal(shape)).astype(np.float32),
        "weight": rng.uniform(0.5, 2, shape[-1]).astype(np.float32),
    }


Bounds = tuple[np.ndarray, np.ndarray]  # the output in float64, and how far from it a kernel may be


def bi_scan_bounds(inputs: Arrays, dtype: str, inside: float = INSIDE, **attributes: bool) -> Bounds:
    """Of y (B, L, D). The forward part lies in y, rounded, before the backward one is added."""
    wide = {name: _wide(value) for name, value in inputs.items()}
    factor = np.ones(inputs["u"][0].shape)
    if "z" in wide:
        factor *= silu_f64(wide.pop("z"))
    if "y_scale" in wide:
        factor *= wide.pop("y_scale")
    forward, backward = ({name: value[i] for name, value in wide.items()} for i in range(2))
    y_forward = selective_scan_f64(**forward, **attributes)
    want = (y_forward + selective_scan_f64(**backward, **attributes, reverse=True)) * factor
    magnitude = selective_scan_magnitude(**forward, **attributes)
    magnitude += selective_scan_magnitude(**backward, **attributes, reverse=True)
    rounding = OUTPUT_ROUNDING[dtype]
    allowed = (inside * magnitude + rounding * np.abs(y_forward) + SMALLEST[dtype]) * np.abs(factor)
    return want, allowed + rounding * np.abs(want) + SMALLEST[dtype]


def bi_conv_bounds(inputs: Arrays, dtype: str) -> list[Bounds]:
    """Of u forward and u backward."""
    wide = {name: _wide(value) for name, value in inputs.items()}
    (weight_f, weight_b), (bias_f, bias_b) = wide["weight"], wide["bias"]
    bounds = []
    for i, want in enumerate(bi_causal_conv1d_f64(wide["x"], weight_f, bias_f, weight_b, bias_b)):
        magnitude = _conv_magnitude(wide["x"], wide["weight"][i], wide["bias"][i], reverse=i == 1)
        allowed = SILU_SLOPE * CONV_INSIDE * magnitude + OUTPUT_ROUNDING[dtype] * np.abs(want) + SMALLEST[dtype]
        bounds.append((want, allowed))
    return bounds


def _conv_magnitude(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, reverse: bool) -> np.ndarray:
    """The sum before silu with every term taken positive: what its rounding errors are in proportion to."""
    x = np.abs(x[:, ::-1] if reverse else x)
    padded = np.pad(x, ((0, 0), (len(weight) - 1, 0), (0, 0)))
    total = np.abs(bias) + sum(np.abs(tap) * padded[:, k : k + x.shape[1]] for k, tap in enumerate(weight))
    return total[:, ::-1] if reverse else total


def norm_bounds(inputs: Arrays, dtype: str, epsilon: float = 1e-5) -> tuple[Bounds, Bounds]:
    """Of n and r_out."""
    n, r_out = add_rms_norm_f64(*(_wide(inputs[name]) for name in ("h", "r", "weight")), epsilon)
    allowed = (NORM_INSIDE + OUTPUT_ROUNDING[dtype]) * np.abs(n) + SMALLEST[dtype]
    return (n, allowed), (r_out, OUTPUT_ROUNDING["fp32"] * np.abs(r_out) + SMALLEST["fp32"])


def assert_bi_scan(y: np.ndarray, inputs: Arrays, dtype: str, **attributes: bool) -> None:
    assert_within(y, *bi_scan_bounds(inputs, dtype, **attributes), dtype)


def assert_bi_conv(u: tuple[np.ndarray, np.ndarray], inputs: Arrays, dtype: str) -> None:
    for got, bounds in zip(u, bi_conv_bounds(inputs, dtype), strict=True):
        assert_within(got, *bounds, dtype)


def assert_norm(got: tuple[np.ndarray, np.ndarray], inputs: Arrays, dtype: str, epsilon: float = 1e-5) -> None:
    n, r_out = norm_bounds(inputs, dtype, epsilon)
    assert_within(got[0], *n, dtype)
    assert_within(got[1], *r_out, "fp32")


def silu_f64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp of a large -x is infinite, as it should be
        return x / (1 + np.exp(-x))


def _wide(value):
    return value.astype(np.float64) if isinstance(value, np.ndarray) else tuple(one.astype(np.float64) for one in value)
