"""Every figure in README and docs occurs in a results file (design.md, "What holds the checks honest").

A figure is a number with a unit that only measuring gives: a time, a memory, a rate, an energy, how many times faster.
Regions of docs/performance.md that are written from results files are compared with them whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import page_scripts
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: unit -> what a results file's number may have to be multiplied with to be in it
_TIME = (1.0, 1e3, 1e-3, 1e6, 1e-6)
_SIZE = (1.0, 2.0**-20, 1e-6, 2.0**-30, 1e-9)
UNITS = {
    **dict.fromkeys(("s", "ms", "us", "µs"), _TIME),
    **dict.fromkeys(("MiB", "MB", "GiB", "GB"), _SIZE),
    **dict.fromkeys(("images/s", "x", "×"), (1.0,)),  # noqa: RUF001
    **dict.fromkeys(("mJ", "J"), (1.0, 1e3)),
    "%": (1.0, 100.0),
}
_FIGURE = re.compile(
    r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s?(" + "|".join(map(re.escape, UNITS)) + r")(?![\w/*=])(?!\s\d)"
)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_GENERATED = re.compile(r"<!-- figures: .*?<!-- end -->", re.DOTALL)
#: figures of limits and definitions, which no run measures: (page, figure) -> why
DEFINITIONS: dict[tuple[str, str], str] = {}


def figures(text: str) -> Iterator[tuple[str, float, int, str]]:
    """(as written, value, decimals, unit) of each figure outside code and generated regions."""
    text = _CODE.sub(" ", _GENERATED.sub(" ", text))
    for match in _FIGURE.finditer(text):
        whole, part, unit = match[1].replace(",", ""), match[2] or "", match[3]
        yield match[0], float(whole + part), max(0, len(part) - 1), unit


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def unmeasured(text: str, measured: Iterable[float]) -> list[str]:
    """The figures of `text` that no number of `measured` rounds to."""
    known = list(measured)
    return [
        written
        for written, value, decimals, unit in figures(text)
        if not any(round(number * scale, decimals) == value for number in known for scale in UNITS[unit])
    ]


@pytest.fixture(scope="module")
def measured() -> list[float]:
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert files
    return sorted({number for file in files for number in numbers(json.loads(file.read_text()))})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_figure_was_measured(page: Path, measured: list[float]) -> None:
    name = str(page.relative_to(ROOT))
    missing = [figure for figure in unmeasured(page.read_text(), measured) if (name, figure) not in DEFINITIONS]
    assert not missing, f"{name}: in no file of benchmarks/results: {', '.join(missing)}"


@pytest.mark.parametrize(
    "text,missing",
    [
        ("takes 12.3 ms", []),
        ("takes 12.4 ms", ["12.4 ms"]),
        ("takes 12.34 ms, or 12 ms", []),
        ("takes 12,344 us", []),
        ("takes 0.0123 s", []),
        ("is 5.6 × faster", []),  # noqa: RUF001
        ("is 5.7x faster", ["5.7x"]),
        ("holds 1,024 MiB", []),
        ("holds 1.1 GB", []),
        ("holds 3 GB", ["3 GB"]),
        ("97.5 % of them", []),
        ("98 % of them", []),
        ("99 % of them", ["99 %"]),
        ("`takes 99 ms`\n```\n99 ms\n```\n", []),
        ("<!-- figures: a -->\n99 ms\n<!-- end -->\n98.765 ms", ["98.765 ms"]),
        ("224 px, batch 8, 384x512, fp16, v1.2 s, sm_90, 3x3, 16 x 16, 2 state", []),
    ],
)
def test_the_test_itself(text: str, missing: list[str]) -> None:
    assert unmeasured(text, [12.344, 5.6, 2.0**30, 0.975]) == missing


@pytest.mark.parametrize("name", ["performance_page", "int8_page", "trt_page"])
def test_a_page_is_what_the_results_say(name: str) -> None:
    script = page_scripts.load(name)
    text = script.PAGE.read_text()
    assert set(script.pages.regions(text)) == set(script.REGIONS)
    assert page_scripts.filled(script) == text, f"run python benchmarks/{name}.py"


def test_a_changed_figure_of_the_page_is_noticed() -> None:
    script = page_scripts.load("performance_page")
    text = script.PAGE.read_text()
    figure = re.search(r"\| (\d+\.\d) \|", script.pages.regions(text)["scan"])[1]  # type: ignore[index]
    changed = text.replace(f"| {figure} |", "| 0.123 |")
    assert changed != text and script.pages.fill(changed, script.REGIONS) == page_scripts.filled(script)


def test_the_pages_tables_come_out_of_a_results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = page_scripts.load("performance_page")
    latency = {"p50": 9.876, "p95": 1.0, "p99": 1.0, "min": 1.0, "mean": 1.0, "samples": 3}
    row = {
        "contender": "Vim-Ti on vimdeploy's kernels", "role": "artifact", "family": "vim", "model": "Vim-Ti",
        "runtime": "r", "precision": "fp16", "batch": 8, "img_size": [1248, 1248], "tokens": 6085, "on_card": True,
        "latency_ms": latency, "ms": 9.5, "images_per_s": 842.1, "peak_mib": 376.4, "notices": [],
    }  # fmt: skip
    deit = {**row, "contender": "DeiT-Ti eager, flash attention", "role": "baseline", "family": "deit", "ms": 11.97}
    rows = [row, deit, {**row, "img_size": [512, 512], "failed": "OutOfMemoryError", "ms": None}]
    entry = {"name": "a figure", "value": 1.26, "least": 1.0, "aim": 1.4, "held": True, "aim_reached": False}
    values = {
        "format": 1, "settings": {}, "notices": [], "rows": rows,
        "host": {"card": {"name": "H100", "driver": "580"}, "versions": {"torch": "2"}, "commit": "c", "date": "d"},
        "table": [entry, {**entry, "held": False}, {**entry, "value": None, "held": False}],
        "crossovers": [{"model": "Vim-Ti", "batch": 8, "against": "flash", "px": 1140.4}],
        "parity": [{"model": "Vim-Ti", "px": 224, "dtype": "float16", "max_abs": 0.1, "rel_rms": 7.1e-4}],
    }  # fmt: skip
    path = tmp_path / "network.json"
    path.write_text(json.dumps(values))
    monkeypatch.setattr(script, "NETWORK", path)
    monkeypatch.setattr(script, "SWEEP", path)
    table = script.network_table()
    assert "| a figure | 1.26 | 1 | 1.4 |  |" in table and "| a figure | 1.26 | 1 | 1.4 | **missed** |" in table
    assert "| a figure | - | 1 | 1.4 | not measured |" in table
    cases = script.network_rows()
    assert "| 1248 px, batch 8 | Vim-Ti on vimdeploy's kernels | 9.88 | 9.50 | 842 | 376 |" in cases
    assert "| 512 px, batch 8 | Vim-Ti on vimdeploy's kernels | failed |" in cases
    crossing = script.network_crossover()
    assert "| model | against | 1248 px |" in crossing
    assert "| Vim-Ti | DeiT eager, flash attention | 1.26 |" in crossing
    assert "| Vim-S | DeiT eager, attention unfused | - |" in crossing
    assert "Vim-Ti overtakes DeiT (flash) at 1140 px, batch 8." in crossing
    host = script.network_host()
    assert "H100, driver 580, torch 2, commit c, d" in host and "rel rms 7.1e-04" in host
