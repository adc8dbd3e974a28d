"""What calibration found, as a file: with it, the same model is quantized the same way without the images.

The cache (`model.calib.json`), format 1:

    format    1
    made_by   vimdeploy and its version
    model     checkpoint, weights, size, positions, output: which network; layers_sha256: over the weights quantized
    images    n, sha256 (over the files), source
    method    auto | minmax | percentile | entropy
    layers    name -> bound, method, alpha, factors, sqnr_db (choose.py)
    keep_fp   names of layers that stay out of int8
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import vimdeploy
from vimdeploy.bundle import ModelInfo, replacing_file
from vimdeploy.errors import ModelFileError
from vimdeploy.passes.projections import Projection
from vimdeploy.quantize.choose import Choice

FORMAT = 1
_AGAIN = "calibrate again: vimdeploy quantize MODEL --calib FOLDER"


@dataclass(frozen=True)
class Calibration:
    """How each layer is to be quantized, and for which model, on which images, that was found."""

    model: Mapping[str, Any]
    images: Mapping[str, Any]
    method: str
    layers: Mapping[str, Choice]
    keep_fp: tuple[str, ...] = field(default=())

    @property
    def quantized(self) -> tuple[str, ...]:
        """The layers that go into int8, in the network's order."""
        return tuple(name for name in self.layers if name not in self.keep_fp)

    def check(self, info: ModelInfo, layers: list[Projection], source: str) -> None:
        """Raise ModelFileError when this was not found for the model of `info` and `layers`."""
        wanted = identity(info, layers, self.layers)
        differing = [key for key in wanted if self.model.get(key) != wanted[key]]
        missing = sorted(set(self.layers) - {layer.name for layer in layers})
        if missing:
            raise ModelFileError(f"{source} is of another model: this one has no layer {missing[0]}", hint=_AGAIN)
        if differing:
            said = {
                "checkpoint": "another checkpoint",
                "weights": "another set of weights",
                "size": "another image size",
                "positions": "other positions",
                "output": "another output",
                "layers_sha256": "other weights",
            }
            raise ModelFileError(
                f"{source} is of another model: it was made for {', '.join(said[key] for key in differing)}",
                hint=_AGAIN,
            )
        for layer in layers:
            choice = self.layers.get(layer.name)
            if choice is not None and choice.factors is not None and len(choice.factors) != layer.weight.shape[0]:
                raise ModelFileError(
                    f"{source} has {len(choice.factors)} factors for {layer.name}, which reads "
                    f"{layer.weight.shape[0]} channels",
                    hint=_AGAIN,
                )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "made_by": f"vimdeploy {vimdeploy.__version__}",
            "model": dict(self.model),
            "images": dict(self.images),
            "method": self.method,
            "layers": {
                name: {
                    "bound": choice.bound,
                    "method": choice.method,
                    "alpha": choice.alpha,
                    "factors": None if choice.factors is None else [float(f) for f in choice.factors],
                    "sqnr_db": round(choice.sqnr_db, 2),
                }
                for name, choice in self.layers.items()
            },
            "keep_fp": list(self.keep_fp),
        }

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Calibration:
        """The inverse of `to_dict`. Raises ModelFileError naming `source` and the first thing wrong with it."""
        if not isinstance(values, dict) or "layers" not in values:
            raise ModelFileError(f"{source} is not a calibration cache", hint=_AGAIN)
        if values.get("format") != FORMAT:
            raise ModelFileError(
                f"{source} is of format {values.get('format')!r}; this vimdeploy reads {FORMAT}", hint=_AGAIN
            )
        try:
            layers = {name: _choice(name, entry) for name, entry in values["layers"].items()}
            kept = tuple(values["keep_fp"])
            unknown = sorted(set(kept) - set(layers))
            if unknown:
                raise ValueError(f"keep_fp names {unknown[0]}, which is not among the layers")
            return cls(dict(values["model"]), dict(values["images"]), str(values["method"]), layers, kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelFileError(f"{source} is damaged ({error})", hint=_AGAIN) from error

    def write(self, path: Path) -> None:
        """One line a layer, so that two caches can be compared by eye."""
        values = self.to_dict()
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in values.pop("layers").items())
        head = json.dumps(values, indent=1)[:-2]
        with replacing_file(path) as scratch:
            scratch.write_text(f'{head},\n "layers": {{\n{rows}\n }}\n}}\n')


def read_calibration(path: Path) -> Calibration:
    """A cache from its file. Raises ModelFileError when it is missing, no cache, or damaged."""
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist", hint=_AGAIN)
    try:
        values = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not a calibration cache ({error})", hint=_AGAIN) from error
    return Calibration.from_dict(values, str(path))


def identity(info: ModelInfo, layers: Iterable[Projection], names: Iterable[str]) -> dict[str, Any]:
    """What decides how large the activations of a model get, and the weights that calibration looked at.

    Not how the graph is written: a fused export of the same checkpoint has the same layers.
    """
    chosen = set(names)
    digest = hashlib.sha256()
    for layer in sorted(layers, key=lambda layer: layer.name):
        if layer.name in chosen:
            digest.update(f"{layer.name} {layer.weight.shape}".encode())
            digest.update(np.ascontiguousarray(layer.weight, np.float32).tobytes())
    return {
        "checkpoint": info.checkpoint_sha256,
        "weights": info.weights,
        "size": list(info.config.img_size),
        "positions": info.pos_embed_mode,
        "output": info.output,
        "layers_sha256": digest.hexdigest(),
    }


def _choice(name: str, entry: Mapping[str, Any]) -> Choice:
    bound, alpha, factors = float(entry["bound"]), entry["alpha"], entry["factors"]
    if not (math.isfinite(bound) and bound > 0):
        raise ValueError(f"the bound of {name} is {bound:g}: it must be finite and above 0")
    array = None
    if factors is not None:
        array = np.array(factors, np.float64)
        if array.ndim != 1 or not len(array) or not (np.isfinite(array).all() and (array > 0).all()):
            raise ValueError(f"the factors of {name} must be finite and above 0")
    return Choice(bound, str(entry["method"]), None if alpha is None else float(alpha), array, float(entry["sqnr_db"]))
