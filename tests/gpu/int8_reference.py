"""Where PyTorch is: export what int8_trt85.py builds; Vim-S and Vim-B with random weights, for their speed and size.

    python int8_reference.py OUT [NAME ...]          NAME: digits, vim_small, vim_base (all)

OUT receives NAME.vim/model.onnx, and for the digits digits.npz (images, labels, logits of PyTorch in fp32) and
outliers.vim, the same network with outlier channels (tests/outliers.py).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
from official import official_content  # noqa: E402
from outliers import inject  # noqa: E402
from trt85_reference import DEVICE, NAME, run  # noqa: E402

from vimdeploy.bundle import read_info  # noqa: E402
from vimdeploy.export.exporter import ExportOptions, export_checkpoint  # noqa: E402
from vimdeploy.models.loading import load_exported  # noqa: E402
from vimdeploy.models.variants import VimConfig  # noqa: E402
from vimdeploy.quantize.images import load_images  # noqa: E402

WIDTHS = {"vim_small": ("small", 384), "vim_base": ("base", 768)}


def main(out: Path, wanted: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in wanted or ["digits", *WIDTHS]:
        started = time.perf_counter()
        if name == "digits":
            checkpoint = ROOT / "examples" / "digits" / "vim_digits.pth"
        else:
            size, width = WIDTHS[name]
            checkpoint = out / f"{name}.pth"
            content = official_content(
                VimConfig(d_model=width), NAME.format(size), ema=False, optimizer=False, steady=True
            )
            torch.save(content, checkpoint)
        exported = export_checkpoint(checkpoint, out / f"{name}.vim", ExportOptions())
        if name == "digits":
            images = load_images(ROOT / "calib" / "digits" / "val", exported.info, limit=None, labelled=True)
            network = load_exported(read_info(exported.model), exported.model, checkpoint).to(DEVICE)
            logits = run(network, images.batch).astype(np.float32)
            np.savez(out / "digits.npz", images=images.batch, labels=images.targets, fp32=logits)
            (out / "outliers.vim").mkdir(exist_ok=True)
            ir.save(inject(ir.load(exported.model), exported.info.fallback), out / "outliers.vim" / "model.onnx")
        else:
            checkpoint.unlink()  # hundreds of megabytes that nothing reads again
        print(name, f"{time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
