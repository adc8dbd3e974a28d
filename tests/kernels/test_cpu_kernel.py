"""The CPU selective scan through its C interface, against the float64 definition."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scan_c
from ort_library import ROOT
from scan_cases import ALL_OPTIONAL, DTYPES, assert_close_to_reference, make_inputs, strided


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 7, 31, 32, 33, 197, 1025])
def test_matches_the_definition_at_every_length(isa, length, dtype, reverse):
    inputs = make_inputs(2, length, 21, 16, dtype=dtype)
    assert_close_to_reference(scan_c.scan(inputs, isa, reverse=reverse), inputs, dtype, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 15, 16, 17, 384, 391])
def test_matches_the_definition_at_every_number_of_channels(isa, channels, dtype):
    inputs = make_inputs(2, 40, channels, 16, dtype=dtype)
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 3, 8, 16, 17, 64, 65, 255, 256])
def test_matches_the_definition_at_every_number_of_states(isa, states, dtype):
    inputs = make_inputs(2, 70, 19, states, dtype=dtype)
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, dtype)


@pytest.mark.parametrize(("channels", "groups"), [(24, 1), (24, 2), (24, 3), (40, 2), (24, 24), (512, 4)])
def test_each_group_of_channels_reads_its_own_b_and_c(isa, channels, groups):
    inputs = make_inputs(2, 20, channels, 5, groups)
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, "fp32")


# Many batch entries, so that a task holds several tiles.
@pytest.mark.parametrize("channels", [384, 120])
@pytest.mark.parametrize("batch", [1, 16, 70])
def test_matches_the_definition_at_every_batch_size(isa, batch, channels):
    inputs = make_inputs(batch, 9, channels, 16)
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, "fp32")


@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "raw delta"])
@pytest.mark.parametrize(
    "optional",
    [(), ("D",), ("z",), ("delta_bias",), ("D", "z"), ("z", "delta_bias"), ALL_OPTIONAL],
    ids=lambda names: "+".join(names) or "none",
)
def test_optional_inputs_are_used_when_there_and_not_when_absent(isa, optional, softplus):
    inputs = make_inputs(2, 50, 20, 16, optional=optional)
    if not softplus:
        inputs["delta"] = np.abs(inputs["delta"]) * np.float32(0.1) + np.float32(6 * ("delta_bias" in optional))
    y = scan_c.scan(inputs, isa, delta_softplus=softplus)
    assert_close_to_reference(y, inputs, "fp32", delta_softplus=softplus)


@pytest.mark.parametrize("value", [-80.0, 80.0])
def test_extreme_steps_stay_finite_and_right(isa, value):
    inputs = make_inputs(1, 50, 16, 16, optional=())
    inputs["delta"][:, ::3] = value
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, "fp32")


def test_infinite_step_forgets_the_past_without_nan(isa):
    inputs = make_inputs(1, 3, 16, 4, optional=())
    inputs["delta"][:, 1] = np.inf
    inputs["u"][:, 1] = 0  # inf * 0 is NaN at that token, as the definition has it, and from there on
    y = scan_c.scan(inputs, isa)
    assert np.isfinite(y[:, 0]).all()
    assert np.isnan(y[:, 1:]).all()


def test_state_that_barely_decays_does_not_drift(isa):
    inputs = make_inputs(1, 4000, 16, 16, optional=())
    inputs["A"][:] = -1e-6
    inputs["B"] = np.abs(inputs["B"])
    inputs["C"] = np.abs(inputs["C"])
    inputs["u"] = np.abs(inputs["u"])
    # 4000 sums of like sign, without FMA a rounding more each: 6e-6 seen.
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, "fp32", inside=2e-5)


def test_state_without_decay_is_kept_exactly(isa):
    inputs = make_inputs(1, 300, 16, 1, optional=())
    inputs["A"][:] = 0
    inputs["u"][:, 1:] = 0
    inputs["C"][:] = 1
    y = scan_c.scan(inputs, isa)
    assert (y == y[:, :1]).all()


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_nan_in_an_input_reaches_what_depends_on_it_and_nothing_else(isa, name):
    clean = make_inputs(2, 12, 18, 4)
    y_clean = scan_c.scan(clean, isa)
    inputs = {key: value.copy() for key, value in clean.items()}
    hit = np.zeros(y_clean.shape, bool)
    # A NaN with its lowest payload bit set, which arithmetic on exponent bits would turn into a number.
    nan = np.array([0x7FC00001], np.uint32).view(np.float32)[0]
    if name in ("A", "D", "delta_bias"):
        inputs[name][3] = nan
        hit[:, :, 3] = True
        if name == "A":
            hit[:, 0] = False  # the first token has no past, though 0 * NaN is NaN
            hit[:, 0, 3] = True
    elif name in ("B", "C"):
        inputs[name][1, 5] = nan
        hit[1, 5:] = True
        if name == "C":
            hit[1, 6:] = False
    else:
        inputs[name][1, 5, 3] = nan
        hit[1, 5:, 3] = True
        if name == "z":
            hit[1, 6:] = False
    y = scan_c.scan(inputs, isa)
    assert np.isnan(y[hit]).all()
    assert np.array_equal(y[~hit], y_clean[~hit])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 16, 50])
def test_strided_tensors_are_read_and_written_in_place_and_nothing_around_them(isa, channels, dtype, reverse):
    inputs = make_inputs(3, 37, channels, 7, groups=5 if channels % 5 == 0 else 1, dtype=dtype)
    arrays, buffers = dict(inputs), {}
    for name in ("u", "delta", "z", "B", "C"):
        buffers[name], arrays[name] = strided(inputs[name].shape, DTYPES[dtype], inputs[name], np.nan)
    buffers["y"], arrays["y"] = strided(inputs["u"].shape, DTYPES[dtype], None, np.nan)
    before = {name: buffer.tobytes() for name, buffer in buffers.items()}

    assert scan_c.run(arrays, isa, reverse=reverse) == scan_c.OK

    y = arrays["y"].copy()
    assert np.array_equal(y, scan_c.scan(inputs, isa, reverse=reverse))
    assert_close_to_reference(y, inputs, dtype, reverse=reverse)
    arrays["y"][...] = np.nan  # what was written is undone: all else must be as before
    assert {name: buffer.tobytes() for name, buffer in buffers.items()} == before


def test_negative_and_zero_strides_of_inputs_are_honoured(isa):
    inputs = make_inputs(2, 9, 20, 4)
    inputs["u"] = np.ascontiguousarray(inputs["u"][:, ::-1])[:, ::-1]
    inputs["B"] = np.broadcast_to(inputs["B"][:1, :1], inputs["B"].shape)
    assert_close_to_reference(scan_c.scan(inputs, isa), inputs, "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_threads_give_the_same_bits_as_one(isa, dtype):
    inputs = make_inputs(2, 197, 391, 16, dtype=dtype)
    y = np.full_like(inputs["u"], np.nan)
    threads = scan_c.Threads(4)
    assert scan_c.run({**inputs, "y": y}, isa, threads.function) == scan_c.OK
    assert sorted(threads.seen) == list(range(len(threads.seen)))
    assert len(threads.seen) > 4
    assert y.tobytes() == scan_c.scan(inputs, isa).tobytes()


def test_batch_entries_do_not_depend_on_their_company():
    inputs = make_inputs(70, 20, 100, 16)
    alone = {name: value[3:4] if value.ndim > 2 else value for name, value in inputs.items()}
    assert np.array_equal(scan_c.scan(inputs)[3], scan_c.scan(alone)[0])


def test_small_scans_do_not_wake_the_pool():
    threads = scan_c.Threads(2)
    inputs = make_inputs(1, 1, 384, 16)
    y = np.empty_like(inputs["u"])
    assert scan_c.run({**inputs, "y": y}, None, threads.function) == scan_c.OK
    assert threads.seen == []


def test_dispatch_takes_the_widest_instruction_set_there_is():
    there = [isa for isa in scan_c.ISAS if scan_c.has_isa(isa)]
    best = there[-1]
    assert scan_c.library().vim_cpu_isa().decode() == best
    assert scan_c.isas_at_hand() == there[::-1]
    inputs = make_inputs(1, 20, 40, 16)
    assert scan_c.scan(inputs).tobytes() == scan_c.scan(inputs, best).tobytes()
    cpuinfo = Path("/proc/cpuinfo")
    flags = (
        set(re.findall(r"^flags\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)[0].split())
        if cpuinfo.exists()
        else set()
    )
    v3 = {"avx2", "fma", "bmi1", "bmi2", "f16c"}
    if {*v3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        assert best == "x86-64-v4"
    elif v3 <= flags:
        assert best == "x86-64-v3"


ASK = """
import sys, scan_c
from scan_cases import make_inputs
library = scan_c.library()
isa = library.vim_cpu_isa()
inputs = make_inputs(1, 2, 16, 4)
status = scan_c.run({**inputs, "y": inputs["u"].copy()})
print(isa.decode() if isa else None, status)
"""


def ask_in_a_process_with(isa: str) -> str:
    environment = {**os.environ, "VIMDEPLOY_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([f"{ROOT}/tests", str(ROOT)])}
    command = [sys.executable, "-c", ASK]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_environment_variable_chooses_the_instruction_set_of_a_process(isa):
    assert ask_in_a_process_with(isa) == f"{isa} {scan_c.OK}"


def test_environment_variable_that_asks_for_what_is_not_there_is_not_passed_over():
    assert ask_in_a_process_with("x86-64-v9") == f"None {scan_c.UNSUPPORTED}"


def test_unknown_instruction_set_is_unsupported():
    assert not scan_c.has_isa("x86-64-v9")


GOOD = {
    "batch": 2,
    "length": 3,
    "channels": 6,
    "states": 4,
    "groups": 2,
    "io": 0,
    "y_batch_stride": 18,
    "y_token_stride": 6,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"io": 3}, "io is 3; it must be VIM_F32 (0), VIM_F16 (1) or VIM_BF16 (2)"),
        ({"batch": -1}, "batch is -1; it must be from 0 to 2147483647"),
        ({"length": -1}, "length is -1; it must be from 0 to 2147483647"),
        ({"channels": 0}, "channels is 0; it must be from 1 to 2147483647"),
        ({"states": 0}, "states is 0; it must be from 1 to 256"),
        ({"states": 257}, "states is 257; it must be from 1 to 256"),
        ({"groups": 0}, "groups is 0; it must be from 1 to 6"),
        ({"groups": 7}, "groups is 7; it must be from 1 to 6"),
        ({"groups": 4}, "groups is 4, which does not divide channels, 6"),
        ({"y_token_stride": 5}, "y_token_stride is 5; it must be at least channels, 6"),
        ({"y_batch_stride": 0}, "y_batch_stride is 0; it must be at least channels, 6"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_descriptors_are_refused_with_a_sentence(change, reason):
    desc = scan_c.Desc(**{**GOOD, **change})
    assert scan_c.supports(desc) == (False, reason)
    assert scan_c.supports(desc, 8) == (False, reason[:7])
    assert scan_c.supports(desc, 0) == (False, "")
    run = scan_c.library().vim_selective_scan_cpu
    assert run(desc, scan_c.Args(), None, None) == scan_c.UNSUPPORTED


def test_supported_descriptor_has_no_reason():
    assert scan_c.supports(scan_c.Desc(**GOOD)) == (True, "")


def test_contiguous_strides_are_those_of_the_layout():
    desc = scan_c.Desc(**{**GOOD, "y_batch_stride": 0, "y_token_stride": 0})
    scan_c.library().vim_selective_scan_contiguous(desc)
    inputs = make_inputs(2, 3, 6, 4, 2)
    want = scan_c.describe({**inputs, "y": np.empty_like(inputs["u"])})
    strides = [name for name, _ in scan_c.Desc._fields_ if name.endswith("stride")]
    assert {name: getattr(desc, name) for name in strides} == {name: getattr(want, name) for name in strides}


@pytest.mark.parametrize(
    "flags", [[], ["-march=x86-64-v3"], ["-march=x86-64-v4"]], ids=lambda f: "".join(f) or "baseline"
)
def test_elementary_functions_keep_to_the_error_they_state(flags, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    if flags and not scan_c.has_isa(flags[0].removeprefix("-march=")):
        pytest.skip(f"this build or this processor has no {flags[0]}")
    program = tmp_path / "check"
    source = ROOT / "tests" / "cpp" / "cpu_math_check.cc"
    common = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", f"-I{ROOT}/kernels"]
    subprocess.run([compiler, *common, *flags, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 failures" in result.stdout
