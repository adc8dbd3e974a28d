"""The CPU kernels and their ONNX Runtime adapter under sanitizers, and the kernels on 64-bit ARM (NEON) in an emulator.

tests/cpp/kernels is built for each and runs cases made here: inputs, and what must come out, in float64 by numpy.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scan_c
from fused_c import (
    Arrays,
    BiConvArgs,
    BiScanArgs,
    NormArgs,
    NormDesc,
    describe_bi_conv,
    describe_bi_scan,
)
from fused_cases import bi_conv_bounds, bi_scan_bounds, make_bi_conv, make_bi_scan, make_norm, norm_bounds
from ort_library import ROOT, onnxruntime_headers
from scan_cases import DTYPES, make_inputs, scan_bounds

SCAN, BI_SCAN, BI_CONV, NORM = range(4)
NULL, INPUT, OUTPUT = range(3)

Bounds = tuple[np.ndarray, np.ndarray]  # what must come out, and how far it may be off


def case(op: int, desc, args, inputs: Arrays, outputs: dict[str, list[Bounds]], dtypes: dict[str, np.dtype]) -> bytes:
    """As kernels_check.cc reads it. `args` is the op's argument struct: each field a pointer, or a pair of them."""
    parts = []
    for name, kind in args._fields_:
        for i in range(getattr(kind, "_length_", 1)):
            if name in outputs:
                want, allowed = outputs[name][i]
                parts.append(
                    struct.pack("3q", OUTPUT, scan_c.IO[dtypes[name]], want.size) + want.tobytes() + allowed.tobytes()
                )
            elif name in inputs:
                value = inputs[name] if isinstance(inputs[name], np.ndarray) else inputs[name][i]
                data = np.ascontiguousarray(value).tobytes()
                parts.append(struct.pack("2q", INPUT, len(data)) + data + b"\0" * (-len(data) % 8))
            else:
                parts.append(struct.pack("q", NULL))
    raw = bytes(desc)
    head = struct.pack("2q", op, len(raw)) + raw + b"\0" * (-len(raw) % 8)
    return head + struct.pack("q", len(parts)) + b"".join(parts)


def scan_case(*shape: int, dtype: str = "fp32", optional=("D", "z", "delta_bias"), reverse: bool = False) -> bytes:
    inputs = make_inputs(*shape, dtype=dtype, optional=optional)
    y = np.empty_like(inputs["u"])
    desc = scan_c.describe({**inputs, "y": y}, reverse=reverse)
    return case(SCAN, desc, scan_c.Args, inputs, {"y": [scan_bounds(inputs, dtype, reverse=reverse)]}, {"y": y.dtype})


def bi_scan_case(*shape: int, dtype: str = "fp32", optional=("D", "z", "delta_bias", "y_scale")) -> bytes:
    inputs = make_bi_scan(*shape, dtype=dtype, optional=optional)
    y = np.empty_like(inputs["u"][0])
    desc = describe_bi_scan({**inputs, "y": y})
    return case(BI_SCAN, desc, BiScanArgs, inputs, {"y": [bi_scan_bounds(inputs, dtype)]}, {"y": y.dtype})


def bi_conv_case(*shape: int, dtype: str = "fp32") -> bytes:
    inputs = make_bi_conv(*shape, dtype=dtype)
    outputs = {"u": bi_conv_bounds(inputs, dtype)}
    return case(BI_CONV, describe_bi_conv(inputs), BiConvArgs, inputs, outputs, {"u": inputs["x"].dtype})


