"""`vimdeploy verify`."""

from __future__ import annotations

from pathlib import Path

import click

from vimdeploy.cli import render
from vimdeploy.errors import UsageError


@click.group()
def command() -> None:
    """Check an artifact against the PyTorch reference."""


@command.command("parity")
@click.argument("paths", nargs=-1, metavar="[CHECKPOINT] [ARTIFACT]", type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="Compare in this runtime only, and fail when it is not there: onnxruntime (with vimdeploy's "
    "library), onnxruntime-body (without). May be repeated.  [default: every one found]",
)
@click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of real images.  [default: photographs that come along]"
)
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Images of each kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random images.")
@render.json_option
def parity_command(
    paths: tuple[Path, ...], runtimes: tuple[str, ...], images: Path | None, samples: int, seed: int, as_json: bool
) -> None:
    """Compare ARTIFACT's outputs with the network of CHECKPOINT.

    ARTIFACT is a .vim folder or an ONNX file, by default the one .vim folder here; CHECKPOINT is by default the one
    the artifact was exported from. Exits 1 when they differ.

    \b
    vimdeploy verify parity
    vimdeploy verify parity ckpt.pth ckpt.vim --images val/ --samples 64
    """  # fmt: skip
    from vimdeploy.bundle import checkpoint_of, resolve_artifact

    artifacts = [path for path in paths if path.suffix in (".vim", ".onnx", ".plan") or path.is_dir()]
    checkpoints = [path for path in paths if path not in artifacts]
    if len(artifacts) > 1 or len(checkpoints) > 1:
        raise UsageError(f"cannot tell which of {', '.join(map(str, paths))} is the checkpoint and which the artifact",
                         hint="name one checkpoint and one .vim folder or .onnx file")  # fmt: skip
    artifact = resolve_artifact(artifacts[0] if artifacts else None)
    checkpoint = checkpoints[0] if checkpoints else checkpoint_of(artifact)
    with render.steps() as step:
        step("loading PyTorch")
        from vimdeploy.verify.parity import parity

        report = parity(
            artifact,
            checkpoint,
            runtimes=runtimes or None,
            images=images,
            samples_each=samples,
            seed=seed,
            name=render.shown(artifact.parent if artifact.parent.suffix == ".vim" else artifact),
            step=step,
        )
    if as_json:
        render.emit_json(report.to_dict())
    else:
        render.parity(report)
    if not report.passed:
        click.get_current_context().exit(1)
