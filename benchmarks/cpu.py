"""Times vimdeploy on a CPU: the ops, alone and in whole networks.

  python benchmarks/cpu.py --output benchmarks/results/cpu-NAME.json
  python benchmarks/cpu.py --parts network --models Ti --sizes 224 --batches 1 --threads 1
  VIMDEPLOY_ORT_LIBRARY=build/.../libvimdeploy_ort.so python benchmarks/cpu.py --quick

Three parts, fp32, each with contenders that run in one process and take turns, many rounds, so that a busy minute is
everyone's. Threads that an idle session keeps spinning would disturb the next, so there is a pause before each burst.
A figure is the median over all calls of all rounds; `min` is the fastest call.

scan     One direction of a Vim-Ti layer with z gate, D, bias and softplus (384 channels, 16 states, batch 1), as a
         model of one node: the op against the function bodies vimdeploy exports.
ops      The fused ops at the sizes of a Vim-Ti layer, each as a model of one node, against its function body, which is
         what `--fusion none` runs: the scans inside are the op either way.
network  Vim with random weights, fused and not, against timm's DeiT of the same width in the same ONNX Runtime, with
         attention as one operator and written out; at one size also against the same Vim in eager PyTorch as published
         and against the file without the library (`--slow-sizes`). Peak memory is that of a fresh process each. This is
         `vimdeploy bench`; see its rows for what each figure means. timm: pip install 'vimdeploy[bench]'.

The exponential's throughput is that of kernels/cpu/math.h as compiled for the same instruction set, reading and writing
arrays in the first-level cache, one thread, in the same rounds: Exp2 for any argument ("exp") and Exp2InRange, without
its clamps ("exp in range"), which the scan calls where it can. "exp share" is the time that the exponentials of the
states alone would take at the first rate, over the time of the kernel; "in range" is that share at the second rate.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
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
import fused_c  # noqa: E402
import scan_c  # noqa: E402
from fused_cases import make_bi_conv, make_bi_scan, make_norm  # noqa: E402
from official import write_official  # noqa: E402
from ort_library import ort_library  # noqa: E402
from scan_cases import make_inputs  # noqa: E402

from vimdeploy.bench.host import describe_host  # noqa: E402
from vimdeploy.bench.measure import Effort  # noqa: E402
from vimdeploy.bench.results import Results, Row  # noqa: E402
from vimdeploy.bench.run import Options, Progress, find_contenders, measure_case  # noqa: E402
from vimdeploy.export import functions, fused_bodies, schema  # noqa: E402
from vimdeploy.export.exporter import ExportOptions, export_checkpoint  # noqa: E402
from vimdeploy.models.variants import VimConfig  # noqa: E402

CHANNELS, STATES, RANK, TAPS, OPSET = 384, 16, 12, 4, 18
WIDTHS = {"Ti": 192, "S": 384}
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
    weights = {name: inputs[name] for name in schema.SCAN.fp32}
    op = schema.SCAN
    node = onnx.helper.make_node(op.name, op.inputs, op.outputs, "scan0", domain=schema.DOMAIN, **op.node_attributes())
    batch, _, channels = inputs["u"].shape
    shapes = {name: [batch, "length", *inputs[name].shape[2:]] for name in schema.SCAN.inputs if name not in weights}
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
    for name in schema.SCAN.inputs:
        if name not in schema.SCAN.fp32:
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


def fused_inputs(op: schema.Op, length: int) -> dict[str, np.ndarray]:
    """A node's inputs as a Vim-Ti layer has them: B and C behind dt in rows of x_proj, x and z in rows of in_proj."""
    if op is schema.BI_CONV:
        case = make_bi_conv(1, length, CHANNELS, TAPS, width=2 * CHANNELS)
        pairs = {f"{name}_{side}": case[name][i] for name in ("weight", "bias") for i, side in enumerate("fb")}
        return {"x": np.ascontiguousarray(case["x"].base), **pairs}
    if op is schema.ADD_NORM:
        return make_norm(1, length, CHANNELS // 2)
    case = make_bi_scan(1, length, CHANNELS, STATES, optional=("D", "z", "delta_bias"))
    low = np.zeros((1, length, RANK), np.float32)
    pairs = {name: case[name] for name in ("u", "delta", "A", "D", "delta_bias")}
    pairs["x"] = tuple(np.concatenate([low, case["B"][i][:, :, 0], case["C"][i][:, :, 0]], -1) for i in range(2))
    inputs = {f"{name}_{side}": pair[i] for name, pair in pairs.items() for i, side in enumerate("fb")}
    return {**inputs, "z": np.concatenate([np.zeros_like(case["z"]), case["z"]], -1)}


def fused_model(op: schema.Op, inputs: dict[str, np.ndarray], fused: bool) -> bytes:
    """One node; not fused, it is of a domain that only its function body knows."""
    domain = schema.DOMAIN if fused else "unfused"
    names = [name if name in inputs else "" for name in op.inputs]
    while not names[-1]:
        names.pop()
    node = onnx.helper.make_node(op.name, names, op.outputs, "node0", domain=domain, **op.node_attributes())
    weights = [name for name in inputs if name in op.fp32 and name != "r"]
    graph = onnx.helper.make_graph(
        [node],
        op.name,
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, inputs[name].shape)
         for name in inputs if name not in weights],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in op.outputs],
        [onnx.numpy_helper.from_array(inputs[name], name) for name in weights],
    )  # fmt: skip
    signature: functions.Signature
    if op is schema.BI_SCAN:
        signature = fused_bodies.BiScanSignature(ir.DataType.FLOAT, CHANNELS, STATES, False)
    elif op is schema.BI_CONV:
        signature = fused_bodies.BiConvSignature(ir.DataType.FLOAT, CHANNELS, TAPS)
    else:
        signature = fused_bodies.AddNormSignature(ir.DataType.FLOAT)
    body = ir.serde.serialize_function(functions.function_body("scan", signature, OPSET))
    body.domain = domain
    opsets = [onnx.helper.make_opsetid(name, version) for name, version in
              (("", OPSET), (schema.DOMAIN, schema.VERSION), ("unfused", 1))]  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[body]).SerializeToString()


