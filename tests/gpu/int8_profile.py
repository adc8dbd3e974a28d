"""Where TensorRT is: layer by layer, what an fp16 plan and the int8 one of the same model take.

    python int8_profile.py MODEL.onnx PLUGIN RESULTS.json [BATCH]

MODEL.onnx: an exported Vim, fp32 (int8_reference.py makes some). It is quantized by one bound for every layer, which
times do not depend on. Layers that take no time are left out.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# First, for how it has libraries loaded.
from int8_trt85 import flat_calibration

from vimdeploy.bench.measure import Effort, take_turns
from vimdeploy.bundle import read_info
from vimdeploy.engines.build import BuildOptions, build_engine
from vimdeploy.quantize.recipe import QuantizeOptions, quantize_model
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.tensorrt import TensorRTSession

RUNS = 12


def main(model: Path, plugin: Path, out: Path, batch: int = 64) -> None:
    import tensorrt

    config, device = read_info(model).config, cuda.device()
    fixed = {"min_batch": batch, "opt_batch": batch, "max_batch": batch}
    images = np.random.default_rng(0).standard_normal((batch, 3, *config.img_size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flat_calibration(model).write(folder / "flat.calib.json")
        made = quantize_model(model, folder / "int8.onnx", QuantizeOptions(folder / "flat.calib.json"))
        half = BuildOptions(precision="fp16", plugin=plugin, **fixed)
        plans = {
            "fp16": build_engine(model, folder / "fp16.plan", half).plan,
            "int8": build_engine(made.path, folder / "int8.plan", BuildOptions(int8=True, plugin=plugin, **fixed)).plan,
        }
        with TensorRTSession(plans["fp16"]) as one, TensorRTSession(plans["int8"]) as other:
            sessions = {"fp16": one, "int8": other}
            times, errors = take_turns({name: s.prepare(images) for name, s in sessions.items()}, Effort(1.0, 5))
            if errors:
                raise next(iter(errors.values()))
            layers = {name: profile(tensorrt, session, images) for name, session in sessions.items()}
    head = {
        "card": device.name,
        "tensorrt": tensorrt.__version__,
        "model": f"d_model {config.d_model}, {config.depth} layers, {config.img_size[0]} px",
        "batch": batch,
        "how": f"IProfiler, median of {RUNS} runs; busy: milliseconds an inference, one after another, without it",
        "busy_ms": {name: round(t.ms(), 3) for name, t in times.items()},
        "columns": ["us", "layer", "reads", "writes", "kernel"],
    }
    out.write_text(json.dumps({**head, **layers}, indent=1) + "\n")
    print(json.dumps(head["busy_ms"]))


def profile(module: Any, session: TensorRTSession, images: np.ndarray) -> list[list[Any]]:
    """Rows as `columns` says, in the engine's order."""
    taken: dict[str, list[float]] = {}

    class Profiler(module.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            taken.setdefault(layer_name, []).append(ms)

    inspector = session._engine.create_engine_inspector()
    described = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))["Layers"]
    profiler = Profiler()  # the context does not keep it alive
    session._context.profiler = profiler
    for _ in range(RUNS):
        session.run(images)
    rows = []
    for layer in described:
        us = 1e3 * float(np.median(taken.get(layer["Name"], [0.0])))
        if us > 0:
            kernel = layer.get("TacticName") or layer.get("PluginType") or layer.get("LayerType")
            ends = [tensors(layer.get(side)) for side in ("Inputs", "Outputs")]
            rows.append([round(us, 1), short(layer["Name"]), *ends, kernel])
    return rows


def short(name: str) -> str:
    """A layer's name without what TensorRT says around it."""
    name = re.sub(r"^Reformatting CopyNode for (\w+) Tensor (\d+) to ", r"reformat of \1 \2 of ", name)
    return re.sub(r"\.weight/Dequantize:conv:float \+ .*", "/MatMul (int8 convolution)", name)


def tensors(side: Any) -> str:
    return " ".join(f"{t.get('Format/Datatype')}{t.get('Dimensions')}" for t in side or ())[:60]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
