"""What commands print: results to stdout, progress and notices to stderr, JSON when asked, plain off a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from vimdeploy.verify.parity import ParityReport, Row

_UNFOLDED = 1000


def out() -> Console:
    """Results go here. Off a terminal nothing is wrapped or folded: a name stays one word for whoever reads the log."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_UNFOLDED)


def err() -> Console:
    """Progress and notices go here, so `--json` output stays machine-readable."""
    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A progress display on stderr: shown on a terminal, silent elsewhere."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=err(),
        transient=True,
        disable=not err().is_terminal,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in `right` are aligned right."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def shown(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def typed(path: Path) -> str:
    """A path as it stands in a command to paste."""
    return shlex.quote(shown(path))


def wrote(path: Path, also: str, *commands: str) -> None:
    """What a command wrote, `also` after its name, and the commands that come next, whole to be pasted."""
    console = out()
    console.print(f"\nWrote [bold]{escape(shown(path))}[/bold]{escape(also)}. Next:", soft_wrap=True)
    for command in commands:
        console.print(f"  vimdeploy {command}", markup=False, soft_wrap=True)


def emit_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that names what is being done now; on a terminal only."""
    console = err()
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, in two columns without a header."""
    result = Table(box=None, pad_edge=False, show_header=False)
    result.add_column(style="dim")
    result.add_column(overflow="fold")
    for name, value in pairs:
        result.add_row(name, value)
    return result


def _where(row: Row) -> str:
    """A plan by its name, since there may be several; an int8 file by name and what runs it; the ONNX file by that."""
    if row.runtime == "tensorrt":
        return row.file
    return f"{row.file}, {row.runtime}" if row.precision == "int8" else row.runtime


def parity(report: ParityReport) -> None:
    """The parity table: one line a comparison, then what failed and what was left out."""
    console = out()

    def top1(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    console.print(f"Parity of {report.artifact} ({report.precision}) with {report.reference}")
    rows = [
        (
            "[green]pass[/green]" if row.passed else "[red]FAIL[/red]",
            _where(row),
            row.images,
            row.output,
            f"{row.errors.max_abs:.1e}",
            f"{row.errors.rel_rms:.1e}",
            f"{row.errors.cosine:.7f}",
            top1(row.errors.top1),
        )
        for row in report.rows
    ]
    right = ("max abs", "rel rms", "cosine", "top-1")
    console.print(table(("", "runtime", "images", "output", *right), rows, right=right))
    for row in report.rows:
        if row.precision == "int8":
            console.print(f"{_where(row)}: SQNR {row.errors.sqnr_db:.1f} dB on {row.images} images", style="dim")
    for runtime, text in dict.fromkeys((_where(row), row.description) for row in report.rows):
        console.print(f"{runtime}: {text}", style="dim")
    for limit in dict.fromkeys(row.tolerance for row in report.rows):
        bounds = [f"rel rms {limit.rel_rms:.1e}", f"cosine {limit.cosine:.7f}"]
        bounds = ([f"max abs {limit.max_abs:.0e}"] if limit.max_abs is not None else []) + bounds
        console.print(f"allowed: {', '.join(bounds)} ({limit.reason})", style="dim")
    for row in report.rows:
        for failure in row.failures:
            console.print(f"FAIL {_where(row)}, {row.images} images, {row.output}: {failure}", style="red")
    for runtime, reason in report.skipped:
        console.print(f"not compared: {runtime}: {reason}", style="yellow")
    for notice in report.notices:
        console.print(f"note: {notice}", style="yellow")
