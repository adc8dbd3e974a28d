"""The CUDA scan against float64, through the C interface. Needs a card; tests/gpu/run.sh builds the library."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import cuda_library as lib  # noqa: E402
import reference as ref  # noqa: E402

# y is rounded once (2.9e-4 at worst for fp16), a pair's first part once more.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
DTYPES = [torch.float16, torch.float32, torch.bfloat16]
name = str


@pytest.fixture
def generator():
    return torch.Generator(device="cuda").manual_seed(torch.seed() % 2**31)


def check_pair(directions, z, variant, *, softplus=True, y_scale=None, token_pad=0, offset=0, reference=None):
    """Runs, compares, and looks at the guard zones. Returns the float64 reference, or None if not supported."""
    dtype = directions[0].u.dtype
    y = ref.Guarded(directions[0].u.shape, dtype, token_pad=token_pad, offset=offset)
    call = lib.Call(directions, z, y.view, softplus=softplus, y_scale=y_scale)
    status = call.run(variant)
    if status == lib.UNSUPPORTED and variant is not None:
        return None
    assert status == lib.OK, lib.last_error()
    torch.cuda.synchronize()
    if reference is None:
        forward = ref.scan_f64(directions[0], softplus=softplus)
        backward = ref.scan_f64(directions[1], softplus=softplus, reverse=True)
        reference = forward + backward
        if y_scale is not None:
            reference = reference * y_scale.double()
        if z is not None:
            reference = reference * torch.nn.functional.silu(z.double())
    error = ref.relative_rms(y.view, reference)
    assert error <= TOLERANCE[dtype], f"{variant or call.chosen()}: {error:.2e}"
    assert y.intact(), f"{variant}: wrote outside y"
    return reference


def check_one(d, z, variant, *, reverse, softplus=True, token_pad=0, offset=0, reference=None):
    y = ref.Guarded(d.u.shape, d.u.dtype, token_pad=token_pad, offset=offset)
    call = lib.Call([d], z, y.view, reverse=reverse, softplus=softplus)
    status = call.run(variant)
    if status == lib.UNSUPPORTED and variant is not None:
        return None
    assert status == lib.OK, lib.last_error()
    torch.cuda.synchronize()
    if reference is None:
        reference = ref.scan_f64(d, z, softplus=softplus, reverse=reverse)
    error = ref.relative_rms(y.view, reference)
    assert error <= TOLERANCE[d.u.dtype], f"{variant or call.chosen()}: {error:.2e}"
    assert y.intact(), f"{variant}: wrote outside y"
    return reference


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("batch,length,channels,rank", [(2, 197, 384, 12), (1, 730, 192, 24), (3, 67, 136, 4)])
def test_every_pair_variant(batch, length, channels, rank, dtype, generator):
    directions = [ref.make_direction(batch, length, channels, dtype, rank=rank, generator=generator) for _ in "fb"]
    z = torch.randn(batch, length, channels, device="cuda", generator=generator).to(dtype)
    y_scale = torch.rand(channels, device="cuda", generator=generator) + 0.5
    reference, ran = None, 0
    for variant in [None, lib.Variant(), *lib.PAIR_VARIANTS]:
        result = check_pair(directions, z, variant, y_scale=y_scale, reference=reference)
        ran += result is not None
        reference = result if result is not None else reference
    assert ran > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch,length,channels,rank", [(2, 197, 384, 12), (1, 1025, 64, 0)])
def test_every_single_variant(batch, length, channels, rank, reverse, dtype, generator):
    d = ref.make_direction(batch, length, channels, dtype, rank=rank, generator=generator)
    z = torch.randn(batch, length, channels, device="cuda", generator=generator).to(dtype)
    reference, ran = None, 0
    for variant in [None, lib.Variant(), *lib.SINGLE_VARIANTS]:
        result = check_one(d, z, variant, reverse=reverse, reference=reference)
        ran += result is not None
        reference = result if result is not None else reference
    assert ran > 10


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 15, 16, 17, 103, 104, 105, 127, 128, 129, 255, 256, 257, 513])
def test_lengths(length, generator):
    directions = [ref.make_direction(1, length, 64, torch.float16, rank=8, generator=generator) for _ in "fb"]
    z = torch.randn(1, length, 64, device="cuda", generator=generator).half()
    reference = single = None
    for variant in [None, lib.Variant(), *lib.PAIR_VARIANTS]:
        result = check_pair(directions, z, variant, reference=reference)
        reference = result if result is not None else reference
    for variant in [None, *lib.SINGLE_VARIANTS]:
        result = check_one(directions[1], z, variant, reverse=True, reference=single)
        single = result if result is not None else single


FAST = [
    lib.sequential(1),
    lib.sequential(2),
    lib.lanes(8, 16, 16, 1, 0),
    lib.lanes(16, 13, 12, 1, 0),
]
FAST += [lib.lanes(32, 16, 6, 2, 1), lib.lanes(8, 13, 16, 1, 0), lib.lanes(8, 16, 16, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name)
@pytest.mark.parametrize("decay", ["vim", "slow", "fast"])
@pytest.mark.parametrize("length", [6085, 16385])
def test_long(length, decay, dtype, generator):
    directions = [ref.make_direction(1, length, 64, dtype, rank=12, decay=decay, generator=generator) for _ in "fb"]
    z = torch.randn(1, length, 64, device="cuda", generator=generator).to(dtype)
    reference = None
    for variant in [None, *FAST]:
        result = check_pair(directions, z, variant, reference=reference)
        reference = result if result is not None else reference


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("softplus", [True, False])
def test_extreme_delta(softplus, dtype, generator):
    """Deltas of +-80: states vanish or, without softplus, grow beyond fp32 where the reference says so."""
    directions = [ref.make_direction(2, 64, 64, dtype, decay="extreme", generator=generator, bias=False) for _ in "fb"]
    if not softplus:  # a decay above 1 has no finite answer; the sign that forgets is the question
        for d in directions:
            d.delta = d.delta.abs()
    for variant in [None, lib.Variant(), *lib.PAIR_VARIANTS]:
        y = ref.Guarded(directions[0].u.shape, dtype)
        if lib.Call(directions, None, y.view, softplus=softplus).run(variant) == lib.OK:
            assert torch.isfinite(y.view).all(), str(variant)
    check_pair(directions, None, None, softplus=softplus)


@pytest.mark.parametrize(
    "states,groups,channels", [(1, 1, 8), (5, 1, 37), (16, 3, 48), (16, 2, 256), (33, 1, 24), (64, 4, 64), (256, 2, 10)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_states_and_groups(states, groups, channels, dtype, generator):
    directions = [
        ref.make_direction(2, 45, channels, dtype, states=states, groups=groups, rank=3, generator=generator)
        for _ in "fb"
    ]
    z = torch.randn(2, 45, channels, device="cuda", generator=generator).to(dtype)
    check_pair(directions, z, None)
    check_one(directions[0], z, None, reverse=False)
    if states == 16:
        for variant in lib.PAIR_VARIANTS:
            check_pair(directions, z, variant)


@pytest.mark.parametrize("skip,bias,gate", [(False, False, False), (True, False, False), (False, True, True)])
def test_optional_inputs(skip, bias, gate, generator):
    make = lambda: ref.make_direction(2, 97, 64, torch.float16, skip=skip, bias=bias, generator=generator)  # noqa: E731
    directions = [make(), make()]
    z = torch.randn(2, 97, 64, device="cuda", generator=generator).half() if gate else None
    for variant in [None, lib.Variant(), *FAST]:
        check_pair(directions, z, variant)
        check_one(directions[0], z, variant, reverse=False)


def test_a_gate_that_is_not_there_is_not_read_whatever_its_strides_say(generator):
    directions = [ref.make_direction(2, 161, 64, torch.float16, generator=generator) for _ in "fb"]
    wanted = ref.scan_f64(directions[0]) + ref.scan_f64(directions[1], reverse=True)
    for variant in [None, lib.Variant(), *lib.PAIR_VARIANTS]:
        y = ref.Guarded((2, 161, 64), torch.float16)
        call = lib.Call(directions, None, y.view)
        call.desc.z_batch_stride = call.desc.z_token_stride = 1 << 20
        if call.run(variant) == lib.OK:
            assert ref.relative_rms(y.view, wanted) < 5e-4, variant


def test_strides_and_odd_pointers(generator):
    """Slices of wider rows, pointers off by one element, negative token strides: right, by whichever form."""
    for dtype in DTYPES:
        wide = torch.randn(2, 50, 3 * 64 + 8, device="cuda", generator=generator).to(dtype)
        for start in (0, 8, 1, 3):
            d = ref.make_direction(2, 50, 64, dtype, rank=start, generator=generator)
            d.u = wide[..., start : start + 64]
            z = wide[..., 64 + start : 128 + start]
            check_one(d, z, None, reverse=True, token_pad=start, offset=start)
            check_pair([d, d], z, None, token_pad=8, offset=start)


def test_empty_and_unsupported(generator):
    d = ref.make_direction(1, 4, 8, torch.float16, generator=generator)
    for shape in [(0, 4, 8), (1, 0, 8)]:
        empty = lib.Direction(
            d.u.new_empty(shape),
            d.delta.new_empty(shape),
            d.A,
            d.B[: shape[0], : shape[1]],
            d.C[: shape[0], : shape[1]],
            d.D,
            d.delta_bias,
        )
        assert lib.Call([empty], None, d.u.new_empty(shape)).run() == lib.OK
    call = lib.Call([d], None, torch.empty_like(d.u))
    call.desc.states = 257
    assert call.run() == lib.UNSUPPORTED
    assert lib.Call([d], None, torch.empty_like(d.u)).run(lib.lanes(8, 9)) == lib.UNSUPPORTED


@pytest.mark.parametrize("pair", [True, False])
def test_without_a_workspace_it_is_scanned_whole(pair, generator):
    """To the same numbers; a variant in chunks cannot then be had by name."""
    directions = [ref.make_direction(1, 1500, 384, torch.float16, rank=12, generator=generator) for _ in "fb"]
    z = torch.randn(1, 1500, 384, device="cuda", generator=generator).half()
    calls = [lib.Call(directions[: 1 + pair], z, torch.empty_like(z)) for _ in range(2)]
    assert all(call.chosen().chunks > 1 for call in calls)
    calls[1]._workspace = None
    for call in calls:
        assert call.run() == lib.OK
    outputs = [call.keep[2] for call in calls]
    assert ref.relative_rms(outputs[0], outputs[1].double()) < 5e-4
    assert calls[1].run(calls[1].chosen()) == lib.UNSUPPORTED


def test_graph_capture_and_repeat(generator):
    """Capturable, and the same bits every time."""
    directions = [ref.make_direction(4, 197, 384, torch.float16, rank=12, generator=generator) for _ in "fb"]
    z = torch.randn(4, 197, 384, device="cuda", generator=generator).half()
    for variant in [None, *lib.PAIR_VARIANTS]:
        y = torch.empty_like(z)
        call = lib.Call(directions, z, y)
        if call.run(variant) != lib.OK:
            continue
        torch.cuda.synchronize()
        first = y.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert call.run(variant) == lib.OK
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, first), str(variant)


@pytest.mark.parametrize(("dtype", "table"), [(torch.float16, "variant_table"), (torch.float32, "variant_table_f32")])
def test_choice_of_variant(dtype, table):
    """Every measured point gets the variant measured fastest there; every SM has a fast form for Vim's sizes."""
    points = re.findall(r"^\{(\d+), (\d+), \{([\d, ]+)\}\}", (lib.ROOT / f"kernels/cuda/{table}.inc").read_text(), re.M)
    assert len(points) > 20

    def chosen(batch, length, channels, sm, pair=True):
        desc = (lib._BiDesc if pair else lib._Desc)()
        desc.batch, desc.length, desc.channels, desc.states, desc.groups = batch, length, channels, 16, 1
        desc.io = lib.IO[dtype]
        prefix = "vim_bi_selective_scan" if pair else "vim_selective_scan"
        arguments = (ctypes.byref(desc), *map(ctypes.c_int64, (44, 0))) if pair else (ctypes.byref(desc),)
        getattr(lib.library(), f"{prefix}_contiguous")(*arguments)
        return getattr(lib.library(), f"{prefix}_choose_variant")(ctypes.byref(desc), sm)

    first = {(rows, length): fields for rows, length, fields in reversed(points)}  # the others need no workspace
    for (rows, length), fields in first.items():
        channels = 384 if int(rows) % 768 else 768
        assert chosen(int(rows) // channels, int(length), channels, 90).fields() == tuple(map(int, fields.split(",")))
    for sm in (75, 80, 86, 87, 89, 90, 100, 120):
        for pair in (True, False):
            for batch, length, channels in [
                (1, 197, 384),
                (3, 500, 768),
                (64, 197, 1536),
                (1, 16385, 384),
                (8, 1, 768),
            ]:
                variant = chosen(batch, length, channels, sm, pair)
                assert variant.form != lib.GENERIC
                assert not (variant.form == lib.LANES and variant.apart and (sm < 90 or not pair))
    assert chosen(2, 10, 37, 90).form == lib.GENERIC  # rows of 37 channels start on no 4 bytes
