"""`build_engine`: an exported ONNX file in, a TensorRT plan and its sidecar out; 8.5 to 11 and TensorRT-RTX alike.

prepare the graph → load the plugin → parse → configure → build → prove its precision → written beside, then renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vimdeploy
from vimdeploy import bundle
from vimdeploy.bundle import ModelInfo
from vimdeploy.engines import inspect
from vimdeploy.engines.capabilities import TENSORRT, Capabilities, import_runtime
from vimdeploy.engines.plugin import NAMESPACE, VERSION, load_plugin, plugin_path
from vimdeploy.engines.prepare import Prepared, prepare
from vimdeploy.engines.profile import Profile
from vimdeploy.engines.sidecar import Sidecar, sidecar_path
from vimdeploy.errors import EngineError, ModelFileError, RuntimeMissing, UsageError
from vimdeploy.passes.fuse import FUSIONS
from vimdeploy.runtimes import cuda


class Progress:
    """What `build_engine` tells while it works; this one tells nobody.

    TensorRT reports nested phases, each of a number of steps (TensorRT 8.6 and later; older ones only `step`).
    """

    def step(self, text: str) -> None:
        """Something else begins."""

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        """TensorRT begins a phase of `steps` steps inside `parent`."""

    def advance(self, name: str, done: int) -> bool:
        """Step `done` of a phase is over. False stops the build."""
        return True

    def finish(self, name: str) -> None:
        """A phase is over."""


@dataclass(frozen=True)
class BuildOptions:
    """What `vimdeploy build-engine` can be told; see its `--help`. None leaves a choice to the builder.

    `precision` None keeps the file's own types. `int8` wants a quantized file, whose other layers then are fp16 unless
    `precision` says otherwise; without it they stay as they are. `fusion` None fuses as far as can be. `tf32` lets fp32
    products of tensors be rounded to 10 bits. `workspace` in bytes.
    """

    runtime: str = TENSORRT
    precision: str | None = None
    int8: bool = False
    fusion: str | None = None
    tf32: bool = False
    min_batch: int | None = None
    opt_batch: int | None = None
    max_batch: int | None = None
    timing_cache: Path | None = None
    workspace: int | None = None
    version_compatible: bool = False
    plugin: Path | None = None
    device: int = 0


@dataclass(frozen=True)
class BuildResult:
    """What was written. `seconds` is the builder's own time, `total_seconds` everything; `notices` are sentences."""

    plan: Path
    sidecar: Sidecar
    info: ModelInfo
    onnx_bytes: int
    plan_bytes: int
    seconds: float
    total_seconds: float
    notices: tuple[str, ...] = ()


