"""Checkpoints: read them as the untrusted files they are, recognise the model inside, load it, slim it.

Reading runs no code from the file: pickles are first scanned opcode by opcode for what they would import, then loaded
by torch's weights-only unpickler with one class allowed, argparse.Namespace, in which official checkpoints keep their
arguments (vim-spec.md 2.1). Recognising takes what tensors tell from the tensors (2.2, 2.3) and the rest from the
file's own words or the user's; two sources that disagree are an error, never a choice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import mmap
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vimdeploy.bundle import replacing_file, sha256_of
from vimdeploy.errors import CheckpointError, UsageError, VariantError, VimDeployError
from vimdeploy.models.resize import resize_pos_embed
from vimdeploy.models.variants import (
    ALIASES,
    REGISTERED,
    VimConfig,
    canonical_name,
    fields_of_name,
    parse_variant,
    registered_config,
)
from vimdeploy.models.vim import RotaryEmbedding, Vim

# Keys under which a dict keeps a state dict, by the set they hold.
_SETS = {
    "model": ("model", "state_dict", "model_state_dict", "module"),
    "ema": ("model_ema", "state_dict_ema", "ema"),
}
# Wrappers that put their name before every tensor's.
_PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "net")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The tensor every Vim has and no other network: what comes before it in its name is a wrapper's prefix.
_ANCHOR = "layers.0.mixer.in_proj.weight"
_RESAVE = "where it was made, save the tensors alone: torch.save({'model': model.state_dict()}, 'weights.pth')"
_META = "vimdeploy."


class AmbiguousVariant(VariantError):
    """The tensors fit more than one network. `known`: what is certain; `choices`: values of --variant that fit."""

    def __init__(self, message: str, *, known: dict[str, Any], choices: tuple[str, ...]) -> None:
        super().__init__(message, hint=_one_of(choices))
        self.known = known
        self.choices = choices


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


@dataclass(frozen=True)
class Recognition:
    """Which network a checkpoint holds. `how`: in words, from where each thing is known. `variant`: the registered or
    upstream name, else 'custom'. `unknown`, `missing`: tensors the file has too many, and too few."""

    config: VimConfig
    variant: str
    how: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    resized_from: tuple[int, int] | None = None  # (height, width) trained, when `config` is for another size

    @property
    def trained_size(self) -> tuple[int, int]:
        """(height, width) of the images the weights were trained on."""
        return self.resized_from or self.config.img_size


@dataclass(frozen=True)
class Slimmed:
    """What `slim` wrote: the file, and the sizes in bytes of the file read and the file written."""

    path: Path
    before: int
    after: int
    recognition: Recognition


def printable(name: object) -> str:
    """A name out of a file, safe for a terminal."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 200 else ascii(text[:200])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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
    found = [name.removesuffix(_ANCHOR) for name in tensors if name == _ANCHOR or name.endswith("." + _ANCHOR)]
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
    args = _json_of(path, metadata, "args") or {}
    epoch = metadata.get(_META + "epoch", "")
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


