"""`quantize_model`: an exported fp32 file and images in, one int8 file for every runtime out, its accuracy measured.

observe → choose, layer by layer → smooth → sweep → write → run what was written → leave out what costs too much.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import vimdeploy
from vimdeploy import bundle
from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import CheckFailed, ModelFileError, UsageError
from vimdeploy.passes.projections import DEFAULT_KINDS, KINDS, OPTIONAL_KINDS, kind_of, projections
from vimdeploy.passes.quantize import is_quantized
from vimdeploy.quantize.calibration import Calibration, identity, read_calibration
from vimdeploy.quantize.choose import METHODS, choose
from vimdeploy.quantize.images import DEFAULT_LIMIT, CalibrationImages, load_images
from vimdeploy.quantize.observe import observe
from vimdeploy.quantize.sensitivity import Switchboard, keep_out, sweep
from vimdeploy.quantize.session import GraphSession
from vimdeploy.quantize.write import int8_kernels, run_file, smoothed, write_int8
from vimdeploy.verify.agreement import Agreement, sqnr

#: Images the sensitivity of one layer is measured on, and of all of them: the order of the layers is wanted, not an
#: accuracy, and it takes a run of the model for each.
SWEEP_IMAGES, SWEEP_RUNS = 16, 384
#: Smoothing rearranges fp32 sums. Anything under this is not rounding but another network.
EXACT_DB = 80.0

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeOptions:
    """What `vimdeploy quantize` can be told; see its `--help`.

    `calib`: a folder of images, the name of a set, or a calibration cache. `val`: labelled images the budget is held
    on, None for the calibration images. `keep_fp`: layers that stay out of int8; with `search`, more may join them.
    """

    calib: str | Path
    method: str = "auto"
    smooth: bool = True
    include: tuple[str, ...] = ()
    max_drop: float = 0.5
    keep_fp: tuple[str, ...] = field(default=())
    search: bool = True
    val: Path | None = None
    limit: int = DEFAULT_LIMIT

    def validate(self) -> QuantizeOptions:
        """Return self, or raise UsageError naming the first value that cannot be."""
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        unknown = set(self.include) - set(OPTIONAL_KINDS)
        if unknown:
            raise UsageError(
                f"{min(unknown)!r} cannot be quantized besides the rest", hint="choose of " + ", ".join(OPTIONAL_KINDS)
            )
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop is in points of top-1, not {self.max_drop:g}", hint="0.5 is the usual")
        if self.limit < 1:
            raise UsageError(f"at least one image is needed, not {self.limit}")
        return self


@dataclass(frozen=True)
class QuantizeResult:
    """What was written. `report` is the content of the report file, see `_report`."""

    path: Path
    cache: Path
    report_file: Path
    info: ModelInfo
    report: dict[str, Any]
    notices: tuple[str, ...]


def quantize_model(
    model: Path, out: Path | None, options: QuantizeOptions, *, tell: Tell = lambda text, done, total: None
) -> QuantizeResult:
    """Quantize `model` (an ONNX file of vimdeploy) into `out`, by default `model.int8.onnx` beside it.

    Beside `out` go the calibration cache and the report. What is written was run on the images first; with a cache and
    no `val` there are none, and ONNX Runtime is not needed. `tell` hears what is being done, with steps done and in all
    (0 of 0 when they are not counted). Raises UsageError, ModelFileError (a file that is quantized or typed already, a
    cache of another model), ImageError, CheckFailed (not finite, or int8 costs more than `max_drop` allows).
    """
    info = bundle.read_info(model)
    bundle.check_hash(model)
    _check_model(model, info)
    out = _target(model, out)
    making = _Making(model, info, options.validate(), tell)
    cached = _cache_named(options.calib)
    if cached is not None:
        found, images = making.from_cache(cached), None
        evidence = making.on_labelled_images()
        switches = None
    else:
        images = making.calibration_images()
        found, outputs = making.calibrate(images)
        evidence = making.on_labelled_images() or _Evidence(images, outputs)
        switches = making.sweep(found, evidence)
    if not found.quantized:
        raise UsageError("every layer is to stay in fp32, so there is nothing to quantize", hint="keep fewer")
    with bundle.replacing_file(out) as scratch:
        measured = making.write_and_run(scratch, found, evidence)
        if switches is not None and evidence is not None and options.search and info.output == "logits":
            while measured is not None and measured.points > options.max_drop:
                found = making.leave_out_more(found, switches, evidence)
                measured = making.write_and_run(scratch, found, evidence)
        kernels = int8_kernels(scratch)
    cache = out.with_name(f"{out.stem.removesuffix('.int8')}.calib.json")
    report_file = out.with_suffix(".json")
    found.write(cache)
    making.times["total"] = time.perf_counter() - making.began
    sensitivity = {} if switches is None else switches.sensitivity
    report = _report(model, out, found, sensitivity, measured, kernels, options.max_drop, making.times)
    with bundle.replacing_file(report_file) as scratch:
        scratch.write_text(json.dumps(report, indent=2) + "\n")
    if out.parent.resolve() == model.parent.resolve():
        made = {"made_by": "quantize", "vimdeploy": vimdeploy.__version__, "onnx": model.name}
        bundle.update_manifest(out.parent, {path.name: made for path in (out, report_file, cache)})
    notices = () if images is None else images.notices
    return QuantizeResult(out, cache, report_file, bundle.read_info(out), report, notices)


@dataclass(frozen=True)
class _Evidence:
    """Images, and the model's output on them in fp32."""

    images: CalibrationImages
    reference: np.ndarray


