"""Names, configurations and what they promise: parameter counts, tensor names and shapes (vim-spec.md 1 and 2)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from official import random_model

from vimdeploy.errors import UsageError, VariantError
from vimdeploy.models.variants import (
    ALIASES,
    REGISTERED,
    VimConfig,
    canonical_name,
    fields_of_name,
    parse_size,
    parse_variant,
    registered_config,
)
from vimdeploy.models.vim import Vim

# alias -> registered name, channels, stride, grid side, tokens, class index, parameters (vim-spec.md 1.1, 1.3)
PUBLISHED = {
    "tiny": (REGISTERED[0], 192, 16, 14, 197, 98, 7_148_008),
    "tiny+": (REGISTERED[1], 192, 8, 27, 730, 364, 7_250_344),
    "small": (REGISTERED[2], 384, 16, 14, 197, 98, 25_796_584),
    "small+": (REGISTERED[3], 384, 8, 27, 730, 364, 26_001_256),
    "base": (REGISTERED[4], 768, 16, 14, 197, 98, 97_598_440),
}
TAIL = "224_bimambav2_final_pool_mean_abs_pos_embed"


def tensors_of(config: VimConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Vim(config).state_dict().items()}


@pytest.mark.parametrize("alias", PUBLISHED)
def test_published_models(alias: str) -> None:
    name, channels, stride, side, tokens, cls, parameters = PUBLISHED[alias]
    config = registered_config(alias)
    assert canonical_name(alias) == name and registered_config(name) == config
    assert (config.d_model, config.depth, config.stride, config.grid) == (channels, 24, stride, (side, side))
    assert (config.seq_len, config.cls_index, config.rank) == (tokens, (cls,), math.ceil(channels / 16))
    assert (config.bimamba, config.divide_out, config.rms_norm, config.rope) == ("v2", True, True, False)
    shapes = tensors_of(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert len(shapes) == 415


@pytest.mark.parametrize("alias", ["tiny", "small", "base"])
def test_tensor_names_and_shapes(alias: str) -> None:
    """The whole table of vim-spec.md 2.2, written out."""
    c = PUBLISHED[alias][1]
    e, r = 2 * c, c // 16
    expected = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, 197, c),
        "patch_embed.proj.weight": (c, 3, 16, 16),
        "patch_embed.proj.bias": (c,),
        "norm_f.weight": (c,),
        "head.weight": (1000, c),
        "head.bias": (1000,),
    }
    for i in range(24):
        expected[f"layers.{i}.norm.weight"] = (c,)
        mixer = f"layers.{i}.mixer."
        expected |= {mixer + "in_proj.weight": (2 * e, c), mixer + "out_proj.weight": (c, e)}
        for suffix, a_log in (("", "A_log"), ("_b", "A_b_log")):
            expected |= {
                f"{mixer}conv1d{suffix}.weight": (e, 1, 4),
                f"{mixer}conv1d{suffix}.bias": (e,),
                f"{mixer}x_proj{suffix}.weight": (r + 32, e),
                f"{mixer}dt_proj{suffix}.weight": (e, r),
                f"{mixer}dt_proj{suffix}.bias": (e,),
                f"{mixer}{a_log}": (e, 16),
                f"{mixer}D{suffix}": (e,),
            }
    assert tensors_of(registered_config(alias)) == expected


def test_A_log_starts_as_the_logarithms_of_1_to_16() -> None:
    model = Vim(VimConfig(d_model=16, depth=1, img_size=(32, 32)))
    for name in ("A_log", "A_b_log"):
        table = model.get_parameter(f"layers.0.mixer.{name}")
        torch.testing.assert_close(table, torch.arange(1.0, 17).log().expand(32, 16))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ti", None),
        ("vim-ti", "tiny"),
        ("vim-ti+", "tiny+"),
        ("vim-s", "small"),
        ("vim-s+", "small+"),
        ("vim-b", "base"),
    ]
    + [(f"VIM-{alias.upper()}", alias) for alias in PUBLISHED],
)
def test_short_aliases(alias: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(VariantError, match="no Vision Mamba is called 'ti'"):
            registered_config(alias)
    else:
        assert registered_config(alias) == registered_config(name)


def test_no_alias_for_a_model_nobody_published() -> None:
    assert "base+" not in ALIASES
    with pytest.raises(VariantError, match="no Vision Mamba is called 'base\\+'"):
        registered_config("base+")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_both_spellings_of_the_middle_class_token(size: str) -> None:
    short = registered_config(f"vim_{size}_patch16_{TAIL}_with_midclstok_div2")
    assert (
        short == registered_config(f"vim_{size}_patch16_{TAIL}_with_middle_cls_token_div2") == registered_config(size)
    )


@pytest.mark.parametrize(
    ("name", "cls", "patch", "tokens"),
    [
        (f"vim_tiny_patch16_{TAIL}_rope_also_residual", "none", 16, 196),
        (f"vim_small_patch16_{TAIL}_rope_also_residual", "none", 16, 196),
        (f"vim_base_patch16_{TAIL}_rope_also_residual", "none", 16, 196),
        (f"vim_tiny_patch8_{TAIL}_rope_also_residual", "none", 8, 784),
        (f"vim_tiny_patch16_{TAIL}_rope_also_residual_with_cls_token", "head", 16, 197),
        (f"vim_tiny_patch8_{TAIL}_rope_also_residual_with_cls_token", "head", 8, 785),
    ],
)
def test_the_lineage_of_january_2024(name: str, cls: str, patch: int, tokens: int) -> None:
    config = registered_config(name)
    assert (config.rope, config.rope_residual, config.divide_out, config.bimamba) == (True, True, False, "v2")
    assert (config.cls_position, config.patch_size, config.stride, config.seq_len) == (cls, patch, patch, tokens)
    assert tensors_of(config)["rope.freqs_cos"] == (config.num_patches, config.d_model)


@pytest.mark.parametrize(
    "name", ["vim_tiny_patch16_224", "deit_tiny_patch16_224", REGISTERED[0] + "_extra", "x" + REGISTERED[0], ""]
)
def test_a_name_that_only_looks_similar_says_nothing(name: str) -> None:
    assert fields_of_name(name) is None


ABLATIONS = [
    *(({"bimamba": b, "bidirectional": pairs}) for b in ("none", "v1", "v2") for pairs in (False, True)),
    {"bimamba": "v2", "divide_out": False},
    *({"cls_position": "none", "pool": pool} for pool in ("last", "mean", "max")),
    *({"cls_position": position} for position in ("head", "middle", "tail", "double")),
    {"rope": True, "cls_position": "head"},
    {"rope": True, "rope_residual": True, "cls_position": "none"},
    {"abs_pos_embed": False},
    {"rms_norm": False},
    {"layer_scale": True},
    {"stride": 4},
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_strategy_of_the_ablations_runs(changes: dict[str, object]) -> None:
    config = VimConfig(d_model=16, depth=2, img_size=(16, 32), patch_size=8, stride=8, num_classes=3, d_state=2)
    with torch.no_grad():
        logits = random_model(config.replace(**changes))(torch.ones(2, 3, 16, 32))
    assert logits.shape == (2, 3) and bool(torch.isfinite(logits).all())
    torch.testing.assert_close(logits[0], logits[1])  # deterministic


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls_position": "center"}, "cls_position 'center' is not one of none, head, middle, tail, double"),
        ({"pool": "sum"}, "pool 'sum' is not one of last, mean, max, all"),
        ({"bimamba": "v3"}, "bimamba 'v3' is not one of none, v1, v2"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"stride": -1}, "stride must be at least 1, not -1"),
        ({"img_size": (8, 224)}, "image size 8x224 is smaller than a patch (16 px)"),
        ({"rope": True, "d_model": 18}, "18 is not a multiple of 4"),
        ({"rope": True, "stride": 8}, "RoPE cannot serve 730 tokens"),
        ({"rope": True, "cls_position": "double"}, "RoPE cannot serve 198 tokens"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    config = registered_config("tiny").replace(**changes)
    with pytest.raises(VariantError) as refused:
        config.validate()
    assert message in refused.value.message


def test_configurations_survive_json() -> None:
    config = registered_config("small+").replace(img_size=(256, 384))
    assert VimConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(VariantError, match="unknown model settings: colour"):
        VimConfig.from_dict({**config.to_dict(), "colour": "red"})


def test_variant_is_a_name_settings_or_both() -> None:
    assert parse_variant("tiny+")["stride"] == 8
    assert parse_variant("stride=8, cls=middle,divide=yes,img_size=224x384") == {
        "stride": 8,
        "cls_position": "middle",
        "divide_out": True,
        "img_size": (224, 384),
    }
    assert parse_variant("small,img=384")["img_size"] == (384, 384)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("huge", VariantError, "no Vision Mamba is called 'huge'"),
        ("stride=8,tiny", UsageError, "'tiny' is not a setting"),
        ("colour=red", UsageError, "no setting is called 'colour'"),
        ("stride=eight", UsageError, "stride takes a number, not 'eight'"),
        ("divide=perhaps", UsageError, "divide_out is yes or no, not 'perhaps'"),
        ("img_size=0", UsageError, "'0' is not an image size"),
    ],
)
def test_variants_that_cannot_be_read(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refused:
        parse_variant(text)
    assert message in str(refused.value)


def test_sizes_are_height_by_width() -> None:
    assert parse_size("224") == (224, 224) and parse_size("384X512") == (384, 512)
    for text in ("", "0", "224x", "-224", "224x0", "a"):
        with pytest.raises(UsageError):
            parse_size(text)
