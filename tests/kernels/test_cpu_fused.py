"""The fused ops on the CPU through their C interface, against the float64 definition, on each SIMD path."""

from __future__ import annotations

import fused_c
import numpy as np
import pytest
import scan_c
from fused_cases import (
    BI_OPTIONAL,
    assert_bi_conv,
    assert_bi_scan,
    assert_norm,
    make_bi_conv,
    make_bi_scan,
    make_norm,
    silu_f64,
)
from scan_cases import DTYPES, strided

LENGTHS = [0, 1, 2, 3, 4, 7, 31, 32, 33, 197]
CHANNELS = [1, 3, 4, 5, 8, 15, 16, 17, 33, 96, 391]
# The lowest payload bit set: arithmetic on exponent bits would turn it into a number.
NAN = np.array([0x7FC00001], np.uint32).view(np.float32)[0]


class TestBiSelectiveScan:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [*LENGTHS, 1025])
    def test_matches_the_definition_at_every_length(self, isa, length, dtype):
        inputs = make_bi_scan(2, length, 21, 16, dtype=dtype)
        assert_bi_scan(fused_c.bi_scan(inputs, isa), inputs, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_matches_the_definition_at_every_number_of_channels(self, isa, channels, dtype):
        inputs = make_bi_scan(2, 40, channels, 16, dtype=dtype)
        assert_bi_scan(fused_c.bi_scan(inputs, isa), inputs, dtype)

    @pytest.mark.parametrize("states", [1, 3, 8, 17, 64, 256])
    def test_matches_the_definition_at_every_number_of_states(self, isa, states):
        inputs = make_bi_scan(2, 70, 19, states)
        assert_bi_scan(fused_c.bi_scan(inputs, isa), inputs, "fp32")

    @pytest.mark.parametrize(("channels", "groups"), [(24, 2), (40, 2), (24, 24)])
    def test_each_group_of_channels_reads_its_own_b_and_c(self, isa, channels, groups):
        inputs = make_bi_scan(2, 20, channels, 5, groups)
        assert_bi_scan(fused_c.bi_scan(inputs, isa), inputs, "fp32")

    @pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "raw delta"])
    @pytest.mark.parametrize(
        "optional",
        [(), *((name,) for name in BI_OPTIONAL), ("z", "y_scale"), ("D", "z", "delta_bias"), BI_OPTIONAL],
        ids=lambda names: "+".join(names) or "none",
    )
    def test_optional_inputs_are_used_when_there_and_not_when_absent(self, isa, optional, softplus):
        inputs = make_bi_scan(2, 50, 20, 16, optional=optional)
        if not softplus:
            offset = np.float32(6 * ("delta_bias" in optional))
            inputs["delta"] = tuple(np.abs(delta) * np.float32(0.1) + offset for delta in inputs["delta"])
        y = fused_c.bi_scan(inputs, isa, delta_softplus=softplus)
        assert_bi_scan(y, inputs, "fp32", delta_softplus=softplus)

    def test_directions_do_not_share_anything(self, isa):
        """Each of the pairs' members matters, and swapping them is another result."""
        inputs = make_bi_scan(1, 30, 20, 8)
        y = fused_c.bi_scan(inputs, isa)
        for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"):
            swapped = inputs | {name: inputs[name][::-1]}
            assert not np.array_equal(fused_c.bi_scan(swapped, isa), y), name
            assert_bi_scan(fused_c.bi_scan(swapped, isa), swapped, "fp32")

    def test_both_directions_may_read_the_same_tensors(self, isa):
        """As a bimamba-v1 mixer's do."""
        inputs = make_bi_scan(2, 30, 20, 8)
        inputs |= {name: (inputs[name][0],) * 2 for name in ("u", "delta", "B", "C")}
        assert_bi_scan(fused_c.bi_scan(inputs, isa), inputs, "fp32")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", [5, 16, 50])
    def test_strided_tensors_are_read_and_written_in_place_and_nothing_around_them(self, isa, channels, dtype):
        inputs = make_bi_scan(3, 37, channels, 7, groups=5 if channels % 5 == 0 else 1, dtype=dtype)
        arrays, buffers = dict(inputs), {}
        for name in ("u", "delta", "B", "C"):
            made = [strided(one.shape, DTYPES[dtype], one, np.nan) for one in inputs[name]]
            buffers |= {(name, i): buffer for i, (buffer, _) in enumerate(made)}
            arrays[name] = tuple(view for _, view in made)
        buffers["z"], arrays["z"] = strided(inputs["z"].shape, DTYPES[dtype], inputs["z"], np.nan)
        buffers["y"], arrays["y"] = strided(inputs["z"].shape, DTYPES[dtype], None, np.nan)
        before = {name: buffer.tobytes() for name, buffer in buffers.items()}

        assert fused_c.run_bi_scan(arrays, isa) == scan_c.OK

        y = arrays["y"].copy()
        assert np.array_equal(y, fused_c.bi_scan(inputs, isa))
        assert_bi_scan(y, inputs, dtype)
        arrays["y"][...] = np.nan  # what was written is undone: all else must be as before
        assert {name: buffer.tobytes() for name, buffer in buffers.items()} == before

    def test_b_and_c_are_read_from_rows_of_x_proj_and_the_gate_from_rows_of_in_proj(self, isa):
        batch, length, channels, states, rank = 2, 11, 20, 8, 3
        inputs = make_bi_scan(batch, length, channels, states)
        rows = [np.full((batch, length, rank + 2 * states), np.nan, np.float32) for _ in range(2)]
        gate_rows = np.full((batch, length, 2 * channels), np.nan, np.float32)
        for i, row in enumerate(rows):
            row[..., rank : rank + states], row[..., rank + states :] = inputs["B"][i][:, :, 0], inputs["C"][i][:, :, 0]
        gate_rows[..., channels:] = inputs["z"]
        desc = fused_c.BiScanDesc(batch, length, channels, states, 1, 0, 1, 1, 1, 1, 1)
        fused_c.contiguous_bi_scan(desc, rank + 2 * states, 2 * channels)
        y = np.full((batch, length, channels), np.nan, np.float32)
        arrays = inputs | {
            "B": tuple(row[:, :, None, rank : rank + states] for row in rows),
            "C": tuple(row[:, :, None, rank + states :] for row in rows),
            "z": gate_rows[..., channels:],
            "y": y,
        }
        assert bytes(fused_c.describe_bi_scan(arrays)) == bytes(_with_group_strides(desc, arrays))
        assert fused_c.run_bi_scan(arrays, isa) == scan_c.OK
        assert np.array_equal(y, fused_c.bi_scan(inputs, isa))

    @pytest.mark.parametrize(
        ("name", "side"),
        [*((name, side) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias") for side in (0, 1)),
         ("z", 0), ("y_scale", 0)],
    )  # fmt: skip
    def test_nan_in_an_input_reaches_what_depends_on_it_and_nothing_else(self, isa, side, name):
        clean = make_bi_scan(2, 12, 18, 4)
        y_clean = fused_c.bi_scan(clean, isa)
        inputs = {key: _copy(value) for key, value in clean.items()}
        target = inputs[name] if name in ("z", "y_scale") else inputs[name][side]
        hit = np.zeros(y_clean.shape, bool)
        after = slice(5, None) if side == 0 else slice(None, 6)  # tokens that the state of token 5 reaches
        if name in ("A", "D", "delta_bias", "y_scale"):
            target[3] = NAN
            hit[:, :, 3] = True
        elif name in ("B", "C"):
            target[1, 5] = NAN
            hit[1, 5 if name == "C" else after] = True
        else:
            target[1, 5, 3] = NAN
            hit[1, 5 if name == "z" else after, 3] = True
        y = fused_c.bi_scan(inputs, isa)
        assert np.isnan(y[hit]).all()
        assert np.array_equal(y[~hit], y_clean[~hit])

    @pytest.mark.parametrize("value", [-80.0, 80.0])
    def test_extreme_steps_stay_finite_and_right(self, isa, value):
        inputs = make_bi_scan(1, 50, 16, 16, optional=("z",))
        for delta in inputs["delta"]:
            delta[:, ::3] = value
        assert_bi_scan(fused_c.bi_scan(inputs, isa), inputs, "fp32")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_many_threads_give_the_same_bits_as_one(self, isa, dtype):
        inputs = make_bi_scan(2, 197, 391, 16, dtype=dtype)
        y = np.full_like(inputs["z"], np.nan)
        threads = scan_c.Threads(4)
        assert fused_c.run_bi_scan({**inputs, "y": y}, isa, threads.function) == scan_c.OK
        assert sorted(threads.seen) == list(range(len(threads.seen)))
        assert len(threads.seen) > 4
        assert y.tobytes() == fused_c.bi_scan(inputs, isa).tobytes()

    def test_is_the_sum_of_the_single_scans(self, isa):
        inputs = make_bi_scan(2, 60, 40, 16, optional=("D", "delta_bias"))
        parts = []
        for i in range(2):
            one = {name: value[i] for name, value in inputs.items()}
            parts.append(scan_c.scan(one, isa, reverse=i == 1))
        assert np.array_equal(fused_c.bi_scan(inputs, isa), parts[1] + parts[0])


class TestBiCausalConv1d:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", LENGTHS)
    def test_matches_the_definition_at_every_length(self, isa, length, dtype):
        inputs = make_bi_conv(2, length, 21, dtype=dtype)
        assert_bi_conv(fused_c.bi_conv(inputs, isa), inputs, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_matches_the_definition_at_every_number_of_channels(self, isa, channels, dtype):
        inputs = make_bi_conv(2, 20, channels, dtype=dtype)
        assert_bi_conv(fused_c.bi_conv(inputs, isa), inputs, dtype)

    @pytest.mark.parametrize("length", [1, 5, 40])
    @pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 7, 16])
    def test_matches_the_definition_at_every_number_of_taps(self, isa, taps, length):
        inputs = make_bi_conv(2, length, 19, taps)
        assert_bi_conv(fused_c.bi_conv(inputs, isa), inputs, "fp32")

    def test_last_tap_is_on_the_current_token_in_both_directions(self, isa):
        x = np.zeros((1, 9, 16), np.float32)
        x[0, 4] = 1
        weight = np.arange(1, 5, dtype=np.float32)[:, None] * np.ones(16, np.float32)
        zero = np.zeros(16, np.float32)
        forward, backward = fused_c.bi_conv({"x": x, "weight": (weight, weight), "bias": (zero, zero)}, isa)
        seen = silu_f64(np.array([4.0, 3, 2, 1]))
        assert np.allclose(forward[0, :, 0], [0, 0, 0, 0, *seen, 0], rtol=1e-6)
        assert np.allclose(backward[0, :, 0], [0, *seen[::-1], 0, 0, 0, 0], rtol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", [5, 16, 50])
    def test_strided_rows_are_read_and_nothing_around_the_outputs_is_written(self, isa, channels, dtype):
        inputs = make_bi_conv(3, 37, channels, dtype=dtype)
        io = DTYPES[dtype]
        _, x = strided(inputs["x"].shape, io, inputs["x"], np.nan)
        size, guard = inputs["x"].size, 37
        buffers = [np.full(size + 2 * guard, np.nan, io) for _ in range(2)]
        u = tuple(buffer[guard : guard + size].reshape(x.shape) for buffer in buffers)
        assert fused_c.run_bi_conv({**inputs, "x": x, "u": u}, isa) == scan_c.OK
        assert_bi_conv(u, inputs, dtype)
        for buffer in buffers:
            assert np.isnan(buffer[:guard].astype(np.float32)).all()
            assert np.isnan(buffer[guard + size :].astype(np.float32)).all()

    def test_reads_the_first_columns_of_wider_rows(self, isa):
        inputs = make_bi_conv(2, 12, 20, width=40)
        assert inputs["x"].strides[1] == 160
        assert_bi_conv(fused_c.bi_conv(inputs, isa), inputs, "fp32")

    def test_nan_reaches_the_tokens_that_see_it_and_no_other(self, isa):
        clean = make_bi_conv(2, 40, 18)
        u_clean = fused_c.bi_conv(clean, isa)
        x = clean["x"].copy()
        x[1, 20, 3] = NAN
        u = fused_c.bi_conv({**clean, "x": x}, isa)
        for got, want, seen in zip(u, u_clean, (slice(20, 24), slice(17, 21)), strict=True):
            hit = np.zeros(want.shape, bool)
            hit[1, seen, 3] = True
            assert np.isnan(got[hit]).all()
            assert np.array_equal(got[~hit], want[~hit])

    def test_large_values_saturate(self, isa):
        inputs = make_bi_conv(1, 8, 16)
        inputs["x"] = inputs["x"] * np.float32(1e4)
        with np.errstate(over="ignore"):  # of the reference
            assert_bi_conv(fused_c.bi_conv(inputs, isa), inputs, "fp32")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_many_threads_give_the_same_bits_as_one(self, isa, dtype):
        inputs = make_bi_conv(2, 197, 391, dtype=dtype)
        u = tuple(np.full(inputs["x"].shape, np.nan, DTYPES[dtype]) for _ in range(2))
        threads = scan_c.Threads(4)
        assert fused_c.run_bi_conv({**inputs, "u": u}, isa, threads.function) == scan_c.OK
        assert sorted(threads.seen) == list(range(len(threads.seen)))
        assert len(threads.seen) > 4
        assert [one.tobytes() for one in u] == [one.tobytes() for one in fused_c.bi_conv(inputs, isa)]


class TestAddRMSNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_matches_the_definition_at_every_number_of_channels(self, isa, channels, dtype):
        inputs = make_norm(2, 13, channels, dtype=dtype)
        assert_norm(fused_c.norm(inputs, isa=isa), inputs, dtype)

    @pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 0, 5), (197, 192), (8, 197, 192), (3, 20000)], ids=str)
    def test_matches_the_definition_at_every_number_of_rows(self, isa, shape):
        inputs = make_norm(*shape)
        assert_norm(fused_c.norm(inputs, isa=isa), inputs, "fp32")

    @pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1.0])
    @pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4], ids=str)
    def test_epsilon_and_size_of_the_stream(self, isa, scale, epsilon):
        """3e4 is where fp16 would overflow once squared, as a trained Vim's residual stream does."""
        inputs = make_norm(5, 24, scale=scale)
        assert_norm(fused_c.norm(inputs, epsilon, isa), inputs, "fp32", epsilon)

    def test_row_of_zeros_is_zeros(self, isa):
        inputs = make_norm(3, 24)
        inputs["h"][1] = inputs["r"][1] = 0
        assert_norm(fused_c.norm(inputs, isa=isa), inputs, "fp32")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", [17, 192])
    def test_stream_may_be_updated_in_place(self, isa, channels, dtype):
        inputs = make_norm(31, channels, dtype=dtype)
        n, r_out = fused_c.norm(inputs, isa=isa)
        stream, n_in_place = inputs["r"].copy(), np.empty_like(n)
        arrays = {**inputs, "r": stream, "n": n_in_place, "r_out": stream}
        assert fused_c.run_norm(arrays, 1e-5, isa) == scan_c.OK
        assert stream.tobytes() == r_out.tobytes()
        assert n_in_place.tobytes() == n.tobytes()

    def test_nan_stays_in_its_row(self, isa):
        clean = make_norm(7, 24)
        n_clean, r_clean = fused_c.norm(clean, isa=isa)
        for name in ("h", "r"):
            inputs = {key: value.copy() for key, value in clean.items()}
            inputs[name][3, 5] = NAN
            n, r_out = fused_c.norm(inputs, isa=isa)
            assert np.isnan(n[3]).all()
            assert np.isnan(r_out[3, 5])
            n[3], r_out[3, 5] = n_clean[3], r_clean[3, 5]
            assert np.array_equal(n, n_clean)
            assert np.array_equal(r_out, r_clean)

    def test_nothing_around_the_outputs_is_written(self, isa):
        inputs = make_norm(5, 23, dtype="fp16")
        size, guard = inputs["h"].size, 37
        buffers = [np.full(size + 2 * guard, np.nan, dtype) for dtype in (np.float16, np.float32)]
        n, r_out = (buffer[guard : guard + size].reshape(5, 23) for buffer in buffers)
        assert fused_c.run_norm({**inputs, "n": n, "r_out": r_out}, 1e-5, isa) == scan_c.OK
        assert_norm((n, r_out), inputs, "fp16")
        for buffer in buffers:
            assert np.isnan(buffer[:guard]).all()
            assert np.isnan(buffer[guard + size :]).all()

    def test_many_threads_give_the_same_bits_as_one(self, isa):
        inputs = make_norm(4, 197, 192)
        n, r_out = np.empty_like(inputs["h"]), np.empty_like(inputs["r"])
        threads = scan_c.Threads(4)
        assert fused_c.run_norm({**inputs, "n": n, "r_out": r_out}, 1e-5, isa, threads.function) == scan_c.OK
        assert sorted(threads.seen) == list(range(len(threads.seen)))
        assert len(threads.seen) > 4
        alone = fused_c.norm(inputs, isa=isa)
        assert (n.tobytes(), r_out.tobytes()) == tuple(one.tobytes() for one in alone)


