"""A Vim in PyTorch on vimdeploy's own CUDA kernels (models/fused.py): for hosts with a card and no TensorRT."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.models.fused import FusedVim
from vimdeploy.models.vim import Vim
from vimdeploy.ops.native import Kernels
from vimdeploy.runtimes.base import Prepared, Session
from vimdeploy.runtimes.library import installed
from vimdeploy.runtimes.torch import specs_of

LIBRARY = "libvimdeploy_cuda.so"
ENVIRONMENT = "VIMDEPLOY_CUDA_LIBRARY"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cuda_kernels(path: Path | None = None) -> Kernels:
    """The kernels of the library at `path`, else what VIMDEPLOY_CUDA_LIBRARY names, else the installed one.

    Raises RuntimeMissing when there is none, or PyTorch sees no card.
    """
    if not torch.cuda.is_available():
        raise RuntimeMissing("PyTorch sees no NVIDIA GPU here", hint="run the ONNX file in ONNX Runtime")
    named = os.environ.get(ENVIRONMENT)
    path = path or (Path(named) if named else installed(LIBRARY))
    if path is None:
        raise RuntimeMissing(
            f"vimdeploy's CUDA kernels ({LIBRARY}) are not installed",
            hint="reinstall vimdeploy with -C cmake.define.VIMDEPLOY_BUILD_CUDA=ON where nvcc is, or let "
            f"{ENVIRONMENT} name the built library",
        )
    return Kernels(path, "cuda")


class TorchCudaSession(Session):
    """The network `model` in info.precision on `device`, by vimdeploy's CUDA kernels and cuBLAS.

    ``cuda_graph``: record each batch size once and replay it. ``images_per_pass``, ``streams``: how a large batch goes
    through (FusedVim). The weights are copied. Output ``info.output``, float32. Raises RuntimeMissing when the card is
    not there, VariantError for a network these kernels do not serve.
    """

    def __init__(
        self,
        model: Vim,
        info: ModelInfo,
        kernels: Kernels,
        *,
        device: str = "cuda",
        cuda_graph: bool = True,
        images_per_pass: int | None = None,
        streams: int = 1,
    ) -> None:
        self.info = info
        self._device = torch.device(device)
        try:
            self._card = torch.cuda.get_device_name(self._device) if kernels.device == "cuda" else "the CPU"
        except (RuntimeError, AssertionError) as error:
            raise RuntimeMissing(
                f"PyTorch cannot use the device {device!r}: {str(error).splitlines()[0]}", hint="run it on the CPU"
            ) from error
        self._network: FusedVim | None = FusedVim(
            model,
            kernels,
            dtype=DTYPES[info.precision],
            device=self._device,
            output=info.output,
            cuda_graph=cuda_graph,
            images_per_pass=images_per_pass,
            streams=streams,
        )
        self.inputs, self.outputs = specs_of(model.config, info.output)
        self._how = f"vim CUDA kernels, {info.precision}" + (", CUDA graph" if cuda_graph else "")

    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        return {self.info.output: self._call(torch.from_numpy(batch).to(self._device)).cpu().numpy()}

    def run_torch(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, C, H, W) on this session's card, of any float type -> outputs on the card, fp32.

        Enqueued on torch's current stream; nothing is waited for. Raises UsageError for a tensor of another shape or
        elsewhere.
        """
        return {self.info.output: self._call(batch)}

    def prepare(self, batch: np.ndarray) -> Prepared:
        self._check_batch(batch)
        images = torch.from_numpy(batch).to(self._device, DTYPES[self.info.precision])
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else None
        return Prepared(lambda: self._call(images), stream)

    def _call(self, images: torch.Tensor) -> torch.Tensor:
        if self._network is None:
            raise UsageError("this session is closed", hint="open another with vimdeploy.load")
        return self._network(images)

    def describe(self) -> str:
        return f"torch {torch.__version__} on {self._card}, {self._how}"

    def close(self) -> None:
        super().close()
        self._network = None
