"""`export_checkpoint`: a checkpoint in, a `.vim` folder (or one `.onnx` file) out.

torch.export → translate → fuse → precision → function bodies → metadata → written beside, checked, renamed into place.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch

import vimdeploy
from vimdeploy import bundle
from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import CheckFailed, ExportError, UsageError
from vimdeploy.export import functions, schema
from vimdeploy.export.translate import BATCH, OPSETS, translate
from vimdeploy.models.checkpoints import Checkpoint, read_checkpoint
from vimdeploy.models.loading import load_model
from vimdeploy.models.recognise import Recognition
from vimdeploy.models.vim import Vim
from vimdeploy.passes.fuse import FUSIONS, fuse
from vimdeploy.passes.precision import BF16_OPSET, PRECISIONS, to_precision
from vimdeploy.preprocess import Preprocessing

OUTPUTS = ("logits", "features", "tokens")
INPUT = "images"
DEFAULT_OPSET = 18
_PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class ExportOptions:
    """What `vimdeploy export` can be told; see its `--help`. `img_size` is (height, width), None keeps the trained."""

    weights: str = "model"
    variant: str | None = None
    img_size: tuple[int, int] | None = None
    pos_embed_mode: str = "layout"
    precision: str = "fp32"
    opset: int | None = None
    static_batch: int | None = None
    fallback: str = "scan"
    fusion: str = "full"
    output: str = "logits"
    labels: tuple[str, ...] = field(default=())

    @property
    def resolved_opset(self) -> int:
        """18, or 22 for bf16, whose convolutions are newer; or what was asked for."""
        return self.opset or (BF16_OPSET if self.precision == "bf16" else DEFAULT_OPSET)

    def validate(self) -> ExportOptions:
        """Return self, or raise UsageError naming the first value that cannot be."""
        choices = {"precision": PRECISIONS, "fallback": functions.FALLBACKS, "fusion": FUSIONS, "output": OUTPUTS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.resolved_opset not in OPSETS:
            raise UsageError(
                f"opset {self.resolved_opset} cannot be written", hint=f"choose {OPSETS[0]} to {OPSETS[-1]}"
            )
        if self.static_batch is not None and self.static_batch < 1:
            raise UsageError(f"a static batch is at least 1, not {self.static_batch}")
        return self


class Report(Protocol):
    """What a check of the written file returns: whether it held, and the record of it."""

    @property
    def passed(self) -> bool: ...
    def summary(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ExportResult:
    """What was written: `path` is the folder or file the user asked for, `model` the ONNX file itself."""

    path: Path
    model: Path
    info: ModelInfo
    recognition: Recognition
    opset: int
    nodes: int
    ops: dict[str, int]  # vim:: operators: how many nodes of each
    weight_bytes: int
    file_bytes: int
    seconds: float
    report: Report | None


def export_checkpoint(
    checkpoint: Checkpoint | Path | str,
    out: Path | None = None,
    options: ExportOptions | None = None,
    *,
    check: Callable[[Path], Report] | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Export to `out`: a folder (by default the checkpoint's name with `.vim`, here), or a file when it ends in .onnx.

    `check` sees the finished file before it takes its place; when its report does not hold, CheckFailed is raised and
    nothing is left. `step` hears what is being done. Raises CheckpointError, VariantError, UsageError, ExportError.
    """
    options = (options or ExportOptions()).validate()
    started = time.perf_counter()
    step("reading the checkpoint")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    out = Path(f"{checkpoint.path.stem}.vim") if out is None else out
    _check_target(out)
    model, recognition = load_model(
        checkpoint,
        weights=options.weights,
        variant=options.variant,
        img_size=options.img_size,
        pos_embed_mode=options.pos_embed_mode,
    )
    info = _describe(checkpoint, recognition, options)
    weight_bytes = sum(p.numel() for p in model.parameters()) * (4 if options.precision == "fp32" else 2)
    onnx_model = export_model(model, options, step=step)
    onnx_model.metadata_props.update(info.to_props())
    onnx_model.producer_version = vimdeploy.__version__

    single = out.suffix == ".onnx"
    with bundle.replacing_file(out) if single else bundle.replacing_folder(out) as scratch:
        file = scratch if single else scratch / bundle.MODEL_FILE
        size = _save(onnx_model, file, step)
        seconds = time.perf_counter() - started
        if not single:
            bundle.write_manifest(scratch, *_provenance(checkpoint, out, info, options))
        report = _run_check(check, file)
        if report is not None and not single:
            bundle.write_report(scratch, report.to_dict())
    return ExportResult(
        path=out,
        model=out if single else out / bundle.MODEL_FILE,
        info=info,
        recognition=recognition,
        opset=options.resolved_opset,
        nodes=len(onnx_model.graph),
        ops=schema.used_in(onnx_model.graph),
        weight_bytes=weight_bytes,
        file_bytes=size,
        seconds=seconds,
        report=report,
    )


