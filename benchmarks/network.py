"""The whole network on a CUDA card: Vim on vimdeploy's kernels against DeiT and against Vim as published.

  tests/gpu/run.sh -k choice         builds build/gpu/out/libvimdeploy_cuda.so (or set VIMDEPLOY_CUDA_LIBRARY)
  python benchmarks/network.py -o benchmarks/results/network-h200-fp16.json      all of it, 5 to 15 minutes
  python benchmarks/network.py --only 1248 --only latency --seconds 0.5 --mamba libmamba.so ...

fp16, random weights (no figure depends on them), images already on the card. The contenders of a case take turns
(vimdeploy.bench); memory is the peak of PyTorch's allocator while a contender is opened and first run, weights, images
and cuBLAS workspace included. What is timed is first compared with the fp32 reference network. Cases go from most to
least important, and the file is written after each, so that a run cut short leaves what it measured; a contender that
fails is a row that says why. The table at the end holds every figure that issue 5 names with its bar.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vimdeploy.bench.contenders import Contender, DeitContender, Opened, torch_opened  # noqa: E402
from vimdeploy.bench.deit import DeitShape  # noqa: E402
from vimdeploy.bench.host import describe_host  # noqa: E402
from vimdeploy.bench.measure import Effort  # noqa: E402
from vimdeploy.bench.published import PublishedVim, find_parts  # noqa: E402
from vimdeploy.bench.results import Results, Row, crossover  # noqa: E402
from vimdeploy.bench.run import Options, Progress, measure_case  # noqa: E402
from vimdeploy.models.fused import FusedVim  # noqa: E402
from vimdeploy.models.variants import VimConfig, registered_config  # noqa: E402
from vimdeploy.models.vim import Vim  # noqa: E402
from vimdeploy.ops.native import Kernels  # noqa: E402
from vimdeploy.runtimes.torch_cuda import ENVIRONMENT, LIBRARY, cuda_kernels  # noqa: E402

SIZES = {"Ti": "tiny", "S": "small", "B": "base"}
#: microseconds an image at 224 px (197 tokens): "Vim V2" of performance.md section 3
V2_FLOOR_US = {"Ti": 31.2, "S": 67.7, "B": 165.7}


def config_of(model: str, px: int) -> VimConfig:
    return registered_config(SIZES[model]).replace(img_size=(px, px))


@functools.cache
def kernels_of(library: str | None) -> Kernels:
    """Those of `library`, else of VIMDEPLOY_CUDA_LIBRARY, else what tests/gpu/run.sh built, else the installed ones."""
    built = ROOT / "build" / "gpu" / "out" / LIBRARY
    if library is None and not os.environ.get(ENVIRONMENT) and built.is_file():
        return cuda_kernels(built)
    return cuda_kernels(Path(library) if library else None)


@functools.lru_cache(maxsize=2)
def network_of(config: VimConfig) -> Vim:
    torch.manual_seed(0)
    return Vim(config).eval()


@dataclass(frozen=True)
class Ours(Contender):
    """FusedVim and its options. ``per_pass``: images a pass, None for all at once."""

    config: VimConfig | None = None
    per_pass: int | None = None
    streams: int = 1
    merge: bool | None = None
    library: str | None = None

    role = "artifact"

    def open(self, batch: int, threads: int | None) -> Opened:
        assert self.config is not None
        network = FusedVim(
            network_of(self.config),
            kernels_of(self.library),
            images_per_pass=self.per_pass,
            streams=self.streams,
            merge=self.merge,
        )
        opened = torch_opened(self, network, batch, threads, self.config.in_chans, "vim CUDA kernels, CUDA graph")
        opened.model_bytes = network.weight_bytes()
        return opened


@dataclass(frozen=True)
class Published(Contender):
    """Vim as published."""

    config: VimConfig | None = None
    mamba: str | None = None

    def open(self, batch: int, threads: int | None) -> Opened:
        assert self.config is not None
        parts = find_parts(Path(self.mamba) if self.mamba else None, cuda=True)
        network = PublishedVim(network_of(self.config), parts, dtype=torch.float16, device="cuda")
        opened = torch_opened(self, network, batch, threads, self.config.in_chans, network.describe())
        opened.model_bytes = network.weight_bytes()
        return opened


@dataclass(frozen=True)
class Case:
    """One turn-taking group. ``who``: keys of NAMES."""

    group: str
    model: str
    px: int
    batch: int
    who: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.group}: Vim-{self.model} {self.px} px, batch {self.batch}"


LARGE = ("ours", "two", "four", "half")
SWEEP = ("ours", "two", "flash", "unfused")
CASES = [
    *(Case("1248", m, 1248, 8, (*LARGE, "flash", "unfused", "published")) for m in ("Ti", "S")),
    Case("latency", "Ti", 224, 1, ("ours", "thin", "flash", "published")),
    *(Case("2048", m, 2048, 4, ("ours", "two", "four", "flash")) for m in ("Ti", "S")),
    *(Case("224", m, 224, 64, ("ours", "two", "flash", "published")) for m in ("Ti", "S", "B")),
    *(Case("1248-1", m, 1248, 1, ("ours", "flash", "published")) for m in ("Ti", "S")),
    Case("growth", "Ti", 2048, 1, ("ours", "flash")),
    *(
        Case("sweep", m, px, 8, ("ours", "two", "flash", "unfused"))
        for px in (224, 512, 768, 1024)
        for m in ("Ti", "S")
    ),
    # Last, for compiling one takes minutes on some hosts.
    *(Case("compile", m, px, b, ("two", "flash", "compile")) for px, b in ((1248, 8), (2048, 4)) for m in ("Ti", "S")),
]
#: what a row is called; the same contender in another group overwrites it, so groups must agree
NAMES = {
    "ours": "Vim-{} on vimdeploy's kernels",
    "two": "Vim-{} on vimdeploy's kernels, two streams",
    "four": "Vim-{} on vimdeploy's kernels, four streams",
    "half": "Vim-{} on vimdeploy's kernels, half the batch a pass",
    "thin": "Vim-{} on vimdeploy's kernels, thin products",
    "flash": "DeiT-{} eager, flash attention",
    "compile": "DeiT-{} torch.compile",
    "unfused": "DeiT-{} eager, attention unfused",
    "published": "Vim-{} as published",
}
OURS = ("ours", "two", "four", "half", "thin")


def contenders(case: Case, library: str | None, mamba: str | None) -> list[Contender]:
    config = config_of(case.model, case.px)
    shape = DeitShape.beside(config)
    vim: dict[str, Any] = {
        "model": f"Vim-{case.model}", "precision": "fp16", "img_size": config.img_size, "tokens": config.seq_len,
        "on_card": True, "memory": "torch",
    }  # fmt: skip
    deit = {**vim, "model": f"DeiT-{case.model}", "tokens": shape.tokens, "shape": shape}
    made: dict[str, Callable[[str], Contender]] = {
        "ours": lambda name: Ours(name, **vim, config=config, library=library),
        "two": lambda name: Ours(name, **vim, config=config, streams=2, library=library),
        "four": lambda name: Ours(name, **vim, config=config, streams=4, library=library),
        "half": lambda name: Ours(name, **vim, config=config, per_pass=max(1, case.batch // 2), library=library),
        "thin": lambda name: Ours(name, **vim, config=config, merge=False, library=library),
        "flash": lambda name: DeitContender(name, **deit),
        "compile": lambda name: DeitContender(name, **deit, runtime="torch-compile"),
        "unfused": lambda name: DeitContender(name, **deit, fused=False),
        "published": lambda name: Published(name, **vim, config=config, mamba=mamba),
    }
    return [made[who](NAMES[who].format(case.model)) for who in case.who]


# Parity, before anything is timed.


def check_parity(library: str | None) -> list[dict[str, Any]]:
    """FusedVim against the reference network in fp32, on the card, in both types; random images and weights."""
    found = []
    for model, px, batch in (("Ti", 224, 3), ("S", 224, 2), ("B", 224, 2), ("Ti", 1248, 1)):
        network = stirred(network_of(config_of(model, px)))
        images = torch.randn(batch, 3, px, px, generator=torch.Generator().manual_seed(1)).cuda()
        reference = copy.deepcopy(network).cuda()
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            want = reference(images).double()
        for dtype, limit in ((torch.float32, 1e-3), (torch.float16, 1e-2)):
            got = FusedVim(network, kernels_of(library), dtype=dtype, streams=batch)(images).double()
            max_abs = float((got - want).abs().max())
            rel_rms = float(((got - want).square().mean() / want.square().mean()).sqrt())
            measured = max_abs if dtype == torch.float32 else rel_rms
            found.append({
                "model": f"Vim-{model}", "px": px, "batch": batch, "dtype": str(dtype).removeprefix("torch."),
                "max_abs": max_abs, "rel_rms": rel_rms, "limit": limit, "passed": measured <= limit,
            })  # fmt: skip
        del reference
    return found


def stirred(network: Vim) -> Vim:
    """A copy whose every tensor matters to the logits, which freshly initialised ones do not do."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
                parameter.copy_(noise * 0.5 - 1)  # steps of about 0.3
            elif "x_proj" in name or "dt_proj" in name or name == "head.weight":
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "A_" in name or "conv1d" in name or name.endswith((".D", ".D_b")):
                parameter.add_(noise * 0.2)
    return network


