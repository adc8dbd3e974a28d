"""Inputs for the selective scan, and how far from the reference a result may be. Shared by kernel and runtime tests."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from golden import selective_scan_f64, selective_scan_magnitude
from numpy.lib.stride_tricks import as_strided

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

# Inside, whatever the io type: fp32 sums and an exp2 of 2e-7. Largest seen over these tests: 8e-7 of the magnitude.
INSIDE = 4e-6
# Rounding y itself, half a unit in the last place; and the smallest step near zero.
OUTPUT_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
SMALLEST = {"fp32": 1e-38, "fp16": 2.0**-25, "bf16": 1e-38}

ALL_OPTIONAL = ("D", "z", "delta_bias")


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    groups: int = 1,
    dtype: str = "fp32",
    optional: tuple[str, ...] = ALL_OPTIONAL,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Values of the size a trained Vim has: A from -1 to -states, steps from 1e-3 to some units."""
    rng = np.random.default_rng(seed)
    io = DTYPES[dtype]
    inputs = {
        "u": rng.standard_normal((batch, length, channels)).astype(io),
        "delta": rng.standard_normal((batch, length, channels)).astype(io),
        "A": -(np.arange(1, states + 1) * rng.uniform(0.5, 1.5, (channels, states))).astype(np.float32),
        "B": rng.standard_normal((batch, length, groups, states)).astype(io),
        "C": rng.standard_normal((batch, length, groups, states)).astype(io),
        "D": rng.standard_normal(channels).astype(np.float32),
        "z": (2 * rng.standard_normal((batch, length, channels))).astype(io),
        "delta_bias": rng.uniform(-6, 0, channels).astype(np.float32),
    }
    return {name: value for name, value in inputs.items() if name not in ALL_OPTIONAL or name in optional}


def scan_bounds(
    inputs: dict[str, np.ndarray], dtype: str, inside: float = INSIDE, **attributes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """y in float64, and how far from it a kernel may be."""
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    want = selective_scan_f64(**wide, **attributes)
    allowed = inside * selective_scan_magnitude(**wide, **attributes)
    return want, allowed + OUTPUT_ROUNDING[dtype] * np.abs(want) + SMALLEST[dtype]


def assert_within(got: np.ndarray, want: np.ndarray, allowed: np.ndarray, dtype: str) -> None:
    """All values finite, of this type and shape, and as near as allowed."""
    assert got.shape == want.shape
    assert got.dtype == DTYPES[dtype]
    wide = got.astype(np.float64)
    assert np.isfinite(wide).all()
    error = np.abs(wide - want)
    worst = np.unravel_index(np.argmax(error / allowed), error.shape) if error.size else None
    assert (error <= allowed).all(), (
        f"at {worst}: {wide[worst]} instead of {want[worst]}, {error[worst] / allowed[worst]:.3g} times what is allowed"
    )


def assert_close_to_reference(
    y: np.ndarray, inputs: dict[str, np.ndarray], dtype: str, inside: float = INSIDE, **attributes: bool
) -> None:
    assert_within(y, *scan_bounds(inputs, dtype, inside, **attributes), dtype)


def strided(shape, dtype, values, poison):
    """A poisoned buffer, and an array of this shape inside it with gaps after each token and each batch entry."""
    inner = shape[-1]
    token = int(np.prod(shape[2:-1], dtype=int)) * (inner + 3) + 5
    batch = shape[1] * token + 11
    guard = 37  # odd, so that rows are aligned to nothing
    buffer = np.full(2 * guard + shape[0] * batch + 64, poison, dtype)
    steps = (batch, token) if len(shape) == 3 else (batch, token, inner + 3)
    view = as_strided(buffer[guard:], shape, [step * buffer.itemsize for step in (*steps, 1)])
    if values is not None:
        view[...] = values
    return buffer, view
