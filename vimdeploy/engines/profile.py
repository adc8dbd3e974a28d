"""The input shapes an engine is built for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vimdeploy.errors import UsageError

Shape = tuple[int, ...]
#: Smallest, tuned for, and largest batch when nothing else is asked for.
BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Profile:
    """Smallest, best and largest shape of one input. Prints as `images 1..8..64 x 3 x 224 x 224`."""

    input: str
    min: Shape
    opt: Shape
    max: Shape

    @classmethod
    def of(
        cls,
        name: str,
        shape: Sequence[int | None],
        sides: Sequence[int],
        batches: tuple[int | None, int | None, int | None],
    ) -> Profile:
        """For an input of `shape` (None: dynamic); `sides` fill dynamic sides after the batch.

        Batches not given (None) follow the others: BATCHES, moved to keep min <= opt <= max. Raises UsageError when
        they contradict each other or a batch fixed in the file.
        """
        fixed = shape[0]
        if fixed is not None:
            if any(batch is not None and batch != fixed for batch in batches):
                raise UsageError(
                    f"the model's batch is fixed at {fixed}, so it cannot be built for others",
                    hint="export it without --static-batch",
                )
            batches = (fixed, fixed, fixed)
        low, best, high = batches
        if high is None:
            high = max(BATCHES[2], low or 1, best or 1)
        if low is None:
            low = min(BATCHES[0], best or BATCHES[0], high)
        if best is None:
            best = min(max(BATCHES[1], low), high)
        if not 1 <= low <= best <= high:
            raise UsageError(
                f"batches must grow: min {low}, opt {best}, max {high}",
                hint="--min-batch 1 --opt-batch 8 --max-batch 64",
            )
        rest = tuple(side if want is None else want for want, side in zip(shape[1:], sides, strict=True))
        return cls(name, (low, *rest), (best, *rest), (high, *rest))

    def refusal(self, shape: Sequence[int]) -> str | None:
        """Why an input of `shape` does not fit, None when it does."""
        if len(shape) == len(self.min) and all(a <= b <= c for a, b, c in zip(self.min, shape, self.max, strict=True)):
            return None
        if tuple(shape[1:]) == self.min[1:]:
            return f"a batch of {shape[0]} is outside the engine's profile: {self.min[0]} to {self.max[0]}"
        return f"a shape of {tuple(shape)} is outside the engine's profile: {self.min} to {self.max}"

    def to_dict(self) -> dict[str, Any]:
        return {"input": self.input, "min": list(self.min), "opt": list(self.opt), "max": list(self.max)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Profile:
        return cls(values["input"], tuple(values["min"]), tuple(values["opt"]), tuple(values["max"]))

    def __str__(self) -> str:
        sides = [str(a) if a == c else f"{a}..{b}..{c}" for a, b, c in zip(self.min, self.opt, self.max, strict=True)]
        return f"{self.input} {' x '.join(sides)}"
