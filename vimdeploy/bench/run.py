"""`bench`: from artifacts and the names of baselines to results.

Which contenders meet in which case -> each opened, its memory measured -> they take turns -> rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vimdeploy.bench import memory
from vimdeploy.bench.contenders import (
    ArtifactContender,
    Contender,
    DeitContender,
    Opened,
    PublishedContender,
    cache_folder,
    check_against,
    short_name,
)
from vimdeploy.bench.deit import DeitShape
from vimdeploy.bench.energy import LEAST_SECONDS, meter
from vimdeploy.bench.host import describe_host
from vimdeploy.bench.measure import Effort, Timing, take_turns
from vimdeploy.bench.results import Results, Row
from vimdeploy.bundle import ModelInfo, checkpoint_of, read_info
from vimdeploy.errors import UsageError, VimDeployError
from vimdeploy.runtimes import best_runtime

Size = tuple[int, int]


@dataclass(frozen=True)
class Options:
    """What `vimdeploy bench` can be told; see its `--help`. None leaves a choice to the artifact."""

    batches: tuple[int, ...] = (1,)
    img_sizes: tuple[Size, ...] = ()
    against: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    threads: int | None = None
    library: str = "auto"
    plugin: str | None = None
    memory: bool = True
    effort: Effort = field(default_factory=Effort)
    mamba_library: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "img_sizes": [list(size) for size in self.img_sizes]}


class Progress:
    """What a run tells while it works; this one tells nobody."""

    def start(self, steps: int) -> None:
        """So many steps lie ahead."""

    def step(self, text: str) -> None:
        """One is about to be done."""

    def advance(self) -> None:
        """One is done."""


def bench(artifacts: Sequence[Path], options: Options | None = None, progress: Progress | None = None) -> Results:
    """Measure `artifacts` (ONNX files, plans, or checkpoints) and what they are compared with.

    A contender that fails in a case, for want of memory say, is a row that says so. Raises UsageError, ModelFileError,
    RuntimeMissing for what cannot be measured at all.
    """
    options, progress = options or Options(), progress or Progress()
    if not artifacts:
        raise UsageError("there is nothing to measure", hint="name a .vim folder, an .onnx file or a .plan")
    check_against(options.against)
    contenders = find_contenders(artifacts, options, progress.step)
    sizes = sorted({contender.img_size for contender in contenders})
    cases = [
        (batch, [contender for contender in contenders if contender.img_size == size])
        for size in sizes
        for batch in options.batches
    ]
    progress.start(sum(len(group) * (options.effort.rounds + 2) for _, group in cases))
    rows: list[Row] = []
    for batch, group in cases:
        rows += measure_case(group, batch, options, progress)
    return Results(describe_host(), options.to_dict(), tuple(rows))


def find_contenders(
    artifacts: Sequence[Path], options: Options, step: Callable[[str], None] = lambda text: None
) -> list[Contender]:
    """Every artifact at every size, in every runtime asked for, then its baselines; each once."""
    found: dict[tuple[str, Size], Contender] = {}
    for artifact in artifacts:
        for path, info, size in _at_sizes(artifact, options, step):
            for runtime in _runtimes(path, options):
                mine = _artifact(artifact, path, info, size, runtime, options)
                for contender in (mine, *_baselines(artifact, path, info, mine, options)):
                    found.setdefault((contender.name, contender.img_size), contender)
    return sorted(found.values(), key=lambda contender: contender.role)  # "artifact" before "baseline"


def _runtimes(path: Path, options: Options) -> tuple[str, ...]:
    if path.suffix == ".plan":
        return ("tensorrt",)
    return tuple(r for r in options.runtimes if r != "tensorrt") or (best_runtime(path, options.library),)


def _artifact(
    named: Path, path: Path, info: ModelInfo, size: Size, runtime: str, options: Options
) -> ArtifactContender:
    on_card = runtime in ("onnxruntime-cuda", "tensorrt", "torch-cuda") or (runtime == "torch" and _torch_on_card())
    precision = "fp32" if runtime == "torch" else getattr(info, "kind", info.precision)
    label = f"{_stem(named)}, {path.name if path.suffix == '.plan' else runtime}"
    return ArtifactContender(
        name=label,
        model=short_name(info),
        precision=precision,
        img_size=size,
        tokens=info.config.seq_len,
        on_card=on_card,
        memory=_counter(runtime, on_card),
        path=str(path),
        runtime=runtime,
        library=options.library,
        plugin=options.plugin if path.suffix == ".plan" else None,
    )


def _stem(named: Path) -> str:
    """What the user calls an artifact: its folder, or its file."""
    return named.parent.stem if named.parent.suffix == ".vim" else named.stem


def _baselines(named: Path, path: Path, info: ModelInfo, mine: ArtifactContender, options: Options) -> list[Contender]:
    """What `mine` is compared with. Baselines on the card are fp16 where the artifact is low; on the CPU fp32."""
    found: list[Contender] = []
    low = mine.on_card and mine.precision != "fp32"
    common: dict[str, Any] = {"img_size": mine.img_size, "on_card": mine.on_card}
    precision = "fp16" if low else "fp32"
    shape, stem = DeitShape.beside(info.config), _stem(named)

    def against_deit(runtime: str, how: str, fused: bool = True) -> DeitContender:
        return DeitContender(
            name=f"{shape.name}, {how}",
            model=shape.name,
            precision=precision,
            tokens=shape.tokens,
            memory=_counter(runtime, mine.on_card),
            shape=shape,
            runtime=runtime,
            fused=fused,
            **common,
        )

    for name in options.against:
        if name == "deit":
            if mine.runtime in ("onnxruntime", "onnxruntime-cuda", "tensorrt"):
                found.append(against_deit(mine.runtime, mine.runtime))
            if mine.on_card or mine.runtime == "torch":
                found.append(against_deit("torch", "torch SDPA"))
        elif name == "deit-compile":
            found.append(against_deit("torch-compile", "torch.compile"))
        elif name == "deit-unfused":
            on_cpu_ort = mine.runtime == "onnxruntime"
            runtime = "onnxruntime" if on_cpu_ort else "torch"
            found.append(against_deit(runtime, f"attention unfused, {runtime}", fused=False))
        elif name == "torch":
            onnx = _onnx_of(path)
            found.append(
                PublishedContender(
                    name=f"{stem} as published, torch",
                    model=mine.model,
                    precision=precision,
                    tokens=mine.tokens,
                    memory=_counter("torch", mine.on_card),
                    path=str(onnx),
                    mamba_library=options.mamba_library,
                    **common,
                )
            )
        elif name == "onnxruntime":
            runtime = "onnxruntime-cuda" if mine.on_card else "onnxruntime"
            found.append(
                ArtifactContender(
                    name=f"{stem}, {runtime} without vimdeploy's library",
                    model=mine.model,
                    precision=info.precision,
                    tokens=mine.tokens,
                    memory=_counter(runtime, mine.on_card),
                    path=str(_onnx_of(path)),
                    runtime=runtime,
                    library="off",
                    baseline=True,
                    **common,
                )
            )
    return found


def _onnx_of(path: Path) -> Path:
    """The ONNX file a plan was built from; any other file is itself."""
    if path.suffix != ".plan":
        return path
    from vimdeploy.engines.sidecar import read_sidecar

    onnx = path.parent / str(read_sidecar(path).onnx["file"])
    if not onnx.is_file():
        raise UsageError(f"{onnx}, which {path.name} was built from, is gone", hint="leave out --against torch")
    return onnx


def _counter(runtime: str, on_card: bool) -> str:
    if not on_card:
        return "process"
    return "torch" if runtime.startswith("torch") else "driver"


def _torch_on_card() -> bool:
    import torch

    return bool(torch.cuda.is_available())


# Artifacts at other sizes.


def _at_sizes(artifact: Path, options: Options, step: Callable[[str], None]) -> list[tuple[Path, ModelInfo, Size]]:
    """The artifact at each size asked for: itself, or an export of its checkpoint out of the cache."""
    if artifact.suffix in (".pth", ".pt", ".safetensors", ".bin"):
        return [_exported(artifact, None, size, step) for size in options.img_sizes or (None,)]
    info = _info(artifact)
    found = []
    for size in options.img_sizes or (info.config.img_size,):
        if size == info.config.img_size:
            found.append((artifact, info, size))
            continue
        if info.kind == "int8":
            raise UsageError(
                f"{artifact} is quantized for {_text(info.config.img_size)} px", hint="name a file for each size"
            )
        onnx = _onnx_of(artifact)
        path, resized, _ = _exported(checkpoint_of(onnx), info, size, step)
        found.append((_built(artifact, path, options, step) if artifact.suffix == ".plan" else path, resized, size))
    return found


def _info(artifact: Path) -> ModelInfo:
    if artifact.suffix == ".plan":
        from vimdeploy.engines.sidecar import read_sidecar

        return read_sidecar(artifact).info
    return read_info(artifact)


def _exported(
    checkpoint: Path, like: ModelInfo | None, size: Size | None, step: Callable[[str], None]
) -> tuple[Path, ModelInfo, Size]:
    """An export of `checkpoint` at `size` with the settings of `like`, made now or earlier; not verified."""
    import hashlib

    import vimdeploy
    from vimdeploy.bundle import sha256_of
    from vimdeploy.export.exporter import ExportOptions, export_checkpoint
    from vimdeploy.models.variants import settings_of

    settings: dict[str, Any] = {"img_size": size}
    if like is not None:
        shared = {f.name for f in dataclasses.fields(ExportOptions)} & {f.name for f in dataclasses.fields(like)}
        settings |= {name: getattr(like, name) for name in shared}
        settings["variant"] = settings_of(like.config.replace(img_size=like.trained_size))
    chosen = ExportOptions(**settings)
    key = repr((sha256_of(checkpoint), chosen, vimdeploy.__version__))
    name = f"{checkpoint.stem}-{_text(size) if size else 'trained'}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.vim"
    folder = cache_folder() / name
    path = folder / "model.onnx"
    if not path.is_file():
        step(f"exporting {checkpoint.name}" + (f" for {_text(size)} px" if size else ""))
        export_checkpoint(checkpoint, folder, chosen)
    info = read_info(path)
    return path, info, info.config.img_size


def _built(plan: Path, onnx: Path, options: Options, step: Callable[[str], None]) -> Path:
    """A plan of `onnx` built as `plan` was, beside it, for the batches of this run."""
    from vimdeploy.engines.build import BuildOptions, build_engine
    from vimdeploy.engines.sidecar import read_sidecar

    sidecar = read_sidecar(plan)
    low, high = min(options.batches), max(options.batches)
    path = onnx.with_name(f"{plan.stem}-{low}-{high}.plan")
    if not path.is_file():
        step(f"building an engine of {onnx.parent.name}")
        build_engine(
            onnx,
            path,
            BuildOptions(
                runtime=sidecar.runtime["name"],
                precision=sidecar.precision["asked"],
                tf32=sidecar.tf32,
                min_batch=low,
                opt_batch=high,
                max_batch=high,
                plugin=Path(options.plugin) if options.plugin else None,
            ),
        )
    return path


def _text(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


# One case.


def measure_case(
    group: Sequence[Contender], batch: int, options: Options, progress: Progress, *, tolerant: bool = False
) -> list[Row]:
    """All contenders of one size at one batch: memory of each, alone or as it is opened; then they take turns.

    A contender that fails is a row that says so; a runtime that is not there is raised, unless ``tolerant``.
    """
    peaks: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    notices: dict[str, tuple[str, ...]] = {contender.name: () for contender in group}
    case = f"{_text(group[0].img_size)} px, batch {batch}"
    with ExitStack() as stack:
        opened: dict[str, Opened] = {}
        for contender in group:
            name = contender.name
            progress.step(f"opening {name}, {case}")
            try:
                contender.make_files()
                if options.memory and not contender.on_card:
                    progress.step(f"memory of {name}, {case}")
                    try:
                        peaks[name] = memory.in_a_fresh_process(contender, batch, options.threads)
                    except memory.ProbeFailed as error:
                        notices[name] += (error.message,)
                counted = options.memory and contender.on_card
                with memory.counter_of(contender) if counted else nullcontext(memory.Peak()) as peak:
                    opened[name] = contender.open(batch, options.threads)
                    stack.callback(opened[name].close)
                    memory.first_runs(opened[name].prepared)
                if counted:
                    peaks[name] = peak.mib
            except Exception as error:
                if not tolerant:
                    _refuse_to_hide(error)
                failures[name] = error
                opened.pop(name, None)
            progress.advance()
        progress.step(f"timing {len(opened)} contenders, {case}")
        meters = _meters(group)
        timings, failed = take_turns(
            {name: one.prepared for name, one in opened.items()},
            options.effort,
            meters={contender.name: meters[contender.on_card] for contender in group},
            turn=progress.advance,
        )
        failures |= failed
    return [
        _row(
            contender,
            batch,
            opened.get(contender.name),
            timings.get(contender.name),
            peaks.get(contender.name),
            failures.get(contender.name),
            notices[contender.name],
        )
        for contender in group
    ]


def _refuse_to_hide(error: Exception) -> None:
    """A runtime or library that is not there is the user's to hear; what a contender cannot do is a row."""
    if isinstance(error, VimDeployError) and error.exit_code == 3:
        raise error


