"""FusedVim's wiring and its handling of weights, on the CPU: with fp64 stand-ins for the kernels, and with real ones.

The kernels' own arithmetic is tested in tests/kernels and tests/gpu; tests/gpu/test_fused_vim.py runs the network on a
card.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from official import random_model
from ort_library import ort_library
from plain_kernels import PlainKernels
from zoo import BASE, NETWORKS

from vimdeploy.errors import UsageError, VariantError
from vimdeploy.models.fused import MERGE_BELOW, FusedVim, refusal
from vimdeploy.models.variants import VimConfig, registered_config
from vimdeploy.models.vim import Vim
from vimdeploy.ops.native import KernelError, Kernels

SERVED = {name: config for name, config in NETWORKS.items() if refusal(config) is None}
#: the tiny model's widths and class token, two of its layers, few tokens
TINY = registered_config("tiny").replace(depth=2, img_size=(64, 64), num_classes=10)


def images(config: VimConfig, batch: int = 3, seed: int = 1) -> torch.Tensor:
    shape = (batch, config.in_chans, *config.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fused(model: Vim, kernels: object | None = None, **options: object) -> FusedVim:
    options = {"dtype": torch.float32, "device": "cpu", **options}
    return FusedVim(model, kernels or PlainKernels(), **options)  # type: ignore[arg-type]


@torch.no_grad()
def wanted(model: Vim, x: torch.Tensor, output: str) -> torch.Tensor:
    model = copy.deepcopy(model).double()
    x = x.double()
    return model.token_map(x) if output == "tokens" else model(x, return_features=output == "features")


@pytest.fixture(scope="module")
def cpu_kernels() -> Kernels:
    """The C interface of the CPU kernels, which is the CUDA kernels' too."""
    return Kernels(Path(ort_library()), "cpu")


@pytest.mark.parametrize("output", ["logits", "features", "tokens"])
@pytest.mark.parametrize("merge", [False, True], ids=["thin", "merged"])
@pytest.mark.parametrize("name", SERVED)
def test_every_network_served_is_the_reference(name: str, merge: bool, output: str) -> None:
    config = SERVED[name]
    if output == "logits" and not config.num_classes:
        pytest.skip("it has no head")
    model, x = random_model(config), images(config)
    got = fused(model, merge=merge, output=output)(x)
    want = wanted(model, x, output)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(SERVED)))
def test_other_strategies_are_refused_with_the_reason(name: str) -> None:
    reason = refusal(NETWORKS[name])
    assert reason
    with pytest.raises(VariantError, match="does not serve this model") as caught:
        fused(Vim(NETWORKS[name]))
    assert reason in caught.value.message and caught.value.hint == "run the ONNX file"


@pytest.mark.parametrize("merge", [False, True], ids=["thin", "merged"])
def test_the_c_kernels_compute_the_tiny_model(cpu_kernels: Kernels, merge: bool) -> None:
    model, x = random_model(TINY), images(TINY)
    got = fused(model, cpu_kernels, merge=merge)(x)
    assert float((got.double() - wanted(model, x, "logits")).abs().max()) <= 1e-3


