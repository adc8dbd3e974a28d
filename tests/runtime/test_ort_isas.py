"""Every network of the zoo on every SIMD path: ONNX Runtime with the op library against a float64 network in numpy.

The path is chosen for a whole process (VIMDEPLOY_CPU_ISA), so there is one for each.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import scan_c
import zoo
from golden_vim import golden_forward
from ort_library import ROOT, ort_library

SERVE = """
import pickle, sys
import scan_c, zoo
out = sys.stdout.buffer
print(scan_c.library().vim_cpu_isa().decode(), flush=True)
while True:
    model, images = pickle.load(sys.stdin.buffer)
    pickle.dump(zoo.run(model, images, "library"), out)
    out.flush()
"""


class Worker:
    """A process in which kernels run on one instruction set."""

    def __init__(self, isa: str) -> None:
        environment = os.environ | {
            "VIMDEPLOY_CPU_ISA": isa,
            "VIMDEPLOY_ORT_LIBRARY": str(ort_library()),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout.readline().decode().strip() == isa

    def run(self, model: bytes, images: np.ndarray) -> np.ndarray:
        pickle.dump((model, images), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    made = {isa: Worker(isa) for isa in scan_c.isas_at_hand()}
    yield made
    for worker in made.values():
        worker.close()


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_network_is_right_on_every_instruction_set(workers, name):
    config = zoo.NETWORKS[name]
    images = zoo.images_for(config)
    want = golden_forward(config, zoo.weights_of(config), images.astype(np.float64))
    assert want.std() > 0.01, "the comparison must compare something"
    for fusion in ("none", "bidirectional", "full"):
        model = zoo.exported(config, fusion=fusion).SerializeToString()
        outputs = {isa: worker.run(model, images) for isa, worker in workers.items()}
        for isa, output in outputs.items():
            error = np.abs(output - want).max() / np.abs(want).max()
            assert error < 2e-6, f"fusion {fusion}, {isa}: {error:.3g}"
