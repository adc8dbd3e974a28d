"""engines/profile.py: batches that follow each other, and refusals that name both ends."""

from __future__ import annotations

import pytest

from vimdeploy.engines.profile import Profile
from vimdeploy.errors import UsageError

DYNAMIC = (None, 3, 28, 28)
SIDES = (3, 28, 28)


def batches(*given: int | None, shape: tuple[int | None, ...] = DYNAMIC) -> tuple[int, int, int]:
    profile = Profile.of("images", shape, SIDES, given)  # type: ignore[arg-type]
    return profile.min[0], profile.opt[0], profile.max[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (1, 8, 64)),
        ((None, None, 4), (1, 4, 4)),
        ((16, None, None), (16, 16, 64)),
        ((None, 100, None), (1, 100, 100)),
        ((128, None, None), (128, 128, 128)),
        ((2, 3, 4), (2, 3, 4)),
    ],
)
def test_what_is_not_said_follows(given: tuple[int | None, ...], expected: tuple[int, ...]) -> None:
    assert batches(*given) == expected


@pytest.mark.parametrize("given", [(8, 4, 16), (1, 32, 16), (9, None, 8)])
def test_contradictions_are_refused(given: tuple[int | None, ...]) -> None:
    with pytest.raises(UsageError, match="batches must grow"):
        batches(*given)


def test_a_fixed_batch_stays() -> None:
    assert batches(None, 4, None, shape=(4, *SIDES)) == (4, 4, 4)
    with pytest.raises(UsageError, match="fixed at 4"):
        batches(None, None, 8, shape=(4, *SIDES))


def test_dynamic_sides_take_the_models_size() -> None:
    assert Profile.of("x", (None, 3, None, None), SIDES, (1, 1, 2)).max == (2, 3, 28, 28)


def test_it_prints_itself_and_comes_back() -> None:
    profile = Profile.of("images", DYNAMIC, SIDES, (None, None, None))
    assert str(profile) == "images 1..8..64 x 3 x 28 x 28"
    assert Profile.from_dict(profile.to_dict()) == profile


def test_refusals_name_both_ends() -> None:
    profile = Profile.of("images", DYNAMIC, SIDES, (2, 4, 8))
    assert profile.refusal((2, *SIDES)) is None and profile.refusal((8, *SIDES)) is None
    assert profile.refusal((9, *SIDES)) == "a batch of 9 is outside the engine's profile: 2 to 8"
    assert "(2, 3, 28, 28) to (8, 3, 28, 28)" in str(profile.refusal((2, 3, 32, 32)))
