"""Position tables at other image sizes, both modes, against independent implementations (vim-spec.md 2.4)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vimdeploy.errors import UsageError
from vimdeploy.models.resize import resize_pos_embed
from vimdeploy.models.variants import VimConfig

OLD = VimConfig(d_model=8, depth=1)  # 14 x 14, class token in the middle
# torch computes sample positions in fp32: at column 30 they are off by 2e-6, and values by that times their slope.
COORDINATES = 2e-5
POSITIONS = ("none", "head", "middle", "tail", "double")


def random_table(config: VimConfig, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, config.seq_len, config.d_model, generator=torch.Generator().manual_seed(seed))


def bicubic(grid: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """(h, w, C) resized, pixel by pixel: cubic convolution with a = -0.75, half-pixel centres, edges repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    def matrix(old: int, new: int) -> NDArray[np.float64]:
        result = np.zeros((new, old))
        for i in range(new):
            centre = (i + 0.5) * old / new - 0.5
            for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
                result[i, min(max(tap, 0), old - 1)] += kernel(centre - tap)
        return result

    return np.einsum("ih,jw,hwc->ijc", matrix(grid.shape[0], size[0]), matrix(grid.shape[1], size[1]), grid)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("size", [(256, 256), (160, 160), (224, 384), (96, 480)], ids=str)
def test_layout_resizes_patches_and_moves_class_rows(position: str, size: tuple[int, int]) -> None:
    old = OLD.replace(cls_position=position, img_size=(192, 256))  # 12 x 16: rows and columns cannot be confused
    new = old.replace(img_size=size)
    table = random_table(old)
    found = resize_pos_embed(table, old, new, "layout")[0]
    patches = np.delete(table[0].double().numpy(), old.cls_index, axis=0).reshape(12, 16, 8)
    wanted = bicubic(patches, new.grid).reshape(-1, 8)
    np.testing.assert_allclose(np.delete(found.numpy(), new.cls_index, axis=0), wanted, atol=COORDINATES)
    for before, after in zip(old.cls_index, new.cls_index, strict=True):
        assert torch.equal(found[after], table[0, before]), "a class row is moved, never changed"
    assert found.shape == (new.seq_len, 8)


@pytest.mark.parametrize("position", ["none", "head", "middle", "double"])
@pytest.mark.parametrize("size", [160, 256, 384])
def test_repo_is_upstreams_routine(position: str, size: int) -> None:
    """Its steps as the specification tells them: the first rows kept, the rest taken for a square, wherever cls is."""
    old = OLD.replace(cls_position=position)
    new = old.replace(img_size=(size, size))
    table = random_table(old)
    e = new.seq_len - new.num_patches
    side, new_side = int((table.shape[1] - e) ** 0.5), int(new.num_patches**0.5)
    square = table[:, e:].reshape(-1, side, side, 8).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, size=(new_side, new_side), mode="bicubic", align_corners=False)
    wanted = torch.cat((table[:, :e], square.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    found = resize_pos_embed(table, old, new, "repo")
    assert torch.equal(found, wanted), "bit-compatible"
    exact = bicubic(table[0, e:].double().numpy().reshape(14, 14, 8), new.grid).reshape(-1, 8)
    np.testing.assert_allclose(found[0, e:].numpy(), exact, atol=COORDINATES)
    same = torch.equal(found, resize_pos_embed(table, old, new, "layout"))
    assert same == (position in ("none", "head")), "the modes part only where the class row is not in front"


@pytest.mark.parametrize("mode", ["layout", "repo"])
@pytest.mark.parametrize("position", ["none", "head", "middle", "double"])
def test_the_same_size_is_the_same_table(mode: str, position: str) -> None:
    config = OLD.replace(cls_position=position)
    table = random_table(config)
    assert torch.equal(resize_pos_embed(table, config, config, mode), table)


def test_layout_drops_the_class_row_for_a_backbone_without_one() -> None:
    table = random_table(OLD)
    found = resize_pos_embed(table, OLD, OLD.replace(cls_position="none"), "layout")
    assert torch.equal(found[0], torch.cat([table[0, :98], table[0, 99:]]))


def test_stride_8_grids_resize_too() -> None:
    old = OLD.replace(stride=8)
    assert resize_pos_embed(random_table(old), old, old.replace(img_size=(384, 384))).shape == (1, 47 * 47 + 1, 8)


@pytest.mark.parametrize(
    ("old", "new", "mode", "message"),
    [
        (OLD, OLD.replace(img_size=(224, 320)), "repo", "repo makes square grids only; 224x320 px has a grid of 14x20"),
        (OLD.replace(img_size=(192, 256)), OLD, "repo", "takes the other 192 for a square grid, which they are not"),
        (OLD, OLD.replace(cls_position="none"), "repo", "(a class token's row among them, perhaps?)"),
        (OLD.replace(cls_position="none"), OLD, "layout", "the position table has 0 class rows, the model wants 1"),
        (OLD, OLD, "nearest", "no position table mode is called 'nearest'"),
    ],
)
def test_refusals(old: VimConfig, new: VimConfig, mode: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        resize_pos_embed(random_table(old), old, new, mode)
    assert message in refused.value.message


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match="is not one of 197 tokens"):
        resize_pos_embed(torch.zeros(1, 196, 8), OLD, OLD)
