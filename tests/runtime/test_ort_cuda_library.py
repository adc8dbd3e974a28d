"""libvimdeploy_ort_cuda.so where there is no CUDA: it loads, shows what it should, and has the CPU library's ops.

tests/gpu/ort_cuda.py runs its CUDA ops on a card.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_build import ROOT, cuda_build
from ort_library import ort_library

from vimdeploy.runtimes.library import ORT_CUDA_LIBRARY, installed

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def library() -> Path:
    """The package's own, else what is built here."""
    found = installed(ORT_CUDA_LIBRARY) or cuda_build() / ORT_CUDA_LIBRARY
    if not found.exists():
        pytest.skip("no ONNX Runtime headers: set ONNXRUNTIME_ROOT")
    return found


def test_shows_the_entry_point_and_the_kernels_of_both_devices(library: Path) -> None:
    text = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert {name for name in names if not name.startswith("vim_")} == {"RegisterCustomOps"}
    for op in ("selective_scan", "bi_selective_scan", "bi_causal_conv1d", "add_rms_norm"):
        assert {f"vim_{op}_cpu", f"vim_{op}_cuda", f"vim_{op}_supports"} <= names


def test_needs_neither_cuda_nor_onnxruntime(library: Path) -> None:
    text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in text.splitlines() if "NEEDED" in line}
    known = ("libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux", "libdl", "libpthread", "librt")
    assert all(name.startswith(known) for name in needed), needed
    text = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in text.splitlines()}
    assert undefined and not {name for name in undefined if re.match(r"cuda|cu[A-Z]|Ort|_ZNK?3Ort", name)}


def test_its_cpu_ops_pass_the_cpu_librarys_tests(library: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", "definition"]
    command += [str(Path(__file__).with_name("test_ort_op.py"))]
    environment = os.environ | {"VIMDEPLOY_ORT_LIBRARY": str(library), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed", done.stdout)


def test_a_session_takes_one_library_of_the_domain(library: Path) -> None:
    """Why the CUDA library has the CPU's ops as well. Should ONNX Runtime take two one day, this says so."""
    from ort_ops import op_model

    from vimdeploy.export import schema

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(ort_library()))
    options.register_custom_ops_library(str(library))
    model = op_model(schema.ADD_NORM, schema.ADD_NORM.inputs)
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
