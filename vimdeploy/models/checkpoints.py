"""Checkpoints as the untrusted files they are: official containers, state dicts, safetensors.

Reading runs no code from the file: pickles are first scanned opcode by opcode for what they would import, then loaded
by torch's weights-only unpickler with one class allowed, argparse.Namespace, in which official checkpoints keep their
arguments (vim-spec.md 2.1).
"""

import argparse
import io
import json
import mmap
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vimdeploy.bundle import sha256_of
from vimdeploy.errors import CheckpointError

# Keys under which a dict keeps a state dict, by the set they hold.
_SETS = {
    "model": ("model", "state_dict", "model_state_dict", "module"),
    "ema": ("model_ema", "state_dict_ema", "ema"),
}
# Wrappers that put their name before every tensor's.
_PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "net")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The tensor every Vim has and no other network: what comes before it in its name is a wrapper's prefix.
ANCHOR = "layers.0.mixer.in_proj.weight"
_RESAVE = "where it was made, save the tensors alone: torch.save({'model': model.state_dict()}, 'weights.pth')"
META = "vimdeploy."


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A file as read, tensors in the file's dtype (mapped from disk where torch can).

    weights: 'model' and, when present, 'ema', each a state dict without wrapper prefixes. other: what else the file
    holds, with `sizes` in bytes for these and for the sets. prefix: what was stripped from the tensor names.
    """

    path: Path
    sha256: str
    container: str  # official | state_dict | safetensors
    weights: dict[str, dict[str, Tensor]]
    args: dict[str, Any]
    epoch: int | None
    other: tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    prefix: str = ""
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file

    def state(self, weights: str) -> dict[str, Tensor]:
        """The state dict of one set. Raises CheckpointError naming the sets there are."""
        if weights not in self.weights:
            has = ", ".join(self.weights)
            raise CheckpointError(f"{self.path} holds no {weights!r} weights, only: {has}", hint=f"--weights {has}")
        return self.weights[weights]

    def dtypes(self, weights: str = "model") -> tuple[str, ...]:
        """The dtypes of one set's tensors, most frequent first, as 'float32'."""
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in self.state(weights).values()]
        return tuple(sorted(set(names), key=lambda name: -names.count(name)))


