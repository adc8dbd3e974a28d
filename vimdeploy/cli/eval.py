"""`vimdeploy eval`: how often a model is right."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click
from rich.markup import escape

from vimdeploy.bundle import resolve_artifact
from vimdeploy.cli import render
from vimdeploy.errors import CheckFailed, UsageError
from vimdeploy.images import ImageFolder
from vimdeploy.runtimes import RUNTIMES, open_session


@click.command("eval")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="[ARTIFACT] FOLDER")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Images per run.")
@click.option("--limit", type=click.IntRange(min=1), help="Take this many images, spread evenly over the folder.")
@click.option("--min-top1", type=click.FloatRange(0, 100), metavar="PERCENT", help="Exit with 1 when top-1 is below.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="ARTIFACT",
    help="Compare with another file of the model on the same images: the fp32 file an int8 one was made of.",
)
@click.option("--runtime", type=click.Choice(RUNTIMES), help="What runs it.  [default: what the file is made for]")
@click.option("--plugin", type=click.Path(path_type=Path), help="A plan's plugin library.  [default: as built]")
@click.option("--no-library", is_flag=True, help="Run the function body in the file, without vimdeploy's op library.")
@render.json_option
def command(
    paths: tuple[Path, ...],
    batch_size: int,
    limit: int | None,
    min_top1: float | None,
    against: Path | None,
    runtime: str | None,
    plugin: Path | None,
    no_library: bool,
    as_json: bool,
) -> None:
    """Measure accuracy over a folder with one sub-folder for each class.

    A class is the position of its folder among the sorted names, as in training; when every folder is named after one
    of the model's labels, the names decide. ARTIFACT is a .vim folder, an .onnx file or a .plan; without it, the one
    .vim folder here.

    \b
    vimdeploy eval ckpt.vim imagenet/val
    vimdeploy eval ckpt.vim imagenet/val --limit 1000 --min-top1 75
    vimdeploy eval ckpt.vim/model.int8.onnx imagenet/val --against ckpt.vim
    """
    from vimdeploy.evaluate import evaluate

    if len(paths) > 2:
        raise UsageError(f"{len(paths)} paths given; eval takes an artifact and one folder")
    if min_top1 is not None and 0 < min_top1 <= 1:
        # 0.97 was meant as 97 far more often than as a bar below one percent, which anything passes.
        raise UsageError(f"--min-top1 is in percent: {min_top1:g} is nearly nothing", hint=f"write {100 * min_top1:g}")
    model = resolve_artifact(paths[0] if len(paths) == 2 else None, plan=runtime == "tensorrt")
    folder = ImageFolder(paths[-1])
    library = "off" if no_library else "auto"
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(open_session(model, runtime=runtime, library=library, plugin=plugin))
        other = None
        if against is not None:
            reference = resolve_artifact(against)
            other = stack.enter_context(
                open_session(reference, library="auto" if reference.suffix == ".plan" else library)
            )
        for notice in (session.notice, other and other.notice, *folder.notices):
            if notice:
                render.err().print(escape(notice), soft_wrap=True)
        with render.progress() as progress:
            task = progress.add_task("Evaluating", total=min(limit or len(folder.samples), len(folder.samples)))
            result = evaluate(
                session,
                folder,
                batch_size=batch_size,
                limit=limit,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
                against=other,
            )
        notice = session.notice
    if as_json:
        notices = [text for text in (notice, *folder.notices) if text]
        render.emit_json({"model": str(model), "notices": notices, **result.to_dict()})
    else:
        low, high = result.top1_interval
        speed = result.images_per_s
        rows = [
            ("images", f"{result.n} of {len(folder.samples)}, {len(folder.classes)} classes"),
            ("top-1", f"{100 * result.top1:.2f} %  (95 % interval {100 * low:.2f} to {100 * high:.2f})"),
            (f"top-{result.k}", f"{100 * result.topk:.2f} %"),
            (
                "images/s",
                f"{speed['inference']:.1f} in the runtime, {speed['decode']:.1f} decoding, {speed['total']:.1f} in all"
                f"  (batch {result.batch_size})",
            ),
            ("runtime", escape(result.runtime)),
            ("model", escape(str(model))),
        ]
        if result.against is not None:
            rows.append((f"against {escape(str(against))}", result.against.text()))
        summary = render.table(("", ""), rows)
        summary.show_header = False
        render.out().print(summary)
    if min_top1 is not None and 100 * result.top1 < min_top1:
        raise CheckFailed(
            f"top-1 is {100 * result.top1:.2f} %, below the {min_top1:g} % asked for",
            hint="check the labels of the folder, and the file with `vimdeploy verify parity`",
        )
