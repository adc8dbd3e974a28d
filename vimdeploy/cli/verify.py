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
    help="Compare in this runtime only, and fail when it is not there: onnxruntime (with vimdeploy's library), "
    "onnxruntime-body (without), onnxruntime-cuda, torch-cuda (vimdeploy's kernels in PyTorch), tensorrt (the plans). "
    "May be repeated.  [default: every one found, but for torch-cuda]",
)
@click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of real images.  [default: photographs that come along]"
)
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Images of each kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random images.")
@click.option("--plugin", type=click.Path(path_type=Path), help="The plans' plugin library.  [default: as built]")
@click.option(
    "--save-reference",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write images and reference outputs, for a host without PyTorch.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Compare with such a file: no CHECKPOINT, no PyTorch.",
)
@render.json_option
def parity_command(
    paths: tuple[Path, ...],
    runtimes: tuple[str, ...],
    images: Path | None,
    samples: int,
    seed: int,
    plugin: Path | None,
    save_reference: Path | None,
    reference: Path | None,
    as_json: bool,
) -> None:
    """Compare ARTIFACT's outputs with the network of CHECKPOINT.

    ARTIFACT is a .vim folder (its ONNX file, every plan and every int8 file in it), an ONNX file or a plan, by default
    the one .vim folder here; CHECKPOINT is by default the one the artifact was exported from. Exits 1 when they differ.

    \b
    vimdeploy verify parity
    vimdeploy verify parity ckpt.pth ckpt.vim --images val/ --samples 64
    vimdeploy verify parity ckpt.vim --save-reference ref.npz   # where PyTorch is
    vimdeploy verify parity ckpt.vim --reference ref.npz        # where TensorRT is
    """  # fmt: skip
    from vimdeploy.bundle import checkpoint_of, plans_in, quantized_in, resolve_artifact

    artifacts = [path for path in paths if path.suffix in (".vim", ".onnx", ".plan") or path.is_dir()]
    checkpoints = [path for path in paths if path not in artifacts]
    if len(artifacts) > 1 or len(checkpoints) > 1:
        raise UsageError(f"cannot tell which of {', '.join(map(str, paths))} is the checkpoint and which the artifact",
                         hint="name one checkpoint and one .vim folder, .onnx file or .plan")  # fmt: skip
    if reference is not None and (checkpoints or images or save_reference):
        raise UsageError("--reference takes the place of CHECKPOINT, --images and --save-reference",
                         hint="leave them out, or leave out --reference")  # fmt: skip
    artifact = resolve_artifact(artifacts[0] if artifacts else None)
    # A folder stands for all that was made in it, a file for itself.
    whole = not artifacts or artifacts[0].is_dir()
    checkpoint = None if reference is not None else checkpoints[0] if checkpoints else checkpoint_of(artifact)
    with render.steps() as step:
        step("loading PyTorch" if reference is None else "loading the reference")
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
            plans=tuple(plans_in(artifact.parent)) if whole else (),
            quantized=tuple(quantized_in(artifact.parent)) if whole else (),
            plugin=plugin,
            reference=reference,
            save_reference=save_reference,
        )
    if as_json:
        render.emit_json(report.to_dict())
    else:
        render.parity(report)
    if not report.passed:
        click.get_current_context().exit(1)
