"""Parity: the PyTorch reference and an artifact, on the same images, output by output.

fp32 files are compared with the fp32 reference. fp16 and bf16 files are compared with the reference in fp64, and may
be at most twice as far from it as plain PyTorch in the same type (design.md, "What holds the checks honest"). No torch
is needed where the reference comes from a file (reference.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vimdeploy.bundle import ModelInfo, check_hash, read_info
from vimdeploy.errors import ModelFileError, RuntimeMissing, UsageError
from vimdeploy.runtimes import open_session
from vimdeploy.runtimes.base import Session
from vimdeploy.runtimes.library import ENVIRONMENT, ort_cuda_library_path, ort_library_path
from vimdeploy.verify import compare, samples
from vimdeploy.verify.compare import Errors, Tolerance, errors
from vimdeploy.verify.overflow import explain
from vimdeploy.verify.reference import CHUNK, Reference, SavedReference, TorchReference, chunks, ranked

if TYPE_CHECKING:
    from vimdeploy.models.checkpoints import Checkpoint

RUNTIMES = {
    "onnxruntime": "ONNX Runtime with vimdeploy's op library",
    "onnxruntime-body": "ONNX Runtime on the file's function body",
    "onnxruntime-cuda": "ONNX Runtime's CUDA provider with vimdeploy's op library",
    "torch-cuda": "PyTorch on vimdeploy's CUDA kernels",
    "tensorrt": "TensorRT on a plan of the file",
}
#: What issue 3 asks of an fp16 plan, whatever PyTorch's own fp16 error is.
PLAN_FP16 = Tolerance(rel_rms=1e-2, cosine=0.9999, max_abs=None, reason="the bound for fp16 plans")


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
    file: str = ""  # the artifact's name, of which there may be several
    precision: str = "fp32"

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
                    "file": row.file,
                    "precision": row.precision,
                    "description": row.description,
                    "output": row.output,
                    "images": row.images,
                    "passed": row.passed,
                    "errors": {**row.errors.to_dict(), "sqnr_db": row.errors.sqnr_db if row.errors.finite else None},
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


@dataclass(frozen=True)
class Candidate:
    """One artifact in one runtime, ready to run."""

    runtime: str  # a key of RUNTIMES
    file: str
    session: Session
    precision: str  # fp32 | fp16 | bf16 | int8: which reference and limits it is held to
    cap: Tolerance | None = None  # limits besides the measured ones
    onnx: Path | None = None  # the graph it was made of, to look for overflow in


def parity(
    artifact: Path,
    checkpoint: Checkpoint | Path | str | None = None,
    *,
    runtimes: tuple[str, ...] | None = None,
    images: Path | None = None,
    samples_each: int = 4,
    seed: int = 0,
    name: str | None = None,
    step: Callable[[str], None] = lambda text: None,
    plans: tuple[Path, ...] = (),
    quantized: tuple[Path, ...] = (),
    plugin: Path | None = None,
    reference: Path | None = None,
    save_reference: Path | None = None,
) -> ParityReport:
    """Compare `artifact` (an ONNX file or a plan), and `plans` and `quantized` files made of it, with `checkpoint`.

    Without `runtimes`, in all of RUNTIMES that this host and this file allow; one that is left out is in the report's
    `skipped`, with the reason. `images`: a folder or file of real images; without, the photographs that come along.
    `reference`: a file that `save_reference` wrote elsewhere takes the place of checkpoint, images and torch. `plugin`:
    the plans' plugin library. What is int8 is compared on real images only, and on named ones: photographs and noise
    are not what its ranges were measured on. Raises ModelFileError when the artifact is not of this checkpoint,
    UsageError for an int8 artifact without images, RuntimeMissing when a runtime that was asked for, or every one, is
    not there.
    """
    is_plan = artifact.suffix == ".plan"
    if is_plan:
        from vimdeploy.engines.sidecar import read_sidecar

        info, plans = read_sidecar(artifact).info, (artifact,)
    else:
        check_hash(artifact)
        info = read_info(artifact)
    if info.quantization and images is None and reference is None:
        raise UsageError(
            f"{artifact} is int8, and says what it should on images like those it was calibrated on",
            hint="name some with --images",
        )
    truth: Reference
    colour = info.config.in_chans == 3
    if reference is not None:
        truth = SavedReference(reference)
        truth.check(info, artifact)
    else:
        if checkpoint is None:
            raise UsageError("there is nothing to compare with", hint="name a checkpoint, or a file with --reference")
        sets = {"random": samples.random_images(info, samples_each, seed)}
        if colour:
            sets["real"] = samples.real_images(info, samples.choose_images(images, samples_each))
        elif images is not None:
            raise UsageError(f"the model reads {info.config.in_chans} channels; images give 3 (RGB)",
                             hint="leave --images out: random inputs are compared")  # fmt: skip
        step("reference: loading")
        truth = TorchReference(info, artifact, checkpoint, sets, step)
        if save_reference is not None:
            truth.save(save_reference)
    with ExitStack() as stack:
        candidates, skipped, notices = _candidates(stack, None if is_plan else artifact, plans, info, runtimes, plugin)
        if not colour:
            notices.append(f"random inputs only: the model reads {info.config.in_chans} channels, images give 3 (RGB)")
        if not is_plan and (not runtimes or any(runtime.startswith("onnxruntime") for runtime in runtimes)):
            found, left_out = _quantized(stack, quantized, runtimes, images is not None or reference is not None)
            candidates, skipped = candidates + found, skipped + left_out
        rows = []
        references = []
        for candidate in candidates:
            truth.check(candidate.session.info, Path(candidate.file))
            int8 = candidate.precision == "int8"
            if int8 and images is None and reference is None:
                skipped.append((candidate.file, _NAME_IMAGES))
                continue
            wanted = truth.wanted("fp32" if int8 else candidate.precision)
            references.append(wanted.reference)
            limit = compare.int8(candidate.session.info.quantization) if int8 else wanted.tolerance
            limit = _capped(limit, candidate.cap)
            for key, batch in truth.images.items():
                if int8 and key != "real":
                    continue
                step(f"{candidate.session.describe()}: {key} images")
                rows += _rows(candidate, info, key, batch, wanted.outputs[key], limit)
    return ParityReport(name or str(artifact), info.kind, " and ".join(dict.fromkeys(references)), tuple(rows),
                        tuple(skipped), tuple(notices))  # fmt: skip


def _candidates(
    stack: ExitStack,
    artifact: Path | None,
    plans: tuple[Path, ...],
    info: ModelInfo,
    wanted: tuple[str, ...] | None,
    plugin: Path | None,
) -> tuple[list[Candidate], list[tuple[str, str]], list[str]]:
    """What to compare, what is left out with the reason, and what the user must know."""
    unknown = set(wanted or ()) - set(RUNTIMES)
    if unknown:
        raise UsageError(f"no runtime is called {min(unknown)!r}", hint="runtimes: " + ", ".join(RUNTIMES))
    found: list[Candidate] = []
    skipped: list[tuple[str, str]] = []
    notices: list[str] = []
    ort = [runtime for runtime in wanted or _usual() if runtime.startswith("onnxruntime")]
    torch_cuda = bool(wanted and "torch-cuda" in wanted)
    if artifact is None and wanted and (ort or torch_cuda):
        raise UsageError("a plan runs in TensorRT only", hint="name the .onnx file to compare it in ONNX Runtime")
    if artifact is not None and torch_cuda:
        session = stack.enter_context(open_session(artifact, runtime="torch-cuda"))
        cap = PLAN_FP16 if info.precision == "fp16" else None
        found.append(Candidate("torch-cuda", artifact.name, session, info.precision, cap))
    if artifact is not None and ort:
        if not wanted and plans and importlib.util.find_spec("onnxruntime") is None:
            skipped.append(("onnxruntime", "it is not installed"))
        else:
            sessions, left_out, notices = _sessions(stack, artifact, info, tuple(ort), asked=bool(wanted))
            skipped += left_out
            found += [
                Candidate(runtime, artifact.name, session, info.kind, onnx=None if info.quantization else artifact)
                for runtime, session in sessions.items()
            ]
    if wanted and "tensorrt" in wanted and not plans:
        raise UsageError("there is no plan to compare", hint="make one with `vimdeploy build-engine`")
    if not wanted or "tensorrt" in wanted:
        for plan in plans:
            try:
                found.append(_plan(stack, plan, plugin))
            except RuntimeMissing as missing:
                # A folder may travel to a host without a card; what was named may not be passed over.
                if wanted or artifact is None:
                    raise
                skipped.append((plan.name, missing.message))
    if not found:
        raise RuntimeMissing("; ".join(reason for _, reason in skipped), hint="see `vimdeploy verify parity --help`")
    return found, skipped, notices


_NAME_IMAGES = "int8 is compared on images like those it was calibrated on: name some with --images"


def _quantized(
    stack: ExitStack, files: tuple[Path, ...], runtimes: tuple[str, ...] | None, have_images: bool
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The int8 files that lie beside the model, in ONNX Runtime."""
    if not have_images:
        return [], [(file.name, _NAME_IMAGES) for file in files]
    found, skipped = [], []
    for file in files:
        check_hash(file)
        info = read_info(file)
        usual = ("onnxruntime", "onnxruntime-body")
        chosen = tuple(runtime for runtime in runtimes or usual if runtime in usual)
        if not chosen:
            skipped.append((file.name, "int8 files run in ONNX Runtime on the CPU"))
            continue
        sessions, left_out, _ = _sessions(stack, file, info, chosen, asked=bool(runtimes))
        skipped += [(f"{file.name}, {runtime}", reason) for runtime, reason in left_out]
        found += [Candidate(runtime, file.name, session, "int8") for runtime, session in sessions.items()]
    return found, skipped


