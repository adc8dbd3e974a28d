"""Every kind of network through the exporter: what the file computes, and what its graph looks like."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zoo
from golden_vim import golden_forward
from official import random_model, write_official, write_small

from vimdeploy import bundle
from vimdeploy.bundle import ModelInfo, read_info
from vimdeploy.errors import CheckFailed, ExportError, UsageError
from vimdeploy.export import exporter, translate
from vimdeploy.export.exporter import ExportOptions, export_checkpoint, export_model
from vimdeploy.models.variants import VimConfig, registered_config
from vimdeploy.preprocess import Preprocessing

NETWORKS = zoo.NETWORKS
RUNTIMES = ("body", "library")


def assert_agree(got: np.ndarray, golden: np.ndarray) -> None:
    assert got.shape == golden.shape and golden.std() > 0.01, "the comparison must compare something"
    # fp32 against float64 over two layers of width 16: a few units in the seventh digit.
    np.testing.assert_allclose(got, golden, rtol=0, atol=2e-5 * max(1.0, float(np.abs(golden).max())))


@functools.cache
def golden_of(name: str, features: bool = False) -> np.ndarray:
    config = NETWORKS[name]
    return golden_forward(config, zoo.weights_of(config), zoo.images_for(config).astype(np.float64), features=features)


# What the file computes.


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_the_network(name: str, runtime: str) -> None:
    got = zoo.run(zoo.exported(NETWORKS[name]), zoo.images_for(NETWORKS[name]), runtime)
    assert_agree(got, golden_of(name))


@pytest.mark.parametrize("name", ["v2", "v1", "layer pairs, v2", "rope and residual", "LayerNorm"])
def test_linear_attention_computes_the_network(name: str) -> None:
    model = zoo.exported(NETWORKS[name], fallback="linear-attention")
    assert {"com.microsoft"} <= {o.domain for o in model.opset_import}
    assert_agree(zoo.run(model, zoo.images_for(NETWORKS[name])), golden_of(name))


@pytest.mark.parametrize(
    "name", ["v2", "cls double", "no cls, pool max", "no cls, pool mean", "no cls, pool last", "rope, layer pairs"]
)
def test_features_are_what_the_head_reads(name: str) -> None:
    model = zoo.exported(NETWORKS[name], output="features")
    assert [o.name for o in model.graph.output] == ["features"]
    assert not any(i.name.startswith("head.") for i in model.graph.initializer), "the head is not shipped for nothing"
    assert_agree(zoo.run(model, zoo.images_for(NETWORKS[name])), golden_of(name, features=True))


@pytest.mark.parametrize(
    "name", ["v2", "cls head", "cls tail", "cls double", "no cls, pool mean", "non-square", "overlapping patches"]
)
def test_tokens_are_the_map_without_class_tokens(name: str) -> None:
    config = NETWORKS[name]
    model = zoo.exported(config, output="tokens")
    got = zoo.run(model, zoo.images_for(config))
    # The golden network pools nothing, and gives every token, when there is no class token and pool is "all"; here the
    # reference network (checked against the golden one in tests/models) says what the map is.
    with torch.no_grad():
        want = random_model(config).double().token_map(torch.from_numpy(zoo.images_for(config)).double()).numpy()
    assert got.shape == (2, config.d_model, *config.grid)
    assert_agree(got, want)


@pytest.mark.parametrize("opset", range(16, 24))
@pytest.mark.parametrize("name", ["v2", "no cls, pool mean", "no cls, pool max", "rope, layer pairs"])
def test_every_opset(name: str, opset: int) -> None:
    model = zoo.exported(NETWORKS[name], opset=opset)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, "vim": 1}
    assert model.ir_version <= 10
    zoo.check(model)
    assert_agree(zoo.run(model, zoo.images_for(NETWORKS[name])), golden_of(name))


def test_the_batch_is_open_by_default() -> None:
    model = zoo.exported(zoo.BASE)
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 28, 28]
    assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == ["batch", 7]
    running = zoo.session(model)
    images = zoo.images_for(zoo.BASE, 9)
    (whole,) = running.run(None, {"images": images})
    for size in (1, 2, 5):
        (part,) = running.run(None, {"images": images[:size]})
        np.testing.assert_allclose(part, whole[:size], atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ["v2", "no cls, pool mean", "cls double", "rope"])
def test_a_static_batch_is_fixed(name: str, batch: int) -> None:
    model = zoo.exported(NETWORKS[name], static_batch=batch)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert not {"Shape"} & {node.op_type for node in model.graph.node}
    images = np.concatenate([zoo.images_for(NETWORKS[name])] * 2)[:batch]
    want = np.concatenate([golden_of(name)] * 2)[:batch]
    assert_agree(zoo.run(model, images), want)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        zoo.run(model, zoo.images_for(NETWORKS[name], 4))


# What the graph looks like.


@pytest.mark.parametrize("name", NETWORKS)
def test_the_checker_accepts(name: str) -> None:
    zoo.check(zoo.exported(NETWORKS[name]))


def scans_wanted(config: VimConfig) -> list[int]:
    """The reverse attribute of each scan, in order: one node a direction."""
    wanted = []
    for layer in range(config.blocks_run):
        backward = config.bidirectional and layer % 2 == 1
        wanted += [int(backward)] if config.bimamba == "none" else [int(backward), int(not backward)]
    return wanted


@pytest.mark.parametrize("name", NETWORKS)
def test_one_scan_a_direction_with_its_attributes_written_out(name: str) -> None:
    config = NETWORKS[name]
    model = zoo.exported(config)
    found = zoo.scans(model)
    assert [zoo.attributes(node)["reverse"] for node in found] == scans_wanted(config)
    weights = zoo.initializers(model)
    for node in found:
        assert node.op_type == "SelectiveScan"
        reverse = zoo.attributes(node)["reverse"]
        assert zoo.attributes(node) == {
            "delta_softplus": 1,
            "reverse": reverse,
            "plugin_namespace": b"vim",
            "plugin_version": b"1",
        }
        assert len(node.input) == 8 and all(node.input)
        A, D, bias = (weights[node.input[i]] for i in (2, 5, 7))  # A, D and the bias are initializers
        assert A.dtype == D.dtype == bias.dtype == np.float32
        assert A.shape == (config.d_inner, config.d_state) and (A < 0).all()
        assert D.shape == bias.shape == (config.d_inner,)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_turned_around_between_in_proj_and_out_proj(name: str) -> None:
    """Channel-last all the way: nothing that transposes, flips or gathers tokens stands around a scan."""
    model = zoo.exported(NETWORKS[name])
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = zoo.initializers(model)
    looked_at = 0
    for scan in zoo.scans(model):
        todo, seen = [scan], set()
        while todo:
            node = todo.pop()
            if node.name in seen or node.name.endswith("in_proj/MatMul"):
                continue
            seen.add(node.name)
            assert ".mixer" in node.name, f"{node.name} feeds a scan without passing an in_proj"
            assert node.op_type not in ("Transpose", "Einsum", "ReverseSequence", "Gather", "Scan", "Loop"), node.name
            if node.op_type == "Slice" and len(node.input) > 4:
                assert (constants[node.input[4]] > 0).all(), f"{node.name} flips"
            todo += [producers[i] for i in node.input if i in producers]
        looked_at += len(seen)
    assert looked_at > 15 * len(zoo.scans(model))
    behind = {i: node for node in model.graph.node for i in node.input}
    for scan in zoo.scans(model):
        node = behind[scan.output[0]]
        while not node.name.endswith("out_proj/MatMul"):
            assert node.op_type == "Add", f"{node.name} stands between the scan and out_proj"
            node = behind[node.output[0]]
    transposes = [node.name for node in model.graph.node if node.op_type == "Transpose"]
    assert transposes == ["patch_embed/Transpose"]


@pytest.mark.parametrize("name", NETWORKS)
def test_constants_are_folded(name: str) -> None:
    model = zoo.exported(NETWORKS[name])
    operators = {node.op_type for node in model.graph.node}
    # exp(A_log) is computed offline; halves and layer scales are in out_proj; norms divide by Reciprocal.
    assert not {"Exp", "Cast", "Neg"} & operators - ({"Neg"} if NETWORKS[name].rope else set())
    in_mixers = {node.op_type for node in model.graph.node if ".mixer" in node.name}
    assert "Div" not in in_mixers and not any("gamma" in i.name or "_log" in i.name for i in model.graph.initializer)


def test_A_is_minus_exp_of_A_log() -> None:
    weights, found = zoo.weights_of(zoo.BASE), zoo.initializers(zoo.exported(zoo.BASE))
    for suffix in ("", "_b"):
        want = -np.exp(weights[f"layers.1.mixer.A{suffix}_log"])
        np.testing.assert_allclose(found[f"layers.1.mixer.A{suffix}"], want, rtol=2e-7)


@pytest.mark.parametrize("divide", [True, False])
def test_the_half_is_folded_exactly(divide: bool) -> None:
    config = zoo.BASE.replace(divide_out=divide)
    weight = zoo.initializers(zoo.exported(config))["layers.0.mixer.out_proj.weight.T"]
    want = random_model(config).layers[0].mixer.out_proj.weight.detach().numpy().T * (0.5 if divide else 1)
    np.testing.assert_array_equal(weight, want)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_follow_the_modules(name: str) -> None:
    """A value in a profile or a debugger leads back to its module and to the state dict."""
    model = zoo.exported(NETWORKS[name])
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    modules = {path for path, _ in random_model(NETWORKS[name]).named_modules()}
    for node in model.graph.node:
        path, _, label = node.name.rpartition("/")
        assert path in modules and label.split(".")[0] in (node.op_type, "scan_forward", "scan_backward"), node.name
        assert node.output[0].split(":")[0] in (node.name, "logits", "features")
    state = set(random_model(NETWORKS[name]).freeze().state_dict())
    for initializer in model.graph.initializer:
        assert initializer.name.removesuffix(".T") in state or initializer.name.startswith("const/"), initializer.name
    readers = {i for node in model.graph.node for i in node.input}
    assert {i.name for i in model.graph.initializer} <= readers, "weights that nothing reads"


def test_every_block_scans_under_its_own_name() -> None:
    names = [node.name for node in zoo.scans(zoo.exported(zoo.BASE))]
    assert names == [f"layers.{i}.mixer/scan_{d}" for i in range(2) for d in ("forward", "backward")]


def test_every_value_has_a_type() -> None:
    """Passes read them; onnx's own inference agrees with each."""
    model = zoo.exported(zoo.BASE)
    computed = {o for node in model.graph.node for o in node.output} - {"logits"}
    said = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info if v.name in computed}
    assert set(said) == computed
    del model.graph.value_info[:]
    zoo.check(model)  # registers the domain
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    found = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    assert {name: found[name] for name in said} == said


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exporting_twice_gives_the_same_bytes(precision: str) -> None:
    import onnx_ir as ir

    def once() -> bytes:
        options = ExportOptions(precision=precision)
        return ir.to_proto(export_model(random_model(NETWORKS["rope, layer pairs"]), options)).SerializeToString()

    assert once() == once()


