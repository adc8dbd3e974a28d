"""The reference network itself as a session: PyTorch in fp32, what every other runtime is compared with."""

from __future__ import annotations

import numpy as np
import torch

from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import RuntimeMissing
from vimdeploy.models.variants import VimConfig
from vimdeploy.models.vim import Vim
from vimdeploy.runtimes.base import Prepared, Session, TensorSpec


def specs_of(config: VimConfig, output: str) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of a network in PyTorch: images and `output`, both fp32."""
    fp32 = np.dtype(np.float32)
    # Without a class token these two poolings leave the tokens to the head (Vim.pool).
    unpooled = not config.cls_index and config.pool in ("max", "all")
    length = (config.seq_len,) if unpooled else ()
    shapes: dict[str, tuple[int | None, ...]] = {
        "logits": (None, *(length if config.pool == "all" else ()), config.num_classes or config.d_model),
        "features": (None, *length, config.d_model),
        "tokens": (None, config.d_model, *config.grid),
    }
    images = TensorSpec((None, config.in_chans, *config.img_size), fp32)
    return {"image": images}, {output: TensorSpec(shapes[output], fp32)}


class TorchSession(Session):
    """A Vim in fp32 on `device` ("cpu", "cuda", "cuda:1").

    The model is put into eval mode and moved, in place; it must hold fp32 weights to be a reference. Output
    ``info.output``: logits (B, classes), features (B, C) or tokens (B, C, gh, gw), float32. Raises RuntimeMissing when
    the device is not there.
    """

    def __init__(self, model: Vim, info: ModelInfo, device: str = "cpu") -> None:
        try:
            self._device = torch.device(device)
            self._model = model.to(self._device, torch.float32).eval()
        except (RuntimeError, AssertionError) as error:
            raise RuntimeMissing(
                f"PyTorch cannot use the device {device!r}: {str(error).splitlines()[0]}", hint="use the CPU"
            ) from error
        self.info = info
        self.inputs, self.outputs = specs_of(model.config, info.output)

    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        return {self.info.output: self._call(torch.tensor(batch).to(self._device)).cpu().numpy()}

    def prepare(self, batch: np.ndarray) -> Prepared:
        self._check_batch(batch)
        image = torch.tensor(batch).to(self._device)
        cuda = self._device.type == "cuda"
        return Prepared(
            lambda: self._call(image), torch.cuda.current_stream(self._device).cuda_stream if cuda else None
        )

    @torch.inference_mode()
    def _call(self, image: torch.Tensor) -> torch.Tensor:
        # TF32 is PyTorch's default for convolutions on CUDA; a reference keeps all of fp32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self.info.output == "tokens":
                return self._model.token_map(image).float()
            return self._model(image, return_features=self.info.output == "features").float()

    def describe(self) -> str:
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type.upper()
        return f"torch {torch.__version__} {where}, fp32 reference"
