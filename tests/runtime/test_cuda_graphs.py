"""CUDA graphs of a TensorRT session: one a batch size, each with a context that nothing changes afterwards.

TensorRT's rule: a captured graph may be replayed only while its execution context is as it was. The stand-in insists.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines_helpers import write_plan
from fake_tensorrt import FakeContext, fake_tensorrt, install

from vimdeploy.errors import UsageError
from vimdeploy.runtimes.tensorrt import TensorRTSession


@pytest.fixture(params=["8.5", "10"])
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT before contexts could share an engine's profile, and after."""
    module = fake_tensorrt()
    if request.param == "10":
        module.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
    install(monkeypatch, module)
    return module


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "m.plan"
    write_plan(path, json.dumps(("image", (1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))).encode())
    return path


@pytest.fixture
def session(tensorrt: Any, plan: Path) -> Any:
    with TensorRTSession(plan, cuda_graph=True) as session:
        yield session


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)


def check(session: TensorRTSession, batch: int, seed: int = 0) -> None:
    x = images(batch) * (seed + 1)
    np.testing.assert_allclose(session.run(x)["logits"], 2 * x.mean((2, 3)), rtol=1e-6)


def test_every_batch_size_is_right_in_any_order(session: TensorRTSession) -> None:
    for step, batch in enumerate((4, 1, 3, 1, 4, 4, 2, 1)):
        check(session, batch, step)


def test_a_batch_size_is_recorded_once_and_replayed(session: TensorRTSession, tensorrt: Any) -> None:
    for step in range(5):
        check(session, 2, step)
    assert tensorrt.seen["runs"] == [(2, 3, 32, 32)] * 2  # once to set up, once to record
    assert session._graphs is not None and session._graphs[2].graph.launches == 5


def test_batch_sizes_stay_recorded_where_contexts_are_to_be_had(session: TensorRTSession, tensorrt: Any) -> None:
    for batch in (1, 2, 1, 2):
        check(session, batch)
    several = hasattr(tensorrt, "ExecutionContextAllocationStrategy")
    assert session._graphs is not None and set(session._graphs) == ({1, 2} if several else {2})
    assert len(tensorrt.seen["runs"]) == (4 if several else 8)


def test_graphs_share_one_block_of_memory(session: TensorRTSession, tensorrt: Any) -> None:
    for batch in (1, 2, 3):
        check(session, batch)
    cuda = session._cuda
    assert isinstance(cuda, FakeContext)
    if hasattr(tensorrt, "ExecutionContextAllocationStrategy"):
        used = {session._graphs[batch].context.memory for batch in (1, 2, 3)}  # type: ignore[index]
        assert len(used) == 1 and next(iter(used))[1] == 1 << 10
        assert len(cuda.buffers) == 3  # images, logits, and that
    else:
        assert len(cuda.buffers) == 2


def test_prepared_runs_replay_the_graph_and_copy_nothing(session: TensorRTSession) -> None:
    x = images(3)
    prepared = session.prepare(x)
    assert session._cuda is not None and prepared.stream == session._cuda.stream
    for _ in range(3):
        prepared.run()
    logits = np.empty((3, 3), np.float32)
    session._cuda.download(session._pointers["logits"], logits)
    np.testing.assert_allclose(logits, 2 * x.mean((2, 3)), rtol=1e-6)
    with pytest.raises(UsageError, match="outside the engine's profile"):
        session.prepare(images(5))


def test_closing_frees_the_graphs(session: TensorRTSession) -> None:
    check(session, 1)
    assert session._graphs is not None
    graph: Any = session._graphs[1].graph
    session.close()
    assert graph.closed
    session.close()


def test_without_graphs_prepare_runs_the_plan_each_time(tensorrt: Any, plan: Path) -> None:
    with TensorRTSession(plan) as session:
        prepared = session.prepare(images(2))
        prepared.run()
        prepared.run()
        assert tensorrt.seen["runs"] == [(2, 3, 32, 32)] * 2
