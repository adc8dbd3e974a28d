"""The reference network against an independent one in float64 that flips its sequences (tests/golden_vim.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_vim import golden_forward
from official import random_model

from vimdeploy.errors import VariantError
from vimdeploy.models.variants import VimConfig

BASE = VimConfig(d_model=16, depth=3, img_size=(16, 24), patch_size=8, stride=8, num_classes=7, d_state=3)
ROPE = BASE.replace(rope=True, cls_position="head", divide_out=False)

# name -> network; each strategy of the paper's ablations, and each flag an old checkpoint may carry
NETWORKS = {
    "v2": BASE,
    "v2, sum not halved": BASE.replace(divide_out=False),
    "v1": BASE.replace(bimamba="v1"),
    "v1, divide flag off": BASE.replace(bimamba="v1", divide_out=False),
    "forward only": BASE.replace(bimamba="none"),
    "layer pairs, forward only": BASE.replace(bimamba="none", bidirectional=True, depth=4),
    "layer pairs, v1": BASE.replace(bimamba="v1", bidirectional=True, depth=4),
    "layer pairs, v2": BASE.replace(bidirectional=True, depth=4),
    "layer pairs, odd depth": BASE.replace(bidirectional=True, depth=3),
    "LayerNorm": BASE.replace(rms_norm=False),
    "layer scale": BASE.replace(layer_scale=True),
    "layer scale, projection biases": BASE.replace(layer_scale=True, proj_bias=True),
    "no absolute positions": BASE.replace(abs_pos_embed=False),
    "overlapping patches": BASE.replace(stride=4),
    "another state, conv, rank, expansion": BASE.replace(d_state=5, d_conv=3, dt_rank=3, expand=3),
    "one channel in": BASE.replace(in_chans=1),
    "cls head": BASE.replace(cls_position="head"),
    "cls tail": BASE.replace(cls_position="tail"),
    "cls double": BASE.replace(cls_position="double"),
    **{f"no cls, pool {pool}": BASE.replace(cls_position="none", pool=pool) for pool in ("last", "mean", "max", "all")},
    "rope": ROPE,
    "rope and residual": ROPE.replace(rope_residual=True),
    "rope, no cls": ROPE.replace(rope_residual=True, cls_position="none"),
    "rope, middle cls": ROPE.replace(rope_residual=True, cls_position="middle"),
    "rope, layer pairs": ROPE.replace(rope_residual=True, bidirectional=True, depth=4),
}


def images_for(config: VimConfig, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.in_chans, *config.img_size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_the_golden_network(name: str) -> None:
    config = NETWORKS[name]
    model = random_model(config)
    weights = {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}
    images = images_for(config)
    golden = golden_forward(config, weights, images.numpy())
    with torch.no_grad():
        logits = model(images.float()).numpy()
    assert golden.shape == logits.shape and golden.std() > 0.01, "the comparison must compare something"
    # fp32 against float64 over three layers of width 16: a few units in the seventh digit.
    np.testing.assert_allclose(logits, golden, rtol=0, atol=2e-5 * max(1.0, float(np.abs(golden).max())))


@pytest.mark.parametrize("name", ["v2", "cls double", "no cls, pool max", "no cls, pool mean"])
def test_return_features_is_what_the_head_reads(name: str) -> None:
    config = NETWORKS[name]
    model = random_model(config)
    weights = {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}
    images = images_for(config)
    with torch.no_grad():
        features = model(images.float(), return_features=True).numpy()
    np.testing.assert_allclose(features, golden_forward(config, weights, images.numpy(), features=True), atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_freeze_changes_nothing(name: str) -> None:
    config = NETWORKS[name]
    images = images_for(config).float()
    with torch.no_grad():
        before = random_model(config)(images)
        frozen = random_model(config).freeze()
        after = frozen(images)
    assert (after - before).abs().max() <= 1e-5 * max(1, before.abs().max())
    assert not any(key.endswith("_log") for key in frozen.state_dict())


@pytest.mark.parametrize("part", ["A_log", "D", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_part_of_each_direction_counts(part: str, backward: bool) -> None:
    """Upstream's slow path drops the backward branch in silence; a test network must be one that would tell."""
    stem, dot, rest = part.partition(".")
    name = {"A_log": "A_b_log"}.get(stem, stem + "_b") + dot + rest if backward else part
    images = images_for(BASE).float()
    model = random_model(BASE)
    with torch.no_grad():
        before = model(images)
        model.get_parameter(f"layers.1.mixer.{name}").mul_(1.5)
        assert (model(images) - before).abs().max() > 1e-3


def test_token_map_leaves_the_class_tokens_out() -> None:
    for position in ("none", "head", "middle", "tail", "double"):
        config = BASE.replace(cls_position=position)
        model = random_model(config)
        images = images_for(config).float()
        with torch.no_grad():
            tokens = model.stream(model.tokens(images))
            found = model.token_map(images)
        patches = [t for t in range(config.seq_len) if t not in config.cls_index]
        assert found.shape == (2, 16, *config.grid)
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[:, patches])


def test_a_backbone_has_no_head() -> None:
    model = random_model(BASE.replace(num_classes=0))
    assert not any(key.startswith("head.") for key in model.state_dict())
    assert model(images_for(BASE).float()).shape == (2, 16)


def test_another_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match="this model takes 16x24 images, got 24x16"):
        random_model(BASE)(torch.zeros(1, 3, 24, 16))


@pytest.mark.parametrize(
    "config",
    [
        ROPE.replace(cls_position="double"),
        ROPE.replace(stride=4),
        ROPE.replace(cls_position="none", img_size=(24, 24)),
    ],
    ids=["double cls", "overlapping patches", "odd patch count without cls"],
)
def test_rope_that_upstream_cannot_run_is_refused(config: VimConfig) -> None:
    with pytest.raises(VariantError, match="RoPE cannot serve"):
        random_model(config)
