"""Pages whose figures come from results files: what lies between `<!-- figures: NAME -->` and `<!-- end -->`.

Each page has a script that makes its regions (performance_page.py, int8_page.py, trt_page.py); what is outside is
written by hand. tests/docs checks the pages, so that no figure in one can be another than in the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_REGION = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(text: str, made: Mapping[str, Callable[[], str]]) -> str:
    """The page with every region made anew. Raises KeyError for a region of a name nobody makes."""
    return _REGION.sub(lambda match: match[1] + made[match[2]]() + match[4], text)


def main(page: Path, made: Mapping[str, Callable[[], str]]) -> int:
    """Write the page anew; with --check only see whether it is what the results files say. The exit code."""
    before = page.read_text()
    after = fill(before, made)
    if "--check" in sys.argv[1:]:
        if after != before:
            print(f"{page.relative_to(ROOT)} is not what the results say: python {sys.argv[0]}")
        return int(after != before)
    page.write_text(after)
    return 0


def regions(text: str) -> dict[str, str]:
    return {match[2]: match[3] for match in _REGION.finditer(text)}


def read(path: Path) -> dict[str, Any] | None:
    """A results file, None before there is one."""
    return json.loads(path.read_text()) if path.is_file() else None


def not_yet(command: str) -> str:
    return f"\nNot measured yet:\n\n    {command}\n\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; every column after the first is of numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n" + "\n".join(lines) + "\n\n"
