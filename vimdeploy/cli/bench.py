"""`vimdeploy bench`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from vimdeploy.cli import render
from vimdeploy.errors import UsageError
from vimdeploy.runtimes import RUNTIMES

if TYPE_CHECKING:
    from vimdeploy.bench.results import Results
    from vimdeploy.bench.run import Progress


class Several(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A comma-separated list, each part read by `one`; with multiple=True the option may be repeated too."""

    def __init__(self, name: str, one: Any) -> None:
        self.name, self._one = name, one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, tuple) else tuple(self._one(part) for part in value.split(","))


def _batch(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"--batch takes numbers from 1 up, not {text!r}", hint="--batch 1,8")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    from vimdeploy.models.variants import parse_size

    return parse_size(text)


@click.command("bench")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[ARTIFACT]...")
@click.option("--batch", "batches", type=Several("LIST", _batch), multiple=True, help="Batch sizes.  [default: 1]")
@click.option(
    "--img-size",
    "img_sizes",
    type=Several("LIST", _size),
    multiple=True,
    help="Image sizes, such as 224,512,384x512: the artifact's checkpoint is exported at each, and kept in a cache.  "
    "[default: the artifact's own]",
)
@click.option(
    "--against",
    type=Several("LIST", str.strip),
    multiple=True,
    help="Baselines: deit, deit-compile, deit-unfused (timm's DeiT of the same width), torch (Vim as published), "
    "onnxruntime (the same file without vimdeploy's library).",
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(RUNTIMES),
    multiple=True,
    help="What runs an ONNX file; may be repeated.  [default: the fastest that is there]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of operators on the CPU.  [default: the runtime's choice]")
