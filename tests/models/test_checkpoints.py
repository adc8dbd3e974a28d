"""Reading, recognising and loading checkpoints: every container, every source of knowledge, every refusal."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_vim import golden_forward
from official import SMALL, SMALL_NAME, official_content, random_model, write_official, write_small
from safetensors.torch import save_file
from torch import Tensor

from vimdeploy.errors import CheckpointError, UsageError, VariantError, VimDeployError
from vimdeploy.models.checkpoints import read_checkpoint
from vimdeploy.models.loading import load_model, slim
from vimdeploy.models.recognise import AmbiguousVariant, recognise
from vimdeploy.models.resize import resize_pos_embed
from vimdeploy.models.variants import REGISTERED, VimConfig, registered_config

ROPE = SMALL.replace(rope=True, rope_residual=True, cls_position="head", divide_out=False)
ROPE_NAME = "vim_micro_patch8_32_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token"
SETTINGS = "stride=8,cls=middle,divide=yes,img_size=32"


def weights_of(config: VimConfig = SMALL) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in random_model(config).state_dict().items()}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].float(), b[name].float()) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# Containers


def test_official_container(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_small(tmp_path / "ckpt.pth"))
    assert (checkpoint.container, checkpoint.epoch, checkpoint.prefix) == ("official", 299, "")
    assert list(checkpoint.weights) == ["model", "ema"]
    assert set(checkpoint.other) == {"optimizer", "lr_scheduler", "scaler"}
    assert checkpoint.args["model"] == SMALL_NAME and checkpoint.args["input_size"] == 32
    assert checkpoint.sizes["optimizer"] == 2 * checkpoint.sizes["model"] > 0
    assert same(checkpoint.weights["model"], weights_of())
    assert len(checkpoint.sha256) == 64


def test_the_small_one_is_recognised_and_computes(tmp_path: Path) -> None:
    model, found = load_model(write_small(tmp_path / "ckpt.pth"))
    assert (found.config, found.variant, found.unknown, found.missing) == (SMALL, SMALL_NAME, (), ())
    assert any(line.endswith(f"args.model = {SMALL_NAME}") for line in found.how)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    golden = golden_forward(SMALL, {k: v.double().numpy() for k, v in weights_of().items()}, images.numpy())
    with torch.no_grad():
        torch.testing.assert_close(model(images.float()), torch.from_numpy(golden).float(), atol=1e-4, rtol=0)


def test_ema_weights_are_another_set(tmp_path: Path) -> None:
    path = write_small(tmp_path / "ckpt.pth")
    model, ema = load_model(path)[0], load_model(path, weights="ema")[0]
    assert torch.equal(ema.get_parameter("head.weight"), model.get_parameter("head.weight") * 0.99)


def test_a_loaded_model_outlives_and_leaves_alone_its_file(tmp_path: Path) -> None:
    path = write_small(tmp_path / "ckpt.pth")
    before = path.read_bytes()
    model, _ = load_model(path)
    model.freeze()
    assert path.read_bytes() == before
    path.write_bytes(b"")
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.zeros(1, 3, 32, 32))).all())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict", "module"])
def test_state_dicts_bare_or_in_a_dict(tmp_path: Path, key: str | None, zipped: bool) -> None:
    content = weights_of() if key is None else {key: weights_of()}
    checkpoint = read_checkpoint(saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=zipped))
    assert checkpoint.container == "state_dict" and same(checkpoint.weights["model"], weights_of())
    assert load_model(checkpoint, variant=SETTINGS)[1].config == SMALL


def test_an_official_container_from_before_torch_1_6(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", official_content(SMALL, SMALL_NAME), _use_new_zipfile_serialization=False)
    assert load_model(path)[1].config == SMALL


def test_only_ema(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"model_ema": weights_of()})
    assert list(read_checkpoint(path).weights) == ["ema"]
    with pytest.raises(CheckpointError, match="holds no 'model' weights, only: ema") as refused:
        load_model(path)
    assert refused.value.hint == "--weights ema"


@pytest.mark.parametrize(
    "prefix", ["module.", "backbone.", "_orig_mod.", "encoder.", "module._orig_mod.", "my.own.net."]
)
def test_wrappers_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "x.pth", {prefix + name: tensor for name, tensor in weights_of().items()})
    checkpoint = read_checkpoint(path)
    assert checkpoint.prefix == prefix and same(checkpoint.weights["model"], weights_of())


def test_a_head_outside_the_backbones_prefix(tmp_path: Path) -> None:
    content = {n if n.startswith("head.") else "backbone." + n: t for n, t in weights_of().items()}
    assert load_model(saved(tmp_path / "x.pth", content), variant=SETTINGS)[1].config == SMALL


def test_two_networks_in_one_dict(tmp_path: Path) -> None:
    twice = {f"{who}.{n}": t for who in ("student", "teacher") for n, t in weights_of().items()}
    with pytest.raises(CheckpointError, match=r"holds several Vision Mambas, under 'student\.', 'teacher\.'"):
        read_checkpoint(saved(tmp_path / "x.pth", twice))
    one_wrapped = {f"{who}.{n}": t for who in ("module", "teacher") for n, t in weights_of().items()}
    assert read_checkpoint(saved(tmp_path / "x.pth", one_wrapped)).prefix == "module."


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file(weights_of(), tmp_path / "x.safetensors")
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.container == "safetensors" and same(checkpoint.weights["model"], weights_of())
    assert load_model(checkpoint, variant=SETTINGS)[1].config == SMALL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded_as_fp32_and_reported(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights_of(ROPE).items()}
    path = saved(tmp_path / "x.pth", {"model": stored, "args": argparse.Namespace(model=ROPE_NAME, input_size=32)})
    model, found = load_model(path)
    name = str(dtype).removeprefix("torch.")
    assert read_checkpoint(path).dtypes() == (name,)
    assert f"weights stored as {name}, loaded as float32" in found.how
    assert same(dict(model.state_dict()), stored)


# ---------------------------------------------------------------------------------------------------------------------
# Recognition


@pytest.mark.parametrize("name", REGISTERED[:2])
def test_registered_models(tmp_path: Path, name: str) -> None:
    config = registered_config(name)
    path = write_official(tmp_path / "ckpt.pth", config, name, ema=False, optimizer=False)
    found = recognise(read_checkpoint(path))
    assert (found.config, found.variant) == (config, name)
    assert any("(registered name)" in line for line in found.how)


@pytest.mark.parametrize(
    "config",
    [
        SMALL.replace(bimamba="v1"),
        SMALL.replace(bimamba="none"),
        SMALL.replace(rms_norm=False),
        SMALL.replace(layer_scale=True, proj_bias=True),
        SMALL.replace(cls_position="double"),
        SMALL.replace(cls_position="none", pool="max"),
        SMALL.replace(cls_position="tail", divide_out=False),
        SMALL.replace(d_conv=3, expand=3, dt_rank=5, d_state=7, in_chans=1, num_classes=0),
        SMALL.replace(img_size=(48, 24)),
        SMALL.replace(stride=4, img_size=(24, 40)),
        SMALL.replace(abs_pos_embed=False),
        SMALL.replace(bidirectional=True),
        ROPE,
        ROPE.replace(rope_residual=False, cls_position="none"),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.to_dict().items() if v != SMALL.to_dict()[k]),
)
def test_tensors_and_settings_together_find_the_network(tmp_path: Path, config: VimConfig) -> None:
    """What tensors tell is left to them; the rest is said; the network comes out whole."""
    said = {"stride": config.stride, "img_size": f"{config.img_size[0]}x{config.img_size[1]}"}
    said |= {"divide": config.divide_out, "rope_residual": config.rope_residual, "bidirectional": config.bidirectional}
    said |= {"cls": config.cls_position, "pool": config.pool}
    model, found = load_model(
        saved(tmp_path / "x.pth", weights_of(config)), variant=",".join(f"{k}={v}" for k, v in said.items())
    )
    assert found.config == model.config == config
    assert found.variant == "custom"


def test_args_input_size_wins_over_the_224_in_a_name(tmp_path: Path) -> None:
    config = registered_config("tiny").replace(depth=24, img_size=(384, 384), num_classes=10)
    found = recognise(
        read_checkpoint(write_official(tmp_path / "x.pth", config, REGISTERED[0], ema=False, optimizer=False))
    )
    assert (found.config, found.variant) == (config, REGISTERED[0])


def test_older_spelling_is_the_registered_model(tmp_path: Path) -> None:
    name = REGISTERED[0].replace("midclstok", "middle_cls_token")
    path = write_official(tmp_path / "x.pth", registered_config("tiny"), name, ema=False, optimizer=False)
    assert recognise(read_checkpoint(path)).variant == REGISTERED[0]


@pytest.mark.parametrize(
    "config", [SMALL, ROPE, SMALL.replace(cls_position="none"), SMALL.replace(abs_pos_embed=False)]
)
def test_without_a_word_the_choices_that_fit_are_listed(tmp_path: Path, config: VimConfig) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "x.pth", weights_of(config)))
    with pytest.raises(AmbiguousVariant, match="the tensors do not tell the stride or the image size") as stopped:
        recognise(checkpoint)
    assert len(stopped.value.choices) >= 3
    # Each one offered must work, and one of them is the truth (without a position table the size is anyone's guess).
    found = [recognise(checkpoint, choice).config for choice in stopped.value.choices]
    assert found.count(config) == (1 if config.abs_pos_embed else 0)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("alias", ["tiny", "tiny+"])
def test_registered_names_are_offered(tmp_path: Path, alias: str) -> None:
    config = registered_config(alias)
    checkpoint = read_checkpoint(saved(tmp_path / "x.pth", weights_of(config)))
    with pytest.raises(AmbiguousVariant) as stopped:
        recognise(checkpoint)
    assert stopped.value.choices[0] == alias
    assert not {"small", "base", "tiny", "tiny+"} - {alias} & set(stopped.value.choices)
    if alias == "tiny+":
        assert "730 tokens" in stopped.value.message
        for geometry in ("stride=8,img_size=224", "stride=16,img_size=432"):
            assert any(choice.startswith(geometry) for choice in stopped.value.choices)
    assert recognise(checkpoint, alias).config == config


def test_the_stride_follows_from_the_image_size(tmp_path: Path) -> None:
    config = SMALL.replace(stride=4)
    found = recognise(
        read_checkpoint(saved(tmp_path / "x.pth", weights_of(config))), "img_size=32,cls=middle,divide=yes"
    )
    assert found.config == config
    assert "stride 4: the one that gives 49 patches at 32x32" in found.how


def test_an_unknown_args_model_says_nothing_and_that_is_said(tmp_path: Path) -> None:
    path = write_official(tmp_path / "x.pth", SMALL, "my_model")
    with pytest.raises(AmbiguousVariant, match="where the class token stands"):
        recognise(read_checkpoint(path))
    found = recognise(read_checkpoint(path), "cls=middle,divide=yes")
    assert found.config == SMALL and "args.model = my_model: not an upstream name, says nothing" in found.how


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        (None, "small", "--variant small says d_model 384, but the tensors have 32"),
        (None, "stride=8,img_size=64", "--variant stride=8,img_size=64 means 65 tokens"),
        (None, "bimamba=v1", "--variant bimamba=v1 says bimamba v1, but the tensors have v2"),
        (None, "cls=none", "--variant cls=none says cls_position none, but the tensors have one class token"),
        (None, "rope=yes", "--variant rope=yes says rope yes, but the tensors have no"),
        (
            SMALL_NAME,
            "cls=head",
            f"--variant cls=head says cls_position head, but args.model = {SMALL_NAME} says middle",
        ),
        (SMALL_NAME, "divide=no", f"--variant divide=no says divide_out no, but args.model = {SMALL_NAME} says yes"),
        (
            SMALL_NAME,
            "img_size=64",
            "--variant img_size=64 says img_size 64x64, but args.input_size = 32x32 says 32x32",
        ),
        (REGISTERED[0], None, "(registered name) says d_model 192, but the tensors have 32"),
    ],
)
def test_sources_that_disagree_are_both_named(
    tmp_path: Path, name: str | None, variant: str | None, message: str
) -> None:
    content = official_content(SMALL, name, ema=False, optimizer=False)
    if name is None:
        content = content["model"]
        variant = f"{variant},cls=middle,divide=yes" if variant and "img_size" in variant else variant
        message = message.replace("img_size=64 means", "img_size=64,cls=middle,divide=yes means")
    checkpoint = read_checkpoint(saved(tmp_path / "x.pth", content))
    with pytest.raises(VariantError) as refused:
        recognise(checkpoint, variant)
    assert message in refused.value.message
    assert refused.value.hint


def test_a_setting_that_decides_nothing_may_differ(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", weights_of(SMALL))
    assert recognise(read_checkpoint(path), SETTINGS + ",pool=max,rope_residual=yes").config == SMALL


def test_rope_tables_are_checked(tmp_path: Path) -> None:
    content = official_content(ROPE, ROPE_NAME)
    content["model"]["rope.freqs_sin"] *= 1.01
    with pytest.raises(CheckpointError, match=r"tensor rope.freqs_sin is not the table of a 4x4 grid \(off by 0.0"):
        load_model(saved(tmp_path / "x.pth", content))


# ---------------------------------------------------------------------------------------------------------------------
# Other image sizes


@pytest.mark.parametrize("mode", ["layout", "repo"])
def test_another_image_size(tmp_path: Path, mode: str) -> None:
    path = write_small(tmp_path / "x.pth")
    model, found = load_model(path, img_size=48, pos_embed_mode=mode)
    new = SMALL.replace(img_size=(48, 48))
    assert model.config == found.config == new
    assert torch.equal(model.pos_embed, resize_pos_embed(weights_of()["pos_embed"], SMALL, new, mode))
    assert f"pos_embed resized from 4x4 to 6x6 patches ({mode} mode)" in found.how
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 5)


def test_not_square(tmp_path: Path) -> None:
    path = write_small(tmp_path / "x.pth")
    model, _ = load_model(path, img_size=(40, 64))
    assert model(torch.zeros(1, 3, 40, 64)).shape == (1, 5)
    with pytest.raises(UsageError, match="repo makes square grids only"):
        load_model(path, img_size=(40, 64), pos_embed_mode="repo")


def test_rope_is_recomputed_for_another_size(tmp_path: Path) -> None:
    path = write_official(tmp_path / "x.pth", ROPE, ROPE_NAME)
    model, found = load_model(path, img_size=(32, 48))
    assert torch.equal(model.rope.freqs_cos, random_model(ROPE.replace(img_size=(32, 48))).rope.freqs_cos)
    assert "RoPE tables recomputed" in found.how
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 5)


@pytest.mark.parametrize(
    ("size", "message", "hint"),
    [
        (4, "image size 4x4 is smaller than a patch (8 px)", "take at least 8 px on each side"),
        (
            (32, 36),
            "image size 32x36 does not fit patches of 8 px every 8 px: 4 px of 36",
            "take 32 or 40 instead of 36",
        ),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, size: Any, message: str, hint: str) -> None:
    with pytest.raises(VariantError) as refused:
        load_model(write_small(tmp_path / "x.pth"), img_size=size)
    assert message in refused.value.message and refused.value.hint == hint


# ---------------------------------------------------------------------------------------------------------------------
# Slimming


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_slim_keeps_one_set_and_all_knowledge(tmp_path: Path, weights: str) -> None:
    source = write_small(tmp_path / "ckpt.pth")
    result = slim(source, tmp_path / "out" / "x.safetensors", weights)
    assert result.before == source.stat().st_size and result.after == result.path.stat().st_size < result.before / 2.5
    again = read_checkpoint(result.path)
    assert same(again.weights["model"], read_checkpoint(source).weights[weights])
    assert (again.epoch, again.args["model"], again.metadata["vimdeploy.weights"]) == (299, SMALL_NAME, weights)
    assert again.metadata["vimdeploy.source_sha256"] == read_checkpoint(source).sha256
    assert "data_path" not in again.args, "no paths of the machine that trained"
    assert load_model(again)[1].config == SMALL
    assert stat.S_IMODE(result.path.stat().st_mode) & 0o444


def test_slim_remembers_what_variant_said(tmp_path: Path) -> None:
    config = SMALL.replace(cls_position="tail", divide_out=False, bidirectional=True)
    source = saved(tmp_path / "x.pth", weights_of(config))
    said = "stride=8,img_size=32,cls=tail,divide=no,bidirectional=yes"
    result = slim(source, tmp_path / "x.safetensors", variant=said)
    assert load_model(result.path)[1].config == config
    with pytest.raises(
        VariantError, match=r"says cls_position head, but vimdeploy\.config in the file's metadata says tail"
    ):
        load_model(result.path, variant="cls=head")


def test_slim_keeps_the_precision_of_the_file(tmp_path: Path) -> None:
    content = {"model": {n: t.half() for n, t in weights_of().items()}}
    result = slim(saved(tmp_path / "x.pth", content), tmp_path / "x.safetensors", variant=SETTINGS)
    assert read_checkpoint(result.path).dtypes() == ("float16",)


def test_slim_does_not_overwrite_its_input(tmp_path: Path) -> None:
    source = write_small(tmp_path / "x.pth")
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    for out in (source, tmp_path / "link.safetensors", tmp_path):
        with pytest.raises(UsageError):
            slim(source, out)
    assert source.read_bytes() == before


@pytest.mark.parametrize("damage", ["{", '{"d_model": "32"}', '{"stride": 8}', "[]", "null"])
def test_damaged_metadata_is_refused(tmp_path: Path, damage: str) -> None:
    save_file(weights_of(), tmp_path / "x.safetensors", {"vimdeploy.config": damage})
    with pytest.raises((CheckpointError, AmbiguousVariant), match=r"config is damaged|do not tell"):
        load_model(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def payload_zip(path: Path, target: Path) -> None:
    torch.save({"model": weights_of(), "x": Payload(target)}, path)


def payload_old_format(path: Path, target: Path) -> None:
    torch.save({"model": weights_of(), "x": Payload(target)}, path, _use_new_zipfile_serialization=False)


def payload_pickle(protocol: int) -> Callable[[Path, Path], Any]:
    return lambda path, target: path.write_bytes(pickle.dumps(Payload(target), protocol=protocol))


def payload_in_args(path: Path, target: Path) -> None:
    torch.save(official_content(SMALL, SMALL_NAME) | {"args": argparse.Namespace(x=Payload(target))}, path)


@pytest.mark.parametrize(
    "write",
    [payload_zip, payload_old_format, payload_pickle(2), payload_pickle(4), payload_in_args],
    ids=["zip", "before torch 1.6", "pickle 2", "pickle 4", "args"],
)
def test_a_payload_is_named_and_never_run(tmp_path: Path, write: Callable[[Path, Path], Any]) -> None:
    target = tmp_path / "pwned"
    write(tmp_path / "x.pth", target)
    with pytest.raises(
        CheckpointError, match=r"unpickling it would call (posix|os|nt)\.mkdir.*Nothing was run"
    ) as refused:
        load_model(tmp_path / "x.pth")
    assert "torch.save" in (refused.value.hint or "")
    assert not target.exists()


def test_a_whole_pickled_network_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear, not only tensors"):
        read_checkpoint(path)
    path = saved(tmp_path / "y.pth", random_model(SMALL))
    with pytest.raises(CheckpointError, match=r"unpickling it would call .*vimdeploy\.models\.vim\.Block"):
        read_checkpoint(path)


def _truncated(path: Path, share: float) -> None:
    write_small(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _zip(path: Path, names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in names.items():
            archive.writestr(name, data)


def _truncated_safetensors(path: Path) -> None:
    save_file(weights_of(), path)
    path.write_bytes(path.read_bytes()[:-100])


def _truncated_old(path: Path, keep: int) -> None:
    saved(path, weights_of(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:keep])


def _recompressed(path: Path) -> None:
    write_small(path)
    with zipfile.ZipFile(path) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    _zip(path, names, zipfile.ZIP_DEFLATED)


def _repeated(path: Path) -> None:
    """One number that claims to be a billion."""
    saved(path, {**weights_of(), "head.weight": torch.zeros(1, 1).expand(10**6, 10**3)})


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("hello, world\n"), "is neither a PyTorch checkpoint nor a safetensors file"),
    "git lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is neither a PyTorch checkpoint nor",
    ),
    "folder": (lambda p: p.mkdir(), "is a folder, not a checkpoint"),
    "missing": (lambda p: None, "does not exist"),
    "device": (lambda p: p.symlink_to("/dev/null"), "is not a regular file"),
    "truncated early": (lambda p: _truncated(p, 0.02), "is truncated or damaged"),
    "truncated late": (lambda p: _truncated(p, 0.98), "is truncated or damaged"),
    "old format, truncated at once": (lambda p: _truncated_old(p, 10), "not a PyTorch checkpoint, or truncated"),
    "old format, truncated in the pickle": (lambda p: _truncated_old(p, 900), "is truncated or damaged"),
    "old format, truncated in the data": (lambda p: _truncated_old(p, 50_000), "is truncated or damaged"),
    "any zip": (lambda p: _zip(p, {"word/document.xml": b"x"}), "no data.pkl (it holds: word/document.xml)"),
    "empty pickle in a zip": (lambda p: _zip(p, {"a/data.pkl": b""}), "is damaged"),
    "broken pickle in a zip": (lambda p: _zip(p, {"a/data.pkl": b"\x80\x02}q"}), "is damaged"),
    "nonsense in a zip": (lambda p: _zip(p, {"a/data.pkl": pickle.dumps({"model": 1}, 2)}), "truncated or damaged"),
    "TorchScript": (lambda p: _zip(p, {"a/data.pkl": b"", "a/code/__torch__.py": b""}), "is a TorchScript program"),
    "compressed": (_recompressed, "compressed or overlapping records"),
    "a pickle of plain things": (
        lambda p: p.write_bytes(pickle.dumps([1, 2])),
        "is a pickle that torch.save did not write",
    ),
    "a tensor": (lambda p: saved(p, torch.zeros(3)), "holds a Tensor, not a dict of tensors"),
    "a dict without weights": (lambda p: saved(p, {"epoch": 3}), "holds no weights (it holds: epoch)"),
    "only an optimizer": (lambda p: saved(p, {"optimizer": {"state": {}}}), "holds no weights"),
    "truncated safetensors": (_truncated_safetensors, "is a truncated or damaged safetensors file"),
    "safetensors header cut": (
        lambda p: p.write_bytes((10**6).to_bytes(8, "little") + b'{"a":1}'),
        "is a truncated safetensors file",
    ),
    "safetensors without tensors": (lambda p: save_file({}, p), "holds no tensors"),
    "a billion numbers from one": (_repeated, "tensor head.weight claims more data than the file holds"),
    "sparse": (lambda p: saved(p, {**weights_of(), "x": torch.eye(3).to_sparse()}), "not an ordinary dense tensor"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    write, message = BAD_FILES[name]
    write(tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path / "x.pth", variant=SETTINGS)
    assert message in refused.value.message
    assert str(tmp_path / "x.pth") in refused.value.message and refused.value.hint


def test_a_file_one_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_small(tmp_path / "x.pth")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read anything: let the system refuse in its stead

        def refuse(self: Path, *args: Any, **options: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"may not be read \(permission denied\)") as refused:
        read_checkpoint(path)
    assert "chmod" in (refused.value.hint or "")


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The small model's state dict with some tensors (dots written __) replaced, or removed where None."""
    state = weights_of()
    for name, tensor in tensors.items():
        state[name.replace("__", ".")] = tensor  # type: ignore[assignment]
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def _nan(name: str) -> dict[str, Tensor]:
    state = weights_of()
    state[name].view(-1)[3] = float("nan")
    return state


