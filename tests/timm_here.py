"""timm, or a skip with the reason.

timm imports torchvision, whose wheels on the package index are built for CUDA: beside a CPU build of PyTorch its own
operators are missing, and with them two declarations without which its import fails. DeiT uses none of them.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

_library: Any = None


@functools.cache
def timm() -> Any:
    global _library
    if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
