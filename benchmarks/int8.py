"""INT8 on a CPU: what each step of the recipe is worth, what it costs to make, and how fast the file is.

  python benchmarks/int8.py -o benchmarks/results/int8-cpu-NAME.json        all of it, about ten minutes on two cores
  python benchmarks/int8.py --only speed --seconds 2                        accuracy | speed; of -o the other part stays

accuracy  the shipped digits model, and the same with outlier channels put in (tests/outliers.py), quantized in each
          way on 256 images, every layer in int8; top-1 of the 1,000 held-out images on ONNX Runtime.
speed     Vim-S at 224 px, batch 1, fp32 against int8, fused, in turns (vimdeploy.bench); its weights are random, so
          its accuracy means nothing. `calibration` is the time `vimdeploy quantize` took with 256 images, all threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from official import official_content  # noqa: E402
from outliers import CHANNELS, FACTOR, inject  # noqa: E402

from vimdeploy.bench.host import describe_host  # noqa: E402
from vimdeploy.bench.measure import Effort, take_turns  # noqa: E402
from vimdeploy.bundle import read_info  # noqa: E402
from vimdeploy.evaluate import predict  # noqa: E402
from vimdeploy.export.exporter import ExportOptions, export_checkpoint  # noqa: E402
from vimdeploy.models.variants import VimConfig  # noqa: E402
from vimdeploy.quantize.images import load_images  # noqa: E402
from vimdeploy.quantize.recipe import QuantizeOptions, quantize_model  # noqa: E402
from vimdeploy.quantize.write import int8_kernels  # noqa: E402
from vimdeploy.runtimes import open_session  # noqa: E402
from vimdeploy.runtimes.base import Session  # noqa: E402
from vimdeploy.runtimes.onnxruntime import int8_overflows  # noqa: E402
from vimdeploy.verify.agreement import agreement  # noqa: E402

NAME = "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
#: The recipe, step by step: each adds to the one before, but for the last two, which quantize more.
STEPS: dict[str, dict[str, Any]] = {
    "largest value, one scale a tensor": {"method": "minmax", "smooth": False},
    "percentile 99.99": {"method": "percentile", "smooth": False},
    "bounds chosen layer by layer": {"method": "auto", "smooth": False},
    "smoothed, largest value": {"method": "minmax"},
    "smoothed, bounds chosen (the default)": {},
    "and x_proj, dt_proj": {"include": ("x_proj", "dt_proj")},
    "and patch embedding, head": {"include": ("x_proj", "dt_proj", "patch_embed", "head")},
}


def accuracy(folder: Path) -> dict[str, Any]:
    clean = export_checkpoint(
        ROOT / "examples" / "digits" / "vim_digits.pth", folder / "digits.vim", ExportOptions()
    ).model
    outliers = folder / "outliers.onnx"
    ir.save(inject(ir.load(clean), read_info(clean).fallback), outliers)
    images = load_images("digits-val", read_info(clean), limit=None, labelled=True)
    with open_session(clean) as session:
        reference = all_of(session, images.batch)
    rows = []
    for model, source in (("clean", clean), ("outliers", outliers)):
        for step, options in STEPS.items():
            made = quantize_model(source, folder / "x.int8.onnx", QuantizeOptions("digits", max_drop=100, **options))
            with open_session(made.path) as session:
                found = agreement(all_of(session, images.batch), reference, images.targets)
            rows.append({"model": model, "step": step, **found.to_dict(), "layers": made.info.quantization["int8"]})
            print(f"{model:9} {step:40} {found.text()}", flush=True)
    return {"channels": CHANNELS, "factor": FACTOR, "held_out": len(images), "steps": rows}


def all_of(session: Session, batch: np.ndarray) -> np.ndarray:
    return np.concatenate([predict(session, batch[i : i + 50]) for i in range(0, len(batch), 50)])


def speed(folder: Path, effort: Effort, threads: list[int]) -> dict[str, Any]:
    content = official_content(VimConfig(d_model=384), NAME, ema=False, optimizer=False, steady=True)
    torch.save(content, folder / "vim_small.pth")
    fp32 = export_checkpoint(folder / "vim_small.pth", folder / "vim_small.vim", ExportOptions()).model
    began = time.perf_counter()
    made = quantize_model(fp32, None, QuantizeOptions("digits", max_drop=100))
    calibration = {"images": 256, "total_s": round(time.perf_counter() - began, 1), "seconds": made.report["seconds"]}
    print(f"calibrated in {calibration['total_s']} s", flush=True)
    more = quantize_model(
        fp32,
        folder / "vim_small.vim" / "more.int8.onnx",
        QuantizeOptions("digits", max_drop=100, limit=16, include=("x_proj", "dt_proj")),
    )
    files = {"fp32": fp32, "int8": made.path, "int8 with x_proj, dt_proj": more.path}
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    milliseconds: dict[str, Any] = {}
    for count in threads:
        sessions = {name: open_session(file, threads=count) for name, file in files.items()}
        times, errors = take_turns({name: session.prepare(image) for name, session in sessions.items()}, effort)
        for session in sessions.values():
            session.close()
        if errors:
            raise next(iter(errors.values()))
        milliseconds[str(count)] = {name: timing.latency() for name, timing in times.items()}
        base = times["fp32"].latency()["p50"]
        for name, timing in times.items():
            p50 = timing.latency()["p50"]
            milliseconds[str(count)][name]["times_fp32"] = round(base / p50, 3)
            print(f"{count} threads, {name:26} {p50:8.2f} ms, {base / p50:.2f} times as fast as fp32", flush=True)
    return {
        "model": "Vim-S, 224 px, batch 1, random weights",
        "calibration": calibration,
        "milliseconds": milliseconds,
        "products": {name: int8_kernels(file) for name, file in files.items()},
        "bytes": {name: file.stat().st_size for name, file in files.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--only", choices=("accuracy", "speed"), action="append")
    parser.add_argument("--seconds", type=float, default=10.0, help="a contender and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.only and options.output and options.output.is_file():
        result = json.loads(options.output.read_text())
    result |= {"host": describe_host(), "int8_products": "exact, slower" if int8_overflows() else "VNNI"}
    with tempfile.TemporaryDirectory() as name:
        for part in options.only or ("accuracy", "speed"):
            folder = Path(name)
            if part == "accuracy":
                result["accuracy"] = accuracy(folder)
            else:
                effort = dataclasses.replace(Effort(), seconds=options.seconds, rounds=10)
                result["speed"] = speed(folder, effort, options.threads)
            if options.output:
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