_LAYER_1 = [name for name in weights_of() if name.startswith("layers.1.")]
DEIT = {
    "cls_token": torch.zeros(1, 1, 8),
    "blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    "pos_embed": torch.zeros(1, 5, 8),
}
BAD_TENSORS: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "DeiT": (lambda: DEIT, "is not a Vision Mamba: it looks like a ViT or DeiT (blocks.*.attn)"),
    "DeiT, wrapped": (lambda: {f"module.{k}": v for k, v in DEIT.items()}, "it looks like a ViT or DeiT"),
    "ResNet": (lambda: {"layer1.0.conv1.weight": torch.zeros(2, 2, 1, 1)}, "it looks like a ResNet"),
    "something else": (
        lambda: {"fc.weight": torch.zeros(2, 2)},
        "no layers.*.mixer among its tensors (they are: fc.weight)",
    ),
    "wrong shape": (
        lambda: changed(layers__1__mixer__A_log=torch.zeros(64, 8)),
        "tensor layers.1.mixer.A_log has shape (64, 8), the network wants (64, 4)",
    ),
    "wrong rank": (
        lambda: changed(layers__0__mixer__A_log=torch.zeros(256)),
        "tensor layers.0.mixer.A_log has shape (256,); a Vision Mamba has 2 dimensions there",
    ),
    "empty tensor": (
        lambda: changed(patch_embed__proj__weight=torch.zeros(32, 0, 8, 8)),
        "tensor patch_embed.proj.weight has shape (32, 0, 8, 8)",
    ),
    "inner channels": (
        lambda: changed(layers__0__mixer__in_proj__weight=torch.zeros(100, 32)),
        "does not fit 64 inner",
    ),
    "oblong patches": (
        lambda: changed(patch_embed__proj__weight=torch.zeros(32, 3, 8, 4)),
        "8x4 pixels are not square",
    ),
    "no room for patches": (lambda: changed(pos_embed=torch.zeros(1, 1, 32)), "tensor pos_embed has 1 rows, too few"),
    "a token short": (
        lambda: changed(pos_embed=torch.zeros(1, 16, 32)),
        "means 17 tokens (stride 8 at 32x32), but the tensors have 16",
    ),
    "defining tensor missing": (
        lambda: changed(layers__0__mixer__conv1d__weight=None),
        "tensor layers.0.mixer.conv1d.weight is missing",
    ),
    "some missing": (
        lambda: changed(layers__1__mixer__D_b=None, norm_f__weight=None),
        "lacks 2 tensors: layers.1.mixer.D_b, norm_f.weight",
    ),
    "a layer missing": (
        lambda: {n.replace("layers.1.", "layers.2."): t for n, t in weights_of().items()},
        "the layers go up to 2, but layer 1 is missing",
    ),
    "half a layer": (
        lambda: {n: t for n, t in weights_of().items() if n not in _LAYER_1[:5]},
        "lacks 5 tensors: layers.1.norm.weight",
    ),
    "one too many": (lambda: changed(extra__weight=torch.zeros(2)), "has not, 1 tensors: extra.weight"),
    "segmentation head": (
        lambda: changed(decode_head__conv_seg__weight=torch.zeros(2, 2)),
        "1 tensors: decode_head.conv_seg.weight",
    ),
    "NaN": (lambda: _nan("layers.1.mixer.D"), "tensor layers.1.mixer.D holds NaN or Inf"),
    "Inf": (lambda: changed(head__bias=torch.full((5,), torch.inf)), "tensor head.bias holds NaN or Inf"),
    "more than fp32 holds": (
        lambda: changed(head__bias=torch.full((5,), 1e300, dtype=torch.float64)),
        "head.bias holds NaN or Inf",
    ),
    "integers": (
        lambda: changed(head__bias=torch.zeros(5, dtype=torch.int8)),
        "tensor head.bias is int8, not a floating-point type",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, name: str) -> None:
    make, message = BAD_TENSORS[name]
    path = saved(tmp_path / "x.pth", make())
    with pytest.raises(VimDeployError) as refused:
        slim(path, tmp_path / "out.safetensors", variant=SETTINGS)
    assert type(refused.value) in (CheckpointError, VariantError) and refused.value.exit_code == 2
    assert message in refused.value.message and refused.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"], "nothing half-written"


