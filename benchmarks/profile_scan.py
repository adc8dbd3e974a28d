"""Launches chosen variants a few times, for a profiler or compute-sanitizer to watch.

ncu --metrics ... python benchmarks/profile_scan.py Ti 64 197 1,1,0,0,0,0,0
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
import cuda_library as lib
from scan import MODELS, Layer

for model, batch, length, fields in zip(*[iter(sys.argv[1:])] * 4):
    channels, rank = MODELS[model]
    layer = Layer(int(batch), int(length), channels, rank, torch.float16)
    layer.fused(lib.Variant(*map(int, fields.split(","))))()
    torch.cuda.synchronize()
