"""Parity: the PyTorch reference and an artifact, on the same images, output by output.

fp32 files are compared with the fp32 reference. fp16 and bf16 files are compared with the reference in fp64, and may
be at most twice as far from it as plain PyTorch in the same type (design.md, "What holds the checks honest").
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vimdeploy.bundle import ModelInfo, check_hash, read_info
from vimdeploy.errors import ModelFileError, RuntimeMissing, UsageError
from vimdeploy.models.checkpoints import Checkpoint, load_model, read_checkpoint
from vimdeploy.models.variants import settings_of
from vimdeploy.models.vim import Vim
from vimdeploy.runtimes.base import Session
from vimdeploy.runtimes.library import ort_library_path
from vimdeploy.runtimes.onnxruntime import OrtSession
from vimdeploy.verify import samples
from vimdeploy.verify.compare import FP32, Errors, Tolerance, errors, low_precision

RUNTIMES = {
    "onnxruntime": "ONNX Runtime with vimdeploy's op library",
    "onnxruntime-body": "ONNX Runtime on the file's function body",
}
_CHUNK = 8


@dataclass(frozen=True)
class Row:
    """One comparison: this output of this runtime on these images."""

    runtime: str  # a key of RUNTIMES
    description: str  # what ran, with its version
    output: str
    images: str  # random | real
    errors: Errors
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one artifact. It holds when there is at least one and every one holds."""

    artifact: str
    precision: str
    reference: str
    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # (runtime, why it was not compared)
    notices: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def summary(self) -> str:
        """The first thing that does not hold, or that all does."""
        for row in self.rows:
            if row.failures:
                return f"{row.output} on {row.images} images in {RUNTIMES[row.runtime]}: {'; '.join(row.failures)}"
        return "nothing was compared" if not self.rows else "parity holds"

    def to_dict(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact,
            "precision": self.precision,
            "reference": self.reference,
            "passed": self.passed,
            "rows": [
                {
                    "runtime": row.runtime,
                    "description": row.description,
                    "output": row.output,
                    "images": row.images,
                    "passed": row.passed,
                    "errors": row.errors.to_dict(),
                    "tolerance": {
                        "max_abs": row.tolerance.max_abs,
                        "rel_rms": row.tolerance.rel_rms,
                        "cosine": row.tolerance.cosine,
                        "reason": row.tolerance.reason,
                    },
                    "failures": list(row.failures),
                }
                for row in self.rows
            ],
            "skipped": [{"runtime": runtime, "reason": reason} for runtime, reason in self.skipped],
            "notices": list(self.notices),
        }


