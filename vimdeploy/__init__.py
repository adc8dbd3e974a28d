"""vimdeploy: from a trained Vision Mamba to a verified model file that runs where you need it.

    import vimdeploy

    with vimdeploy.load("ckpt.vim") as session:
        logits = session.run(images)["logits"]

`import vimdeploy` imports no torch, no onnxruntime, no tensorrt: each is imported where it is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vimdeploy.runtimes.base import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    artifact: str | os.PathLike[str] | None = None,
    runtime: str | None = None,
    *,
    threads: int | None = None,
    library: str | Path = "auto",
    plugin: Path | None = None,
    cuda_graph: bool | None = None,
) -> Session:
    """Open an artifact for inference: a `.vim` folder, an `.onnx` file or a TensorRT `.plan`; None is the one here.

    ``runtime``:

    ====================  ================================================================================
    None                  TensorRT for a plan; else ONNX Runtime: on the card where its CUDA provider, a card
                          and vimdeploy's CUDA op are all there, on the CPU otherwise
    "onnxruntime"         ONNX Runtime on the CPU
    "onnxruntime-cuda"    ONNX Runtime's CUDA provider, vimdeploy's op on its stream
    "tensorrt"            the one plan of a `.vim` folder
    "torch"               the PyTorch reference network in fp32
    "torch-cuda"          PyTorch on vimdeploy's CUDA kernels, in the file's precision, in a CUDA graph
    ====================  ================================================================================

    vimdeploy's op library is registered, providers and threads are set. ``threads``: for operators on the CPU; None
    lets the runtime choose. ``library``: "auto", "off" (the file's function body) or a path. ``plugin``: a plan's
    plugin library, None takes the one it was built with. ``cuda_graph``: record each batch size and replay it; None
    does so for plans, where nothing has to be given up for it.

    The session's `run` takes images (B, 3, H, W), normalised, of the model's input type, and returns a dict of
    arrays; `describe()` says what runs it, ``notice`` what the user should know. Raises UsageError, ModelFileError,
    RuntimeMissing, EngineError.
    """
    from vimdeploy.bundle import resolve_artifact
    from vimdeploy.runtimes import best_runtime, open_session

    model = resolve_artifact(artifact if artifact is None else os.fspath(artifact), plan=runtime == "tensorrt")
    runtime = runtime or best_runtime(model, library)
    return open_session(
        model,
        runtime=runtime,
        threads=threads,
        library=library,
        plugin=plugin,
        cuda_graph=runtime == "tensorrt" if cuda_graph is None else cuda_graph,
    )
