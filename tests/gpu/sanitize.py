"""A reduced set of scans for compute-sanitizer to watch: every instance, ragged lengths, both types of pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
import scan_library as lib

ran = 0
for dtype, length, channels in [(torch.float16, 131, 24), (torch.float32, 131, 24)]:
    directions = [ref.make_direction(1, length, channels, dtype, rank=12) for _ in "fb"]
    z = torch.randn(1, length, channels, device="cuda").to(dtype)
    y = ref.Guarded(z.shape, dtype)
    for variant in [lib.Variant(), *lib.PAIR_VARIANTS]:
        if variant.form == lib.LANES and variant.split == 4 and dtype == torch.float32:
            continue
        ran += lib.Call(directions, z, y.view).run(variant) == lib.OK
    for variant in [lib.Variant(), *lib.SINGLE_VARIANTS[:8]]:
        ran += lib.Call(directions[1:], z, y.view, reverse=True).run(variant) == lib.OK
    torch.cuda.synchronize()
    assert y.intact() and torch.isfinite(y.view).all()
print(f"{ran} launches")
