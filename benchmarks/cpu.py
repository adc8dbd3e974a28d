"""Times the selective scan on a CPU: the op in ONNX Runtime against the function bodies vimdeploy exports.

  python benchmarks/cpu.py --output benchmarks/results/cpu-NAME.json
  VIMDEPLOY_ORT_LIBRARY=build/.../libvimdeploy_ort.so python benchmarks/cpu.py --quick

One direction of a Vim-Ti layer with z gate, D, bias and softplus (384 channels, 16 states, batch 1, fp32), as a model
of one node, so both sides compute the same. All contenders run in one process and take turns: a burst of calls each,
many rounds. Threads that an idle session keeps spinning would disturb the next, so there is a pause before each burst.
A figure is the median over all calls of all rounds; `min` is the fastest call.

The exponential's throughput is that of kernels/cpu/math.h as compiled for the same instruction set, reading and writing
arrays in the first-level cache, one thread, in the same rounds: Exp2 for any argument ("exp") and Exp2InRange, without
its clamps ("exp in range"), which the scan calls where it can. "exp share" is the time that the exponentials of the
states alone would take at the first rate, over the time of the kernel; "in range" is that share at the second rate.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import scan_c  # noqa: E402
from ort_library import ort_library  # noqa: E402
from scan_cases import make_inputs  # noqa: E402

from vimdeploy.export import functions, schema  # noqa: E402

CHANNELS, STATES, OPSET = 384, 16, 18
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # kernels/CMakeLists.txt
MARCH = {"baseline": [], "x86-64-v3": ["-march=x86-64-v3"], "x86-64-v4": ["-march=x86-64-v4"]}
WIDTH = {"baseline": 4, "x86-64-v3": 8, "x86-64-v4": 16}
EXP_COUNT, EXP_REPEATS = 2048, 200
EXP_SOURCE = """
#include "cpu/math.h"
extern "C" void exp2_array(const float* from, float* to, int count, int repeats) {
  using F = vim::cpu::Vector<WIDTH>::Float;
  for (int r = 0; r < repeats; ++r) {
    for (int i = 0; i < count; i += WIDTH) {
      F x;
      __builtin_memcpy(&x, from + i, sizeof x);
      x = vim::cpu::FUNCTION(x);
      __builtin_memcpy(to + i, &x, sizeof x);
    }
    asm volatile("" ::: "memory");
  }
}
"""

Call = Callable[[], object]


def node_model(inputs: dict[str, np.ndarray], body: str | None) -> bytes:
    """One SelectiveScan, with the function body of that kind or none. Weights are initializers, as in an export."""
    weights = {name: inputs[name] for name in schema.FP32_INPUTS}
    attributes = {"delta_softplus": 1, "reverse": 0, **schema.PLUGIN_ATTRIBUTES}
    node = onnx.helper.make_node(schema.OP, list(schema.INPUTS), ["y"], "scan0", domain=schema.DOMAIN, **attributes)
    batch, _, channels = inputs["u"].shape
    shapes = {name: [batch, "length", *inputs[name].shape[2:]] for name in schema.INPUTS if name not in weights}
    graph = onnx.helper.make_graph(
        [node],
        "scan",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, "length", channels])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    made = []
    if body:
        signature = functions.ScanSignature(ir.DataType.FLOAT, channels, inputs["A"].shape[1], 1, (True, True, True))
        made = [ir.serde.serialize_function(functions.function_body(body, signature, OPSET))]
    if body == "linear-attention":
        opsets.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=made).SerializeToString()


def session(model: bytes | str, threads: int, library: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(ort_library()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def kernel_call(inputs: dict[str, np.ndarray], isa: str) -> Call:
    y = np.empty_like(inputs["u"])
    arrays = {**inputs, "y": y}
    desc = scan_c.describe(arrays)
    args = scan_c.Args(**{name: array.ctypes.data for name, array in arrays.items()})
    run = scan_c.library().vim_selective_scan_cpu_isa
    name, desc_pointer, args_pointer = isa.encode(), ctypes.byref(desc), ctypes.byref(args)

    def call(_keep: object = arrays) -> None:
        run(name, desc_pointer, args_pointer, None, None)

    return call


def session_call(inputs: dict[str, np.ndarray], threads: int, body: str | None) -> Call:
    """With inputs and output bound once, so that no copy of numpy's is timed."""
    one = session(node_model(inputs, body), threads, library=body is None)
    binding = one.io_binding()
    for name in schema.INPUTS:
        if name not in schema.FP32_INPUTS:
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(inputs[name]))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.empty_like(inputs["u"])))
    return lambda: one.run_with_iobinding(binding)


def exp_call(isa: str, folder: Path, function: str) -> Call:
    source, made = folder / f"{function}-{isa}.cc", folder / f"{function}-{isa}.so"
    source.write_text(EXP_SOURCE.replace("WIDTH", str(WIDTH[isa])).replace("FUNCTION", function))
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *FLAGS, *MARCH[isa], "-shared", "-fPIC", f"-I{ROOT / 'kernels'}", source, "-o", made]
    subprocess.run(command, check=True)
    run = ctypes.CDLL(str(made)).exp2_array
    x = -np.random.default_rng(0).uniform(0, 30, EXP_COUNT).astype(np.float32)
    y = np.empty_like(x)
    return lambda: run(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), EXP_COUNT, EXP_REPEATS)


