"""torch.ops.vim.selective_scan against the definition in float64, and as a citizen of torch.library."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from golden import selective_scan_f64
from scan_cases import ALL_OPTIONAL, DTYPES, assert_close_to_reference, make_inputs

from vimdeploy.ops.selective_scan import selective_scan, selective_scan_ref

SUBSETS = [s for n in range(4) for s in itertools.combinations(ALL_OPTIONAL, n)]


def as_torch(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """numpy's bf16 is ml_dtypes', which torch does not take; fp32 holds it exactly."""
    bf16 = DTYPES["bf16"]
    return {
        name: torch.from_numpy(x.astype(np.float32)).bfloat16() if x.dtype == bf16 else torch.from_numpy(x)
        for name, x in inputs.items()
    }


def as_numpy(y: torch.Tensor) -> np.ndarray:
    return y.float().numpy().astype(DTYPES["bf16"]) if y.dtype == torch.bfloat16 else y.numpy()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "batch,length,channels,states,groups",
    [(2, 17, 12, 4, 1), (1, 5, 12, 3, 2), (2, 7, 8, 16, 4), (3, 1, 4, 2, 1), (1, 40, 6, 1, 6)],
)
def test_agrees_with_the_definition(
    batch: int, length: int, channels: int, states: int, groups: int, dtype: str, reverse: bool
) -> None:
    inputs = make_inputs(batch, length, channels, states, groups, dtype)
    y = torch.ops.vim.selective_scan(**as_torch(inputs), reverse=reverse)
    assert_close_to_reference(as_numpy(y), inputs, dtype, reverse=reverse)


@pytest.mark.parametrize("softplus", [False, True], ids=["plain delta", "softplus"])
@pytest.mark.parametrize("optional", SUBSETS, ids=["+".join(s) or "none" for s in SUBSETS])
def test_optional_inputs(optional: tuple[str, ...], softplus: bool) -> None:
    inputs = make_inputs(2, 9, 8, 4, 2, "fp32", optional)
    if not softplus:  # a step is positive; softplus is what makes it so
        inputs["delta"] = np.abs(inputs["delta"]) + 7
        inputs["A"] /= 50
    y = selective_scan(**as_torch(inputs), delta_softplus=softplus)
    assert_close_to_reference(y.numpy(), inputs, "fp32", delta_softplus=softplus)


@pytest.mark.parametrize("reverse", [False, True])
def test_float64_stays_float64(reverse: bool) -> None:
    inputs = {name: x.astype(np.float64) for name, x in make_inputs(2, 30, 8, 4, 2).items()}
    y = selective_scan(**as_torch(inputs), reverse=reverse)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), selective_scan_f64(**inputs, reverse=reverse), rtol=1e-12, atol=1e-12)


def test_low_types_are_fp32_inside() -> None:
    """Sums over a long sequence: a bf16 state would have lost a tenth of it."""
    length = 3000
    ones = torch.ones(1, length, 1, dtype=torch.bfloat16)
    step = torch.full_like(ones, 0.01)
    slow = torch.full((1, 1), -1e-6)
    group = torch.ones(1, length, 1, 1, dtype=torch.bfloat16)
    y = selective_scan(ones, step, slow, group, group, delta_softplus=False)
    assert float(y[0, -1, 0]) == pytest.approx(length * float(step[0, 0, 0]), rel=2**-8)


def test_softplus_is_the_identity_above_20() -> None:
    inputs = as_torch(make_inputs(1, 4, 4, 2, optional=()))
    inputs["delta"] = torch.tensor([25.0, 80.0, 100.0, 1e4]).view(1, 4, 1).expand(1, 4, 4).contiguous()
    y = selective_scan(**inputs)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, selective_scan(**inputs, delta_softplus=False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("elements", [1, 200, 500, 10_000])
def test_runs_of_tokens_join_without_a_seam(elements: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference works through runs of tokens: of one, of some with a shorter last run, of all."""
    monkeypatch.setattr("vimdeploy.ops.selective_scan._ELEMENTS", elements)
    inputs = make_inputs(2, 17, 6, 4, 2)
    assert_close_to_reference(
        selective_scan(**as_torch(inputs), reverse=reverse).numpy(), inputs, "fp32", reverse=reverse
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_no_tokens(reverse: bool) -> None:
    inputs = as_torch(make_inputs(2, 0, 4, 3))
    y = selective_scan(**inputs, reverse=reverse)
    assert y.shape == (2, 0, 4) and y.dtype == torch.float32


def test_one_token_is_the_same_from_either_end() -> None:
    inputs = as_torch(make_inputs(2, 1, 4, 3))
    torch.testing.assert_close(selective_scan(**inputs), selective_scan(**inputs, reverse=True), rtol=0, atol=0)


def test_reverse_is_flip_scan_flip() -> None:
    inputs = as_torch(make_inputs(2, 11, 4, 3))
    flipped = {name: x.flip(1) if x.dim() > 2 else x for name, x in inputs.items()}
    want = selective_scan(**flipped).flip(1)
    torch.testing.assert_close(selective_scan(**inputs, reverse=True), want, rtol=1e-6, atol=1e-6)
    assert (selective_scan(**inputs) - want).abs().max() > 0.1, "the direction must matter here"


def test_strided_inputs() -> None:
    """Views of one projection's output, as a mixer passes them."""
    inputs = make_inputs(2, 6, 4, 3)
    tensors = as_torch(inputs)
    both = torch.cat([tensors["u"], tensors["z"]], dim=-1)
    tensors["u"], tensors["z"] = both.chunk(2, dim=-1)
    assert not tensors["z"].is_contiguous()
    y = selective_scan(**tensors)
    assert_close_to_reference(y.numpy(), inputs, "fp32")
    assert y.is_contiguous()


@pytest.mark.parametrize("optional", [(), ALL_OPTIONAL])
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(optional: tuple[str, ...], reverse: bool) -> None:
    """Schema, fake kernel, autograd registration and tracing with symbolic shapes, as torch.library sees them."""
    tensors = as_torch(make_inputs(2, 5, 4, 3, optional=optional))
    args = [tensors.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    args = [x.requires_grad_() if x is not None else None for x in args]
    torch.library.opcheck(selective_scan, (*args, True, reverse))


def test_the_fake_kernel_knows_shape_type_and_device() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = as_torch(make_inputs(2, 5, 8, 3, 2, "bf16"))
    with FakeTensorMode() as mode:
        y = selective_scan(**{name: mode.from_tensor(x) for name, x in tensors.items()})
    assert y.shape == (2, 5, 8) and y.dtype == torch.bfloat16 and y.device.type == "cpu" and y.is_contiguous()


def test_the_fake_kernel_refuses_what_the_real_one_does() -> None:
    tensors = as_torch(make_inputs(2, 5, 8, 3))
    tensors["C"] = tensors["C"][:, :4]
    with torch.device("meta"), pytest.raises(RuntimeError, match="selective_scan: C"):
        selective_scan(**{name: x.to("meta") for name, x in tensors.items()})


def test_exports_with_a_dynamic_length() -> None:
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):  # type: ignore[no-untyped-def]
            return torch.ops.vim.selective_scan(u, delta, A, B, C)

    inputs = as_torch(make_inputs(2, 6, 4, 3, optional=()))
    length = torch.export.Dim("length")
    dynamic = {name: {1: length} if x.dim() > 2 else {} for name, x in inputs.items()}
    program = torch.export.export(Scan(), (), kwargs=inputs, dynamic_shapes=dynamic)
    longer = as_torch(make_inputs(2, 13, 4, 3, optional=()))
    torch.testing.assert_close(program.module()(**longer), selective_scan(**longer), rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("optional", [(), ("D",), ("z", "delta_bias"), ALL_OPTIONAL])
def test_gradients_are_those_of_the_recurrence(optional: tuple[str, ...], reverse: bool) -> None:
    tensors = {name: x.double() for name, x in as_torch(make_inputs(2, 6, 4, 3, 2, optional=optional)).items()}
    mine = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    plain = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    weight = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (selective_scan(**mine, reverse=reverse) * weight).sum().backward()
    (selective_scan_ref(**plain, reverse=reverse) * weight).sum().backward()
    for name in tensors:
        assert plain[name].grad is not None and plain[name].grad.abs().max() > 0, name
        torch.testing.assert_close(mine[name].grad, plain[name].grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool) -> None:
    """Against finite differences, every input, in float64."""
    tensors = {name: x.double().requires_grad_() for name, x in as_torch(make_inputs(1, 4, 2, 2)).items()}

    def f(*values: torch.Tensor) -> torch.Tensor:
        return selective_scan(**dict(zip(tensors, values)), reverse=reverse)

    assert torch.autograd.gradcheck(f, tuple(tensors.values()))


def test_only_what_asks_gets_a_gradient() -> None:
    tensors = as_torch(make_inputs(1, 4, 2, 2))
    tensors["z"].requires_grad_()
    selective_scan(**tensors).sum().backward()
    assert tensors["z"].grad is not None
    assert all(x.grad is None for name, x in tensors.items() if name != "z")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"u": lambda x: x[0]}, "u must be"),
        ({"delta": lambda x: x[:, :-1]}, "delta is"),
        ({"A": lambda x: x[:-1]}, "A must be"),
        ({"A": lambda x: x[0]}, "A must be"),
        ({"A": lambda x: x[:, :-1]}, "B has 3 states, A has 2"),
        ({"B": lambda x: x[:, :, 0]}, "B must be"),
        ({"B": lambda x: x[:1]}, "B is"),
        ({"B": lambda x: x.repeat(1, 1, 3, 1)}, "3 groups do not divide 4 channels"),
        ({"B": lambda x: x[:, :, :0], "C": lambda x: x[:, :, :0]}, "0 groups do not divide 4 channels"),
        ({"C": lambda x: x[..., :-1]}, "C is"),
        ({"C": lambda x: x.half()}, "C is torch.float16, not u's"),
        ({"delta": lambda x: x.double()}, "delta is torch.float64, not u's"),
        ({"z": lambda x: x[..., :-1]}, "z is"),
        ({"z": lambda x: x.bfloat16()}, "z is torch.bfloat16, not u's"),
        ({"D": lambda x: x[:-1]}, "D must be"),
        ({"delta_bias": lambda x: x[None]}, "delta_bias must be"),
    ],
)
def test_refusals_name_the_input(change: dict, message: str) -> None:
    tensors = as_torch(make_inputs(2, 5, 4, 3))
    tensors |= {name: f(tensors[name]) for name, f in change.items()}
    with pytest.raises(RuntimeError, match=f"selective_scan: {message}"):
        selective_scan(**tensors)