@dataclass(frozen=True)
class _Switches:
    board: Switchboard
    sensitivity: dict[str, float]  # layer -> dB of the model's output with that layer alone in int8


class _Making:
    """One model on its way to int8: what every step needs, and how long each took."""

    def __init__(self, model: Path, info: ModelInfo, options: QuantizeOptions, tell: Tell) -> None:
        self.model, self.info, self.options, self.tell = model, info, options, tell
        self.source = bundle.sha256_of(model)
        self.began = time.perf_counter()
        self.times: dict[str, float] = {}

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.times[step] = self.times.get(step, 0.0) + time.perf_counter() - began

    def from_cache(self, path: Path) -> Calibration:
        """What was found before, for this model."""
        found = read_calibration(path)
        found.check(self.info, projections(ir.load(self.model).graph, KINDS), str(path))
        return self._keeping(found, (*found.keep_fp, *self.options.keep_fp))

    def calibration_images(self) -> CalibrationImages:
        with self._timed("images"):
            return load_images(
                self.options.calib,
                self.info,
                limit=self.options.limit,
                progress=lambda done, n: self.tell("reading images", done, n),
            )

    def on_labelled_images(self) -> _Evidence | None:
        """The images of `val` and the model's output on them; None where there are none."""
        if self.options.val is None:
            return None
        with self._timed("images"):
            images = load_images(
                self.options.val,
                self.info,
                limit=None,
                labelled=True,
                progress=lambda done, n: self.tell("reading images", done, n),
            )
        self.tell("running the model in fp32", 0, 0)
        with self._timed("reference"):
            graph = ir.load(self.model)
            return _Evidence(images, GraphSession(graph).run(images.batch, str(graph.graph.outputs[0].name)))

    def calibrate(self, images: CalibrationImages) -> tuple[Calibration, np.ndarray]:
        """The choice for every layer, and the model's output in fp32."""
        graph = ir.load(self.model)
        layers = projections(graph.graph, tuple(dict.fromkeys((*DEFAULT_KINDS, *self.options.include))))
        if not layers:
            raise ModelFileError(f"{self.model} has no layer to quantize", hint="export it again")
        with self._timed("observe"):
            seen, reference = observe(
                graph,
                layers,
                images.batch,
                self.info,
                progress=lambda done, n: self.tell("running the calibration images", done, n),
            )
        choices = {}
        with self._timed("choose"):
            for i, layer in enumerate(layers):
                self.tell("choosing bounds and smoothing", i, len(layers))
                observation = seen.pop(layer.name)
                choices[layer.name] = choose(layer, observation, self.options.method, smooth=self.options.smooth)
        facts = {"n": len(images), "sha256": images.sha256, "source": _shown(images.source)}
        found = Calibration(identity(self.info, layers, choices), facts, self.options.method, choices)
        return self._keeping(found, self.options.keep_fp), reference

    def sweep(self, found: Calibration, evidence: _Evidence) -> _Switches:
        """A session in which each layer can be switched, and what each in int8 alone does to the output."""
        with self._timed("sweep"):
            factors = {name: c.factors for name, c in found.layers.items() if c.factors is not None}
            bounds = {name: choice.bound for name, choice in found.layers.items()}
            board = Switchboard(smoothed(self.model, self.info, factors), bounds)
            n = len(evidence.images)
            count = min(n, max(2, min(SWEEP_IMAGES, SWEEP_RUNS // len(board.layers))))
            few = [i * n // count for i in range(count)]
            batch, reference = evidence.images.batch[few], evidence.reference[few]
            exact = sqnr(board.run(batch, []), reference)
            if exact < EXACT_DB:
                raise CheckFailed(
                    f"smoothing changed the model: {exact:.0f} dB, where rounding leaves more than {EXACT_DB:.0f}",
                    hint="report it; --no-smooth leaves it out",
                )
            tell = self.tell
            return _Switches(
                board, sweep(board, batch, reference, lambda done, n: tell("each layer in int8 alone", done, n))
            )

    def write_and_run(self, scratch: Path, found: Calibration, evidence: _Evidence | None) -> Agreement | None:
        """The file as `found` says, and its accuracy; None without images."""
        self.tell("writing the file", 0, 0)
        write_int8(self.model, scratch, self.info, found, source_sha256=self.source)
        if evidence is None:
            return None
        with self._timed("check"):
            self.tell("running the int8 file", 0, 0)
            measured = run_file(scratch, evidence.images, evidence.reference)
            # A check of the file, wherever it runs, then has something to compare its error with.
            facts = {"source_sha256": self.source, "sqnr_db": round(measured.sqnr_db, 2)}
            write_int8(self.model, scratch, self.info, found, **facts)
        return measured

    def leave_out_more(self, found: Calibration, switches: _Switches, evidence: _Evidence) -> Calibration:
        """`found` with so many more layers left in fp32, the most sensitive first, that the budget holds.

        At least one more than now: what the switches say is enough may fall short in the file by an image.
        """
        with self._timed("search"):
            kept, _ = keep_out(
                switches.board,
                evidence.images.batch,
                evidence.reference,
                evidence.images.targets,
                sorted(switches.sensitivity, key=lambda name: switches.sensitivity[name]),
                self.options.max_drop,
                self.options.keep_fp,
                len(found.keep_fp) - len(set(self.options.keep_fp)) + 1,
                step=lambda text: self.tell(text, 0, 0),
            )
        return replace(found, keep_fp=kept)

    def _keeping(self, found: Calibration, names: tuple[str, ...]) -> Calibration:
        """`found` with those layers left in fp32. Raises UsageError for one it does not have."""
        unknown = [name for name in names if name not in found.layers]
        if unknown:
            raise UsageError(
                f"there is no layer {unknown[0]!r} to keep in fp32", hint=f"names are like {next(iter(found.layers))}"
            )
        return replace(found, keep_fp=tuple(name for name in found.layers if name in names))


def read_keep_fp(path: Path) -> tuple[str, ...]:
    """Layer names from a file: a report or cache of `quantize`, or text with one name a line."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="--keep-fp takes a report of `quantize`, or layer names")
    text = path.read_text(errors="replace")
    try:
        values = json.loads(text)
    except ValueError:
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    names = values.get("keep_fp") if isinstance(values, dict) else values
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path} holds no list keep_fp", hint="name a report of `vimdeploy quantize`")
    return tuple(names)


def _check_model(model: Path, info: ModelInfo) -> None:
    if info.quantization:
        raise UsageError(f"{model} is int8 already", hint="quantize the fp32 file it was made of")
    if info.precision != "fp32":
        raise UsageError(
            f"{model} is {info.precision}, and int8 is made of fp32",
            hint="export with --precision fp32; build-engine --int8 types what stays out of int8",
        )
    if is_quantized(ir.load(model)):
        raise UsageError(f"{model} holds QuantizeLinear nodes already", hint="quantize the fp32 file it was made of")


def _target(model: Path, out: Path | None) -> Path:
    out = out or model.with_name(f"{model.stem}.int8.onnx")
    if out.suffix != ".onnx":
        raise UsageError(f"{out} does not end in .onnx", hint=f"-o {out.with_suffix('.onnx')}")
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="name a file that ends in .onnx")
    if out.resolve() == model.resolve():
        raise UsageError(f"{out} is the model itself", hint="choose another name with -o")
    return out


def _cache_named(calib: str | Path) -> Path | None:
    path = Path(calib)
    return path if path.suffix == ".json" or path.is_file() else None


def _shown(source: str) -> str:
    """A set by its name, a folder by the end of its path: a cache travels."""
    return "/".join(Path(source).resolve().parts[-2:]) if Path(source).is_dir() else source


def _report(
    model: Path,
    out: Path,
    found: Calibration,
    sensitivity: dict[str, float],
    measured: Agreement | None,
    kernels: dict[str, int] | None,
    max_drop: float,
    times: dict[str, float],
) -> dict[str, Any]:
    """model, out, images; layers: each with what was chosen and what it costs; keep_fp; accuracy; bytes; seconds."""
    return {
        "model": model.name,
        "out": out.name,
        "images": dict(found.images),
        "method": found.method,
        "max_drop": max_drop,
        "layers": [
            {
                "name": name,
                "kind": kind_of(name),
                "in": "fp32" if name in found.keep_fp else "int8",
                "bound": choice.bound,
                "method": choice.method,
                "alpha": choice.alpha,
                "layer_sqnr_db": round(choice.sqnr_db, 2),
                "output_sqnr_db": round(sensitivity[name], 2) if name in sensitivity else None,
            }
            for name, choice in found.layers.items()
        ],
        "keep_fp": list(found.keep_fp),
        "accuracy": None if measured is None else measured.to_dict(),
        "onnxruntime_products": kernels,
        "bytes": {"fp32": model.stat().st_size, "int8": out.stat().st_size},
        "seconds": {name: round(value, 2) for name, value in times.items()},
    }