def test_nan_in_the_model_points_to_a_sound_ema(tmp_path: Path) -> None:
    content = official_content(SMALL, SMALL_NAME)
    content["model"]["head.bias"][0] = float("nan")
    path = saved(tmp_path / "x.pth", content)
    with pytest.raises(CheckpointError) as refused:
        load_model(path)
    assert "--weights ema" in (refused.value.hint or "")
    load_model(path, weights="ema")


def test_names_out_of_a_file_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", changed(**{"\x1b[2Jevil": torch.zeros(1)}))
    with pytest.raises(CheckpointError) as refused:
        load_model(path, variant=SETTINGS)
    assert "\x1b" not in refused.value.message and "evil" in refused.value.message


def test_ordered_dicts_parameters_and_odd_entries_are_no_obstacle(tmp_path: Path) -> None:
    state = OrderedDict((n, torch.nn.Parameter(t)) for n, t in weights_of().items())
    path = saved(tmp_path / "x.pth", {"state_dict": state, "meta": {"CLASSES": ("a", "b")}, "best": 0.76})
    model, _ = load_model(path, variant=SETTINGS)
    assert same(dict(model.state_dict()), weights_of())
    shutil.copy(path, tmp_path / "no suffix at all")
    load_model(tmp_path / "no suffix at all", variant=SETTINGS)
