"""Where TensorRT is: build plans, hold them against PyTorch's outputs, time the builds, and try every bad input.

    python trt85.py REFERENCES PLUGIN RESULTS.json [NAME:PRECISION ...]

REFERENCES is the folder trt85_reference.py filled. Exits with 1 when a figure misses its bar; what was measured is in
RESULTS.json either way.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# TensorRT 8.5's plugin library names cuBLAS functions that nothing calls; bound lazily, empty libraries will do.
sys.setdlopenflags(os.RTLD_LAZY)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vimdeploy.engines.build import BuildOptions, build_engine  # noqa: E402
from vimdeploy.engines.sidecar import read_sidecar  # noqa: E402
from vimdeploy.errors import VimDeployError  # noqa: E402
from vimdeploy.runtimes import cuda, open_session  # noqa: E402
from vimdeploy.runtimes.tensorrt import TensorRTSession  # noqa: E402

BATCHES = (1, 7, 64)
#: (issue 3, "Figures")
BARS = {"fp32": {"max_abs": 1e-3}, "fp16": {"rel_rms": 1e-2, "cosine": 0.9999, "top1": 0.998}}
SIZE_BAR = 1.15


def main(folder: Path, plugin: Path, out: Path, wanted: list[str]) -> int:
    device = cuda.device()
    results: dict[str, Any] = {
        "card": device.name,
        "sm": device.sm,
        "driver_cuda": device.driver,
        "builds": [],
        "refusals": {},
    }
    failed = []
    for item in wanted:
        name, precision = item.split(":")
        try:
            row = one(folder, name, precision, plugin)
        except Exception as error:
            traceback.print_exc()
            row = {"model": name, "precision": precision, "failures": [f"{type(error).__name__}: {error}"]}
        results["builds"].append(row)
        failed += [f"{item}: {failure}" for failure in row["failures"]]
        print(json.dumps(row), flush=True)
        out.write_text(json.dumps(results, indent=2))
    if "digits:fp16" in wanted and not any(text.startswith("digits:fp16") for text in failed):
        for what, (expected, attempt) in refusals(folder, plugin).items():
            said = refusal(attempt)
            results["refusals"][what] = said
            print(f"{what}: {said}", flush=True)
            if said is None or expected not in said:
                failed.append(f"{what}: expected {expected!r}, got {said!r}")
    results["failures"] = failed
    out.write_text(json.dumps(results, indent=2))
    print("\n".join(failed) or "all held")
    return 1 if failed else 0


def one(folder: Path, name: str, precision: str, plugin: Path) -> dict[str, Any]:
    model = folder / f"{name}.vim" / "model.onnx"
    cache = folder / f"{name}.{precision}.cache"
    options = BuildOptions(precision=None if precision == "fp32" else precision, timing_cache=cache, plugin=plugin)
    cold = build_engine(model, None, options)
    print(f"{name} {precision} cold {cold.seconds:.1f} s", flush=True)
    warm = build_engine(model, None, options)
    row = {
        "build_s_cold": round(cold.seconds, 1),
        "build_s_warm": round(warm.seconds, 1),
        "total_s_warm": round(warm.total_seconds, 1),
    }
    return {**row, **measure(folder, name, precision, warm.plan)}


def measure(folder: Path, name: str, precision: str, plan: Path) -> dict[str, Any]:
    """The plan's outputs at every batch against PyTorch's, and what a call takes."""
    sidecar = read_sidecar(plan)
    content = np.load(folder / f"{name}.npz")
    facts = json.loads((folder / f"{name}.json").read_text())
    wanted = content["fp32" if precision == "fp32" else "fp64"]
    row: dict[str, Any] = {
        "model": name,
        "precision": precision,
        "tensorrt": sidecar.runtime["version"],
        "torch": facts["torch"],
        "plan_bytes": plan.stat().st_size,
        "weight_bytes": facts["parameters"] * (4 if precision == "fp32" else 2),
        "found": sidecar.precision,
        "batches": {},
        "failures": [],
    }
    with open_session(plan) as session:
        for batch in BATCHES:
            images = content["images"][: max(batch, len(content["images"]) // batch * batch)]
            if batch < 64:
                images = images[: 4 * batch]
            got = np.concatenate([session.run(images[i : i + batch])["logits"] for i in range(0, len(images), batch)])
            measured = compare(got, wanted[: len(got)])
            row["batches"][str(batch)] = measured
            row["failures"] += misses(measured, BARS[precision], f"batch {batch}")
        last = got
        if "labels" in content:
            labels = content["labels"][: len(got)]
            row["accuracy"] = {
                "plan": float((got.argmax(1) == labels).mean()),
                "pytorch_fp32": float((content["fp32"][: len(got)].argmax(1) == labels).mean()),
            }
    with TensorRTSession(plan, cuda_graph=True) as session:
        graphed = [session.run(images[:64])["logits"] for _ in range(2)][1]
        row["cuda_graph_equal"] = bool(np.array_equal(graphed, last[:64]))
        row["latency_ms"] = {str(batch): latency(session, content["images"][:batch]) for batch in BATCHES}
    row["plain_torch"] = compare(content["fp16"], content["fp64"]) if precision == "fp16" else None
    if row["plan_bytes"] > SIZE_BAR * row["weight_bytes"] and name != "digits":
        row["failures"].append(f"the plan is {row['plan_bytes'] / row['weight_bytes']:.2f} times its weights")
    if not row["cuda_graph_equal"]:
        row["failures"].append("the CUDA graph's outputs differ")
    return row


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    got, want = got.astype(np.float64), want.astype(np.float64)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    return {
        "n": len(got),
        "finite": bool(np.isfinite(got).all()),
        "max_abs": float(np.abs(got - want).max()),
        "rel_rms": float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean())),
        "cosine": float(((got * want).sum(1) / norms).min()),
        "top1": float((got.argmax(1) == want.argmax(1)).mean()),
    }


def misses(measured: dict[str, Any], bars: dict[str, float], where: str) -> list[str]:
    found = [] if measured["finite"] else [f"{where}: NaN or Inf"]
    for key, bar in bars.items():
        small = key in ("max_abs", "rel_rms")
        if measured["finite"] and (measured[key] > bar if small else measured[key] < bar):
            found.append(f"{where}: {key} {measured[key]:.2e} misses {bar:g}")
    return found


def latency(session: TensorRTSession, images: np.ndarray, n: int = 30) -> float:
    """Median milliseconds of `run`, copies to and from the card included."""
    times = []
    for _ in range(n):
        began = time.perf_counter()
        session.run(images)
        times.append(time.perf_counter() - began)
    return round(1e3 * float(np.median(times)), 3)


def refusals(folder: Path, plugin: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """what -> (a word of the message, the attempt)"""
    plan = folder / "digits.vim" / "model.fp16.plan"
    scratch = folder / "bad"
    shutil.rmtree(scratch, ignore_errors=True)

    def copy(name: str, change: Callable[[bytearray, dict[str, Any]], None], honest: bool = False) -> Path:
        """A plan and sidecar of its own folder, changed; `honest` recomputes the hash, as another builder would."""
        target = scratch / name / "model.fp16.plan"
        target.parent.mkdir(parents=True)
        data, side = bytearray(plan.read_bytes()), json.loads(Path(f"{plan}.json").read_text())
        change(data, side)
        if honest:
            import hashlib

            side["plan"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        target.write_bytes(data)
        Path(f"{target}.json").write_text(json.dumps(side))
        return target

    def flip(data: bytearray, side: dict[str, Any]) -> None:
        data[len(data) // 2] ^= 1

    def cut(data: bytearray, side: dict[str, Any]) -> None:
        del data[len(data) // 2 :]

    def version(data: bytearray, side: dict[str, Any]) -> None:
        side["runtime"]["version"] = "8.5.2.2"

    def card(data: bytearray, side: dict[str, Any]) -> None:
        side["device"].update(sm=80, name="NVIDIA A100")

    def other_plugin(data: bytearray, side: dict[str, Any]) -> None:
        side["plugin"]["sha256"] = "0" * 64

    def no_plugin(data: bytearray, side: dict[str, Any]) -> None:
        side["plugin"].update(sha256="0" * 64, file="gone.so")

    def large() -> Any:
        with open_session(plan) as session:
            (spec,) = session.inputs.values()
            return session.run(np.zeros((65, *spec.shape[1:]), np.float32))

    def build(**options: Any) -> Any:
        return build_engine(
            folder / "digits.vim" / "model.onnx", scratch / "x.plan", BuildOptions(plugin=plugin, **options)
        )

    return {
        "flipped byte": ("SHA-256", lambda: open_session(copy("flip", flip))),
        "truncated": ("bytes", lambda: open_session(copy("cut", cut))),
        "truncated, sidecar agrees": ("cannot load", lambda: open_session(copy("cut2", cut, honest=True))),
        "another TensorRT": ("8.5.2.2", lambda: open_session(copy("version", version))),
        "another card": ("sm_80", lambda: open_session(copy("card", card))),
        "another plugin": ("SHA-256", lambda: open_session(copy("plugin", other_plugin))),
        "missing plugin": ("not there", lambda: open_session(copy("gone", no_plugin), plugin=scratch / "gone.so")),
        "batch outside": ("1 to 64", large),
        # 8.5 builds the digits in 1 byte of workspace; too little of it is refused in tests/engines.
        "no bf16 in 8.5": ("bf16", lambda: build(precision="bf16")),
        "no version compatibility in 8.5": ("version-compatible", lambda: build(version_compatible=True)),
    }


def refusal(attempt: Callable[[], Any]) -> str | None:
    try:
        attempt()
    except VimDeployError as error:
        return f"[{error.exit_code}] {error.message} -> {error.hint}"
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
