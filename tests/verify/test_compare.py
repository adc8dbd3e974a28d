"""verify/compare.py: each number, and each way to fail."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from vimdeploy.verify.compare import FP32, LOW_FACTOR, LOW_FLOOR, Errors, Tolerance, errors, low_precision

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((6, 10))


def measured(got: np.ndarray, want: np.ndarray = LOGITS, *, ranked: bool = True) -> Errors:
    return errors(np.asarray(got), np.asarray(want), ranked=ranked)


def test_equal_arrays_have_no_error() -> None:
    e = measured(LOGITS)
    assert (e.n, e.max_abs, e.rel_rms, e.top1, e.lead_lost, e.finite) == (6, 0.0, 0.0, 1.0, 0.0, True)
    assert e.cosine == pytest.approx(1, abs=1e-15)
    assert FP32.failures(e) == []


def test_each_metric_by_hand() -> None:
    want = np.array([[3.0, 4.0], [0.0, 2.0]])
    got = np.array([[3.0, 4.5], [0.5, 2.0]])
    e = errors(got, want, ranked=True)
    assert e.max_abs == 0.5
    assert e.scale == pytest.approx(math.sqrt((9 + 16 + 4) / 4))
    assert e.rel_rms == pytest.approx(math.sqrt(0.5 / 4) / e.scale)
    # the second image's: (0.5, 2) . (0, 2)
    assert e.cosine == pytest.approx(4 / (math.hypot(0.5, 2) * 2))
    assert e.top1 == 1.0 and e.n == 2


def test_top1_counts_images_and_lead_lost_is_the_references() -> None:
    want = np.array([[5.0, 1.0, 0.0], [1.0, 1.5, 0.0], [0.0, 1.0, 2.0], [9.0, 0.0, 0.0]])
    got = want.copy()
    got[0] = [1, 5, 0]  # preferred by 4 in the reference
    got[1] = [1.6, 1.5, 0]  # by 0.5
    e = errors(got, want, ranked=True)
    assert e.top1 == 0.5 and e.lead_lost == 4.0
    assert errors(got, want, ranked=False).top1 is None


def test_the_worst_image_decides_the_cosine() -> None:
    got = LOGITS.copy()
    got[3] = -got[3]
    assert measured(got).cosine == pytest.approx(-1)


def test_rows_of_an_image_count_each_when_ranked() -> None:
    """Pool "all": (n, tokens, classes)."""
    want = RNG.standard_normal((2, 5, 4))
    got = want.copy()
    got[1, 2] = -want[1, 2]
    e = errors(got, want, ranked=True)
    assert e.top1 == pytest.approx(0.9) and e.n == 2 and e.cosine == pytest.approx(-1)


def test_computed_in_float64() -> None:
    """Squares of 1e30 overflow fp32, and the difference of fp16 values vanishes in fp16."""
    big = np.full((1, 3), 1e30, np.float32)
    assert errors(big, big, ranked=False).rel_rms == 0
    half = np.array([[2048.0, 1.0]], np.float16)
    assert errors(half + np.float16(2), half, ranked=False).max_abs == 2


def test_all_zero_results() -> None:
    zero = np.zeros((2, 3))
    assert FP32.failures(errors(zero, zero, ranked=False)) == []
    e = errors(np.ones((2, 3)), zero, ranked=False)
    assert e.rel_rms == 1.0 and FP32.failures(e)
    e = errors(zero, np.full((2, 3), 1e-5), ranked=False)  # a dead output, small enough for max abs
    assert e.cosine == 0 and FP32.failures(e)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["got", "want", "both"])
def test_one_number_that_is_none_fails(value: float, side: str) -> None:
    got, want = LOGITS.copy(), LOGITS.copy()
    if side in ("got", "both"):
        got[2, 2] = value
    if side in ("want", "both"):
        want[2, 2] = value
    e = measured(got, want)
    assert not e.finite
    for limit in (FP32, low_precision("fp16", measured(LOGITS * 1.001))):
        assert limit.failures(e) == ["NaN or Inf in the outputs"]


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_compare_is_an_error(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="nothing was compared"):
        measured(np.zeros(shape), np.zeros(shape))


@pytest.mark.parametrize("shape", [(6, 9), (5, 10), (6, 10, 1), (60,), (10, 6)])
def test_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="reference's is"):
        measured(np.resize(LOGITS, shape))


def test_a_result_one_percent_too_large_fails() -> None:
    """It has a cosine of one and the same first class everywhere."""
    e = measured(LOGITS * 1.01)
    assert e.cosine == pytest.approx(1) and e.top1 == 1
    assert len(FP32.failures(e)) == 2
    assert low_precision("fp16", measured(LOGITS * (1 + 2**-11))).failures(e)
    assert low_precision("bf16", measured(LOGITS * (1 + 2**-9))).failures(e)


@pytest.mark.parametrize("factor", [1000.0, -1.0, 0.0, 1 + 2e-4])
def test_wrong_by_a_factor_fails(factor: float) -> None:
    assert FP32.failures(measured(LOGITS * factor))


def test_each_failure_names_the_error_and_the_limit() -> None:
    limit = Tolerance(rel_rms=1e-3, cosine=0.999, max_abs=1e-2, reason="")
    passing = Errors(4, max_abs=9e-3, rel_rms=9e-4, cosine=0.9995, scale=1.0, top1=1.0)
    assert limit.failures(passing) == []
    for change, words in (
        ({"max_abs": 0.02}, "max abs 2.00e-02 > 1e-02"),
        ({"rel_rms": 0.002}, "rel rms 2.00e-03 > 1.00e-03"),
        ({"cosine": 0.99}, "cosine 0.99000000 < 0.99900000"),
        ({"top1": 0.75, "lead_lost": 0.5}, "top-1 agrees on 75.0% only, over a lead of up to 5.00e-01 (> 2.00e-02)"),
    ):
        assert limit.failures(dataclasses.replace(passing, **change)) == [words]
    everything = dataclasses.replace(passing, max_abs=1.0, rel_rms=1.0, cosine=0.0, top1=0.0, lead_lost=1.0)
    assert len(limit.failures(everything)) == 4


def test_a_swapped_first_class_fails_where_it_led_and_passes_where_it_tied() -> None:
    want = np.array([[1.0, 1.0 - 1e-4, -1.0]] * 4 + [[2.0, 0.0, 0.0]] * 4)
    tie = want.copy()
    tie[0, :2] = tie[0, 1::-1]
    e = errors(tie, want, ranked=True)
    assert e.top1 == 7 / 8 and FP32.failures(e) == []
    led = want.copy()
    led[0, :2] = [1.0, 1.0 + 1e-4]
    led[7] = [0.0, 0.0029, 0.0]  # the reference led by 2
    e = errors(led, want, ranked=True)
    loose = Tolerance(rel_rms=1, cosine=-1, max_abs=0.5, reason="")
    assert any("lead of up to 2.00e+00" in failure for failure in loose.failures(e))


def test_a_low_types_tie_is_measured_in_its_own_rounding() -> None:
    limit = Tolerance(rel_rms=0.01, cosine=0, max_abs=None, reason="")
    swapped = Errors(4, max_abs=0.1, rel_rms=0.005, cosine=0.9999, scale=2.0, top1=0.75)
    assert limit.failures(dataclasses.replace(swapped, lead_lost=0.119)) == []  # 6 x 0.01 x 2
    assert limit.failures(dataclasses.replace(swapped, lead_lost=0.121))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_limits_follow_the_measured_error_and_have_a_floor(precision: str) -> None:
    plain = Errors(4, 0.1, 0.03, 0.999)
    limit = low_precision(precision, plain)
    assert limit.rel_rms == LOW_FACTOR * 0.03 and limit.max_abs is None
    assert limit.cosine == pytest.approx(1 - 2 * 0.06**2)
    assert precision in limit.reason and "3.0e-02" in limit.reason
    assert low_precision(precision, dataclasses.replace(plain, rel_rms=0.0)).rel_rms == LOW_FLOOR[precision]
    assert LOW_FLOOR == {"fp16": 2**-10, "bf16": 2**-7}


def test_fp32_is_what_the_issue_asks_for() -> None:
    assert FP32.max_abs == 1e-3 and FP32.reason


def test_json_holds_no_infinity() -> None:
    """JSON has no such number, and strict readers stop at it."""
    e = measured(np.full_like(LOGITS, np.nan))
    text = json.dumps(e.to_dict(), allow_nan=False)
    assert json.loads(text)["max_abs"] is None and json.loads(text)["finite"] is False
    assert json.loads(json.dumps(measured(LOGITS).to_dict(), allow_nan=False))["max_abs"] == 0