def exp_calls(isa: str, folder: Path) -> dict[str, Call]:
    names = {"exp": "Exp2", "exp in range": "Exp2InRange"}
    return {f"{what}, {isa}": exp_call(isa, folder, function) for what, function in names.items()}


def take_turns(calls: dict[str, Call], rounds: int, burst_seconds: float = 0.03) -> dict[str, dict[str, float]]:
    """Milliseconds a call: median and minimum over all rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.06)
            call()
            call()
            started = time.perf_counter()
            while True:
                before = time.perf_counter()
                call()
                after = time.perf_counter()
                times[name].append((after - before) * 1e3)
                if after - started > burst_seconds:
                    break
    return {name: {"median": statistics.median(t), "min": min(t), "calls": len(t)} for name, t in times.items()}


def scans(length: int, rounds: int, isas: list[str], folder: Path) -> dict[str, dict[str, float]]:
    inputs = make_inputs(1, length, CHANNELS, STATES)
    calls: dict[str, Call] = {}
    for threads in (1, 2):
        calls[f"op, {threads} thread"] = session_call(inputs, threads, None)
        calls[f"Scan body, {threads} thread"] = session_call(inputs, threads, "scan")
        if length <= 1024:  # its (batch, length, channels x states) inputs are 600 MB at 6085 tokens
            try:
                calls[f"LinearAttention body, {threads} thread"] = session_call(inputs, threads, "linear-attention")
            except Exception as error:
                print(f"no LinearAttention body: {str(error)[:100]}")
    for isa in isas:
        calls[f"kernel, {isa}"] = kernel_call(inputs, isa)
        calls |= exp_calls(isa, folder)
    return take_turns(calls, rounds)


def network(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Vim-Ti at 224 px, batch 1, random weights."""
    from official import random_model

    from vimdeploy.export.exporter import ExportOptions, export_model
    from vimdeploy.models.variants import VimConfig

    path = folder / "vim.onnx"
    ir.save(export_model(random_model(VimConfig(d_model=192)), ExportOptions(static_batch=1)), path)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    calls: dict[str, Call] = {}
    for threads in (1, 2):
        for name, library in (("op", True), ("Scan body", False)):
            one = session(str(path), threads, library)
            feed = {one.get_inputs()[0].name: image}
            calls[f"{name}, {threads} thread"] = lambda one=one, feed=feed: one.run(None, feed)
    return take_turns(calls, rounds, 0.3)


def environment() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)[:1]).split())
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": model.group(1) if model else platform.processor(),
        "cpus": os.cpu_count(),
        "flags": sorted(f for f in flags if f.startswith(("avx", "fma", "bmi"))),
        "compiler": compiler.stdout.splitlines()[0],
        "versions": {"onnxruntime": ort.__version__, "onnx": onnx.__version__, "python": platform.python_version()},
        "shape": {"batch": 1, "channels": CHANNELS, "states": STATES, "io": "fp32"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[197, 730, 6085])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-network", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the kernels alone, few rounds")
    options = parser.parse_args()
    isas = [isa for isa in scan_c.ISAS if scan_c.has_isa(isa)]
    result: dict[str, object] = {**environment(), "isa": scan_c.library().vim_cpu_isa().decode(), "milliseconds": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        per_token = {}
        for length in options.lengths:
            rounds = options.rounds if length <= 1024 else max(3, options.rounds // 3)
            if options.quick:
                inputs = make_inputs(1, length, CHANNELS, STATES)
                calls = {f"kernel, {isa}": kernel_call(inputs, isa) for isa in isas}
                for isa in isas:
                    calls |= exp_calls(isa, folder)
                times = take_turns(calls, 5)
            else:
                times = scans(length, rounds, isas, folder)
            result["milliseconds"][str(length)] = times
            print(f"\n{length} tokens: median (min) ms; exp in Gexp/s")
            body = times.get("Scan body, 1 thread", {}).get("median")
            for what, t in times.items():
                line = f"  {what:34} {t['median']:9.3f} ({t['min']:.3f})"
                if what.startswith("exp"):
                    t["Gexp/s"] = EXP_COUNT * EXP_REPEATS / t["median"] / 1e6
                    line = f"  {what:34} {t['Gexp/s']:9.2f}"
                elif what.startswith("kernel, "):
                    for share, rate in (("exp share", "exp"), ("in range", "exp in range")):
                        one = times[f"{rate}, {what[8:]}"]["median"] / (EXP_COUNT * EXP_REPEATS)
                        t[share] = length * CHANNELS * STATES * one / t["median"]
                        line += f"  {share} {t[share]:.0%}"
                    per_token.setdefault(what, {})[length] = t["median"] / length
                    t["us a token"] = t["median"] / length * 1e3
                if body and not what.startswith("exp"):
                    line += f"  {body / t['median']:.1f}x the Scan body"
                print(line)
            if not options.quick:
                print(f"  2 threads: {times['op, 1 thread']['median'] / times['op, 2 thread']['median']:.2f}x")
        short, long = min(options.lengths), max(options.lengths)
        for what, times in per_token.items():
            print(f"{what}: time a token at {long} over {short}: {times[long] / times[short]:.2f}")
        if not options.quick and not options.no_network:
            result["network"] = network(max(3, options.rounds // 3), folder)
            print("\nVim-Ti, 224 px, batch 1: median (min) ms")
            for what, t in result["network"].items():
                print(f"  {what:34} {t['median']:9.2f} ({t['min']:.2f})")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
