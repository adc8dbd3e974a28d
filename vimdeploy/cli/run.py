"""`vimdeploy run`: what a model sees in pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.markup import escape

from vimdeploy.bundle import resolve_artifact
from vimdeploy.cli import render
from vimdeploy.errors import UsageError
from vimdeploy.images import is_image_name
from vimdeploy.runtimes import RUNTIMES, open_session

BAR = 24


@click.command("run")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="[ARTIFACT] IMAGE...")
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(min=1), help="Guesses to show per image.")
@click.option("--runtime", type=click.Choice(RUNTIMES), help="What runs it.  [default: what the file is made for]")
@click.option("--plugin", type=click.Path(path_type=Path), help="A plan's plugin library.  [default: as built]")
@click.option("--no-library", is_flag=True, help="Run the function body in the file, without vimdeploy's op library.")
@render.json_option
def command(
    paths: tuple[Path, ...], top_k: int, runtime: str | None, plugin: Path | None, no_library: bool, as_json: bool
) -> None:
    """Classify images.

    ARTIFACT is a .vim folder, an .onnx file or a .plan; without it, the one .vim folder here. Images are prepared as
    the model's metadata says.

    \b
    vimdeploy run ckpt.vim cat.jpg dog.png
    vimdeploy run cat.jpg --top-k 3
    """
    from vimdeploy.evaluate import classify, preprocessing_of

    artifact, images = _split(paths)
    model = resolve_artifact(artifact, plan=runtime == "tensorrt")
    if not images:
        raise UsageError("no image to classify", hint=f"vimdeploy run {render.typed(paths[0])} IMAGE...")
    with open_session(model, runtime=runtime, library="off" if no_library else "auto", plugin=plugin) as session:
        preprocessing_of(session)  # a model that does not classify is refused before any image is read
        if session.notice:
            render.err().print(escape(session.notice), soft_wrap=True)
        results = []
        for path in images:
            predictions = classify(session, path, top_k)
            results.append({"image": str(path), "predictions": [dataclasses.asdict(p) for p in predictions]})
            if not as_json:
                console = render.out()
                block, rest = _marks(console.encoding)
                console.print(f"[bold]{escape(str(path))}[/bold]")
                rows = [
                    (f"{100 * p.probability:5.1f} %", _bar(p.probability, block, rest), escape(p.label))
                    for p in predictions
                ]
                ranked = render.table(("", "", ""), rows)
                ranked.show_header = False
                console.print(ranked)
        if as_json:
            render.emit_json(
                {
                    "model": str(model),
                    "variant": session.info.variant,
                    "runtime": session.describe(),
                    "notice": session.notice,
                    "images": results,
                }
            )


def _split(paths: tuple[Path, ...]) -> tuple[Path | None, tuple[Path, ...]]:
    """The artifact and the images: a first path that is named like an image is one."""
    first = paths[0]
    if first.is_dir() or first.suffix in (".onnx", ".vim", ".plan"):
        return first, paths[1:]
    from PIL import Image

    if is_image_name(first) or first.suffix.lower() in Image.registered_extensions():
        return None, paths
    return first, paths[1:]


def _marks(encoding: str) -> tuple[str, str]:
    return ("█", "░") if encoding.lower().startswith("utf") else ("#", ".")


def _bar(probability: float, block: str, rest: str) -> str:
    filled = round(probability * BAR)
    return block * filled + rest * (BAR - filled)
