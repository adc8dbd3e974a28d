"""The CUDA scan computed on the CPU: its results in every form, and that its barriers suffice.

tests/cpp/cuda_on_cpu.h runs a block's threads one after another between barriers. A thread that read what another
writes before they have met would find it in one order and not in another, or find NaN.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import golden
import numpy as np
import pytest
from cuda_on_cpu import Params, build
from kernel_instances import instances

GENERIC, SEQUENTIAL, LANES, STATES = range(4)
#: first come, last come, at random
ORDERS = (0, 1, 2)
TOLERANCE = {"fp32": 2e-6, "fp16": 5e-4}  # relative RMS (issue 4, "Numerics")
MOST_THREADS = 384  # of a block in the lanes form
TOO_LARGE = -1

#: vim_scan_variant. Both directions in one block: there are no clusters here.
FORMS = [(GENERIC, *[0] * 7), (SEQUENTIAL, 1, *[0] * 6), (SEQUENTIAL, 2, *[0] * 6)]
FORMS += [
    (LANES, channels, lanes, tokens, split, 0, 0, 0)
    for tokens, lanes, channels in instances("VIM_LANES_INSTANCES")
    for split in (1, 2, 4)
    if 2 * split * channels * lanes <= MOST_THREADS
]
FORMS += [
    (STATES, channels, lanes, tile, items, apart, rows, chunks)
    for macro, cuts in (("VIM_STATES_INSTANCES", (1,)), ("VIM_STATES_CHUNKED", (2, 3, 16)))
    for lanes, channels, tile, items, rows, apart, _ in instances(macro)
    for chunks in cuts
]
#: The barrier at the tile that both directions come to at once, taken out on all sides.
NO_MEETING = (
    (r"if \(walk == middle \+ 1\) __syncthreads\(\);", ""),
    (r"__syncthreads\(\);\n( *load_other\(rows\);)", r"\1"),
    (r"if \(meets && !reverse\) __syncthreads\(\);", ""),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("scan"))


class Layer:
    """Inputs of both directions of a layer, in numpy, and the sizes that go with them."""

    def __init__(self, length: int, channels: int, io: str, batch: int = 1, softplus: bool = True) -> None:
        random = np.random.default_rng(length)
        self.softplus = softplus
        self.io, self.sizes = {"fp32": np.float32, "fp16": np.float16}[io], (batch, length, channels)

        def normal(*shape: int, dtype: type = self.io) -> np.ndarray:
            return random.standard_normal(shape).astype(dtype)

        rank = 4
        self.inputs = {
            "z": normal(batch, length, 2 * channels),
            "y_scale": np.float32(random.uniform(0.2, 1, channels)),
        }
        for side in "fb":
            self.inputs |= {f"{name}_{side}": normal(batch, length, channels) for name in ("u", "delta")}
            self.inputs[f"x_{side}"] = normal(batch, length, rank + 32)
            self.inputs[f"A_{side}"] = -np.exp(normal(channels, 16, dtype=np.float32))
            self.inputs |= {f"{name}_{side}": normal(channels, dtype=np.float32) for name in ("D", "delta_bias")}

    def params(self, y: np.ndarray, sides: str) -> Params:
        batch, length, channels = self.sizes
        p = Params(batch=batch, length=length, channels=channels, states=16, groups=1, channels_per_group=channels)
        p.pair, p.reverse, p.delta_softplus = len(sides) == 2, sides == "b", self.softplus
        p.state_granule = 4 * y.itemsize
        p.y, p.y_batch, p.y_token = y.ctypes.data, length * channels, channels
        z, size = self.inputs["z"], y.itemsize
        p.z, p.z_batch, p.z_token = z.ctypes.data + channels * size, 2 * length * channels, 2 * channels
        if p.pair:
            p.y_scale = self.inputs["y_scale"].ctypes.data
        for side, d in zip(sides, p.direction):
            row = self.inputs[f"x_{side}"].shape[2]
            for name in ("u", "delta", "A", "D", "delta_bias"):
                setattr(d, name, self.inputs[f"{name}_{side}"].ctypes.data)
            d.u_batch = d.delta_batch = length * channels
            d.u_token = d.delta_token = channels
            x = self.inputs[f"x_{side}"].ctypes.data
            d.B, d.C = x + (row - 32) * size, x + (row - 16) * size
            d.B_batch = d.C_batch = length * row
            d.B_token = d.C_token = row
        return p

    def want(self, sides: str) -> np.ndarray:
        if len(sides) == 2:
            return golden.bi_selective_scan_f64(**self.inputs)
        channels, x = self.sizes[2], self.inputs[f"x_{sides}"]
        own = {name: self.inputs[f"{name}_{sides}"] for name in ("u", "delta", "A", "D", "delta_bias")}
        rows = {"B": x[..., None, -32:-16], "C": x[..., None, -16:]}
        flags = {"delta_softplus": self.softplus, "reverse": sides == "b"}
        return golden.selective_scan_f64(**own, **rows, **flags, z=self.inputs["z"][..., channels:])

    def run(self, library: ctypes.CDLL, variant: tuple[int, ...], sides: str, order: int) -> np.ndarray:
        y = np.full(self.sizes, np.nan, self.io)
        half, fields = self.io == np.float16, (ctypes.c_int32 * 8)(*variant)
        params = self.params(y, sides)
        workspace = np.full((*self.sizes[::2], len(sides), max(1, variant[7]), 16, 2), np.nan, np.float32)
        params.workspace = workspace.ctypes.data
        status = library.scan(half, ctypes.byref(params), fields, order)
        if status == TOO_LARGE:
            assert variant[0] == LANES and len(sides) == 2
            pytest.skip("both directions in one block take more shared memory than there is")
        assert status == 0
        return y


def relative_rms(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want))


def channels_for(form: tuple[int, ...]) -> int:
    """So many that a block's last channels are none; rows that start on 16 bytes, as all but one form want them."""
    return form[1] + 4 if form[0] == STATES else 40


