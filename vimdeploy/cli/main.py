"""`vimdeploy`, the command group. Commands are imported when called, so `--help` is quick and needs no torch."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

import vimdeploy
from vimdeploy.errors import RuntimeMissing, VimDeployError

# command -> (module, what it says in the list of commands)
COMMANDS = {
    "inspect": ("vimdeploy.cli.inspect", "Say what a checkpoint or an exported file holds."),
    "slim": ("vimdeploy.cli.slim", "Drop the spare copies of the weights; write safetensors."),
    "export": ("vimdeploy.cli.export", "Turn a checkpoint into a verified ONNX file."),
    "quantize": ("vimdeploy.cli.quantize", "Make an int8 file, its accuracy measured."),
    "build-engine": ("vimdeploy.cli.build_engine", "Build a TensorRT engine for the card in this host."),
    "verify": ("vimdeploy.cli.verify", "Check an artifact against the PyTorch reference."),
    "run": ("vimdeploy.cli.run", "Classify images."),
    "eval": ("vimdeploy.cli.eval", "Measure accuracy over a folder of images."),
    "bench": ("vimdeploy.cli.bench", "Measure latency, throughput, memory and energy."),
}

# what some commands import -> the extra that brings it
EXTRAS = {
    "torch": "torch",
    "safetensors": "torch",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "timm": "bench",
}


class _Refusal(click.ClickException):
    """A VimDeployError as the terminal shows it: message, next step, exit code."""

    def __init__(self, error: VimDeployError, command: str | None = None) -> None:
        super().__init__(error.message)
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance
        self.hint = error.hint or (f"vimdeploy {command} --help" if command else None)

    def show(self, file: Any = None) -> None:
        click.secho("Error: ", fg="red", nl=False, err=True)
        click.echo(self.message, err=True)
        if self.hint:
            click.secho("  Try: ", fg="cyan", nl=False, err=True)
            click.echo(self.hint, err=True)


class LazyGroup(click.Group):
    """A group whose commands are imported only when used, and whose errors all end the same way."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VimDeployError as error:
            raise _Refusal(error, ctx.invoked_subcommand) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted; nothing was left half-written.", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # `vimdeploy ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:
            raise _Refusal(_of_os_error(error)) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            raise _Refusal(
                RuntimeMissing(
                    f"this command needs {package}, which is not installed",
                    hint=f"pip install 'vimdeploy[{EXTRAS[package]}]'",
                )
            ) from error


def _of_os_error(error: OSError) -> VimDeployError:
    where = f"{error.filename}: " if error.filename else ""
    in_the_way = "a file stands where a folder would have to be: choose another place with -o"
    space = "free some space, or choose another folder with -o"
    rights = "choose a folder you may write to with -o, or change the permissions"
    hints = {
        errno.ENOSPC: space,
        errno.EDQUOT: space,
        errno.EFBIG: "this process may not write a file so large: raise the limit (ulimit -f)",
        errno.EACCES: rights,
        errno.EPERM: rights,
        errno.EROFS: "choose a folder you may write to with -o",
        errno.ENOTDIR: in_the_way,
        errno.EEXIST: in_the_way,
    }
    other = "check that the path exists and may be written to, or choose another with -o"
    return VimDeployError(f"{where}{error.strerror or error}", hint=hints.get(error.errno or 0, other))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vimdeploy.__version__, prog_name="vimdeploy")
def cli() -> None:
    """Take a trained Vision Mamba to production.

    \b
    vimdeploy export ckpt.pth        # writes ckpt.vim/, checked against PyTorch
    vimdeploy build-engine --fp16    # a TensorRT engine of it, on a host with a card
    vimdeploy verify parity          # the same check again, on all that lies in the one .vim folder here
    vimdeploy run ckpt.vim cat.jpg   # classify
    """


def main() -> None:
    cli(prog_name="vimdeploy")


if __name__ == "__main__":
    main()
