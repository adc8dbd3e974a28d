"""From a checkpoint to the network with its weights, or to a smaller file."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimdeploy.bundle import ModelInfo, replacing_file
from vimdeploy.errors import CheckpointError, ModelFileError, UsageError, VariantError, VimDeployError
from vimdeploy.models.checkpoints import META, Checkpoint, printable, read_checkpoint
from vimdeploy.models.recognise import Recognition, recognise, size_text
from vimdeploy.models.resize import resize_pos_embed
from vimdeploy.models.variants import VimConfig, settings_of
from vimdeploy.models.vim import RotaryEmbedding, Vim


@dataclass(frozen=True)
class Slimmed:
    """What `slim` wrote: the file, and the sizes in bytes of the file read and the file written."""

    path: Path
    before: int
    after: int
    recognition: Recognition


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    weights: str = "model",
    variant: str | None = None,
    img_size: tuple[int, int] | int | None = None,
    pos_embed_mode: str = "layout",
) -> tuple[Vim, Recognition]:
    """The network with its weights, strictly loaded, in fp32 on the CPU, in eval mode; and how it was recognised.

    `img_size` (pixels; a pair is height, width) builds it for other images: the position table is resized
    (`resize_pos_embed`), RoPE tables are recomputed, and Recognition.config is the resized one. Raises as
    `read_checkpoint` and `recognise` do; CheckpointError for missing, unexpected or non-finite tensors; VariantError
    for an image size smaller than a patch or off the stride.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    recognition = recognise(checkpoint, variant, weights)
    state = _strict(checkpoint, recognition, weights)
    old, how = recognition.config, list(recognition.how)
    dtypes = checkpoint.dtypes(weights)
    if dtypes != ("float32",):
        how.append(f"weights stored as {', '.join(dtypes)}, loaded as float32")
    # A copy: tensors mapped from disk would change, or vanish, with the file.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    config = old
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        config = old.replace(img_size=size).validate()
        _check_stride(config)
    if config.grid != old.grid and config.abs_pos_embed:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old, config, pos_embed_mode)
        how.append(
            f"pos_embed resized from {size_text(old.grid)} to {size_text(config.grid)} patches ({pos_embed_mode} mode)"
        )
    if config.img_size != old.img_size and config.rope:
        state |= {f"rope.{name}": table for name, table in RotaryEmbedding(config).state_dict().items()}
        how.append("RoPE tables recomputed")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = Vim(config)
    model.load_state_dict(state, strict=True, assign=True)
    resized_from = old.img_size if config.img_size != old.img_size else None
    recognition = dataclasses.replace(recognition, config=config, how=tuple(how), resized_from=resized_from)
    return model.eval(), recognition


def load_exported(info: ModelInfo, artifact: Path, checkpoint: Checkpoint | Path | str) -> Vim:
    """The network `artifact` was exported from, read anew. Raises ModelFileError when it is of another checkpoint."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    if checkpoint.sha256 != info.checkpoint_sha256:
        raise ModelFileError(
            f"{artifact} was not exported from {checkpoint.path} (the checkpoint's SHA-256 differs)",
            hint="name the checkpoint it came from, or export again",
        )
    model, _ = load_model(
        checkpoint,
        weights=info.weights,
        variant=settings_of(info.config.replace(img_size=info.trained_size)),
        img_size=info.config.img_size,
        pos_embed_mode=info.pos_embed_mode,
    )
    return model


def _check_stride(config: VimConfig) -> None:
    for side in config.img_size:
        over = (side - config.patch_size) % config.stride
        if over:
            raise VariantError(
                f"image size {size_text(config.img_size)} does not fit patches of {config.patch_size} px every "
                f"{config.stride} px: {over} px of {side} would be left out",
                hint=f"take {side - over} or {side - over + config.stride} instead of {side}",
            )


def _strict(checkpoint: Checkpoint, recognition: Recognition, weights: str) -> dict[str, Tensor]:
    """The state dict, complete and finite. Raises CheckpointError naming what is not."""
    state = checkpoint.state(weights)
    for names, words in ((recognition.missing, "lacks"), (recognition.unknown, "has, and the network has not,")):
        if names:
            shown = ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
            hint = "save the whole state dict of the model, not a part of it"
            if words != "lacks":
                dense = any(name.split(".")[0].endswith("_head") or name.startswith("fpn") for name in names)
                hint = "it looks like a segmentation or detection model; " if dense else ""
                hint += "`vimdeploy inspect` lists them; save a checkpoint without them"
            raise CheckpointError(f"{checkpoint.path} {words} {len(names)} tensors: {shown}", hint=hint)
    bad = non_finite(state)
    if bad:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {bad[0]} holds NaN or Inf"
            + (f", and {len(bad) - 1} others" if bad[1:] else ""),
            hint="the training diverged: take an earlier checkpoint"
            + (", or --weights ema" if weights == "model" and "ema" in checkpoint.weights else ""),
        )
    return state


def non_finite(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the floating-point tensors that hold NaN or Inf, or would in fp32."""
    # The extremes carry NaN along, and finding them is ten times as fast as asking each element.
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    extremes = {name: torch.stack(torch.aminmax(tensor.float())) for name, tensor in floats.items()}
    return tuple(name for name, pair in extremes.items() if not bool(torch.isfinite(pair).all()))


def slim(checkpoint: Checkpoint | Path | str, out: Path, weights: str = "model", variant: str | None = None) -> Slimmed:
    """Write one set of weights, in its dtype, to the safetensors file `out`, with what was recognised in its metadata.

    Nothing is left at `out` when it fails. Raises as `load_model` does, UsageError when `out` is the checkpoint
    itself or a folder.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint=f"-o {out / (checkpoint.path.stem + '.safetensors')}")
    if out.exists() and out.samefile(checkpoint.path):
        raise UsageError(f"{out} is the checkpoint itself; it is not overwritten", hint="name another file with -o")
    recognition = recognise(checkpoint, variant, weights)
    state = _strict(checkpoint, recognition, weights)
    metadata = {
        "format": "pt",
        META + "config": json.dumps(recognition.config.to_dict()),
        META + "variant": recognition.variant,
        META + "weights": checkpoint.metadata.get(META + "weights", weights),
        META + "args": json.dumps(_portable(checkpoint.args)),
        META + "source_sha256": checkpoint.metadata.get(META + "source_sha256", checkpoint.sha256),
        **({} if checkpoint.epoch is None else {META + "epoch": str(checkpoint.epoch)}),
    }
    with replacing_file(out) as scratch, _writing(out):
        from safetensors.torch import save_file

        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, str(scratch), metadata)
    return Slimmed(out, checkpoint.path.stat().st_size, out.stat().st_size, recognition)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """safetensors wraps a full disk in an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise VimDeployError(f"{out}: {error}", hint="free some space, or choose another folder with -o") from error


def _portable(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments worth keeping: plain values, and no paths of the machine that trained."""
    plain = (str, int, float, bool, type(None))

    def keep(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(keep(item) for item in value)
        return isinstance(value, plain) and not (isinstance(value, str) and os.path.isabs(value))

    return {name: value for name, value in args.items() if keep(value)}
