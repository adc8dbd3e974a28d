"""Fills the marked regions of docs/performance.md from results files, and draws README's figures.

  python benchmarks/performance_page.py           rewrite the regions and docs/images/*.svg
  python benchmarks/performance_page.py --check   exit 1 when the page is not what the results files say

pages.py says what a region is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pages  # noqa: E402
from pages import RESULTS  # noqa: E402

from vimdeploy.bench.results import Results, Row  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
NETWORK = RESULTS / "network-h200-fp16.json"
#: batch 8 at every size, of an earlier day and its kernels
SWEEP = RESULTS / "network-h200-fp16-sweep.json"
SCAN = RESULTS / "scan-h200-fp16.json"
TUNE = RESULTS / "scan-tune-h200.json"
FUSED = RESULTS / "fused-h200.json"
CPU = RESULTS / "cpu-epyc.json"

_TIMES = "\N{MULTIPLICATION SIGN}"


def _network(path: Path) -> tuple[dict[str, Any], Results] | None:
    values = pages.read(path)
    return None if values is None else (values, Results.from_dict(values, str(path)))


_OURS = "on vimdeploy's kernels"
_NETWORK_COMMAND = "python benchmarks/network.py -o benchmarks/results/network-h200-fp16.json"


def network_table() -> str:
    """The figures that were asked for, the bar, the aim."""
    found = _network(NETWORK)
    if found is None:
        return pages.not_yet(_NETWORK_COMMAND)
    rows = []
    for entry in found[0]["table"]:
        verdict = "aim reached" if entry["aim_reached"] else "" if entry["held"] else "**missed**"
        value, bars = entry["value"], (f"{entry['least']:g}", f"{entry['aim']:g}")
        rows.append((entry["name"], "-", *bars, "not measured") if value is None else
                    (entry["name"], f"{value:.2f}", *bars, verdict))  # fmt: skip
    return pages.table(("", "measured", "at least", "aim", ""), rows)


def network_rows() -> str:
    """Milliseconds and memory of every contender, case by case."""
    found = _network(NETWORK)
    if found is None:
        return pages.not_yet(_NETWORK_COMMAND)
    results = found[1]
    rows = []
    for batch, size in results.cases():
        case = f"{size[0]} px, batch {batch}"
        for row in sorted(results.of((batch, size)), key=lambda row: (row.model[-2:], row.role, row.contender)):
            if row.failed or row.ms is None or row.latency_ms is None:
                rows.append((case, row.contender, "failed", "", "", ""))
                continue
            memory = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
            speed = f"{row.images_per_s:,.0f}"
            rows.append((case, row.contender, f"{row.latency_ms['p50']:.2f}", f"{row.ms:.2f}", speed, memory))
    return pages.table(("case", "contender", "p50 ms", "busy ms", "images/s", "MiB"), rows)


def network_crossover() -> str:
    """How many times faster Vim is at each image size, and from which size on it is the faster one."""
    found = _network(SWEEP)
    if found is None:
        return pages.not_yet("python benchmarks/network.py --only sweep --only 1248 -o ...")
    values, results = found
    times = {(row.contender, row.img_size[0]): row.ms for row in results.rows if row.batch == 8 and row.ms}
    rows, sizes = [], sorted({px for _, px in times})
    for model in ("Ti", "S"):
        for other in ("eager, flash attention", "eager, attention unfused"):
            names = f"Vim-{model} {_OURS}", f"DeiT-{model} {other}"
            pairs = [[times.get((name, px)) for name in names] for px in sizes]
            cells = [f"{theirs / ours:.2f}" if ours and theirs else "-" for ours, theirs in pairs]
            rows.append((f"Vim-{model}", f"DeiT {other}", *cells))
    text = f"\n{_source(SWEEP, values)}.\n"
    text += pages.table(("model", "against", *(f"{px} px" for px in sizes)), rows)
    for entry in values["crossovers"]:
        where = f"{entry['px']:.0f} px, batch {entry['batch']}"
        text += f"{entry['model']} overtakes DeiT ({entry['against']}) at {where}.\n\n"
    return text


def _source(path: Path, values: dict[str, Any]) -> str:
    host = values["host"]
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    told = f"`benchmarks/results/{path.name}`: {host['card']['name']}, driver {host['card']['driver']}, {versions}, "
    return "; ".join((f"{told}commit {host['commit']}, {host['date']}", *values["notices"]))


def network_host() -> str:
    found = _network(NETWORK)
    if found is None:
        return pages.not_yet(_NETWORK_COMMAND)
    parity = "; ".join(
        f"{entry['model']} {entry['px']} px {entry['dtype']}: "
        + (f"max abs {entry['max_abs']:.1e}" if entry["dtype"] == "float32" else f"rel rms {entry['rel_rms']:.1e}")
        for entry in found[0]["parity"]
    )
    return f"\n{_source(NETWORK, found[0])}. Before anything was timed, against the fp32 reference: {parity}.\n\n"


def scan() -> str:
    """Both directions of a layer's scan, ours and mamba-ssm's kernel."""
    values = pages.read(SCAN)
    if values is None:
        return pages.not_yet("python benchmarks/scan.py --output benchmarks/results/scan-h200-fp16.json")
    wanted = [(m, b, n) for n, batches in ((197, (1, 64)), (6085, (1, 8))) for b in batches for m in ("Ti", "S", "B")]
    found = {(r["model"], r["batch"], r["length"]): r for r in values["compare"] if r["dtype"] == "float16"}
    rows = []
    for key in wanted:
        row = found.get(key)
        if row is not None and "mamba_us" in row:
            ratio = f"{row['mamba_us'] / row['fused_us']:.1f} {_TIMES}"
            rows.append(
                (f"Vim-{key[0]}", str(key[1]), str(key[2]), f"{row['fused_us']:.1f}", f"{row['mamba_us']:.1f}", ratio)
            )
    source = f"\n`benchmarks/results/{SCAN.name}`: {values['card']}, torch {values['torch']}, {values['date']}.\n"
    return source + pages.table(("model", "batch", "tokens", "ours, us", "mamba-ssm, us", "ratio"), rows)


#: (issue 4, "Figures") case, batches, tokens, what of a row, at least, aim
_SCAN_BARS: tuple[tuple[str, tuple[int, ...], int, Callable[[dict[str, Any]], float], float, float], ...] = (
    ("speed over mamba-ssm", (64, 128), 197, lambda r: r["mamba_us"] / r["fused_us"], 5, 7),
    ("over mamba-ssm with flips, sum, halving", (64, 128), 197, lambda r: r["mamba_as_vim_us"] / r["fused_us"], 7, 10),
    ("speed over mamba-ssm", (8,), 6085, lambda r: r["mamba_us"] / r["fused_us"], 3.5, 4.7),
    ("speed over mamba-ssm", (1,), 6085, lambda r: r["mamba_us"] / r["fused_us"], 3, 4.5),
    ("speed over mamba-ssm", (1,), 197, lambda r: r["mamba_us"] / r["fused_us"], 5, 8),
    ("fraction of the exponential unit's rate", (64, 128), 197, lambda r: r["mufu_fraction"], 0.65, 0.80),
    ("fraction of the exponential unit's rate", (8,), 6085, lambda r: r["mufu_fraction"], 0.60, 0.75),
    ("fraction of the exponential unit's rate", (1,), 6085, lambda r: r["mufu_fraction"], 0.45, 0.65),
    ("speed over a sequential scan", (1,), 6085, lambda r: r["sequential_us"] / r["fused_us"], 10, 20),
)  # fmt: skip


def scan_bars() -> str:
    """What the scan was asked for: the lesser figure of a line's batches for each model, the bar, the aim."""
    values, tuned = pages.read(SCAN), pages.read(TUNE)
    if values is None:
        return pages.not_yet("python benchmarks/scan.py --output benchmarks/results/scan-h200-fp16.json")
    found = {(r["model"], r["batch"], r["length"]): r for r in values["compare"] if r["dtype"] == "float16"}
    rows = []
    for what, batches, length, figure, least, aim in _SCAN_BARS:
        cells, missed = [], []
        for model in ("Ti", "S", "B"):
            worst = min(figure(found[model, batch, length]) for batch in batches)
            cells.append(f"{worst:.2f}")
            missed += [model] if worst < least else []
        case = f"{what}, batch {' and '.join(map(str, batches))}, {length} tokens"
        rows.append((case, *cells, f"{least:g}", f"{aim:g}", f"**missed** ({', '.join(missed)})" if missed else ""))
    text = pages.table(("", "Ti", "S", "B", "at least", "aim", ""), rows)
    if tuned is None:
        return text
    fastest = {(r["rows"], r["length"]): r["us"][0][1] for r in tuned["tune"] if r["dtype"] == "float16"}
    channels = {r["model"]: r["rows"] // r["batch"] for r in tuned["tune"]}
    slack = {key: r["fused_us"] / fastest[key[1] * channels[key[0]], key[2]] for key, r in found.items()}
    (model, batch, length), worst = max(slack.items(), key=lambda item: item[1])
    return text + (
        f"The kernel that the table in the library chose, against the fastest of all kernels in `{TUNE.name}`: at most "
        f"{worst:.2f} times its time (Vim-{model}, batch {batch}, {length} tokens), over {len(slack)} cases.\n\n"
    )


def fused() -> str:
    """The small operators around the scan, and PyTorch's."""
    values = pages.read(FUSED)
    if values is None:
        return pages.not_yet("python benchmarks/fused.py --output benchmarks/results/fused-h200.json")
    rows = [
        (r["op"], f"Vim-{r['model']}", str(r["batch"]), str(r["length"]), f"{r['us']:.1f}", f"{r['torch_us']:.1f}",
         f"{r['memory_us']:.1f}")
        for r in values["rows"]
        if (r["batch"], r["length"]) in ((1, 197), (64, 197), (8, 6085))
    ]  # fmt: skip
    source = f"\n`benchmarks/results/{FUSED.name}`: {values['card']}, torch {values['torch']}, {values['date']}.\n"
    header = ("operator", "model", "batch", "tokens", "ours, us", "PyTorch, us", "memory alone, us")
    return source + pages.table(header, rows)


def cpu() -> str:
    """Time and memory of whole networks on a CPU, and how many times as long and as much as ours each takes."""
    found = pages.read(CPU)
    if found is None:
        return pages.not_yet(f"python benchmarks/cpu.py --output {CPU.relative_to(ROOT)}")
    rows = []
    for run in found["network"]:
        ours = next(row for row in run["rows"] if "-full-" in row["contender"] and row["role"] == "artifact")
        for row in run["rows"]:
            name = re.sub(r"^vim_(tiny|small)-(full|none)-\d+", r"Vim, fusion \2", row["contender"])
            name = re.sub(r"^deit_(tiny|small)", "DeiT", name).removesuffix(", onnxruntime")
            case = (f"Vim-{run['model']}, {row['img_size'][0]} px", str(run["threads"]), name)
            rows.append((*case, f"{row['ms']:.1f}", f"{row['ms'] / ours['ms']:.2f} {_TIMES}", f"{row['peak_mib']:.0f}"))
    told = f"\n`{CPU.relative_to(ROOT)}`: {found['cpu']}, ONNX Runtime {found['versions']['onnxruntime']}, "
    told += f"{found['date']}; "
    header = ("model", "threads", "contender", "ms", "against ours", "peak MiB")
    return told + "fp32, batch 1.\n" + pages.table(header, rows)


REGIONS: dict[str, Callable[[], str]] = {
    "network-table": network_table,
    "network-rows": network_rows,
    "network-crossover": network_crossover,
    "network-host": network_host,
    "scan": scan,
    "scan-bars": scan_bars,
    "fused": fused,
    "cpu": cpu,
}


def figures() -> dict[str, str]:
    """README's two figures, Vim-Ti at batch 8, as SVG by file name; none before there are results."""
    found = _network(SWEEP)
    if found is None:
        return {}
    from vimdeploy.report.plots import LATENCY, MEMORY, curves_svg, has_curve

    results = found[1]
    shown = (_OURS, "as published", "flash attention", "attention unfused")
    rows: tuple[Row, ...] = tuple(r for r in results.rows if "-Ti" in r.contender and r.contender.endswith(shown))
    chosen = Results(results.host, results.settings, rows)
    return {
        f"vim-ti-{quantity.key}.svg": curves_svg(chosen, 8, quantity, background="white")
        for quantity in (LATENCY, MEMORY)
        if has_curve(chosen, 8, quantity)
    }


def main() -> int:
    outcome = pages.main(PAGE, REGIONS)
    if "--check" not in sys.argv[1:]:
        for name, svg in figures().items():
            IMAGES.mkdir(exist_ok=True)
            (IMAGES / name).write_text(svg)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
