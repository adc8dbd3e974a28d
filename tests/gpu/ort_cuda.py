"""Where onnxruntime-gpu is: vimdeploy's CUDA ops in it, op by op, in whole models, in CUDA graphs, and every bad input.

    python ort_cuda.py REFERENCES LIBRARY RESULTS.json [NAME:FUSION:PRECISION ...]

REFERENCES is the folder trt85_reference.py filled. Exits with 1 when a figure misses its bar; what was measured is in
RESULTS.json either way.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import golden  # noqa: E402
from trt85 import BARS, compare, misses, refusal  # noqa: E402

from vimdeploy.export import schema  # noqa: E402
from vimdeploy.runtimes import cuda  # noqa: E402
from vimdeploy.runtimes.onnxruntime_cuda import PROVIDER, OrtCudaSession  # noqa: E402

BATCHES = (1, 7, 64)
IO = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
PROTO = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
#: Relative RMS: the io type's rounding, twice for a pair's sum (issue 4, "Numerics").
TOLERANCE = {"fp32": 2e-6, "fp16": 5e-4, "bf16": 4e-3}
#: Microseconds a node in ONNX Runtime may take over the same kernel alone (issue 6, "Figures").
OVERHEAD_US = 5.0


def main(folder: Path, library: Path, out: Path, wanted: list[str]) -> int:
    card = cuda.device()
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN as pip installs them
        ort.preload_dlls()
    results: dict[str, Any] = {
        "card": card.name,
        "driver_cuda": card.driver,
        "onnxruntime": ort.__version__,
        "ops": {},
        "models": [],
        "refusals": {},
    }
    failed: list[str] = []

    def section(name: str, body: Callable[[], list[str]]) -> None:
        began = time.perf_counter()
        try:
            failures = body()
        except Exception as error:
            traceback.print_exc()
            failures = [f"{type(error).__name__}: {error}"]
        failed.extend(f"{name}: {failure}" for failure in failures)
        print(f"{name}: {'; '.join(failures) or 'held'} ({time.perf_counter() - began:.1f} s)", flush=True)
        out.write_text(json.dumps({**results, "failures": failed}, indent=1))

    for op in OPS:
        section(op, lambda op=op: check_op(op, library, results["ops"]))
    for item in wanted:
        section(item, lambda item=item: check_model(folder, library, item, results["models"]))
    section("overhead", lambda: check_overhead(library, results))
    section("plain session", lambda: check_plain(folder, library))
    section("bad input", lambda: check_refusals(folder, library, results["refusals"]))
    section("threads", lambda: check_threads(folder, library))
    section("sessions", lambda: check_leak(folder, library, results))
    print("\n".join(failed) or "all held")
    return 1 if failed else 0


# ---- ops -------------------------------------------------------------------------------------------------------------


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def scan_inputs(random: np.random.Generator) -> dict[str, np.ndarray]:
    b, t, d, n = 2, 131, 48, 16
    values = {name: normal(random, b, t, d) for name in ("u", "delta", "z")}
    values |= {name: normal(random, b, t, 1, n) for name in "BC"} | {"A": -np.exp(normal(random, d, n))}
    return values | {name: normal(random, d) for name in ("D", "delta_bias")}


def bi_scan_inputs(
    random: np.random.Generator, b: int = 2, t: int = 131, d: int = 48, rank: int = 12
) -> dict[str, np.ndarray]:
    n = 16
    values = {f"A_{side}": -np.exp(normal(random, d, n)) for side in "fb"}
    for side in "fb":
        values |= {f"{name}_{side}": normal(random, b, t, d) for name in ("u", "delta")}
        values |= {f"x_{side}": normal(random, b, t, rank + 2 * n)}
        values |= {f"{name}_{side}": normal(random, d) for name in ("D", "delta_bias")}
    return {**values, "z": normal(random, b, t, 2 * d)}


def conv_inputs(random: np.random.Generator) -> dict[str, np.ndarray]:
    b, t, d, k = 2, 131, 48, 4
    weights = {f"weight_{side}": normal(random, k, d) for side in "fb"}
    return {"x": normal(random, b, t, 2 * d)} | weights | {f"bias_{side}": normal(random, d) for side in "fb"}


def norm_inputs(random: np.random.Generator) -> dict[str, np.ndarray]:
    return {"h": normal(random, 2, 131, 192), "r": 100 * normal(random, 2, 131, 192), "weight": normal(random, 192)}


#: op -> inputs, attributes, the definition in float64
OPS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "SelectiveScan": (scan_inputs, {"reverse": 1}, lambda **i: (golden.selective_scan_f64(**i, reverse=True),)),
    "BiSelectiveScan": (bi_scan_inputs, {}, lambda **i: (golden.bi_selective_scan_f64(**i),)),
    "BiCausalConv1d": (conv_inputs, {}, lambda **i: golden.bi_causal_conv1d_f64(**i)),
    "AddRMSNorm": (norm_inputs, {"epsilon": 0.25}, lambda **i: golden.add_rms_norm_f64(**i, epsilon=0.25)),
}


def op_model(name: str, inputs: dict[str, np.ndarray], io: str, count: int = 1, **attributes: Any) -> bytes:
    """`count` nodes of one op, the first input of each the first output of the one before; in and out as fp32."""
    op = schema.OPS[name]
    nodes, values = [], {}
    for each in op.inputs:
        cast = each in inputs and each not in op.fp32 and io != "fp32"
        if cast:
            nodes.append(helper.make_node("Cast", [each], [f"{each}_io"], to=PROTO[io]))
        values[each] = f"{each}_io" if cast else each if each in inputs else ""
    arguments = [values[each] for each in op.inputs]
    while arguments[-1] == "":
        arguments.pop()
    outputs = []
    for i in range(count):
        made = [f"{each}{i}" for each in op.outputs]
        arguments[0] = outputs[-1][0] if outputs else arguments[0]
        nodes.append(
            helper.make_node(name, arguments, made, name=f"{name}{i}", domain="vim", **op.node_attributes(**attributes))
        )
        outputs.append(made)
    for each, made in zip(op.outputs, outputs[-1]):
        nodes.append(helper.make_node("Cast", [made], [each], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "op",
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, value.shape) for each, value in inputs.items()],
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in op.outputs],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vim", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def open_bytes(model: bytes, library: Path, stream: int | None = None, graph: bool = False) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    provider = {"use_tf32": "0", "enable_cuda_graph": str(int(graph))}
    if stream is not None:
        provider["user_compute_stream"] = str(stream)
    session = ort.InferenceSession(model, options, providers=[(PROVIDER, provider), "CPUExecutionProvider"])
    if PROVIDER not in session.get_providers():
        raise RuntimeError("ONNX Runtime took the CPU")
    return session


def check_op(name: str, library: Path, results: dict[str, Any]) -> list[str]:
    make, attributes, definition = OPS[name]
    failures = []
    for io, dtype in IO.items():
        inputs = make(np.random.default_rng(7))
        rounded = {
            each: value if each in schema.OPS[name].fp32 else value.astype(dtype).astype(np.float32)
            for each, value in inputs.items()
        }
        want = definition(**{each: value.astype(np.float64) for each, value in rounded.items()})
        session = open_bytes(op_model(name, inputs, io, **attributes), library)
        errors = [
            float(np.sqrt(((got - wanted) ** 2).sum() / (wanted**2).sum()))
            for got, wanted in zip(session.run(None, inputs), want, strict=True)
        ]
        results[f"{name}:{io}"] = errors
        if not all(error <= TOLERANCE[io] for error in errors):
            failures.append(f"{io}: {errors}, more than {TOLERANCE[io]:g}")
    return failures


# ---- overhead --------------------------------------------------------------------------------------------------------


class _Desc(ctypes.Structure):
    """vim_bi_selective_scan_desc"""

    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "length", "channels", "states", "groups")]
    _fields_ += [(n, ctypes.c_int32) for n in ("io", "softplus", "has_D", "has_z", "has_delta_bias", "has_y_scale")]
    _fields_ += [("strides", ctypes.c_int64 * 24)]


class _Args(ctypes.Structure):
    """vim_bi_selective_scan_args"""

    _fields_ = [(n, ctypes.c_void_p * 2) for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("z", "y_scale", "y")]


def check_overhead(library: Path, results: dict[str, Any]) -> list[str]:
    """BiSelectiveScan of Vim-Ti, fp16, 224 px: time a node, by the slope over 1 and 65 nodes, against the C function
    called as often in a graph of its own. Of a model in no graph only batch 64 is judged: in smaller ones the host is
    the slower side, whatever the op."""
    kernels = ctypes.CDLL(str(library))
    rows, failures = [], []
    for batch in (1, 8, 64):
        inputs = bi_scan_inputs(np.random.default_rng(1), batch, 197, 384)
        context = cuda.Context(0)
        alone = kernel_alone(kernels, context, inputs)
        row = {"batch": batch, "kernel_us": alone}
        for how, graph in (("eager_us", False), ("graph_us", True)):
            one, many = (node_time(library, context, inputs, count, graph) for count in (1, 65))
            row[how] = (many - one) / 64
        rows.append(row)
        over = row["graph_us"] - alone
        if over > OVERHEAD_US:
            failures.append(f"batch {batch}: {over:.1f} us over the kernel alone in a graph")
        if batch == 64 and row["eager_us"] - alone > OVERHEAD_US:
            failures.append(f"batch {batch}: {row['eager_us'] - alone:.1f} us over the kernel alone")
        print(row, flush=True)
        context.close()
    results["overhead"] = rows
    return failures


def kernel_alone(kernels: Any, context: cuda.Context, inputs: dict[str, np.ndarray], calls: int = 64) -> float:
    """Microseconds a call of the C function, back to back in a CUDA graph: a host enqueues too slowly to show them."""
    batch, length, channels = inputs["u_f"].shape
    row, width = inputs["x_f"].shape[2], inputs["z"].shape[2]
    desc = _Desc(batch, length, channels, 16, 1, 1, 1, 1, 1, 1, 0)
    kernels.vim_bi_selective_scan_contiguous(ctypes.byref(desc), ctypes.c_int64(row), ctypes.c_int64(width))
    at = {}
    for name, value in inputs.items():
        typed = value if name in schema.BI_SCAN.fp32 else value.astype(np.float16)
        at[name] = context.allocate(typed.nbytes)
        context.upload(np.ascontiguousarray(typed), at[name])
        context.synchronize()
    pair = lambda name, offset=0: (ctypes.c_void_p * 2)(at[f"{name}_f"] + offset, at[f"{name}_b"] + offset)  # noqa: E731
    y = context.allocate(batch * length * channels * 2)
    args = _Args(
        pair("u"), pair("delta"), pair("A"), pair("x", 2 * (row - 32)), pair("x", 2 * (row - 16)), pair("D"),
        pair("delta_bias"), at["z"] + 2 * (width - channels), None, y,
    )  # fmt: skip
    stream = ctypes.c_void_p(context.stream)

    def run() -> None:
        for _ in range(calls):
            status = kernels.vim_bi_selective_scan_cuda(ctypes.byref(desc), ctypes.byref(args), None, stream)
            assert status == 0, status

    context.begin_capture()
    run()
    graph = context.end_capture()
    return timed(context, graph.launch) / calls


def node_time(library: Path, context: cuda.Context, inputs: dict[str, np.ndarray], count: int, graph: bool) -> float:
    """Microseconds of one inference of a model with `count` such nodes, inputs and outputs on the card."""
    session = open_bytes(op_model("BiSelectiveScan", inputs, "fp16", count), library, context.stream, graph)
    binding = session.io_binding()
    for name, value in inputs.items():
        pointer = context.allocate(value.nbytes)
        context.upload(value, pointer)
        context.synchronize()
        binding.bind_input(name, "cuda", 0, np.float32, value.shape, pointer)
    shape = inputs["u_f"].shape
    binding.bind_output("y", "cuda", 0, np.float32, shape, context.allocate(4 * int(np.prod(shape))))
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return timed(context, lambda: session.run_with_iobinding(binding, options))


def timed(context: cuda.Context, run: Callable[[], Any], repeats: int = 15) -> float:
    """Median microseconds on the stream between the events around `run`."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = cuda.Event(), cuda.Event()
        start.record(context.stream)
        run()
        end.record(context.stream)
        end.synchronize()
        times.append(end.milliseconds_since(start) * 1e3)
    return float(np.median(times))


