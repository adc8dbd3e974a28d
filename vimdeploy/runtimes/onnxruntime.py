"""ONNX Runtime on the CPU, with vimdeploy's op library or on the file's own function body (cards: onnxruntime_cuda)."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from vimdeploy.bundle import read_info
from vimdeploy.errors import ModelFileError, RuntimeMissing, UsageError, VimDeployError
from vimdeploy.runtimes.base import Session, TensorSpec

TYPES: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
}
# ONNX Runtime logs what it also raises; the exception is turned into our message, the log would only repeat it.
FATAL_ONLY = 4


class NoFunctionBody(RuntimeMissing):
    """The file leaves its vim:: operators to an op library, and none is loaded."""


class OrtSession(Session):
    """A model file in ONNX Runtime, CPU.

    ``library``: the op library to register, or None to run the op's function body from the file. ``threads``: for the
    operators; None lets the runtime choose. ``optimize=False`` turns graph optimisations off.

    Raises RuntimeMissing when onnxruntime is not installed or the library cannot be loaded, NoFunctionBody when there
    is neither a library nor a function body; ModelFileError when the file is missing, damaged, not a Vision Mamba of
    vimdeploy, or not runnable.
    """

    def __init__(self, model: Path, *, library: Path | None, threads: int | None = None, optimize: bool = True) -> None:
        ort = _import()
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        # Before ONNX Runtime sees the file: its own words for a file that is no model are no help.
        self.info = read_info(model)
        options = session_options(library, threads=threads, optimize=optimize)
        try:
            self._session = self._create(ort, model, options)
        except VimDeployError:
            raise
        except Exception as error:  # onnxruntime raises its own classes, and RuntimeError
            if "NOT_IMPLEMENTED" in str(error) and self.info.precision == "bf16":
                raise RuntimeMissing(
                    f"{model} is bf16, for which ONNX Runtime has no kernels on {self._device}",
                    hint="export with --precision fp32 or fp16 to run here; `vimdeploy verify parity` still checks it",
                ) from error
            raise _of_load_error(model, library, error) from error
        self.inputs = {node.name: _spec(node, model) for node in self._session.get_inputs()}
        self.outputs = {node.name: _spec(node, model) for node in self._session.get_outputs()}
        if len(self.inputs) != 1:
            raise ModelFileError(
                f"{model} has {len(self.inputs)} inputs ({', '.join(self.inputs)}); a Vim has one, the images",
                hint="export it again with `vimdeploy export CKPT`",
            )
        self._options = ort.RunOptions()
        self._options.log_severity_level = FATAL_ONLY
        how = "vim op library" if library is not None else f"function body ({self.info.fallback}), no op library"
        self._description = f"onnxruntime {ort.__version__} {self._device}, {how}"

    _device = "CPU"

    def _create(self, ort: Any, model: Path, options: Any) -> Any:
        """The runtime's own session; what goes wrong is the runtime's own exception, or one of ours."""
        # Its plan of a run's memory comes after the first run, as one block beside what that took and keeps: Vim-Ti at
        # 1248 px then holds 236 MiB instead of 152, and is no faster. Every other batch size is another block.
        options.enable_mem_pattern = False
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        (name,) = self.inputs
        try:
            values = self._session.run(None, {name: batch}, self._options)
        except Exception as error:
            raise _of_run_error(batch.shape[0], error) from error
        return dict(zip(self.outputs, values, strict=True))

    def describe(self) -> str:
        return self._description

    def close(self) -> None:
        super().close()
        self._session = None


def session_options(library: Path | None, *, threads: int | None = None, optimize: bool = True) -> Any:
    """What every session here is opened with. Raises RuntimeMissing when the op library cannot be loaded."""
    ort = _import()
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = threads or 0
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if int8_overflows():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if library is not None:
        _register(ort, options, library)
    return options


def int8_overflows(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor's quickest int8 products are wrong: x86-64 without VNNI, where it can be told.

    Those add pairs of products in 16 bits, which overflow. ONNX Runtime has a way that does not; it takes 2.4 times as
    long as the quick one with VNNI (197 x 384 x 1536), so it is asked for only where it must be.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return True
    return not re.search(r"^flags\s*:.*\b(avx512_vnni|avx_vnni)\b", flags, re.MULTILINE)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(
            f"ONNX Runtime is not installed ({error})", hint="pip install 'vimdeploy[onnxruntime]'"
        ) from error
    return onnxruntime


def _register(ort: Any, options: Any, library: Path) -> None:
    if not library.is_file():
        raise RuntimeMissing(f"the op library {library} is not a file", hint="name the built library")
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise RuntimeMissing(
            f"ONNX Runtime {ort.__version__} could not load the op library {library}: {_first_line(error)}",
            hint="rebuild it for this host, or run the function body instead (--no-library)",
        ) from error


_LINEAR_ATTENTION = ("com.microsoft", "LinearAttention")


def _of_load_error(model: Path, library: Path | None, error: Exception) -> ModelFileError | RuntimeMissing:
    text = str(error)
    unknown = re.search(r"([\w.]*):(\w+)\(-?\d+\) is not a registered function/op", text)
    # Behind a fused op's body an old one does not name what it lacks: its type inference fails first.
    behind_a_body = "InferenceError" in text and _LINEAR_ATTENTION[-1].encode() in model.read_bytes()
    if (unknown and unknown[2] == _LINEAR_ATTENTION[-1]) or behind_a_body:
        return RuntimeMissing(
            f"this ONNX Runtime does not know {'.'.join(_LINEAR_ATTENTION)}, which the function body of {model} needs",
            hint="pip install 'onnxruntime>=1.30', or export with --fallback scan",
        )
    if unknown and unknown[1] == "vim":
        if library is None:
            return NoFunctionBody(
                f"{model} carries no function body for its vim:: operators, and no op library is loaded",
                hint="run it with the op library, or export it with --fallback scan",
            )
        return RuntimeMissing(
            f"the op library {library} lacks an operator of {model}: {_first_line(error)}",
            hint="use the library of the vimdeploy version that made the file, or export again",
        )
    return ModelFileError(
        f"ONNX Runtime cannot load {model}: {_first_line(error)}", hint="export it again with `vimdeploy export CKPT`"
    )


def _of_run_error(batch: int, error: Exception) -> ModelFileError:
    return ModelFileError(
        f"ONNX Runtime could not run the model on a batch of {batch}: {_first_line(error)}",
        hint="try a smaller batch, or check the file with `vimdeploy verify parity`",
    )


def _spec(node: Any, model: Path) -> TensorSpec:
    if node.type not in TYPES:
        raise ModelFileError(
            f"{model}: {node.name} is a {node.type}, which cannot be exchanged with numpy",
            hint="export it with fp32 inputs and outputs",
        )
    return TensorSpec(tuple(side if isinstance(side, int) else None for side in node.shape), TYPES[node.type])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
