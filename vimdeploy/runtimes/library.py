"""Where vimdeploy's own libraries lie, the op library for ONNX Runtime first of all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import vimdeploy
from vimdeploy.errors import RuntimeMissing

ENVIRONMENT = "VIMDEPLOY_ORT_LIBRARY"
LIBRARY = "libvimdeploy_ort.so"
#: The ops for ONNX Runtime's CUDA provider and for the CPU: a session takes one library of a domain.
ORT_CUDA_ENVIRONMENT = "VIMDEPLOY_ORT_CUDA_LIBRARY"
ORT_CUDA_LIBRARY = "libvimdeploy_ort_cuda.so"
# Written by a build that could not make the library; says what it lacked.
MISSING = "MISSING.txt"


def ort_library_path() -> Path:
    """The op library: what VIMDEPLOY_ORT_LIBRARY names, else the one installed with the package.

    Raises RuntimeMissing, with the reason the build left behind, when there is none; a variable that names no file is
    an error too, not passed over.
    """
    named = _named(ENVIRONMENT)
    if named is not None:
        return named
    reasons = []
    for folder in _folders():
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
        if (folder / MISSING).is_file():
            reasons.append((folder / MISSING).read_text(errors="replace").strip())
    raise RuntimeMissing(
        f"vimdeploy's op library for ONNX Runtime ({LIBRARY}) is not installed"
        + (f": {reasons[0]}" if reasons and reasons[0] else ""),
        hint="mend that and reinstall vimdeploy"
        if reasons
        else f"reinstall vimdeploy with a C++ compiler present, or let {ENVIRONMENT} name the file",
    )


def ort_cuda_library_path() -> Path:
    """The op library for ONNX Runtime's CUDA provider: what VIMDEPLOY_ORT_CUDA_LIBRARY names, else the installed one.

    Raises RuntimeMissing as `ort_library_path` does.
    """
    found = _named(ORT_CUDA_ENVIRONMENT) or installed(ORT_CUDA_LIBRARY)
    if found is None:
        raise RuntimeMissing(
            f"vimdeploy's op library for ONNX Runtime on CUDA ({ORT_CUDA_LIBRARY}) is not installed",
            hint="reinstall vimdeploy where nvcc is, with -C cmake.define.VIMDEPLOY_BUILD_CUDA=ON, or let "
            f"{ORT_CUDA_ENVIRONMENT} name the file",
        )
    return found


def _named(variable: str) -> Path | None:
    named = os.environ.get(variable)
    if not named:
        return None
    path = Path(named)
    if not path.is_file():
        raise RuntimeMissing(f"{variable} names {path}, which is not a file", hint=f"correct {variable} or unset it")
    return path.resolve()


def installed(file: str) -> Path | None:
    """A library that was installed with the package, by its file name; None when it is not there."""
    return next((folder / file for folder in _folders() if (folder / file).is_file()), None)


def _folders() -> Iterator[Path]:
    """The `_lib` folders of the package, each once."""
    seen = set()
    candidates = [Path(folder) for folder in vimdeploy.__path__]
    # An editable install leaves the sources where they are and puts what was compiled into site-packages.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        candidates.append(Path(str(importlib.metadata.distribution("vimdeploy").locate_file("vimdeploy"))))
    for candidate in candidates:
        folder = (candidate / "_lib").resolve()
        if folder not in seen:
            seen.add(folder)
            yield folder
