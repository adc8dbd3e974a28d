"""quantize/observe.py and choose.py against numpy: what is seen, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from vimdeploy.bundle import read_info
from vimdeploy.errors import CheckFailed
from vimdeploy.passes import edit
from vimdeploy.passes.projections import Projection, projections
from vimdeploy.passes.quantize import scale_of
from vimdeploy.quantize import observe as observe_module
from vimdeploy.quantize.choose import ALPHAS, METHODS, bound_of, choose, output_error, smoothing
from vimdeploy.quantize.observe import Observation, observe


def a_layer(weight: np.ndarray, kind: str = "in_proj") -> Projection:
    graph = ir.Graph([], [], nodes=[])
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, len(weight)]))
    w = edit.constant(graph, f"layers.0.mixer.{kind}.weight.T", weight)
    node = edit.node("MatMul", [x, w], "product", [("y", ir.DataType.FLOAT, None)])
    graph.append(node)
    return Projection(f"layers.0.mixer.{kind}", kind, node)


def rows_with_outliers(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(512, 32) rows of which two channels are 40 times as large, and a weight (32, 24)."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((512, 32)).astype(np.float32)
    rows[:, [3, 17]] *= 40
    return rows, (generator.standard_normal((32, 24)) / 6).astype(np.float32)


def int8_output(rows: np.ndarray, weight: np.ndarray, bound: float, factors: np.ndarray | None) -> np.ndarray:
    """In double precision, every rounding written out."""
    s = np.ones(len(weight)) if factors is None else factors
    scale = float(scale_of(bound))
    x = np.clip(np.rint(rows.astype(np.float64) / s / scale), -128, 127) * scale
    w = weight.astype(np.float64) * s[:, None]
    scales = np.array([float(scale_of(bound)) for bound in np.abs(w).max(axis=0)])
    return x @ (np.rint(w / scales) * scales)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("bound", [4.0, 100.0])
def test_the_output_error_is_that_of_int8(bound: float, smooth: bool) -> None:
    rows, weight = rows_with_outliers()
    factors = smoothing(np.abs(rows).max(axis=0), weight, 0.5) if smooth else None
    wanted = rows.astype(np.float64) @ weight
    error = ((int8_output(rows, weight, bound, factors) - wanted) ** 2).mean()
    assert output_error(rows, weight, rows @ weight, bound, factors) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_smoothing_shares_each_channels_spread(alpha: float) -> None:
    bounds, weight = np.array([1.0, 10.0, 0.0, 2.0]), np.array([[0.5, -1.0], [0.1, 0.2], [1.0, 1.0], [0.0, 0.0]])
    factors = smoothing(bounds, weight, alpha)
    want = np.array([1.0**alpha / 1.0 ** (1 - alpha), 10.0**alpha / 0.2 ** (1 - alpha)])
    want /= np.sqrt(want.prod())
    np.testing.assert_allclose(factors[:2], want, rtol=5e-3)  # 3 digits
    assert factors[2] == factors[3] == 1  # a channel that is never used, and one that nothing reads


def test_outlier_channels_are_smoothed_and_the_choice_says_what_it_costs() -> None:
    rows, weight = rows_with_outliers()
    seen = Observation(np.abs(rows).max(axis=0), rows)
    naive, ours = choose(a_layer(weight), seen, "minmax", smooth=False), choose(a_layer(weight), seen)
    assert naive.factors is None and naive.alpha is None and ours.alpha in ALPHAS and ours.factors is not None
    assert ours.sqnr_db > naive.sqnr_db + 10
    for choice in (naive, ours):
        wanted = rows.astype(np.float64) @ weight
        error = int8_output(rows, weight, choice.bound, choice.factors) - wanted
        assert choice.sqnr_db == pytest.approx(10 * np.log10((wanted**2).mean() / (error**2).mean()), abs=0.05)


def test_auto_is_hardly_worse_than_any_single_way() -> None:
    rows, weight = rows_with_outliers()
    # As if one token in a thousand, which the sample has none of, were three times as large.
    seen = Observation(3 * np.abs(rows).max(axis=0), rows)
    best = choose(a_layer(weight), seen)
    assert best.method.startswith("percentile")
    for method in ("minmax", "percentile"):
        for smooth in (False, True):
            assert best.sqnr_db >= choose(a_layer(weight), seen, method, smooth=smooth).sqnr_db - 0.25


@pytest.mark.parametrize("method", METHODS)
def test_each_method_takes_its_own_bound(method: str) -> None:
    rows, weight = rows_with_outliers()
    choice = choose(a_layer(weight), Observation(np.abs(rows).max(axis=0) * 2, rows), method, smooth=False)
    if method == "minmax":  # of every token, of which the rows are a sample
        assert choice.bound == pytest.approx(2 * np.abs(rows).max(), rel=1e-3)
    elif method != "auto":
        assert choice.method.startswith(method)
        assert choice.bound == pytest.approx(bound_of(rows, choice.method), rel=1e-3)
    assert float(f"{choice.bound:.3e}") == choice.bound  # 4 digits


@pytest.mark.parametrize("percentile", [99.999, 99.99, 99.9, 90.0])
def test_percentiles_are_those_of_numpy(percentile: float) -> None:
    rows = np.random.default_rng(1).laplace(size=(2048, 64)).astype(np.float32)
    want = np.percentile(np.abs(rows), percentile)
    assert bound_of(rows, f"percentile {percentile:g}") == pytest.approx(want, rel=1e-2)


def test_entropy_cuts_a_long_tail() -> None:
    rows = np.random.default_rng(1).standard_normal((2048, 64)).astype(np.float32)
    rows[0, :4] = 300
    assert 2 < bound_of(rows, "entropy") < 160 and bound_of(rows, "minmax") == 300


def test_x_proj_is_never_smoothed() -> None:
    """What it reads is the scan's input too."""
    rows, weight = rows_with_outliers()
    assert choose(a_layer(weight, "x_proj"), Observation(np.abs(rows).max(axis=0), rows)).factors is None