# ---- models ----------------------------------------------------------------------------------------------------------


def model_of(folder: Path, name: str, fusion: str, precision: str) -> Path:
    """The model exported that way, once."""
    target = folder / f"{name}.{fusion}.{precision}.vim"
    if not (target / "model.onnx").is_file():
        from vimdeploy.export.exporter import ExportOptions, export_checkpoint

        checkpoint = ROOT / "examples/digits/vim_digits.pth" if name == "digits" else folder / f"{name}.pth"
        export_checkpoint(checkpoint, target, ExportOptions(fusion=fusion, precision=precision))
    return target / "model.onnx"


def check_model(folder: Path, library: Path, item: str, rows: list[dict[str, Any]]) -> list[str]:
    name, fusion, precision = item.split(":")
    model = model_of(folder, name, fusion, precision)
    content = np.load(folder / f"{name}.npz")
    wanted = content["fp32" if precision == "fp32" else "fp64"]
    row: dict[str, Any] = {"model": name, "fusion": fusion, "precision": precision, "batches": {}, "latency_ms": {}}
    rows.append(row)
    failures = []
    outputs: dict[int, np.ndarray] = {}

    def parts_of(batch: int) -> list[np.ndarray]:
        images = content["images"][: 3 * batch if batch < BATCHES[-1] else batch]
        return [images[i : i + batch] for i in range(0, len(images), batch)]

    def logits(session: OrtCudaSession, batch: int) -> np.ndarray:
        times = row["latency_ms"].setdefault(str(batch), {})
        prepared = session.prepare(parts_of(batch)[0])
        assert session._cuda is not None
        times["graph" if session._recorded else "eager"] = timed(session._cuda, prepared.run) / 1e3
        return np.concatenate([session.run(part)["logits"] for part in parts_of(batch)])

    with OrtCudaSession(model, library=library) as session:
        row["description"] = session.describe()
        for batch in BATCHES:
            got = outputs[batch] = logits(session, batch)
            measured = row["batches"][str(batch)] = compare(got, wanted[: len(got)])
            failures += misses(measured, BARS[precision], f"batch {batch}")
        nan = content["images"][:2].copy()
        nan[0] = np.nan
        after = session.run(nan)["logits"]
        if not np.isnan(after[0]).all() or not np.isfinite(after[1]).all():
            failures.append("an image of NaN did not give NaN, or spoiled its neighbour")
    with OrtCudaSession(model, library=library, cuda_graph=True) as session:
        for batch in (*BATCHES, BATCHES[0]):  # once more the first, after graphs of other sizes have run
            got = logits(session, batch)
            if not np.array_equal(got, outputs[batch]):
                failures.append(
                    f"batch {batch}: the CUDA graph's outputs differ by {np.abs(got - outputs[batch]).max()}"
                )
    print(json.dumps(row["latency_ms"]), flush=True)
    return failures


