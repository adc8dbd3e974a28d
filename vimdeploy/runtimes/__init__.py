"""Runtimes behind one small `Session`: open a model file, run batches, close."""

from __future__ import annotations

import os
from pathlib import Path

from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.runtimes.base import Session

RUNTIMES = ("onnxruntime",)


def open_session(
    model: Path,
    *,
    runtime: str = "onnxruntime",
    library: str | Path = "auto",
    threads: int | None = None,
) -> Session:
    """A session on a model file, checked against its manifest when it has one.

    ``library``: "auto" takes vimdeploy's op library where it is installed and otherwise runs the function body, which
    ``session.notice`` then says; "off" runs the function body; a path takes that library or fails. An installed
    library that does not load is an error, and so is VIMDEPLOY_ORT_LIBRARY naming no file: nothing falls back from a
    library that was meant to be used. Raises UsageError, ModelFileError,
    RuntimeMissing.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"no runtime is called {runtime!r}", hint="runtimes: " + ", ".join(RUNTIMES))
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