# From a checkpoint to files.


def export_small(tmp_path: Path, out: str = "small.vim", **options: object) -> exporter.ExportResult:
    checkpoint = tmp_path / "small.pth"
    if not checkpoint.exists():
        write_small(checkpoint)
    return export_checkpoint(checkpoint, tmp_path / out, ExportOptions(**options))  # type: ignore[arg-type]


def test_the_metadata_round_trips(tmp_path: Path) -> None:
    result = export_small(tmp_path, labels=("ant", "bee", "cat", "dog", "Ööß \N{DUCK}"), img_size=(32, 48))
    info = read_info(result.model)
    assert info == result.info
    assert info == ModelInfo.from_props(info.to_props(), "here")
    assert info.config == result.recognition.config and info.config.img_size == (32, 48)
    assert info.trained_size == (32, 32) and info.labels[4] == "Ööß \N{DUCK}"
    assert info.checkpoint_sha256 == bundle.sha256_of(tmp_path / "small.pth")
    assert Preprocessing.from_dict(info.preprocessing) == Preprocessing.for_config(info.config, {})
    props = {p.key: p.value for p in onnx.load(result.model).metadata_props}
    assert json.loads(props["vimdeploy.config"])["d_model"] == 32


def test_the_result_says_what_was_written(tmp_path: Path) -> None:
    result = export_small(tmp_path)
    model = onnx.load(result.model)
    assert result.path == tmp_path / "small.vim" and result.model == tmp_path / "small.vim/model.onnx"
    ops = {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 2}
    assert (result.nodes, result.ops, result.opset) == (len(model.graph.node), ops, 18)
    assert result.info.fusion == "full"
    assert result.file_bytes == result.model.stat().st_size
    parameters = sum(tensor.numel() for tensor in random_model(result.info.config).state_dict().values())
    assert result.weight_bytes == 4 * parameters
    assert result.report is None and result.seconds > 0


