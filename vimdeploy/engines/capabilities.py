"""What an imported TensorRT can do, asked of the module itself: the one place that knows how the versions differ.

Every question is "does it have this name", so a version that was never seen here answers for itself. The differences
are listed in runtimes-and-toolkits.md, "TRT 10 versus TRT 11", and section 4.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from vimdeploy.errors import RuntimeMissing, UsageError

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
RUNTIMES = (TENSORRT, RTX)
#: Python modules a runtime may be imported as; the RTX wheels bring the second name.
_MODULES = {TENSORRT: ("tensorrt",), RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRAS = {TENSORRT: "tensorrt", RTX: "tensorrt-rtx"}
#: What parsers older than IPluginV3 (8.5, 8.6) read rightly of our graphs. 8.5 claims opset 16 but ignores `start` and
#: `end` of Shape, which came with opset 15.
_OLD_PARSER_OPSET = 14


@dataclass(frozen=True)
class Capabilities:
    """What a TensorRT module can do. `plugins`: "v3", "v2" or "none", the kind of plugin library it takes."""

    runtime: str
    version: str
    needs_gpu: bool  # to build: RTX compiles ahead of time on the CPU
    strongly_typed: bool  # the graph's types decide; older ones need FP16 allowed and each layer constrained
    strong_flag: bool  # ... and must be asked to
    explicit_batch_flag: bool
    bf16: bool
    precision_constraints: bool
    progress: bool
    timing_cache: bool
    version_compatible: bool
    external_tactics: bool  # cuBLAS and cuDNN can be switched off as sources of kernels
    cuda_majors: tuple[int, ...]  # the CUDA releases it is built for: whose cuBLAS it would load
    functions: bool  # its parser inlines model-local functions
    int8_constants: bool  # int8 weights may be stored as such; older ones quantize floats (passes/float_weights.py)
    slow_slices: bool  # its builder is slow with slices of a dynamic batch (passes/no_slices.py)
    plugins: str
    max_opset: int | None  # None: every opset vimdeploy writes

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.runtime == RTX else 'TensorRT'} {self.version}"


def capabilities_of(module: Any, runtime: str) -> Capabilities:
    """Ask `module`, imported as `runtime`, what it can do."""
    rtx = runtime == RTX
    v3 = hasattr(module, "IPluginV3")
    network_flags, builder_flags = module.NetworkDefinitionCreationFlag, module.BuilderFlag
    strong = hasattr(network_flags, "STRONGLY_TYPED")
    version_compatible = not rtx and hasattr(builder_flags, "VERSION_COMPATIBLE")
    return Capabilities(
        runtime=runtime,
        version=str(module.__version__),
        needs_gpu=not rtx,
        strongly_typed=strong or not hasattr(builder_flags, "FP16"),
        strong_flag=strong,
        explicit_batch_flag=not v3 and hasattr(network_flags, "EXPLICIT_BATCH"),
        bf16=hasattr(module.DataType, "BF16"),
        precision_constraints=hasattr(builder_flags, "OBEY_PRECISION_CONSTRAINTS"),
        progress=hasattr(module, "IProgressMonitor"),
        # RTX keeps the calls but they do nothing (runtimes-and-toolkits.md 4).
        timing_cache=not rtx and hasattr(module, "ITimingCache"),
        version_compatible=version_compatible,
        external_tactics=not rtx and hasattr(getattr(module, "TacticSource", None), "CUBLAS"),
        cuda_majors=(12, 13) if v3 else (11, 12) if version_compatible else (11,),  # 8.6 came for two, 8.5 for one
        functions=v3,
        int8_constants=v3,
        slow_slices=not v3,
        plugins="none" if rtx else "v3" if v3 else "v2",
        max_opset=None if v3 else _OLD_PARSER_OPSET,
    )


def import_runtime(runtime: str) -> tuple[Any, Capabilities]:
    """The module of `runtime` and what it can do. Raises UsageError for an unknown name, RuntimeMissing."""
    if runtime not in RUNTIMES:
        raise UsageError(f"no engine builder is called {runtime!r}", hint="runtimes: " + ", ".join(RUNTIMES))
    missing = None
    for name in _MODULES[runtime]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise RuntimeMissing(f"{name} cannot be imported: {error}", hint="install what it names") from error
            missing = error
            continue
        except (ImportError, OSError) as error:
            # 8.5 on a newer Python, or a library it links that is not there.
            raise RuntimeMissing(
                f"{name} is installed but cannot be imported: {error}",
                hint="install a build of it for this Python and CUDA",
            ) from error
        if not hasattr(module, "Runtime"):
            raise RuntimeMissing(
                f"{name} is installed without its libraries", hint=f"pip install 'vimdeploy[{_EXTRAS[runtime]}]'"
            )
        return module, capabilities_of(module, runtime)
    raise RuntimeMissing(
        f"{runtime} is not installed ({missing})", hint=f"pip install 'vimdeploy[{_EXTRAS[runtime]}]'"
    ) from missing
