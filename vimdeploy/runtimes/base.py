"""What every runtime looks like from outside: a `Session` takes a batch of images and returns arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import UsageError


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of an input or output. None in the shape is a size the caller, or the batch, decides."""

    shape: tuple[int | None, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype.name} ({', '.join('any' if side is None else str(side) for side in self.shape)})"


@dataclass(frozen=True)
class Prepared:
    """One inference, ready to be repeated: `run()` starts it.

    On a CUDA ``stream`` (its handle) the work is enqueued and nothing is waited for; with None it is done when `run`
    returns.
    """

    run: Callable[[], object]
    stream: int | None = None


class Session(ABC):
    """A model made ready to run by one runtime.

    ``inputs`` (one, the images) and ``outputs`` map names to TensorSpec, ``info`` is what the model says about itself,
    ``notice`` a sentence the user must see (a slower way was taken, and why), or None. Sessions are context managers;
    a closed one refuses to run. Not for use from several threads at once.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    info: ModelInfo
    notice: str | None = None
    _closed = False

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Images (B, 3, H, W) of the input's own type, B at least 1 -> every output by its name.

        The arrays returned are the caller's to keep. Raises UsageError for a closed session or a batch the model does
        not take.
        """
        self._check_batch(batch)
        return self._run(np.ascontiguousarray(batch))

    def prepare(self, batch: np.ndarray) -> Prepared:
        """The same inference again and again, on a batch that lies where the runtime reads it: for timing.

        No image is copied by `Prepared.run` and no output is returned, where the runtime can do without; here it is
        `run` itself. The session must outlive it, and one prepared batch is good until the next. Raises as `run`.
        """
        self._check_batch(batch)
        batch = np.ascontiguousarray(batch)
        return Prepared(lambda: self._run(batch))

    def _check_batch(self, batch: np.ndarray) -> None:
        if self._closed:
            raise UsageError("this session is closed", hint="open another with vimdeploy.runtimes.open_session")
        (spec,) = self.inputs.values()
        if batch.size == 0:
            raise UsageError("the batch is empty", hint="pass at least one image")
        if batch.ndim != len(spec.shape) or any(
            want is not None and have != want for have, want in zip(batch.shape, spec.shape, strict=True)
        ):
            raise UsageError(f"the model takes {spec}, not a batch of shape {tuple(batch.shape)}")
        if batch.dtype != spec.dtype:
            raise UsageError(
                f"the model takes {spec}, not {batch.dtype.name}", hint=f"pass batch.astype({spec.dtype.name!r})"
            )

    @abstractmethod
    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """`run` after its checks."""

    @abstractmethod
    def describe(self) -> str:
        """The runtime, its version, the device and how the scan is computed, for reports."""

    def close(self) -> None:
        """Free what the runtime holds. Closing twice is allowed."""
        self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
