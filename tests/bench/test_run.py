"""`bench` on real ONNX Runtime and PyTorch, with a network of two small layers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from official import SMALL, write_small
from ort_library import ort_library

from vimdeploy.bench import memory, run
from vimdeploy.bench.contenders import ArtifactContender, contender_from
from vimdeploy.bench.measure import Effort
from vimdeploy.bench.run import Options, bench, find_contenders
from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.export.exporter import ExportOptions, export_checkpoint

QUICK = Effort(seconds=0.02, rounds=2)


@functools.cache
def folder_of(base: Path) -> Path:
    checkpoint = write_small(base / "small.pth", ema=False, optimizer=False)
    export_checkpoint(checkpoint, base / "small.vim", ExportOptions(fusion="none"))
    return base / "small.vim"


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("bench")) / "model.onnx"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "bench-cache"
    monkeypatch.setenv("VIMDEPLOY_CACHE", str(folder))
    monkeypatch.setenv("VIMDEPLOY_ORT_LIBRARY", str(ort_library()))
    return folder


def quick(**changes: Any) -> Options:
    return Options(**{"memory": False, "threads": 1, "effort": QUICK, **changes})


def test_an_artifact_against_its_baselines(artifact: Path) -> None:
    results = bench([artifact], quick(batches=(1, 2), against=("torch", "onnxruntime")))
    assert [(row.contender, row.role, row.batch) for row in results.rows] == [
        (name, role, batch)
        for batch in (1, 2)
        for name, role in (
            ("small, onnxruntime", "artifact"),
            ("small as published, torch", "baseline"),
            ("small, onnxruntime without vimdeploy's library", "baseline"),
        )
    ]
    for row in results.rows:
        assert row.failed is None and row.ms and row.latency_ms and row.clock == "host"
        assert row.images_per_s == pytest.approx(row.batch / row.ms * 1e3)
        assert row.tokens == 17 and row.img_size == SMALL.img_size and row.precision == "fp32" and not row.on_card
    library, published, body = results.rows[:3]
    assert library.runtime.endswith("vim op library") and "function body" in body.runtime
    assert "as published: eager PyTorch" in published.runtime
    assert library.model_bytes == body.model_bytes == artifact.stat().st_size
    assert results.host["cpu"]["name"] and results.settings["threads"] == 1


def test_other_sizes_are_exported_once_and_kept(artifact: Path, cache: Path) -> None:
    options = quick(img_sizes=((48, 64), (32, 32)))
    results = bench([artifact], options)
    assert [(row.img_size, row.tokens, row.failed) for row in results.rows] == [
        ((32, 32), 17, None),
        ((48, 64), 49, None),
    ]
    (made,) = cache.glob("small-48x64-*.vim")
    before = (made / "model.onnx").stat().st_mtime_ns
    bench([artifact], options)
    assert (made / "model.onnx").stat().st_mtime_ns == before


def test_a_checkpoint_may_be_named(artifact: Path) -> None:
    results = bench([artifact.parent.parent / "small.pth"], quick())
    (row,) = results.rows
    assert row.contender == "small, onnxruntime" and row.failed is None


def test_a_runtime_twice_and_an_artifact_twice(artifact: Path) -> None:
    found = find_contenders([artifact, artifact], quick(runtimes=("onnxruntime", "torch")))
    assert [(c.name, c.precision) for c in found] == [("small, onnxruntime", "fp32"), ("small, torch", "fp32")]


def test_a_batch_the_file_does_not_take_is_a_row_that_says_so(artifact: Path, tmp_path: Path) -> None:
    fixed = export_checkpoint(
        artifact.parent.parent / "small.pth", tmp_path / "fixed.vim", ExportOptions(static_batch=2, fusion="none")
    ).model
    results = bench([fixed, artifact], quick(batches=(1,)))
    failed, fine = results.rows
    assert failed.failed is not None and "not a batch of shape (1, 3, 32, 32)" in failed.failed and failed.ms is None
    assert fine.failed is None
    subject = results.subject((1, (32, 32)))
    assert subject is fine


def test_a_runtime_that_is_not_there_is_an_error(artifact: Path) -> None:
    with pytest.raises(RuntimeMissing):
        bench([artifact], quick(runtimes=("torch-cuda",)))
    rows = run.measure_case(
        find_contenders([artifact], quick(runtimes=("torch-cuda",))), 1, quick(), run.Progress(), tolerant=True
    )
    assert rows[0].failed and "GPU" in rows[0].failed


@pytest.mark.parametrize(
    "artifacts,options,said",
    [([], {}, "nothing to measure"), ([1], {"against": ("resnet",)}, "no baseline is called 'resnet'")],
)
def test_usage(artifact: Path, artifacts: list[int], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        bench([artifact] * len(artifacts), quick(**options))
    assert caught.value.hint


def test_progress_comes_to_its_end(artifact: Path) -> None:
    seen: dict[str, int] = {"done": 0}

    class Counting(run.Progress):
        def start(self, steps: int) -> None:
            seen["steps"] = steps

        def advance(self) -> None:
            seen["done"] += 1

    bench([artifact], quick(batches=(1, 2)), Counting())
    assert seen["done"] == seen["steps"] == 2 * (2 + QUICK.rounds)


def test_memory_is_a_fresh_processs_and_grows_with_the_batch(artifact: Path) -> None:
    (contender,) = find_contenders([artifact], quick(img_sizes=((256, 256),)))
    assert contender_from(contender.to_dict()) == contender
    one, many = (memory.in_a_fresh_process(contender, batch, 1) for batch in (1, 24))
    ballast = bytearray(300 << 20)  # of this process, which must not count
    again = memory.in_a_fresh_process(contender, 1, 1)
    del ballast
    # Images alone are 0.75 MiB each; what is measured of one is small, and does not depend on who asks.
    assert 0 < one < 60 and many > one + 20 and abs(again - one) < 5


def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    contender = ArtifactContender("x", "m", "fp32", (32, 32), 17, False, "process", path=str(tmp_path / "gone.onnx"))
    with pytest.raises(memory.ProbeFailed, match=r"gone\.onnx does not exist"):
        memory.in_a_fresh_process(contender, 1, None)
