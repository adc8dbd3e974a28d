"""`vimdeploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vimdeploy.cli import render
from vimdeploy.errors import UsageError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output-path",
    "out",
    type=click.Path(path_type=Path),
    help="Folder to write, or a file ending in .onnx.  [default: the checkpoint's name with .vim, here]",
)
@click.option(
    "--weights",
    type=click.Choice(["model", "ema"]),
    default="model",
    show_default=True,
    help="Which set of weights in the checkpoint.",
)
@click.option(
    "--variant",
    help="Model name, alias (tiny, tiny+, small, small+, base) or settings such as "
    "stride=8,cls=middle,divide=yes, where the checkpoint does not say.",
)
@click.option("--img-size", metavar="SIZE|HxW", help="Export for other images than trained on.")
@click.option(
    "--pos-embed-mode",
    type=click.Choice(["layout", "repo"]),
    default="layout",
    show_default=True,
    help="How the position table follows --img-size: around the class token, or as upstream's routine does.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Type of weights and activations; norms, residual stream and the scan's inside stay fp32.",
)
@click.option("--opset", type=int, help="ONNX opset, 16 to 23.  [default: 18; 22 for bf16]")
@click.option("--static-batch", type=int, metavar="N", help="Fix the batch size.  [default: dynamic]")
@click.option(
    "--fallback",
    type=click.Choice(["scan", "linear-attention", "none"]),
    default="scan",
    show_default=True,
    help="What the file carries for runtimes without vimdeploy's library.",
)
@click.option(
    "--fusion",
    type=click.Choice(["none", "bidirectional", "full"]),
    default="full",
    show_default=True,
    help="Which ops the graph is written with: one scan a direction; both directions in one; convolution and norm too.",
)
@click.option(
    "--output",
    type=click.Choice(["logits", "features", "tokens"]),
    default="logits",
    show_default=True,
    help="Logits, the vector the head reads, or the patch tokens as a (C, h, w) map.",
)
@click.option("--labels", type=click.Path(path_type=Path), help="Text file with one class name a line.")
@click.option("--no-verify", is_flag=True, help="Do not compare the file with the PyTorch reference.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Real images for that comparison.  [default: photographs that come along]",
)
@render.json_option
def command(
    checkpoint: Path,
    out: Path | None,
    img_size: str | None,
    labels: Path | None,
    no_verify: bool,
    images: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn CHECKPOINT into an ONNX file that is checked against PyTorch.

    \b
    vimdeploy export vim_t_midclstok_76p1acc.pth
    vimdeploy export vim_t.pth --img-size 384 --precision fp16 -o vim_t_384.vim
    """  # fmt: skip
    with render.steps() as step:
        step("loading PyTorch")
        from vimdeploy.export.exporter import ExportOptions, export_checkpoint
        from vimdeploy.models.checkpoints import read_checkpoint
        from vimdeploy.models.variants import parse_size
        from vimdeploy.verify.parity import ParityReport, parity

        settings = ExportOptions(img_size=parse_size(img_size) if img_size else None, labels=_labels(labels), **options)
        step("reading the checkpoint")
        loaded = read_checkpoint(checkpoint)

        def check(file: Path) -> ParityReport:
            return parity(file, loaded, images=images, name=str(out or f"{checkpoint.stem}.vim"), step=step)

        result = export_checkpoint(loaded, out, settings, check=None if no_verify else check, step=step)

    report = result.report
    if as_json:
        render.emit_json({
            "path": str(result.path), "model": str(result.model), "variant": result.info.variant,
            "config": result.info.config.to_dict(), "precision": result.info.precision, "opset": result.opset,
            "fusion": result.info.fusion, "nodes": result.nodes, "ops": result.ops, "file_bytes": result.file_bytes,
            "weight_bytes": result.weight_bytes, "seconds": round(result.seconds, 2),
            "parity": report.to_dict() if report else None,
        })  # fmt: skip
        return
    out_ = render.out()
    config = result.info.config
    height, width = config.img_size
    over = result.file_bytes / result.weight_bytes - 1
    batch = options["static_batch"] or "batch"
    facts = [
        ("model", f"{result.info.variant}, {result.info.weights} weights"),
        ("input", f"images ({batch}, {config.in_chans}, {height}, {width}) fp32, {config.seq_len} tokens"),
        ("output", result.info.output),
        ("graph", f"{result.nodes} nodes, opset {result.opset}, {result.info.precision}, fusion {result.info.fusion}, "
                  f"fallback {result.info.fallback}"),
        ("operators", ", ".join(f"{count} vim::{name}" for name, count in result.ops.items())),
        ("file", f"{result.file_bytes / 1e6:.1f} MB, the weights and {over:.1%}; exported in {result.seconds:.1f} s"),
    ]  # fmt: skip
    out_.print(render.facts(facts))
    if report is None:
        out_.print("\nNot verified (--no-verify).", style="yellow")
    else:
        assert isinstance(report, ParityReport)
        out_.print()
        render.parity(report)
    where = render.typed(result.path)
    found = result.path.parent == Path() and result.path.suffix == ".vim"  # by `verify` itself
    commands = ["verify parity" if found else f"verify parity {render.typed(checkpoint)} {where}"]
    if result.info.output == "logits" and result.info.precision != "bf16":  # bf16 wants another device
        commands += [f"run {where} IMAGE...", f"eval {where} FOLDER"]
    render.wrote(result.path, "", *commands)


def _labels(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="--labels takes a text file with one class name a line")
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint="--labels takes one class name a line") from None