def _usual() -> tuple[str, ...]:
    """What is compared when nothing is asked for: a card's runtimes where their library is installed."""
    with_card = True
    try:
        ort_cuda_library_path()
    except RuntimeMissing:
        with_card = False
    return tuple(r for r in RUNTIMES if r != "torch-cuda" and (with_card or r != "onnxruntime-cuda"))


def _plan(stack: ExitStack, plan: Path, plugin: Path | None) -> Candidate:
    from vimdeploy.runtimes.tensorrt import TensorRTSession

    session = TensorRTSession(plan, plugin=plugin)
    stack.enter_context(session)
    precision = session.sidecar.precision["asked"]
    if precision == "fp32" and session.sidecar.tf32:
        precision = "fp16"  # TF32 products have fp16's 10 bits
    onnx = None if precision == "int8" else plan.parent / str(session.sidecar.onnx["file"])
    cap = PLAN_FP16 if precision == "fp16" else None
    return Candidate("tensorrt", plan.name, session, precision, cap, onnx)


def _capped(limit: Tolerance, cap: Tolerance | None) -> Tolerance:
    """The tighter of the measured limits and `cap`."""
    if cap is None or cap.rel_rms >= limit.rel_rms:
        return limit
    return dataclasses.replace(cap, cosine=max(cap.cosine, limit.cosine))


