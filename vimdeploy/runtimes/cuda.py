"""The part of CUDA's driver API a session needs, by ctypes: no torch, no CUDA toolkit, only libcuda.so.1."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from vimdeploy.errors import RuntimeMissing, VimDeployError

LIBRARY = "libcuda.so.1"
_SM_MAJOR, _SM_MINOR = 75, 76  # CUdevice_attribute
_RELAXED = 2  # CUstreamCaptureMode
_NON_BLOCKING = 1  # CUstream_flags: our stream does not wait for the legacy default stream


class CudaError(VimDeployError):
    """A call into the CUDA driver failed on a host that has one."""

    exit_code = 3


@dataclass(frozen=True)
class Device:
    """A card: index, name, compute capability as 10 major + minor (90 for an H100), and the driver's CUDA version."""

    index: int
    name: str
    sm: int
    driver: str


@functools.cache
def _driver() -> Any:
    """The driver library, initialised. Raises RuntimeMissing with the reason there is no card to use."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise RuntimeMissing(
            f"no NVIDIA GPU: the driver ({LIBRARY}) is not installed here ({error})",
            hint="run this on the host whose card is to run the model",
        ) from error
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    status = library.cuInit(0)
    if status:
        raise RuntimeMissing(f"no NVIDIA GPU: {_text(library, status)}", hint="check the card with nvidia-smi")
    return library


def _text(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return (text.value or f"CUDA error {status}".encode()).decode()


def _call(name: str, *arguments: Any) -> None:
    library = _driver()
    status = getattr(library, name)(*arguments)
    if status:
        raise CudaError(f"CUDA: {name} failed: {_text(library, status)}")


def device(index: int = 0) -> Device:
    """The card of that index. Raises RuntimeMissing when there is none."""
    library = _driver()
    count = ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= index < count.value:
        raise RuntimeMissing(
            f"no NVIDIA GPU {index}: this host has {count.value}" if count.value else "no NVIDIA GPU on this host",
            hint="check the cards with nvidia-smi, and CUDA_VISIBLE_DEVICES",
        )
    handle, name, version = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), index)
    _call("cuDeviceGetName", name, 256, handle)
    library.cuDriverGetVersion(ctypes.byref(version))
    numbers = []
    for attribute in (_SM_MAJOR, _SM_MINOR):
        value = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        numbers.append(value.value)
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Device(index, name.value.decode(), 10 * numbers[0] + numbers[1], driver)


def pci_bus_id(index: int = 0) -> str:
    """The card's place on the bus, such as "0000:1b:00.0": the name under which NVML knows it."""
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    _call("cuDeviceGet", ctypes.byref(handle), index)
    _call("cuDeviceGetPCIBusId", text, 32, handle)
    return text.value.decode()


def free_memory() -> tuple[int, int]:
    """Free and total bytes of the card whose context is current; what other programs hold counts as taken."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


class Event:
    """A moment on a stream of the current context."""

    def __init__(self) -> None:
        self._event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(self._event), 0)

    def record(self, stream: int) -> None:
        _call("cuEventRecord", self._event, ctypes.c_void_p(stream))

    def synchronize(self) -> None:
        """Wait until the moment has come."""
        _call("cuEventSynchronize", self._event)

    def milliseconds_since(self, earlier: Event) -> float:
        """The time between two moments that have both come, on the card's clock."""
        elapsed = ctypes.c_float()
        name = "cuEventElapsedTime_v2" if hasattr(_driver(), "cuEventElapsedTime_v2") else "cuEventElapsedTime"
        _call(name, ctypes.byref(elapsed), earlier._event, self._event)
        return elapsed.value

    def close(self) -> None:
        _call("cuEventDestroy_v2", self._event)


class Context:
    """A card's primary context (the one the CUDA runtime and torch use too), made current, with one stream of its own.

    Buffers and the stream belong to it and go with `close`. Not for use from several threads at once.
    """

    def __init__(self, index: int = 0) -> None:
        self.device = device(index)
        self._handle = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(self._handle), index)
        context = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._handle)
        self._context: ctypes.c_void_p | None = context
        self.enter()
        self._buffers: list[ctypes.c_uint64] = []
        stream = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self.stream = int(stream.value or 0)

    def enter(self) -> None:
        """Make the context current in this thread, where CUDA's runtime inside TensorRT finds it."""
        _call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the card. Raises CudaError when there is no room."""
        pointer = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        self._buffers.append(pointer)
        return int(pointer.value)

    def free(self, pointer: int) -> None:
        """Give back what `allocate` gave. Nothing on the stream may still use it."""
        _call("cuMemFree_v2", ctypes.c_uint64(pointer))
        self._buffers = [buffer for buffer in self._buffers if buffer.value != pointer]

    def upload(self, array: np.ndarray, pointer: int) -> None:
        """Copy a contiguous array to the card, on the stream."""
        _call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(pointer), ctypes.c_void_p(array.ctypes.data),
              ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.stream))  # fmt: skip

    def download(self, pointer: int, array: np.ndarray) -> None:
        """Fill a contiguous array from the card, on the stream; `synchronize` before reading it."""
        _call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(pointer),
              ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.stream))  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the stream; an error of a kernel before it comes out here."""
        _call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def begin_capture(self) -> None:
        _call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream), ctypes.c_int(_RELAXED))

    def end_capture(self) -> Graph:
        """What the stream was given since `begin_capture`, as a graph to launch."""
        graph = ctypes.c_void_p()
        _call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        return Graph(graph, self.stream)

    def close(self) -> None:
        if self._context is None:
            return
        self.enter()
        _call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
        for pointer in self._buffers:
            _call("cuMemFree_v2", pointer)
        self._buffers.clear()
        _call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        _call("cuDevicePrimaryCtxRelease_v2", self._handle)
        self._context = None


class Graph:
    """A captured CUDA graph, instantiated for the stream it was captured from."""

    def __init__(self, graph: ctypes.c_void_p, stream: int) -> None:
        self._graph, self._stream, self._executable = graph, stream, ctypes.c_void_p()
        _call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))

    def launch(self) -> None:
        _call("cuGraphLaunch", self._executable, ctypes.c_void_p(self._stream))

    def close(self) -> None:
        _call("cuGraphExecDestroy", self._executable)
        _call("cuGraphDestroy", self._graph)
