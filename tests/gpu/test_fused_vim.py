"""The network on vimdeploy's CUDA kernels (models/fused.py) against the reference network in fp32. Needs a card."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from official import random_model  # noqa: E402

from vimdeploy.models.fused import FusedVim  # noqa: E402
from vimdeploy.models.variants import VimConfig, registered_config  # noqa: E402
from vimdeploy.ops.native import Kernels  # noqa: E402

TINY = registered_config("tiny")
SMALL = VimConfig(d_model=64, depth=3, img_size=(64, 64), num_classes=10)
NETWORKS = {
    "Vim-Ti": TINY.replace(depth=6),
    "Vim-S": registered_config("small").replace(depth=4),
    "Vim-B": registered_config("base").replace(depth=2),
    "Vim-Ti, 224 px, stride 8": registered_config("tiny+").replace(depth=4),
    "not square": SMALL.replace(img_size=(64, 96)),
    "class token first": SMALL.replace(cls_position="head"),
    "class token last": SMALL.replace(cls_position="tail"),
    "two class tokens": SMALL.replace(cls_position="double"),
    "no class token": SMALL.replace(cls_position="none"),
    "odd width, state 5, 3 taps": SMALL.replace(d_model=36, d_state=5, d_conv=3),
    "projection biases, layer scale": SMALL.replace(proj_bias=True, layer_scale=True),
}


@pytest.fixture(scope="module")
def kernels():
    return Kernels(Path(os.environ.get("VIM_CUDA_LIBRARY", ROOT / "build/gpu/out/libvimdeploy_cuda.so")))


def images(config, batch, seed=0):
    shape = (batch, config.in_chans, *config.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def reference(model, x, output="logits"):
    """fp32, or fp64 where the images are."""
    model = copy.deepcopy(model).to(x.device, x.dtype)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return model.token_map(x) if output == "tokens" else model(x, return_features=output == "features")


def rel_rms(got, want):
    got, want = got.double(), want.double()
    return float(((got - want).square().mean() / want.square().mean()).sqrt())


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_is_the_reference(kernels, name, merge):
    config = NETWORKS[name]
    model, x = random_model(config), images(config, 3)
    got = FusedVim(model, kernels, dtype=torch.float32, merge=merge)(x)
    want = reference(model, x)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-3 and float(want.abs().max()) > 0.1


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("dtype,limit", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("name", ["Vim-Ti", "Vim-S", "Vim-B"])
def test_low_precision_is_near_it(kernels, name, dtype, limit, merge):
    config = NETWORKS[name]
    model, x = random_model(config), images(config, 3)
    got = FusedVim(model, kernels, dtype=dtype, merge=merge)(x)
    assert rel_rms(got, reference(model, x)) <= limit


@pytest.mark.parametrize("output", ["features", "tokens"])
@pytest.mark.parametrize("name", ["Vim-Ti", "two class tokens", "no class token"])
def test_other_outputs(kernels, name, output):
    config = NETWORKS[name]
    model, x = random_model(config), images(config, 2)
    got = FusedVim(model, kernels, dtype=torch.float32, output=output)(x)
    torch.testing.assert_close(got, reference(model, x, output), atol=1e-3, rtol=1e-3)


def test_a_long_sequence(kernels):
    config = TINY.replace(depth=3, img_size=(1248, 1248))
    model, x = random_model(config), images(config, 2)
    want = reference(model, x)
    assert float((FusedVim(model, kernels, dtype=torch.float32)(x) - want).abs().max()) <= 1e-3
    assert rel_rms(FusedVim(model, kernels)(x), want) <= 1e-2


def test_graphs_of_every_batch_in_any_order(kernels):
    config = SMALL
    network, plain = (FusedVim(random_model(config), kernels, cuda_graph=g) for g in (True, False))
    for step, batch in enumerate((4, 1, 3, 16, 1, 4, 2, 16)):  # 16 makes the arena anew
        x = images(config, batch, step)
        torch.testing.assert_close(network(x), plain(x), atol=4e-3, rtol=0)


def test_a_graph_keeps_its_own_workspace(kernels):
    """Others may clear cuBLAS's workspaces and take the memory: what was recorded must not write there."""
    config = TINY.replace(depth=2)
    network = FusedVim(random_model(config), kernels)
    x = images(config, 64)
    want = network(x)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]
    for _ in range(3):
        torch.testing.assert_close(network(x), want, atol=0, rtol=0)
    assert all(bool((other == 7).all()) for other in others)


def test_parts_of_a_batch_give_the_same(kernels):
    config = SMALL
    model = random_model(config)
    x = images(config, 7)
    whole, parts = (FusedVim(model, kernels, dtype=torch.float32, images_per_pass=n) for n in (None, 3))
    torch.testing.assert_close(parts(x), whole(x), atol=1e-4, rtol=1e-4)
    assert parts.arena_bytes() < whole.arena_bytes() / 2


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("streams", [2, 3, 8])
def test_streams_share_the_images_and_change_nothing(kernels, streams, graph):
    config = TINY.replace(depth=4)
    model = random_model(config)
    one = FusedVim(model, kernels, dtype=torch.float32, merge=False)
    several = FusedVim(model, kernels, dtype=torch.float32, merge=False, streams=streams, cuda_graph=graph)
    for step, batch in enumerate((8, 3, 1, 16, 8)):
        x = images(config, batch, step)
        want = one(x)
        for _ in range(5):  # a race would not show each time
            torch.testing.assert_close(several(x), want, atol=2e-4, rtol=2e-4)


def test_images_of_any_layout_and_type(kernels):
    config = SMALL
    network = FusedVim(random_model(config), kernels)
    x = images(config, 4)
    for other in (x.half(), x.to(memory_format=torch.channels_last), torch.cat([x, x])[::2], x.mT.contiguous().mT):
        want = network(other.float().contiguous().clone())
        torch.testing.assert_close(network(other), want, atol=0, rtol=0)


def test_results_are_the_callers_own(kernels):
    config = SMALL
    network = FusedVim(random_model(config), kernels)
    first = network(images(config, 2, 0))
    kept = first.clone()
    network(images(config, 2, 1))
    torch.testing.assert_close(first, kept, atol=0, rtol=0)


def test_two_networks_on_two_streams(kernels):
    config = SMALL
    model = random_model(config)
    x = images(config, 4)
    networks = [FusedVim(model, kernels) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in networks]
    want = networks[0](x)
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for network, stream in zip(networks, streams):
            with torch.cuda.stream(stream):
                results.append(network(x))
        torch.cuda.synchronize()
        for got in results:
            torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_memory_at_1248_px_is_below_flash_deits(kernels):
    """589 MiB is DeiT-Ti's with flash attention at batch 8 (performance.md M), its images and weights included."""
    config = TINY.replace(img_size=(1248, 1248))
    model = random_model(config)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.zeros(8, 3, 1248, 1248, dtype=torch.float16, device="cuda")
    FusedVim(model, kernels)(x)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    assert peak <= 0.7 * 589, f"{peak:.0f} MiB"
