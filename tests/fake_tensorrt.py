"""A stand-in for TensorRT and for the CUDA driver: enough for every path around them, on a host with neither.

The "plan" is the text the builder was given; running it doubles the mean of each channel, which is what tiny_onnx's
model computes with its op. Memory on the "card" is host memory.
"""

from __future__ import annotations

import ctypes
import enum
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vimdeploy.export import schema
from vimdeploy.runtimes import cuda

H100 = cuda.Device(0, "NVIDIA H100 80GB HBM3", 90, "13.0")


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity


class LayerType(enum.Enum):
    CONSTANT = 0
    SHAPE = 1
    PLUGIN_V2 = 2
    IDENTITY = 3
    MATRIX_MULTIPLY = 4


class Flag(enum.IntEnum):
    TF32 = 0
    FP16 = 1
    OBEY_PRECISION_CONSTRAINTS = 2
    INT8 = 3


class Tensor:
    is_network_output = False

    def __init__(self, name: str) -> None:
        self.name = name


class Layer:
    """As much of ILayer as constraints need."""

    def __init__(self, kind: LayerType, *outputs: str) -> None:
        self.type, self.num_outputs = kind, len(outputs)
        self.precision: Any = None
        self.output_types: dict[int, Any] = {}
        self._outputs = [Tensor(name) for name in outputs]

    def get_output(self, i: int) -> Tensor:
        return self._outputs[i]

    def set_output_type(self, i: int, kind: Any) -> None:
        self.output_types[i] = kind


class Network:
    def __init__(self, layers: tuple[Layer, ...] = ()) -> None:
        self._layers, self.num_layers = layers, len(layers)

    def get_layer(self, i: int) -> Layer:
        return self._layers[i]


class Config:
    def __init__(self) -> None:
        self.flags: set[Any] = {Flag.TF32}
        self.profiles: list[Any] = []
        self.sources, self.workspace, self.cache = 0b111, None, b""

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return 0

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace = size

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, sources: int) -> None:
        self.sources = sources

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content == b"of another card" else content

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return type("Cache", (), {"serialize": lambda _: b"timings"})()


class OptimizationProfile:
    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.shapes = (name, tuple(low), tuple(best), tuple(high))


class ParserError:
    def __init__(self, node: int, text: str) -> None:
        self._node, self._text = node, text

    def node(self) -> int:
        return self._node

    def desc(self) -> str:
        return self._text


