"""Which Vision Mamba a checkpoint holds.

What tensors tell is taken from the tensors (vim-spec.md 2.2, 2.3), the rest from the file's own words or the user's;
two sources that disagree are an error, never a choice, and what nobody says is asked for, not guessed.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimdeploy.errors import CheckpointError, VariantError
from vimdeploy.models.checkpoints import ANCHOR, FLOATS, META, Checkpoint, json_of, printable
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


class AmbiguousVariant(VariantError):
    """The tensors fit more than one network. `known`: what is certain; `choices`: values of --variant that fit."""

    def __init__(self, message: str, *, known: dict[str, Any], choices: tuple[str, ...]) -> None:
        super().__init__(message, hint=_one_of(choices))
        self.known = known
        self.choices = choices


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
            how.append(f"stride {strides[0]}: the one that gives {patches} patches at {size_text(values['img_size'])}")
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
            f"{size_text(config.img_size)}), but the tensors have {tokens}",
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
    two_inner, d_model = shape(ANCHOR, 2)
    inner, _, d_conv = shape(mixer + "conv1d.weight", 3)
    _, d_state = shape(mixer + "A_log", 2)
    _, rank = shape(mixer + "dt_proj.weight", 2)
    _, in_chans, patch_h, patch_w = shape("patch_embed.proj.weight", 4)
    if two_inner != 2 * inner or inner % d_model:
        raise CheckpointError(
            f"{path}: tensor {ANCHOR} has shape {(two_inner, d_model)}, which does not fit {inner} inner channels",
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
    hint = f"vimdeploy takes Vision Mamba (Vim) checkpoints, whose tensors are called {ANCHOR} and so on"
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
    config = json_of(checkpoint.path, checkpoint.metadata, "config")
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
        claims.append(_Claim(f"args.input_size = {size_text(size)}", {"img_size": size}))
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
            f"{path}: its metadata {META}config is damaged", hint="make it again with `vimdeploy slim`"
        ) from None
    return {**values, "img_size": size}


def _size_of(value: Any) -> tuple[int, int] | None:
    """224 or [384, 512] as (height, width); None for anything else."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    good = len(pair) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 0 < side < 2**16 for side in pair
    )
    return (pair[0], pair[1]) if good else None


def size_text(size: tuple[int, int]) -> str:
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
            **({"img_size": str(size[0]) if size[0] == size[1] else size_text(size)} if "img_size" in wanted else {}),
        }
        for s, size in found
    ]


def _offer(checkpoint: Checkpoint, facts: Mapping[str, Any], tokens: int | None, *sources: str) -> str:
    """The next step after two sources disagreed: a --variant that fits, where it was --variant that did not."""
    if not any(source.startswith("--variant") for source in sources):
        return "the file contradicts itself: was it renamed, or pieced together from two models?"
    if any(fields_of_name(str(said)) for said in [checkpoint.args.get("model")]) or checkpoint.metadata.get(
        META + "config"
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
        size_text(v) if isinstance(v, tuple) else spelled[v] if isinstance(v, bool) else str(v)
        for v in (claimed, known)
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
        if state[name].dtype not in FLOATS:
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
                f"{path}: tensor rope.{name} is not the table of a {size_text(config.rope_grid)} grid "
                f"(off by {difference:.3g})",
                hint="check the image size: --variant img_size=HxW",
            )


def _name_of(config: VimConfig, checkpoint: Checkpoint) -> str:
    """The registered name of this network at any image size and class count, else the name it is said to have."""
    for name in REGISTERED:
        if registered_config(name).replace(img_size=config.img_size, num_classes=config.num_classes) == config:
            return name
    for said in (checkpoint.args.get("model"), checkpoint.metadata.get(META + "variant")):
        if isinstance(said, str) and fields_of_name(said) is not None:
            return said
    return "custom"
