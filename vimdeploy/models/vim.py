"""Vision Mamba (Vim), the reference network: one file, top to bottom, in plain PyTorch on CPU and CUDA.

After "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (Zhu et al., 2024);
the exact mathematics, upstream's quirks included, is vim-spec.md section 3 with the corrections of section 11.

Tensor names and shapes are those of official checkpoints, so `load_state_dict` takes them as they are. Sequences stay
channel-last, (batch, tokens, channels), and no sequence is ever flipped: the backward direction reads the same tokens
with a mirrored convolution and a scan from the last token to the first (vim-spec.md 3.5). What an exporter sees is
therefore already the graph a runtime should run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vimdeploy.models.variants import VimConfig
from vimdeploy.ops.selective_scan import selective_scan


class PatchEmbed(nn.Module):
    """Image to tokens: one convolution, patch by patch, row by row. (B, 3, H, W) -> (B, M, C)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.img_size = config.img_size
        self.proj = nn.Conv2d(config.in_chans, config.d_model, config.patch_size, stride=config.stride)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        if (height, width) != self.img_size:
            raise ValueError(f"this model takes {self.img_size[0]}x{self.img_size[1]} images, got {height}x{width}")
        return self.proj(image).flatten(2).transpose(1, 2)  # (B, C, gh, gw) -> (B, M, C)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the channels, in fp32 whatever comes in (vim-spec.md 7.3)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """The LayerNorm of models trained with rms_norm=False, in fp32 and from plain operators like RMSNorm."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
        return (centred * scale * self.weight + self.bias).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Two-dimensional RoPE of the January 2024 lineage (vim-spec.md 3.4).

    The first half of the channels turns with the patch's row, the second with its column; channels turn in
    neighbouring pairs. An odd sequence is taken to start with a class token, which stays unrotated.
    """

    BASE = 10000.0
    TRAINED_SIDE = 14  # positions are stretched to the 14 x 14 grid of 224 px models

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        half = config.d_model // 2
        frequency = self.BASE ** (-torch.arange(0, half, 2).float() / half)  # (C/4,)
        rows, columns = config.rope_grid
        row, column = ((torch.arange(side) / side * self.TRAINED_SIDE)[:, None] * frequency for side in (rows, columns))
        angle = torch.cat(
            [row[:, None, :].expand(rows, columns, -1), column[None, :, :].expand(rows, columns, -1)], dim=-1
        )
        angle = angle.reshape(rows * columns, half).repeat_interleave(2, dim=-1)  # (M, C)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            return torch.cat([x[:, :1], self._rotate(x[:, 1:])], dim=1)
        return self._rotate(x)

    def _rotate(self, x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # pairs (a, b) -> (-b, a)
        return x * self.freqs_cos + torch.stack([-b, a], dim=-1).flatten(-2) * self.freqs_sin


def causal_conv1d(x: Tensor, taps: Sequence[Tensor], bias: Tensor, reverse: bool = False) -> Tensor:
    """Depthwise convolution over the tokens that sees only the past (`reverse`: only the future).

    x (B, L, E); K taps (E,), the last one on the current token; bias (E,). Written as K shifted products, since
    a channel-last sequence has no convolution operator and a transpose each way costs more than the products.
    """
    length, reach = x.shape[1], len(taps) - 1
    padded = F.pad(x, (0, 0, 0, reach) if reverse else (0, 0, reach, 0))
    out = bias
    for k, tap in enumerate(taps):
        shift = reach - k if reverse else k
        out = out + padded[:, shift : shift + length] * tap
    return out


class Mixer(nn.Module):
    """The bidirectional selective state-space mixer (vim-spec.md 3.3 and 3.4). (B, L, C) -> (B, L, C).

    bimamba "none" scans forward only; "v1" scans backward over the same projections with a second A; "v2", the
    released models, gives each direction its own convolution, projections, A and D.
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.bimamba = config.bimamba
        self.rank, self.d_state = config.rank, config.d_state
        self.divide = config.divide_out and config.bimamba == "v2"  # the flag never reached v1 (vim-spec.md 11.6)
        inner, d_model = config.d_inner, config.d_model

        self.in_proj = nn.Linear(d_model, 2 * inner, bias=config.proj_bias)
        self.out_proj = nn.Linear(inner, d_model, bias=config.proj_bias)
        if config.layer_scale:
            self.gamma = nn.Parameter(torch.ones(d_model))
        for suffix in ("", "_b") if config.bimamba == "v2" else ("",):
            self.add_module(f"conv1d{suffix}", nn.Conv1d(inner, inner, config.d_conv, groups=inner))
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, self.rank + 2 * self.d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(self.rank, inner))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        for name in ("A_log", "A_b_log") if config.bimamba != "none" else ("A_log",):
            # S4D-real initialisation: A_n = -n for each channel.
            self.register_parameter(
                name, nn.Parameter(torch.arange(1.0, self.d_state + 1).log().repeat(inner, 1).contiguous())
            )

    def forward(self, n: Tensor, reverse: bool = False) -> Tensor:
        """`reverse` runs the whole mixer on the mirrored sequence: the second layer of a bidirectional pair."""
        x, z = self.in_proj(n).chunk(2, dim=-1)  # (B, L, E) each
        y = self._direction(x, z, "", "A_log", reverse)
        if self.bimamba == "v1":
            y = y + self._direction(x, z, "", "A_b_log", reverse, scan_reverse=not reverse)
        elif self.bimamba == "v2":
            y = y + self._direction(x, z, "_b", "A_b_log", not reverse)
            if self.divide:
                y = y / 2
        out = self.out_proj(y)
        return out * self.gamma if hasattr(self, "gamma") else out

    def _direction(
        self, x: Tensor, z: Tensor, suffix: str, A_log: str, reverse: bool, scan_reverse: bool | None = None
    ) -> Tensor:
        conv, x_proj, dt_proj = (getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        taps = conv.taps if hasattr(conv, "taps") else conv.weight[:, 0].unbind(-1)  # K times (E,)
        u = F.silu(causal_conv1d(x, taps, conv.bias, reverse))  # (B, L, E)
        dt, B, C = x_proj(u).split([self.rank, self.d_state, self.d_state], dim=-1)
        # dt_proj's bias is added exactly once, inside the scan, before softplus.
        delta = F.linear(dt, dt_proj.weight)
        return selective_scan(
            u,
            delta,
            self.decay_rates(A_log),
            B.unsqueeze(2),
            C.unsqueeze(2),
            getattr(self, "D" + suffix),
            z,
            dt_proj.bias,
            delta_softplus=True,
            reverse=reverse if scan_reverse is None else scan_reverse,
        )

    def decay_rates(self, name: str) -> Tensor:
        """A = -exp(A_log), (E, N), always negative; precomputed after `freeze`."""
        frozen = getattr(self, name.removesuffix("_log"), None)
        return frozen if frozen is not None else -torch.exp(getattr(self, name).float())

    @torch.no_grad()
    def freeze(self) -> None:
        """Fold what inference need not recompute: A in fp32, the conv taps, the halving and layer scale into out_proj.

        The halving is exact (a power of two). Irreversible: for deployment, not for training.
        """
        for name in ("A_log", "A_b_log"):
            if hasattr(self, name):
                self.register_buffer(name.removesuffix("_log"), self.decay_rates(name).detach().clone())
                delattr(self, name)
        for name in ("conv1d", "conv1d_b"):
            if hasattr(self, name):
                conv = getattr(self, name)
                conv.taps = nn.ParameterList(tap.contiguous() for tap in conv.weight[:, 0].unbind(-1))
                del conv.weight
        scale = self.gamma if hasattr(self, "gamma") else self.out_proj.weight.new_ones(1)
        self.out_proj.weight.mul_(scale[:, None] * (0.5 if self.divide else 1.0))
        if self.out_proj.bias is not None:
            self.out_proj.bias.mul_(scale)
        self.divide = False
        if hasattr(self, "gamma"):
            del self.gamma


class Block(nn.Module):
    """Add, norm, mixer: r <- r + h, h <- mixer(norm(r)). What it returns as h is not yet added to the stream."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = (RMSNorm if config.rms_norm else LayerNorm)(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, h: Tensor, r: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        r = h if r is None else r + h
        return self.mixer(self.norm(r), reverse), r


class Vim(nn.Module):
    """A Vision Mamba classifier, or backbone when num_classes is 0.

    forward: images (B, in_chans, H, W), normalised, H x W exactly config.img_size -> logits (B, num_classes).
    Raises VariantError for a configuration that cannot be built, ValueError for images of another size.
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config.validate()
        d_model = config.d_model
        self.patch_embed = PatchEmbed(config)
        for name in self._cls_names():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, d_model)))
        if config.abs_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.seq_len, d_model))
        if config.rope:
            self.rope = RotaryEmbedding(config)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm_f = (RMSNorm if config.rms_norm else LayerNorm)(d_model, config.norm_eps)
        self.head = nn.Linear(d_model, config.num_classes) if config.num_classes else nn.Identity()
        self.reset_parameters()

    def _cls_names(self) -> tuple[str, ...]:
        position = self.config.cls_position
        return {"none": (), "double": ("cls_token_head", "cls_token_tail")}.get(position, ("cls_token",))

    def tokens(self, image: Tensor) -> Tensor:
        """Patches, class token, position: (B, 3, H, W) -> (B, L, C)."""
        x = self.patch_embed(image)  # (B, M, C)
        cls = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self._cls_names()]
        if self.config.cls_position == "double":
            x = torch.cat([cls[0], x, cls[1]], dim=1)
        elif cls:
            (p,) = self.config.cls_index
            parts = [part for part in (x[:, :p], cls[0], x[:, p:]) if part.shape[1]]
            x = torch.cat(parts, dim=1)
        return x + self.pos_embed if self.config.abs_pos_embed else x

    def stream(self, x: Tensor) -> Tensor:
        """All blocks and the last norm: (B, L, C) -> (B, L, C)."""
        h, r = x, None
        step = 2 if self.config.bidirectional else 1
        for i in range(0, self.config.blocks_run, step):
            if self.config.rope:
                h = self.rope(h)
                if r is not None and self.config.rope_residual:
                    r = self.rope(r)
            if self.config.bidirectional:
                # Both halves of a pair add h to the same r, so the residual doubles: upstream's behaviour, kept.
                forward, r_forward = self.layers[i](h, r)
                backward, r_backward = self.layers[i + 1](h, r, reverse=True)
                h, r = forward + backward, r_forward + r_backward
            else:
                h, r = self.layers[i](h, r)
        return self.norm_f(h if r is None else r + h)

    def pool(self, y: Tensor) -> Tensor:
        """What the head reads: (B, L, C) -> (B, C), or all tokens for pool max and all without a class token."""
        index = self.config.cls_index
        if len(index) == 2:
            return (y[:, index[0]] + y[:, index[1]]) / 2
        if index:
            return y[:, index[0]]
        if self.config.pool == "last":
            return y[:, -1]
        return y.mean(dim=1) if self.config.pool == "mean" else y

    def token_map(self, image: Tensor) -> Tensor:
        """Normalised patch tokens as a map, class tokens left out: (B, 3, H, W) -> (B, C, gh, gw)."""
        y = self.stream(self.tokens(image))
        position, m = self.config.cls_position, self.config.num_patches
        if position == "middle":
            y = torch.cat([y[:, : m // 2], y[:, m // 2 + 1 :]], dim=1)
        elif position in ("head", "double"):
            y = y[:, 1 : m + 1]
        elif position == "tail":
            y = y[:, :m]
        return y.transpose(1, 2).unflatten(2, self.config.grid)

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor:
        features = self.pool(self.stream(self.tokens(image)))
        if return_features:
            return features
        logits = self.head(features)
        if not self.config.cls_index and self.config.pool == "max":
            logits = logits.max(dim=1).values
        return logits

    def freeze(self) -> Vim:
        """Fold constants for deployment, in place (see Mixer.freeze); returns self in eval mode."""
        for layer in self.layers:
            layer.mixer.freeze()
        return self.eval()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as upstream does: truncated normals outside, Mamba's scheme inside the mixers."""
        for name in (*self._cls_names(), *(("pos_embed",) if self.config.abs_pos_embed else ())):
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        patch = self.patch_embed.proj
        bound = 1 / math.sqrt(patch.weight[0].numel())
        nn.init.trunc_normal_(patch.weight, std=bound, a=-2 * bound, b=2 * bound)
        nn.init.zeros_(patch.bias)
        if self.config.num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for layer in self.layers:
            mixer = layer.mixer
            mixer.out_proj.weight.div_(math.sqrt(self.config.depth))
            for suffix in ("", "_b") if mixer.bimamba == "v2" else ("",):
                dt_proj = getattr(mixer, f"dt_proj{suffix}")
                nn.init.uniform_(dt_proj.weight, -(mixer.rank**-0.5), mixer.rank**-0.5)
                # softplus(bias) is log-uniform in [0.001, 0.1].
                dt = torch.exp(torch.rand_like(dt_proj.bias) * math.log(100) + math.log(1e-3)).clamp(min=1e-4)
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
