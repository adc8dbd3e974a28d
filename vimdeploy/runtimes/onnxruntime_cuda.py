"""ONNX Runtime on a card: its CUDA execution provider, with vimdeploy's CUDA ops."""

from __future__ import annotations

import contextlib
import ctypes
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vimdeploy.errors import ModelFileError, RuntimeMissing
from vimdeploy.export import schema
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.base import Prepared, TensorSpec
from vimdeploy.runtimes.onnxruntime import FATAL_ONLY, OrtSession, _import, _of_run_error

PROVIDER = "CUDAExecutionProvider"


class OrtCudaSession(OrtSession):
    """A model file in ONNX Runtime's CUDA provider.

    ``library``, ``threads`` and ``optimize`` as for OrtSession; the library is libvimdeploy_ort_cuda.so. ``device``:
    the card's index. ``cuda_graph``: record each batch size once and replay it, which spares the launches of a small
    batch. fp32 products are fp32, not TF32.

    Raises what OrtSession raises; RuntimeMissing too when there is no card, when this onnxruntime has no CUDA provider
    or cannot load it, and when the library has no CUDA ops: ONNX Runtime would take the CPU and say nothing.
    """

    def __init__(
        self,
        model: Path,
        *,
        library: Path | None,
        threads: int | None = None,
        optimize: bool = True,
        device: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        card = cuda.device(device)
        self._device = f"CUDA on {card.name}"
        self._recorded = cuda_graph
        self._cuda: cuda.Context | None = cuda.Context(device)
        self._bound: dict[int, _Binding] = {}
        try:
            super().__init__(model, library=library, threads=threads, optimize=optimize)
        except BaseException:
            self.close()
            raise

    def _create(self, ort: Any, model: Path, options: Any) -> Any:
        assert self._cuda is not None
        if PROVIDER not in ort.get_available_providers():
            raise RuntimeMissing(
                f"this onnxruntime ({ort.__version__}) has no CUDA provider",
                hint="pip uninstall onnxruntime, then pip install onnxruntime-gpu",
            )
        # CUDA's and cuDNN's libraries as pip installs them; it prints what it does not find.
        if hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):
                ort.preload_dlls()
        knows_places = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")  # since 1.24
        if knows_places:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = {
            "device_id": str(self._cuda.device.index),
            "user_compute_stream": str(self._cuda.stream),
            "use_tf32": "0",
            # The default tries every algorithm of every convolution for each batch size, for seconds; a Vim has one.
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": "1" if self._recorded else "0",
        }
        session = ort.InferenceSession(str(model), options, providers=[(PROVIDER, provider), "CPUExecutionProvider"])
        if PROVIDER not in session.get_providers():
            raise RuntimeMissing(
                f"ONNX Runtime {ort.__version__} cannot use CUDA: {_why_not(ort)}",
                hint="install the CUDA and cuDNN that this onnxruntime-gpu is built for "
                "(pip install 'onnxruntime-gpu[cuda,cudnn]')",
            )
        if knows_places:
            self._look_where_ours_run(session)
        return session

    def _look_where_ours_run(self, session: Any) -> None:
        """ONNX Runtime takes a CPU kernel where a node has no CUDA one, with a copy on either side."""
        on_cpu = {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != PROVIDER
            for node in part.get_nodes()
            if node.domain == schema.DOMAIN
        }
        if on_cpu:
            raise RuntimeMissing(
                f"the op library has {', '.join(sorted(on_cpu))} for the CPU only",
                hint="name libvimdeploy_ort_cuda.so of this vimdeploy version",
            )

    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        assert self._cuda is not None
        with _CARD.used(alone=self._records(batch.shape)):
            self._cuda.enter()
            binding = self._binding(batch.shape)
            self._cuda.upload(batch, binding.input)
            self._enqueue(binding, batch.shape[0])
            results = {name: np.empty(shape, dtype) for name, (_, shape, dtype) in binding.outputs.items()}
            for name, (pointer, _, _) in binding.outputs.items():
                self._cuda.download(pointer, results[name])
            self._cuda.synchronize()
        return results

    def prepare(self, batch: np.ndarray) -> Prepared:
        self._check_batch(batch)
        assert self._cuda is not None
        with _CARD.used(alone=self._records(batch.shape)):
            self._cuda.enter()
            binding = self._binding(batch.shape)
            self._cuda.upload(np.ascontiguousarray(batch), binding.input)
            self._enqueue(binding, batch.shape[0])  # allocates, and records where there is a graph
            self._cuda.synchronize()
        return Prepared(lambda: self._enqueue(binding, batch.shape[0]), self._cuda.stream)

    def _records(self, shape: tuple[int, ...]) -> bool:
        """Whether the next run of this batch is recorded."""
        return self._recorded and shape[0] not in self._bound

    def _enqueue(self, binding: _Binding, batch: int) -> None:
        try:
            self._session.run_with_iobinding(binding.binding, binding.options)
        except Exception as error:
            raise _of_run_error(batch, error) from error

    def _binding(self, shape: tuple[int, ...]) -> _Binding:
        """Buffers on the card for a batch of this shape. Without graphs to keep, for the last shape only."""
        assert self._cuda is not None
        if shape[0] not in self._bound:
            if not self._recorded:
                for old in self._bound.values():
                    old.free(self._cuda)
                self._bound.clear()
            self._bound[shape[0]] = _Binding(self, self._session, self._cuda, shape, self._recorded)
        return self._bound[shape[0]]

    def close(self) -> None:
        with _CARD.used(alone=False):
            super().close()
            self._bound.clear()
            if self._cuda is not None:
                self._cuda.close()
                self._cuda = None


