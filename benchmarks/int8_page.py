"""Fills the marked regions of docs/how-to/quantize.md from benchmarks/results/int8-*.json.

  python benchmarks/int8_page.py           rewrite the regions
  python benchmarks/int8_page.py --check   exit 1 when the page is not what the results files say

pages.py says what a region is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pages  # noqa: E402
from pages import RESULTS  # noqa: E402

PAGE = ROOT / "docs" / "how-to" / "quantize.md"
CPU, CARD = RESULTS / "int8-cpu-epyc.json", RESULTS / "int8-trt85-h200.json"
PROFILE = RESULTS / "int8-trt85-profile-h200.json"


def accuracy() -> str:
    """Step by step: top-1 and signal to noise, of the model as trained and with outlier channels."""
    values = pages.read(CPU)
    if values is None or "accuracy" not in values:
        return pages.not_yet("python benchmarks/int8.py -o benchmarks/results/int8-cpu-epyc.json")
    found: dict[str, dict[str, Any]] = {}
    for row in values["accuracy"]["steps"]:
        found.setdefault(row["step"], {})[row["model"]] = row
    rows = []
    for step, models in found.items():
        cells = []
        for model in ("clean", "outliers"):
            row = models[model]
            low, high = row["interval"]
            cells += [f"{-row['points'] + 0:+.1f} ({-high:+.1f} to {-low:+.1f})", f"{row['sqnr_db']:.1f} dB"]
        rows.append((step, *cells))
    return pages.table(("", "top-1, points", "SQNR", "with outliers: top-1", "SQNR"), rows)


def speed() -> str:
    """fp32 and int8 on the CPU."""
    values = pages.read(CPU)
    if values is None or "speed" not in values:
        return pages.not_yet("python benchmarks/int8.py -o benchmarks/results/int8-cpu-epyc.json")
    found, host = values["speed"], values["host"]
    rows = [
        (f"{threads} thread{'s' if threads != '1' else ''}", name, f"{t['p50']:.1f}", f"{t['times_fp32']:.2f}")
        for threads, contenders in found["milliseconds"].items()
        for name, t in contenders.items()
    ]
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in found["bytes"].items())
    took = found["calibration"]
    return (
        f"\n{found['model']}; {host['cpu']['name']}, {host['cpu']['cores']} cores, ONNX Runtime "
        f"{host['versions']['onnxruntime']}, {host['date']} (`benchmarks/results/{CPU.name}`).\n"
        + pages.table(("", "", "ms", "times as fast as fp32"), rows)
        + f"Files: {sizes}. Calibrating on {took['images']} images took {took['total_s']:.0f} s.\n\n"
    )


def card() -> str:
    """TensorRT 8.5 on a card: accuracy, speed and size."""
    values = pages.read(CARD)
    if values is None:
        return pages.not_yet("tests/gpu/int8_trt85.sh PLUGIN benchmarks/results/int8-trt85-h200.json")
    rows = []
    for step, row in values["steps"].items():
        if "accuracy" in row:
            a = row["accuracy"]
            rows.append((step, f"top-1 {a['top1_reference']:.2%} to {a['top1']:.2%}, SQNR {a['sqnr_db']:.1f} dB"))
        elif "times_fp16" in row:
            rows.append(
                (step, f"{row['times_fp16']:.2f} times as fast as fp16, plan {row['size_of_fp16']:.2f} of fp16's")
            )
        else:
            rows.append((step, "; ".join(row["failures"])))
    return pages.table(("step", values["card"]), rows)


def profile() -> str:
    """Where a layer's two quantized products spend their time, in fp16 and in int8."""
    values = pages.read(PROFILE)
    if values is None:
        return pages.not_yet(
            "python tests/gpu/int8_profile.py MODEL.onnx PLUGIN benchmarks/results/int8-trt85-profile-h200.json"
        )
    rows = []
    for product in ("in_proj", "out_proj"):
        times = {}
        for kind in ("fp16", "int8"):
            for us, name, _, _, kernel in values[kind]:
                if name.startswith(f"layers.2.mixer.{product}/"):
                    times[kind, name.endswith(":q")] = us, "_".join(kernel.split("_")[:2])
        (fp16, fp16_kernel), (int8, int8_kernel) = times["fp16", False], times["int8", False]
        quantize = times["int8", True][0]
        cells = (f"{fp16:.1f} ({fp16_kernel})", f"{quantize:.1f}", f"{int8:.1f} ({int8_kernel})")
        rows.append((product, *cells, f"{fp16 / (quantize + int8):.2f}"))
    head = f"\n{values['model']}, batch {values['batch']}, third layer; {values['card']}, "
    head += f"TensorRT {values['tensorrt']} (`benchmarks/results/{PROFILE.name}`), microseconds.\n"
    return head + pages.table(("", "fp16", "quantizing", "int8", "times as fast"), rows)


REGIONS = {"int8-accuracy": accuracy, "int8-speed": speed, "int8-card": card, "int8-profile": profile}


if __name__ == "__main__":
    sys.exit(pages.main(PAGE, REGIONS))
