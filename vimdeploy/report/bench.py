"""Results of `vimdeploy bench` as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vimdeploy.bench.results import ARTIFACT, Results, Row, crossover, memory_fraction, speedup
from vimdeploy.bundle import replacing_file
from vimdeploy.report.plots import QUANTITIES, curves_svg, has_curve

_TIMES = "\N{MULTIPLICATION SIGN}"
_SIZES = ("Ti", "S", "B")


def write_report(results: Results, path: Path) -> None:
    """Write the page. Raises RuntimeMissing without matplotlib."""
    text = page(results)
    with replacing_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def page(results: Results) -> str:
    """The page: what came out in words, the two figures, every row, how it was measured, where."""
    body = ["<h1>How fast it is here</h1>", _facts(results)]
    for size, part in _by_size(results):
        of = f", {size}" if size else ""
        body += [
            _section(f"What came out{of}", _findings(part)),
            *_figures(part, of),
            _section(f"Every figure{of}", _tables(part)),
        ]
    body.append(_section("How this was measured", _method(results)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vimdeploy bench: {html.escape(_device(results))}</title><style>{_CSS}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _by_size(results: Results) -> list[tuple[str, Results]]:
    """Results of several of the published sizes apart, (Ti, ...), (S, ...): only within one is anything compared.

    Everything together, and no name, where there is one size or a network of another.
    """
    sizes = [row.model.rsplit("-", 1)[-1] for row in results.rows]
    if len(set(sizes)) < 2 or not set(sizes) <= set(_SIZES):
        return [("", results)]
    return [
        (size, replace(results, rows=tuple(row for row, own in zip(results.rows, sizes) if own == size)))
        for size in _SIZES
        if size in sizes
    ]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def _facts(results: Results) -> str:
    host = results.host
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    facts = [("card", _card(results)), ("processor", _processor(results)), ("versions", versions)]
    facts.append(("measured", host["date"] + (f", commit {host['commit']}" if host.get("commit") else "")))
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts if text)
    return f"<dl>{items}</dl>"


def _card(results: Results) -> str:
    card = results.host.get("card")
    if not card:
        return "none"
    driver = f", driver {card['driver']}" if card.get("driver") else ""
    return f"{card['name']} (sm_{card['sm']}{driver}, CUDA {card['cuda']})"


def _processor(results: Results) -> str:
    cpu = results.host["cpu"]
    return f"{cpu['name']}, {cpu['cores']} core{'s' * (cpu['cores'] != 1)}"


def _device(results: Results) -> str:
    """The device most rows ran on."""
    on_card = sum(row.on_card for row in results.rows) * 2 > len(results.rows)
    return _card(results) if on_card else _processor(results)


def _findings(results: Results) -> str:
    """How the first artifact of each case compares, losses as plainly as gains; then what else there is to say."""
    said = [
        f"<b>{html.escape(row.contender)}</b> did not run at {_case(row)}: {html.escape(row.failed.rstrip('.'))}."
        for row in results.rows
        if row.failed
    ]
    said += _crossovers(results)
    table = _comparison(results)
    if not table and not said:
        said.append("There was nothing to compare with: name a baseline with --against.")
    return table + ("<ul>" + "".join(f"<li>{sentence}</li>" for sentence in said) + "</ul>" if said else "")


def _comparison(results: Results) -> str:
    """A line a batch and opponent, a column an image size; empty without an opponent."""
    sizes = sorted({row.img_size for row in results.rows})
    lines = []
    for batch in sorted({row.batch for row in results.rows}):
        subjects = {size: results.subject((batch, size)) for size in sizes}
        others = {row.contender: row for row in results.rows if row.batch == batch and row not in subjects.values()}
        for name in others:
            cells = "".join(f"<td>{_against(results, subjects[size], name)}</td>" for size in sizes)
            lines.append(f"<tr><td>{html.escape(name)}</td><td>{batch}</td>{cells}</tr>")
    if not lines:
        return ""
    names = dict.fromkeys(subject.contender for size in sizes for subject in _subjects(results, size))
    head = "".join(f"<th>{_size(size)}</th>" for size in sizes)
    return (
        f"<p><b>{html.escape(', '.join(names))}</b>: its speed over that of each other contender, and below it its "
        "memory over the other's.</p>"
        f'<div class="wide"><table><thead><tr><th>against</th><th>batch</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _subjects(results: Results, size: tuple[int, int]) -> Iterable[Row]:
    found = (results.subject(case) for case in results.cases() if case[1] == size)
    return (subject for subject in found if subject is not None)


def _against(results: Results, subject: Row | None, name: str) -> str:
    """One cell: the speed-up as a gain or a loss, and the part of the memory."""
    if subject is None:
        return ""
    row = next((row for row in results.of(subject.case) if row.contender == name), None)
    if row is None or row is subject:
        return ""
    ratio, fraction = speedup(row, subject), memory_fraction(row, subject)
    if row.failed or not ratio:
        return '<span class="loss">failed</span>'
    kind = "gain" if ratio >= 1 else "loss"
    memory = f"<br><small>{fraction:.2f}</small>" if fraction else ""
    return f'<b class="{kind}">{ratio:.2f} {_TIMES}</b>{memory}'


def _crossovers(results: Results) -> list[str]:
    ours = dict.fromkeys(row.contender for row in results.rows if row.role == ARTIFACT)
    theirs = dict.fromkeys(row.contender for row in results.rows if row.family == "deit")
    sentences = []
    for batch in sorted({row.batch for row in results.rows}):
        for mine in ours:
            for other in theirs:
                side = crossover(results.rows, mine, other, batch)
                if side:
                    sentences.append(
                        f"Batch {batch}: {html.escape(mine)} overtakes {html.escape(other)} at about "
                        f"<b>{round(side, -1):.0f} px</b>, read between the sizes measured."
                    )
    return sentences


def _figures(results: Results, of: str) -> Iterable[str]:
    for batch in sorted({row.batch for row in results.rows}):
        drawn = [
            f"<figure>{curves_svg(results, batch, quantity)}</figure>"
            for quantity in QUANTITIES
            if has_curve(results, batch, quantity)
        ]
        if drawn:
            yield _section(f"Against resolution, batch {batch}{of}", f'<div class="pair">{"".join(drawn)}</div>')


def _size(size: tuple[int, int]) -> str:
    height, width = size
    return f"{height} px" if height == width else f"{height} {_TIMES} {width} px"


def _case(row: Row) -> str:
    return f"{_size(row.img_size)}, batch {row.batch}"


_HEADER = (
    "contender", "precision", "p50 ms", "p95 ms", "p99 ms", "images/s", "speed-up", "memory MiB", "fraction", "file MB",
    "mJ/image",
)  # fmt: skip


def _tables(results: Results) -> str:
    parts = []
    for case in results.cases():
        rows, subject = results.of(case), results.subject(case)
        parts.append(f"<h3>{_case(rows[0])}, {rows[0].tokens} tokens</h3>")
        head = "".join(f"<th>{name}</th>" for name in _HEADER)
        lines = "".join(_line(row, subject) for row in rows)
        parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>')
    return "\n".join(parts)


def _line(row: Row, subject: Row | None) -> str:
    name = f'<td title="{html.escape(row.runtime)}">{html.escape(row.contender)}</td>'
    if row.failed or row.latency_ms is None:
        reason = html.escape(row.failed or "")
        return f'<tr class="failed">{name}<td colspan="{len(_HEADER) - 1}">{reason}</td></tr>'
    is_subject = row is subject
    ratio = None if is_subject or subject is None else speedup(row, subject)
    fraction = None if is_subject or subject is None else memory_fraction(row, subject)
    size = row.engine_bytes or row.model_bytes
    cells = [
        row.precision,
        *(number(row.latency_ms[key]) for key in ("p50", "p95", "p99")),
        number(row.images_per_s),
        "" if ratio is None else f"{ratio:.2f} {_TIMES}",
        number(row.peak_mib),
        "" if fraction is None else f"{fraction:.2f}",
        "" if size is None else number(size / 1e6),
        "" if row.joules_per_image is None else number(1e3 * row.joules_per_image),
    ]
    kind = "subject" if is_subject else row.role
    return f'<tr class="{kind}">{name}' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def number(value: float | None) -> str:
    """Three significant figures, without an exponent; nothing for None."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _method(results: Results) -> str:
    effort = results.settings.get("effort") or {}
    runtimes = dict.fromkeys((row.contender, row.runtime, row.clock) for row in results.rows if row.runtime)
    said = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(runtime)}{f'; timed by {clock}' if clock else ''}</li>"
        for name, runtime, clock in runtimes
    )
    notices = dict.fromkeys([*results.notices, *(notice for row in results.rows for notice in row.notices)])
    notes = "".join(f"<li>{html.escape(notice)}</li>" for notice in notices)
    rounds = f" in {effort['rounds']} rounds" if effort.get("rounds") else ""
    return (
        f"<p>The contenders of a case took turns{rounds}, each after a warm-up. p50, p95 and p99 are of inferences one "
        "at a time, each waited for; images/s is of inferences started one after another, the median of the rounds. "
        "Images lie in memory where the runtime reads them, ready prepared. Speed-up: how many times faster the first "
        "artifact of the table is than this row, in images/s. Fraction: its memory over this row's, where both were "
        "read from the same counter. Memory on a card is what PyTorch's allocator held at its peak (torch), or what "
        "the card had less of (other runtimes); on the CPU the peak resident set of a fresh process above what it had "
        f"before the model was opened.</p><ul>{said}</ul>" + (f"<ul>{notes}</ul>" if notes else "")
    )


_CSS = """
:root{color-scheme:light;--ink:#1c2024;--soft:#5c6570;--line:#dfe3e8;--ours:#0072b2;--bad:#b3261e}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.9rem;margin:0 0 .75rem}h2{font-size:1.25rem;margin:2.25rem 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .25rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0;color:var(--soft);font-size:.92rem}
dt{font-weight:600}dd{margin:0}ul{padding-left:1.2rem}li{margin:.2rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(27rem,100%),1fr));gap:1rem}
figure{margin:0}figure svg{width:100%;height:auto}small{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .4rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
td:first-child{white-space:normal;min-width:11rem}th{color:var(--soft);font-weight:600}
tr.subject td{font-weight:600}tr.subject td:first-child{color:var(--ours)}
tr.failed td{color:var(--bad);text-align:left;white-space:normal}.gain{color:#00694d}.loss{color:var(--bad)}
p{max-width:60rem}
""".strip()
