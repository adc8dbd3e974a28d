"""What `vimdeploy inspect` says of an exported file: what it computes, with which operators, where it came from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from vimdeploy.bundle import MODEL_FILE, read_info, resolve_artifact, sha256_of
from vimdeploy.cli import render
from vimdeploy.cli.slim import mb


def is_model(path: Path) -> bool:
    """Whether `path` names an exported file, or a folder of one, rather than a checkpoint."""
    return path.suffix in (".onnx", ".vim") or (path / MODEL_FILE).is_file()


def describe_model(path: Path) -> dict[str, Any]:
    """All that is said, as plain values. Raises UsageError, ModelFileError."""
    import onnx_ir as ir

    from vimdeploy.export import schema

    file = resolve_artifact(path)
    info = read_info(file)
    model = ir.load(file)
    (image,) = model.graph.inputs
    sides = [] if image.shape is None else [side if isinstance(side, int) else str(side) for side in image.shape]
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
        "variant": info.variant,
        "config": info.config.to_dict(),
        "input": {"name": image.name, "shape": sides},
        "output": info.output,
        "precision": info.precision,
        "quantization": info.quantization,
        "fusion": info.fusion,
        "fallback": info.fallback,
        "opset": model.opset_imports[""],
        "nodes": len(model.graph),
        "ops": schema.used_in(model.graph),
        "functions": [function.name for function in model.functions.values()],
        "weights": info.weights,
        "checkpoint_sha256": info.checkpoint_sha256,
        "labels": len(info.labels),
        "vimdeploy": info.version,
    }


def show(report: dict[str, Any]) -> None:
    """The report on the terminal."""
    shape = ", ".join(map(str, report["input"]["shape"]))
    ops = ", ".join(f"{count} vim::{name}" for name, count in report["ops"].items())
    bodies = ", ".join(f"vim::{name}" for name in report["functions"])
    out = render.out()
    facts = [
        ("file", f"{report['file']}  {mb(report['bytes'])}"),
        ("", f"sha256 {report['sha256']}"),
        ("model", f"{report['variant']}, {report['weights']} weights"),
        ("from", f"a checkpoint of sha256 {report['checkpoint_sha256']}, by vimdeploy {report['vimdeploy'] or '?'}"),
        ("input", f"{report['input']['name']} ({shape})"),
        ("output", report["output"] + (f", {report['labels']} labels" if report["labels"] else "")),
        (
            "graph",
            f"{report['nodes']} nodes, opset {report['opset']}, {report['precision']}, fusion {report['fusion']}",
        ),
        *([("int8", _int8(report["quantization"]))] if report["quantization"] else []),
        ("operators", ops),
        ("fallback", f"{report['fallback']}: bodies of {bodies}" if bodies else "none: needs vimdeploy's library"),
    ]
    out.print(render.facts(facts))
    out.print(f"\nNext:\n  vimdeploy verify parity {shlex.quote(report['file'])}", highlight=False)


def _int8(made: dict[str, Any]) -> str:
    """What a quantized file says of its making."""
    kept = f"; in {', '.join(made['keep_fp'])} not" if made.get("keep_fp") else ""
    images = made.get("calibrated_on", {}).get("images", "?")
    found = f", {made['sqnr_db']:.1f} dB from fp32 there" if "sqnr_db" in made else ""
    return f"in {made.get('int8', '?')} layers{kept}; calibrated on {images} images{found}"
