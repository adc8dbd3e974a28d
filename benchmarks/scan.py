"""Times the selective scan on a CUDA card: ours against mamba-ssm's kernel and a sequential kernel.

  tests/gpu/run.sh -k choice                       builds build/gpu/out/libvimdeploy_cuda.so (or set VIM_CUDA_LIBRARY)
  python benchmarks/scan.py --mamba libmamba.so --output benchmarks/results/scan-h200.json
  python benchmarks/scan.py --tune --output ...    every variant on the grid; writes kernels/cuda/variant_table*.inc,
                                                   unless options make the grid smaller

Both directions of a Vim layer with z gate, D, bias and softplus, N = 16, B and C read from x_proj's rows (ours and the
sequential kernel) or contiguous (batch, 1, 16, length) as Vim hands them to mamba-ssm. Every figure is the median over
replays of a CUDA graph of one or more calls, timed with CUDA events; the calls of a graph go round buffer sets that
together exceed the L2 cache several times. Floors: 38 exponential-unit operations per (batch, token, channel) of both
directions, and every operand moved once, at rates measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import cuda_library as lib  # noqa: E402
from reference import make_direction, relative_rms, scan_f64  # noqa: E402

MODELS = {"Ti": (384, 12), "S": (768, 24), "B": (1536, 48)}  # channels, dt_rank
BATCHES = [1, 8, 64, 128]
LENGTHS = [197, 730, 1025, 6085]
NVCC = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]


class Timer:
    """Medians of CUDA-graph replays."""

    def __init__(self, budget_ms: float):
        self.budget_ms = budget_ms

    def microseconds(self, calls, give_up_above=float("inf")) -> float:
        """calls: functions that enqueue the same work on different buffers. Time of one; inf, without a closer look,
        when a first, plain timing is above `give_up_above`."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        once = start.elapsed_time(end) / len(calls)
        if once * 1e3 > give_up_above:
            return float("inf")
        rounds = max(1, min(8, int(2.0 / max(once * len(calls), 1e-3))))  # a graph of about 2 ms
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        repeats = max(5, min(40, int(self.budget_ms / max(once * len(calls) * rounds, 1e-3))))
        times = []
        for _ in range(repeats):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times) * 1e3 / (len(calls) * rounds)


