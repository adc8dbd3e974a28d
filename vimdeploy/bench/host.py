"""The machine a figure belongs to, and why figures of two machines are not set side by side."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vimdeploy
from vimdeploy.errors import RuntimeMissing
from vimdeploy.runtimes import cuda

#: packages whose version a figure depends on
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "torch", "timm", "triton", "numpy")


def describe_host() -> dict[str, Any]:
    """Plain values, for JSON: processor, card, system, versions, commit of a source tree, date.

    `card` is None without an NVIDIA card; `commit` is None when vimdeploy does not run from a repository.
    """
    return {
        "cpu": cpu(),
        "card": card(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"vimdeploy": vimdeploy.__version__, **_versions()},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def cpu() -> dict[str, Any]:
    """Name, cores this process may use, and the vector extensions kernels choose by."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)[:1]).split())
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "asimdhp", "sve")
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in wanted if flag in flags],
    }


def card(index: int = 0) -> dict[str, Any] | None:
    """Name, compute capability and the driver's CUDA version of the card; None where there is none."""
    try:
        found = cuda.device(index)
    except RuntimeMissing:
        return None
    return {"name": found.name, "sm": found.sm, "cuda": found.driver, "driver": _driver_version()}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why figures of two hosts (`describe_host`) cannot be compared, in words; None when they can."""
    for what, key in (("card", "card"), ("processor", "cpu")):
        names = [(host.get(key) or {}).get("name", "none") for host in (one, other)]
        if names[0] != names[1]:
            return f"the {what} is {names[0]} in one and {names[1]} in the other"
    cores = [(host.get("cpu") or {}).get("cores") for host in (one, other)]
    return f"one had {cores[0]} cores and the other {cores[1]}" if cores[0] != cores[1] else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver_version() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    if path.is_file():
        match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", path.read_text())
        return match[1] if match else None
    return None


def _commit() -> str | None:
    root = Path(vimdeploy.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # a repository without git installed
        return None
    return done.stdout.strip() or None