def fused_call(op: schema.Op, inputs: dict[str, np.ndarray], threads: int, fused: bool) -> Call:
    one = session(fused_model(op, inputs, fused), threads, library=True)
    binding = one.io_binding()
    for given in one.get_inputs():
        binding.bind_ortvalue_input(given.name, ort.OrtValue.ortvalue_from_numpy(inputs[given.name]))
    for made in one.get_outputs():
        binding.bind_output(made.name)
    return lambda: one.run_with_iobinding(binding)


def fused_kernel_call(op: schema.Op, length: int, isa: str) -> Call:
    if op is schema.BI_SCAN:
        arrays = make_bi_scan(1, length, CHANNELS, STATES, optional=("D", "z", "delta_bias"))
        arrays["y"] = np.empty_like(arrays["z"])
        desc = fused_c.describe_bi_scan(arrays)
        return fused_c.prepared("bi_selective_scan", desc, fused_c.BiScanArgs(), arrays, isa)
    if op is schema.BI_CONV:
        arrays = make_bi_conv(1, length, CHANNELS, TAPS, width=2 * CHANNELS)
        arrays["u"] = tuple(np.empty((1, length, CHANNELS), np.float32) for _ in range(2))
        return fused_c.prepared("bi_causal_conv1d", fused_c.describe_bi_conv(arrays), fused_c.BiConvArgs(), arrays, isa)
    arrays = make_norm(1, length, CHANNELS // 2)
    arrays |= {"n": np.empty_like(arrays["h"]), "r_out": np.empty_like(arrays["r"])}
    desc = fused_c.NormDesc(length, CHANNELS // 2, 0, 1e-5)
    return fused_c.prepared("add_rms_norm", desc, fused_c.NormArgs(), arrays, isa)


def fused_ops(length: int, rounds: int, isas: list[str]) -> dict[str, dict[str, float]]:
    calls: dict[str, Call] = {}
    for op in (schema.BI_SCAN, schema.BI_CONV, schema.ADD_NORM):
        inputs = fused_inputs(op, length)
        for threads in (1, 2):
            calls[f"{op.name}, {threads} thread"] = fused_call(op, inputs, threads, fused=True)
            calls[f"{op.name} unfused, {threads} thread"] = fused_call(op, inputs, threads, fused=False)
        for isa in isas:
            calls[f"{op.name} kernel, {isa}"] = fused_kernel_call(op, length, isa)
    return take_turns(calls, rounds)


def network(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Results of `vimdeploy bench` for each model, size and number of threads; contenders of a case take turns."""
    found = []
    for model in options.models:
        name = {"Ti": "vim_tiny", "S": "vim_small"}[model]
        checkpoint = write_official(
            folder / f"{name}.pth",
            VimConfig(d_model=WIDTHS[model]),
            f"{name}_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
            ema=False,
            optimizer=False,
        )
        for size in options.sizes:
            files = {}
            for fusion in ("full", "none"):
                target = folder / f"{name}-{fusion}-{size}.vim"
                export_checkpoint(checkpoint, target, ExportOptions(img_size=(size, size), fusion=fusion))
                files[fusion] = target / "model.onnx"
            slow = ("torch", "onnxruntime") if size in options.slow_sizes else ()
            for threads in options.threads:
                settings = Options(
                    batches=tuple(options.batches),
                    against=("deit", "deit-unfused", *slow),
                    runtimes=("onnxruntime",),
                    threads=threads,
                    effort=Effort(options.seconds, options.rounds),
                )
                alone = dataclasses.replace(settings, against=())
                group = [*find_contenders([files["full"]], settings), *find_contenders([files["none"]], alone)]
                rows: list[Row] = []
                for batch in options.batches:
                    rows += measure_case(group, batch, settings, Progress())
                    _print_case(rows[-len(group) :], threads)
                result = Results(describe_host(), settings.to_dict(), tuple(rows))
                found.append({"model": model, "threads": threads, **result.to_dict()})
    return found


def _print_case(rows: list[Row], threads: int) -> None:
    first = rows[0]
    print(f"\n{first.model}, {first.img_size[0]} px, batch {first.batch}, {threads} thread: ms, MiB, times as long as")
    for row in rows:
        if row.failed:
            print(f"  {row.contender:52} {row.failed[:60]}")
            continue
        ratio = first.ms / row.ms if first.ms and row.ms else float("nan")
        print(f"  {row.contender:52} {row.ms:9.2f} {row.peak_mib or float('nan'):8.0f}  {ratio:5.2f}", flush=True)


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


def print_scans(length: int, times: dict[str, dict[str, float]]) -> None:
    """Also adds what follows from the times to them."""
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
            t["us a token"] = t["median"] / length * 1e3
        if body and not what.startswith("exp"):
            line += f"  {body / t['median']:.1f}x the Scan body"
        print(line)
    if "op, 2 thread" in times:
        print(f"  2 threads: {times['op, 1 thread']['median'] / times['op, 2 thread']['median']:.2f}x")


def print_ops(length: int, times: dict[str, dict[str, float]]) -> None:
    print(f"\n{length} tokens: median (min) ms")
    for what, t in times.items():
        line = f"  {what:44} {t['median']:9.4f} ({t['min']:.4f})"
        unfused = times.get(what.replace(", ", " unfused, "))
        print(line + (f"  {unfused['median'] / t['median']:.1f}x its body" if unfused else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", nargs="+", choices=("scan", "ops", "network"), default=["scan", "ops", "network"])
    parser.add_argument("--rounds", type=int, default=15, help="of scan and ops; a third of it of the network")
    parser.add_argument("--lengths", type=int, nargs="+", default=[197, 730, 6085], help="tokens, of scan and ops")
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1248], help="pixels")
    parser.add_argument("--slow-sizes", type=int, nargs="*", default=[224], help="those of the slow baselines too")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="of a contender of the network in a case")
    parser.add_argument("--quick", action="store_true", help="the scan's kernels alone, few rounds")
    options = parser.parse_args()
    isas = [isa for isa in scan_c.ISAS if scan_c.has_isa(isa)]
    result: dict[str, object] = {**environment(), "isa": scan_c.library().vim_cpu_isa().decode()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "scan" in options.part or options.quick:
            per_length = {}
            for length in options.lengths:
                rounds = options.rounds if length <= 1024 else max(3, options.rounds // 3)
                inputs = make_inputs(1, length, CHANNELS, STATES)
                if options.quick:
                    calls = {f"kernel, {isa}": kernel_call(inputs, isa) for isa in isas}
                    for isa in isas:
                        calls |= exp_calls(isa, folder)
                    per_length[length] = take_turns(calls, 5)
                else:
                    per_length[length] = scans(length, rounds, isas, folder)
                print_scans(length, per_length[length])
            short, long = min(options.lengths), max(options.lengths)
            for isa in isas:
                times = [per_length[length][f"kernel, {isa}"]["us a token"] for length in (short, long)]
                print(f"kernel, {isa}: time a token at {long} over {short}: {times[1] / times[0]:.2f}")
            result["milliseconds"] = {str(length): times for length, times in per_length.items()}
        if "ops" in options.part and not options.quick:
            ops: dict[str, dict[str, dict[str, float]]] = {}
            result["ops"] = ops
            for length in options.lengths:
                ops[str(length)] = fused_ops(length, max(3, options.rounds // (1 if length <= 1024 else 3)), isas)
                print_ops(length, ops[str(length)])
        if "network" in options.part and not options.quick:
            options.rounds = max(3, options.rounds // 3)
            result["network"] = network(options, folder)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