# What issue 5 asks for.


class Table:
    """Entries made from rows; an entry whose rows are missing says so."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.contender, row.img_size[0], row.batch): row for row in rows if row.failed is None}
        self.entries: list[dict[str, Any]] = []

    def row(self, who: str, model: str, px: int, batch: int) -> Row | None:
        return self._rows.get((NAMES[who].format(model), px, batch))

    def ms(self, who: str, model: str, px: int, batch: int) -> float:
        """NaN when it was not measured."""
        row = self.row(who, model, px, batch)
        return row.ms if row and row.ms else math.nan

    def ours(self, *args: Any) -> Row | None:
        """The faster of our ways through the batch; every figure of a case is of this one."""
        rows = [row for who in OURS if (row := self.row(who, *args))]
        return min(rows, key=lambda row: row.ms or math.inf, default=None)

    def best(self, *args: Any) -> float:
        row = self.ours(*args)
        return row.ms if row and row.ms else math.nan

    def flash(self, *args: Any) -> float:
        """DeiT with flash attention: eager or compiled, the faster."""
        times = [t for who in ("flash", "compile") if not math.isnan(t := self.ms(who, *args))]
        return min(times, default=math.nan)

    def p50(self, *args: Any) -> float:
        row = self.ours(*args)
        return row.latency_ms["p50"] if row and row.latency_ms else math.nan

    def add(self, name: str, value: float, least: float, aim: float, *, lower_is_better: bool = False) -> None:
        held = value <= least if lower_is_better else value >= least
        reached = value <= aim if lower_is_better else value >= aim
        self.entries.append({
            "name": name, "value": None if math.isnan(value) else value, "least": least, "aim": aim,
            "held": bool(held), "aim_reached": bool(reached),
        })  # fmt: skip

    def memory(self, other: str, *args: Any) -> float:
        mine, theirs = self.ours(*args), self.row(other, *args)
        return mine.peak_mib / theirs.peak_mib if mine and theirs and mine.peak_mib and theirs.peak_mib else math.nan

    def speed(self, other: str, *case: Any) -> float:
        """How many times faster than `other` ours is."""
        theirs = self.flash(*case) if other == "flash" else self.ms(other, *case)
        return theirs / self.best(*case)

    def fill(self) -> None:
        add, both = self.add, ("Ti", "S")
        for m in both:
            add(f"Vim-{m}, 1248 px, B 8: speed over DeiT flash", self.speed("flash", m, 1248, 8), 1.0, 1.4)
        for m in both:
            add(f"Vim-{m}, 2048 px, B 4: speed over DeiT flash", self.speed("flash", m, 2048, 4), 1.7, 2.4)
        add("Vim-Ti, 1248 px, B 8: speed over DeiT unfused", self.speed("unfused", "Ti", 1248, 8), 6, 8)
        for other, least, aim in (("unfused", 0.132, 0.10), ("flash", 1.0, 0.7)):
            for m in both:
                name = f"Vim-{m}, 1248 px, B 8: memory over DeiT {other}"
                add(name, self.memory(other, m, 1248, 8), least, aim, lower_is_better=True)
        add("Vim-Ti, 224 px, B 1: speed over Vim as published", self.speed("published", "Ti", 224, 1), 8, 12)
        for m, least, aim in (("Ti", 4, 6), ("S", 3.5, 5), ("B", 2.5, 3.5)):
            add(f"Vim-{m}, 224 px, B 64: speed over Vim as published", self.speed("published", m, 224, 64), least, aim)
        for m in both:
            for b in (1, 8):
                name = f"Vim-{m}, 1248 px, B {b}: speed over Vim as published"
                add(name, self.speed("published", m, 1248, b), 3.5, 5)
        p50 = self.p50("Ti", 224, 1)
        add("Vim-Ti, 224 px, B 1: milliseconds, CUDA graph", p50, 0.6, 0.35, lower_is_better=True)
        growth = math.log(self.best("Ti", 2048, 1) / self.best("Ti", 1248, 1)) / math.log(16385 / 6085)
        add("time grows with tokens, 6085 to 16385, B 1: exponent", growth, 1.05, 1.0, lower_is_better=True)
        for m, us in V2_FLOOR_US.items():
            add(f"Vim-{m}, 224 px, B 64: fraction of the V2 floor", 64 * us / 1e3 / self.best(m, 224, 64), 0.55, 0.75)


class Output:
    """The results file, rewritten after every case."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path, self._settings, self._host = path, settings, describe_host()
        self.rows: list[Row] = []
        self.parity: list[dict[str, Any]] = []

    def flush(self) -> dict[str, Any]:
        kept = {(row.contender, row.batch, row.img_size): row for row in self.rows if row.failed is None}
        failed = [row for row in self.rows if (row.contender, row.batch, row.img_size) not in kept]
        rows = (*kept.values(), *failed)
        table = Table(rows)
        table.fill()
        crossovers = [
            {"model": f"Vim-{m}", "batch": 8, "against": who, "px": side}
            for m in ("Ti", "S")
            for who in ("flash", "unfused")
            if (side := crossover(rows, NAMES["ours"].format(m), NAMES[who].format(m), 8))
        ]
        values = Results(self._host, self._settings, rows).to_dict()
        values |= {"parity": self.parity, "table": table.entries, "crossovers": crossovers}
        if self._path is not None:
            self._path.write_text(json.dumps(values, indent=1) + "\n")
        return values