def _sessions(
    stack: ExitStack, artifact: Path, info: ModelInfo, runtimes: tuple[str, ...], *, asked: bool
) -> tuple[dict[str, Session], list[tuple[str, str]], list[str]]:
    """Sessions of ONNX Runtime by their key in RUNTIMES, runtimes left out with the reason, and notices.

    `asked`: the user named these runtimes, so none may be left out.
    """
    from vimdeploy.runtimes.onnxruntime import NoFunctionBody, OrtSession

    notices = []
    exported = artifact
    if info.precision == "bf16" and set(runtimes) != {"onnxruntime-cuda"}:
        artifact = _emulated(stack, artifact)
        notices.append("bf16 is emulated: ONNX Runtime has no bf16 kernels on this CPU, so each node computes in fp32 "
                       "and rounds its result to bf16; the library's bf16 kernel itself did not run")  # fmt: skip
    sessions: dict[str, Session] = {}
    skipped: list[tuple[str, str]] = []
    for runtime in runtimes:
        library = None
        try:
            if runtime == "onnxruntime":
                library = ort_library_path()
            elif runtime == "onnxruntime-cuda":
                library = ort_cuda_library_path()
                sessions[runtime] = stack.enter_context(_on_card(exported, library))
                continue
            elif info.fallback == "none":
                raise RuntimeMissing("the file carries no function body", hint="export it with --fallback scan")
        except RuntimeMissing as missing:
            # What is not installed may be left out; what the user named may not, and what does not load is an error.
            named = runtime == "onnxruntime" and os.environ.get(ENVIRONMENT)
            if asked or named or not _optional(runtime, info):
                raise
            skipped.append((runtime, missing.message))
            continue
        try:
            sessions[runtime] = stack.enter_context(OrtSession(artifact, library=library))
        except NoFunctionBody as error:
            raise ModelFileError(
                f"{artifact} says that it carries a function body ({info.fallback}), and has none",
                hint="export it again: something has dropped the body since",
            ) from error
    if not sessions:
        raise RuntimeMissing("; ".join(reason for _, reason in skipped), hint="see `vimdeploy verify parity --help`")
    return sessions, skipped, notices