def export_model(model: Vim, options: ExportOptions, *, step: Callable[[str], None] = lambda text: None) -> ir.Model:
    """The network as an ONNX model with its function bodies, not yet saved. Freezes `model` in place (Vim.freeze)."""
    options.validate()
    if options.output == "logits" and not model.config.num_classes:
        raise UsageError(
            "the checkpoint has no classifier head, so there are no logits", hint="--output features or tokens"
        )
    model.freeze()
    step("tracing the network")
    program = _trace(model, options)
    step("writing the graph")
    onnx_model = translate(program, opset=options.resolved_opset, input_name=INPUT, output_name=options.output)
    fuse(onnx_model, options.fusion)
    to_precision(onnx_model, options.precision)
    functions.attach(onnx_model, options.fallback)
    return onnx_model


def _trace(model: Vim, options: ExportOptions) -> torch.export.ExportedProgram:
    batch = options.static_batch or 2  # 2: torch specialises a dimension of 1
    example = torch.zeros(batch, model.config.in_chans, *model.config.img_size)
    dynamic = None if options.static_batch else ({0: torch.export.Dim(BATCH)},)
    with _forward_as(model, options.output), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about its internals
        return torch.export.export(model, (example,), dynamic_shapes=dynamic)


@contextlib.contextmanager
def _forward_as(model: Vim, output: str) -> Iterator[None]:
    """Let `model` compute `output` when called. A wrapper module would prefix every name in the graph."""
    if output != "logits":
        model.forward = {  # type: ignore[method-assign, assignment]
            "tokens": model.token_map,
            "features": lambda image: Vim.forward(model, image, return_features=True),
        }[output]
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


def _describe(checkpoint: Checkpoint, recognition: Recognition, options: ExportOptions) -> ModelInfo:
    config = recognition.config
    labels: Sequence[str] = options.labels or checkpoint.args.get("class_names") or ()
    if labels and len(labels) != config.num_classes:
        if options.labels:
            raise UsageError(f"{len(labels)} labels for {config.num_classes} classes", hint="one label a line")
        labels = ()  # the checkpoint's own are of another head
    return ModelInfo(
        variant=recognition.variant,
        config=config,
        preprocessing=Preprocessing.for_config(config, checkpoint.args).to_dict(),
        checkpoint_sha256=checkpoint.sha256,
        weights=options.weights,
        precision=options.precision,
        output=options.output,
        fallback=options.fallback,
        fusion=options.fusion,
        version=vimdeploy.__version__,
        labels=tuple(str(label) for label in labels),
        trained_size=recognition.trained_size,
        pos_embed_mode=options.pos_embed_mode,
    )


def _provenance(
    checkpoint: Checkpoint, out: Path, info: ModelInfo, options: ExportOptions
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the manifest says: the checkpoint, and how the model file was made."""
    source = {
        "path": os.path.relpath(checkpoint.path.resolve(), out.resolve()),
        "sha256": checkpoint.sha256,
        "weights": options.weights,
    }
    made = {
        "made_by": "export",
        "vimdeploy": vimdeploy.__version__,
        "opset": options.resolved_opset,
        "precision": info.precision,
        "output": info.output,
        "fallback": info.fallback,
        "fusion": info.fusion,
    }
    return source, {bundle.MODEL_FILE: made}


def _save(model: ir.Model, path: Path, step: Callable[[str], None]) -> int:
    """Write the file; its size in bytes."""
    step("writing the file")
    proto = ir.to_proto(model)
    size = proto.ByteSize()
    if size > _PROTOBUF_LIMIT:
        raise ExportError(
            f"the model is {size / 1e9:.1f} GB, and one ONNX file holds 2 GB", hint="export with --precision fp16"
        )
    return path.write_bytes(proto.SerializeToString())


def _run_check(check: Callable[[Path], Report] | None, file: Path) -> Report | None:
    if check is None:
        return None
    report = check(file)
    if not report.passed:
        raise CheckFailed(
            f"the exported file does not match the PyTorch reference: {report.summary()}. Nothing was written",
            hint="export with --no-verify to keep the file and look at it with `vimdeploy verify parity`",
        )
    return report


def _check_target(out: Path) -> None:
    """Refuse to replace what is not ours, before any work is done."""
    if out.suffix == ".onnx":
        if out.is_dir():
            raise UsageError(f"{out} is a folder", hint="name a file, or a folder that ends in .vim")
        return
    if Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(
            f"{out} is the current folder, or one above it, and an export takes its folder's place",
            hint="name a folder to make, such as -o model.vim",
        )
    if out.is_file():
        raise UsageError(f"{out} is a file; an export is a folder", hint="name a folder, or a file ending in .onnx")
    if out.is_dir() and any(out.iterdir()) and not (out / bundle.MANIFEST).is_file():
        raise UsageError(
            f"{out} is a folder that vimdeploy did not make, and would be replaced", hint="choose another with -o"
        )
