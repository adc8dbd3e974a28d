"""Reference numbers from the definition, in float64, independent of everything under test."""

from __future__ import annotations

import numpy as np


def softplus_f64(x: np.ndarray) -> np.ndarray:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def selective_scan_f64(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    z: np.ndarray | None = None,
    delta_bias: np.ndarray | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> np.ndarray:
    """The selective scan of docs/reference: u, delta, z (B, L, D), A (D, N), B and C (B, L, G, N) → y (B, L, D)."""
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    batch, length, channels = u.shape
    if delta_bias is not None:
        delta = delta + np.asarray(delta_bias, np.float64)
    if delta_softplus:
        delta = softplus_f64(delta)
    per_group = channels // B.shape[2]
    B, C = (np.repeat(x, per_group, axis=2) for x in (B, C))  # (B, L, D, N)

    y = np.zeros_like(u)
    state = np.zeros((batch, channels, A.shape[1]))
    for t in reversed(range(length)) if reverse else range(length):
        state = np.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        y[:, t] = (C[:, t] * state).sum(-1)
    if D is not None:
        y = y + np.asarray(D, np.float64) * u
    if z is not None:
        z = np.asarray(z, np.float64)
        y = y * z / (1 + np.exp(-z))
    return y


def selective_scan_magnitude(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, reverse=False):
    """The same with every term taken positive: what the rounding errors of y are in proportion to."""
    y = selective_scan_f64(
        np.abs(u),
        delta,
        A,
        np.abs(B),
        np.abs(C),
        None if D is None else np.abs(D),
        z,
        delta_bias,
        delta_softplus,
        reverse,
    )
    return np.abs(y)
