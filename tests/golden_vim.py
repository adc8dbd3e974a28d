"""An independent Vision Mamba: numpy, float64, loops, sequences that really are flipped (vim-spec.md 3.1-3.4, 11.2).

Written from the specification's words, without a look at vimdeploy/models/vim.py's short cuts: the backward branch
reverses its tokens, convolves and scans forward, and reverses back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vimdeploy.models.variants import VimConfig

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


def golden_forward(config: VimConfig, w: Weights, images: Array, *, features: bool = False) -> Array:
    """images (B, C, H, W) float64 -> logits (B, num_classes), or what the head reads."""
    return np.stack([_one_image(config, w, image, features) for image in images])


def _one_image(c: VimConfig, w: Weights, image: Array, features: bool) -> Array:
    x = _patches(c, w, image)
    m = len(x)
    if c.cls_position == "double":
        x = np.concatenate([w["cls_token_head"][0], x, w["cls_token_tail"][0]])
    elif c.cls_position != "none":
        p = {"head": 0, "middle": m // 2, "tail": m}[c.cls_position]
        x = np.insert(x, p, w["cls_token"][0, 0], axis=0)
    if c.abs_pos_embed:
        x = x + w["pos_embed"][0]
    y = _blocks(c, w, x)

    def head(v: Array) -> Array:
        return v if features or not c.num_classes else v @ w["head.weight"].T + w["head.bias"]

    if c.cls_position == "double":
        return head((y[0] + y[-1]) / 2)
    if c.cls_position != "none":
        return head(y[p])
    if c.pool == "mean":
        return head(y.mean(0))
    if c.pool == "last":
        return head(y[-1])
    out = head(y)  # every token
    return out.max(0) if c.pool == "max" and not features else out


def _patches(c: VimConfig, w: Weights, image: Array) -> Array:
    rows, columns = ((side - c.patch_size) // c.stride + 1 for side in image.shape[1:])
    kernel = w["patch_embed.proj.weight"].reshape(c.d_model, -1)
    tokens = []
    for i in range(rows):
        for j in range(columns):
            top, left = i * c.stride, j * c.stride
            window = image[:, top : top + c.patch_size, left : left + c.patch_size]
            tokens.append(kernel @ window.ravel() + w["patch_embed.proj.bias"])
    return np.stack(tokens)


def _blocks(c: VimConfig, w: Weights, x: Array) -> Array:
    h, r = x, np.zeros_like(x)
    rope = _rope_table(c) if c.rope else None
    if c.bidirectional:
        for i in range(c.depth // 2):
            if rope is not None:
                h = _rotate(h, *rope)
                r = _rotate(r, *rope) if c.rope_residual else r
            h_f, r_f = _layer(c, w, 2 * i, h, r)
            h_b, r_b = _layer(c, w, 2 * i + 1, h[::-1], r[::-1])
            h, r = h_f + h_b[::-1], r_f + r_b[::-1]
    else:
        for i in range(c.depth):
            if rope is not None:
                h = _rotate(h, *rope)
                r = _rotate(r, *rope) if c.rope_residual else r  # zero before the first layer: no matter
            h, r = _layer(c, w, i, h, r)
    return _norm(c, w, "norm_f", h + r)


def _layer(c: VimConfig, w: Weights, i: int, h: Array, r: Array) -> tuple[Array, Array]:
    r = r + h
    return _mixer(c, w, f"layers.{i}.mixer.", _norm(c, w, f"layers.{i}.norm", r)), r


def _norm(c: VimConfig, w: Weights, name: str, x: Array) -> Array:
    if c.rms_norm:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _mixer(c: VimConfig, w: Weights, at: str, n: Array) -> Array:
    xz = n @ w[at + "in_proj.weight"].T
    if c.proj_bias:
        xz = xz + w[at + "in_proj.bias"]
    x, z = np.split(xz, 2, axis=-1)
    y = _branch(w, at, "", "A_log", x, z)
    if c.bimamba == "v1":
        y = y + _branch(w, at, "", "A_b_log", x, z, flip_inside=True)
    elif c.bimamba == "v2":
        y = y + _branch(w, at, "_b", "A_b_log", x[::-1], z[::-1])[::-1]
        if c.divide_out:
            y = y / 2
    out = y @ w[at + "out_proj.weight"].T
    if c.proj_bias:
        out = out + w[at + "out_proj.bias"]
    return out * w[at + "gamma"] if c.layer_scale else out


def _branch(w: Weights, at: str, suffix: str, a_log: str, x: Array, z: Array, flip_inside: bool = False) -> Array:
    """Convolution, projections, scan, first token to last. `flip_inside` (v1): only the scan's inputs are reversed."""
    length, inner = x.shape
    taps = w[f"{at}conv1d{suffix}.weight"][:, 0]
    u = np.zeros((length, inner))
    for t in range(length):
        for k in range(taps.shape[1]):
            source = t - (taps.shape[1] - 1) + k
            if source >= 0:
                u[t] += taps[:, k] * x[source]
    u = _silu(u + w[f"{at}conv1d{suffix}.bias"])
    q = u @ w[f"{at}x_proj{suffix}.weight"].T
    A = -np.exp(w[at + a_log])
    rank, n = w[f"{at}dt_proj{suffix}.weight"].shape[1], A.shape[1]
    dt, B, C = q[:, :rank], q[:, rank : rank + n], q[:, rank + n :]
    delta = np.logaddexp(0, dt @ w[f"{at}dt_proj{suffix}.weight"].T + w[f"{at}dt_proj{suffix}.bias"])
    if flip_inside:
        u, delta, B, C, z = (v[::-1] for v in (u, delta, B, C, z))
    y = np.zeros((length, inner))
    state = np.zeros((inner, n))
    for t in range(length):
        state = np.exp(delta[t][:, None] * A) * state + (delta[t] * u[t])[:, None] * B[t]
        y[t] = state @ C[t] + w[f"{at}D{suffix}"] * u[t]
    y = y * _silu(z)
    return y[::-1] if flip_inside else y


def _rope_table(c: VimConfig) -> tuple[Array, Array]:
    rows, columns = c.img_size[0] // c.patch_size, c.img_size[1] // c.patch_size
    half = c.d_model // 2
    angle = np.zeros((rows, columns, c.d_model))
    for i in range(rows):
        for j in range(columns):
            for k in range(half // 2):
                frequency = math.pow(10000, -2 * k / half)
                angle[i, j, 2 * k : 2 * k + 2] = i * 14 / rows * frequency
                angle[i, j, half + 2 * k : half + 2 * k + 2] = j * 14 / columns * frequency
    angle = angle.reshape(rows * columns, -1)
    return np.cos(angle), np.sin(angle)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first = len(x) % 2  # an odd sequence keeps token 0 as it is
    out = x.copy()
    for t in range(first, len(x)):
        for k in range(0, x.shape[1], 2):
            a, b = x[t, k], x[t, k + 1]
            out[t, k] = a * cos[t - first, k] - b * sin[t - first, k]
            out[t, k + 1] = b * cos[t - first, k + 1] + a * sin[t - first, k + 1]
    return out
