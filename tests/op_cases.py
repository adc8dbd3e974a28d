"""Inputs for the fused ops as a graph has them: by the names and in the types of schema.py, inside wider rows."""

from __future__ import annotations

import numpy as np
from scan_cases import DTYPES, make_inputs

UNREAD = 1e4  # in the columns that no op may read


def make_bi_scan_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    rank: int = 3,
    spare: int = 0,
    dtype: str = "fp32",
    y_scale: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Rows of x with `rank` columns of dt in front, rows of z with `spare` columns in front."""
    forward = make_inputs(batch, length, channels, states, dtype=dtype, seed=2 * seed)
    backward = make_inputs(batch, length, channels, states, dtype=dtype, seed=2 * seed + 1)

    def rows(width: int, *parts: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full((batch, length, width), UNREAD, DTYPES[dtype]), *parts], axis=2)

    inputs = {}
    for way, one in (("f", forward), ("b", backward)):
        inputs |= {f"{name}_{way}": one[name] for name in ("u", "delta", "A", "D", "delta_bias")}
        inputs[f"x_{way}"] = rows(rank, one["B"][:, :, 0], one["C"][:, :, 0])
    inputs["z"] = rows(spare, forward["z"])
    if y_scale:
        inputs["y_scale"] = np.random.default_rng(seed).uniform(-2, 2, channels).astype(np.float32)
    return inputs


def make_bi_conv_inputs(
    batch: int, length: int, channels: int, taps: int = 4, *, spare: int = 0, dtype: str = "fp32", seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of x with `spare` columns behind those that are read."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, length, channels + spare))
    x[:, :, channels:] = UNREAD
    inputs = {"x": x.astype(DTYPES[dtype])}
    for way in "fb":
        inputs[f"weight_{way}"] = rng.standard_normal((taps, channels)).astype(np.float32)
        inputs[f"bias_{way}"] = rng.standard_normal(channels).astype(np.float32)
    return inputs


def make_norm_inputs(*sides: int, dtype: str = "fp32", scale: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """`scale`: of the residual stream, which a trained Vim has grow past 255, where fp16 can no longer square it."""
    rng = np.random.default_rng(seed)
    return {
        "h": rng.standard_normal(sides).astype(DTYPES[dtype]),
        "r": (scale * rng.standard_normal(sides)).astype(np.float32),
        "weight": rng.standard_normal(sides[-1]).astype(np.float32),
    }