def test_the_manifest_describes_the_files(tmp_path: Path) -> None:
    result = export_small(tmp_path, precision="fp16", opset=20)
    manifest = bundle.read_manifest(result.model)
    entry = manifest["files"]["model.onnx"]
    assert entry["sha256"] == bundle.sha256_of(result.model) and entry["bytes"] == result.file_bytes
    assert (entry["precision"], entry["opset"], entry["made_by"]) == ("fp16", 20, "export")
    assert entry["fusion"] == "full"
    assert manifest["checkpoint"]["sha256"] == bundle.sha256_of(tmp_path / "small.pth")
    assert bundle.checkpoint_of(result.model) == tmp_path / "small.pth"
    assert sorted(p.name for p in result.path.iterdir()) == ["manifest.json", "model.onnx"]


def test_the_ema_weights_are_other_weights(tmp_path: Path) -> None:
    model, ema = (onnx.load(export_small(tmp_path, f"{w}.onnx", weights=w).model) for w in ("model", "ema"))
    plain, smooth = (zoo.initializers(m)["layers.0.mixer.x_proj.weight.T"] for m in (model, ema))
    np.testing.assert_allclose(smooth, 0.99 * plain, rtol=1e-6)
    assert read_info(tmp_path / "ema.onnx").weights == "ema"


