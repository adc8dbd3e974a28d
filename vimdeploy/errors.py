"""Every refusal vimdeploy makes is one of these; the command line turns them into a message and an exit code.

A message says what is wrong, where, and what to do next. Exit codes (design.md, Manners):
1 a check failed, 2 bad usage or bad input, 3 a runtime, library or device that was asked for is not there.
"""

from __future__ import annotations


class VimDeployError(Exception):
    """Base of all errors a user can cause or mend. ``hint`` is the next step, shown on its own line."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(VimDeployError):
    """The command or call contradicts itself, or names something that does not exist."""


class CheckpointError(VimDeployError):
    """The checkpoint cannot be read, is unsafe, or is not a Vision Mamba."""


class VariantError(VimDeployError):
    """The model a checkpoint holds is ambiguous, or contradicts what was asked for."""


class ExportError(VimDeployError):
    """The network could not be turned into ONNX, or the file could not be written."""


class ModelFileError(VimDeployError):
    """An ONNX file or ``.vim`` folder is missing, damaged, or was not made by vimdeploy."""


class EngineError(VimDeployError):
    """A TensorRT engine could not be built, loaded or run."""


class ImageError(VimDeployError):
    """An image or a folder of images cannot be used."""


class CheckFailed(VimDeployError):
    """A check ran and did not hold: parity, accuracy, precision."""

    exit_code = 1


class RuntimeMissing(VimDeployError):
    """A runtime, library or device that was asked for is not on this host."""

    exit_code = 3