@pytest.mark.parametrize("run", [fused_c.run_bi_scan, fused_c.run_bi_conv, fused_c.run_norm], ids=lambda f: f.__name__)
def test_small_calls_do_not_wake_the_pool(run):
    threads = scan_c.Threads(2)
    if run is fused_c.run_bi_scan:
        inputs = make_bi_scan(1, 1, 384, 16)
        status = run({**inputs, "y": inputs["z"].copy()}, None, threads.function)
    elif run is fused_c.run_bi_conv:
        inputs = make_bi_conv(1, 2, 384)
        status = run({**inputs, "u": (inputs["x"].copy(), inputs["x"].copy())}, None, threads.function)
    else:
        inputs = make_norm(2, 192)
        status = run({**inputs, "n": inputs["h"].copy(), "r_out": inputs["r"].copy()}, 1e-5, None, threads.function)
    assert status == scan_c.OK
    assert threads.seen == []


@pytest.mark.parametrize("op", ["bi_selective_scan", "bi_causal_conv1d", "add_rms_norm"])
def test_unknown_instruction_set_is_unsupported(op):
    # Refused before anything is looked at.
    assert getattr(scan_c.library(), f"vim_{op}_cpu_isa")(b"x86-64-v9", None, None, None, None) == scan_c.UNSUPPORTED