class _Card:
    """Who of this process may use the card: any number of sessions at once, or one that records a graph.

    ONNX Runtime records in CUDA's global mode, in which what another thread does meanwhile, even a wait for its own
    stream, fails and spoils the recording.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._recording = False

    @contextlib.contextmanager
    def used(self, *, alone: bool) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._recording and not (alone and self._users))
            self._recording = alone
            self._users += not alone
        try:
            yield
        finally:
            with self._changed:
                if alone:
                    self._recording = False
                else:
                    self._users -= 1
                self._changed.notify_all()


_CARD = _Card()


class _Binding:
    """The input and outputs of one batch size at fixed places on the card."""

    def __init__(
        self, owner: OrtCudaSession, session: Any, context: cuda.Context, shape: tuple[int, ...], recorded: bool
    ) -> None:
        ((name, spec),) = owner.inputs.items()
        number = context.device.index
        self.binding = session.io_binding()
        self.input = context.allocate(int(np.prod(shape)) * spec.dtype.itemsize)
        self.binding.bind_input(name, "cuda", number, spec.dtype.type, shape, self.input)
        self.outputs: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        for output, want in owner.outputs.items():
            of_batch = _shape_of(output, want, shape[0])
            pointer = context.allocate(int(np.prod(of_batch)) * want.dtype.itemsize)
            self.binding.bind_output(output, "cuda", number, want.dtype.type, of_batch, pointer)
            self.outputs[output] = (pointer, of_batch, want.dtype)
        self.options = _import().RunOptions()
        self.options.log_severity_level = FATAL_ONLY
        # The stream is ours: whoever reads an output waits for it. Only a graph may leave it at that: an ordinary run
        # that does not end with ONNX Runtime's own wait leaves the host buffers of its copies to be freed by a callback
        # on the stream, and where closing the session comes first, that callback ends the process (1.30,
        # cuda_allocator.cc: cudaFreeHost is not permitted there).
        if recorded:
            self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self.options.add_run_config_entry("gpu_graph_id", str(shape[0]))

    def free(self, context: cuda.Context) -> None:
        context.synchronize()
        for pointer in (self.input, *(pointer for pointer, _, _ in self.outputs.values())):
            context.free(pointer)


def _shape_of(output: str, spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """A side that the batch decides is the first."""
    if any(side is None for side in spec.shape[1:]):
        raise ModelFileError(
            f"the model does not say the shape of {output}: {spec}", hint="export it again with `vimdeploy export CKPT`"
        )
    return tuple(batch if side is None else side for side in spec.shape)


def _why_not(ort: Any) -> str:
    """What keeps the provider's library from loading; ONNX Runtime only logs it."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error)
    return "it refused the card, and said no more"
