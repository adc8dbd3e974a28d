"""What an artifact is compared with: images, and what PyTorch makes of them.

`TorchReference` computes on demand; `SavedReference` reads what another computed, for a host (or a Python) without
torch. Both answer `wanted(precision)`.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vimdeploy.bundle import ModelInfo, replacing_file
from vimdeploy.errors import ModelFileError, UsageError
from vimdeploy.verify.compare import FP32, Errors, Tolerance, errors, low_precision

if TYPE_CHECKING:
    from vimdeploy.models.checkpoints import Checkpoint
    from vimdeploy.models.vim import Vim

CHUNK = 8
_FORMAT = 1


@dataclass(frozen=True)
class Wanted:
    """The outputs an artifact of one precision should have, by set of images, and how near it must come."""

    outputs: Mapping[str, np.ndarray]  # float64
    tolerance: Tolerance
    reference: str  # "PyTorch 2.13.0 fp64"


class Reference(Protocol):
    """`images`: sets of images, "random" and "real", each (n, C, H, W) float32."""

    images: Mapping[str, np.ndarray]

    def wanted(self, precision: str) -> Wanted: ...

    def check(self, info: ModelInfo, artifact: Path) -> None:
        """Raise ModelFileError when `artifact` is not of the network this reference is of."""


def ranked(info: ModelInfo) -> bool:
    return info.output == "logits"


class TorchReference:
    """The network of a checkpoint in PyTorch on the CPU: fp32, fp64, or plain in a low type.

    fp16 and bf16 are judged against fp64, with the error of plain PyTorch in that type as the measure (compare.py).
    Raises ModelFileError when the checkpoint is not the one `info` names.
    """

    def __init__(
        self,
        info: ModelInfo,
        artifact: Path,
        checkpoint: Checkpoint | Path | str,
        images: Mapping[str, np.ndarray],
        step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._info, self.images, self._step = info, images, step
        from vimdeploy.models.loading import load_exported

        self._model = load_exported(info, artifact, checkpoint)
        self._cache: dict[str, dict[str, np.ndarray]] = {}

    def check(self, info: ModelInfo, artifact: Path) -> None:
        _check_same(_identity(self._info), _identity(info), artifact, "the reference")

    def wanted(self, precision: str) -> Wanted:
        import torch

        kind = "fp32" if precision == "fp32" else "fp64"
        outputs = self._outputs(kind)
        tolerance = FP32 if precision == "fp32" else low_precision(precision, self.plain(precision))
        return Wanted(outputs, tolerance, f"PyTorch {torch.__version__} {kind}")

    def plain(self, precision: str) -> Errors:
        """The error of PyTorch in `precision` itself.

        The larger of the sets' errors: a few images of a few classes measure each only roughly.
        """
        exact, rough = self._outputs("fp64"), self._outputs(precision)
        return _worst(exact, rough, self._info)

    def save(self, path: Path) -> None:
        """Write everything a `SavedReference` needs to judge every precision."""
        import torch

        arrays = {f"images/{key}": batch for key, batch in self.images.items()}
        for kind in ("fp32", "fp64", "fp16", "bf16"):
            arrays.update({f"{kind}/{key}": values for key, values in self._outputs(kind).items()})
        facts = {"format": _FORMAT, "torch": torch.__version__, "identity": _identity(self._info)}
        with replacing_file(path) as scratch, scratch.open("wb") as stream:
            np.savez(stream, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]

    def _outputs(self, kind: str) -> dict[str, np.ndarray]:
        if kind not in self._cache:
            model = self._model.double() if kind == "fp64" else self._model.float()
            if kind in ("fp16", "bf16"):
                model = plain_model(model, kind)
            done = {}
            for key, batch in self.images.items():
                self._step(f"reference: {key} images in PyTorch {kind}")
                done[key] = compute(model, self._info, batch)
            self._cache[kind] = done
        return self._cache[kind]


class SavedReference:
    """A reference from the file that `verify parity --save-reference` wrote. Raises ModelFileError for another file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="write it where torch is: vimdeploy verify parity "
                             f"--save-reference {path.name}")  # fmt: skip
        try:
            # Opened here: np.load leaves the file open when it is not what it expects.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                facts = json.loads(str(content["facts"]))
                arrays = {name: content[name] for name in content.files if name != "facts"}
            if facts["format"] != _FORMAT:
                raise ValueError(f"format {facts['format']}")
            self._torch, self._identity = facts["torch"], facts["identity"]
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ModelFileError(
                f"{path} is not a reference of `verify parity` ({error})", hint="write it again with --save-reference"
            ) from error
        self._path = path
        self._sets: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            kind, _, key = name.partition("/")
            self._sets.setdefault(kind, {})[key] = array
        self.images: Mapping[str, np.ndarray] = self._sets.pop("images", {})

    def check(self, info: ModelInfo, artifact: Path) -> None:
        _check_same(self._identity, _identity(info), artifact, str(self._path))
        self._output = info

    def wanted(self, precision: str) -> Wanted:
        kind = "fp32" if precision == "fp32" else "fp64"
        outputs = self._sets[kind]
        tolerance = FP32
        if precision != "fp32":
            tolerance = low_precision(precision, _worst(outputs, self._sets[precision], self._output))
        return Wanted(outputs, tolerance, f"PyTorch {self._torch} {kind}, from {self._path.name}")


def _worst(exact: Mapping[str, np.ndarray], rough: Mapping[str, np.ndarray], info: ModelInfo) -> Errors:
    measured = (errors(rough[key], exact[key], ranked=ranked(info)) for key in exact)
    return max(measured, key=lambda found: found.rel_rms)


def _identity(info: ModelInfo) -> dict[str, Any]:
    """What two artifacts must have in common to have the same outputs."""
    return {
        "checkpoint": info.checkpoint_sha256,
        "weights": info.weights,
        "output": info.output,
        "size": list(info.config.img_size),
        "positions": info.pos_embed_mode,
    }


def _check_same(mine: Mapping[str, Any], other: Mapping[str, Any], artifact: Path, source: str) -> None:
    differing = [f"{key} {other[key]} against {mine.get(key)}" for key in other if mine.get(key) != other[key]]
    if differing:
        raise ModelFileError(
            f"{artifact} is not of the network of {source}: {'; '.join(differing)}",
            hint="write the reference again with --save-reference, from the same checkpoint",
        )


def plain_model(model: Vim, precision: str) -> Vim:
    """The network as `model.half()` or `.bfloat16()` would have it, the op's fp32 inputs kept: A, D, dt bias."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    plain = copy.deepcopy(model).to(dtype)
    for name, parameter in plain.named_parameters():
        if name.rsplit(".", 1)[-1] in ("A_log", "A_b_log", "D", "D_b") or name.endswith(
            ("dt_proj.bias", "dt_proj_b.bias")
        ):
            parameter.data = model.get_parameter(name).data
    return plain


def compute(model: Vim, info: ModelInfo, batch: np.ndarray) -> np.ndarray:
    """Images (n, C, H, W) -> the output `info` names, float64, computed in the model's own type."""
    import torch

    dtype = model.patch_embed.proj.weight.dtype
    parts = []
    with torch.inference_mode():
        for chunk in chunks(batch, CHUNK):
            image = torch.from_numpy(chunk).to(dtype)
            if info.output == "tokens":
                y = model.token_map(image)
            else:
                y = model(image, return_features=info.output == "features")
            parts.append(y.to(torch.float64).numpy())
    return np.concatenate(parts)


def chunks(batch: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(batch), size):
        yield batch[start : start + size]
