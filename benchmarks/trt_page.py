"""Fills the marked regions of docs/how-to/tensorrt.md from benchmarks/results/trt85-*.json.

  python benchmarks/trt_page.py           rewrite the regions
  python benchmarks/trt_page.py --check   exit 1 when the page is not what the results files say

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

PAGE = ROOT / "docs" / "how-to" / "tensorrt.md"
PLANS, EARLIER = RESULTS / "trt85-h200.json", RESULTS / "trt85-h100.json"
BUILDS, PROGRAMS = RESULTS / "trt85-build-h200.json", RESULTS / "trt85-programs-h200.json"
MODELS = {"digits": "digits", "vim_tiny": "Vim-Ti", "vim_small": "Vim-S"}


def plans() -> str:
    """Each plan's outputs at batch 64 against PyTorch's; of a plan that both files have, the later one."""
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for path in (EARLIER, PLANS):
        values = pages.read(path)
        if values is None:
            return pages.not_yet(f"tests/gpu/trt85.sh LIBRARY benchmarks/results/{path.name}")
        found |= {(row["model"], row["precision"]): (row, values) for row in values["builds"]}
    rows = []
    for (model, precision), (row, values) in sorted(found.items()):
        at = row["batches"]["64"]
        kinds = row["found"]["projections"]
        seen = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        accuracy = f"{row['accuracy']['plan']:.2%}" if "accuracy" in row else "-"
        size = f"{row['plan_bytes'] / 1e6:.1f} MB, {row['plan_bytes'] / row['weight_bytes']:.2f}"
        numbers = (f"{at['max_abs']:.1e}", f"{at['rel_rms']:.1e}", f"{at['cosine']:.6f}", f"{at['top1']:.1%}")
        times = f"{row['build_s_cold']:.1f} / {row['build_s_warm']:.1f}"
        card = values["card"].removeprefix("NVIDIA ").split()[0]
        rows.append((f"{MODELS[model]} {precision}", card, *numbers, accuracy, seen, times, size))
    files = " and ".join(f"`benchmarks/results/{path.name}`" for path in (PLANS, EARLIER))
    header = ("plan", "card", "max abs", "rel RMS", "cosine", "top-1", "accuracy", "projections", "build, s", "size")
    return pages.table(header, rows) + f"{files}.\n\n"


def builds() -> str:
    """Where a build's time goes, and a plan's bytes."""
    values = pages.read(BUILDS)
    if values is None:
        return pages.not_yet("vimdeploy build-engine with TensorRT's verbose log")
    rows = [
        (
            f"{MODELS[row['model']]} {row['precision']}, {row['how']}",
            str(row["layers"]),
            *(f"{row[cache][phase]:.1f}" for phase in ("graph_s", "kernels_s") for cache in ("cold", "warm")),
        )
        for row in values["builds"]
    ]
    header = ("", "layers", "graph, s", "with cache", "kernels, s", "with cache")
    size = {name: count / 1e6 for name, count in values["vim_tiny_bytes"].items()}
    rest = size["plan"] - size["constants_fp16"] - size["constants_fp32"] - size["strings"]
    return pages.table(header, rows) + (
        f"Of Vim-Ti's plan of {size['plan']:.1f} MB the constants in fp16 are {size['constants_fp16']:.1f} MB, "
        f"{size['of_which_zero_rows_of_dt_proj']:.1f} MB of them zero rows of dt_proj; those in fp32 "
        f"{size['constants_fp32']:.1f} MB; names and other text {size['strings']:.1f} MB; the rest, TensorRT's own, "
        f"{rest:.1f} MB (`benchmarks/results/{BUILDS.name}`).\n\n"
    )


def programs() -> str:
    """What was run on a card from end to end."""
    values = pages.read(PROGRAMS)
    if values is None:
        return pages.not_yet("tests/gpu/mission.sh, tests/gpu/sdk.sh run")
    mission, sdk, trtexec = values["mission"], values["sdk"], values["trtexec"]
    errors = ", ".join(f"{row['rel_rms']:.1e} ({row['images']} images)" for row in mission["parity"])
    largest = max(sdk["largest_difference_of_a_probability"].values())
    printed = "the same as" if values["classify_ort_cuda"]["prints_what_the_cpu_prints"] else "other lines than"
    rows = [
        ("export, build-engine --fp16, verify parity", f"rel RMS {errors}"),
        ("C++, 32 images, against ONNX Runtime on a CPU", f"probabilities within {largest:.1e}; {sdk['four_threads']}"),
        (
            "trtexec, batch 8",
            f"{trtexec['gpu_compute_ms_median']:.2f} ms a batch, {'passed' if trtexec['passed'] else 'failed'}",
        ),
        ("classify_ort IMAGE d.vim cuda, 32 images", f"prints {printed} on a CPU"),
    ]
    return pages.table(("the digits model", "outcome"), rows) + (
        f"{values['card']}, driver {values['driver']}, TensorRT {values['tensorrt']}, {values['date']} "
        f"(`benchmarks/results/{PROGRAMS.name}`).\n\n"
    )


REGIONS = {"plans": plans, "builds": builds, "programs": programs}


if __name__ == "__main__":
    sys.exit(pages.main(PAGE, REGIONS))
