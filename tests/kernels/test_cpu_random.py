"""10,000 random combinations of shapes, types, attributes and instruction sets agree with the float64 definition."""

from __future__ import annotations

import fused_c
import numpy as np
import pytest
import scan_c
from fused_cases import BI_OPTIONAL, assert_bi_conv, assert_bi_scan, assert_norm, make_bi_conv, make_bi_scan, make_norm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ort_library import ort_library
from scan_cases import ALL_OPTIONAL, DTYPES, assert_close_to_reference, make_inputs

EXAMPLES = 2500  # of each of the four ops

# The same examples on every run: a failure in one of 10,000 should not depend on the day.
random_cases = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

batches = st.integers(0, 3)
lengths = st.integers(0, 9) | st.integers(30, 36)  # about the ends of a chunk too
states = st.integers(1, 20)
groups = st.integers(1, 3)
per_group = st.integers(1, 36)
dtypes = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def library():
    ort_library()  # skips, outside of the examples, where there is none


def subset(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(st.sampled_from(names)).map(lambda chosen: tuple(name for name in names if name in chosen))


def isas() -> st.SearchStrategy[str]:
    return st.deferred(lambda: st.sampled_from(scan_c.isas_at_hand()))


@random_cases
@given(
    batches,
    lengths,
    groups,
    per_group,
    states,
    dtypes,
    subset(ALL_OPTIONAL),
    st.booleans(),
    st.booleans(),
    isas(),
    seeds,
)
def test_selective_scan(batch, length, group_count, channels, n, dtype, optional, softplus, reverse, isa, seed):
    inputs = make_inputs(batch, length, group_count * channels, n, group_count, dtype, optional, seed)
    _keep_from_growing(inputs, softplus)
    attributes = {"delta_softplus": softplus, "reverse": reverse}
    assert_close_to_reference(scan_c.scan(inputs, isa, **attributes), inputs, dtype, **attributes)


@random_cases
@given(batches, lengths, groups, per_group, states, dtypes, subset(BI_OPTIONAL), st.booleans(), isas(), seeds)
def test_bi_selective_scan(batch, length, group_count, channels, n, dtype, optional, softplus, isa, seed):
    inputs = make_bi_scan(batch, length, group_count * channels, n, group_count, dtype, optional, seed)
    _keep_from_growing(inputs, softplus)
    y = fused_c.bi_scan(inputs, isa, delta_softplus=softplus)
    assert_bi_scan(y, inputs, dtype, delta_softplus=softplus)


@random_cases
@given(batches, lengths, st.integers(1, 70), st.integers(0, 20), st.integers(1, 16), dtypes, isas(), seeds)
def test_bi_causal_conv1d(batch, length, channels, further, taps, dtype, isa, seed):
    inputs = make_bi_conv(batch, length, channels, taps, dtype, channels + further, seed)
    assert_bi_conv(fused_c.bi_conv(inputs, isa), inputs, dtype)


@random_cases
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 200),
    dtypes,
    st.sampled_from([0.0, 1e-6, 1e-5, 1e-3]),
    st.sampled_from([1e-2, 1.0, 1e3]),
    isas(),
    seeds,
)
def test_add_rms_norm(leading, channels, dtype, epsilon, scale, isa, seed):
    inputs = make_norm(*leading, channels, dtype=dtype, scale=scale, seed=seed)
    assert_norm(fused_c.norm(inputs, epsilon, isa), inputs, dtype, epsilon)


def _keep_from_growing(inputs: fused_c.Arrays, softplus: bool) -> None:
    """Without softplus, a negative step makes a state grow without bound: steps are then made positive."""
    if softplus:
        return
    offset = 6 if "delta_bias" in inputs else 0  # a bias is -6 at the least
    one = isinstance(inputs["delta"], np.ndarray)
    made = [
        (np.abs(delta) * 0.1 + offset).astype(delta.dtype) for delta in ([inputs["delta"]] if one else inputs["delta"])
    ]
    inputs["delta"] = made[0] if one else tuple(made)