def _on_card(artifact: Path, library: Path) -> Session:
    from vimdeploy.runtimes.onnxruntime_cuda import OrtCudaSession

    return OrtCudaSession(artifact, library=library)


def _optional(runtime: str, info: ModelInfo) -> bool:
    """Whether a check may go on without this runtime when it was not asked for by name."""
    return runtime != "onnxruntime" or info.fallback != "none"


def _emulated(stack: ExitStack, artifact: Path) -> Path:
    import onnx_ir as ir

    from vimdeploy.passes.emulate import emulate_bf16

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vimdeploy-")))
    ir.save(emulate_bf16(ir.load(artifact)), folder / artifact.name)
    return folder / artifact.name


def _rows(
    candidate: Candidate, info: ModelInfo, images: str, batch: np.ndarray, want: np.ndarray, limit: Tolerance
) -> list[Row]:
    """One row an output; an output missing, extra or misshapen is a row that fails."""
    outputs = _run(candidate.session, batch)
    rows = []
    for name in sorted({info.output, *outputs}):
        failed: tuple[str, ...]
        measured = Errors(0, float("inf"), float("inf"), -1.0, finite=False)
        if name not in outputs:
            failed = (f"the output {name!r} is missing",)
        elif name != info.output:
            failed = (f"the output {name!r} is not one the model should have",)
        else:
            try:
                measured = errors(outputs[name], want, ranked=ranked(info))
                failed = tuple(limit.failures(measured))
                if not measured.finite:
                    failed += (explain(candidate.onnx, candidate.precision, batch, outputs[name]),)
            except ValueError as error:
                failed = (str(error),)
        rows.append(Row(candidate.runtime, candidate.session.describe(), name, images, measured, limit, failed,
                        candidate.file, candidate.precision))  # fmt: skip
    return rows


def _run(session: Session, batch: np.ndarray) -> Mapping[str, np.ndarray]:
    """All images, a few at a time; a last batch that a file of static batch cannot take is filled up and cut."""
    ((_, spec),) = session.inputs.items()
    size = spec.shape[0] or CHUNK
    parts = []
    for part in chunks(batch, size):
        missing = size - len(part) if spec.shape[0] else 0
        full = np.concatenate([part, np.resize(part, (missing, *part.shape[1:]))]) if missing else part
        outputs = session.run(full.astype(spec.dtype, copy=False))
        # A wrong first dimension is left for the comparison to see.
        cut = {k: y[: len(part)] if missing and y.shape[:1] == (size,) else y for k, y in outputs.items()}
        parts.append(cut)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