def check_plain(folder: Path, library: Path) -> list[str]:
    """The two lines of anyone with onnxruntime, on the provider's own stream; and the same library on the CPU."""
    model = model_of(folder, "digits", "full", "fp32")
    content = np.load(folder / "digits.npz")
    failures = []
    for providers in ([PROVIDER], ["CPUExecutionProvider"]):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(str(model), options, providers=providers)
        (node,) = session.get_inputs()
        got = session.run(["logits"], {node.name: content["images"][:8]})[0]
        measured = compare(got, content["fp32"][:8])
        tf32 = providers == [PROVIDER]  # which ONNX Runtime uses unless told not to
        failures += misses(measured, {"max_abs": 2e-2 if tf32 else 1e-3}, providers[0])
    return failures


def check_threads(folder: Path, library: Path) -> list[str]:
    """Two sessions in two threads, at once."""
    model = model_of(folder, "digits", "full", "fp16")
    images = np.load(folder / "digits.npz")["images"][:16]
    with OrtCudaSession(model, library=library) as session:
        want = session.run(images)["logits"]
    equal = [False, False]

    def work(i: int) -> None:
        with OrtCudaSession(model, library=library, cuda_graph=i == 1) as session:
            equal[i] = all(np.array_equal(session.run(images)["logits"], want) for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [] if all(equal) else [f"sessions in two threads disturb each other: {equal}"]


def check_leak(folder: Path, library: Path, results: dict[str, Any]) -> list[str]:
    """64 sessions opened and closed."""
    model = model_of(folder, "digits", "full", "fp16")
    images = np.load(folder / "digits.npz")["images"][:4]
    used = []
    for i in range(64):
        with OrtCudaSession(model, library=library, cuda_graph=i % 2 == 0) as session:
            session.run(images)
        if i in (7, 63):
            context = cuda.Context(0)
            used.append(cuda.free_memory()[0])
            context.close()
    lost = (used[0] - used[1]) / 2**20
    results["lost_mib_after_56_sessions"] = lost
    return [] if lost < 32 else [f"{lost:.0f} MiB of the card are gone after 56 sessions"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def check_refusals(folder: Path, library: Path, results: dict[str, Any]) -> list[str]:
    model = model_of(folder, "digits", "full", "fp32")
    inputs = bi_scan_inputs(np.random.default_rng(0))
    images = np.load(folder / "digits.npz")["images"]

    def changed(**shapes: tuple[int, ...]) -> Callable[[], Any]:
        values = {**inputs, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}}
        session = open_bytes(op_model("BiSelectiveScan", values, "fp16"), library)
        return lambda: session.run(None, values)

    def wrong_type() -> Any:
        proto = onnx.load_from_string(op_model("BiSelectiveScan", inputs, "fp16"))
        node = next(node for node in proto.graph.node if node.op_type == "BiSelectiveScan")
        node.input[4] = "u_f_io"
        return open_bytes(proto.SerializeToString(), library)

    def run_with(batch: np.ndarray) -> Any:
        with OrtCudaSession(model, library=library) as session:
            return session.run(batch)

    b, t, d = inputs["u_f"].shape
    attempts: dict[str, tuple[str, Callable[[], Any]]] = {
        "A in fp16": ("A_f is float16; it must be float32", wrong_type),
        "another length": ("delta_b has shape", changed(delta_b=(b, t + 1, d))),
        "rows too short": ("they must hold B and C", changed(x_f=(b, t, 31), x_b=(b, t, 31))),
        "no gate in z": ("z has rows of 40", changed(z=(b, t, 40))),
        "an empty batch": ("the batch is empty", lambda: run_with(images[:0])),
        "images in fp64": ("not float64", lambda: run_with(images[:1].astype(np.float64))),
        "a library that is none": ("could not load", lambda: OrtCudaSession(model, library=model)),
        "no such card": ("GPU 7", lambda: OrtCudaSession(model, library=library, device=7)),
    }
    cpu_only = library.with_name("libvimdeploy_ort.so")
    if cpu_only.is_file():
        attempts["the CPU's library"] = ("for the CPU only", lambda: OrtCudaSession(model, library=cpu_only))
    failures = []
    for what, (expected, attempt) in attempts.items():
        try:
            said = refusal(attempt)
        except Exception as error:  # onnxruntime's own
            said = " ".join(str(error).split())
        results[what] = said
        if said is None or expected not in said:
            failures.append(f"{what}: expected {expected!r}, got {said!r}")
    # No tokens and one token: empty, or right.
    empty = changed(**{name: (b, 0, value.shape[2]) for name, value in inputs.items() if value.ndim == 3})()
    if empty[0].shape != (b, 0, d):
        failures.append(f"no tokens give a shape of {empty[0].shape}")
    return failures


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), Path(sys.argv[3]), sys.argv[4:]))