@click.option("--plugin", type=click.Path(), help="A plan's plugin library.  [default: as built]")
@click.option("--no-library", is_flag=True, help="Run the function body in the file, without vimdeploy's op library.")
@click.option("--no-memory", is_flag=True, help="Do not measure memory, which takes a process each on the CPU.")
@click.option("--seconds", type=click.FloatRange(0.01), default=2.0, show_default=True, help="Of a contender and case.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns that share these seconds.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the results as JSON.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), metavar="HTML", help="Write a page of them.")
@render.json_option
def command(
    paths: tuple[Path, ...],
    batches: tuple[tuple[int, ...], ...],
    img_sizes: tuple[tuple[tuple[int, int], ...], ...],
    against: tuple[tuple[str, ...], ...],
    runtimes: tuple[str, ...],
    threads: int | None,
    plugin: str | None,
    no_library: bool,
    no_memory: bool,
    seconds: float,
    rounds: int,
    output: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Measure latency, throughput, memory and energy on this host.

    ARTIFACT is a .vim folder, an .onnx file, a .plan, a checkpoint, or a .json of an earlier run on this very host,
    whose rows then join the table; without it, the one .vim folder here. All contenders take turns. Exits 1 when an
    artifact failed.

    \b
    vimdeploy bench ckpt.vim --batch 1,8 --against deit
    vimdeploy bench ckpt.vim --img-size 224,512,1024 --against deit,torch --report bench.html
    vimdeploy bench ckpt.vim/model.onnx ckpt.vim/model.fp16.plan --batch 64
    """  # fmt: skip
    from vimdeploy.bench.measure import Effort
    from vimdeploy.bench.results import ARTIFACT, load, merge
    from vimdeploy.bench.run import Options, bench
    from vimdeploy.bundle import resolve_artifact

    earlier = [path for path in paths if path.suffix == ".json"]
    wants_plan = "tensorrt" in runtimes
    named = [path for path in paths if path not in earlier]
    artifacts = [resolve_artifact(path, plan=wants_plan) for path in named]
    if not paths:
        artifacts = [resolve_artifact(None, plan=wants_plan)]
    if report is not None and report.suffix not in (".html", ".htm"):
        raise UsageError(f"--report writes a page, and {report} does not end in .html", hint=f"--report {report}.html")
    parts, names = [load(path) for path in earlier], [str(path) for path in earlier]
    if parts:
        merge(parts, names)  # refuses before anything is measured
    if artifacts:
        options = Options(
            batches=tuple(dict.fromkeys(batch for group in batches for batch in group)) or (1,),
            img_sizes=tuple(dict.fromkeys(size for group in img_sizes for size in group)),
            against=tuple(dict.fromkeys(name for group in against for name in group)),
            runtimes=runtimes,
            threads=threads,
            library="off" if no_library else "auto",
            plugin=plugin,
            memory=not no_memory,
            effort=Effort(seconds, rounds),
        )
        _refuse_other_hosts(parts, names)
        with _showing() as progress:
            parts.append(bench(artifacts, options, progress))
        names.append("this run")
    results = merge(parts, names)
    if output is not None:
        results.save(output)
    if report is not None:
        from vimdeploy.report.bench import write_report

        write_report(results, report)
    if as_json:
        render.emit_json(results.to_dict())
    else:
        _print(results)
        for path in (output, report):
            if path is not None:
                render.out().print(f"Wrote {render.shown(path)}")
    if any(row.failed and row.role == ARTIFACT for row in results.rows):
        click.get_current_context().exit(1)


def _refuse_other_hosts(parts: list[Results], names: list[str]) -> None:
    """Before the minutes of measuring: earlier results must be of this host."""
    if not parts:
        return
    from vimdeploy.bench.host import describe_host
    from vimdeploy.bench.results import Results, merge

    merge([*parts, Results(describe_host(), {}, ())], [*names, "this host"])


def _print(results: Results) -> None:
    from vimdeploy.bench.results import memory_fraction, speedup
    from vimdeploy.report.bench import number

    console = render.out()
    card, cpu = results.host.get("card"), results.host["cpu"]
    console.print(f"{card['name'] + ', ' if card else ''}{cpu['name']}, {cpu['cores']} cores", style="dim")
    right = ("p50 ms", "p95 ms", "p99 ms", "images/s", "speed-up", "MiB", "fraction", "mJ/image")
    for case in results.cases():
        batch, (height, width) = case
        subject = results.subject(case)
        rows = []
        for row in results.of(case):
            if row.failed or row.latency_ms is None:
                rows.append((escape(row.contender), "[red]failed[/red]", *[""] * (len(right) - 1)))
                continue
            compared = subject is not None and row is not subject
            ratio = speedup(row, subject) if compared and subject else None
            fraction = memory_fraction(row, subject) if compared and subject else None
            rows.append(
                (
                    escape(row.contender) if compared else f"[bold]{escape(row.contender)}[/bold]",
                    *(number(row.latency_ms[key]) for key in ("p50", "p95", "p99")),
                    number(row.images_per_s),
                    "" if ratio is None else f"{ratio:.2f} x",
                    number(row.peak_mib),
                    "" if fraction is None else f"{fraction:.2f}",
                    "" if row.joules_per_image is None else number(1e3 * row.joules_per_image),
                )
            )
        size = f"{height}" if height == width else f"{height}x{width}"
        console.print(f"\n{size} px, batch {batch}, {results.of(case)[0].tokens} tokens")
        console.print(render.table(("", *right), rows, right=right))
    for row in results.rows:
        if row.failed:
            console.print(f"{escape(row.contender)} failed: {escape(row.failed)}", style="red")
    for notice in dict.fromkeys([*results.notices, *(notice for row in results.rows for notice in row.notices)]):
        console.print(f"note: {escape(notice)}", style="yellow")
    if any(results.subject(case) for case in results.cases()):
        console.print("speed-up, fraction: of the first artifact over this row, in throughput and memory", style="dim")


@contextlib.contextmanager
def _showing() -> Iterator[Progress]:
    """A bar on stderr whose text says what is being done."""
    from vimdeploy.bench.run import Progress

    with render.progress() as bar:
        task = bar.add_task("looking at the artifacts", total=1)

        class Bar(Progress):
            def start(self, steps: int) -> None:
                bar.update(task, total=max(steps, 1))

            def step(self, text: str) -> None:
                bar.update(task, description=escape(text))

            def advance(self) -> None:
                bar.update(task, advance=1)

        yield Bar()
