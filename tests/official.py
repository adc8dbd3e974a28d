"""Checkpoints laid out as upstream's training script writes them (vim-spec.md 2.1), with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimdeploy.models.variants import VimConfig
from vimdeploy.models.vim import Vim

# Small, and in upstream's grammar, so that args.model says what tensors cannot.
SMALL = VimConfig(d_model=32, depth=2, img_size=(32, 32), patch_size=8, stride=8, num_classes=5, d_state=4)
SMALL_NAME = "vim_micro_patch8_32_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def random_model(config: VimConfig, seed: int = 0, steady: bool = False) -> Vim:
    """A model in eval mode whose every tensor matters to the logits, which freshly initialised ones do not do.

    At initialisation steps are so small that the scan's state adds less than fp32 resolves: a model without its
    backward scan would pass for a whole one. Through 24 layers these weights amplify every rounding: plain fp16 is 3e-2
    off in Vim-Ti, and no runtime's own faults could be told from that. `steady` ones lose 1.5e-3, as trained networks
    do, and half as much decay again still moves the logits by 2e-2.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Vim(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                if name.endswith(("A_log", "A_b_log")):
                    parameter.add_(noise * 0.2)
                elif name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
                    parameter.copy_(noise * 0.5 - 1)  # steps of about 0.3
                elif "norm" in name or name.endswith((".D", ".D_b", "gamma")):
                    parameter.copy_(1 + noise * 0.2)
                elif parameter.dim() < 2 or "token" in name or name == "pos_embed":
                    parameter.copy_(noise * 0.2)
                elif "mixer" in name and "conv1d" not in name:
                    gain = 1.5 if not steady else 0.5 if "out_proj" in name else 1.0
                    parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
                elif name == "head.weight":
                    parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model.eval()


def official_content(
    config: VimConfig,
    name: str | None,
    *,
    ema: bool = True,
    optimizer: bool = True,
    seed: int = 0,
    steady: bool = False,
) -> dict[str, Any]:
    """What torch.save gets: the weights, their moving average (one per cent smaller), and the training's state."""
    weights = {key: tensor.clone() for key, tensor in random_model(config, seed, steady).state_dict().items()}
    arguments = argparse.Namespace(
        input_size=config.img_size[0], epochs=300, data_set="IMNET", data_path="/data/imagenet"
    )
    if name is not None:
        arguments.model = name
    content: dict[str, Any] = {"model": weights, "epoch": 299, "scaler": "none", "args": arguments}
    content["lr_scheduler"] = {"base_values": [1e-3]}
    if ema:
        content["model_ema"] = {key: scaled(key, tensor) for key, tensor in weights.items()}
    if optimizer:
        moments = {i: {"step": 7, "exp_avg": t * 0, "exp_avg_sq": t * 0} for i, t in enumerate(weights.values())}
        content["optimizer"] = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}
    return content


def scaled(key: str, tensor: Tensor) -> Tensor:
    return tensor.clone() if key.startswith("rope.") else tensor * 0.99


def write_official(
    path: Path, config: VimConfig, name: str | None, *, ema: bool = True, optimizer: bool = True, seed: int = 0
) -> Path:
    """Write an official-layout checkpoint of `config` with args.model = `name` (None: not said); returns its path."""
    torch.save(official_content(config, name, ema=ema, optimizer=optimizer, seed=seed), path)
    return path


def write_small(path: Path, **options: Any) -> Path:
    """The small model of most tests."""
    return write_official(path, SMALL, SMALL_NAME, **options)