def _meters(group: Sequence[Contender]) -> dict[bool, Any]:
    return {on_card: meter(on_card) for on_card in {contender.on_card for contender in group}}


def _row(
    contender: Contender,
    batch: int,
    opened: Opened | None,
    timing: Timing | None,
    peak: float | None,
    failure: Exception | None,
    notices: tuple[str, ...],
) -> Row:
    common: dict[str, Any] = {
        "contender": contender.name,
        "role": contender.role,
        "family": contender.family,
        "model": contender.model,
        "runtime": opened.runtime if opened else "",
        "precision": contender.precision,
        "batch": batch,
        "img_size": contender.img_size,
        "tokens": contender.tokens,
        "on_card": contender.on_card,
        "notices": notices + (opened.notices if opened else ()),
    }
    if failure is not None or timing is None or opened is None:
        return Row(**common, failed=_reason(failure))
    ms = timing.ms()
    enough = timing.measured_inferences * ms >= LEAST_SECONDS * 1e3
    joules = timing.joules / timing.measured_inferences / batch if timing.joules and enough else None
    return Row(
        **common,
        clock=timing.clock,
        latency_ms=timing.latency(),
        ms=ms,
        images_per_s=batch / ms * 1e3,
        peak_mib=peak,
        memory=contender.memory if peak is not None else None,
        model_bytes=opened.model_bytes,
        engine_bytes=opened.engine_bytes,
        joules_per_image=joules,
        energy=("NVML" if contender.on_card else "RAPL") if joules is not None else None,
    )


def _reason(failure: Exception | None) -> str:
    if failure is None:
        return "it was not measured"
    if isinstance(failure, VimDeployError):
        return failure.message
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {first}" if first else type(failure).__name__
