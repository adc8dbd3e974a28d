"""verify/agreement.py against counts and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from vimdeploy.verify.agreement import agreement, paired_interval, sqnr


def scores_of(classes: list[int], n_classes: int = 4) -> np.ndarray:
    return np.eye(n_classes, dtype=np.float32)[classes]


def test_what_is_lost_and_gained_is_counted_by_labels() -> None:
    targets = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    reference = scores_of([0, 1, 2, 3, 0, 1, 2, 0, 1, 1])  # 8 right
    got = scores_of([0, 1, 2, 3, 0, 2, 3, 0, 0, 1])  # two lost, one gained
    found = agreement(got, reference, targets)
    assert (found.n, found.by, found.top1_reference, found.top1) == (10, "labels", 0.8, 0.7)
    assert found.points == pytest.approx(10) and found.agreement == 0.7
    assert found.interval == tuple(100 * x for x in paired_interval(2, 1, 10))
    assert found.text().startswith("top-1 80.00% -> 70.00%, -10.00 points (95 % interval -")


def test_without_labels_a_changed_class_is_a_loss() -> None:
    found = agreement(scores_of([0, 1, 3, 3]), scores_of([0, 1, 2, 2]))
    assert (found.by, found.points, found.agreement) == ("agreement", 50.0, 0.5)
    assert found.top1 is None and found.text().startswith("top-1 agrees on 50.00%, SQNR")


def test_nothing_changed_is_no_loss_and_still_uncertain() -> None:
    found = agreement(scores_of([0, 1] * 50), scores_of([0, 1] * 50), np.array([0, 1] * 50))
    low, high = found.interval
    assert found.points == 0 and low == pytest.approx(-high) and 1 < high < 3
    assert "+0.00 points" in found.text() and found.sqnr_db == 200


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 10), (12, 5, 1000), (3, 9, 50), (1000, 0, 1000)])
def test_the_interval_is_agresti_and_mins(lost: int, gained: int, n: int) -> None:
    p12, p21, m = (lost + 0.5) / (n + 2), (gained + 0.5) / (n + 2), n + 2
    half = 1.959963984540054 * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / m)
    assert paired_interval(lost, gained, n) == pytest.approx((p12 - p21 - half, p12 - p21 + half))


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator, truth, n = np.random.default_rng(0), 0.02 - 0.01, 1000
    counts = generator.multinomial(n, [0.02, 0.01, 0.97], size=2000)
    intervals = [paired_interval(int(a), int(b), n) for a, b, _ in counts]
    assert 0.93 < np.mean([low <= truth <= high for low, high in intervals]) < 0.975


@pytest.mark.parametrize("db", [10.0, 32.5, 60.0])
def test_signal_to_noise(db: float) -> None:
    generator = np.random.default_rng(0)
    x, noise = generator.standard_normal((2, 1000, 10))
    noise *= np.sqrt((x**2).mean() / (noise**2).mean()) * 10 ** (-db / 20)
    assert sqnr(x + noise, x) == pytest.approx(db, abs=1e-6)


def test_a_comparison_of_nothing_or_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing was compared"):
        agreement(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="shape"):
        agreement(np.zeros((2, 3)), np.zeros((2, 4)))