GOOD = {
    "bi_selective_scan": (
        fused_c.BiScanDesc,
        {"batch": 2, "length": 3, "channels": 6, "states": 4, "groups": 2, "y_batch_stride": 18, "y_token_stride": 6},
    ),
    "bi_causal_conv1d": (fused_c.BiConvDesc, {"batch": 2, "length": 3, "channels": 6, "taps": 4}),
    "add_rms_norm": (fused_c.NormDesc, {"rows": 3, "channels": 6, "epsilon": 1e-5}),
}


@pytest.mark.parametrize("op", GOOD)
def test_supported_descriptor_has_no_reason(op):
    kind, fields = GOOD[op]
    assert fused_c.supports(op, kind(**fields)) == (True, "")


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("bi_selective_scan", {"io": 3}, "io is 3; it must be VIM_F32 (0), VIM_F16 (1) or VIM_BF16 (2)"),
        ("bi_selective_scan", {"states": 257}, "states is 257; it must be from 1 to 256"),
        ("bi_selective_scan", {"groups": 4}, "groups is 4, which does not divide channels, 6"),
        ("bi_selective_scan", {"y_token_stride": 5}, "y_token_stride is 5; it must be at least channels, 6"),
        ("bi_causal_conv1d", {"io": -1}, "io is -1; it must be VIM_F32 (0), VIM_F16 (1) or VIM_BF16 (2)"),
        ("bi_causal_conv1d", {"batch": -1}, "batch is -1; it must be from 0 to 2147483647"),
        ("bi_causal_conv1d", {"length": -1}, "length is -1; it must be from 0 to 2147483647"),
        ("bi_causal_conv1d", {"channels": 0}, "channels is 0; it must be from 1 to 2147483647"),
        ("bi_causal_conv1d", {"taps": 0}, "taps is 0; it must be from 1 to 16"),
        ("bi_causal_conv1d", {"taps": 17}, "taps is 17; it must be from 1 to 16"),
        ("add_rms_norm", {"io": 3}, "io is 3; it must be VIM_F32 (0), VIM_F16 (1) or VIM_BF16 (2)"),
        ("add_rms_norm", {"rows": -1}, "rows is -1; it must be from 0 to 9223372036854775807"),
        ("add_rms_norm", {"channels": 0}, "channels is 0; it must be from 1 to 2147483647"),
        ("add_rms_norm", {"epsilon": -1.0}, "epsilon is -1; it must be finite and not negative"),
        ("add_rms_norm", {"epsilon": np.inf}, "epsilon is inf; it must be finite and not negative"),
        ("add_rms_norm", {"epsilon": np.nan}, "epsilon is nan; it must be finite and not negative"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "" if " " in x else x,
)
def test_unsupported_descriptors_are_refused_with_a_sentence(op, change, reason):
    kind, fields = GOOD[op]
    desc = kind(**fields | change)
    assert fused_c.supports(op, desc) == (False, reason)
    assert fused_c.supports(op, desc, 8) == (False, reason[:7])
    assert fused_c.supports(op, desc, 0) == (False, "")
    run = getattr(scan_c.library(), f"vim_{op}_cpu")
    assert run(fused_c.ctypes.byref(desc), None, None, None) == scan_c.UNSUPPORTED


def _copy(value):
    return value.copy() if isinstance(value, np.ndarray) else tuple(one.copy() for one in value)


def _with_group_strides(desc, arrays):
    """With one group, its stride says nothing; numpy has one of its own there."""
    for name in ("B", "C"):
        for i in range(2):
            getattr(desc, f"{name}_group_stride")[i] = arrays[name][i].strides[2] // 4
    return desc
