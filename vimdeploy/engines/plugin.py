"""Finding, checking and loading vimdeploy's TensorRT plugin library.

Two libraries come of plugins/tensorrt: one with an IPluginV3 for TensorRT 10 and later, which the registry loads, and
one with an IPluginV2DynamicExt for 8.5 and 8.6, which registers itself when it is loaded (runtimes-and-toolkits.md 4).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vimdeploy.bundle import sha256_of
from vimdeploy.engines.capabilities import Capabilities
from vimdeploy.errors import RuntimeMissing
from vimdeploy.export import schema

ENVIRONMENT = "VIMDEPLOY_TRT_PLUGIN"
#: kind of plugin (Capabilities.plugins) -> file
LIBRARIES = {"v3": "libvimdeploy_trt.so", "v2": "libvimdeploy_trt8.so"}
#: A creator is named like its op (schema.OPS), in this version and namespace.
VERSION, NAMESPACE = schema.PLUGIN_ATTRIBUTES["plugin_version"], schema.PLUGIN_ATTRIBUTES["plugin_namespace"]
#: What the 8.x library calls to register, where it cannot at load time: given the registry, returns 1 when done.
REGISTER = "vimdeploy_register_plugins"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # ELF e_machine


def plugin_path(capabilities: Capabilities, named: Path | None = None) -> Path:
    """The plugin library for this TensorRT: `named`, else what VIMDEPLOY_TRT_PLUGIN names, else the installed one.

    Raises RuntimeMissing when it is not there; a name that was given is never passed over.
    """
    from vimdeploy.runtimes import library

    for source, path in (("--plugin", named), (ENVIRONMENT, _from_environment())):
        if path is not None:
            if not path.is_file():
                raise RuntimeMissing(
                    f"{source} names {path}, which is not a file", hint="name the built plugin library"
                )
            return path.resolve()
    file = LIBRARIES[capabilities.plugins]
    found = library.installed(file)
    if found is not None:
        return found
    raise RuntimeMissing(
        f"vimdeploy's plugin for {capabilities} ({file}) is not installed",
        hint=f"reinstall vimdeploy where nvcc is present, or name the library with --plugin or {ENVIRONMENT}",
    )


def _from_environment() -> Path | None:
    named = os.environ.get(ENVIRONMENT)
    return Path(named) if named else None


def load_plugin(module: Any, capabilities: Capabilities, path: Path, ops: Collection[str] = (schema.SCAN.name,)) -> str:
    """Load the library at `path` and see that the creators of `ops` are in the registry. Returns its SHA-256.

    Loading what is already registered does nothing. Raises RuntimeMissing naming what does not fit: the file, its
    architecture, the ops the library lacks, or the version or namespace of the creators found instead.
    """
    if not path.is_file():
        raise RuntimeMissing(f"the plugin library {path} is not a file", hint="name the built library with --plugin")
    _check_elf(path)
    registry = module.get_plugin_registry()
    digest = sha256_of(path)
    if _lacking(registry, capabilities, ops):
        _load(module, registry, capabilities, path)
    lacking = _lacking(registry, capabilities, ops)
    if lacking:
        raise RuntimeMissing(
            f"{path} was loaded, but {capabilities} has no plugin {' nor '.join(lacking)}, version {VERSION}, "
            f"namespace {NAMESPACE!r}: {_instead(registry, lacking)}",
            hint="use the plugin library of this vimdeploy version",
        )
    return digest


def _lacking(registry: Any, capabilities: Capabilities, ops: Collection[str]) -> list[str]:
    get = registry.get_plugin_creator if capabilities.plugins == "v2" else registry.get_creator
    return [op for op in sorted(ops) if get(op, VERSION, NAMESPACE) is None]


def _load(module: Any, registry: Any, capabilities: Capabilities, path: Path) -> None:
    wanted = LIBRARIES[capabilities.plugins]
    if capabilities.plugins == "v3":
        _dlopen(path, capabilities)  # for its error text: the registry only says that it failed
        if registry.load_library(str(path)) is None:
            raise RuntimeMissing(
                f"{capabilities} refused the plugin library {path}: it must export getCreators and setLoggerFinder",
                hint=f"{capabilities} takes {wanted}",
            )
        return
    library = _dlopen(path, capabilities)
    if hasattr(library, REGISTER):
        register = getattr(library, REGISTER)
        register.argtypes, register.restype = [ctypes.c_void_p], ctypes.c_int
        if not register(_registry_address()):
            raise RuntimeMissing(f"{path} could not register its plugin with {capabilities}", hint=f"use {wanted}")
    elif hasattr(library, "getCreators"):
        raise RuntimeMissing(
            f"{path} is the plugin for TensorRT 10 and later; this is {capabilities}", hint=f"name {wanted}"
        )


def _dlopen(path: Path, capabilities: Capabilities) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeMissing(
            f"the plugin library {path} cannot be loaded: {error}",
            hint=f"use the build for {capabilities} and this host",
        ) from error


def _registry_address() -> int:
    """The registry's C++ address, from libnvinfer, which the Python module has loaded already."""
    library = ctypes.CDLL("libnvinfer.so.8")
    library.getPluginRegistry.restype = ctypes.c_void_p
    return int(library.getPluginRegistry())


def _instead(registry: Any, lacking: Collection[str]) -> str:
    """What the registry holds under those names, or of ours at all, in words."""
    creators = list(getattr(registry, "all_creators", None) or registry.plugin_creator_list)
    found = [
        f"version {creator.plugin_version}, namespace {creator.plugin_namespace!r}"
        for creator in creators
        if creator.name in lacking
    ]
    if found:
        return f"under that name there is {'; '.join(found)}"
    ours = [creator.name for creator in creators if creator.plugin_namespace == NAMESPACE]
    if ours:  # an older library, or one that was loaded into this process before
        return f"an older build, which has {', '.join(sorted(ours))} only"
    return "no plugin has that name"


def _check_elf(path: Path) -> None:
    with path.open("rb") as stream:
        header = stream.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise RuntimeMissing(f"the plugin library {path} is not a shared library", hint="name the built .so file")
    machine = _MACHINES.get(struct.unpack_from("<H", header, 18)[0], "another machine")
    if machine != platform.machine():
        raise RuntimeMissing(
            f"the plugin library {path} is built for {machine}; this host is {platform.machine()}",
            hint="build the plugin on this host",
        )
