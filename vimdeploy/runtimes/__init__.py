"""Runtimes behind one small `Session`: open a model file, run batches, close."""

from __future__ import annotations

import os
from pathlib import Path

from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.runtimes.base import Session

RUNTIMES = ("onnxruntime", "tensorrt")


def open_session(
    model: Path,
    *,
    runtime: str | None = None,
    library: str | Path = "auto",
    threads: int | None = None,
    plugin: Path | None = None,
) -> Session:
    """A session on a model file, checked against its manifest when it has one.

    A file ending in .plan opens in TensorRT, any other in ONNX Runtime; ``runtime`` may say which is expected.

    ``library``: "auto" takes vimdeploy's op library where it is installed and otherwise runs the function body, which
    ``session.notice`` then says; "off" runs the function body; a path takes that library or fails. An installed
    library that does not load is an error, and so is VIMDEPLOY_ORT_LIBRARY naming no file: nothing falls back from a
    library that was meant to be used. ``plugin``: for a plan, the plugin library; None takes the one its sidecar names.
    Raises UsageError, ModelFileError, RuntimeMissing, EngineError.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"no runtime is called {runtime!r}", hint="runtimes: " + ", ".join(RUNTIMES))
    opens = "tensorrt" if model.suffix == ".plan" else "onnxruntime"
    if runtime is not None and runtime != opens:
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
        return TensorRTSession(model, plugin=plugin)
    if plugin is not None:
        raise UsageError(f"{model.name} takes no TensorRT plugin", hint="name a .plan file")
    return _open_onnx(model, library, threads)


def _open_onnx(model: Path, library: str | Path, threads: int | None) -> Session:
    from vimdeploy.bundle import check_hash
    from vimdeploy.runtimes.library import ENVIRONMENT, ort_library_path
    from vimdeploy.runtimes.onnxruntime import NoFunctionBody, OrtSession

    if model.is_file():
        check_hash(model)
    if library == "off":
        return OrtSession(model, library=None, threads=threads)
    if library != "auto":
        return OrtSession(model, library=Path(library), threads=threads)
    try:
        path = ort_library_path()
    except RuntimeMissing as missing:
        if os.environ.get(ENVIRONMENT):  # the user named one: that it is not there is no reason to do without
            raise
        try:
            session = OrtSession(model, library=None, threads=threads)
        except NoFunctionBody as error:
            raise RuntimeMissing(f"{error.message}. {missing.message}", hint=missing.hint) from error
        session.notice = f"Running the function body, which is slower: {missing.message}"
        if missing.hint:
            session.notice += f" (to mend it: {missing.hint})"
        return session
    return OrtSession(model, library=path, threads=threads)