@pytest.mark.parametrize("out", ["again.vim", "again.onnx"])
def test_an_earlier_export_is_replaced(tmp_path: Path, out: str) -> None:
    export_small(tmp_path, out, precision="fp16")
    result = export_small(tmp_path, out)
    assert read_info(result.model).precision == "fp32"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out, "small.pth"])


@pytest.mark.parametrize("out", ["kept.vim", "kept.onnx", "new/deep/kept.vim", "new/deep/kept.onnx"])
@pytest.mark.parametrize("earlier", [False, True], ids=["nothing there", "an earlier export"])
def test_a_file_that_fails_its_check_never_takes_its_place(tmp_path: Path, out: str, earlier: bool) -> None:
    class Fails:
        passed = False

        def summary(self) -> str:
            return "logits are off"

        def to_dict(self) -> dict[str, object]:
            return {}

    if earlier:
        before = bundle.sha256_of(export_small(tmp_path, out).model)
    write_small(tmp_path / "small.pth")
    seen = []

    def check(file: Path) -> Fails:
        seen.append(read_info(file))  # a whole file is what the check gets to see
        return Fails()

    with pytest.raises(CheckFailed, match="logits are off"):
        export_checkpoint(tmp_path / "small.pth", tmp_path / out, check=check)
    assert seen
    if earlier:
        model = tmp_path / out / "model.onnx" if out.endswith(".vim") else tmp_path / out
        assert bundle.sha256_of(model) == before
    else:
        assert [p.name for p in tmp_path.iterdir()] == ["small.pth"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_earlier_export_survives_a_failing_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = bundle.sha256_of(export_small(tmp_path, precision="fp16").model)
    calls, replace = [], os.replace

    def stumble(*args: object) -> None:
        calls.append(args)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stumble)
    with pytest.raises(KeyboardInterrupt):
        export_small(tmp_path)
    assert bundle.sha256_of(tmp_path / "small.vim/model.onnx") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.pth", "small.vim"]


