"""Runtimes behind one small `Session`: open a model file, run batches, close."""

from __future__ import annotations

import os
from pathlib import Path

from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.runtimes.base import Session

RUNTIMES = ("onnxruntime", "onnxruntime-cuda", "tensorrt", "torch", "torch-cuda")


def best_runtime(model: Path, library: str | Path = "auto") -> str:
    """What `vimdeploy.load` takes for a file when no runtime is named.

    TensorRT for a plan. For an ONNX file ONNX Runtime's CUDA provider where that, a card and vimdeploy's CUDA op are
    all there, which is looked up without opening anything; else ONNX Runtime on the CPU.
    """
    if model.suffix == ".plan":
        return "tensorrt"
    return "onnxruntime-cuda" if library == "auto" and _has_ort_cuda() else "onnxruntime"


def _has_ort_cuda() -> bool:
    from vimdeploy.runtimes import cuda
    from vimdeploy.runtimes.library import ORT_CUDA_ENVIRONMENT, ort_cuda_library_path

    try:
        ort_cuda_library_path()
        cuda.device(0)
    except RuntimeMissing:
        return bool(os.environ.get(ORT_CUDA_ENVIRONMENT))  # what was named is meant, and is missed when it is opened
    try:
        import onnxruntime
    except ImportError:  # open_session says so, with the way to mend it
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def open_session(
    model: Path,
    *,
    runtime: str | None = None,
    library: str | Path = "auto",
    threads: int | None = None,
    plugin: Path | None = None,
    cuda_graph: bool = False,
) -> Session:
    """A session on a model file, checked against its manifest when it has one.

    A file ending in .plan opens in TensorRT, any other in ONNX Runtime on the CPU, unless ``runtime`` says
    "onnxruntime-cuda", or "torch" (the fp32 reference network, on the card where there is one) or "torch-cuda" (the
    network on vimdeploy's CUDA kernels in the file's precision), which read the checkpoint that the file was exported
    from.

    ``library``: "auto" takes vimdeploy's op library where it is installed and otherwise runs the function body, which
    ``session.notice`` then says; "off" runs the function body; a path takes that library or fails. An installed
    library that does not load is an error, and so is VIMDEPLOY_ORT_LIBRARY naming no file: nothing falls back from a
    library that was meant to be used. For torch-cuda a path names libvimdeploy_cuda.so. ``plugin``: for a plan, the
    plugin library; None takes the one its sidecar names. ``threads``: for operators on the CPU. ``cuda_graph``: of a
    plan or onnxruntime-cuda, record each batch size and replay it (torch-cuda always does).
    Raises UsageError, ModelFileError, RuntimeMissing, EngineError.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"no runtime is called {runtime!r}", hint="runtimes: " + ", ".join(RUNTIMES))
    opens = "tensorrt" if model.suffix == ".plan" else "onnxruntime"
    if runtime is not None and (runtime == "tensorrt") != (opens == "tensorrt"):
        raise UsageError(
            f"{model.name} opens in {opens}, not in {runtime}",
            hint="name a .plan file, made by `vimdeploy build-engine`"
            if runtime == "tensorrt"
            else "name an .onnx file",
        )
    if opens == "tensorrt":
        from vimdeploy.runtimes.tensorrt import TensorRTSession

        if library == "off":
            raise UsageError("a plan has its plugin built in", hint="run the .onnx file to use the function body")
        return TensorRTSession(model, plugin=plugin, cuda_graph=cuda_graph)
    if plugin is not None:
        raise UsageError(f"{model.name} takes no TensorRT plugin", hint="name a .plan file")
    if runtime in ("torch", "torch-cuda"):
        return _open_torch(model, runtime, library, threads)
    return _open_onnx(model, library, threads, on_card=runtime == "onnxruntime-cuda", cuda_graph=cuda_graph)


def _open_onnx(model: Path, library: str | Path, threads: int | None, *, on_card: bool, cuda_graph: bool) -> Session:
    from vimdeploy.bundle import check_hash
    from vimdeploy.runtimes import library as libraries
    from vimdeploy.runtimes.onnxruntime import NoFunctionBody, OrtSession

    find, variable = libraries.ort_library_path, libraries.ENVIRONMENT
    if on_card:
        find, variable = libraries.ort_cuda_library_path, libraries.ORT_CUDA_ENVIRONMENT

    def opened(path: Path | None) -> Session:
        if not on_card:
            return OrtSession(model, library=path, threads=threads)
        from vimdeploy.runtimes.onnxruntime_cuda import OrtCudaSession

        # A function body has ONNX Scan nodes, whose control flow cannot be recorded.
        return OrtCudaSession(model, library=path, threads=threads, cuda_graph=cuda_graph and path is not None)

    if model.is_file():
        check_hash(model)
    if library == "off":
        return opened(None)
    if library != "auto":
        return opened(Path(library))
    try:
        path = find()
    except RuntimeMissing as missing:
        if os.environ.get(variable):  # the user named one: that it is not there is no reason to do without
            raise
        try:
            session = opened(None)
        except NoFunctionBody as error:
            raise RuntimeMissing(f"{error.message}. {missing.message}", hint=missing.hint) from error
        session.notice = f"Running the function body, which is slower: {missing.message}"
        if missing.hint:
            session.notice += f" (to mend it: {missing.hint})"
        return session
    return opened(path)


def _open_torch(model: Path, runtime: str, library: str | Path, threads: int | None) -> Session:
    """The network of the checkpoint that `model` came from, in PyTorch."""
    from vimdeploy.bundle import check_hash, checkpoint_of, read_info

    if library == "off":
        raise UsageError(f"{runtime} runs no function body", hint="--runtime onnxruntime does")
    info = read_info(model)
    check_hash(model)
    if info.kind == "int8":
        raise UsageError(f"{model} is quantized, and {runtime} runs the network of its checkpoint",
                         hint="run the file in ONNX Runtime or TensorRT")  # fmt: skip
    import torch

    from vimdeploy.models.loading import load_exported
    from vimdeploy.runtimes.torch import TorchSession

    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    network = load_exported(info, model, checkpoint_of(model))
    if runtime == "torch":
        return TorchSession(network, info, "cuda" if torch.cuda.is_available() else "cpu")
    from vimdeploy.runtimes.torch_cuda import TorchCudaSession, cuda_kernels

    return TorchCudaSession(network, info, cuda_kernels(None if library == "auto" else Path(library)))
