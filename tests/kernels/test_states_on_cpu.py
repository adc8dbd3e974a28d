"""The states form of the CUDA scan, computed on the CPU: its results, and that its barriers suffice.

tests/cpp/cuda_on_cpu.h runs a block's threads one after another between barriers. A thread that read what another
writes before they have met would find it in one order and not in another, or find NaN.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import golden
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
STATES = 3
#: first come, last come, two shuffles
ORDERS = (0, 1, 2, 3)
TOLERANCE = {"fp32": 2e-6, "fp16": 5e-4}  # relative RMS (issue 4, "Numerics")
#: file -> what only nvcc understands, and what stands for it
REPLACED = {
    "cuda/states.cuh": (
        (r"kernel<<<(.*?), (\w+), (\w+), stream>>>\(params\);", r"emulated::Launch(kernel, \1, \2, \3, params);"),
        (r"cudaFuncSetAttribute\(kernel,[^;]*\);", "cudaSuccess;"),
        (r"return cudaGetLastError\(\);", "return cudaSuccess;"),
    ),
    "cuda/math.cuh": ((r'asm\("ex2.*\n', "y = exp2f(x);\n"), (r'asm\("rcp.*\n', "y = 1.0f / x;\n")),
}


def instances() -> list[tuple[int, ...]]:
    """(lanes, channels, tile, items) of those that are compiled."""
    text = (ROOT / "kernels/cuda/choose_variant.h").read_text()
    listed = re.search(r"#define VIM_STATES_INSTANCES\(X\)((?:.*\\\n)*.*\n)", text)
    assert listed
    return [tuple(map(int, each.split(",")[:4])) for each in re.findall(r"X\(([\d, ]+)\)", listed[1])]


class Direction(ctypes.Structure):
    """vim::cuda::Direction."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("u", "delta", "B", "C", "A", "D", "delta_bias")] + [
        (name, ctypes.c_int64)
        for name in (
            *("u_batch", "u_token", "delta_batch", "delta_token"),
            *(f"{name}_{what}" for name in "BC" for what in ("batch", "token", "group")),
        )
    ]


class Params(ctypes.Structure):
    """vim::cuda::Params."""

    _fields_ = [
        ("direction", Direction * 2),
        *((name, ctypes.c_void_p) for name in ("z", "y_scale", "y")),
        *((name, ctypes.c_int64) for name in ("z_batch", "z_token", "y_batch", "y_token")),
        *((name, ctypes.c_int) for name in ("batch", "length", "channels", "states", "groups", "channels_per_group")),
        *((name, ctypes.c_int) for name in ("pair", "reverse", "delta_softplus", "add_to_y", "state_granule")),
    ]


#: The barrier at the tile that both directions come to at once, taken out on all sides.
NO_MEETING = (
    (r"if \(walk == middle \+ 1\) __syncthreads\(\);", ""),
    (r"__syncthreads\(\);\n( *load_other\(rows\);)", r"\1"),
    (r"if \(meets && !reverse\) __syncthreads\(\);", ""),
)


def build(folder: Path, *changes: tuple[str, str]) -> ctypes.CDLL:
    """The kernel with `changes` to states.cuh."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    headers = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    headers = [each for each in (*headers, Path("/usr/local/cuda/include")) if (each / "cuda_fp16.h").is_file()]
    if not headers or compiler is None:
        pytest.skip("no CUDA headers, or no g++")
    for name, replaced in REPLACED.items():
        text = (ROOT / "kernels" / name).read_text()
        for pattern, replacement in (*replaced, *(changes if name == "cuda/states.cuh" else ())):
            text, count = re.subn(pattern, replacement, text)
            assert count == 1, pattern
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    out = folder / "libstates.so"
    includes = [folder, ROOT / "kernels", ROOT / "kernels/include", ROOT / "tests/cpp", headers[0]]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", *(f"-I{each}" for each in includes)]
    subprocess.run([compiler, *flags, str(ROOT / "tests/cpp/states_on_cpu.cc"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("states"))


class Layer:
    """Inputs of both directions of a layer, in numpy, and the sizes that go with them."""

    def __init__(self, length: int, channels: int, io: str, batch: int = 1) -> None:
        random = np.random.default_rng(length)
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
        p.pair, p.reverse, p.delta_softplus = len(sides) == 2, sides == "b", 1
        p.y, p.y_batch, p.y_token = y.ctypes.data, length * channels, channels
        z, size = self.inputs["z"], y.itemsize
        p.z, p.z_batch, p.z_token = z.ctypes.data + channels * size, 2 * length * channels, 2 * channels
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
        return golden.selective_scan_f64(**own, **rows, z=self.inputs["z"][..., channels:], reverse=sides == "b")

    def run(self, library: ctypes.CDLL, instance: tuple[int, ...], sides: str, order: int) -> np.ndarray:
        lanes, channels, tile, items = instance
        y = np.full(self.sizes, np.nan, self.io)
        variant = (ctypes.c_int32 * 6)(STATES, channels, lanes, tile, items, 0)
        half = self.io == np.float16
        assert library.scan_states(half, ctypes.byref(self.params(y, sides)), variant, order) == 0
        return y


def relative_rms(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("length", [1, 33, 128, 131, 200])
@pytest.mark.parametrize("instance", instances(), ids=str)
def test_a_pair_is_right_in_whatever_order_its_threads_run(
    library: ctypes.CDLL, instance: tuple[int, ...], length: int
) -> None:
    """Lengths of an odd and of an even number of tiles, ragged and not; channels that leave a block part empty."""
    layer = Layer(length, instance[1] + 4, "fp16")
    first, *others = (layer.run(library, instance, "fb", order) for order in ORDERS)
    assert relative_rms(first, layer.want("fb")) < TOLERANCE["fp16"]
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("sides", ["f", "b", "fb"])
@pytest.mark.parametrize("instance", instances(), ids=str)
def test_fp32_and_single_directions(library: ctypes.CDLL, instance: tuple[int, ...], sides: str) -> None:
    layer = Layer(131, instance[1], "fp32", batch=2)
    results = [layer.run(library, instance, sides, order) for order in (0, 1)]
    assert relative_rms(results[0], layer.want(sides)) < TOLERANCE["fp32"]
    np.testing.assert_array_equal(*results)


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    """Without the one where both directions meet, what comes out depends on who ran first."""
    broken, instance = build(tmp_path, *NO_MEETING), instances()[0]
    layer = Layer(131, instance[1], "fp16")
    results = [layer.run(broken, instance, "fb", order) for order in (0, 1)]
    assert not np.array_equal(*results, equal_nan=True)
