"""A Vim for the GPU: the reference network's weights, vimdeploy's CUDA kernels, cuBLAS for the rest, one CUDA graph.

What `vim.py` says in many operators is here, for each layer,

    r += h, n = norm(r)     ->  xz = n W_in  ->  u = conv both ways  ->  rows = u W_x  ->  delta = dt W_dt
    ->  y = both scans, summed, gated  ->  h = y W_out

six or seven launches, no flips, no copies. The residual stream r is fp32, everything else of one type. All of a
batch's intermediate tensors lie in three regions of one arena, each taken over by the next tensor as soon as the last
one's reader is done: that, and not the number of layers, is the memory a batch takes.

    region 1    patches -> xz, whose x half becomes y
    region 2    h -> u (both directions)
    region 3    n -> delta (both directions)

The network in `vim.py` is the oracle (tests/models/test_fused.py); this file has no arithmetic of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vimdeploy.errors import UsageError, VariantError
from vimdeploy.models.variants import VimConfig
from vimdeploy.models.vim import Vim
from vimdeploy.ops.native import Kernels, Pair

OUTPUTS = ("logits", "features", "tokens")
#: Below this many multiplications a direction, x_proj and dt_proj are one product with the multiplied-out matrix: it
#: has more work than the two (D x D in place of two thin ones), and at such sizes a launch costs more than the work.
MERGE_BELOW = 2e8
_ALIGN = 256  # bytes; what cuBLAS and vector loads like


def refusal(config: VimConfig) -> str | None:
    """Why `FusedVim` does not serve a configuration; None when it does."""
    if config.bimamba != "v2":
        return f"its layers scan as bimamba {config.bimamba}, not v2"
    if config.bidirectional:
        return "its layers come in forward-backward pairs"
    if config.rope:
        return "it rotates its tokens (RoPE)"
    if not config.rms_norm:
        return "it has LayerNorm, not RMSNorm"
    return None


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices are (out, in) of the network's type, of two directions (2, out, in); the rest is fp32."""

    norm: Tensor  # (C,)
    in_proj: Tensor  # (2D, C)
    in_bias: Tensor | None
    taps: Pair  # (K, D) each
    conv_bias: Pair  # (D,) each
    x_proj: Tensor  # (2, R + 2N, D), the R rows of dt padded to a multiple of 8
    dt_proj: Tensor  # (2, D, R)
    merged: Tensor | None  # (2, D + 2N, D): dt_proj multiplied into x_proj
    A: Pair  # (D, N) each
    D: Pair  # (D,) each
    dt_bias: Pair  # (D,) each
    out_proj: Tensor  # (C, D), the halving and layer scale inside
    out_bias: Tensor | None


