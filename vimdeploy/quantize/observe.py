"""What the layers of a model read on calibration images: how large each channel gets, and a sample of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import CheckFailed
from vimdeploy.passes.projections import Projection
from vimdeploy.quantize.session import GraphSession

#: Tokens kept of each layer, over all images: enough for a high percentile of a layer of any width, and little enough
#: to keep those of all layers (0.2 GB for in_proj and out_proj of Vim-S).
ROWS = 2048


@dataclass(frozen=True)
class Observation:
    """Of one layer: `bounds` (K,), the largest |x| of each input channel, and `rows` (R, K'), some of what it reads.

    K' is K for a product; a convolution's rows are the windows it multiplies by its weight, flattened.
    """

    bounds: np.ndarray
    rows: np.ndarray


def observe(
    model: ir.Model,
    layers: list[Projection],
    batch: np.ndarray,
    info: ModelInfo,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Observation], np.ndarray]:
    """Run `model` (fp32, as exported) on images: what each layer reads, and the model's own output.

    Every token counts for `bounds`; of each image a few tokens are kept, the class tokens always, the others drawn with
    a fixed seed. Raises CheckFailed, naming the layer, when something is NaN or infinite.
    """
    graph = model.graph
    (output,) = [str(value.name) for value in graph.outputs]
    taps = list(dict.fromkeys(str(layer.input.name) for layer in layers))
    own = {str(value.name) for value in (*graph.inputs, *graph.outputs)}
    extra = {str(layer.input.name): layer.input for layer in layers if str(layer.input.name) not in own}
    graph.outputs.extend(extra.values())
    try:
        session = GraphSession(model)
    finally:
        del graph.outputs[1:]
    collected: dict[str, list[np.ndarray]] = {layer.name: [] for layer in layers}
    bounds: dict[str, np.ndarray] = {}
    finals = []
    generator = np.random.default_rng(0)
    each = max(1, -(-ROWS // len(batch)))
    done = 0
    read = [name for name in taps if name in extra]
    for final, *tapped in session.chunks(batch, [output, *read]):
        values = dict(zip(read, tapped, strict=True))
        values.update(dict.fromkeys((name for name in taps if name not in extra), batch[done : done + len(final)]))
        choices: dict[int, np.ndarray] = {}
        for layer in layers:
            x = values[str(layer.input.name)]
            largest = _channel_bounds(x, layer)
            if not np.isfinite(largest).all():
                raise CheckFailed(
                    f"the input of {layer.name} is NaN or infinite on the calibration images",
                    hint="check the file with `vimdeploy verify parity`",
                )
            bounds[layer.name] = np.maximum(bounds[layer.name], largest) if layer.name in bounds else largest
            rows = _windows(x, layer.node) if layer.node.op_type == "Conv" else x.reshape(len(x), -1, x.shape[-1])
            tokens = rows.shape[1]
            if tokens not in choices:
                choices[tokens] = np.stack([_tokens(tokens, each, info, generator) for _ in range(len(x))])
            kept = np.take_along_axis(rows, choices[tokens][:, :, None], axis=1)
            collected[layer.name].append(kept.reshape(-1, rows.shape[-1]))
        if not np.isfinite(final).all():
            raise CheckFailed(
                "the model's output is NaN or infinite on the calibration images",
                hint="check the file with `vimdeploy verify parity`",
            )
        finals.append(final)
        done += len(final)
        progress(done, len(batch))
    seen = {layer.name: Observation(bounds[layer.name], np.concatenate(collected[layer.name])) for layer in layers}
    return seen, np.concatenate(finals)


def _channel_bounds(x: np.ndarray, layer: Projection) -> np.ndarray:
    axis = 1 if layer.node.op_type == "Conv" else x.ndim - 1
    others = tuple(i for i in range(x.ndim) if i != axis)
    # Twice as quick as abs, which writes a copy.
    return np.asarray(np.maximum(x.max(axis=others), -x.min(axis=others)))


def _tokens(tokens: int, each: int, info: ModelInfo, generator: np.random.Generator) -> np.ndarray:
    """Which tokens of one image to keep."""
    if tokens <= each:
        return np.arange(tokens)
    first = [i for i in info.config.cls_index if tokens == info.config.seq_len][:each]
    others = np.setdiff1d(np.arange(tokens), first)
    return np.sort(np.concatenate([first, generator.choice(others, each - len(first), replace=False)]).astype(np.int64))


def _windows(x: np.ndarray, node: ir.Node) -> np.ndarray:
    """(B, C, H, W) -> (B, windows, C kh kw): what a convolution multiplies by its flattened weight."""

    def ints(name: str, default: list[int]) -> list[int]:
        return [int(i) for i in node.attributes[name].value] if name in node.attributes else default

    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    kernel = [int(i) for i in list(weight.shape)[2:]]  # type: ignore[arg-type]
    top, left, bottom, right = ints("pads", [0, 0, 0, 0])
    rows, columns = ints("strides", [1, 1])
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[:, :, ::rows, ::columns]
    return np.asarray(views.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), -1, x.shape[1] * kernel[0] * kernel[1]))