class Said(Progress):
    def step(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--only", action="append", default=[], help="1248 | latency | 2048 | 224 | 1248-1 | growth | "
                        "compile | sweep; may be repeated")  # fmt: skip
    parser.add_argument("--skip", action="append", default=[], help="a group to leave out; may be repeated")
    parser.add_argument("--library", help="the kernels  [default: VIMDEPLOY_CUDA_LIBRARY, else those built here]")
    parser.add_argument("--mamba", help="mamba-ssm's scan as a library (see benchmarks/scan.py)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a contender and case")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--no-parity", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: these figures are of a card", file=sys.stderr)
        return 3
    began = time.perf_counter()
    effort = Effort(arguments.seconds, arguments.rounds)
    output = Output(arguments.output, {"effort": {"seconds": effort.seconds, "rounds": effort.rounds}})
    if not arguments.no_parity:
        output.parity = check_parity(arguments.library)
        output.flush()
        for entry in output.parity:
            print(f"parity {entry['model']} {entry['px']} px {entry['dtype']}: max abs {entry['max_abs']:.1e}, "
                  f"rel rms {entry['rel_rms']:.1e} {'ok' if entry['passed'] else 'FAILED'}", flush=True)  # fmt: skip
    for case in CASES:
        if (arguments.only and case.group not in arguments.only) or case.group in arguments.skip:
            continue
        if time.perf_counter() - began > arguments.budget:
            print(f"not begun: {case}: the time is used up", flush=True)
            continue
        print(f"{time.perf_counter() - began:5.0f} s  {case}", flush=True)
        group = contenders(case, arguments.library, arguments.mamba)
        try:
            rows = measure_case(group, case.batch, Options(effort=effort), Said(), tolerant=True)
        except Exception as error:  # after an error of the card nothing else would run either, but what is done stays
            rows = [failed_row(contender, case.batch, error) for contender in group]
        output.rows += rows
        for row in rows:
            print("  " + describe(row), flush=True)
        output.flush()
        torch.cuda.empty_cache()
    values = output.flush()
    print(f"\n{'':56s} {'measured':>9s} {'at least':>9s} {'aim':>7s}")
    for entry in values["table"]:
        value = "-" if entry["value"] is None else f"{entry['value']:.3f}"
        mark = " " if entry["value"] is None else "*" if entry["aim_reached"] else "+" if entry["held"] else "MISSED"
        print(f"{entry['name']:56s} {value:>9s} {entry['least']:>9} {entry['aim']:>7} {mark}")
    for entry in values["crossovers"]:
        print(f"{entry['model']} overtakes DeiT {entry['against']} at {entry['px']:.0f} px, batch {entry['batch']}")
    return 0 if all(entry["passed"] for entry in output.parity) else 1


def failed_row(contender: Contender, batch: int, error: Exception) -> Row:
    return Row(contender.name, contender.role, contender.family, contender.model, "", contender.precision, batch,
               contender.img_size, contender.tokens, True, failed=f"{type(error).__name__}: {error}")  # fmt: skip


def describe(row: Row) -> str:
    if row.failed or row.latency_ms is None or row.ms is None:
        return f"{row.contender:52s} failed: {row.failed}"
    energy = "" if row.joules_per_image is None else f"{1e3 * row.joules_per_image:8.1f} mJ/image"
    return (
        f"{row.contender:52s} p50 {row.latency_ms['p50']:8.3f} ms, busy {row.ms:8.3f} ms, {row.peak_mib or 0:7.0f} MiB"
        f"{energy}"
    )


if __name__ == "__main__":
    sys.exit(main())
