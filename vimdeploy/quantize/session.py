"""ONNX Runtime on a graph in memory: with vimdeploy's op library where it is installed, else on the function bodies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vimdeploy.errors import ModelFileError, RuntimeMissing
from vimdeploy.runtimes.library import ort_library_path
from vimdeploy.runtimes.onnxruntime import session_options

#: Images a run: the intermediate values of so many fit a small host, and a batch gains nothing on a CPU.
CHUNK = 8


def library_here() -> Path | None:
    """vimdeploy's op library; None where it is not installed and models run their function body."""
    with suppress(RuntimeMissing):
        return ort_library_path()
    return None


class GraphSession:
    """Runs `model` on images (n, C, H, W), a few at a time. `flags` are its other inputs, all bool scalars."""

    def __init__(self, model: ir.Model, flags: tuple[str, ...] = ()) -> None:
        import onnxruntime as ort

        content = ir.to_proto(model).SerializeToString()
        try:
            self._session = ort.InferenceSession(content, session_options(library_here()), ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes, and RuntimeError
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelFileError(
                f"ONNX Runtime cannot run the graph: {first}", hint="export the model again"
            ) from error
        image = next(node for node in self._session.get_inputs() if node.name not in flags)
        self._input, self._step = image.name, image.shape[0] if isinstance(image.shape[0], int) else None

    def chunks(
        self, batch: np.ndarray, outputs: list[str], flags: Mapping[str, bool] | None = None
    ) -> Iterator[list[np.ndarray]]:
        """The named outputs for a few images after the other; a last chunk that is too short is filled up and cut."""
        step = self._step or CHUNK
        feed: dict[str, Any] = {name: np.array(value) for name, value in (flags or {}).items()}
        for start in range(0, len(batch), step):
            part = batch[start : start + step]
            count = len(part)
            if self._step and count < step:
                part = np.concatenate([part, np.repeat(part[-1:], step - count, axis=0)])
            values = self._session.run(outputs, {self._input: part, **feed})
            yield [value[:count] for value in values]

    def run(self, batch: np.ndarray, output: str, flags: Mapping[str, bool] | None = None) -> np.ndarray:
        """One output for all images."""
        return np.concatenate([values[0] for values in self.chunks(batch, [output], flags)])