class Layer:
    """One buffer set: inputs of both directions, for every contender."""

    def __init__(self, batch, length, channels, rank, dtype, mamba=False):
        self.size = (batch, length, channels)
        self.rank = rank
        self.directions = [make_direction(batch, length, channels, dtype, rank=rank) for _ in "fb"]
        self.z = torch.randn(batch, length, channels, device="cuda").to(dtype)
        self.y = torch.empty_like(self.z)
        self.y_each = [torch.empty_like(self.z) for _ in "fb"] if not mamba else None
        self.half = int(dtype == torch.float16)
        if mamba:  # (batch, channels, length)
            flip = lambda t, i: t.flip(1) if i else t  # noqa: E731
            self.m = []
            for i, d in enumerate(self.directions):
                u, delta, z = (flip(t, i).transpose(1, 2).contiguous() for t in (d.u, d.delta, self.z))
                B, C = (flip(t, i).permute(0, 2, 3, 1).contiguous() for t in (d.B, d.C))
                chunks = (length + 2047) // 2048
                self.m.append(
                    (
                        u,
                        delta,
                        d.A,
                        B,
                        C,
                        d.D,
                        z,
                        d.delta_bias,
                        torch.empty_like(u),
                        torch.empty_like(u),
                        torch.empty(batch, channels, chunks, 32, device="cuda"),
                    )
                )
            self.xz = torch.randn(batch, 2 * channels, length, device="cuda").to(dtype)

    def bytes(self) -> int:
        element = self.z.element_size()
        batch, length, channels = self.size
        return batch * length * (6 * channels + 4 * 16) * element

    def fused(self, variant=None):
        call = lib.Call(self.directions, self.z, self.y)  # the halving lies in out_proj's weight
        assert call.run(variant) == lib.OK, lib.last_error()
        return lambda: call.run(variant)

    def per_direction(self):
        calls = [
            lib.Call([d], self.z, y, reverse=bool(i)) for i, (d, y) in enumerate(zip(self.directions, self.y_each))
        ]
        return lambda: [call.run() for call in calls]

    def sequential(self, anchor):
        batch, length, channels = self.size
        row = self.rank + 32
        arguments = []
        for i, (d, y) in enumerate(zip(self.directions, self.y_each)):
            x_dbl = d.B.data_ptr() - self.rank * self.z.element_size()
            pointers = [
                d.u.data_ptr(),
                d.delta.data_ptr(),
                d.A.data_ptr(),
                x_dbl,
                d.D.data_ptr(),
                self.z.data_ptr(),
                d.delta_bias.data_ptr(),
                y.data_ptr(),
            ]
            arguments.append([self.half, batch, length, channels, row, self.rank, i, *map(ctypes.c_void_p, pointers)])
        return lambda: [anchor.sequential_style_scan(*a, stream()) for a in arguments]

    def mamba(self, library, with_flips=False):
        batch, length, channels = self.size
        arguments = [[self.half, batch, channels, length, *(ctypes.c_void_p(t.data_ptr()) for t in m)] for m in self.m]

        def kernels():
            for a in arguments:
                library.mamba_selective_scan(*a, stream())

        def as_vim():  # what mamba_simple.py does around the two scans: flip xz, flip the output back, add, halve
            self.xz.flip(-1)
            kernels()
            (self.m[0][9] + self.m[1][9].flip(-1)) / 2

        return as_vim if with_flips else kernels


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def build_anchor(folder: Path) -> ctypes.CDLL:
    out = folder / "libanchor.so"
    if not out.exists():
        subprocess.run([*NVCC, str(ROOT / "benchmarks/anchors/sequential_style.cu"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def load_mamba(library: Path) -> ctypes.CDLL:
    """mamba-ssm's forward scan, built by whoever has it, behind one C function:

    void mamba_selective_scan(int half, int batch, int dim, int length, u, delta, A, B, C, D, z, bias, out, out_z, x,
    stream): device pointers; u, delta, z, out, out_z (batch, dim, length), B, C (batch, 1, 16, length), A (dim, 16),
    D, bias (dim), x (batch, dim, chunks of 2048, 32) scratch; half says whether the io type is fp16 or fp32.
    """
    return ctypes.CDLL(str(library))


def rates(anchor) -> dict:
    """Exponentials a second and bytes a second, as this card gives them now."""
    properties = torch.cuda.get_device_properties(0)
    sink = torch.zeros(1, device="cuda")
    blocks, rounds = properties.multi_processor_count * 2 * 4, 100
    timer = Timer(20)
    us = timer.microseconds([lambda: anchor.exponentials(ctypes.c_void_p(sink.data_ptr()), blocks, rounds, stream())])
    source = torch.randn(256 * 2**20, device="cuda")
    target = torch.empty_like(source)
    copy_us = timer.microseconds([lambda: target.copy_(source)])
    return {
        "exponentials_per_s": blocks * 1024 * rounds * 64 / us * 1e6,
        "copy_bytes_per_s": 2 * source.nbytes / copy_us * 1e6,
    }


def layers(batch, length, channels, rank, dtype, l2_bytes, **kw) -> list[Layer]:
    """As many sets as exceed the L2 four times, at most 24."""
    first = Layer(batch, length, channels, rank, dtype, **kw)
    count = max(1, min(24, 4 * l2_bytes // first.bytes() + 1))
    return [first] + [Layer(batch, length, channels, rank, dtype, **kw) for _ in range(count - 1)]


def machine() -> dict:
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "card": torch.cuda.get_device_name(),
        "nvidia_smi": smi,
        "torch": torch.__version__,
        "nvcc": nvcc.splitlines()[-1] if nvcc else "",
        "python": sysconfig.get_python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def grid(arguments):
    for dtype in arguments.dtypes:
        for length in arguments.lengths:
            for model in arguments.models:
                for batch in arguments.batches:
                    yield model, batch, length, dtype


def compare(arguments, anchor, mamba, rate, l2_bytes, rows: list[dict], save) -> None:
    """Appends to `rows` and saves after each, so that a run cut short still leaves what it measured."""
    timer = Timer(arguments.budget_ms)
    print(
        f"{'case':24s} {'variant':36s} {'fused':>8s} {'per dir':>8s} {'seq':>8s} {'mamba':>8s} {'as Vim':>8s}  us;"
        "   x mamba  x as Vim   x seq   MUFU   DRAM"
    )
    for model, batch, length, dtype_name in grid(arguments):
        channels, rank = MODELS[model]
        dtype = getattr(torch, dtype_name)
        sets = layers(batch, length, channels, rank, dtype, l2_bytes)
        row = {
            "model": model,
            "batch": batch,
            "length": length,
            "dtype": dtype_name,
            "variant": str(lib.Call(sets[0].directions, sets[0].z, sets[0].y).chosen()),
        }
        row["fused_us"] = timer.microseconds([s.fused() for s in sets])
        row["per_direction_us"] = timer.microseconds([s.per_direction() for s in sets])
        row["sequential_us"] = timer.microseconds([s.sequential(anchor) for s in sets])
        if mamba is not None:
            del sets
            sets = layers(batch, length, channels, rank, dtype, l2_bytes, mamba=True)
            row["mamba_us"] = timer.microseconds([s.mamba(mamba) for s in sets])
            row["mamba_as_vim_us"] = timer.microseconds([s.mamba(mamba, with_flips=True) for s in sets])
        n = batch * length * channels
        row["mufu_fraction"] = 38 * n / rate["exponentials_per_s"] * 1e6 / row["fused_us"]
        row["dram_fraction"] = sets[0].bytes() / rate["copy_bytes_per_s"] * 1e6 / row["fused_us"]
        rows.append(row)
        save()
        fused = row["fused_us"]
        m, v = row.get("mamba_us", float("nan")), row.get("mamba_as_vim_us", float("nan"))
        print(
            f"{model + ' B' + str(batch) + ' L' + str(length) + ' ' + dtype_name:24s} {row['variant']:36s} {fused:8.1f}"
            f" {row['per_direction_us']:8.1f} {row['sequential_us']:8.1f} {m:8.1f} {v:8.1f}    {m / fused:8.2f}"
            f" {v / fused:8.2f} {row['sequential_us'] / fused:8.2f}  {row['mufu_fraction']:5.2f}"
            f"  {row['dram_fraction']:5.2f}",
            flush=True,
        )
        del sets


def tune(arguments, l2_bytes) -> list[dict]:
    """Every variant at every point with distinct batch * channels."""
    timer = Timer(arguments.budget_ms)
    rows, seen = [], set()
    for model, batch, length, dtype_name in grid(arguments):
        channels, rank = MODELS[model]
        if (batch * channels, length, dtype_name) in seen:
            continue
        seen.add((batch * channels, length, dtype_name))
        sets = layers(batch, length, channels, rank, getattr(torch, dtype_name), l2_bytes)
        times = {}
        for variant in lib.PAIR_VARIANTS:
            call = lib.Call(sets[0].directions, sets[0].z, sets[0].y)
            if call.run(variant) != lib.OK:
                continue
            torch.cuda.synchronize()
            # What is scanned whole is measured beside what is cut: it serves where there is no workspace. A launch from
            # Python takes up to 20 us, so that much says nothing.
            rivals = [us for each, us in times.items() if variant.chunks > 1 or lib.Variant(*each).chunks <= 1]
            limit = max(25.0, 1.5 * min(rivals, default=float("inf")))
            us = timer.microseconds([s.fused(variant) for s in sets], give_up_above=limit)
            if us != float("inf"):
                times[variant.fields()] = us
        order = sorted(times, key=times.get)
        rows.append(
            {
                "model": model,
                "batch": batch,
                "length": length,
                "dtype": dtype_name,
                "rows": batch * channels,
                "us": [[list(f), times[f]] for f in order],
            }
        )
        print(
            f"{model} B{batch} L{length} {dtype_name}: "
            + ", ".join(f"{lib.Variant(*f)} {times[f]:.1f}" for f in order[:4]),
            flush=True,
        )
        del sets
    return rows


#: dtype -> the table in kernels/cuda that its points go to; bfloat16 takes float16's.
TABLES = {"float16": "variant_table.inc", "float32": "variant_table_f32.inc"}


def write_tables(rows: list[dict], source: str) -> None:
    """kernels/cuda/variant_table*.inc of the types measured. Batches of models with the same rows share a point."""
    for dtype, table in TABLES.items():
        points = [row for row in rows if row["dtype"] == dtype]
        lines = [
            f"// Written by `benchmarks/scan.py --tune` from {source}, {dtype}:",
            "// {batch * channels, length, fastest variant}, and its microseconds. Where that one needs a workspace,",
            "// the fastest that needs none comes next.",
        ]
        for row in sorted(points, key=lambda r: (r["length"], r["rows"])):
            whole = next(entry for entry in row["us"] if lib.Variant(*entry[0]).chunks <= 1)
            for fields, us in [row["us"][0]] + [whole] * (whole is not row["us"][0]):
                lines.append(f"{{{row['rows']}, {row['length']}, {{{', '.join(map(str, fields))}}}}},  // {us:.1f}")
        if points:
            (ROOT / "kernels/cuda" / table).write_text("\n".join(lines) + "\n")


def check(anchor, mamba) -> dict:
    """Every contender computes the same function, before any is timed."""
    layer = Layer(2, 197, 384, 12, torch.float16)
    parts = [scan_f64(d, layer.z, reverse=bool(i)) for i, d in enumerate(layer.directions)]
    layer.fused()()
    errors = {"fused": relative_rms(layer.y, parts[0] + parts[1])}
    layer.sequential(anchor)()
    errors["sequential"] = max(relative_rms(y, part) for y, part in zip(layer.y_each, parts))
    if mamba is not None:
        other = Layer(2, 197, 384, 12, torch.float16, mamba=True)
        parts = [scan_f64(d, other.z, reverse=bool(i)) for i, d in enumerate(other.directions)]
        other.mamba(mamba)()
        torch.cuda.synchronize()
        outputs = [other.m[0][9].transpose(1, 2), other.m[1][9].transpose(1, 2).flip(1)]
        errors["mamba"] = max(relative_rms(y, part) for y, part in zip(outputs, parts))
    if not all(error < 2e-3 for error in errors.values()):
        raise SystemExit(f"a contender is wrong: {errors}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba", type=Path, help="a library with mamba-ssm's forward scan (load_mamba)")
    parser.add_argument("--build", type=Path, help="folder for what is built on the spot (default: a temporary one)")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget-ms", type=float, default=60, help="device time per figure")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.build or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        anchor = build_anchor(folder)
        mamba = load_mamba(arguments.mamba) if arguments.mamba else None
        torch.manual_seed(0)
        result = {**machine(), "errors": check(anchor, mamba), "rates": rates(anchor)}
        print(json.dumps(result), flush=True)
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

        def save() -> None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

        if arguments.tune:
            result["tune"] = tune(arguments, l2_bytes)
        else:
            result["compare"] = []
            compare(arguments, anchor, mamba, result["rates"], l2_bytes, result["compare"], save)
        save()
    if arguments.tune:
        asked = (arguments.models, arguments.batches, arguments.lengths)
        if asked == (list(MODELS), BATCHES, LENGTHS):
            write_tables(result["tune"], f"benchmarks/results/{arguments.output.name}")
        else:
            print("the tables in kernels/cuda stay as they are: this was not the whole grid")


if __name__ == "__main__":
    main()
