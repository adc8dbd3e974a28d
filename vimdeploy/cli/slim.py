"""`vimdeploy slim`: one set of weights out of a checkpoint, as safetensors."""

from __future__ import annotations

from pathlib import Path

import click

from vimdeploy.cli import render


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write [default: CHECKPOINT.safetensors here]."
)
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", help="Which set to keep.")
@click.option("--variant", help="What the file cannot tell: a name, settings, or both.")
@render.json_option
def command(checkpoint: Path, output: Path | None, weights: str, variant: str | None, as_json: bool) -> None:
    """Drop the spare copies of the weights; write safetensors.

    Official checkpoints hold the weights four times: the model, its moving average, and two for the optimizer. What was
    recognised goes into the new file, so no later command needs --variant.

    \b
    vimdeploy slim ckpt.pth -o vim-tiny.safetensors
    """
    with render.steps() as step:
        step("reading the checkpoint")
        from vimdeploy.models.loading import slim

        result = slim(checkpoint, output or Path(checkpoint.stem + ".safetensors"), weights, variant)
    if as_json:
        render.emit_json(
            {
                "file": str(result.path),
                "bytes_before": result.before,
                "bytes_after": result.after,
                "weights": weights,
                "variant": result.recognition.variant,
                "how": list(result.recognition.how),
            }
        )
        return
    click.echo(f"{checkpoint}: {mb(result.before)}, {result.recognition.variant}")
    share = 1 - result.after / result.before
    click.echo(f"{result.path}: {mb(result.after)}" + (f" ({share:.0%} smaller)" if share > 0.005 else ""))


def mb(size: int) -> str:
    """Bytes in decimal megabytes, as file managers and hubs show them."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
