"""libvimdeploy_ort.so in ONNX Runtime: loads, computes what the definition says, refuses what is wrong with a sentence.

Runs in the ONNX Runtime that is installed; the last test runs this file and that of the fused ops again in an old one
(VIMDEPLOY_ORT_OLD).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from ort_library import ROOT, ort_library
from scan_cases import ALL_OPTIONAL, assert_close_to_reference, make_inputs

from vimdeploy.export import schema

pytest.importorskip("onnxruntime")
from ort_ops import TYPES, op_model, run_op, session, version

OLD = "VIMDEPLOY_ORT_OLD"
SAME_IN_OLD = ("test_ort_op.py", "test_ort_fused.py")
NAMES = schema.SCAN.inputs


def model_bytes(given, dtype="fp32", **more):
    return op_model(schema.SCAN, given, dtype, **more)


def run(inputs, dtype="fp32", threads=1, **attributes):
    (y,) = run_op(schema.SCAN, inputs, dtype, threads, **attributes)
    return y


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_matches_the_definition(dtype, groups, reverse):
    inputs = make_inputs(2, 197, 38, 16, groups, dtype=dtype)
    assert_close_to_reference(run(inputs, dtype, reverse=int(reverse)), inputs, dtype, reverse=reverse)


@pytest.mark.parametrize(
    "optional",
    [(), ("D",), ("z",), ("delta_bias",), ("D", "z"), ("D", "delta_bias"), ("z", "delta_bias"), ALL_OPTIONAL],
    ids=lambda names: "+".join(names) or "none",
)
def test_optional_inputs_may_be_left_out_anywhere(optional):
    inputs = make_inputs(1, 20, 20, 16, optional=optional)
    assert_close_to_reference(run(inputs), inputs, "fp32")


@pytest.mark.parametrize("length", [0, 1, 7])
def test_short_sequences(length):
    inputs = make_inputs(2, length, 20, 16)
    assert_close_to_reference(run(inputs), inputs, "fp32")


def test_attributes_default_to_softplus_and_forward():
    inputs = make_inputs(1, 20, 20, 16)
    assert np.array_equal(run(inputs), run(inputs, delta_softplus=1, reverse=0))


def test_softplus_can_be_off():
    inputs = make_inputs(1, 20, 20, 16, optional=())
    inputs["delta"] = np.abs(inputs["delta"])
    assert_close_to_reference(run(inputs, delta_softplus=0), inputs, "fp32", delta_softplus=False)


def test_attributes_that_name_the_tensorrt_plugin_change_nothing():
    inputs = make_inputs(1, 20, 20, 16)
    assert np.array_equal(run(inputs), run(inputs, plugin_namespace="vim", plugin_version="1"))


def test_kernel_wins_over_a_function_of_the_same_name():
    zero = helper.make_function(
        "vim",
        "SelectiveScan",
        list(NAMES),
        ["y"],
        [helper.make_node("Sub", ["u", "u"], ["y"])],
        [helper.make_opsetid("", 17)],
        attributes=["plugin_namespace", "plugin_version"],
        attribute_protos=[helper.make_attribute("delta_softplus", 1), helper.make_attribute("reverse", 0)],
    )
    inputs = make_inputs(1, 20, 20, 16)
    model = model_bytes(inputs, functions=[zero], plugin_namespace="vim", plugin_version="1")
    (y,) = session(model).run(None, inputs)
    assert_close_to_reference(y, inputs, "fp32")


def test_many_threads_give_the_same_bits_as_one():
    inputs = make_inputs(3, 197, 391, 16)
    assert run(inputs, threads=4).tobytes() == run(inputs, threads=1).tobytes()


def test_two_sessions_in_two_threads_do_not_disturb_each_other():
    cases = [make_inputs(2, 100, 70, 16, seed=seed) for seed in range(2)]
    alone = [run(case) for case in cases]

    def work(i):
        own = session(model_bytes(cases[i]), threads=2)
        return all(np.array_equal(own.run(None, cases[i])[0], alone[i]) for _ in range(30))

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(work, range(2))) == [True, True]


def test_one_session_serves_changing_sizes():
    inputs = make_inputs(2, 30, 20, 16)
    one = session(model_bytes(inputs))
    for batch, length in [(2, 30), (1, 5), (3, 64), (2, 30)]:
        case = make_inputs(batch, length, 20, 16)
        assert_close_to_reference(one.run(None, case)[0], case, "fp32")


@pytest.mark.skipif(version() < (1, 24), reason="before 1.24, ORT crashes when ops that infer shapes leave inputs out")
@pytest.mark.parametrize("optional", [(), ("z",), ALL_OPTIONAL], ids=lambda names: "+".join(names) or "none")
def test_shape_of_the_output_is_known_before_running(optional):
    inputs = make_inputs(2, 30, 20, 16, optional=optional)
    (y,) = session(model_bytes(inputs)).get_outputs()
    assert y.shape == ["batch", "length", "channels"]


def test_type_of_the_output_is_that_of_u():
    for dtype, name in [("fp32", "tensor(float)"), ("fp16", "tensor(float16)")]:
        (y,) = session(model_bytes(make_inputs(1, 2, 3, 4), dtype)).get_outputs()
        assert y.type == name


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"z": "fp16"}, "z is float16; it must be float32, as u is"),
        ({"delta": "fp16"}, "delta is float16; it must be float32, as u is"),
        ({"C": "fp64"}, "C is float64; it must be float32, as u is"),
        ({"A": "fp16"}, "A is float16; it must be float32, whatever the type of u"),
        ({"D": "fp64"}, "D is float64; it must be float32, whatever the type of u"),
        ({"delta_bias": "fp16"}, "delta_bias is float16; it must be float32, whatever the type of u"),
        ({"u": "fp64"}, "u is float64; it must be float32, float16 or bfloat16"),
        ({"u": "fp16"}, "delta is float32; it must be float16, as u is"),
    ],
    ids=lambda x: "-".join(next(iter(x.items()))) if isinstance(x, dict) else "",
)
def test_wrong_types_are_refused_when_the_model_loads(types, message):
    model = model_bytes(NAMES, types={name: TYPES[dtype] for name, dtype in types.items()})
    with pytest.raises(Exception, match="node0") as refusal:
        session(model)
    assert f"vim::SelectiveScan 'node0': {message}" in str(refusal.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"reverse": 2}, "attribute reverse is 2; it must be 0 or 1"),
        ({"delta_softplus": -1}, "attribute delta_softplus is -1; it must be 0 or 1"),
        ({"reverse": 1.0}, "attribute reverse is not an integer; it must be 0 or 1"),
        ({"reverse": "yes"}, "attribute reverse is not an integer; it must be 0 or 1"),
    ],
    ids=str,
)
def test_wrong_attributes_are_refused_when_the_model_loads(attributes, message):
    with pytest.raises(Exception, match="node0") as refusal:
        session(model_bytes(NAMES, **attributes))
    assert message in str(refusal.value)


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", ones(2, 3), "u has shape (2, 3); it must be (batch, length, channels)"),
        ("u", ones(2, 7, 6, 1), "u has shape (2, 7, 6, 1); it must be (batch, length, channels)"),
        ("delta", ones(2, 7, 5), "delta has shape (2, 7, 5); it must be (batch, length, channels) = (2, 7, 6)"),
        ("A", ones(5, 4), "A has shape (5, 4); it must be (channels, states) = (6, states)"),
        ("A", ones(6), "A has shape (6); it must be (channels, states) = (6, states)"),
        ("A", ones(6, 5), "B has shape (2, 7, 2, 4); it must be (batch, length, groups, states) = (2, 7, groups, 5)"),
        ("B", ones(2, 7, 4), "B has shape (2, 7, 4); it must be (batch, length, groups, states) = (2, 7, groups, 4)"),
        ("C", ones(2, 7, 1, 4), "C has shape (2, 7, 1, 4); it must be (batch, length, groups, states) = (2, 7, 2, 4)"),
        ("C", ones(2, 6, 2, 4), "C has shape (2, 6, 2, 4); it must be (batch, length, groups, states) = (2, 7, 2, 4)"),
        ("D", ones(1), "D has shape (1); it must be (channels) = (6)"),
        ("z", ones(1, 7, 6), "z has shape (1, 7, 6); it must be (batch, length, channels) = (2, 7, 6)"),
        ("delta_bias", ones(6, 1), "delta_bias has shape (6, 1); it must be (channels) = (6)"),
    ],
    ids=lambda x: x if isinstance(x, str) and " " not in x else "x".join(map(str, getattr(x, "shape", ()))),
)
def test_wrong_shapes_are_refused_when_run(name, value, message):
    inputs = make_inputs(2, 7, 6, 4, 2) | {name: value}
    loose = onnx.load_from_string(model_bytes(inputs))
    for info in loose.graph.input:
        info.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match="node0") as refusal:
        session(loose.SerializeToString()).run(None, inputs)
    assert f"vim::SelectiveScan 'node0': {message}" in str(refusal.value)


def test_groups_that_do_not_divide_the_channels_are_refused():
    inputs = make_inputs(1, 7, 6, 4, 2)
    inputs |= {"B": ones(1, 7, 4, 4), "C": ones(1, 7, 4, 4)}
    with pytest.raises(Exception, match="groups is 4, which does not divide channels, 6"):
        run(inputs)


def test_more_states_than_the_kernel_has_room_for_are_refused():
    with pytest.raises(Exception, match="states is 257; it must be from 1 to 256"):
        run(make_inputs(1, 2, 3, 257))


def test_missing_required_input_is_refused():
    with pytest.raises(Exception, match=r"SelectiveScan|node0"):
        session(model_bytes([name for name in NAMES if name != "B"]))


def test_session_goes_on_after_a_refusal():
    inputs = make_inputs(2, 7, 6, 4)
    one = session(model_bytes(inputs))
    with pytest.raises(Exception, match="D has shape"):
        one.run(None, inputs | {"D": ones(5)})
    assert_close_to_reference(one.run(None, inputs)[0], inputs, "fp32")


class FakeRuntime:
    """An OrtApiBase of a runtime older than the library needs, whose API table begins, as all do, with CreateStatus."""

    def __init__(self) -> None:
        self.message = ""
        create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
        get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)
        self._version = ctypes.create_string_buffer(b"1.17.3")
        self._functions = (
            create_status(self._create_status),
            get_api(lambda version: ctypes.addressof(self._api) if version <= 17 else None),
            get_version(lambda: ctypes.addressof(self._version)),
        )
        pointers = [ctypes.cast(function, ctypes.c_void_p) for function in self._functions]
        self._api = (ctypes.c_void_p * 1)(pointers[0])
        self.base = (ctypes.c_void_p * 2)(*pointers[1:])

    def _create_status(self, _code: int, message: bytes) -> int:
        self.message = message.decode()
        return 1


def test_runtime_too_old_is_told_both_versions():
    register = ctypes.CDLL(str(ort_library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    runtime = FakeRuntime()
    assert register(None, runtime.base) == 1
    assert "1.21" in runtime.message
    assert "1.17.3" in runtime.message
    assert "pip install" in runtime.message


def symbols(which):
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    output = subprocess.run(["nm", "-D", which, ort_library()], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in output.splitlines()}


def test_library_shows_only_what_it_means_to():
    assert symbols("--defined-only") == {
        "RegisterCustomOps",
        "vim_cpu_isa",
        "vim_cpu_isa_at",
        *(
            f"vim_{op}_{what}"
            for op in ("selective_scan", "bi_selective_scan", "bi_causal_conv1d", "add_rms_norm")
            for what in ("cpu", "cpu_isa", "supports")
        ),
        "vim_selective_scan_contiguous",
        "vim_bi_selective_scan_contiguous",
    }


def test_library_needs_nothing_of_onnxruntime():
    undefined = symbols("--undefined-only")
    assert undefined
    assert [name for name in undefined if re.match(r"Ort|_ZNK?3Ort|_ZN11onnxruntime", name)] == []
    needed = subprocess.run(["ldd", ort_library()], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime" not in needed


def test_runs_in_the_oldest_onnxruntime_supported():
    old = os.environ.get(OLD)
    if not old:
        pytest.skip(
            f"{OLD} names no folder with an old onnxruntime (pip install --target FOLDER --no-deps onnxruntime==1.21.0)"
        )
    environment = {key: value for key, value in os.environ.items() if key != OLD}
    environment |= {
        "PYTHONPATH": os.pathsep.join([old, str(ROOT / "tests"), str(ROOT)]),
        "VIMDEPLOY_ORT_LIBRARY": str(ort_library()),
        "PYTEST_ADDOPTS": "",
    }
    seen = subprocess.run(
        [sys.executable, "-c", "import onnxruntime as o; print(o.__version__, o.__file__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert seen.startswith("1.21."), seen
    assert Path(seen.split()[1]).is_relative_to(Path(old).resolve())
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *(Path(__file__).with_name(name) for name in SAME_IN_OLD),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