def test_steps_are_announced(tmp_path: Path) -> None:
    write_small(tmp_path / "small.pth")
    heard: list[str] = []
    export_checkpoint(tmp_path / "small.pth", tmp_path / "small.vim", step=heard.append)
    assert heard == ["reading the checkpoint", "tracing the network", "writing the graph", "writing the file"]


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    result = export_small(tmp_path)
    alone = export_small(tmp_path, "alone.onnx")
    plain, folder = ((tmp_path / name).stat().st_mode & 0o777 for name in ("plain", "folder"))
    assert result.path.stat().st_mode & 0o777 == folder
    assert result.model.stat().st_mode & 0o777 == alone.model.stat().st_mode & 0o777 == plain


# Refusals of the library; tests/cli has those that a user meets.


@pytest.mark.parametrize(
    "options,message",
    [
        ({"precision": "int8"}, "precision 'int8' is not one of fp32, fp16, bf16"),
        ({"fallback": "loop"}, "fallback 'loop' is not one of"),
        ({"fusion": "some"}, "fusion 'some' is not one of none, bidirectional, full"),
        ({"output": "probabilities"}, "output 'probabilities' is not one of"),
        ({"opset": 15}, "opset 15 cannot be written"),
        ({"opset": 24}, "opset 24 cannot be written"),
        ({"static_batch": 0}, "a static batch is at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options).validate()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        export_model(random_model(zoo.BASE), ExportOptions(**options))  # type: ignore[arg-type]


def test_a_backbone_has_no_logits() -> None:
    with pytest.raises(UsageError, match="no classifier head") as caught:
        export_model(random_model(NETWORKS["no head"]), ExportOptions())
    assert caught.value.hint == "--output features or tokens"


def test_labels_of_another_number_are_refused_but_the_checkpoints_own_left_out(tmp_path: Path) -> None:
    from official import SMALL, SMALL_NAME, official_content

    with pytest.raises(UsageError, match="2 labels for 5 classes"):
        export_small(tmp_path, labels=("a", "b"))
    content = official_content(SMALL, SMALL_NAME)
    for names, kept in ((list("abcde"), tuple("abcde")), (["a", "b"], ())):
        content["args"].class_names = names
        torch.save(content, tmp_path / "named.pth")
        result = export_checkpoint(tmp_path / "named.pth", tmp_path / "named.vim")
        assert result.info.labels == kept


def test_an_operator_without_a_translation_is_named() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.erfinv(x)

    program = torch.export.export(Odd(), (torch.zeros(2, 3),))
    with pytest.raises(ExportError, match="erfinv") as caught:
        translate.translate(program, opset=18, input_name="x", output_name="y")
    assert caught.value.hint


def test_a_model_beyond_two_gigabytes_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_PROTOBUF_LIMIT", 10_000)
    with pytest.raises(ExportError, match="one ONNX file holds 2 GB"):
        export_small(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["small.pth"]


# The size users have.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> exporter.ExportResult:
    folder = tmp_path_factory.mktemp("tiny")
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    write_official(folder / "tiny.pth", registered_config("tiny"), name, ema=False, optimizer=False)
    return export_checkpoint(folder / "tiny.pth", folder / "tiny.vim")


def test_vim_tiny_is_within_3_percent_of_its_weights(tiny: exporter.ExportResult) -> None:
    assert tiny.weight_bytes == 4 * 7_148_008
    assert 1 < tiny.file_bytes / tiny.weight_bytes < 1.03
    assert tiny.ops == {"BiSelectiveScan": 24, "BiCausalConv1d": 24, "AddRMSNorm": 24}


def test_vim_tiny_computes_the_reference(tiny: exporter.ExportResult) -> None:
    config = registered_config("tiny")
    images = zoo.images_for(config, 1)
    with torch.no_grad():
        want = random_model(config)(torch.from_numpy(images)).numpy()
    got = zoo.run(tiny.model.read_bytes(), images)
    assert want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)  # the issue's own limit