def _json_of(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    if _META + key not in metadata:
        return None
    try:
        return json.loads(metadata[_META + key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata {_META + key} is damaged", hint="make it again with `vimdeploy slim`"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Recognising


@dataclass(frozen=True)
class _Claim:
    """What one source says. `fallback` gives way to anybody: the 224 in a name is only upstream's default size."""

    source: str
    fields: dict[str, Any]
    fallback: dict[str, Any] = field(default_factory=dict)


_TENSORS = "the tensors"


def recognise(checkpoint: Checkpoint, variant: str | None = None, weights: str = "model") -> Recognition:
    """Find the one network that fits the tensors, the file's own words and `variant` (a name, settings, or both).

    Raises CheckpointError for another architecture, tensors that contradict each other or have wrong shapes;
    VariantError when two sources disagree, naming both; AmbiguousVariant when several networks fit, listing them.
    """
    state = checkpoint.state(weights)
    path = checkpoint.path
    facts, tokens = _facts(path, state)
    settled: dict[str, tuple[Any, str]] = {name: (value, _TENSORS) for name, value in facts.items()}
    claims, notes = _claims(checkpoint, variant)
    how = ["sizes, depth, directions and norm: tensor shapes and names"]

    for claim in claims:
        taken = []
        for name, value in claim.fields.items():
            if _inert(name, facts):
                continue
            if name == "dt_rank" and value == math.ceil(facts["d_model"] / 16):
                value = 0
            if name == "cls_position" and name not in facts and value in ("none", "double"):
                raise _contradiction(claim.source, name, value, "one class token", _TENSORS, checkpoint, facts, tokens)
            if name in settled:
                known, source = settled[name]
                if known != value:
                    raise _contradiction(claim.source, name, value, known, source, checkpoint, facts, tokens)
                continue
            settled[name] = (value, claim.source)
            taken.append(name)
        if taken:
            how.append(f"{', '.join(taken)}: {claim.source}")
    for claim in claims:
        for name, value in claim.fallback.items():
            if name not in settled:
                settled[name] = (value, claim.source)
                how.append(f"{name}: {claim.source}")

    values = {name: value for name, (value, _) in settled.items()}
    patches = None if tokens is None else tokens - _num_cls(values)
    if "img_size" in values and "stride" not in values:
        strides = _strides_of(values["patch_size"], values["img_size"], patches)
        if len(strides) == 1:
            values["stride"] = strides[0]
            how.append(f"stride {strides[0]}: the one that gives {patches} patches at {_size(values['img_size'])}")
    still_open = [name for name in _questions(facts) if name not in values]
    if still_open:
        choices = _choices(values, tokens)
        raise AmbiguousVariant(
            f"{path}: the tensors do not tell {' or '.join(_OPEN[name] for name in still_open)}"
            + (f" ({tokens} tokens)" if tokens is not None else ""),
            known={**values, **({} if tokens is None else {"tokens": tokens})},
            choices=choices,
        )

    values.setdefault("bidirectional", False)
    config = VimConfig(**values).validate()
    if tokens is not None and config.seq_len != tokens:
        sources = [settled[name][1] for name in ("stride", "img_size") if name in settled]
        raise VariantError(
            f"{path}: {' with '.join(dict.fromkeys(sources))} means {config.seq_len} tokens (stride {config.stride} at "
            f"{_size(config.img_size)}), but the tensors have {tokens}",
            hint=_offer(checkpoint, facts, tokens, *sources),
        )
    unknown, missing = _compare(path, config, state)
    _check_rope(path, config, state)
    if not any("bidirectional" in line for line in how):
        how.append("bidirectional no: upstream's default")
    return Recognition(config, _name_of(config, checkpoint), (*how, *notes), unknown, missing)


def _facts(path: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int | None]:
    """What the tensors tell (vim-spec.md 2.2, 2.3), as VimConfig fields, and the length of the position table."""
    if not any(re.fullmatch(r"layers\.\d+\.mixer\..+", name) for name in state):
        raise _not_vim(path, state)

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in state:
            raise CheckpointError(
                f"{path}: tensor {name} is missing", hint="save the whole state dict of the model, not a part of it"
            )
        has = tuple(state[name].shape)
        if len(has) != rank or 0 in has:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {has}; a Vision Mamba has {rank} dimensions there",
                hint="check that this is the checkpoint of a Vision Mamba",
            )
        return has

    depths = {int(match[1]) for match in (re.match(r"layers\.(\d{1,6})\.", name) for name in state) if match}
    depth = max(depths) + 1
    if len(depths) != depth:
        gap = next(i for i in range(depth) if i not in depths)
        raise CheckpointError(
            f"{path}: the layers go up to {depth - 1}, but layer {gap} is missing",
            hint="save the whole state dict of the model, not a part of it",
        )
    mixer = "layers.0.mixer."
    two_inner, d_model = shape(_ANCHOR, 2)
    inner, _, d_conv = shape(mixer + "conv1d.weight", 3)
    _, d_state = shape(mixer + "A_log", 2)
    _, rank = shape(mixer + "dt_proj.weight", 2)
    _, in_chans, patch_h, patch_w = shape("patch_embed.proj.weight", 4)
    if two_inner != 2 * inner or inner % d_model:
        raise CheckpointError(
            f"{path}: tensor {_ANCHOR} has shape {(two_inner, d_model)}, which does not fit {inner} inner channels",
            hint="a Vision Mamba has twice its inner channels there, and these are a multiple of d_model",
        )
    if patch_h != patch_w:
        raise CheckpointError(
            f"{path}: patches of {patch_h}x{patch_w} pixels are not square", hint="patches are square"
        )
    facts: dict[str, Any] = {
        "d_model": d_model,
        "depth": depth,
        "patch_size": patch_h,
        "in_chans": in_chans,
        "num_classes": shape("head.weight", 2)[0] if "head.weight" in state else 0,
        "d_state": d_state,
        "d_conv": d_conv,
        "expand": inner // d_model,
        "dt_rank": 0 if rank == math.ceil(d_model / 16) else rank,
        "bimamba": "none" if mixer + "A_b_log" not in state else "v2" if mixer + "conv1d_b.weight" in state else "v1",
        "abs_pos_embed": "pos_embed" in state,
        "rope": "rope.freqs_cos" in state or "rope.freqs_sin" in state,
        "rms_norm": "layers.0.norm.bias" not in state,
        "layer_scale": mixer + "gamma" in state,
        "proj_bias": mixer + "in_proj.bias" in state or mixer + "out_proj.bias" in state,
    }
    if "cls_token_head" in state or "cls_token_tail" in state:
        facts["cls_position"] = "double"
    elif "cls_token" not in state:
        facts["cls_position"] = "none"
    tokens = None
    if facts["abs_pos_embed"]:
        tokens = shape("pos_embed", 3)[1]
        if tokens <= _num_cls(facts):
            raise CheckpointError(
                f"{path}: tensor pos_embed has {tokens} rows, too few for the class tokens and one patch",
                hint="check that this is the checkpoint of a Vision Mamba",
            )
    # Where a setting cannot matter it takes the value that means least.
    if facts["bimamba"] != "v2":
        facts["divide_out"] = True
    if facts.get("cls_position") != "none":
        facts["pool"] = "mean"
    if not facts["rope"]:
        facts["rope_residual"] = False
    return facts, tokens


def _not_vim(path: Path, state: Mapping[str, Tensor]) -> CheckpointError:
    hint = f"vimdeploy takes Vision Mamba (Vim) checkpoints, whose tensors are called {_ANCHOR} and so on"
    looks = (
        (r"(.*\.)?blocks\.\d+\.attn\..*", "it looks like a ViT or DeiT (blocks.*.attn)"),
        (
            r"(.*\.)?layers\.\d+\.blocks\.\d+\.(attn|op|self_attention)\..*",
            "it looks like a Swin or VMamba (layers.*.blocks)",
        ),
        (r"(.*\.)?layer\d\.\d+\.conv\d\..*", "it looks like a ResNet (layer1.0.conv1)"),
        (r"(.*\.)?layers\.\d+\.mixer\..*", "its mixers stand under a prefix of their own"),
    )
    for pattern, words in looks:
        if any(re.fullmatch(pattern, name) for name in state):
            return CheckpointError(f"{path} is not a Vision Mamba: {words}", hint=hint)
    some = ", ".join(printable(name) for name in list(state)[:3])
    return CheckpointError(
        f"{path} is not a Vision Mamba: no layers.*.mixer among its tensors (they are: {some})", hint=hint
    )


def _claims(checkpoint: Checkpoint, variant: str | None) -> tuple[list[_Claim], list[str]]:
    """What the file and the user say about the model, most certain first, and notes on words that say nothing."""
    claims, notes = [], []
    config = _json_of(checkpoint.path, checkpoint.metadata, "config")
    if config is not None:
        claims.append(_Claim("vimdeploy.config in the file's metadata", _checked(checkpoint.path, config)))
    name = checkpoint.args.get("model")
    if isinstance(name, str):
        fields = fields_of_name(name)
        source = f"args.model = {printable(name)}"
        if fields is None:
            notes.append(f"{source}: not an upstream name, says nothing")
        else:
            known = " (registered name)" if name in REGISTERED else ""
            claims.append(_Claim(source + known, fields, fallback={"img_size": fields.pop("img_size")}))
    size = _size_of(checkpoint.args.get("input_size"))
    if size is not None:
        # Upstream builds the model with img_size=args.input_size, whatever its name says.
        claims.append(_Claim(f"args.input_size = {_size(size)}", {"img_size": size}))
    if variant is not None:
        parse_variant(variant)  # refuses the whole before the parts are read
        parts = variant.split(",")
        named = fields_of_name(canonical_name(parts[0].strip())) if "=" not in parts[0] else None
        settings = (
            parse_variant(",".join(parts[1:] if named is not None else parts)) if named is None or parts[1:] else {}
        )
        fields = {**(named or {}), **settings}
        fallback = {"img_size": fields.pop("img_size")} if "img_size" not in settings and "img_size" in fields else {}
        claims.append(_Claim(f"--variant {variant}", fields, fallback))
    return claims, notes


def _checked(path: Path, values: Any) -> dict[str, Any]:
    """A configuration out of a file's metadata, every type checked."""
    defaults = {f.name: f.default for f in dataclasses.fields(VimConfig)}
    try:
        good = all(
            name == "img_size" or isinstance(value, type(defaults[name]) if name != "d_model" else int)
            for name, value in values.items()
        )
        size = _size_of(values["img_size"])
        if not good or size is None or not 0 <= values["norm_eps"] < 1:
            raise ValueError
        VimConfig.from_dict(values)
    except (KeyError, TypeError, ValueError, AttributeError, VariantError):
        raise CheckpointError(
            f"{path}: its metadata {_META}config is damaged", hint="make it again with `vimdeploy slim`"
        ) from None
    return {**values, "img_size": size}


def _size_of(value: Any) -> tuple[int, int] | None:
    """224 or [384, 512] as (height, width); None for anything else."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    good = len(pair) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 0 < side < 2**16 for side in pair
    )
    return (pair[0], pair[1]) if good else None


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _num_cls(values: Mapping[str, Any]) -> int:
    return {"none": 0, "double": 2}.get(values.get("cls_position", ""), 1)


def _inert(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a setting decides nothing in this network, so that sources need not agree on it."""
    return (
        (name == "divide_out" and facts["bimamba"] != "v2")
        or (name == "pool" and facts.get("cls_position") != "none")
        or (name == "rope_residual" and not facts["rope"])
    )


_OPEN = {
    "stride": "the stride",
    "img_size": "the image size",
    "cls_position": "where the class token stands",
    "divide_out": "whether the directions' sum is halved",
    "pool": "how tokens are pooled",
    "rope_residual": "whether RoPE turns the residual",
}
_SHORT = {"divide_out": "divide", "cls_position": "cls"}


def _questions(facts: Mapping[str, Any]) -> list[str]:
    """The fields tensors cannot answer for this network."""
    return [name for name in _OPEN if name not in facts]


def _strides_of(patch: int, img_size: tuple[int, int], patches: int | None) -> list[int]:
    """Strides (divisors of the patch, as people take them) with which `img_size` gives `patches`."""
    if patches is None or min(img_size) < patch:
        return []
    divisors = [s for s in range(1, patch + 1) if patch % s == 0]
    return [s for s in divisors if math.prod((side - patch) // s + 1 for side in img_size) == patches]


def _choices(values: Mapping[str, Any], tokens: int | None) -> tuple[str, ...]:
    """Values of --variant that fit all that is known: names first, then settings, the likelier ones first."""
    result = []
    lineage = [
        f"vim_{size}_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual{cls}"
        for size, cls in itertools.product(("tiny", "small", "base"), ("_with_cls_token", ""))
    ]
    for name in [*(alias for alias in ALIASES if "-" not in alias), *lineage]:
        config = registered_config(name)
        ignored = ("num_classes", "bidirectional", "norm_eps", "img_size" if tokens is None else "")
        if all(getattr(config, k) == v for k, v in values.items() if k not in ignored) and tokens in (
            None,
            config.seq_len,
        ):
            result.append(name)

    # The lineage with RoPE had its class token in front and did not halve (vim-spec.md 2.3).
    likely = {
        "cls_position": ("head", "middle", "tail") if values["rope"] else ("middle", "head", "tail"),
        "divide_out": ("no", "yes") if values["rope"] else ("yes", "no"),
        "pool": ("mean", "last", "max", "all"),
        "rope_residual": ("yes", "no"),
    }
    settings = [(_SHORT.get(name, name), options) for name, options in likely.items() if name not in values]
    geometries = _geometries(values, tokens) or [{}]
    first = {name: options[0] for name, options in settings}
    combinations = [{**geometry, **first} for geometry in geometries]
    for name, options in settings:  # then each setting's other values, one at a time
        combinations += [{**geometries[0], **first, name: option} for option in options[1:]]
    # Every combination but the likeliest changes one thing of it, so the list stays short.
    result += [",".join(f"{k}={v}" for k, v in combination.items()) for combination in combinations if combination]
    return tuple(result)


def _geometries(values: Mapping[str, Any], tokens: int | None) -> list[dict[str, str]]:
    """Pairs of stride and image size that give the position table its length, as far as they are open."""
    patch = values["patch_size"]
    wanted = [name for name in ("stride", "img_size") if name not in values]
    if not wanted:
        return []
    strides = [values["stride"]] if "stride" in values else [patch // k for k in (2, 1, 4, 8) if patch % k == 0]
    if values["rope"]:
        strides = [s for s in strides if s == patch] or strides
    if tokens is None:
        found = [(s, values.get("img_size", (14 * patch, 14 * patch))) for s in strides]
    elif "img_size" in values:
        found = [(s, values["img_size"]) for s in _strides_of(patch, values["img_size"], tokens - _num_cls(values))]
    else:
        patches = tokens - _num_cls(values)
        grids = [(h, patches // h) for h in range(1, math.isqrt(patches) + 1) if patches % h == 0]
        grids = [grid for grid in grids if grid[0] == grid[1]] or [g for g in grids if g[1] <= 3 * g[0]] or grids
        found = [
            (s, (patch + (rows - 1) * s, patch + (columns - 1) * s))
            for s in strides
            for rows, columns in reversed(grids)
        ]
        found.sort(key=lambda pair: pair[1] != (224, 224))
    return [
        {
            **({"stride": str(s)} if "stride" in wanted else {}),
            **({"img_size": str(size[0]) if size[0] == size[1] else _size(size)} if "img_size" in wanted else {}),
        }
        for s, size in found
    ]


def _offer(checkpoint: Checkpoint, facts: Mapping[str, Any], tokens: int | None, *sources: str) -> str:
    """The next step after two sources disagreed: a --variant that fits, where it was --variant that did not."""
    if not any(source.startswith("--variant") for source in sources):
        return "the file contradicts itself: was it renamed, or pieced together from two models?"
    if any(fields_of_name(str(said)) for said in [checkpoint.args.get("model")]) or checkpoint.metadata.get(
        _META + "config"
    ):
        return "leave --variant out: the file says itself what it is"
    return _one_of(_choices(facts, tokens))


def _one_of(choices: tuple[str, ...]) -> str:
    shown = [f"--variant {choice}" for choice in choices[:5]]
    return "one of these: " + "   ".join(shown) if len(shown) > 1 else "".join(shown)


def _contradiction(
    claimed_by: str,
    name: str,
    claimed: Any,
    known: Any,
    known_by: str,
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
    tokens: int | None,
) -> VariantError:
    spelled = {True: "yes", False: "no"}
    words = [
        _size(v) if isinstance(v, tuple) else spelled[v] if isinstance(v, bool) else str(v) for v in (claimed, known)
    ]
    verb = "have" if known_by == _TENSORS else "says"
    return VariantError(
        f"{checkpoint.path}: {claimed_by} says {name} {words[0]}, but {known_by} {verb} {words[1]}",
        hint=_offer(checkpoint, facts, tokens, claimed_by, known_by),
    )


@functools.lru_cache(maxsize=8)
def _expected(config: VimConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network's tensors, from the network itself, without allocating them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Vim(config).state_dict().items()}


def _compare(path: Path, config: VimConfig, state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tensors too many and too few. Raises CheckpointError for a shape or dtype that does not fit."""
    expected = _expected(config)
    for name, wanted in expected.items():
        if name not in state:
            continue
        has = tuple(state[name].shape)
        if has != wanted:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {has}, the network wants {wanted}",
                hint="the other tensors fit a Vision Mamba: was this one resized or saved from another model?",
            )
        if state[name].dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: tensor {name} is {str(state[name].dtype).removeprefix('torch.')}, not a floating-point type",
                hint="vimdeploy quantizes by itself: give it the fp32 weights",
            )
    return tuple(name for name in state if name not in expected), tuple(name for name in expected if name not in state)


def _check_rope(path: Path, config: VimConfig, state: Mapping[str, Tensor]) -> None:
    if not config.rope:
        return
    for name, table in RotaryEmbedding(config).state_dict().items():
        has = state.get(f"rope.{name}")
        if has is None:
            continue
        difference = (has.float() - table).abs().max().item()
        # cos and sin are at most 1; a half-precision file rounds them by 2^-9 (bf16).
        if not difference <= (1e-4 if has.dtype in (torch.float32, torch.float64) else 4e-3):
            raise CheckpointError(
                f"{path}: tensor rope.{name} is not the table of a {_size(config.rope_grid)} grid "
                f"(off by {difference:.3g})",
                hint="check the image size: --variant img_size=HxW",
            )


def _name_of(config: VimConfig, checkpoint: Checkpoint) -> str:
    """The registered name of this network at any image size and class count, else the name it is said to have."""
    for name in REGISTERED:
        if registered_config(name).replace(img_size=config.img_size, num_classes=config.num_classes) == config:
            return name
    for said in (checkpoint.args.get("model"), checkpoint.metadata.get(_META + "variant")):
        if isinstance(said, str) and fields_of_name(said) is not None:
            return said
    return "custom"


# ---------------------------------------------------------------------------------------------------------------------
# Loading and slimming


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    weights: str = "model",
    variant: str | None = None,
    img_size: tuple[int, int] | int | None = None,
    pos_embed_mode: str = "layout",
) -> tuple[Vim, Recognition]:
    """The network with its weights, strictly loaded, in fp32 on the CPU, in eval mode; and how it was recognised.

    `img_size` (pixels; a pair is height, width) builds it for other images: the position table is resized
    (`resize_pos_embed`), RoPE tables are recomputed, and Recognition.config is the resized one. Raises as
    `read_checkpoint` and `recognise` do; CheckpointError for missing, unexpected or non-finite tensors; VariantError
    for an image size smaller than a patch or off the stride.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    recognition = recognise(checkpoint, variant, weights)
    state = _strict(checkpoint, recognition, weights)
    old, how = recognition.config, list(recognition.how)
    dtypes = checkpoint.dtypes(weights)
    if dtypes != ("float32",):
        how.append(f"weights stored as {', '.join(dtypes)}, loaded as float32")
    # A copy: tensors mapped from disk would change, or vanish, with the file.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    config = old
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        config = old.replace(img_size=size).validate()
        _check_stride(config)
    if config.grid != old.grid and config.abs_pos_embed:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old, config, pos_embed_mode)
        how.append(f"pos_embed resized from {_size(old.grid)} to {_size(config.grid)} patches ({pos_embed_mode} mode)")
    if config.img_size != old.img_size and config.rope:
        state |= {f"rope.{name}": table for name, table in RotaryEmbedding(config).state_dict().items()}
        how.append("RoPE tables recomputed")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = Vim(config)
    model.load_state_dict(state, strict=True, assign=True)
    resized_from = old.img_size if config.img_size != old.img_size else None
    recognition = dataclasses.replace(recognition, config=config, how=tuple(how), resized_from=resized_from)
    return model.eval(), recognition


def _check_stride(config: VimConfig) -> None:
    for side in config.img_size:
        over = (side - config.patch_size) % config.stride
        if over:
            raise VariantError(
                f"image size {_size(config.img_size)} does not fit patches of {config.patch_size} px every "
                f"{config.stride} px: {over} px of {side} would be left out",
                hint=f"take {side - over} or {side - over + config.stride} instead of {side}",
            )


def _strict(checkpoint: Checkpoint, recognition: Recognition, weights: str) -> dict[str, Tensor]:
    """The state dict, complete and finite. Raises CheckpointError naming what is not."""
    state = checkpoint.state(weights)
    for names, words in ((recognition.missing, "lacks"), (recognition.unknown, "has, and the network has not,")):
        if names:
            shown = ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
            hint = "save the whole state dict of the model, not a part of it"
            if words != "lacks":
                dense = any(name.split(".")[0].endswith("_head") or name.startswith("fpn") for name in names)
                hint = "it looks like a segmentation or detection model; " if dense else ""
                hint += "`vimdeploy inspect` lists them; save a checkpoint without them"
            raise CheckpointError(f"{checkpoint.path} {words} {len(names)} tensors: {shown}", hint=hint)
    bad = non_finite(state)
    if bad:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {bad[0]} holds NaN or Inf"
            + (f", and {len(bad) - 1} others" if bad[1:] else ""),
            hint="the training diverged: take an earlier checkpoint"
            + (", or --weights ema" if weights == "model" and "ema" in checkpoint.weights else ""),
        )
    return state


def non_finite(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the floating-point tensors that hold NaN or Inf, or would in fp32."""
    # The extremes carry NaN along, and finding them is ten times as fast as asking each element.
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    extremes = {name: torch.stack(torch.aminmax(tensor.float())) for name, tensor in floats.items()}
    return tuple(name for name, pair in extremes.items() if not bool(torch.isfinite(pair).all()))


def slim(checkpoint: Checkpoint | Path | str, out: Path, weights: str = "model", variant: str | None = None) -> Slimmed:
    """Write one set of weights, in its dtype, to the safetensors file `out`, with what was recognised in its metadata.

    Nothing is left at `out` when it fails. Raises as `load_model` does, UsageError when `out` is the checkpoint
    itself or a folder.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint=f"-o {out / (checkpoint.path.stem + '.safetensors')}")
    if out.exists() and out.samefile(checkpoint.path):
        raise UsageError(f"{out} is the checkpoint itself; it is not overwritten", hint="name another file with -o")
    recognition = recognise(checkpoint, variant, weights)
    state = _strict(checkpoint, recognition, weights)
    metadata = {
        "format": "pt",
        _META + "config": json.dumps(recognition.config.to_dict()),
        _META + "variant": recognition.variant,
        _META + "weights": checkpoint.metadata.get(_META + "weights", weights),
        _META + "args": json.dumps(_portable(checkpoint.args)),
        _META + "source_sha256": checkpoint.metadata.get(_META + "source_sha256", checkpoint.sha256),
        **({} if checkpoint.epoch is None else {_META + "epoch": str(checkpoint.epoch)}),
    }
    with replacing_file(out) as scratch, _writing(out):
        from safetensors.torch import save_file

        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, str(scratch), metadata)
    return Slimmed(out, checkpoint.path.stat().st_size, out.stat().st_size, recognition)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """safetensors wraps a full disk in an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise VimDeployError(f"{out}: {error}", hint="free some space, or choose another folder with -o") from error


def _portable(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments worth keeping: plain values, and no paths of the machine that trained."""
    plain = (str, int, float, bool, type(None))

    def keep(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(keep(item) for item in value)
        return isinstance(value, plain) and not (isinstance(value, str) and os.path.isabs(value))

    return {name: value for name, value in args.items() if keep(value)}
