"""Where PyTorch is: export the shipped digits model, Vim-Ti and Vim-S, and write what PyTorch makes of their images.

    python trt85_reference.py OUT [NAME ...]        NAME: digits, vim_tiny, vim_small

OUT receives NAME.vim (by `vimdeploy export`), NAME.npz (images; logits in fp32, fp64 and, on a card, plain fp16; TF32
off) and for the digits the commands' own reference file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from official import official_content  # noqa: E402

from vimdeploy.export.exporter import ExportOptions, export_checkpoint  # noqa: E402
from vimdeploy.images import ImageFolder, open_image  # noqa: E402
from vimdeploy.models.loading import load_exported  # noqa: E402
from vimdeploy.models.variants import VimConfig  # noqa: E402
from vimdeploy.preprocess import Preprocessing  # noqa: E402
from vimdeploy.verify.reference import plain_model  # noqa: E402

NAME = "vim_{}_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
BATCH = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(out: Path, wanted: list[str]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    out.mkdir(parents=True, exist_ok=True)
    for size, width in (("tiny", 192), ("small", 384)):
        torch.save(
            official_content(VimConfig(d_model=width), NAME.format(size), ema=False, optimizer=False, steady=True),
            out / f"vim_{size}.pth",
        )
    checkpoints = {
        "digits": ROOT / "examples" / "digits" / "vim_digits.pth",
        "vim_tiny": out / "vim_tiny.pth",
        "vim_small": out / "vim_small.pth",
    }
    for name in wanted or checkpoints:
        checkpoint = checkpoints[name]
        started = time.perf_counter()
        result = export_checkpoint(checkpoint, out / f"{name}.vim", ExportOptions())
        info = result.info
        model = load_exported(info, result.model, checkpoint).to(DEVICE)
        labels = None
        if name == "digits":
            folder = ImageFolder(ROOT / "calib" / "digits" / "val")
            prepare = Preprocessing.from_dict(info.preprocessing)
            images = np.stack([prepare(open_image(path)) for path, _ in folder.samples])
            labels = np.array([label for _, label in folder.samples])
        else:
            shape = (BATCH, info.config.in_chans, *info.config.img_size)
            images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        outputs = {"fp32": run(model, images)}
        if DEVICE == "cuda":  # on a CPU it takes too long
            outputs["fp16"] = run(plain_model(model, "fp16"), images)
        outputs["fp64"] = run(model.double(), images)
        extra = {} if labels is None else {"labels": labels}
        np.savez(out / f"{name}.npz", images=images, **outputs, **extra)
        weights = sum(p.numel() for p in model.parameters())
        facts = {"torch": torch.__version__, "parameters": weights, "variant": info.variant}
        (out / f"{name}.json").write_text(json.dumps(facts))
        print(name, f"{time.perf_counter() - started:.1f} s", flush=True)


@torch.inference_mode()
def run(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    dtype = next(model.parameters()).dtype
    parts = [
        model(torch.from_numpy(images[i : i + BATCH]).to(DEVICE, dtype)).double().cpu().numpy()
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