def build_engine(
    model: Path, out: Path | None = None, options: BuildOptions | None = None, *, progress: Progress | None = None
) -> BuildResult:
    """Build `model` (an ONNX file of vimdeploy) into a plan at `out`, by default `model.<precision>.plan` beside it.

    The plan is checked before it takes its place: its layers must have the precision asked for (inspect.py).
    Raises UsageError, ModelFileError, RuntimeMissing (no card, no TensorRT, no plugin), EngineError (the parser or the
    builder failed), CheckFailed (the precision is not what was asked for).
    """
    options, progress = options or BuildOptions(), progress or Progress()
    started = time.perf_counter()
    info = bundle.read_info(model)
    bundle.check_hash(model)
    # Everything that can refuse does so before the minutes of work.
    device = None if options.runtime != TENSORRT else _device(options.device)
    module, can = import_runtime(options.runtime)
    _check(options, can)
    precision = options.precision or ("fp16" if options.int8 else None)
    _check_int8(model, info, options)
    out = _target(model, out, info.kind if info.quantization else precision or info.precision)
    plugin = None if can.plugins == "none" else plugin_path(can, options.plugin)
    progress.step("typing the graph")
    fixed = options.max_batch if options.min_batch == options.max_batch else None
    prepared = prepare(model, info, precision, can, fixed, options.fusion)
    profile = Profile.of(
        prepared.input,
        prepared.shape,
        (info.config.in_chans, *info.config.img_size),
        (options.min_batch, options.opt_batch, options.max_batch),
    )
    logger = make_logger(module)
    plugin_facts = None
    if plugin is not None:
        digest = load_plugin(module, can, plugin, prepared.ops)
        plugin_facts = {
            "file": str(plugin),
            "sha256": digest,
            "ops": sorted(prepared.ops),
            "version": VERSION,
            "namespace": NAMESPACE,
        }
    builder = module.Builder(logger)
    progress.step("parsing the graph")
    # The network reads its weights from the parser, so both must live until it is built.
    network, _parser = _parse(module, can, builder, logger, prepared, model)
    if not can.strongly_typed and prepared.wanted.low != "fp32":
        constrain(module, network, prepared.types)
    config = _configure(module, can, builder, options, prepared, profile)
    if can.progress:
        config.progress_monitor = _monitor(module, progress)
    cache_facts = _open_cache(module, config, options.timing_cache)
    progress.step(f"building with {can}")
    began = time.perf_counter()
    data = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - began
    if data is None:
        raise _of_build(logger, can, options)
    plan = bytes(data)
    if options.timing_cache is not None:
        _save_cache(config, options.timing_cache)
    progress.step("checking the engine's precision")
    if can.needs_gpu:
        engine = _deserialize(module, can, logger, plan)
        layers, source = inspect.engine_layers(module, engine, profile.input, profile.opt), "inspector"
    else:
        layers, source = inspect.network_layers(network), "network"
    found = inspect.prove(layers, prepared.wanted, source)
    sidecar = Sidecar(
        plan={"file": out.name, "sha256": _sha256(plan), "bytes": len(plan)},
        runtime={"name": can.runtime, "version": can.version},
        device=None if device is None else {"name": device.name, "sm": device.sm, "driver": device.driver},
        plugin=plugin_facts,
        profile=profile,
        precision=found.to_dict(),
        tf32=options.tf32,
        version_compatible=options.version_compatible,
        onnx={"file": os.path.relpath(model.resolve(), out.parent.resolve()), "sha256": bundle.sha256_of(model)},
        build={
            "seconds": round(seconds, 3),
            "timing_cache": cache_facts,
            "workspace_bytes": options.workspace,
            "fusion": prepared.fusion,
            "vimdeploy": vimdeploy.__version__,
        },
        info=info,
    )
    _write(out, plan, sidecar, model)
    total = time.perf_counter() - started
    notices = _notices(info, can, device)
    return BuildResult(out, sidecar, info, model.stat().st_size, len(plan), seconds, total, notices)


def _notices(info: ModelInfo, can: Capabilities, device: cuda.Device | None) -> tuple[str, ...]:
    """What was measured of engines like this one and is worth knowing (docs/how-to/quantize.md, "On TensorRT")."""
    if not info.quantization or can.strongly_typed or device is None or device.sm != 90:
        return ()
    return (
        "TensorRT 8.5.3.1 was seen to take int8 kernels of an older generation on sm_90: Vim-S and Vim-B in int8 were "
        "smaller than in fp16, and slower; `vimdeploy bench` compares the two plans here",
    )