@pytest.mark.parametrize("length", [1, 128, 131, 250])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_pair_is_right_in_whatever_order_its_threads_run(
    library: ctypes.CDLL, form: tuple[int, ...], length: int
) -> None:
    """Lengths of an odd and of an even number of tiles, ragged and not."""
    layer = Layer(length, channels_for(form), "fp16")
    first, *others = (layer.run(library, form, "fb", order) for order in ORDERS)
    assert relative_rms(first, layer.want("fb")) < TOLERANCE["fp16"]
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("sides", ["f", "b", "fb"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fp32_and_single_directions(library: ctypes.CDLL, form: tuple[int, ...], sides: str) -> None:
    if form[:2] == (SEQUENTIAL, 2):
        pytest.skip("two fp32 channels a thread are not compiled")
    layer = Layer(131, channels_for(form), "fp32", batch=2)
    results = [layer.run(library, form, sides, order) for order in (0, 1)]
    assert relative_rms(results[0], layer.want(sides)) < TOLERANCE["fp32"]
    np.testing.assert_array_equal(*results)


def test_without_softplus_what_was_forgotten_comes_back(library: ctypes.CDLL) -> None:
    """A chunk whose Delta sums to -32, then to 32: seen from its end its first tokens count as much as its last."""
    form = (STATES, 16, 4, 32, 2, 0, 1, 2)
    assert form in FORMS
    layer = Layer(512, form[1], "fp32", softplus=False)
    layer.inputs["A_f"][:], layer.inputs["delta_bias_f"][:] = -1, 0
    layer.inputs["delta_f"][:, :128], layer.inputs["delta_f"][:, 128:256] = -0.25, 0.25
    layer.inputs["delta_f"][:, 256:] = 0.001
    y, want = layer.run(library, form, "f", 0), layer.want("f")
    assert relative_rms(y[:, 256:], want[:, 256:]) < 1e-4


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    """Without the one where both directions meet, what comes out depends on who ran first."""
    broken = build(tmp_path, {"cuda/states.cuh": NO_MEETING})
    form = next(form for form in FORMS if form[0] == STATES)
    layer = Layer(131, form[1], "fp16")
    results = [layer.run(broken, form, "fb", order) for order in (0, 1)]
    assert not np.array_equal(*results, equal_nan=True)
