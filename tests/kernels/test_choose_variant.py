"""Which CUDA kernel serves which sizes: host code, so no card and no CUDA are needed to ask."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERIC, SEQUENTIAL, LANES, STATES = range(4)
CHUNKS = 7  # where a variant says in how many
SMS = (75, 80, 86, 87, 89, 90, 100, 120)
#: (dtype, batch * channels, length, fields) of both tables, in their order
TABLES = {"float16": "variant_table.inc", "float32": "variant_table_f32.inc"}
POINTS = [
    (dtype, int(rows), int(length), tuple(map(int, fields.split(","))))
    for dtype, name in TABLES.items()
    for rows, length, fields in re.findall(
        r"^\{(\d+), (\d+), \{([\d, ]+)\}\}", (ROOT / "kernels/cuda" / name).read_text(), re.M
    )
]


class Sizes(ctypes.Structure):
    """vim::cuda::Sizes."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "channels", "states", "groups")] + [
        ("element_bytes", ctypes.c_int),
        ("pair", ctypes.c_bool),
        ("row_alignment", ctypes.c_int),
        ("states_aligned", ctypes.c_bool),
        ("longest_row", ctypes.c_int64),
        ("workspace", ctypes.c_bool),
    ]


Variant = ctypes.c_int32 * 8  # vim_scan_variant


def sizes(batch: int, length: int, channels: int, **changes: object) -> Sizes:
    """Of a Vim layer in fp16, contiguous."""
    made = Sizes(batch, length, channels, 16, 1, 2, True, 16, True, 2 * channels, True)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("choose") / "libchoose.so"
    sources = [ROOT / "kernels/cuda/choose_variant.cc", ROOT / "tests/cpp/choose_variant_c.cc"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'kernels/include'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(out)], check=True)
    library = ctypes.CDLL(str(out))
    library.workspace.argtypes, library.workspace.restype = [ctypes.c_int64] * 3, ctypes.c_size_t
    return library


def choose(library: ctypes.CDLL, wanted: Sizes, sm: int = 90) -> tuple[int, ...]:
    chosen = Variant()
    library.choose(ctypes.byref(wanted), sm, chosen)
    return tuple(chosen)


@pytest.mark.parametrize("dtype", TABLES)
def test_the_table_covers_a_grid(dtype: str) -> None:
    points = {(rows, length) for each, rows, length, _ in POINTS if each == dtype}
    assert len(points) == len({rows for rows, _ in points}) * len({length for _, length in points}) >= 40


def test_the_tables_are_what_was_measured() -> None:
    """The fastest at each point and, where that one is cut, the fastest that is not."""
    listed: dict[tuple[str, int, int], list[list[int]]] = {}
    for dtype, rows, length, fields in POINTS:
        listed.setdefault((dtype, rows, length), []).append(list(fields))
    measured = json.loads((ROOT / "benchmarks/results/scan-tune-h200.json").read_text())["tune"]
    assert {row["dtype"] for row in measured} == set(TABLES)
    for row in measured:
        fastest = [fields for fields, _ in sorted(row["us"], key=lambda entry: entry[1])]
        whole = [fields for fields in fastest if fields[CHUNKS] <= 1]
        wanted = fastest[:1] if fastest[0] == whole[0] else [fastest[0], whole[0]]
        assert listed[row["dtype"], row["rows"], row["length"]] == wanted