def parity(
    artifact: Path,
    checkpoint: Checkpoint | Path | str,
    *,
    runtimes: tuple[str, ...] | None = None,
    images: Path | None = None,
    samples_each: int = 4,
    seed: int = 0,
    name: str | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> ParityReport:
    """Compare `artifact` (an ONNX file) with the network of `checkpoint`, in every runtime asked for.

    Without `runtimes`, in all of RUNTIMES that this host and this file allow; one that is left out is in the report's
    `skipped`, with the reason. `images`: a folder or file of real images; without, the photographs that come along.
    Raises ModelFileError when the artifact is not of this checkpoint, RuntimeMissing when a runtime that was asked
    for, or every one, is not there.
    """
    check_hash(artifact)
    info = read_info(artifact)
    step("reference: loading")
    model = _reference(info, artifact, checkpoint)
    paths = samples.choose_images(images, samples_each)
    sets = {"random": samples.random_images(info, samples_each, seed), "real": samples.real_images(info, paths)}
    with ExitStack() as stack:
        sessions, skipped, notices = _sessions(stack, artifact, info, runtimes)
        static = next((s.shape[0] for session in sessions.values() for s in session.inputs.values()), None)
        sets = {key: _whole_batches(batch, static) for key, batch in sets.items()}
        wide = info.precision != "fp32"
        limits: dict[str, Tolerance] = {}
        wanted: dict[str, np.ndarray] = {}
        for key, batch in sets.items():
            step(f"reference: {key} images")
            wanted[key] = _compute(model.double() if wide else model, info, batch)
        if wide:
            plain = _plain(model, info.precision)
            for key, batch in sets.items():
                step(f"reference: {key} images in PyTorch {info.precision}")
                rough = _compute(plain, info, batch)
                limits[key] = low_precision(info.precision, errors(rough, wanted[key], ranked=_ranked(info)))
        rows = []
        for runtime, session in sessions.items():
            for key, batch in sets.items():
                step(f"{session.describe()}: {key} images")
                rows += _rows(runtime, session, info, key, batch, wanted[key], limits.get(key, FP32), static or _CHUNK)
    reference = f"PyTorch {torch.__version__} {'fp64' if wide else 'fp32'}"
    return ParityReport(name or str(artifact), info.precision, reference, tuple(rows), tuple(skipped), tuple(notices))


def _reference(info: ModelInfo, artifact: Path, checkpoint: Checkpoint | Path | str) -> Vim:
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    if checkpoint.sha256 != info.checkpoint_sha256:
        raise ModelFileError(
            f"{artifact} was not exported from {checkpoint.path} (the checkpoint's SHA-256 differs)",
            hint="name the checkpoint it came from, or export again",
        )
    model, _ = load_model(
        checkpoint,
        weights=info.weights,
        variant=settings_of(info.config.replace(img_size=info.trained_size)),
        img_size=info.config.img_size,
        pos_embed_mode=info.pos_embed_mode,
    )
    return model


def _sessions(
    stack: ExitStack, artifact: Path, info: ModelInfo, wanted: tuple[str, ...] | None
) -> tuple[dict[str, Session], list[tuple[str, str]], list[str]]:
    """Sessions to compare by their key in RUNTIMES, runtimes left out with the reason, and what the user must know."""
    unknown = set(wanted or ()) - set(RUNTIMES)
    if unknown:
        raise UsageError(f"no runtime is called {min(unknown)!r}", hint="runtimes: " + ", ".join(RUNTIMES))
    notices = []
    if info.precision == "bf16":
        artifact = _emulated(stack, artifact)
        notices.append("bf16 is emulated: ONNX Runtime has no bf16 kernels on this CPU, so each node computes in fp32 "
                       "and rounds its result to bf16; the library's bf16 kernel itself did not run")  # fmt: skip
    sessions: dict[str, Session] = {}
    skipped: list[tuple[str, str]] = []
    for runtime in wanted or RUNTIMES:
        try:
            if runtime == "onnxruntime-body" and info.fallback == "none":
                raise RuntimeMissing("the file carries no function body", hint="export it with --fallback scan")
            library = ort_library_path() if runtime == "onnxruntime" else None
            sessions[runtime] = stack.enter_context(OrtSession(artifact, library=library))
        except RuntimeMissing as missing:
            if wanted or not _optional(runtime, info):
                raise
            skipped.append((runtime, missing.message))
    if not sessions:
        raise RuntimeMissing("; ".join(reason for _, reason in skipped), hint="see `vimdeploy verify parity --help`")
    return sessions, skipped, notices


def _optional(runtime: str, info: ModelInfo) -> bool:
    """Whether a check may go on without this runtime when it was not asked for by name."""
    return runtime == "onnxruntime-body" or info.fallback != "none"


def _emulated(stack: ExitStack, artifact: Path) -> Path:
    import onnx_ir as ir

    from vimdeploy.passes.emulate import emulate_bf16

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vimdeploy-")))
    ir.save(emulate_bf16(ir.load(artifact)), folder / artifact.name)
    return folder / artifact.name


def _plain(model: Vim, precision: str) -> Vim:
    """The network as `model.half()` or `.bfloat16()` would have it, the op's fp32 inputs kept: A, D, dt bias."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    model = model.float()
    plain = copy.deepcopy(model).to(dtype)
    for name, parameter in plain.named_parameters():
        if name.rsplit(".", 1)[-1] in ("A_log", "A_b_log", "D", "D_b") or name.endswith(
            ("dt_proj.bias", "dt_proj_b.bias")
        ):
            parameter.data = model.get_parameter(name).data
    return plain


@torch.inference_mode()
def _compute(model: Vim, info: ModelInfo, batch: np.ndarray) -> np.ndarray:
    dtype = model.patch_embed.proj.weight.dtype
    parts = []
    for chunk in _chunks(batch, _CHUNK):
        image = torch.from_numpy(chunk).to(dtype)
        if info.output == "tokens":
            y = model.token_map(image)
        else:
            y = model(image, return_features=info.output == "features")
        parts.append(y.to(torch.float64).numpy())
    return np.concatenate(parts)


def _rows(
    runtime: str,
    session: Session,
    info: ModelInfo,
    images: str,
    batch: np.ndarray,
    want: np.ndarray,
    limit: Tolerance,
    chunk: int,
) -> list[Row]:
    """One row an output; an output missing, extra or misshapen is a row that fails."""
    parts = [session.run(part) for part in _chunks(batch, chunk)]
    rows = []
    for name in sorted({info.output, *parts[0]}):
        failed: tuple[str, ...]
        measured = Errors(0, float("inf"), float("inf"), -1.0, finite=False)
        if name not in parts[0]:
            failed = (f"the output {name!r} is missing",)
        elif name != info.output:
            failed = (f"the output {name!r} is not one the model should have",)
        else:
            try:
                measured = errors(np.concatenate([part[name] for part in parts]), want, ranked=_ranked(info))
                failed = tuple(limit.failures(measured))
            except ValueError as error:
                failed = (str(error),)
        rows.append(Row(runtime, session.describe(), name, images, measured, limit, failed))
    return rows


def _ranked(info: ModelInfo) -> bool:
    return info.output == "logits"


def _chunks(batch: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


def _whole_batches(batch: np.ndarray, static: int | None) -> np.ndarray:
    """The images, repeated from the start until a file of static batch can run them all."""
    missing = -len(batch) % static if static else 0
    return np.concatenate([batch, np.resize(batch, (missing, *batch.shape[1:]))]) if missing else batch
