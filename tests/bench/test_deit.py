"""bench/deit.py: the DeiT that is compared with is timm's, and every recipe of it computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm_here import timm

from vimdeploy.bench import deit, run
from vimdeploy.bench.contenders import DeitContender
from vimdeploy.bench.deit import DeitShape
from vimdeploy.bench.measure import Effort
from vimdeploy.models.variants import VimConfig, registered_config

SMALL = DeitShape(width=64, depth=2, heads=2, patch=8, img_size=(32, 48), classes=5)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_deit_beside_a_vim_is_the_published_one(size: str) -> None:
    """Same parameters, tensor by tensor, as timm's deit_{tiny,small,base}_patch16_224."""
    shape = DeitShape.beside(registered_config(size))
    assert (shape.name, shape.tokens) == (f"deit_{size}", 197)
    with torch.device("meta"):
        want = timm().create_model(f"deit_{size}_patch16_224", pretrained=False)
    if size == "tiny":
        have = deit.make_deit(shape).state_dict()
        assert {name: t.shape for name, t in want.state_dict().items()} == {name: t.shape for name, t in have.items()}
    assert (want.embed_dim, len(want.blocks), want.blocks[0].attn.num_heads) == (shape.width, shape.depth, shape.heads)


def test_a_vim_of_another_width_gets_a_transformer_of_its_width() -> None:
    shape = DeitShape.beside(VimConfig(d_model=128, depth=8, img_size=(32, 32), patch_size=4, num_classes=10))
    assert (shape.width, shape.depth, shape.heads, shape.tokens) == (128, 4, 2, 65)
    assert shape.name == "deit of width 128, 4 layers"


def test_unfused_attention_is_the_same_function() -> None:
    timm()
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(deit.make_deit(SMALL)(x), deit.make_deit(SMALL, fused=False)(x))
    assert not any(block.attn.fused_attn for block in deit.make_deit(SMALL, fused=False).blocks)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "one node"])
def test_its_onnx_computes_the_same(tmp_path: Path, fused: bool, half: bool) -> None:
    timm()
    path = deit.write_deit_onnx(SMALL, tmp_path / "d.onnx", fused=fused, half=half)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MultiHeadAttention") == (2 if fused else 0) and kinds.count("Softmax") == (0 if fused else 2)
    x = torch.randn(3, 3, 32, 48)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"images": (x.half() if half else x).numpy()})
    with torch.inference_mode():
        want = deit.make_deit(SMALL)(x).numpy()
    np.testing.assert_allclose(got, want, atol=5e-3 if half else 1e-5)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_contenders_open_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    timm()
    monkeypatch.setenv("VIMDEPLOY_CACHE", str(tmp_path))
    contender = DeitContender(
        "d", "deit", "fp32", SMALL.img_size, SMALL.tokens, on_card=False, memory="process", shape=SMALL, runtime=runtime
    )
    opened = contender.open(2, threads=1)
    opened.prepared.run()
    assert opened.runtime.startswith(runtime) and opened.model_bytes and opened.prepared.stream is None
    opened.close()


def test_its_file_is_there_before_its_memory_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first measurement is of the exporter."""
    timm()
    monkeypatch.setenv("VIMDEPLOY_CACHE", str(tmp_path))
    common = (SMALL.img_size, SMALL.tokens, False, "process", SMALL)
    DeitContender("d", "deit", "fp32", *common, "onnxruntime").make_files()
    (written,) = tmp_path.glob("*.onnx")
    seen = []
    monkeypatch.setattr(
        "vimdeploy.bench.memory.in_a_fresh_process", lambda *a: seen.append(sorted(tmp_path.glob("*.onnx"))) or 1.0
    )
    written.unlink()
    contender = DeitContender("d", "deit", "fp32", *common, "onnxruntime")
    (row,) = run.measure_case([contender], 1, run.Options(effort=Effort(0.02, 1)), run.Progress())
    assert seen == [[written]] and row.peak_mib == 1.0 and row.failed is None