def test_a_layer_that_reads_only_zeros_is_refused() -> None:
    with pytest.raises(CheckFailed, match=r"layers.0.mixer.in_proj is zero on every calibration image"):
        choose(a_layer(np.ones((4, 2), np.float32)), Observation(np.zeros(4), np.zeros((8, 4), np.float32)))


def test_bounds_are_of_every_token_and_rows_a_repeatable_sample(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "ROWS", 36)
    info, images = read_info(small), np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype(np.float32)
    runs = [observe(ir.load(small), projections(ir.load(small).graph), images, info) for _ in range(2)]
    model = ir.load(small)
    layers = projections(model.graph)
    seen, output = observe(model, layers, images, info)
    assert len(model.graph.outputs) == 1  # the taps are gone again
    # All of it, tapped by hand.
    model.graph.outputs.extend(layer.input for layer in layers if not layer.input.is_graph_input())
    from zoo import session

    one = session(ir.to_proto(model))
    names = [value.name for value in one.get_outputs()]
    whole = dict(zip(names, one.run(None, {"images": images}), strict=True)) | {"images": images}
    np.testing.assert_allclose(output, whole[names[0]], rtol=1e-4, atol=1e-5)
    for layer in layers:
        x = whole[str(layer.input.name)]
        axis = 1 if layer.node.op_type == "Conv" else x.ndim - 1
        others = tuple(i for i in range(x.ndim) if i != axis)
        np.testing.assert_allclose(seen[layer.name].bounds, np.abs(x).max(axis=others), rtol=1e-5)
        for again, _ in runs:
            np.testing.assert_array_equal(again[layer.name].rows, seen[layer.name].rows)
        if x.ndim == 3 and x.shape[1] == info.config.seq_len:
            rows = seen[layer.name].rows.reshape(12, 3, -1)  # 36 rows of 12 images
            (token,) = info.config.cls_index
            for image, kept in zip(x, rows, strict=True):
                distances = np.abs(image[None] - kept[:, None]).max(axis=2)
                chosen = distances.argmin(axis=1)
                assert token in chosen and len(set(chosen)) == 3 and distances.min(axis=1).max() < 1e-4
        if layer.node.op_type == "Conv":
            w = layer.weight.reshape(len(layer.weight), -1)
            y = seen[layer.name].rows @ w.T + layer.node.inputs[2].const_value.numpy()
            tokens = whole[str(layer.input.name)]
            patches = tokens.reshape(12, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(12 * 16, -1)
            full = patches @ w.T + layer.node.inputs[2].const_value.numpy()
            assert max(np.abs(full - row).max(axis=1).min() for row in y) < 1e-3


def test_what_is_not_finite_is_traced_to_the_layer(small: Path) -> None:
    model = ir.load(small)
    layers = projections(model.graph)
    weight = next(layer for layer in layers if layer.name == "layers.0.mixer.in_proj").node.inputs[1]
    broken = weight.const_value.numpy().copy()
    broken[0, 0] = np.nan
    weight.const_value = ir.tensor(broken, name=weight.name)
    images = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    with pytest.raises(CheckFailed, match=r"the input of layers.0.mixer.(x_proj|out_proj)\S* is NaN or infinite"):
        observe(model, layers, images, read_info(small))
