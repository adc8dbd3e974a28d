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


def bi_selective_scan_f64(
    u_f: np.ndarray,
    u_b: np.ndarray,
    delta_f: np.ndarray,
    delta_b: np.ndarray,
    A_f: np.ndarray,
    A_b: np.ndarray,
    x_f: np.ndarray,
    x_b: np.ndarray,
    D_f: np.ndarray,
    D_b: np.ndarray,
    z: np.ndarray,
    delta_bias_f: np.ndarray,
    delta_bias_b: np.ndarray,
    y_scale: np.ndarray | None = None,
    delta_softplus: bool = True,
    scan=selective_scan_f64,
) -> np.ndarray:
    """Both directions: x (B, L, P) ends in B_t, C_t; z (B, L, W) ends in the gate. `scan`: or its magnitude."""
    states, channels = A_f.shape[1], u_f.shape[2]
    y = 0.0
    for u, delta, A, x, D, bias, reverse in (
        (u_f, delta_f, A_f, x_f, D_f, delta_bias_f, False),
        (u_b, delta_b, A_b, x_b, D_b, delta_bias_b, True),
    ):
        first = x.shape[2] - 2 * states
        B, C = x[:, :, None, first : first + states], x[:, :, None, first + states :]
        y = y + scan(u, delta, A, B, C, D, None, bias, delta_softplus, reverse)
    gate = np.asarray(z, np.float64)[:, :, z.shape[2] - channels :]
    silu = gate / (1 + np.exp(-gate))
    if scan is selective_scan_magnitude:
        silu = np.abs(silu)
        y_scale = None if y_scale is None else np.abs(y_scale)
    return y * silu * (1.0 if y_scale is None else np.asarray(y_scale, np.float64))


def bi_causal_conv1d_f64(
    x: np.ndarray, weight_f: np.ndarray, bias_f: np.ndarray, weight_b: np.ndarray, bias_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x (B, L, W), of which the first D columns are read; weights (K, D) -> u_f, u_b (B, L, D)."""
    taps, channels = weight_f.shape
    x = np.asarray(x, np.float64)[:, :, :channels]
    length = x.shape[1]
    results = []
    for weight, bias, sign in ((weight_f, bias_f, -1), (weight_b, bias_b, 1)):
        total = np.zeros_like(x) + np.asarray(bias, np.float64)
        for t in range(length):
            for k in range(taps):
                source = t + sign * (taps - 1 - k)  # the last tap is on the current token
                if 0 <= source < length:
                    total[:, t] += np.asarray(weight[k], np.float64) * x[:, source]
        results.append(total / (1 + np.exp(-total)))
    return results[0], results[1]


def add_rms_norm_f64(
    h: np.ndarray, r: np.ndarray, weight: np.ndarray, epsilon: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
    """h, r (..., C), weight (C) -> n, r_out."""
    r_out = np.asarray(h, np.float64) + np.asarray(r, np.float64)
    return r_out / np.sqrt((r_out**2).mean(-1, keepdims=True) + epsilon) * np.asarray(weight, np.float64), r_out
