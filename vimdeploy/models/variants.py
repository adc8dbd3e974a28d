"""What a Vision Mamba is made of (`VimConfig`), and the names its models go by.

Upstream names follow one grammar, so one pattern reads the registered models, the older spellings and the lineage of
January 2024 alike (vim-spec.md sections 1.1 and 1.2). A name that does not match as a whole says nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vimdeploy.errors import UsageError, VariantError

CLS_POSITIONS = ("none", "head", "middle", "tail", "double")
POOLINGS = ("last", "mean", "max", "all")
BIMAMBA = ("none", "v1", "v2")


@dataclass(frozen=True)
class VimConfig:
    """Everything that decides the shape and the mathematics of a Vim, in the field's names.

    ``img_size`` is (height, width) in pixels. ``num_classes`` 0 means no head. ``dt_rank`` 0 means ceil(d_model / 16).
    ``pool`` counts only without a class token. Raises VariantError from `validate` on what cannot be built.
    """

    d_model: int
    depth: int = 24
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    stride: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    bimamba: str = "v2"  # none | v1: second A only | v2: own conv, projections, A and D for each direction
    bidirectional: bool = False  # layers in pairs, the second of each pair run backwards
    divide_out: bool = True  # halve the sum of the two directions (v2 only)
    cls_position: str = "middle"
    pool: str = "mean"
    abs_pos_embed: bool = True
    rope: bool = False
    rope_residual: bool = False
    rms_norm: bool = True
    norm_eps: float = 1e-5
    layer_scale: bool = False
    proj_bias: bool = False

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across: (size - patch) // stride + 1, so 27 and not 28 at 224 px with stride 8."""
        height, width = self.img_size
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_cls(self) -> int:
        return {"none": 0, "double": 2}.get(self.cls_position, 1)

    @property
    def seq_len(self) -> int:
        return self.num_patches + self.num_cls

    @property
    def cls_index(self) -> tuple[int, ...]:
        """Where the class tokens stand in the sequence, after insertion."""
        m = self.num_patches
        return {"none": (), "head": (0,), "middle": (m // 2,), "tail": (m,), "double": (0, m + 1)}[self.cls_position]

    @property
    def blocks_run(self) -> int:
        """Layers that take part: pairs drop the last layer of an odd depth, as upstream does."""
        return self.depth // 2 * 2 if self.bidirectional else self.depth

    def validate(self) -> VimConfig:
        """Return self, or raise VariantError naming the first thing that cannot be built."""
        for field, allowed in (("cls_position", CLS_POSITIONS), ("pool", POOLINGS), ("bimamba", BIMAMBA)):
            if getattr(self, field) not in allowed:
                raise VariantError(f"{field} {getattr(self, field)!r} is not one of {', '.join(allowed)}")
        for field in ("d_model", "depth", "patch_size", "stride", "in_chans", "d_state", "d_conv", "expand"):
            if getattr(self, field) < 1:
                raise VariantError(f"{field} must be at least 1, not {getattr(self, field)}")
        height, width = self.img_size
        if min(height, width) < self.patch_size:
            raise VariantError(
                f"image size {height}x{width} is smaller than a patch ({self.patch_size} px)",
                hint=f"take at least {self.patch_size} px on each side",
            )
        if self.rope:
            if self.d_model % 4:
                raise VariantError(
                    f"RoPE rotates pairs in two halves of d_model: {self.d_model} is not a multiple of 4"
                )
            # The table has one row a patch; an odd sequence keeps its first token unrotated (vim-spec.md 3.4).
            if self.seq_len - self.seq_len % 2 != self.rope_grid[0] * self.rope_grid[1]:
                raise VariantError(
                    f"RoPE cannot serve {self.seq_len} tokens: its table has "
                    f"{self.rope_grid[0] * self.rope_grid[1]} rows, and an odd sequence leaves token 0 out",
                    hint="RoPE models take a stride equal to the patch, and an even number of patches or one cls token",
                )
        return self

    @property
    def rope_grid(self) -> tuple[int, int]:
        """Rows and columns of the RoPE table; upstream divides by the patch and ignores the stride."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    def replace(self, **changes: Any) -> VimConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "img_size": list(self.img_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VimConfig:
        """The inverse of `to_dict`. Raises VariantError on a field this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise VariantError(f"unknown model settings: {', '.join(unknown)}")
        fields = dict(values)
        if "img_size" in fields:
            fields["img_size"] = (int(fields["img_size"][0]), int(fields["img_size"][1]))
        return cls(**fields)


SIZES = {
    "tiny": {"d_model": 192, "depth": 24},
    "small": {"d_model": 384, "depth": 24},
    "base": {"d_model": 768, "depth": 24},
}

_TAIL = "224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
REGISTERED = (
    f"vim_tiny_patch16_{_TAIL}",
    f"vim_tiny_patch16_stride8_{_TAIL}",
    f"vim_small_patch16_{_TAIL}",
    f"vim_small_patch16_stride8_{_TAIL}",
    # Upstream spells the base model's suffix differently.
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
)
ALIASES = dict(zip(("tiny", "tiny+", "small", "small+", "base"), REGISTERED, strict=True))
ALIASES |= {f"vim-{alias}": name for alias, name in ALIASES.items()}
ALIASES |= {
    alias.replace(long, short): name
    for alias, name in ALIASES.items()
    for long, short in (("tiny", "ti"), ("small", "s"), ("base", "b"))
    if alias.startswith("vim-") and long in alias
}

# The whole name must match: a name that only looks similar decides nothing.
_NAME = re.compile(
    r"vim_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)(?:_stride(?P<stride>\d+))?_(?P<img>\d+)"
    r"_bimamba(?P<bimamba>v1|v2)_final_pool_(?P<pool>mean|max|none|all)_abs_pos_embed"
    r"(?P<rope>_rope(?P<residual>_also_residual)?)?"
    r"(?:_with_(?P<cls>cls_token|midclstok|middle_cls_token))?(?P<div>_div2)?"
)


def fields_of_name(name: str) -> dict[str, Any] | None:
    """What an upstream model name says, as VimConfig fields; None when it is not such a name.

    d_model and depth are among them only for the sizes upstream registers (tiny, small, base).
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    patch, img = int(match["patch"]), int(match["img"])
    cls = match["cls"]
    return {
        **SIZES.get(match["size"], {}),
        "patch_size": patch,
        # In January 2024 the stride followed the patch size; later names spell a different stride out.
        "stride": int(match["stride"]) if match["stride"] else patch,
        "img_size": (img, img),
        "bimamba": match["bimamba"],
        "pool": {"none": "last"}.get(match["pool"], match["pool"]),
        "rope": match["rope"] is not None,
        "rope_residual": match["residual"] is not None,
        "cls_position": "none" if cls is None else "head" if cls == "cls_token" else "middle",
        "divide_out": match["div"] is not None,
    }


def canonical_name(name: str) -> str:
    """The upstream name behind a short alias; any other name as it is."""
    return ALIASES.get(name.lower(), name)


def registered_config(name: str) -> VimConfig:
    """The configuration of a registered model, an older spelling or an alias. Raises VariantError when unknown."""
    fields = fields_of_name(canonical_name(name))
    if fields is None or "d_model" not in fields:
        raise VariantError(
            f"no Vision Mamba is called {name!r}",
            hint="names: " + ", ".join(alias for alias in ALIASES if "-" not in alias) + ", or an upstream model name",
        )
    return VimConfig(**fields).validate()


_SPELLINGS = {"cls": "cls_position", "divide": "divide_out", "img": "img_size", "classes": "num_classes"}


def parse_variant(text: str) -> dict[str, Any]:
    """Read ``--variant``: a name or alias, settings such as ``stride=8,cls=middle``, or a name followed by settings.

    Returns VimConfig fields. Raises VariantError for an unknown name, UsageError for a setting that cannot be read.
    """
    fields: dict[str, Any] = {}
    types = {field.name: field.type for field in dataclasses.fields(VimConfig)}
    for position, part in enumerate(part.strip() for part in text.split(",")):
        if "=" not in part:
            if position:
                raise UsageError(f"--variant: {part!r} is not a setting", hint="write settings as name=value")
            named = fields_of_name(canonical_name(part))
            if named is None:
                registered_config(part)  # raises, and lists the names
            fields |= named or {}
            continue
        key, _, value = part.partition("=")
        key = _SPELLINGS.get(key.strip(), key.strip())
        if key not in types:
            raise UsageError(f"--variant: no setting is called {key!r}", hint="settings: " + ", ".join(sorted(types)))
        fields[key] = _read_setting(key, str(types[key]), value.strip())
    return fields


def settings_of(config: VimConfig) -> str:
    """The `parse_variant` text that settles what tensors cannot tell, for exactly this configuration."""
    names = ("stride", "cls_position", "divide_out", "pool", "rope_residual", "bidirectional")
    values = {name: getattr(config, name) for name in names}
    words = {name: ("yes" if v else "no") if isinstance(v, bool) else str(v) for name, v in values.items()}
    words["img_size"] = f"{config.img_size[0]}x{config.img_size[1]}"
    return ",".join(f"{name}={value}" for name, value in words.items())


def parse_size(text: str) -> tuple[int, int]:
    """'224' or '384x512' (height x width) as (height, width) pixels. Raises UsageError."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if match is None or int(match[1]) == 0 or match[2] == "0":
        raise UsageError(f"{text!r} is not an image size", hint="write 224, or HEIGHTxWIDTH such as 384x512")
    return int(match[1]), int(match[2] or match[1])


def _read_setting(key: str, kind: str, value: str) -> Any:
    if key == "img_size":
        return parse_size(value)
    if kind == "bool":
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if value.lower() not in words:
            raise UsageError(f"--variant: {key} is yes or no, not {value!r}")
        return words[value.lower()]
    try:
        return {"int": int, "float": float}.get(kind, str)(value)
    except ValueError:
        raise UsageError(f"--variant: {key} takes a number, not {value!r}") from None
