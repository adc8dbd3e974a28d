"""`model.fp16.plan.json`: everything about a plan that is not in the plan, which stays as TensorRT wrote it.

Plan and sidecar together suffice for `run`, `eval` and a C++ program. Format 1 (design.md, "Files a user gets"):

    format       1
    plan         file, sha256, bytes
    runtime      name (tensorrt | tensorrt-rtx), version
    device       name, sm, driver; null for an engine that was built ahead of time
    plugin       file, sha256, ops, version, namespace; null when the op's function body was built in
    profile      input, min, opt, max
    precision    asked, source (inspector | network), projections, islands, layers, hidden: see inspect.py
    tf32, version_compatible
    onnx         file, sha256
    build        seconds, timing_cache (file, entries found), workspace_bytes, fusion, vimdeploy
    model        ModelInfo.to_props(): variant, sizes, preprocessing, labels
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimdeploy.bundle import ModelInfo, sha256_of
from vimdeploy.engines.profile import Profile
from vimdeploy.errors import ModelFileError

FORMAT = 1
_REBUILD = "build it again with `vimdeploy build-engine`"


@dataclass(frozen=True)
class Sidecar:
    """The sidecar's content; see the module's text for the layout of the mappings."""

    plan: Mapping[str, Any]
    runtime: Mapping[str, Any]
    device: Mapping[str, Any] | None
    plugin: Mapping[str, Any] | None
    profile: Profile
    precision: Mapping[str, Any]
    tf32: bool
    version_compatible: bool
    onnx: Mapping[str, Any]
    build: Mapping[str, Any]
    info: ModelInfo

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "plan": dict(self.plan),
            "runtime": dict(self.runtime),
            "device": None if self.device is None else dict(self.device),
            "plugin": None if self.plugin is None else dict(self.plugin),
            "profile": self.profile.to_dict(),
            "precision": dict(self.precision),
            "tf32": self.tf32,
            "version_compatible": self.version_compatible,
            "onnx": dict(self.onnx),
            "build": dict(self.build),
            "model": self.info.to_props(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Sidecar:
        """The inverse of `to_dict`. Raises ModelFileError naming `source` and what is wrong with it."""
        if values.get("format") != FORMAT:
            raise ModelFileError(
                f"{source} is of format {values.get('format')!r}; this vimdeploy reads {FORMAT}", hint=_REBUILD
            )
        try:
            for key, names in (("plan", ("sha256",)), ("runtime", ("name", "version")), ("precision", ("asked",))):
                for name in names:
                    values[key][name]
            return cls(
                plan=values["plan"],
                runtime=values["runtime"],
                device=values["device"],
                plugin=values["plugin"],
                profile=Profile.from_dict(values["profile"]),
                precision=values["precision"],
                tf32=bool(values["tf32"]),
                version_compatible=bool(values["version_compatible"]),
                onnx=values["onnx"],
                build=values["build"],
                info=ModelInfo.from_props(values["model"], source),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{source} is damaged ({type(error).__name__}: {error})", hint=_REBUILD) from error


def sidecar_path(plan: Path) -> Path:
    """`model.fp16.plan` -> `model.fp16.plan.json`, beside it."""
    return plan.with_name(plan.name + ".json")


def read_sidecar(plan: Path) -> Sidecar:
    """The sidecar of a plan. Raises ModelFileError when plan or sidecar is missing or damaged."""
    path = sidecar_path(plan)
    if not plan.is_file():
        raise ModelFileError(f"{plan} does not exist", hint="make it with `vimdeploy build-engine`")
    if not path.is_file():
        raise ModelFileError(
            f"{plan} has no sidecar ({path.name}), which says what it was built for",
            hint="copy it from where the plan was built, or " + _REBUILD,
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged ({error})", hint=_REBUILD) from error
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} is damaged (not an object)", hint=_REBUILD)
    return Sidecar.from_dict(values, str(path))


def check_plan(plan: Path, sidecar: Sidecar) -> None:
    """Raise ModelFileError when the plan is not byte for byte the one its sidecar describes."""
    size, wanted = plan.stat().st_size, sidecar.plan.get("bytes")
    if wanted is not None and size != wanted:
        raise ModelFileError(
            f"{plan} has {size} bytes, its sidecar says {wanted}: it was cut or replaced", hint=_REBUILD
        )
    if sha256_of(plan) != sidecar.plan["sha256"]:
        raise ModelFileError(
            f"{plan} is not the plan its sidecar describes (SHA-256 differs): it was damaged or replaced", hint=_REBUILD
        )
