"""DeiT from timm, the transformer a Vim of the same width is measured against: recipes, one for each runtime.

The weights are random: no figure here depends on them. timm's attention is PyTorch's scaled_dot_product_attention
(flash attention on CUDA); "unfused" turns that off, which is what timm 0.4.12 did, that the paper compared with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimdeploy.bundle import replacing_file
from vimdeploy.errors import RuntimeMissing
from vimdeploy.models.variants import VimConfig

_NAMES = {192: "deit_tiny", 384: "deit_small", 768: "deit_base"}
OPSET = 18
_INSTALL = "pip install 'vimdeploy[bench]', with a torchvision from where this PyTorch came from"


@dataclass(frozen=True)
class DeitShape:
    """A DeiT: 12 layers where the Vim has 24, heads of 64 channels. ``img_size`` is (height, width)."""

    width: int
    depth: int
    heads: int
    patch: int
    img_size: tuple[int, int]
    classes: int
    in_chans: int = 3

    @classmethod
    def beside(cls, config: VimConfig) -> DeitShape:
        """The one a Vim of that configuration is compared with: same width, patches, images and classes.

        Half the layers, since two Vim layers hold about the parameters of one of DeiT's. Patches do not overlap.
        """
        return cls(
            width=config.d_model,
            depth=max(1, config.depth // 2),
            heads=max(1, config.d_model // 64),
            patch=config.patch_size,
            img_size=config.img_size,
            classes=config.num_classes,
            in_chans=config.in_chans,
        )

    @property
    def name(self) -> str:
        """As timm calls it, or what it is."""
        if self.width in _NAMES and (self.depth, self.patch) == (12, 16):
            return _NAMES[self.width]
        return f"deit of width {self.width}, {self.depth} layers"

    @property
    def tokens(self) -> int:
        return (self.img_size[0] // self.patch) * (self.img_size[1] // self.patch) + 1


def make_deit(shape: DeitShape, *, fused: bool = True) -> Any:
    """A timm VisionTransformer in eval mode, fp32, on the CPU. Raises RuntimeMissing without timm."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:  # torchvision, which timm imports, raises the second
        raise RuntimeMissing(
            f"the DeiT baselines need timm, which cannot be imported: {error}", hint=_INSTALL
        ) from error
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=shape.img_size,
            patch_size=shape.patch,
            in_chans=shape.in_chans,
            num_classes=shape.classes,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
        ).eval()
    for block in model.blocks:
        if not hasattr(block.attn, "fused_attn"):
            raise RuntimeMissing(
                "this timm does not say how its attention is computed (no fused_attn)", hint="pip install 'timm>=1.0'"
            )
        block.attn.fused_attn = fused
    return model


def timm_version() -> str:
    """Raises RuntimeMissing without timm."""
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeMissing("the DeiT baselines need timm, which is not installed", hint=_INSTALL) from error


def write_deit_onnx(
    shape: DeitShape, path: Path, *, fused: bool = True, half: bool = False, opset: int = OPSET
) -> Path:
    """The DeiT as an ONNX file of dynamic batch, input "images", output "logits"; `path` is taken as it is when there.

    ``fused``: each attention is one of ONNX Runtime's MultiHeadAttention nodes (flash attention on CPU and CUDA);
    otherwise it is written out (MatMul, Softmax, MatMul), as an exporter leaves it. ``half``: weights, input and output
    are fp16.
    """
    if path.is_file():
        return path
    import torch

    model = make_deit(shape, fused=False)
    model = model.half() if half else model
    if fused:
        for block in model.blocks:
            block.attn.forward = _one_node(block.attn)
    example = torch.zeros(2, shape.in_chans, *shape.img_size, dtype=torch.float16 if half else torch.float32)
    with replacing_file(path) as scratch, _quiet():
        torch.onnx.export(
            model,
            (example,),
            str(scratch),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=opset,
            custom_opsets={"com.microsoft": 1} if fused else None,
            dynamo=False,
        )
    return path


def _one_node(attention: Any) -> Callable[..., Any]:
    """timm's Attention.forward with the attention itself as one operator: q, k, v and result (B, L, C)."""
    operator = _multi_head_attention()

    def forward(x: Any, **unused: Any) -> Any:
        q, k, v = attention.qkv(x).chunk(3, dim=-1)  # columns q, k, v, the heads of each side by side
        return attention.proj(operator(q, k, v, attention.num_heads))

    return forward


@functools.cache
def _multi_head_attention() -> Any:
    """A PyTorch operator that the exporter writes as com.microsoft.MultiHeadAttention."""
    import torch

    def attention(q: Any, k: Any, v: Any, heads: int) -> Any:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()

    def symbolic(g: Any, q: Any, k: Any, v: Any, heads: Any) -> Any:
        number = torch.onnx.symbolic_helper._get_const(heads, "i", "heads")
        return g.op("com.microsoft::MultiHeadAttention", q, k, v, num_heads_i=number).setType(q.type())

    torch.onnx.utils.register_custom_op_symbolic("vimdeploy_bench::attention", symbolic, OPSET)
    schema = "(Tensor q, Tensor k, Tensor v, int heads) -> Tensor"
    return torch.library.custom_op("vimdeploy_bench::attention", attention, mutates_args=(), schema=schema)


def cache_name(shape: DeitShape, *, fused: bool, half: bool, opset: int = OPSET) -> str:
    """A file name that says all that `write_deit_onnx` depends on."""
    key = repr((shape, fused, half, opset, timm_version()))
    return f"deit-{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns about itself."""
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
