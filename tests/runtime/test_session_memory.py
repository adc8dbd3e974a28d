"""What an ONNX Runtime session on the CPU holds after its first run is all it ever takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from official import write_official
from ort_library import ort_library

from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.models.variants import VimConfig

PROBE = """
import json, re, sys
from pathlib import Path

import numpy as np

from vimdeploy.runtimes.onnxruntime import OrtSession


def peak():  # KiB; getrusage's would start at that of the process this one was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


model, library, side = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with OrtSession(model, library=library, threads=1) as session:
    images = np.zeros((2, 3, side, side), np.float32)
    before = peak()
    session.run(images)
    first = peak()
    for _ in range(2):
        session.run(images)
        session.run(images[:1])
    print(json.dumps([before, first, peak()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_later_runs_take_no_more_memory_than_the_first(tmp_path: Path) -> None:
    """With a plan of the memory, as ONNX Runtime has it by default, the second run takes another block."""
    config = VimConfig(d_model=128, depth=2, img_size=(640, 640), num_classes=5)
    name = "vim_micro_patch16_640_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    made = export_checkpoint(write_official(tmp_path / "m.pth", config, name), tmp_path / "m.vim", ExportOptions())
    command = [sys.executable, "-c", PROBE, str(made.model), str(ort_library()), "640"]
    before, first, last = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    taken = first - before
    assert taken > 20_000
    assert last - first < 0.1 * taken, (before, first, last)
