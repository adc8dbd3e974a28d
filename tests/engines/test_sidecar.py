"""engines/sidecar.py: there and back, and what is refused when plan or sidecar changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines_helpers import write_plan

from vimdeploy.engines.sidecar import check_plan, read_sidecar, sidecar_path
from vimdeploy.errors import ModelFileError


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "model.fp16.plan"


def test_there_and_back(plan: Path) -> None:
    written = write_plan(plan)
    assert sidecar_path(plan).name == "model.fp16.plan.json"
    assert read_sidecar(plan) == written
    check_plan(plan, written)


def test_a_flipped_byte(plan: Path) -> None:
    sidecar = write_plan(plan)
    plan.write_bytes(b"a pl\x00n")
    with pytest.raises(ModelFileError, match="SHA-256 differs"):
        check_plan(plan, sidecar)


def test_a_truncated_plan(plan: Path) -> None:
    sidecar = write_plan(plan)
    plan.write_bytes(b"a pl")
    with pytest.raises(ModelFileError, match="has 4 bytes, its sidecar says 6"):
        check_plan(plan, sidecar)


def refused(plan: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_sidecar(plan)
    assert caught.value.hint
    return caught.value.message


def test_what_is_missing(plan: Path) -> None:
    assert "does not exist" in refused(plan)
    plan.write_bytes(b"x")
    assert "has no sidecar (model.fp16.plan.json)" in refused(plan)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "plan": 3}']
)
def test_what_is_damaged(plan: Path, text: str) -> None:
    plan.write_bytes(b"x")
    sidecar_path(plan).write_text(text)
    assert str(sidecar_path(plan)) in refused(plan)


@pytest.mark.parametrize(
    "key", ["plan", "runtime", "device", "plugin", "profile", "precision", "onnx", "build", "model", "tf32"]
)
def test_each_part_is_needed(plan: Path, key: str) -> None:
    write_plan(plan)
    values = json.loads(sidecar_path(plan).read_text())
    del values[key]
    sidecar_path(plan).write_text(json.dumps(values))
    refused(plan)