def printable(name: object) -> str:
    """A name out of a file, safe for a terminal."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 200 else ascii(text[:200])


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read an official container, a bare or wrapped state dict (zip or older format) or a safetensors file.

    Raises CheckpointError, with the next step, for whatever is not one: missing, unreadable, truncated, a pickle that
    names anything but tensors and argparse.Namespace (which is never run), another kind of file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise CheckpointError(
                    f"{path} is not a regular file", hint="name a checkpoint file (.pth, .safetensors)"
                )
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(16)
            kind = _kind(path, head, size)
            if kind == "zip":
                _check_zip(path, stream, size)
            elif kind == "pickle":
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
                    _check_legacy(path, view)
        sha256 = sha256_of(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist", hint="check the path; the file ends in .pth or .safetensors"
        ) from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint", hint="name the file inside it") from None
    except PermissionError:
        raise CheckpointError(f"{path} may not be read (permission denied)", hint=f"chmod u+r {path}") from None
    if kind == "safetensors":
        return _read_safetensors(path, sha256)
    return _unwrap(path, sha256, _load_pickle(path, mapped=kind == "zip"))


def _kind(path: Path, head: bytes, size: int) -> str:
    if not size:
        raise CheckpointError(f"{path} is empty", hint="copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) > 8 and head[8:9] == b"{" and any(head[:8]):
        if int.from_bytes(head[:8], "little") > size - 8:
            raise CheckpointError(
                f"{path} is a truncated safetensors file: its header alone would be longer than its {size} bytes",
                hint="copy or download it again",
            )
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    hint = "name a PyTorch checkpoint (.pth) or a safetensors file"
    if head.startswith(b"version https://"[:16]):
        hint = "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    raise CheckpointError(
        f"{path} is neither a PyTorch checkpoint nor a safetensors file (it starts with {head!r})", hint=hint
    )


def _check_zip(path: Path, stream: BinaryIO, size: int) -> None:
    """Refuse a zip that is no checkpoint, is damaged, would unpack to more than itself, or whose pickle imports."""
    try:
        archive = zipfile.ZipFile(stream)
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error})", hint="copy or download it again") from error
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any("/code/" in name for name in names):
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint", hint=_RESAVE)
    if len(pickles) != 1:
        some = ", ".join(printable(name) for name in names[:3])
        raise CheckpointError(
            f"{path} is a zip file but not a PyTorch checkpoint: it has no data.pkl (it holds: {some or 'nothing'})",
            hint="name the .pth file itself; unpack it first if it is inside this zip",
        )
    # torch stores its records as they are, so an honest file is never smaller than what it holds.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(
            f"{path} holds compressed or overlapping records, which torch.save never writes",
            hint="save it again with torch.save",
        )
    try:
        found = _globals_of(io.BytesIO(archive.read(pickles[0])))
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})", hint="copy or download it again") from error
    _refuse_globals(path, found)


def _check_legacy(path: Path, view: mmap.mmap) -> None:
    """The format before torch 1.6: five pickles (magic number, version, system, object, storage keys), then data."""
    found: set[str] = set()
    for position in range(5):
        try:
            found |= _globals_of(view)
        except ValueError as error:
            what = "truncated or damaged" if position else "not a PyTorch checkpoint, or truncated"
            raise CheckpointError(f"{path} is {what} ({error})", hint="copy or download it again") from error
        if position == 0 and not view[: view.tell()].find(b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19") > 0:
            _refuse_globals(path, found)
            raise CheckpointError(f"{path} is a pickle that torch.save did not write", hint=_RESAVE)
    _refuse_globals(path, found)


def _globals_of(stream: Any) -> set[str]:
    """What the pickle at the stream's position would import, read opcode by opcode; the stream ends up behind it.

    Raises ValueError for bytes that are no whole pickle.
    """
    found: set[str] = set()
    strings: list[str] = []  # the last ones pushed: STACK_GLOBAL takes module and name from the stack
    memo: dict[int, str] = {}
    last = ""
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(arg).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]) if len(strings) > 1 else "an unnamed object")
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                found.add(f"extension {arg}")
            elif opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if arg is None else int(arg)] = last
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                strings = [*strings[-1:], memo.get(int(arg or 0), "?")]
            if isinstance(arg, str) and ("UNICODE" in opcode.name or "STRING" in opcode.name):
                last = arg
                strings = [*strings[-1:], arg]
    except Exception as error:  # a stranger's bytes can fail in any way; none of it is more than damage
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return found


def _refuse_globals(path: Path, found: set[str]) -> None:
    """Only torch's own names and argparse.Namespace pass; which of torch's, the weights-only unpickler decides."""
    allowed = (
        "argparse.Namespace",
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
    )
    foreign = sorted(name for name in found if name not in allowed and not name.startswith("torch."))
    if foreign:
        shown = ", ".join(printable(name) for name in foreign[:3])
        raise CheckpointError(
            f"{path} was not loaded: unpickling it would call {shown}, which could run any code. Nothing was run",
            hint="if you trust its maker: " + _RESAVE,
        )


def _load_pickle(path: Path, mapped: bool) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # the unpickler fails in as many ways as files can be damaged
            refused = re.search(r"GLOBAL (\S+) was not an allowed global|type (\S+)", str(error))
            if refused and "allowed" in str(error):
                raise CheckpointError(
                    f"{path} was not loaded: it holds an object of {refused[1] or refused[2]}, not only tensors",
                    hint=_RESAVE,
                ) from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} is truncated or damaged ({printable(reason)})", hint="copy or download it again"
            ) from error


def _unwrap(path: Path, sha256: str, content: Any) -> Checkpoint:
    """Sort a loaded object into weight sets, arguments and the rest."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors", hint=_RESAVE)
    keys = {which: next((k for k in names if _is_state(content.get(k))), None) for which, names in _SETS.items()}
    sets = {which: content[key] for which, key in keys.items() if key is not None}
    bare = not sets and _is_state(content)
    if bare:
        sets = {"model": content}
    elif not sets:
        some = ", ".join(printable(key) for key in list(content)[:5])
        raise CheckpointError(f"{path} holds no weights (it holds: {some or 'nothing'})", hint=_RESAVE)
    rest = {} if bare else {str(k): v for k, v in content.items() if k not in keys.values()}
    args = rest.pop("args", {})
    epoch = rest.pop("epoch", None)
    stripped = {which: _strip(path, state) for which, state in sets.items()}
    official = keys["model"] == "model" and bool({"args", "epoch", "optimizer", "model_ema"} & set(map(str, content)))
    return Checkpoint(
        path=path,
        sha256=sha256,
        container="official" if official else "state_dict",
        weights={which: state for which, (state, _) in stripped.items()},
        args=dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, dict) else {},
        epoch=epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None,
        other=tuple(rest),
        sizes={name: _bytes_in(value) for name, value in ({**rest, **sets}).items()},
        prefix=next(iter(stripped.values()))[1],
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _strip(path: Path, state: Mapping[Any, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a state dict under their own names, each checked, and the prefix that was taken off."""
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {printable(name)} is not an ordinary dense tensor", hint=_RESAVE)
        # A view that repeats its storage (stride 0) would grow when copied; an honest one never needs more than it has.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: tensor {printable(name)} claims more data than the file holds", hint=_RESAVE
            )
    found = [name.removesuffix(ANCHOR) for name in tensors if name == ANCHOR or name.endswith("." + ANCHOR)]
    if len(found) > 1:  # several networks in one dict: the one behind wrappers' names only
        found = [p for p in found if all(part in _PREFIXES for part in p.split(".")[:-1])] or found
        if len(found) > 1:
            shown = ", ".join(repr(printable(prefix)) for prefix in found)
            raise CheckpointError(f"{path} holds several Vision Mambas, under {shown}", hint="save one of them alone")
    prefix = found[0] if found else ""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Not every tensor need have it: a backbone's prefix is not before `head`.
        own = name.removeprefix(prefix)
        if own in result:
            raise CheckpointError(f"{path} holds tensor {printable(own)} twice, with and without {printable(prefix)!r}")
        result[own] = tensor.detach()
    return result, prefix


def _bytes_in(value: Any) -> int:
    """Bytes of all tensors in a structure, storages counted once."""
    storages: dict[int, int] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            if item.layout == torch.strided and not item.is_meta:
                storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return sum(storages.values())


def _read_safetensors(path: Path, sha256: str) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is a truncated or damaged safetensors file ({printable(error)})", hint="copy or download it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors", hint="copy or download it again")
    state, prefix = _strip(path, tensors)
    args = json_of(path, metadata, "args") or {}
    epoch = metadata.get(META + "epoch", "")
    return Checkpoint(
        path=path,
        sha256=sha256,
        container="safetensors",
        weights={"model": state},
        args=args if isinstance(args, dict) else {},
        epoch=int(epoch) if epoch.isdecimal() and len(epoch) < 10 else None,
        other=(),
        sizes={"model": _bytes_in(state)},
        prefix=prefix,
        metadata=metadata,
    )


def json_of(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    if META + key not in metadata:
        return None
    try:
        return json.loads(metadata[META + key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata {META + key} is damaged", hint="make it again with `vimdeploy slim`"
        ) from error
