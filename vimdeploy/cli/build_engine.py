"""`vimdeploy build-engine`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import TaskID

from vimdeploy.bundle import resolve_artifact
from vimdeploy.cli import render
from vimdeploy.engines.build import BuildOptions, BuildResult, Progress, build_engine
from vimdeploy.engines.capabilities import RUNTIMES
from vimdeploy.errors import UsageError

_BATCH = click.IntRange(min=1)


@click.command("build-engine")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="File to write, ending in .plan.  [default: model.<precision>.plan beside the model]",
)
@click.option(
    "--fp16", is_flag=True, help="Type the graph to fp16; norms, residual stream and the scan's inside stay fp32."
)
@click.option("--bf16", is_flag=True, help="The same in bf16 (TensorRT 10 and later).")
@click.option(
    "--int8",
    is_flag=True,
    help="Linear layers in int8, the rest in fp16 (or --bf16). Quantizes the model first where it is not.",
)
@click.option(
    "--calib",
    metavar="FOLDER|SET|FILE",
    help="What to quantize on, as of `vimdeploy quantize`.  [default: model.int8.onnx beside the model, as it is]",
)
@click.option(
    "--fusion",
    type=click.Choice(["none", "bidirectional", "full"]),
    help="Which ops the graph is written with.  [default: full; what the file has where no plugin is taken]",
)
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="Let fp32 matrix products round to 10 bits.")
@click.option("--min-batch", type=_BATCH, help="Smallest batch the engine takes.  [default: 1]")
@click.option("--opt-batch", type=_BATCH, help="Batch it is tuned for.  [default: 8]")
@click.option("--max-batch", type=_BATCH, help="Largest batch.  [default: 64]")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Kernel timings of earlier builds: read, and updated. Makes the next build much faster.",
)
@click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="Scratch memory a layer may use.")
@click.option("--version-compatible", is_flag=True, help="Let later TensorRT versions load the plan (8.6 and later).")
@click.option(
    "--plugin", type=click.Path(path_type=Path), help="vimdeploy's plugin library.  [default: the one installed]"
)
@click.option("--runtime", type=click.Choice(RUNTIMES), default=RUNTIMES[0], show_default=True, help="What builds it.")
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the card.")
@render.json_option
def command(
    model: Path | None,
    out: Path | None,
    fp16: bool,
    bf16: bool,
    int8: bool,
    calib: str | None,
    fusion: str | None,
    tf32: bool,
    min_batch: int | None,
    opt_batch: int | None,
    max_batch: int | None,
    timing_cache: Path | None,
    workspace: int | None,
    version_compatible: bool,
    plugin: Path | None,
    runtime: str,
    device: int,
    as_json: bool,
) -> None:
    """Build MODEL into a TensorRT engine for the card in this host.

    MODEL is a .vim folder or an .onnx file; without it, the one .vim folder here. Beside the plan lies a .json that
    says what it was built for; trtexec and C++ programs load the plan as it is.

    \b
    vimdeploy build-engine --fp16
    vimdeploy build-engine ckpt.vim --fp16 --max-batch 128 --timing-cache ckpt.vim/timing.cache
    vimdeploy build-engine ckpt.vim --int8 --calib imagenet/train-256
    """
    if calib is not None and not int8:
        raise UsageError("--calib is for --int8", hint="add --int8, or leave out --calib")
    if fp16 and bf16:
        raise UsageError("--fp16 and --bf16 exclude each other", hint="choose one")
    options = BuildOptions(
        runtime=runtime,
        precision="fp16" if fp16 else "bf16" if bf16 else None,
        int8=int8,
        fusion=fusion,
        tf32=tf32,
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        timing_cache=timing_cache,
        workspace=None if workspace is None else workspace << 20,
        version_compatible=version_compatible,
        plugin=plugin,
        device=device,
    )
    artifact = resolve_artifact(model)
    if artifact.suffix == ".plan":
        raise UsageError(f"{artifact} is an engine already", hint="name the .vim folder or the .onnx file it came from")
    if int8:
        artifact = _int8_file(artifact, calib)
    with _showing() as progress:
        result = build_engine(artifact, out, options, progress=progress)
    for notice in result.notices:
        render.err().print(escape(notice), soft_wrap=True)
    if as_json:
        render.emit_json(
            {
                "plan": str(result.plan),
                "seconds": round(result.seconds, 2),
                "total_seconds": round(result.total_seconds, 2),
                "plan_bytes": result.plan_bytes,
                "notices": list(result.notices),
                "sidecar": result.sidecar.to_dict(),
            }
        )
        return
    _print(result)


def _int8_file(artifact: Path, calib: str | None) -> Path:
    """The quantized file of `artifact`: itself, the one beside it, or one made now."""
    from vimdeploy.bundle import read_info, sha256_of

    info = read_info(artifact)
    if info.quantization:
        if calib is not None:
            raise UsageError(f"{artifact} is int8 already", hint="leave out --calib, or name the fp32 file")
        return artifact
    beside = artifact.with_name(f"{artifact.stem}.int8.onnx")
    if calib is None:
        if not beside.is_file():
            raise UsageError(f"{artifact} is not quantized yet", hint="say on which images: --calib FOLDER")
        if read_info(beside).quantization.get("source_sha256") != sha256_of(artifact):
            raise UsageError(
                f"{beside} was made of another {artifact.name}", hint="quantize anew, on images: --calib FOLDER"
            )
        return beside
    from vimdeploy.cli.quantize import showing
    from vimdeploy.quantize.recipe import QuantizeOptions, quantize_model

    with showing() as tell:
        made = quantize_model(artifact, None, QuantizeOptions(calib), tell=tell)
    for notice in made.notices:
        render.err().print(escape(notice), soft_wrap=True)
    accuracy = made.report["accuracy"]
    render.err().print(
        f"Quantized to {escape(render.shown(made.path))}" + (f": {accuracy['text']}" if accuracy else ""),
        soft_wrap=True,
    )
    return made.path


def _print(result: BuildResult) -> None:
    sidecar, console = result.sidecar, render.out()
    device, cache, found = sidecar.device, sidecar.build["timing_cache"], sidecar.precision
    seen = ", ".join(f"{count} in {kind}" for kind, count in found["projections"].items())
    kept = ", ".join(f"{count} in {kind}" for kind, count in found["islands"].items()) or "fused into others"
    hidden = f"; {found['hidden']} inside fused regions" if found["hidden"] else ""
    plugin = Path(sidecar.plugin["file"]).name if sidecar.plugin else "none: the op's function body is built in"
    timings = "" if cache is None else f", timing cache {'warm' if cache['warm'] else 'cold'}"
    console.print(
        render.facts(
            [
                ("model", f"{result.info.variant}, {result.info.output}"),
                ("built by", f"{sidecar.runtime['name']} {sidecar.runtime['version']}"),
                (
                    "for",
                    f"{device['name']}, sm_{device['sm']}" if device else "RTX cards, compiled further on first use",
                ),
                ("input", str(sidecar.profile)),
                (
                    "precision",
                    f"{_asked(found)}, seen in the {found['source']}: projections {seen}{hidden}; norms {kept}",
                ),
                ("plugin", plugin),
                ("fusion", str(sidecar.build.get("fusion", "none"))),
                ("build", f"{result.seconds:.1f} s{timings}"),
                ("plan", f"{result.plan_bytes / 1e6:.1f} MB"),
            ]
        )
    )
    where = "" if result.plan.parent.suffix == ".vim" else f" {render.typed(result.plan)}"
    render.wrote(result.plan, f" and {result.plan.name}.json", f"verify parity{where}")


def _asked(found: Mapping[str, Any]) -> str:
    return f"int8, the rest {found['rest']}" if found["asked"] == "int8" else str(found["asked"])


@contextlib.contextmanager
def _showing() -> Iterator[Progress]:
    """The builder's phases as bars on stderr, the outermost two; a spinner with a text where it reports none."""
    with render.progress() as bar:
        yield _Bars(bar)


class _Bars(Progress):
    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._step: TaskID | None = None
        self._tasks: dict[str, tuple[TaskID | None, int]] = {}

    def step(self, text: str) -> None:
        if self._step is not None:
            self._bar.remove_task(self._step)
        self._step = self._bar.add_task(text, total=1)

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        depth = self._tasks[parent][1] + 1 if parent in self._tasks else 0
        task = self._bar.add_task("  " * depth + name, total=steps) if depth < 2 else None
        self._tasks[name] = (task, depth)

    def advance(self, name: str, done: int) -> bool:
        task, _ = self._tasks.get(name, (None, 0))
        if task is not None:
            self._bar.update(task, completed=done + 1)
        return True

    def finish(self, name: str) -> None:
        task, _ = self._tasks.pop(name, (None, 0))
        if task is not None:
            self._bar.remove_task(task)
