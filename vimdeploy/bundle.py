"""The folder a user gets, `ckpt.vim/`, and what each file in it says about itself.

The ONNX file carries its own story in `metadata_props` (ModelInfo), so it stays usable when copied out of its folder;
`manifest.json` lists the files with their SHA-256 and how each was made (design.md, "Files a user gets").
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vimdeploy.errors import ModelFileError, UsageError
from vimdeploy.models.variants import VimConfig

MODEL_FILE = "model.onnx"
MANIFEST = "manifest.json"
REPORT = "report.json"
PREFIX = "vimdeploy."


@dataclass(frozen=True)
class ModelInfo:
    """What an exported model says about itself. `preprocessing` is Preprocessing.to_dict(); labels may be empty."""

    variant: str
    config: VimConfig
    preprocessing: dict[str, Any]
    checkpoint_sha256: str
    weights: str = "model"  # which set of the checkpoint: model | ema
    precision: str = "fp32"  # fp32 | fp16 | bf16
    output: str = "logits"  # logits | features | tokens
    fallback: str = "scan"  # scan | linear-attention | none: the function bodies beside the ops
    fusion: str = "none"  # none | bidirectional | full: which ops the graph is written with
    version: str = ""  # of vimdeploy
    labels: tuple[str, ...] = field(default=())
    trained_size: tuple[int, int] = (0, 0)  # (height, width) of the checkpoint; config.img_size may be another
    pos_embed_mode: str = "layout"  # how the position table was resized, when it was
    quantization: dict[str, Any] = field(default_factory=dict)  # empty, or what quantize/recipe.py says of an int8 file

    @property
    def kind(self) -> str:
        """`precision`, or "int8" for a file whose projections are: what it is judged and named by."""
        return "int8" if self.quantization else self.precision

    def to_props(self) -> dict[str, str]:
        """As ONNX metadata_props: text under `vimdeploy.` keys, structures as JSON."""
        values = {
            "variant": self.variant,
            "config": json.dumps(self.config.to_dict()),
            "preprocessing": json.dumps(self.preprocessing),
            "checkpoint_sha256": self.checkpoint_sha256,
            "weights": self.weights,
            "precision": self.precision,
            "output": self.output,
            "fallback": self.fallback,
            "fusion": self.fusion,
            "version": self.version,
            "labels": json.dumps(list(self.labels)),
            "trained_size": json.dumps(list(self.trained_size)),
            "pos_embed_mode": self.pos_embed_mode,
        }
        if self.quantization:
            values["quantization"] = json.dumps(self.quantization)
        return {PREFIX + key: value for key, value in values.items()}

    @classmethod
    def from_props(cls, props: Mapping[str, str], source: str) -> ModelInfo:
        """The inverse of `to_props`. Raises ModelFileError when `source` was not written by vimdeploy."""
        values = {key.removeprefix(PREFIX): value for key, value in props.items() if key.startswith(PREFIX)}
        try:
            return cls(
                **{
                    **values,
                    "config": VimConfig.from_dict(json.loads(values["config"])),
                    "preprocessing": json.loads(values["preprocessing"]),
                    "labels": tuple(json.loads(values["labels"])),
                    "trained_size": tuple(json.loads(values["trained_size"])),
                    "quantization": dict(json.loads(values.get("quantization", "{}"))),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(
                f"{source} does not say what it is ({type(error).__name__}: {error})",
                hint="export it again with `vimdeploy export CKPT`",
            ) from error


def read_info(model: Path) -> ModelInfo:
    """ModelInfo of an ONNX file. Raises ModelFileError for a missing, damaged or foreign file."""
    import onnx
    from google.protobuf.message import DecodeError

    if not model.is_file():
        raise ModelFileError(f"{model} does not exist", hint="make it with `vimdeploy export CKPT`")
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelFileError(f"{model} is not an ONNX file ({error})", hint="export it again") from error
    if not any(node.domain == "vim" for node in proto.graph.node):
        raise ModelFileError(
            f"{model} has no vim:: operator: it is not a Vision Mamba exported by vimdeploy",
            hint="make one with `vimdeploy export CKPT`",
        )
    return ModelInfo.from_props({p.key: p.value for p in proto.metadata_props}, str(model))


def resolve_artifact(path: str | Path | None, folder: Path | None = None, *, plan: bool = False) -> Path:
    """The model file meant by `path`: a file as it is, a `.vim` folder's model, or the one folder here when None.

    `plan`: of a folder the one TensorRT plan is meant, not the ONNX file. Raises
    UsageError when there is none or more than one to choose from, ModelFileError when it lacks its model.
    """
    if path is None:
        here = folder or Path.cwd()
        found = sorted(p for p in here.glob("*.vim") if p.is_dir())
        if len(found) != 1:
            names = ", ".join(p.name for p in found)
            raise UsageError(
                f"{len(found)} .vim folders in {here}: {names}" if found else f"no .vim folder in {here}",
                hint="name the one you mean" if found else "make one with `vimdeploy export CKPT`",
            )
        path = found[0]
    path = Path(path)
    if path.is_dir() and plan:
        plans = plans_in(path)
        if len(plans) != 1:
            names = ", ".join(p.name for p in plans)
            raise UsageError(
                f"{path} holds {len(plans)} plans: {names}" if plans else f"{path} holds no plan",
                hint="name the one you mean" if plans else "make one with `vimdeploy build-engine`",
            )
        return plans[0]
    if path.is_dir():
        if not (path / MODEL_FILE).is_file():
            raise ModelFileError(f"{path} holds no {MODEL_FILE}", hint="make it again with `vimdeploy export CKPT`")
        return path / MODEL_FILE
    if not path.exists():
        raise UsageError(f"{path} does not exist", hint="make one with `vimdeploy export CKPT`")
    return path


def plans_in(folder: Path) -> list[Path]:
    """The TensorRT plans in a `.vim` folder."""
    return sorted(path for path in folder.glob("*.plan") if path.is_file() and not path.name.startswith("."))


def quantized_in(folder: Path) -> list[Path]:
    """The int8 files that `quantize` put into a `.vim` folder."""
    return sorted(path for path in folder.glob("*.int8.onnx") if path.is_file() and not path.name.startswith("."))


def read_manifest(model: Path) -> dict[str, Any]:
    """The manifest beside a model file; {} when there is none. Raises ModelFileError when it cannot be read."""
    path = model.parent / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged ({error})", hint="export again") from error
    if not isinstance(manifest, dict):
        raise ModelFileError(f"{path} is damaged (not an object)", hint="export again")
    return manifest


def checkpoint_of(model: Path) -> Path:
    """The checkpoint a model was exported from, as its manifest says. Raises UsageError when it is not to be found."""
    source = read_manifest(model).get("checkpoint", {}).get("path")
    if not source:
        raise UsageError(f"{model} has no {MANIFEST} that names its checkpoint", hint="name the checkpoint first")
    path = Path(os.path.normpath(model.parent.resolve() / source))
    if not path.is_file():
        raise UsageError(f"the checkpoint {model} came from, {path}, is gone", hint="name the checkpoint first")
    return path


def check_hash(model: Path) -> None:
    """Raise ModelFileError when the manifest beside `model` names another content for it."""
    wanted = read_manifest(model).get("files", {}).get(model.name, {}).get("sha256")
    if wanted and wanted != sha256_of(model):
        raise ModelFileError(
            f"{model} is not the file its {MANIFEST} describes (SHA-256 differs): it was changed or damaged",
            hint="export it again, or remove the manifest if the change is yours",
        )


def write_manifest(folder: Path, checkpoint: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `manifest.json` into `folder`: `files` maps a file name to how it was made; size and SHA-256 are added."""
    described = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size, **made}
        for name, made in files.items()
    }
    (folder / MANIFEST).write_text(json.dumps({"checkpoint": dict(checkpoint), "files": described}, indent=2) + "\n")


def update_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Add `files` to the manifest in `folder`, or replace their entries; nothing happens where there is no manifest."""
    manifest = read_manifest(folder / MODEL_FILE)
    if not manifest:
        return
    for name, made in files.items():
        path = folder / name
        manifest.setdefault("files", {})[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size, **made}
    with replacing_file(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps(manifest, indent=2) + "\n")


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`: what was checked, how it came out."""
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    parent = target.parent
    with _parents_of(target):
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        try:
            yield scratch
            scratch.chmod(0o777 & ~_umask())
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=parent))
                try:
                    os.replace(target, old / target.name)
                    os.replace(scratch, target)
                finally:
                    if not target.exists():  # failed or interrupted between the two: what was there is back
                        os.replace(old / target.name, target)
                    shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A scratch file beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    with _parents_of(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        scratch = Path(name)
        try:
            yield scratch
            scratch.chmod(0o666 & ~_umask())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above `target`; those that were not there before go again when the block fails.

    An OSError then names `target`, not the scratch file nobody has heard of.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for folder in made:  # the innermost first; one that someone else has filled meanwhile stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        ours = isinstance(error, OSError) and (error.filename is None or f".{target.name}." in str(error.filename))
        if isinstance(error, OSError) and error.errno and ours:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
