"""engines/inspect.py: reading the inspector's words, and never calling a wrong engine right."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from zoo import BASE, loaded

from vimdeploy.engines.inspect import Layer, Wanted, names_in, parse_layers, prove, type_of
from vimdeploy.errors import CheckFailed, ModelFileError
from vimdeploy.passes.precision import to_precision

WANTED = Wanted("fp16", frozenset({"a/MatMul", "b/MatMul"}), frozenset({"norm/ReduceMean"}))


def layer(name: str, reads: str, *, opaque: bool = False) -> Layer:
    return Layer(name, names_in(name), (reads,), (reads,), opaque)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP32 format where channel % 4 == 0", "fp32"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major Int8 format", "int8"),
        ("HALF", "fp16"),
        ("FP8", "?"),
        ("None", "?"),
    ],
)
def test_types_in_every_spelling(text: str, expected: str) -> None:
    assert type_of(text) == expected


def test_names_of_merged_layers() -> None:
    text = "PWN(PWN(layers.0.mixer/Sigmoid), layers.0.mixer/Mul.5) + {ForeignNode[layers.1.norm/Mul...layers.1/Add]}"
    assert {"layers.0.mixer/Sigmoid", "layers.0.mixer/Mul.5", "layers.1.norm/Mul", "layers.1/Add"} <= names_in(text)
    assert "layers.0.mixer/Mul" not in names_in(text)  # Mul.5 is another node


def test_the_inspectors_json() -> None:
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "gemm",
                    "LayerType": "CaskGemmConvolution",
                    "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
                    "Outputs": [{"Name": "y", "Format": "Half"}],
                    "Metadata": "[ONNX Layer: a/MatMul]\x1e[ONNX Layer: a/Add]",
                },
                {"Name": "{ForeignNode[b/MatMul...c]}", "LayerType": "Myelin", "Inputs": [], "Outputs": []},
            ]
        }
    )
    first, second = parse_layers(text)
    assert first.reads == ("fp16",) and first.writes == ("fp16",) and {"a/MatMul", "a/Add"} <= first.nodes
    assert second.opaque and not first.opaque


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": []}', '{"Layers": ["conv1 + relu"]}', "[1]"])
def test_an_engine_without_layer_information_is_no_proof(text: str) -> None:
    with pytest.raises(ModelFileError):
        parse_layers(text)


def test_what_is_right() -> None:
    layers = [layer("a/MatMul", "fp16"), layer("b/MatMul + b/Add", "fp16"), layer("norm/ReduceMean", "fp32")]
    found = prove(layers, WANTED, "inspector")
    assert found.projections == {"fp16": 2} and found.islands == {"fp32": 1} and found.hidden == 0
    assert found.layers == {"fp16": 2, "fp32": 1}


@pytest.mark.parametrize("got", ["fp32", "bf16", "int8", "?"])
def test_one_projection_of_another_type_fails(got: str) -> None:
    with pytest.raises(
        CheckFailed, match=rf"1 of 2 projections are not in fp16 .*b/MatMul \({got.replace('?', '[?]')}\)"
    ):
        prove([layer("a/MatMul", "fp16"), layer("b/MatMul", got)], WANTED, "inspector")


def test_a_quiet_fp32_build_fails() -> None:
    with pytest.raises(CheckFailed, match="2 of 2 projections"):
        prove([layer("a/MatMul", "fp32"), layer("b/MatMul", "fp32")], WANTED, "inspector")


def test_an_island_that_sank_fails() -> None:
    with pytest.raises(CheckFailed, match="norm/ReduceMean"):
        prove([layer("a/MatMul", "fp16"), layer("norm/ReduceMean", "fp16")], WANTED, "inspector")


STREAMS = Wanted("fp16", frozenset({"a/MatMul"}), frozenset(), frozenset({"norm/AddRMSNorm"}))


@pytest.mark.parametrize(("reads", "holds"), [(("fp16", "fp32", "fp32"), True), (("fp16", "fp16", "fp32"), False)])
def test_a_fused_norm_must_take_the_stream_in_fp32(reads: tuple[str, ...], holds: bool) -> None:
    """Its first input, h, is low; the second is the residual stream."""
    norm = Layer("norm/AddRMSNorm", names_in("norm/AddRMSNorm"), reads, ("fp16", reads[1]))
    layers = [layer("a/MatMul", "fp16"), norm]
    if holds:
        assert prove(layers, STREAMS, "inspector").islands == {"fp32": 1}
    else:
        with pytest.raises(CheckFailed, match=r"norms that must stay in fp32 are not: norm/AddRMSNorm \(fp16\)"):
            prove(layers, STREAMS, "inspector")


def test_what_does_not_show_is_not_proven() -> None:
    region = layer("{ForeignNode[a/MatMul...b/MatMul]}", "fp16", opaque=True)
    with pytest.raises(CheckFailed, match="shows none of the 2 projections"):
        prove([region], WANTED, "inspector")
    assert prove([region, layer("a/MatMul", "fp16")], WANTED, "inspector").hidden == 1


def test_what_is_wanted_is_read_from_the_typed_graph() -> None:
    model = loaded(BASE)
    model.functions.clear()
    wanted = Wanted.of(to_precision(model, "fp16").graph, "fp16")
    assert len(wanted.projections) == 2 * 6 + 2 and len(wanted.islands) == 3
    by_name = {node.name: node for node in model.graph}
    for name in wanted.projections:
        assert by_name[name].inputs[0].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
    for name in wanted.islands:
        assert by_name[name].inputs[0].dtype == ir.DataType.FLOAT  # type: ignore[union-attr]


def test_in_a_fused_graph_the_fused_norms_are_wanted_too() -> None:
    model = loaded(BASE, fusion="full", fallback="none")
    wanted = Wanted.of(to_precision(model, "fp16").graph, "fp16")
    assert wanted.islands == {"layers.0.norm/ReduceMean"}
    assert wanted.streams == {"layers.1.norm/AddRMSNorm", "norm_f/AddRMSNorm"}
    assert len(wanted.projections) == 2 * 6 + 2