@pytest.mark.parametrize(("dtype", "rows", "length", "fastest"), POINTS)
def test_every_measured_point_gets_what_was_fastest_there(
    library: ctypes.CDLL, dtype: str, rows: int, length: int, fastest: tuple[int, ...]
) -> None:
    """With a workspace or, where that one needs it, without; every entry of the table is compiled and fits an H100."""
    channels, element_bytes = 768 if rows % 768 == 0 else 384, 4 if dtype == "float32" else 2
    cut = next(each for each in POINTS if each[:3] == (dtype, rows, length))[3] != fastest
    wanted = sizes(rows // channels, length, channels, workspace=not cut, element_bytes=element_bytes)
    assert choose(library, wanted) == fastest and not (cut and fastest[CHUNKS] > 1)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("sm", SMS)
def test_every_sm_has_a_fast_kernel_for_every_vim(
    library: ctypes.CDLL, sm: int, pair: bool, element_bytes: int
) -> None:
    for batch, length, channels in [(1, 197, 384), (3, 500, 768), (64, 197, 1536), (1, 16385, 384), (8, 1, 768)]:
        wanted = sizes(batch, length, channels, pair=pair, element_bytes=element_bytes)
        chosen = choose(library, wanted, sm)
        assert chosen[0] != GENERIC
        # Clusters came with 9.0, and are for pairs.
        assert not (chosen[0] == LANES and chosen[5] and (sm < 90 or not pair))
        assert library.can_run(Variant(*chosen), ctypes.byref(wanted), sm)


@pytest.mark.parametrize(
    ("name", "value"), [("states", 15), ("states_aligned", False), ("length", (1 << 30) + 1), ("row_alignment", 2)]
)
def test_what_the_fast_kernels_cannot_do_goes_to_the_generic_one(library: ctypes.CDLL, name: str, value: int) -> None:
    wanted = sizes(2, 197, 384)
    setattr(wanted, name, value)
    assert choose(library, wanted)[0] == GENERIC


def test_rows_too_long_to_count_in_32_bits_go_elsewhere(library: ctypes.CDLL) -> None:
    assert choose(library, sizes(1, 197, 384))[0] == STATES
    limit = (2**31 - 1) // 1024
    assert choose(library, sizes(1, 197, 384, longest_row=limit))[0] == STATES
    assert choose(library, sizes(1, 197, 384, longest_row=limit + 1))[0] in (SEQUENTIAL, LANES)


def test_a_block_of_channels_stays_within_a_group(library: ctypes.CDLL) -> None:
    grouped = sizes(8, 197, 384, groups=32)  # 12 channels each
    chosen = choose(library, grouped)
    assert chosen[0] == GENERIC or 12 % chosen[1] == 0
    assert not library.can_run(Variant(STATES, 8, 8, 64, 1, 0, 1, 1), ctypes.byref(grouped), 90)


@pytest.mark.parametrize(
    ("batch", "channels", "cut"), [(1, 384, True), (1, 768, True), (1, 1536, True), (8, 384, False)]
)
def test_long_sequences_of_few_rows_are_cut(library: ctypes.CDLL, batch: int, channels: int, cut: bool) -> None:
    wanted = sizes(batch, 6085, channels)
    assert (choose(library, wanted)[CHUNKS] > 1) == cut
    assert choose(library, sizes(batch, 197, channels))[CHUNKS] <= 1


def test_what_is_cut_has_a_workspace(library: ctypes.CDLL) -> None:
    """Of all sizes that any Vim may have, in a pair or alone; and it holds a state and a decay for each of them."""
    for batch in (1, 2, 3, 4, 7, 8):
        for channels in (64, 384, 512, 768, 1536):
            for length in (197, 319, 320, 400, 730, 6085, 16385):
                for pair in (True, False):
                    chosen = choose(library, sizes(batch, length, channels, pair=pair))
                    rows = batch * channels * (1 + pair)
                    assert chosen[CHUNKS] <= 1 or library.workspace(rows, length, 16) >= rows * chosen[CHUNKS] * 16 * 8


@pytest.mark.parametrize(
    ("change", "can"),
    [
        ({}, True),
        ({"batch": 2}, True),
        ({"batch": 3}, False),
        ({"length": 319}, False),
        ({"length": 320}, True),
        ({"states": 8}, False),
        ({"workspace": False}, False),
    ],
)
def test_sizes_that_can_be_cut(library: ctypes.CDLL, change: dict[str, int], can: bool) -> None:
    wanted = sizes(**{"batch": 1, "length": 6085, "channels": 1024, **change})
    assert bool(library.can_run(Variant(STATES, 16, 4, 32, 2, 0, 1, 8), ctypes.byref(wanted), 90)) == can


@pytest.mark.parametrize(
    ("variant", "can"),
    [
        ((STATES, 16, 4, 32, 2, 0, 1, 16), True),
        ((STATES, 16, 4, 32, 2, 0, 1, 17), False),  # more than the workspace holds
        ((STATES, 4, 16, 64, 1, 0, 1, 1), True),
        ((STATES, 4, 16, 64, 1, 0, 1, 2), False),  # not compiled
    ],
)
def test_variants_that_cut(library: ctypes.CDLL, variant: tuple[int, ...], can: bool) -> None:
    assert bool(library.can_run(Variant(*variant), ctypes.byref(sizes(1, 6085, 384)), 90)) == can