class FusedVim:
    """The network of `model` on `device`, in `dtype` (fp16, bf16 or fp32) but for its residual stream and norms.

    ``output``: "logits" (B, classes), "features" (B, C) or "tokens" (B, C, gh, gw), returned as fp32.
    ``cuda_graph``: record each batch size once and replay it (CUDA only). ``images_per_pass``: a larger batch goes
    through in parts of so many images, which bounds the memory. ``streams``: the images of a pass are shared among so
    many streams, so that the scans of some, which are bound by arithmetic, run beside the products, convolutions and
    norms of others, which are bound by memory. ``merge``: x_proj and dt_proj as one product; None decides by size. The
    weights are copied; `model` stays as it is.

    Not for use from several threads at once, nor on several streams: batches share one arena. Raises VariantError for
    a configuration that `refusal` names.
    """

    def __init__(
        self,
        model: Vim,
        kernels: Kernels,
        *,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cuda",
        output: str = "logits",
        cuda_graph: bool = True,
        images_per_pass: int | None = None,
        streams: int = 1,
        merge: bool | None = None,
    ) -> None:
        why = refusal(model.config)
        if why is not None:
            raise VariantError(f"the fused network does not serve this model: {why}", hint="run the ONNX file")
        if output not in OUTPUTS or (output == "logits" and not model.config.num_classes):
            raise UsageError(f"this model has no output {output!r}", hint="choose logits, features or tokens")
        if images_per_pass is not None and images_per_pass < 1:
            raise UsageError(f"a pass takes at least 1 image, not {images_per_pass}")
        if streams < 1:
            raise UsageError(f"the work takes at least 1 stream, not {streams}")
        self.config, self.output, self.dtype = model.config, output, dtype
        self.device = torch.device(device)
        self._kernels, self._merge, self._images_per_pass = kernels, merge, images_per_pass
        self._cuda_graph = cuda_graph and self.device.type == "cuda"
        self._rank = -(-model.config.rank // 8) * 8
        frozen = copy.deepcopy(model).cpu().float()
        if not hasattr(frozen.layers[0].mixer.conv1d, "taps"):  # freezing is once for all
            frozen.freeze()
        with torch.no_grad():
            self._take(frozen)
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._passes: dict[int, _Pass] = {}
        on_card = self.device.type == "cuda"
        self._share = streams
        self._forks = [torch.cuda.Stream(self.device) if on_card else None for _ in range(streams - 1)]
        self._stream = torch.cuda.Stream(self.device) if self._cuda_graph else None
        self._graph_pool = torch.cuda.graph_pool_handle() if self._cuda_graph else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) of any float type on this device -> the output, a tensor of the caller's own.

        Enqueued on torch's current stream. Raises UsageError for images of another size or on another device.
        """
        config = self.config
        wanted = (config.in_chans, *config.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted or not len(images):
            raise UsageError(f"the model takes images (B, {', '.join(map(str, wanted))}), not {tuple(images.shape)}")
        if images.device.type != self.device.type:
            raise UsageError(f"the images are on {images.device}, the model on {self.device}", hint="move them there")
        parts = images.split(self._images_per_pass or len(images))
        results = [self._once(part).to(torch.float32, copy=True) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        held = [*_tensors(self.__dict__.values()), *_tensors(v for w in self._layers for v in w.__dict__.values())]
        return sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in held if t is not self._arena}.values())

    def arena_bytes(self) -> int:
        """Bytes of the intermediate tensors of the largest batch so far."""
        return self._arena.nbytes

    # Weights.

    def _take(self, model: Vim) -> None:
        config = self.config

        def low(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, self.dtype).contiguous()

        def fp32(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, torch.float32).contiguous()

        patch = model.patch_embed.proj
        self._patch = low(patch.weight.flatten(1))  # (C, in_chans * p * p)
        # What the residual stream starts from: position, class token, and the patches' bias; their products are h.
        start = torch.zeros(config.seq_len, config.d_model)
        start += patch.bias
        # A class token has no patch, so no bias.
        for index, name in zip(config.cls_index, model._cls_names()):
            start[index] = getattr(model, name)[0, 0]
        if config.abs_pos_embed:
            start += model.pos_embed[0]
        self._start = fp32(start)  # (L, C)
        self._norm = fp32(model.norm_f.weight)
        if config.num_classes:
            self._head, self._head_bias = low(model.head.weight), low(model.head.bias)
        self._layers = [self._layer_weights(layer, low, fp32) for layer in model.layers[: config.blocks_run]]

    def _layer_weights(self, layer: Any, low: Any, fp32: Any) -> LayerWeights:
        mixer, rank = layer.mixer, self.config.rank
        x_proj, dt_proj, merged = [], [], []
        for suffix in ("", "_b"):
            x, dt = getattr(mixer, f"x_proj{suffix}").weight, getattr(mixer, f"dt_proj{suffix}").weight
            spare = self._rank - rank  # rows and columns of zeros: aligned rows, the same product
            x_proj.append(torch.cat([F.pad(x[:rank], (0, 0, 0, spare)), x[rank:]]))
            dt_proj.append(F.pad(dt, (0, spare)))
            if self._merges(1):  # the smallest batch
                merged.append(torch.cat([(dt.double() @ x[:rank].double()).float(), x[rank:]]))

        def pair(name: str) -> Pair:
            return fp32(getattr(mixer, name)), fp32(getattr(mixer, name + "_b"))

        def of(module: str, part: str) -> Pair:
            return tuple(fp32(getattr(getattr(mixer, module + s), part)) for s in ("", "_b"))  # type: ignore[return-value]

        taps = tuple(fp32(torch.stack(list(getattr(mixer, f"conv1d{s}").taps))) for s in ("", "_b"))
        return LayerWeights(
            norm=fp32(layer.norm.weight),
            in_proj=low(mixer.in_proj.weight),
            in_bias=None if mixer.in_proj.bias is None else low(mixer.in_proj.bias),
            taps=(taps[0], taps[1]),
            conv_bias=of("conv1d", "bias"),
            x_proj=low(torch.stack(x_proj)),
            dt_proj=low(torch.stack(dt_proj)),
            merged=low(torch.stack(merged)) if merged else None,
            A=(fp32(mixer.decay_rates("A_log")), fp32(mixer.decay_rates("A_b_log"))),
            D=pair("D"),
            dt_bias=of("dt_proj", "bias"),
            out_proj=low(mixer.out_proj.weight),
            out_bias=None if mixer.out_proj.bias is None else low(mixer.out_proj.bias),
        )

    def _merges(self, batch: int) -> bool:
        """Whether a pass of that batch multiplies with `merged`."""
        if self._merge is not None:
            return self._merge
        return batch * self.config.seq_len * self.config.d_inner**2 <= MERGE_BELOW

    # One pass over a batch.

    def _once(self, images: Tensor) -> Tensor:
        """The output of one pass, in memory that the next pass overwrites."""
        one = self._pass(len(images))
        # Outside the graph, so that the images are read where they are.
        for share, part in zip(one.shares, images.split([share.batch for share in one.shares])):
            share.patches.copy_(self._patches_of(part))
        if one.graph is not None:
            one.graph.replay()
        else:
            self._run(one)
        return one.output

    def _patches_of(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, gh, gw, in_chans, p, p), a view."""
        config = self.config
        windows = images.unfold(2, config.patch_size, config.stride).unfold(3, config.patch_size, config.stride)
        return windows.permute(0, 2, 3, 1, 4, 5)

    def _pass(self, batch: int) -> _Pass:
        if batch not in self._passes:
            count = min(self._share, batch)
            sizes = [batch // count + (i < batch % count) for i in range(count)]
            needs = [sum(self._regions(size)) for size in sizes]
            if sum(needs) > self._arena.nbytes:
                # Graphs hold addresses in the arena: they go with it.
                self._passes.clear()
                self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
                self._arena = torch.empty(sum(needs), dtype=torch.uint8, device=self.device)
            output = torch.empty(self._output_shape(batch), dtype=self.dtype, device=self.device)
            arenas = self._arena[: sum(needs)].split(needs)
            shares = [
                _Share(self.config, size, self.dtype, self._rank, self._merges(size), self._regions(size), arena, part)
                for size, arena, part in zip(sizes, arenas, output.split(sizes))
            ]
            one = _Pass(shares, output)
            if self._cuda_graph:
                self._record(one)
            self._passes[batch] = one
        return self._passes[batch]

    def _regions(self, batch: int) -> tuple[int, ...]:
        return _Share.regions(self.config, batch, self.dtype, self._rank, self._merges(batch))

    def _run(self, one: _Pass) -> None:
        """Every share on its own stream, from the current one and back to it."""
        forks = self._forks[: len(one.shares) - 1]
        for fork, share in zip(forks, one.shares[1:]):
            if fork is None:
                self._forward(share)
                continue
            fork.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(fork):
                self._forward(share)
        self._forward(one.shares[0])
        for fork in forks:
            if fork is not None:
                torch.cuda.current_stream(self.device).wait_stream(fork)

    def _record(self, one: _Pass) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._run(one)  # once outside: cuBLAS sets itself up on the first call
        graph = torch.cuda.CUDAGraph()
        # The graph keeps the addresses of cuBLAS's workspaces, so it needs its own: whoever clears the common ones
        # (torch.compile does) would leave it writing into memory that is someone else's by then.
        _clear_workspaces()
        with torch.cuda.graph(graph, pool=self._graph_pool, stream=self._stream, capture_error_mode="thread_local"):
            self._run(one)
        _clear_workspaces()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        one.graph = graph

    def _output_shape(self, batch: int) -> tuple[int, ...]:
        config = self.config
        unpooled = not config.cls_index and config.pool in ("max", "all")
        length = (config.seq_len,) if unpooled else ()
        if self.output == "tokens":
            return (batch, config.d_model, *config.grid)
        if self.output == "features":
            return (batch, *length, config.d_model)
        return (batch, *(length if config.pool == "all" else ()), config.num_classes)

    def _forward(self, one: _Share) -> None:
        """From the patches to the output."""
        config = self.config
        self._embed(one)
        *layers, last = self._layers
        for w in layers:
            self._layer(w, one)
        index = config.cls_index
        if self.output != "tokens" and len(index) == 1:
            self._last_layer(last, one, index[0])
            return
        self._layer(last, one)
        self._kernels.add_rms_norm(one.h, one.r, self._norm, config.norm_eps, n=one.n, r_out=one.r)
        y = one.n.view(one.batch, config.seq_len, config.d_model)
        if self.output == "tokens":
            keep = [i for i in range(config.seq_len) if i not in index]
            parts = [y[:, first : last + 1] for first, last in _runs(keep)]
            y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            one.output.copy_(y.transpose(1, 2).unflatten(2, config.grid))
            return
        features = self._pool(y)
        self._finish(features, one)

    def _pool(self, y: Tensor) -> Tensor:
        config, index = self.config, self.config.cls_index
        if len(index) == 2:
            return (y[:, index[0]] + y[:, index[1]]) / 2
        if config.pool == "last":
            return y[:, -1]
        return y.mean(dim=1) if config.pool == "mean" else y

    def _finish(self, features: Tensor, one: _Share) -> None:
        """The head, where there is one to read: features (..., C) of T."""
        if self.output == "logits":
            features = F.linear(features, self._head, self._head_bias)
            if not self.config.cls_index and self.config.pool == "max":
                features = features.max(dim=1).values
        one.output.copy_(features)

    def _embed(self, one: _Share) -> None:
        """Patches to h, and r to what it starts from; h is 0 at the class tokens."""
        config = self.config
        torch.mm(one.patches.view(-1, self._patch.shape[1]), self._patch.t(), out=one.embedded.flatten(0, 1))
        h = one.h.view(one.batch, config.seq_len, config.d_model)
        at = 0
        for index in (*config.cls_index, config.seq_len):
            start = at + sum(i < index for i in config.cls_index)
            if index > start:
                h[:, start:index].copy_(one.embedded[:, at : at + index - start])
                at += index - start
            if index < config.seq_len:
                h[:, index].zero_()
        r = one.r.view(one.batch, config.seq_len, config.d_model)
        r.copy_(self._start.expand_as(r))

    def _layer(self, w: LayerWeights, one: _Share) -> None:
        config, kernels = self.config, self._kernels
        kernels.add_rms_norm(one.h, one.r, w.norm, config.norm_eps, n=one.n, r_out=one.r)
        _product(one.n, w.in_proj, w.in_bias, one.xz)
        kernels.bi_causal_conv1d(one.x, w.taps, w.conv_bias, out=one.u)
        self._project(w, one)
        # x has been read, so its place is y's.
        kernels.bi_selective_scan(one.u, one.delta, w.A, one.B, one.C, w.D, one.z, w.dt_bias, out=one.x)
        _product(one.x.flatten(0, 1), w.out_proj, w.out_bias, one.h)

    def _project(self, w: LayerWeights, one: _Share) -> None:
        """u -> delta, B and C of both directions."""
        weight = w.x_proj
        if one.merged:
            assert w.merged is not None
            weight = w.merged
        torch.bmm(one.both_u, weight.transpose(1, 2), out=one.rows)
        if not one.merged:
            torch.bmm(one.rows[..., : self._rank], w.dt_proj.transpose(1, 2), out=one.both_delta)

    def _last_layer(self, w: LayerWeights, one: _Share, p: int) -> None:
        """The last layer and what follows, for the one token `p` that the head reads.

        Each direction then ends at p: the forward one needs the tokens up to it, the backward one those from it on,
        and z, out_proj and the norm only itself. Where launches are what costs, the scans stay whole and in one launch.
        """
        config, kernels = self.config, self._kernels
        batch, length, inner = one.batch, config.seq_len, config.d_inner
        kernels.add_rms_norm(one.h, one.r, w.norm, config.norm_eps, n=one.n, r_out=one.r)
        if one.merged:
            _product(one.n, w.in_proj, w.in_bias, one.xz)
            kernels.bi_causal_conv1d(one.x, w.taps, w.conv_bias, out=one.u)
            self._project(w, one)
            kernels.bi_selective_scan(one.u, one.delta, w.A, one.B, one.C, w.D, one.z, w.dt_bias, out=one.x)
            y = one.x[:, p]
        else:
            bias_x, bias_z = (None, None) if w.in_bias is None else w.in_bias.chunk(2)
            z = F.linear(one.n.view(batch, length, -1)[:, p], w.in_proj[inner:], bias_z)  # (B, D)
            _product(one.n, w.in_proj[:inner], bias_x, one.x_alone.flatten(0, 1))
            kernels.bi_causal_conv1d(one.x_alone, w.taps, w.conv_bias, out=one.u)
            ends = []
            for i, tokens in enumerate((slice(0, p + 1), slice(p, length))):
                u = one.u[i][:, tokens]
                count = u.shape[1]
                rows = one.part(3, (batch, count, w.x_proj.shape[1]))
                torch.bmm(u, w.x_proj[i].t().expand(batch, -1, -1), out=rows)
                delta, y = one.part(2, (batch, count, inner)), one.part(0, (batch, count, inner))
                torch.bmm(rows[..., : self._rank], w.dt_proj[i].t().expand(batch, -1, -1), out=delta)
                B, C = rows[..., self._rank :].chunk(2, dim=-1)
                kernels.selective_scan(u, delta, w.A[i], B, C, w.D[i], w.dt_bias[i], out=y, reverse=bool(i))
                ends.append(y[:, 0 if i else -1].to(torch.float32, copy=True))  # y's place is needed again
            y = ((ends[0] + ends[1]) * F.silu(z.float())).to(self.dtype)
        h = F.linear(y, w.out_proj, w.out_bias)  # (B, C)
        r = one.r.view(batch, length, -1)[:, p].contiguous()
        kernels.add_rms_norm(h, r, self._norm, config.norm_eps, n=one.n[:batch], r_out=r)
        self._finish(one.n[:batch], one)


@dataclass
class _Pass:
    """One batch size: how its images are shared among streams, its output (B, ...), its graph."""

    shares: list[_Share]
    output: Tensor
    graph: Any = None


class _Share:
    """Some images of a pass: their tensors in a part of the arena, and their part of the output."""

    def __init__(
        self,
        config: VimConfig,
        batch: int,
        dtype: torch.dtype,
        rank: int,
        merged: bool,
        sizes: tuple[int, ...],
        arena: Tensor,
        output: Tensor,
    ) -> None:
        self.batch, self.merged, self.output, self._dtype = batch, merged, output, dtype
        length, model, inner, states = config.seq_len, config.d_model, config.d_inner, config.d_state
        rows = batch * length
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._regions = [arena[start : start + size] for start, size in zip(starts, sizes)]

        patch = config.patch_size
        self.patches = self.part(0, (batch, *config.grid, config.in_chans, patch, patch))
        self.embedded = self.part(2, (batch, config.num_patches, model))
        self.xz = self.part(0, (rows, 2 * inner))
        both = self.xz.view(batch, length, 2 * inner)
        self.x, self.z = both[..., :inner], both[..., inner:]
        self.x_alone = self.part(0, (batch, length, inner))
        self.h = self.part(1, (rows, model))
        self.both_u = self.part(1, (2, rows, inner))
        self.u = _directions(self.both_u, batch)
        self.n = self.part(2, (rows, model))
        if merged:
            self.rows = self.part(2, (2, rows, inner + 2 * states))
            self.delta = _directions(self.rows[..., :inner], batch)
        else:
            self.rows = self.part(3, (2, rows, rank + 2 * states))
            self.both_delta = self.part(2, (2, rows, inner))
            self.delta = _directions(self.both_delta, batch)
        tail = _directions(self.rows[..., -2 * states :], batch)
        self.B: Pair = (tail[0][..., :states], tail[1][..., :states])
        self.C: Pair = (tail[0][..., states:], tail[1][..., states:])
        self.r = self._regions[4][: rows * model * 4].view(torch.float32).view(rows, model)

    @staticmethod
    def regions(config: VimConfig, batch: int, dtype: torch.dtype, rank: int, merged: bool) -> tuple[int, ...]:
        """Bytes of the regions: 1 to 3 of the module's text, x_proj's rows, r."""
        length, model, inner, states = config.seq_len, config.d_model, config.d_inner, config.d_state
        rows = batch * length
        element = torch.empty((), dtype=dtype).element_size()
        width = inner + 2 * states if merged else inner
        patches = batch * config.num_patches * config.in_chans * config.patch_size**2
        elements = (
            max(patches, 2 * rows * inner),
            max(rows * model, 2 * rows * inner),
            max(rows * model, 2 * rows * width),
            0 if merged else 2 * rows * (rank + 2 * states),
        )
        return (*(_aligned(count * element) for count in elements), _aligned(rows * model * 4))

    def part(self, region: int, shape: tuple[int, ...]) -> Tensor:
        count = 1
        for side in shape:
            count *= side
        return self._regions[region].view(self._dtype)[:count].view(shape)


def _directions(pair: Tensor, batch: int) -> Pair:
    """(2, B * L, X) -> two of (B, L, X)."""
    forward, backward = pair.unflatten(1, (batch, -1)).unbind(0)
    return forward, backward


def _clear_workspaces() -> None:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, of matrices."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, last) of each run without gaps."""
    first = numbers[0]
    for a, b in zip(numbers, [*numbers[1:], -1]):
        if b != a + 1:
            yield first, a
            first = b


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
