"""bench/published.py: the baseline is the same network, in upstream's order of operations."""

from __future__ import annotations

import copy
import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from official import random_model
from zoo import NETWORKS

from vimdeploy.bench.published import Parts, PublishedVim, find_parts
from vimdeploy.errors import RuntimeMissing, VariantError
from vimdeploy.models.fused import refusal

SERVED = {name: c for name, c in NETWORKS.items() if refusal(c) is None and c.num_classes and c.pool != "max"}


@pytest.mark.parametrize("name", SERVED)
def test_it_computes_the_reference(name: str) -> None:
    config = SERVED[name]
    model = random_model(config)
    x = torch.randn(2, config.in_chans, *config.img_size)
    got = PublishedVim(model, find_parts(cuda=False), dtype=torch.float32, device="cpu")(x)
    with torch.no_grad():
        torch.testing.assert_close(got.double(), copy.deepcopy(model).double()(x.double()), atol=2e-5, rtol=2e-5)


def test_strategies_of_the_ablations_are_refused() -> None:
    with pytest.raises(VariantError, match="does not serve"):
        PublishedVim(random_model(NETWORKS["v1"]), find_parts(cuda=False), dtype=torch.float32, device="cpu")


def test_it_says_what_computed_the_scan() -> None:
    model = random_model(NETWORKS["v2"])
    network = PublishedVim(model, find_parts(cuda=False), dtype=torch.float32, device="cpu")
    assert network.describe() == "as published: eager PyTorch with vimdeploy's reference scan"


def test_the_scan_gets_what_a_kernel_without_strides_needs() -> None:
    """mamba-ssm's C function takes pointers alone: everything it is given must be contiguous, channel-first."""
    parts = find_parts(cuda=False)
    seen = []

    def scan(*tensors: torch.Tensor) -> torch.Tensor:
        seen.append([tuple(t.shape) for t in tensors])
        assert all(t.is_contiguous() for t in tensors)
        return parts.scan(*tensors)

    config = NETWORKS["v2"]
    network = PublishedVim(
        random_model(config), Parts(scan, parts.conv, parts.add_norm, ("spy",)), dtype=torch.float32, device="cpu"
    )
    network(torch.randn(2, 3, *config.img_size))
    sequence, states, inner = (
        (2, config.d_inner, config.seq_len),
        (2, 1, config.d_state, config.seq_len),
        config.d_inner,
    )
    assert seen == [[sequence, sequence, (inner, 4), states, states, (inner,), sequence, (inner,)]] * (2 * config.depth)


def test_a_named_library_without_the_function_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int other(void) { return 0; }\n")
    library = tmp_path / "empty.so"
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    ctypes.CDLL(str(library))
    for path in (library, tmp_path / "none.so"):
        with pytest.raises(RuntimeMissing, match="has no mamba_selective_scan"):
            find_parts(path, cuda=True)
