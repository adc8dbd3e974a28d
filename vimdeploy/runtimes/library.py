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
# Written by a build that could not make the library; says what it lacked.
MISSING = "MISSING.txt"


def ort_library_path() -> Path:
    """The op library: what VIMDEPLOY_ORT_LIBRARY names, else the one installed with the package.

    Raises RuntimeMissing, with the reason the build left behind, when there is none; a variable that names no file is
    an error too, not passed over.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        path = Path(named)
        if not path.is_file():
            raise RuntimeMissing(
                f"{ENVIRONMENT} names {path}, which is not a file", hint=f"correct {ENVIRONMENT} or unset it"
            )
        return path.resolve()
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
