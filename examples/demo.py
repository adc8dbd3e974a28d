"""The whole way of one model, as `make demo` shows it: inspect, export, verify, run, eval, quantize.

Every step is the command a user would type, run in the folder demo/ on the trained digits model that comes with the
repository. Takes about half a minute on two cores.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples" / "digits" / "vim_digits.pth"
HELD_OUT = ROOT / "calib" / "digits" / "val"
WORK = ROOT / "demo"
SHOWN = ("3", "5", "8", "9")


def vimdeploy(*arguments: str) -> None:
    """Run one command, its line shown first; stop with its exit code when it fails."""
    print(f"\n$ vimdeploy {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "vimdeploy", *arguments]
    done = subprocess.run(command, cwd=WORK, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def picture(path: Path) -> list[str]:
    """A digit as text: two pixels to a character, the empty frame left out."""
    image = Image.open(path).convert("L").crop((4, 4, 24, 24))
    ink = [[image.getpixel((x, y)) > 96 for x in range(20)] for y in range(20)]  # type: ignore[operator]
    blocks = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    return ["".join(blocks[top, bottom] for top, bottom in zip(ink[y], ink[y + 1])) for y in range(0, 20, 2)]


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    shutil.copy(CHECKPOINT, WORK / "ckpt.pth")

    print("1. What is in the checkpoint?")
    vimdeploy("inspect", "ckpt.pth")

    print("\n2. One command from checkpoint to an ONNX file that matches PyTorch, on random and on held-out images:")
    vimdeploy("export", "ckpt.pth", "--images", str(HELD_OUT))

    print("\n3. The check again, on its own, in every runtime found here:")
    vimdeploy("verify", "parity", "--images", str(HELD_OUT), "--samples", "32")

    print("\n4. A few held-out images:\n")
    images = [sorted((HELD_OUT / digit).glob("*.png"))[0] for digit in SHOWN]
    for line in zip(*(picture(path) for path in images)):
        print("   ".join(line))
    vimdeploy("run", "ckpt.vim", *(str(path) for path in images), "--top-k", "2")

    print("\n5. All 1,000 held-out images, with vimdeploy's library and on the file's function body:")
    vimdeploy("eval", "ckpt.vim", str(HELD_OUT), "--min-top1", "97")
    vimdeploy("eval", "ckpt.vim", str(HELD_OUT), "--no-library", "--min-top1", "97")

    print("\n6. The same in int8, calibrated on 256 images, beside fp32 on the held-out ones:")
    vimdeploy("quantize", "ckpt.vim", "--calib", "digits")
    vimdeploy("eval", "ckpt.vim/model.int8.onnx", str(HELD_OUT), "--against", "ckpt.vim", "--min-top1", "96.5")

    print(f"\nDone in {time.perf_counter() - started:.0f} s. With your own checkpoint, you would type:\n")
    print("  vimdeploy export ckpt.pth")
    print("  vimdeploy verify parity")
    print("  vimdeploy run ckpt.vim IMAGE...")


if __name__ == "__main__":
    main()
