"""`vimdeploy inspect`: what a checkpoint holds, and what to do with it; of an exported file, inspect_model.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from vimdeploy.cli import inspect_model, render
from vimdeploy.cli.slim import mb
from vimdeploy.errors import UsageError

_DIRECTIONS = {
    "none": "forward only (bimamba none)",
    "v1": "both ways, shared projections, second A (bimamba v1)",
    "v2": "both ways, own convolution and projections each (bimamba v2)",
}
_LICENCE = (
    "If these are the published weights (hustvl): their hub tag says apache-2.0, their model card says "
    "'Non-commercial license'. Ask the authors before commercial use."
)
_ARGS = ("model", "input_size", "data_set", "nb_classes", "epochs", "finetune", "drop_path", "eval_crop_ratio")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--variant", help="What the file cannot tell: a name, settings such as stride=8,cls=middle, or both.")
@render.json_option
def command(file: Path, variant: str | None, as_json: bool) -> None:
    """Say what FILE holds. Of a checkpoint: which model, which weight sets, and what could be dropped. Of an exported
    file: what it computes, and with which operators.

    \b
    vimdeploy inspect ckpt.pth
    vimdeploy inspect bare.pth --variant tiny+
    vimdeploy inspect ckpt.vim
    """
    exported = inspect_model.is_model(file)
    if exported and variant:
        raise UsageError(f"{file} says itself which model it is", hint="leave out --variant")
    with render.steps() as step:
        step("reading the file")
        report = inspect_model.describe_model(file) if exported else describe(file, variant)
    if as_json:
        render.emit_json(report)
    elif exported:
        inspect_model.show(report)
    else:
        _show(report, variant)


def describe(path: Path, variant: str | None = None) -> dict[str, Any]:
    """All that `inspect` prints, as plain values. Raises as read_checkpoint and recognise do, except for ambiguity."""
    from vimdeploy.models.checkpoints import printable, read_checkpoint
    from vimdeploy.models.loading import non_finite
    from vimdeploy.models.recognise import AmbiguousVariant, recognise
    from vimdeploy.models.variants import REGISTERED

    checkpoint = read_checkpoint(path)
    first = next(iter(checkpoint.weights))
    state = checkpoint.weights[first]
    report: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": checkpoint.sha256,
        "container": checkpoint.container,
        "prefix": checkpoint.prefix,
        "weights": {
            which: {
                "tensors": len(tensors),
                "bytes": checkpoint.sizes[which],
                "dtypes": list(checkpoint.dtypes(which)),
                "non_finite": [printable(name) for name in non_finite(tensors)],
            }
            for which, tensors in checkpoint.weights.items()
        },
        "parameters": sum(tensor.numel() for name, tensor in state.items() if not name.startswith("rope.")),
        "epoch": checkpoint.epoch,
        "other": [{"name": printable(name), "bytes": checkpoint.sizes.get(name, 0)} for name in checkpoint.other],
        "args": {name: _plain(checkpoint.args[name]) for name in _ARGS if name in checkpoint.args},
        "variant": None,
        "how": [],
        "choices": [],
        "config": None,
        "unknown": [],
        "missing": [],
        "notice": None,
    }
    try:
        found = recognise(checkpoint, variant, first)
    except AmbiguousVariant as error:
        known = {key: list(value) if isinstance(value, tuple) else value for key, value in error.known.items()}
        return report | {"ambiguous": error.message, "known": known, "choices": list(error.choices)}
    config = found.config
    return report | {
        "variant": found.variant,
        "how": list(found.how),
        "config": config.to_dict(),
        "tokens": config.seq_len,
        "grid": list(config.grid),
        "cls_index": list(config.cls_index),
        "directions": _directions(config.bimamba, config.divide_out, config.bidirectional),
        "unknown": [printable(name) for name in found.unknown],
        "missing": [printable(name) for name in found.missing],
        "notice": _LICENCE if found.variant in REGISTERED and config.num_classes == 1000 else None,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, type(None))) else str(value)


def _directions(bimamba: str, divide: bool | None, bidirectional: bool) -> str:
    text = _DIRECTIONS[bimamba]
    if bimamba == "v2" and divide is not None:
        text += ", sum halved" if divide else ", sum not halved"
    return text + (", layers in forward-backward pairs" if bidirectional else "")


def _show(report: dict[str, Any], variant: str | None) -> None:
    _line("file", f"{report['file']}  {mb(report['bytes'])}, {report['container'].replace('_', ' ')}")
    _line("", f"sha256 {report['sha256']}")
    config = report["config"]
    if config:
        _line("variant", report["variant"])
    else:
        _line("variant", click.style("ambiguous: ", fg="yellow") + report["ambiguous"])
        known = report["known"]
        _line("known", ", ".join(f"{key} {value}" for key, value in known.items()))
    for line in report["how"]:
        _line("", line)
    for position, choice in enumerate(report["choices"]):
        _line("" if position else "choices", f"--variant {choice}")
    _line("parameters", f"{report['parameters']:,}")
    if config:
        size = "x".join(map(str, config["img_size"]))
        cls = ", ".join(map(str, report["cls_index"]))
        _line("input", f"{config['in_chans']}x{size}, patch {config['patch_size']}, stride {config['stride']}")
        where = (
            f"class token ({config['cls_position']}) at index {cls}"
            if cls
            else f"no class token, pool {config['pool']}"
        )
        _line("tokens", f"{report['tokens']} = {report['grid'][0]}x{report['grid'][1]} patches; {where}")
        _line("directions", report["directions"])
        _line("classes", str(config["num_classes"]) if config["num_classes"] else "none (a backbone)")
    else:
        _line("directions", _directions(known["bimamba"], known.get("divide_out"), False))
    for position, (which, facts) in enumerate(report["weights"].items()):
        text = f"{which}: {facts['tensors']} tensors, {mb(facts['bytes'])}, {', '.join(facts['dtypes'])}"
        _line("" if position else "weights", text)
        if facts["non_finite"]:
            _line("", click.style(f"NaN or Inf in {_some(facts['non_finite'])}", fg="red"))
    if report["prefix"]:
        _line("prefix", f"{report['prefix']} (stripped)")
    if report["epoch"] is not None:
        _line("epoch", str(report["epoch"]))
    if report["other"]:
        _line(
            "also inside",
            ", ".join(
                f"{part['name']} {mb(part['bytes'])}" if part["bytes"] else part["name"] for part in report["other"]
            ),
        )
    if report["args"]:
        _line("args", ", ".join(f"{key}={value}" for key, value in report["args"].items()))
    for words in ("missing", "unknown"):
        if report[words]:
            _line(words, click.style(f"{len(report[words])} tensors: {_some(report[words])}", fg="yellow"))
    if report["notice"]:
        _line("licence", report["notice"])
    _next(report, variant)


def _next(report: dict[str, Any], variant: str | None) -> None:
    """The commands a user types next, ready to paste."""
    path = shlex.quote(report["file"])
    chosen = variant or next(iter(report["choices"]), None)
    option = f" --variant {shlex.quote(chosen)}" if chosen else ""
    weights = "" if "model" in report["weights"] else " --weights ema"
    click.echo()
    _line("next", f"vimdeploy export {path}{option}{weights}")
    spare = report["bytes"] - next(iter(report["weights"].values()))["bytes"]
    if spare > report["bytes"] / 10:
        target = shlex.quote(Path(report["file"]).stem + ".safetensors")
        _line("", f"vimdeploy slim {path}{option}{weights} -o {target}    # drops {mb(spare)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _line(label: str, text: str) -> None:
    click.echo(click.style(f"{label:<13}", bold=True) + text)