def fake_tensorrt(**behaviour: Any) -> ModuleType:
    """A module like TensorRT 8.5. `behaviour`: layers (what the inspector lists), build_errors, parse_errors,
    creators, version, refuse_plan."""
    trt = ModuleType("tensorrt")
    trt.__version__ = behaviour.get("version", "8.5.3.1")  # type: ignore[attr-defined]
    seen: dict[str, Any] = {}
    trt.seen = seen  # type: ignore[attr-defined]

    class Parser:
        def __init__(self, network: Network, logger: Any) -> None:
            self._errors = behaviour.get("parse_errors", [])
            self.num_errors = len(self._errors)

        def parse(self, onnx: bytes) -> bool:
            seen["onnx"] = onnx
            return not self._errors

        def get_error(self, i: int) -> ParserError:
            return ParserError(*self._errors[i])

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> Network:
            seen["network_flags"] = flags
            return Network()

        def create_builder_config(self) -> Config:
            seen["config"] = Config()
            return seen["config"]

        def create_optimization_profile(self) -> OptimizationProfile:
            return OptimizationProfile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            for text in behaviour.get("build_errors", ()):
                self._logger.log(Severity.ERROR, text)
            if behaviour.get("build_errors"):
                return None
            return json.dumps(config.profiles[0].shapes).encode()

    class Inspector:
        """Types of a dynamic batch are told through a context that has shapes, and not without."""

        execution_context: Any = None

        def __init__(self, dynamic: bool) -> None:
            self._dynamic = dynamic

        def get_engine_information(self, kind: Any) -> str:
            text = json.dumps({"Layers": behaviour["layers"]})
            if self._dynamic and (self.execution_context is None or not self.execution_context.shaped):
                text = re.sub('"Format/Datatype": "[^"]*"', '"Format/Datatype": "N/A due to dynamic shapes"', text)
            return text

    class Engine:
        num_io_tensors = 2

        def __init__(self, plan: bytes) -> None:
            self.input, self.low, _, self.high = json.loads(plan)

        def create_engine_inspector(self) -> Any:
            return Inspector(self.low != self.high)

        def create_execution_context(self, strategy: Any = None) -> Context:
            seen.setdefault("contexts", []).append(Context(self, strategy))
            return seen["contexts"][-1]

        device_memory_size_v2 = 1 << 10

        def get_binding_index(self, name: str) -> int:
            return (self.input, "logits").index(name)

        def get_tensor_name(self, i: int) -> str:
            return (self.input, "logits")[i]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name == self.input else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return DataType.FLOAT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch = self.low[0] if self.low == self.high else -1
            return (batch, *self.low[1:]) if name == self.input else (batch, 3)

    class Context:
        def __init__(self, engine: Engine, strategy: Any = None) -> None:
            self._engine, self._shape = engine, ()
            self._addresses: dict[str, int] = {}
            self.memory = None if strategy is not None else ("its own", 0)

        def set_device_memory(self, address: int, size: int) -> None:
            self.memory = (address, size)

        def set_input_shape(self, name: str, shape: Any) -> bool:
            self._shape = tuple(shape)
            return True

        shaped = False  # as far as the inspector is concerned

        def set_binding_shape(self, index: int, shape: Any) -> bool:
            self.shaped = index == 0
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._shape if name == self._engine.input else (self._shape[0], 3)

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert self.memory is not None, "a context without memory"
            seen.setdefault("runs", []).append(self._shape)
            if _captured is not None:
                state = (self._shape, dict(self._addresses))
                _captured.append((self, state))
            else:
                self.compute()
            return not behaviour.get("refuse_run")

        def compute(self) -> None:
            images = _at(self._addresses[self._engine.input], self._shape)
            _at(self._addresses["logits"], (self._shape[0], 3))[:] = 2 * images.mean((2, 3))

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if behaviour.get("refuse_plan"):
                self._logger.log(Severity.ERROR, "Serialization assertion magicTagRead failed")
                return None
            return Engine(plan)

    class Registry:
        plugin_creator_list = behaviour.get("creators", [Creator(op, "1", "vim") for op in schema.OPS])

        def get_plugin_creator(self, name: str, version: str, namespace: str) -> Creator | None:
            wanted = (name, version, namespace)
            return next(
                (c for c in self.plugin_creator_list if (c.name, c.plugin_version, c.plugin_namespace) == wanted), None
            )

    class DataType(enum.Enum):
        FLOAT = 0
        HALF = 1

    class TensorIOMode(enum.Enum):
        INPUT = 0
        OUTPUT = 1

    contents = {
        "ILogger": ILogger,
        "BuilderFlag": Flag,
        "NetworkDefinitionCreationFlag": enum.IntEnum("NetworkFlag", {"EXPLICIT_BATCH": 0}),
        "DataType": DataType,
        "TacticSource": enum.IntEnum("TacticSource", {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2}),
        "MemoryPoolType": enum.Enum("MemoryPoolType", ["WORKSPACE"]),
        "ProfilingVerbosity": enum.Enum("ProfilingVerbosity", ["DETAILED"]),
        "LayerInformationFormat": enum.Enum("LayerInformationFormat", ["JSON"]),
        "ITimingCache": object,
        "LayerType": LayerType,
        "TensorIOMode": TensorIOMode,
        "Builder": Builder,
        "OnnxParser": Parser,
        "Runtime": Runtime,
        "get_plugin_registry": Registry,
        "nptype": lambda kind: {DataType.FLOAT: np.float32, DataType.HALF: np.float16}[kind],
    }
    for name, value in contents.items():
        setattr(trt, name, value)
    return trt


class Creator:
    def __init__(self, name: str, version: str, namespace: str) -> None:
        self.name, self.plugin_version, self.plugin_namespace = name, version, namespace


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32).reshape(shape)


#: what is being captured: contexts of TensorRT and their state at that time
_captured: list[tuple[Any, Any]] | None = None


class FakeGraph:
    """Replays what was captured, and insists that no context has been changed since."""

    def __init__(self, work: list[tuple[Any, Any]]) -> None:
        self._work, self.closed, self.launches = work, False, 0

    def launch(self) -> None:
        assert not self.closed
        for context, state in self._work:
            assert (context._shape, context._addresses) == state, "the context was changed after it was recorded"
            context.compute()
        self.launches += 1

    def close(self) -> None:
        self.closed = True


class FakeContext:
    """cuda.Context with host memory."""

    def __init__(self, index: int = 0) -> None:
        self.device, self.stream = H100, 7
        self.buffers: list[Any] = []
        self.closed = False

    def enter(self) -> None:
        assert not self.closed

    def allocate(self, size: int) -> int:
        self.buffers.append(ctypes.create_string_buffer(max(size, 1)))
        return ctypes.addressof(self.buffers[-1])

    def free(self, pointer: int) -> None:
        (found,) = (buffer for buffer in self.buffers if ctypes.addressof(buffer) == pointer)
        self.buffers.remove(found)

    def upload(self, array: np.ndarray, pointer: int) -> None:
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, pointer: int, array: np.ndarray) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def synchronize(self) -> None:
        assert not self.closed

    def begin_capture(self) -> None:
        global _captured
        _captured = []

    def end_capture(self) -> FakeGraph:
        global _captured
        assert _captured
        work, _captured = _captured, None
        return FakeGraph(work)

    def close(self) -> None:
        self.closed = True


def install(monkeypatch: Any, module: ModuleType) -> None:
    """Let vimdeploy find `module` as tensorrt and a card like H100."""
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda, "device", lambda index=0: H100)
    monkeypatch.setattr(cuda, "Context", FakeContext)


def plugin_file(folder: Path) -> Path:
    """A file that looks like a shared library of this machine; nothing loads it while the creator is there."""
    import platform

    machine = {"x86_64": 62, "aarch64": 183}[platform.machine()]
    path = folder / "libvimdeploy_trt8.so"
    path.write_bytes(b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + b"content")
    return path
