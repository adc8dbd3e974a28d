"""`vimdeploy quantize`."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.progress import TaskID

from vimdeploy.bundle import resolve_artifact
from vimdeploy.cli import render
from vimdeploy.errors import UsageError

#: As in vimdeploy.passes.projections and .quantize.choose, which take a second to import.
OPTIONAL_KINDS = ("x_proj", "dt_proj", "patch_embed", "head")
METHODS = ("auto", "minmax", "percentile", "entropy")


@click.command("quantize")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--calib",
    required=True,
    metavar="FOLDER|SET|FILE",
    help="Images like those the model will see: a folder, or a set of calib/index.json. The .calib.json of an earlier "
    "run does the same again without images.",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="File to write, ending in .onnx.  [default: model.int8.onnx beside the model]",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Top-1 it may cost; layers stay in fp32 until that holds. By labels where the images are sorted into the "
    "model's classes, else by agreement with fp32.",
)
@click.option("--val", type=click.Path(path_type=Path), help="Labelled images to hold --max-drop on, instead.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="Where an activation is cut off; auto takes for each layer what changes its output least.",
)
@click.option("--smooth/--no-smooth", default=True, show_default=True, help="Even out channels first; exact.")
@click.option(
    "--include",
    type=click.Choice(OPTIONAL_KINDS),
    multiple=True,
    help="Quantize these too, besides in_proj and out_proj. May be repeated.",
)
@click.option(
    "--keep-fp",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Layers that stay in fp32: the report of an earlier run, or a text file with a name a line. No others join.",
)
@click.option("--images", "limit", type=click.IntRange(1), default=256, show_default=True, help="Take so many images.")
@render.json_option
def command(
    model: Path | None,
    calib: str,
    out: Path | None,
    max_drop: float,
    val: Path | None,
    method: str,
    smooth: bool,
    include: tuple[str, ...],
    keep_fp: Path | None,
    limit: int,
    as_json: bool,
) -> None:
    """Turn the linear layers of MODEL into int8, and measure what that costs.

    MODEL is a .vim folder or an fp32 .onnx file; without it, the one .vim folder here. One file comes out for ONNX
    Runtime and every TensorRT; beside it a report of each layer, and the calibration to repeat it with.

    \b
    vimdeploy quantize --calib imagenet/train-256
    vimdeploy quantize ckpt.vim --calib digits --val imagenet/val --max-drop 0.3
    vimdeploy quantize ckpt.vim --calib ckpt.vim/model.calib.json -o again.onnx
    """
    artifact = resolve_artifact(model)
    if artifact.suffix == ".plan":
        raise UsageError(f"{artifact} is an engine already", hint="name the .vim folder or the .onnx file it came from")
    with showing() as tell:
        tell("loading ONNX Runtime", 0, 0)
        from vimdeploy.quantize.recipe import QuantizeOptions, quantize_model, read_keep_fp

        options = QuantizeOptions(
            calib=calib,
            method=method,
            smooth=smooth,
            include=include,
            max_drop=max_drop,
            keep_fp=() if keep_fp is None else read_keep_fp(keep_fp),
            search=keep_fp is None,
            val=val,
            limit=limit,
        )
        result = quantize_model(artifact, out, options, tell=tell)
    for notice in result.notices:
        render.err().print(escape(notice), soft_wrap=True)
    if as_json:
        render.emit_json({"path": str(result.path), "cache": str(result.cache), **result.report})
        return
    console = render.out()
    console.print(render.facts(_facts(result.info.variant, result.report)))
    where = render.typed(result.path)
    commands = (f"eval {where} FOLDER --against {render.typed(artifact)}", f"build-engine --int8 {where}")
    render.wrote(result.path, ", its report and its calibration", *commands)


def _facts(variant: str, report: dict[str, Any]) -> list[tuple[str, str]]:
    images, layers, accuracy, products = (report[k] for k in ("images", "layers", "accuracy", "onnxruntime_products"))
    kinds = collections.Counter(entry["kind"] for entry in layers if entry["in"] == "int8")
    worst = sorted((e for e in layers if e["output_sqnr_db"] is not None), key=lambda e: e["output_sqnr_db"])[:3]
    rows = [
        ("model", variant),
        ("calibrated", escape(f"on {images['n']} images of {images['source']}")),
        ("int8", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("fp32", ", ".join(report["keep_fp"]) or "no layer had to stay"),
    ]
    if worst:
        rows.append(("most sensitive", ", ".join(f"{e['name']} ({e['output_sqnr_db']:.1f} dB)" for e in worst)))
    if accuracy is None:
        rows.append(("accuracy", "not measured: no images were given"))
    else:
        rows.append(("accuracy", f"on {accuracy['n']} images: {accuracy['text']}"))
    size = report["bytes"]
    if products is not None:
        rows.append(("ONNX Runtime", f"{products['int8']} products in int8, {products['fp32']} in fp32"))
    rows += [
        ("file", f"{size['int8'] / 1e6:.1f} MB, {size['int8'] / size['fp32']:.2f} of fp32"),
        ("time", f"{report['seconds']['total']:.1f} s"),
    ]
    return rows


@contextlib.contextmanager
def showing() -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr, renamed as the work goes on."""
    with render.progress() as bar:
        shown: list[tuple[TaskID, str]] = []

        def tell(text: str, done: int, total: int) -> None:
            if not shown or shown[0][1] != text:
                for task, _ in shown:
                    bar.remove_task(task)
                shown[:] = [(bar.add_task(text, total=total or 1), text)]
            bar.update(shown[0][0], completed=done, total=total or 1)

        yield tell