def norm_case(*shape: int, dtype: str = "fp32") -> bytes:
    inputs = make_norm(*shape, dtype=dtype)
    n, r_out = norm_bounds(inputs, dtype)
    desc = NormDesc(inputs["h"].size // shape[-1], shape[-1], scan_c.IO[DTYPES[dtype]], 1e-5)
    dtypes = {"n": inputs["h"].dtype, "r_out": np.dtype(np.float32)}
    return case(NORM, desc, NormArgs, inputs, {"n": [n], "r_out": [r_out]}, dtypes)


def reduced_set() -> Iterator[bytes]:
    """Every op and type; tiles that are not full, chunks that are not, one token, no token."""
    for dtype in DTYPES:
        for shape in [(1, 1, 1, 1), (2, 33, 21, 16), (1, 7, 16, 5, 2), (1, 0, 3, 4)]:
            yield scan_case(*shape, dtype=dtype)
            yield scan_case(*shape, dtype=dtype, reverse=True)
            yield bi_scan_case(*shape, dtype=dtype)
        for shape in [(1, 1, 1), (2, 19, 21), (1, 40, 16, 3), (1, 5, 9, 16), (1, 0, 3)]:
            yield bi_conv_case(*shape, dtype=dtype)
        for shape in [(1, 1), (3, 21), (2, 5, 192), (0, 3)]:
            yield norm_case(*shape, dtype=dtype)
    yield scan_case(1, 40, 19, 65, optional=())
    yield bi_scan_case(1, 40, 19, 17, optional=())


def threaded_set() -> Iterator[bytes]:
    """Large enough that the tasks are shared out."""
    yield scan_case(2, 40, 100, 16)
    yield bi_scan_case(2, 40, 100, 16, dtype="fp16")
    yield bi_conv_case(2, 60, 100)
    yield norm_case(400, 192, dtype="bf16")


def build(folder: Path, flags: str, *options: str, **settings: str) -> Path:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    definitions = [f"-D{name}={value}" for name, value in {"CMAKE_CXX_FLAGS": flags, **settings}.items()]
    shell("cmake", "-S", ROOT / "tests" / "cpp" / "kernels", "-B", folder, "-G", "Ninja", *options, *definitions)
    shell("cmake", "--build", folder)
    return folder / "kernels_check"


def shell(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    environment = os.environ | environment
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def write(cases: Iterator[bytes], folder: Path) -> Path:
    file = folder / "cases"
    file.write_bytes(b"".join(cases))
    return file


def assert_checked(report: str, isas: list[str]) -> None:
    assert [line.split()[1] for line in report.splitlines() if line.startswith("isa ")] == isas
    assert report.rstrip().endswith(", 0 failures")


# Undefined behaviour but for null pointers and pointers past their object, whose checks take five times as long to
# compile and which the address sanitizer sees when such a pointer is used.
UNDEFINED = "signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow,bounds,alignment,bool,enum,return"


# -O1: what a sanitizer looks at is there, and compiling takes half the time.
def test_no_memory_error_nor_undefined_behaviour(tmp_path):
    """In the kernels alone, then in ONNX Runtime, where the adapter runs too."""
    flags = f"-O1 -g -fsanitize=address,{UNDEFINED} -fno-sanitize-recover=all"
    program = build(tmp_path, flags, *onnxruntime_headers(), CMAKE_BUILD_TYPE="None", VIMDEPLOY_SANITIZE="address",
                    VIMDEPLOY_CHECK_ADAPTER="ON", VIMDEPLOY_FETCH_HEADERS="OFF")  # fmt: skip
    assert_checked(shell(program, write(reduced_set(), tmp_path)), scan_c.isas_at_hand())

    library = tmp_path / "onnxruntime" / "libvimdeploy_ort.so"
    if not library.is_file():
        pytest.skip(
            "the kernels pass; the adapter needs headers of ONNX Runtime (ONNXRUNTIME_ROOT, libonnxruntime-dev)"
        )
    pytest.importorskip("onnxruntime")
    # Python is not built for the sanitizer, so its library comes first by force; and the C++ one with it, whose
    # exceptions it intercepts.
    compiler = os.environ.get("CXX", "c++")
    preload = [shell(compiler, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    files = [ROOT / "tests" / "runtime" / name for name in ("test_ort_op.py", "test_ort_fused.py")]
    report = shell(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files,
        "-k", "not oldest and not memory_behind",  # memory that was freed is kept by the sanitizer for a while
        LD_PRELOAD=" ".join(preload), ASAN_OPTIONS="detect_leaks=0", VIMDEPLOY_ORT_LIBRARY=str(library),
        PYTEST_ADDOPTS="", PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    )  # fmt: skip
    assert " passed" in report


def test_no_data_race_between_tasks_nor_between_callers(tmp_path):
    program = build(tmp_path, "-O1 -g -fsanitize=thread", CMAKE_BUILD_TYPE="None")
    # Without address randomisation, which older versions of the sanitizer do not take as newer kernels do it.
    still = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    report = shell(*still, program, write(threaded_set(), tmp_path), 3, TSAN_OPTIONS="halt_on_error=1")
    assert_checked(report, scan_c.isas_at_hand())


@pytest.fixture(scope="module")
def arm() -> tuple[str, str]:
    """A compiler for 64-bit ARM, and what runs its programs here."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64 (apt-get install g++-aarch64-linux-gnu qemu-user)")
    return compiler, emulator


def test_neon_kernels_compute_what_the_definition_says(arm, tmp_path):
    compiler, emulator = arm
    program = build(
        tmp_path,
        "-O2",
        CMAKE_BUILD_TYPE="None",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=compiler,
        CMAKE_EXE_LINKER_FLAGS="-static",
    )
    assert_checked(shell(emulator, program, write(reduced_set(), tmp_path)), ["neon"])
    assert_checked(shell(emulator, program, write(threaded_set(), tmp_path), 2), ["neon"])


def test_neon_elementary_functions_keep_to_the_error_they_state(arm, tmp_path):
    compiler, emulator = arm
    program = tmp_path / "check"
    flags = ["-std=c++17", "-O2", "-static", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    shell(compiler, *flags, f"-I{ROOT / 'kernels'}", ROOT / "tests" / "cpp" / "cpu_math_check.cc", "-o", program)
    assert "\n0 failures" in shell(emulator, program, 97 * 23)
