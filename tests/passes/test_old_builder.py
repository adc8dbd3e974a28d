"""passes/old_builder.py: the same numbers, without what TensorRT 8's builder is slow with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from vimdeploy.export import functions
from vimdeploy.passes.old_builder import for_old_builder
from vimdeploy.passes.opset import lower_opset


def rewritten(name: str, fusion: str = "full") -> ir.Model:
    return for_old_builder(zoo.loaded(zoo.NETWORKS[name], fusion=fusion, fallback="none"))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "name",
    ["v2", "v1", "layer pairs, v2", "LayerNorm", "no absolute positions", "cls double", "rope", "no cls, pool mean"],
)
def test_outputs_stay(name: str) -> None:
    config = zoo.NETWORKS[name]
    images = zoo.images_for(config)
    want = zoo.run(zoo.exported(config, fusion="full"), images)
    model = rewritten(name)
    functions.attach(model, "scan")
    got = zoo.run(ir.to_proto(model), images)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", ["v2", "cls head", "cls tail"])
def test_of_a_class_token_model_no_gather_is_left(name: str) -> None:
    assert "Gather" in ops(zoo.loaded(zoo.NETWORKS[name], fusion="full"))
    assert "Gather" not in ops(rewritten(name))


def test_the_first_norm_adds_the_position_table() -> None:
    before, after = ops(zoo.loaded(zoo.NETWORKS["v2"], fusion="full")), ops(rewritten("v2"))
    assert "Reciprocal" in before
    assert not {"Reciprocal", "Sqrt", "ReduceMean"} & set(after)
    assert after.count("AddRMSNorm") == before.count("AddRMSNorm") + 1


@pytest.mark.parametrize(("name", "fusion"), [("v2", "none"), ("no absolute positions", "full"), ("LayerNorm", "full")])
def test_norms_that_add_no_position_table_stay(name: str, fusion: str) -> None:
    before = ops(zoo.loaded(zoo.NETWORKS[name], fusion=fusion))
    assert ops(rewritten(name, fusion)).count("ReduceMean") == before.count("ReduceMean") > 0


def test_what_is_left_can_be_lowered_for_its_parser() -> None:
    model = rewritten("v2")
    lower_opset(model, 14)
    assert model.opset_imports[""] == 14
