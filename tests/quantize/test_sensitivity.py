"""quantize/sensitivity.py: a switch for every layer, and the fewest layers left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from zoo import BASE, exported, images_for, session

from vimdeploy.errors import CheckFailed
from vimdeploy.passes.projections import projections
from vimdeploy.passes.quantize import quantize
from vimdeploy.quantize.sensitivity import Switchboard, keep_out, sweep
from vimdeploy.verify.agreement import sqnr


def bounds_of(
    model: ir.Model, kinds: tuple[str, ...] = ("in_proj", "x_proj", "out_proj", "patch_embed", "head")
) -> dict[str, float]:
    return {layer.name: 4.0 for layer in projections(model.graph, kinds)}


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_each_switch_is_that_layer_in_int8_and_no_other(fusion: str) -> None:
    model = ir.from_proto(exported(BASE, fusion=fusion))
    bounds, images = bounds_of(model), images_for(BASE, batch=3)
    board = Switchboard(model, bounds)
    assert set(board.layers) == set(bounds) and len(bounds) == 10
    fp32 = session(exported(BASE, fusion=fusion)).run(None, {"images": images})[0]
    np.testing.assert_allclose(board.run(images, []), fp32, rtol=1e-4, atol=1e-5)
    for chosen in ([name] for name in bounds):
        other = ir.from_proto(exported(BASE, fusion=fusion))
        quantize(other, {name: bounds[name] for name in chosen}, projections(other.graph))
        want = session(ir.to_proto(other)).run(None, {"images": images})[0]
        got = board.run(images, chosen)
        assert not np.allclose(got, fp32, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2 * np.abs(want).max())
        assert sqnr(got, want) > sqnr(got, fp32) + 6 or sqnr(got, fp32) > 60


def test_the_sweep_has_every_layer_alone() -> None:
    model = ir.from_proto(exported(BASE, fusion="full"))
    images = images_for(BASE, batch=3)
    board = Switchboard(model, {**bounds_of(model), "layers.0.mixer.out_proj": 0.01})  # cuts nearly all of it off
    reference = board.run(images, [])
    heard: list[tuple[int, int]] = []
    found = sweep(board, images, reference, lambda done, total: heard.append((done, total)))
    assert set(found) == set(board.layers) and min(found, key=lambda name: found[name]) == "layers.0.mixer.out_proj"
    assert heard == [(i + 1, 10) for i in range(10)]
    for name, value in found.items():
        assert value == pytest.approx(sqnr(board.run(images, [name]), reference), abs=0.5)


class Board:
    """A stand-in whose drop is decided by which layers are in int8."""

    def __init__(self, layers: list[str], costs: dict[str, int], n: int = 100) -> None:
        self.layers, self.costs, self.n, self.runs = tuple(layers), costs, n, 0

    def run(self, batch: np.ndarray, in_int8: list[str]) -> np.ndarray:
        self.runs += 1
        wrong = sum(self.costs.get(name, 0) for name in in_int8)
        scores = np.zeros((self.n, 2), np.float32)
        scores[:, 0] = 1
        scores[:wrong] = [0, 1]
        return scores


LAYERS = [f"l{i}" for i in range(20)]


def search(costs: dict[str, int], max_drop: float, **more: Any) -> tuple[Any, Board]:
    board = Board(LAYERS, costs)
    reference = board.run(np.zeros(1), [])
    order = sorted(LAYERS, key=lambda name: -costs.get(name, 0))
    return keep_out(board, np.zeros(1), reference, np.zeros(100, np.int64), order, max_drop, **more), board  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("costs", "max_drop", "kept"),
    [
        ({}, 0.0, []),
        ({"l3": 2}, 2.0, []),
        ({"l3": 2}, 1.9, ["l3"]),
        ({"l3": 5, "l7": 4, "l1": 3, "l9": 1}, 1.0, ["l1", "l3", "l7"]),
        ({"l3": 5, "l7": 4, "l1": 3, "l9": 1}, 4.0, ["l3", "l7"]),
        ({f"l{i}": 1 for i in range(10)}, 5.0, ["l0", "l1", "l2", "l3", "l4"]),
        ({f"l{i}": 1 for i in range(10)}, 0.0, [f"l{i}" for i in range(10)]),
    ],
)
def test_the_fewest_layers_stay_out(costs: dict[str, int], max_drop: float, kept: list[str]) -> None:
    (names, cost), board = search(costs, max_drop)
    assert sorted(names) == sorted(kept)
    assert list(names) == [name for name in LAYERS if name in names]  # in the network's order
    assert (
        cost.points == pytest.approx(sum(costs.values()) - sum(costs[name] for name in names))
        and cost.points <= max_drop
    )
    assert board.runs <= 10


def test_fixed_layers_stay_out_in_any_case() -> None:
    (names, _), _ = search({"l3": 5}, 1.0, fixed=["l19"])
    assert names == ("l3", "l19")


def test_more_than_half_of_the_layers_is_no_int8_model() -> None:
    with pytest.raises(
        CheckFailed, match=r"int8 costs 9.00 points of top-1 with 10 of 20 layers left in fp32, and 1 are"
    ):
        search({f"l{i}": 1 for i in range(19)}, 1.0)


def test_more_than_is_needed_stays_out_when_asked_for() -> None:
    (names, _), _ = search({"l3": 5, "l7": 4}, 4.0, at_least=4)
    assert len(names) == 4 and {"l3", "l7"} <= set(names)
    with pytest.raises(CheckFailed, match="with 10 of 20 layers left in fp32"):
        search({"l3": 5}, 100.0, at_least=11)


def test_without_labels_the_drop_is_what_changed_class() -> None:
    board = Board(LAYERS, {"l0": 3})
    names, cost = keep_out(board, np.zeros(1), board.run(np.zeros(1), []), None, ["l0", "l1"], 2.0)  # type: ignore[arg-type]
    assert names == ("l0",) and cost.by == "agreement" and cost.top1 is None


def test_a_file_without_functions_needs_the_library(small: Path) -> None:
    model = ir.load(small)
    model.functions.clear()
    from vimdeploy.errors import ModelFileError
    from vimdeploy.quantize import session as session_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "library_here", lambda: None)
        with pytest.raises(ModelFileError, match="ONNX Runtime cannot run the graph"):
            Switchboard(model, {})