def make_logger(module: Any) -> Any:
    """A TensorRT logger that keeps errors and warnings in `.errors` and `.warnings` and prints nothing."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == module.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Logger()


def constrain(module: Any, network: Any, types: dict[str, str]) -> None:
    """Give each layer that makes a typed value that value's type, where the builder would choose by itself.

    Constants keep their own type; a plugin layer only has its output typed, since some of its inputs stay fp32. What
    leaves the network keeps the type it leaves in.
    """
    kinds = {"fp32": module.DataType.FLOAT, "fp16": module.DataType.HALF}
    free = {module.LayerType.CONSTANT, module.LayerType.SHAPE}
    plugins = {module.LayerType.PLUGIN_V2}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type in free:
            continue
        for j in range(layer.num_outputs):
            kind = kinds.get(types.get(layer.get_output(j).name, ""))
            if kind is None:
                continue
            if kind == module.DataType.FLOAT or not layer.get_output(j).is_network_output:
                layer.set_output_type(j, kind)
            if layer.type not in plugins and not _is_cast(module, layer):
                layer.precision = kind


def _is_cast(module: Any, layer: Any) -> bool:
    return layer.type in {getattr(module.LayerType, name, None) for name in ("IDENTITY", "CAST")}


def _device(index: int) -> cuda.Device:
    try:
        return cuda.device(index)
    except RuntimeMissing as missing:
        raise RuntimeMissing(
            f"TensorRT builds on the card that will run the engine. {missing.message}",
            hint="build where the card is; --runtime tensorrt-rtx builds without one, for RTX cards",
        ) from missing


def _check(options: BuildOptions, can: Capabilities) -> None:
    if options.precision not in (None, "fp32", "fp16", "bf16"):
        raise UsageError(f"precision {options.precision!r} is unknown", hint="choose fp32, fp16 or bf16")
    if options.fusion not in (None, *FUSIONS):
        raise UsageError(f"fusion {options.fusion!r} is unknown", hint=f"choose {', '.join(FUSIONS)}")
    if options.version_compatible and not can.version_compatible:
        raise UsageError(f"{can} builds no version-compatible engines", hint="leave out --version-compatible")
    if options.timing_cache is not None and not can.timing_cache:
        raise UsageError(f"{can} keeps no timing cache", hint="leave out --timing-cache")
    if options.plugin is not None and can.plugins == "none":
        raise UsageError(f"{can} takes no plugin: the op's function body is built in", hint="leave out --plugin")
    if options.workspace is not None and options.workspace < 1:
        raise UsageError("the workspace must be larger than nothing", hint="--workspace 1024 is a GiB")


def _check_int8(model: Path, info: ModelInfo, options: BuildOptions) -> None:
    if options.int8 and not info.quantization:
        raise UsageError(
            f"{model} is {info.precision}, and int8 needs a file that was calibrated",
            hint="vimdeploy quantize --calib FOLDER, or build-engine --int8 --calib FOLDER",
        )


def _target(model: Path, out: Path | None, precision: str) -> Path:
    out = out or model.with_name(f"{model.stem.removesuffix(f'.{precision}')}.{precision}.plan")
    if out.suffix != ".plan":
        raise UsageError(f"{out} does not end in .plan", hint=f"-o {out.with_suffix('.plan')}")
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="name a file that ends in .plan")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist", hint="make it first")
    return out


def _parse(
    module: Any, can: Capabilities, builder: Any, logger: Any, prepared: Prepared, model: Path
) -> tuple[Any, Any]:
    flags = 0
    if can.strong_flag:
        flags |= 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if can.explicit_batch_flag:
        flags |= 1 << int(module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = builder.create_network(flags)
    parser = module.OnnxParser(network, logger)
    if not parser.parse(prepared.onnx):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = [_node_of(error, prepared) for error in errors]
        texts = [" ".join(error.desc().split()) for error in errors]
        said = "; ".join(f"{node}: {text}" for node, text in zip(nodes[:3], texts)) or "no reason given"
        # Of any operator it does not know a parser says that it found no plugin.
        if any(node in prepared.scans and "plugin" in text.lower() for node, text in zip(nodes, texts)):
            raise RuntimeMissing(
                f"{can} found no plugin {' or '.join(sorted(prepared.ops))}, version {VERSION}, "
                f"namespace {NAMESPACE!r} for {model}: {said}",
                hint="name the plugin library with --plugin",
            )
        raise EngineError(f"{can} cannot read {model}: {said}", hint="export it again, or report it with this message")
    return network, parser


def _node_of(error: Any, prepared: Prepared) -> str:
    """The name of the node a parser error is about; 8.5 gives its position only."""
    if hasattr(error, "node_name"):
        return str(error.node_name())
    position = error.node()
    return prepared.nodes[position] if 0 <= position < len(prepared.nodes) else "the graph"


def _configure(
    module: Any, can: Capabilities, builder: Any, options: BuildOptions, prepared: Prepared, profile: Profile
) -> Any:
    config = builder.create_builder_config()
    flag = module.BuilderFlag
    shapes = builder.create_optimization_profile()
    shapes.set_shape(profile.input, profile.min, profile.opt, profile.max)
    if config.add_optimization_profile(shapes) < 0:
        raise EngineError(f"{can} refuses the profile {profile}", hint="choose other batches")
    # Without it the inspector has nothing to show.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    (config.set_flag if options.tf32 else config.clear_flag)(flag.TF32)
    if not can.strongly_typed and prepared.wanted.quantized:
        config.set_flag(flag.INT8)
    if not can.strongly_typed and prepared.wanted.low != "fp32":
        config.set_flag(flag.FP16)
        if can.precision_constraints and prepared.types:
            # PREFER lets the quickest kernel win at times: an fp32 first convolution, on one build of two.
            config.set_flag(flag.OBEY_PRECISION_CONSTRAINTS)
    if options.version_compatible:
        config.set_flag(flag.VERSION_COMPATIBLE)
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    if can.external_tactics:
        config.set_tactic_sources(config.get_tactic_sources() & ~_absent_tactics(module, can))
    return config


#: TensorRT's outside sources of kernels: the library, and a function it must have to be more than a stand-in.
_SOURCES = {
    "CUBLAS": ("libcublas.so.{cuda}", "cublasCreate_v2"),
    "CUBLAS_LT": ("libcublasLt.so.{cuda}", "cublasLtCreate"),
    "CUDNN": ("libcudnn.so.8", "cudnnCreate"),
}


def _absent_tactics(module: Any, can: Capabilities) -> int:
    """The sources whose library is not on this host, as bits: TensorRT would fail on calling them."""
    bits = 0
    for name, (library, function) in _SOURCES.items():
        if not hasattr(module.TacticSource, name):
            continue
        present = False
        for cuda_major in can.cuda_majors:
            with contextlib.suppress(OSError):
                present |= hasattr(ctypes.CDLL(library.format(cuda=cuda_major), mode=os.RTLD_LAZY), function)
        if not present:
            bits |= 1 << int(getattr(module.TacticSource, name))
    return bits


def _monitor(module: Any, progress: Progress) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.phase(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.advance(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def _open_cache(module: Any, config: Any, path: Path | None) -> dict[str, Any] | None:
    """Give the builder the timing cache at `path`, empty when there is none yet."""
    if path is None:
        return None
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="--timing-cache takes a file")
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise ModelFileError(
            f"{path} is not a timing cache of this TensorRT and card", hint="remove it, or name another file"
        )
    return {"file": path.name, "warm": bool(content), "bytes_before": len(content)}


def _save_cache(config: Any, path: Path) -> None:
    with bundle.replacing_file(path) as scratch:
        scratch.write_bytes(bytes(config.get_timing_cache().serialize()))


def _deserialize(module: Any, can: Capabilities, logger: Any, plan: bytes) -> Any:
    engine = module.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{can} cannot load the plan it built: {_last(logger)}", hint="report it with this message")
    return engine


_MEMORY = re.compile(r"memory|workspace", re.I)


def _of_build(logger: Any, can: Capabilities, options: BuildOptions) -> EngineError:
    """Why the builder gave no plan, from what it logged."""
    said = _last(logger)
    everything = " ".join((*logger.errors, *logger.warnings))
    if options.workspace is not None and _MEMORY.search(everything):
        return EngineError(
            f"{can} found no kernel for a layer within a workspace of {options.workspace / (1 << 20):.0f} MiB: {said}",
            hint="give it more with --workspace, or leave that out",
        )
    return EngineError(f"{can} could not build the engine: {said}", hint="report it with this message")


def _last(logger: Any) -> str:
    """What TensorRT said: its first error is the cause, its last the step that gave up."""
    said = [" ".join(error.split()) for error in logger.errors]
    return "; then ".join(dict.fromkeys((said[0], said[-1]))) if said else "no reason given"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(out: Path, plan: bytes, sidecar: Sidecar, model: Path) -> None:
    """The sidecar first: a plan without one is refused, a sidecar whose plan is older fails its hash."""
    with bundle.replacing_file(out) as scratch:
        scratch.write_bytes(plan)
        with bundle.replacing_file(sidecar_path(out)) as beside:
            beside.write_text(json.dumps(sidecar.to_dict(), indent=2) + "\n")
    if out.parent.resolve() == model.parent.resolve():
        facts = {
            "made_by": "build-engine",
            "vimdeploy": vimdeploy.__version__,
            "onnx": model.name,
            "runtime": f"{sidecar.runtime['name']} {sidecar.runtime['version']}",
            "precision": sidecar.precision["asked"],
        }
        bundle.update_manifest(out.parent, {out.name: facts, sidecar_path(out).name: facts})