@pytest.mark.parametrize("merge", [False, True], ids=["thin", "merged"])
@pytest.mark.parametrize("dtype,limit", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_low_precision_stays_near(cpu_kernels: Kernels, dtype: torch.dtype, limit: float, merge: bool) -> None:
    model, x = random_model(TINY), images(TINY)
    want = wanted(model, x, "logits")
    got = fused(model, cpu_kernels, dtype=dtype, merge=merge)(x).double()
    assert float(((got - want).square().mean() / want.square().mean()).sqrt()) <= limit


def test_a_layer_is_three_kernels_and_the_last_prunes_to_the_class_token() -> None:
    model, x, kernels = random_model(TINY), images(TINY), PlainKernels()
    fused(model, kernels, merge=False)(x)
    assert kernels.calls == {"add_rms_norm": 3, "bi_causal_conv1d": 2, "bi_selective_scan": 1, "selective_scan": 2}
    kernels = PlainKernels()
    fused(model, kernels, merge=True)(x)
    assert kernels.calls == {"add_rms_norm": 3, "bi_causal_conv1d": 2, "bi_selective_scan": 2}


def test_small_batches_take_the_merged_product() -> None:
    config = TINY.replace(img_size=(224, 224))
    network = fused(Vim(config))
    largest = int(MERGE_BELOW / (config.seq_len * config.d_inner**2))
    assert network._merges(1) and network._merges(largest) and not network._merges(largest + 1)
    assert network._layers[0].merged is not None
    long = fused(Vim(config.replace(img_size=(2048, 2048))))
    assert not long._merges(1) and long._layers[0].merged is None  # which then take no memory either


def test_batches_of_any_size_share_one_arena() -> None:
    model = random_model(BASE)
    network = fused(model)
    for step, batch in enumerate((2, 5, 1, 5, 3)):
        x = images(BASE, batch, step)
        torch.testing.assert_close(network(x).double(), wanted(model, x, "logits"), atol=2e-5, rtol=2e-5)
    assert network.arena_bytes() == fused_arena(model, 5)


def fused_arena(model: Vim, batch: int) -> int:
    network = fused(model)
    network(images(model.config, batch))
    return network.arena_bytes()


def test_parts_bound_the_memory_and_change_nothing() -> None:
    model, x = random_model(BASE), images(BASE, 7)
    network = fused(model, images_per_pass=3)
    torch.testing.assert_close(network(x).double(), wanted(model, x, "logits"), atol=2e-5, rtol=2e-5)
    assert network.arena_bytes() == fused_arena(model, 3)


@pytest.mark.parametrize("streams", [2, 3, 9])
def test_streams_share_the_images(streams: int) -> None:
    model = random_model(BASE)
    network = fused(model, streams=streams)
    for step, batch in enumerate((7, 1, 4)):
        x = images(BASE, batch, step)
        torch.testing.assert_close(network(x).double(), wanted(model, x, "logits"), atol=2e-5, rtol=2e-5)
    assert fused_arena(model, 7) <= network.arena_bytes() <= fused_arena(model, 7) + 5 * 256 * streams


def test_the_arena_is_six_widths_a_token_and_the_residual() -> None:
    """xz, u and delta of two directions each: what a mixer cannot do without; h, n and y live in them."""
    config = registered_config("tiny").replace(depth=1)
    network = fused(Vim(config), dtype=torch.float16, merge=False)
    network(images(config, 2))
    tokens = 2 * config.seq_len
    least = tokens * (6 * config.d_inner * 2 + config.d_model * 4 + 2 * (16 + 32) * 2)  # rank 12 padded to 16
    assert least <= network.arena_bytes() <= least + 5 * 256


def test_results_are_the_callers_own() -> None:
    network = fused(random_model(BASE))
    first = network(images(BASE, 2, 0))
    kept = first.clone()
    network(images(BASE, 2, 1))
    assert torch.equal(first, kept)


def test_the_model_stays_as_it_was() -> None:
    model = random_model(BASE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused(model)(images(BASE))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_frozen_model_serves_as_well() -> None:
    model, x = random_model(BASE), images(BASE)
    want = fused(model)(x)
    torch.testing.assert_close(fused(model.freeze())(x), want)


def test_images_of_any_layout() -> None:
    network = fused(random_model(BASE))
    x = images(BASE, 4)
    want = network(x)
    for other in (x.double(), x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 0)[::2]):
        torch.testing.assert_close(network(other), want)


@pytest.mark.parametrize(
    "options,error",
    [({"output": "boxes"}, UsageError), ({"images_per_pass": 0}, UsageError), ({"streams": 0}, UsageError)],
)
def test_options_that_cannot_be(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        fused(Vim(BASE), **options)


@pytest.mark.parametrize("shape", [(0, 3, 28, 28), (1, 3, 28, 27), (1, 1, 28, 28), (3, 28, 28)])
def test_images_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="takes images"):
        fused(Vim(BASE))(torch.zeros(shape))


def test_weight_bytes_count_each_tensor_once() -> None:
    config = TINY.replace(depth=1)
    parameters = sum(p.numel() for p in Vim(config).parameters())
    counted = fused(Vim(config), merge=False).weight_bytes() / 4
    # Padding of the rank, and position and class token as one table, are all that differs.
    assert parameters * 0.99 <= counted <= parameters * 1.02


# The binding.


def scan_arguments(T: torch.dtype = torch.float32) -> dict[str, object]:
    B, L, D, N = 2, 5, 8, 4
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def two(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random(*shape).to(T), random(*shape).to(T)

    return {
        "u": two(B, L, D), "delta": two(B, L, D), "A": (-random(D, N).abs(), -random(D, N).abs()), "B": two(B, L, N),
        "C": two(B, L, N), "D": (random(D), random(D)), "z": random(B, L, D).to(T),
        "delta_bias": (random(D), random(D)),
    }  # fmt: skip


@pytest.mark.parametrize("T,tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_binding_bi_selective_scan(cpu_kernels: Kernels, T: torch.dtype, tolerance: float) -> None:
    arguments = scan_arguments(T)
    got, want = (torch.empty(2, 5, 8, dtype=T) for _ in range(2))
    cpu_kernels.bi_selective_scan(**arguments, out=got)  # type: ignore[arg-type]
    PlainKernels().bi_selective_scan(**arguments, out=want)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    scale = torch.linspace(0.5, 2, 8)
    scaled = torch.empty_like(got)
    cpu_kernels.bi_selective_scan(**arguments, out=scaled, y_scale=scale)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled.float(), want.float() * scale, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
def test_binding_selective_scan(cpu_kernels: Kernels, reverse: bool) -> None:
    two = scan_arguments()
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    one = {name: two[name][int(reverse)] for name in names}  # type: ignore[index]
    got, want = torch.empty(2, 5, 8), torch.empty(2, 5, 8)
    cpu_kernels.selective_scan(**one, out=got, reverse=reverse)
    PlainKernels().selective_scan(**one, out=want, reverse=reverse)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_binding_writes_into_slices_and_nowhere_else(cpu_kernels: Kernels) -> None:
    """As the network uses it: z in the second half of xz's rows, y into the first."""
    arguments = scan_arguments()
    xz = torch.full((2, 5, 16), 7.0)
    z = arguments["z"]
    assert isinstance(z, torch.Tensor)
    xz[..., 8:] = z
    want = torch.empty(2, 5, 8)
    PlainKernels().bi_selective_scan(**arguments, out=want)  # type: ignore[arg-type]
    cpu_kernels.bi_selective_scan(**{**arguments, "z": xz[..., 8:]}, out=xz[..., :8])  # type: ignore[arg-type]
    torch.testing.assert_close(xz[..., :8], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(xz[..., 8:], z)


def test_binding_conv_and_norm(cpu_kernels: Kernels) -> None:
    x = torch.randn(2, 6, 16)[..., :8]
    weight, bias = (torch.randn(4, 8), torch.randn(4, 8)), (torch.randn(8), torch.randn(8))
    got, want = ((torch.empty(2, 6, 8), torch.empty(2, 6, 8)) for _ in range(2))
    cpu_kernels.bi_causal_conv1d(x, weight, bias, out=got)
    PlainKernels().bi_causal_conv1d(x, weight, bias, out=want)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    h, r, scale = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)
    results = []
    for kernels in (cpu_kernels, PlainKernels()):
        n, stream = torch.empty(6, 8), r.clone()
        kernels.add_rms_norm(h, stream, scale, 1e-5, n=n, r_out=stream)  # in place, as the network does
        results.append((n, stream))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change,named",
    [
        ({"z": torch.zeros(2, 5, 7)}, "z must be (2, 5, 8)"),
        ({"z": torch.zeros(2, 5, 8, dtype=torch.float16)}, "z must be (2, 5, 8) of torch.float32"),
        ({"z": torch.zeros(2, 8, 5).transpose(1, 2)}, "z must be (2, 5, 8) of torch.float32 on cpu, last stride 1"),
        ({"B": (torch.zeros(2, 5, 4), torch.zeros(2, 4, 4))}, "B must be (2, 5, 4)"),
        ({"D": (torch.zeros(8), torch.zeros(8, dtype=torch.float64))}, "D must be (8,) of torch.float32"),
        ({"A": (torch.zeros(8, 4), torch.zeros(4, 8).t())}, "A must be (8, 4) of torch.float32 on cpu, contiguous"),
    ],
)
def test_binding_refuses_what_the_kernel_would_misread(
    cpu_kernels: Kernels, change: dict[str, object], named: str
) -> None:
    with pytest.raises(KernelError) as caught:
        cpu_kernels.bi_selective_scan(**{**scan_arguments(), **change}, out=torch.empty(2, 5, 8))  # type: ignore[arg-type]
    assert named in caught.value.message and caught.value.hint


def test_binding_gives_the_kernels_own_reason(cpu_kernels: Kernels) -> None:
    weight, bias = (torch.zeros(17, 8),) * 2, (torch.zeros(8),) * 2
    with pytest.raises(KernelError, match="taps is 17"):
        cpu_kernels.bi_causal_conv1d(torch.zeros(1, 3, 8), weight, bias, out=(torch.zeros(1, 3, 8),) * 2)


def test_a_library_that_is_none(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.so", "is not a file"), (Path(__file__), "cannot be loaded")):
        with pytest.raises(Exception, match=said):
            Kernels(path, "cpu")
    with pytest.raises(Exception, match="lacks a kernel"):
        Kernels(Path(ort_library()), "tpu")
