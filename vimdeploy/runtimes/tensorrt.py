"""A TensorRT plan as a session: 8.5 to 11 and TensorRT-RTX by tensor names, CUDA memory without torch.

TensorRT 8.5 already has the tensor-name calls (set_input_shape, set_tensor_address, execute_async_v3), so there is one
path for all versions.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vimdeploy.bundle import check_hash, sha256_of
from vimdeploy.engines.capabilities import Capabilities, import_runtime
from vimdeploy.engines.plugin import LIBRARIES, load_plugin, plugin_path
from vimdeploy.engines.sidecar import Sidecar, check_plan, read_sidecar
from vimdeploy.errors import EngineError, ModelFileError, RuntimeMissing, UsageError, VimDeployError
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.base import Prepared, Session, TensorSpec

if TYPE_CHECKING:
    import torch

_REBUILD = "build it here with `vimdeploy build-engine`"


@dataclass(frozen=True)
class _Recording:
    """One batch size as a graph, and the context it was recorded from."""

    context: Any
    graph: cuda.Graph


class TensorRTSession(Session):
    """A plan with its sidecar, on one card.

    ``plugin``: the plugin library, None for the one the sidecar names. ``device``: the card's index. ``cuda_graph``:
    record each batch size once and replay it, which spares the launches of a small batch; before TensorRT 10 only the
    last batch size stays recorded. Any batch within the sidecar's profile runs.

    Raises ModelFileError for a plan or sidecar that is missing, damaged, or of another TensorRT or card;
    RuntimeMissing when TensorRT, the card or the plugin is not there, or the plugin is not the one the plan was built
    with; EngineError when TensorRT cannot load the plan.
    """

    def __init__(self, plan: Path, *, plugin: Path | None = None, device: int = 0, cuda_graph: bool = False) -> None:
        self._cuda: cuda.Context | None = None
        self.sidecar = read_sidecar(plan)
        self.info = self.sidecar.info
        check_plan(plan, self.sidecar)
        check_hash(plan)
        card = cuda.device(device)
        module, can = import_runtime(self.sidecar.runtime["name"])
        check_host(plan, self.sidecar, can, card)
        self._cuda = cuda.Context(device)
        if self.sidecar.plugin is not None:
            path = find_plugin(plan, self.sidecar, can, plugin)
            # Sidecars before the fused ops name the one op there was.
            load_plugin(module, can, path, self.sidecar.plugin.get("ops") or (self.sidecar.plugin["name"],))
        from vimdeploy.engines.build import make_logger

        self._logger = make_logger(module)
        self._runtime = module.Runtime(self._logger)
        if self.sidecar.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        # A recorded graph is good only while its context stays as it was, so each has one of its own; these share
        # their memory, since they take turns on one stream. Before TensorRT 10 the engine's one profile serves one.
        self._several = hasattr(module, "ExecutionContextAllocationStrategy")
        self._managed = module.ExecutionContextAllocationStrategy.USER_MANAGED if self._several else None
        self._graphs: dict[int, _Recording] | None = {} if cuda_graph else None
        self._scratch: tuple[int, int] | None = None  # address and size of the graphs' contexts' memory
        self._unrecorded: Any = None
        self._context = self._engine and self._new_context(shared=cuda_graph and self._several)
        if self._context is None:
            said = " ".join(self._logger.errors[-1].split()) if self._logger.errors else "no reason given"
            self.close()
            raise EngineError(f"{can} cannot load {plan}: {said}", hint=_REBUILD)
        self._open(module)
        self._description = f"{can} on {card.name}, {self.sidecar.precision['asked']}" + (
            ", vim plugin" if self.sidecar.plugin is not None else ", function body"
        )

    def _open(self, module: Any) -> None:
        """Names, types and buffers for the largest batch."""
        assert self._cuda is not None
        engine, context, profile = self._engine, self._context, self.sidecar.profile
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        reads = [name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
        if reads != [profile.input]:
            raise ModelFileError(f"the plan reads {', '.join(reads)}, its sidecar says {profile.input}", hint=_REBUILD)
        context.set_input_shape(profile.input, profile.max)
        self._pointers: dict[str, int] = {}
        specs: dict[str, TensorSpec] = {}
        for name in names:
            dtype = np.dtype(module.nptype(engine.get_tensor_dtype(name)))
            largest = tuple(context.get_tensor_shape(name))
            if any(side < 0 for side in largest):
                raise EngineError(f"the plan does not say the shape of {name} for {profile.max}", hint=_REBUILD)
            shape = tuple(None if side < 0 else int(side) for side in engine.get_tensor_shape(name))
            specs[name] = TensorSpec(shape, dtype)
            self._pointers[name] = self._cuda.allocate(int(np.prod(largest)) * dtype.itemsize)
            context.set_tensor_address(name, self._pointers[name])
        self.inputs = {profile.input: specs[profile.input]}
        self.outputs = {name: spec for name, spec in specs.items() if name not in reads}

    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        self._check(batch.shape)
        assert self._cuda is not None
        device, name = self._cuda, self.sidecar.profile.input
        device.enter()
        device.upload(batch, self._pointers[name])
        context = self._launch(batch.shape)
        results = {}
        for output, spec in self.outputs.items():
            results[output] = np.empty(tuple(context.get_tensor_shape(output)), spec.dtype)
            device.download(self._pointers[output], results[output])
        device.synchronize()
        return results

    def prepare(self, batch: np.ndarray) -> Prepared:
        self._check_batch(batch)
        self._check(batch.shape)
        assert self._cuda is not None
        self._cuda.enter()
        batch = np.ascontiguousarray(batch)
        self._cuda.upload(batch, self._pointers[self.sidecar.profile.input])
        self._cuda.synchronize()
        return Prepared(lambda: self._launch(batch.shape), self._cuda.stream)

    def run_torch(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) on this session's card, of the input's type -> outputs on the card, without a copy.

        Enqueued on torch's current stream, like any torch operation: nothing is waited for, and nothing is recorded,
        whatever ``cuda_graph`` says. Raises UsageError for a tensor elsewhere, of another type, or a batch outside the
        profile.
        """
        import torch

        if self._closed or self._cuda is None:
            raise UsageError("this session is closed", hint="open another with vimdeploy.runtimes.open_session")
        (name, spec), *_ = self.inputs.items()
        if not batch.is_cuda or batch.device.index != self._cuda.device.index:
            raise UsageError(
                f"the tensor is on {batch.device}, the session on cuda:{self._cuda.device.index}",
                hint="move it there, or use run() with a numpy array",
            )
        if str(batch.dtype).rsplit(".", 1)[-1] != spec.dtype.name:
            raise UsageError(f"the model takes {spec}, not {batch.dtype}")
        self._check(tuple(batch.shape))
        batch = batch.contiguous()
        addresses = {name: batch.data_ptr()}
        context = self._context_of_callers()
        context.set_input_shape(name, tuple(batch.shape))
        results = {}
        for output, want in self.outputs.items():
            results[output] = torch.empty(
                tuple(context.get_tensor_shape(output)),
                dtype=getattr(torch, want.dtype.name),
                device=batch.device,
            )
            addresses[output] = results[output].data_ptr()
        stream = torch.cuda.current_stream(batch.device)
        self._bind(context, tuple(batch.shape), addresses)
        self._enqueue(context, stream.cuda_stream)
        return results

    def describe(self) -> str:
        return self._description

    def close(self) -> None:
        super().close()
        self._forget()
        self._graphs = None
        # In this order: each uses the one before it.
        self._context = self._unrecorded = self._engine = self._runtime = None
        if self._cuda is not None:
            self._cuda.close()
            self._cuda = None

    def _check(self, shape: tuple[int, ...]) -> None:
        refusal = self.sidecar.profile.refusal(shape)
        if refusal:
            low, high = self.sidecar.profile.min[0], self.sidecar.profile.max[0]
            raise UsageError(
                refusal,
                hint=f"run batches of {low} to {high}, or build with --max-batch {max(shape[0], high)}"
                if low != high
                else f"run batches of {high}",
            )

    def _bind(self, context: Any, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        if not context.set_input_shape(self.sidecar.profile.input, shape):
            raise self._failed(f"refused a batch of {shape[0]}")
        for name, address in addresses.items():
            context.set_tensor_address(name, address)

    def _launch(self, shape: tuple[int, ...]) -> Any:
        """Run our own buffers on our own stream, from a recorded graph where that was asked for; the context it ran."""
        assert self._cuda is not None
        if self._graphs is None:
            self._bind(self._context, shape, self._pointers)
            self._enqueue(self._context, self._cuda.stream)
            return self._context
        if shape[0] not in self._graphs:
            self._graphs[shape[0]] = self._record(shape)
        recording = self._graphs[shape[0]]
        recording.graph.launch()
        return recording.context

    def _record(self, shape: tuple[int, ...]) -> _Recording:
        assert self._cuda is not None
        if self._several:
            context = self._new_context(shared=True)
            if context is None:
                raise self._failed("could not make another context")
            self._lend_memory(context)
        else:
            self._forget()
            context = self._context
        self._bind(context, shape, self._pointers)
        self._enqueue(context, self._cuda.stream)  # once outside: the first run of a shape may set things up
        self._cuda.synchronize()
        self._cuda.begin_capture()
        try:
            self._enqueue(context, self._cuda.stream)
        except EngineError:
            with contextlib.suppress(VimDeployError):  # the stream must not stay in capture
                self._cuda.end_capture().close()
            raise
        return _Recording(context, self._cuda.end_capture())

    def _forget(self) -> None:
        """Give up what was recorded."""
        recordings = getattr(self, "_graphs", None) or {}
        if recordings and self._cuda is not None:
            self._cuda.synchronize()
        for recording in recordings.values():
            recording.graph.close()
        recordings.clear()

    def _new_context(self, *, shared: bool) -> Any:
        """An execution context; `shared`: without memory of its own (`_lend_memory`)."""
        if shared:
            return self._engine.create_execution_context(self._managed)
        return self._engine.create_execution_context()

    def _lend_memory(self, context: Any) -> None:
        """Let `context` work in the memory that the recorded graphs share."""
        assert self._cuda is not None
        if self._scratch is None:
            size = getattr(self._engine, "device_memory_size_v2", None)
            size = int(self._engine.device_memory_size if size is None else size)
            self._scratch = (self._cuda.allocate(size), size)
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(*self._scratch)
        else:  # 10.0
            context.device_memory = self._scratch[0]

    def _context_of_callers(self) -> Any:
        """The context for work on other streams and buffers than ours."""
        if self._graphs is None:
            return self._context
        if not self._several:
            self._forget()  # it is the one that was recorded, and is about to be changed
            return self._context
        if self._unrecorded is None:
            self._unrecorded = self._new_context(shared=False)
        return self._unrecorded

    def _enqueue(self, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise self._failed("could not run the plan")

    def _failed(self, what: str) -> EngineError:
        said = " ".join(self._logger.errors[-1].split()) if self._logger.errors else "no reason given"
        return EngineError(f"TensorRT {what}: {said}", hint="report it with the plan's sidecar")


def check_host(plan: Path, sidecar: Sidecar, can: Capabilities, card: cuda.Device) -> None:
    """Raise ModelFileError when the plan was built by another TensorRT, or for another compute capability."""
    built = sidecar.runtime["version"]
    newer = sidecar.version_compatible and _numbers(can.version) >= _numbers(built)
    if can.version != built and not newer:
        raise ModelFileError(
            f"{plan} was built by {sidecar.runtime['name']} {built}; this host has {can.version}, and a plan loads "
            "only in the version that built it",
            hint=_REBUILD,
        )
    if sidecar.device is not None and sidecar.device["sm"] != card.sm:
        raise ModelFileError(
            f"{plan} was built for {sidecar.device['name']} (sm_{sidecar.device['sm']}); this is {card.name} "
            f"(sm_{card.sm})",
            hint=_REBUILD,
        )


def find_plugin(plan: Path, sidecar: Sidecar, can: Capabilities, named: Path | None) -> Path:
    """The library a plan needs: `named`, else where the sidecar saw it, beside the plan, or installed.

    Only the very library the plan was built with is taken. Raises RuntimeMissing saying what was looked at.
    """
    assert sidecar.plugin is not None
    wanted, recorded = sidecar.plugin["sha256"], Path(sidecar.plugin["file"])
    if named is not None:
        places = [named]
    else:
        places = [recorded, plan.parent / recorded.name, plan.parent / LIBRARIES[can.plugins]]
        with contextlib.suppress(RuntimeMissing):
            places.append(plugin_path(can))
    present = [place for place in dict.fromkeys(places) if place.is_file()]
    for place in present:
        if sha256_of(place) == wanted:
            return place
    if present:
        raise RuntimeMissing(
            f"{present[0]} is not the plugin library {plan} was built with (SHA-256 differs): another version",
            hint="name the right one with --plugin, or build the engine again",
        )
    raise RuntimeMissing(
        f"the plugin library of {plan} is not there: {' nor '.join(str(place) for place in dict.fromkeys(places))}",
        hint="name it with --plugin",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
