"""The position table of a Vim at another image size (vim-spec.md 2.4).

Two readings of one table. "layout" knows where the class tokens stand and resizes the patches alone; "repo" does what
upstream's routine does, which takes the first rows for class tokens wherever they really are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vimdeploy.errors import UsageError
from vimdeploy.models.variants import VimConfig

MODES = ("layout", "repo")


def resize_pos_embed(table: Tensor, old: VimConfig, new: VimConfig, mode: str = "layout") -> Tensor:
    """`table` (1, old.seq_len, C), fp32, as the model `new` needs it: (1, new.seq_len, C), fp32.

    layout: class rows keep their values exactly and move to where `new` has them; patch rows are resized from the old
    grid to the new one, square or not (bicubic, align_corners=False, no antialias). A `new` without class tokens drops
    their rows. repo: bit-compatible with upstream, square grids only. Raises UsageError for an unknown mode, for grids
    that repo mode cannot serve, and when `new` has class tokens for which `old` has no rows.
    """
    if mode not in MODES:
        raise UsageError(f"no position table mode is called {mode!r}", hint="modes: " + ", ".join(MODES))
    if table.shape != (1, old.seq_len, table.shape[-1]):
        raise UsageError(f"a position table of shape {tuple(table.shape)} is not one of {old.seq_len} tokens")
    return _layout(table, old, new) if mode == "layout" else _repo(table, new)


def _layout(table: Tensor, old: VimConfig, new: VimConfig) -> Tensor:
    if new.num_cls not in (0, old.num_cls):
        raise UsageError(f"the position table has {old.num_cls} class rows, the model wants {new.num_cls}")
    rows = table[0]
    is_patch = torch.ones(len(rows), dtype=torch.bool)
    is_patch[list(old.cls_index)] = False
    result = torch.empty(1, new.seq_len, table.shape[-1], dtype=table.dtype)
    to_patch = torch.ones(new.seq_len, dtype=torch.bool)
    to_patch[list(new.cls_index)] = False
    result[0, to_patch] = _bicubic(rows[is_patch], old.grid, new.grid)
    if new.num_cls:
        result[0, list(new.cls_index)] = rows[list(old.cls_index)]
    return result


def _repo(table: Tensor, new: VimConfig) -> Tensor:
    extra = new.num_cls
    if new.grid[0] != new.grid[1]:
        raise UsageError(
            f"--pos-embed-mode repo makes square grids only; {new.img_size[0]}x{new.img_size[1]} px has a grid of "
            f"{new.grid[0]}x{new.grid[1]}",
            hint="--pos-embed-mode layout, which resizes the true grid",
        )
    patches = table.shape[1] - extra
    side = math.isqrt(patches)
    if side * side != patches:
        # With 197 rows and a model without class token this is upstream's reshape error.
        why = (
            " (a class token's row among them, perhaps?)"
            if not extra and math.isqrt(patches - 1) ** 2 == patches - 1
            else ""
        )
        raise UsageError(
            f"--pos-embed-mode repo keeps the first {extra} rows of the position table and takes the other {patches} "
            f"for a square grid, which they are not{why}",
            hint="--pos-embed-mode layout, which knows where the class token's row is",
        )
    patch_rows = _bicubic(table[0, extra:], (side, side), new.grid)
    return torch.cat([table[0, :extra], patch_rows])[None]


def _bicubic(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(old_h * old_w, C) -> (new_h * new_w, C). Both of upstream's copies interpolate an equal grid to itself too."""
    if old == new:
        return rows
    image = rows.T.reshape(1, -1, *old)
    return F.interpolate(image, size=new, mode="bicubic", align_corners=False).flatten(2)[0].T
