"""Plans of any bytes, with sidecars that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_onnx import tiny_info

from vimdeploy.bundle import sha256_of
from vimdeploy.engines.profile import Profile
from vimdeploy.engines.sidecar import Sidecar, sidecar_path


def write_plan(plan: Path, content: bytes = b"a plan", **changes: Any) -> Sidecar:
    """A plan of any bytes with a sidecar that fits them, but for `changes`."""
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_bytes(content)
    values: dict[str, Any] = {
        "plan": {"file": plan.name, "sha256": sha256_of(plan), "bytes": len(content)},
        "runtime": {"name": "tensorrt", "version": "8.5.3.1"},
        "device": {"name": "NVIDIA H100 80GB HBM3", "sm": 90, "driver": "13.0"},
        "plugin": None,
        "profile": Profile("image", (1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32)),
        "precision": {"asked": "fp16", "source": "inspector", "projections": {"fp16": 1}, "islands": {}, "hidden": 0},
        "tf32": False,
        "version_compatible": False,
        "onnx": {"file": "model.onnx", "sha256": "0" * 64},
        "build": {"seconds": 1.0, "timing_cache": None, "workspace_bytes": None, "vimdeploy": "0"},
        "info": tiny_info(labels=("red", "green", "blue")),
    }
    sidecar = Sidecar(**{**values, **changes})
    sidecar_path(plan).write_text(json.dumps(sidecar.to_dict()))
    return sidecar
