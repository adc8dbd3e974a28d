"""What takes part in a benchmark, as plain values that a fresh process can open too.

A contender knows its image size; `open(batch, threads)` makes one inference of that batch ready to be repeated.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vimdeploy.bench import deit
from vimdeploy.bench.deit import DeitShape
from vimdeploy.bench.results import ARTIFACT, BASELINE
from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.runtimes.base import Prepared

CACHE_ENVIRONMENT = "VIMDEPLOY_CACHE"


@dataclass
class Opened:
    """A contender made ready: what to repeat, how it describes itself, what it weighs, how to end it."""

    prepared: Prepared
    runtime: str
    model_bytes: int | None = None
    engine_bytes: int | None = None
    notices: tuple[str, ...] = ()
    close: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Contender(ABC):
    """``name`` is what the table calls it. ``memory``: which counter its memory is read from (results.Row)."""

    name: str
    model: str
    precision: str
    img_size: tuple[int, int]
    tokens: int
    on_card: bool
    memory: str

    role = BASELINE
    family = "vim"

    @abstractmethod
    def open(self, batch: int, threads: int | None) -> Opened:
        """Raises VimDeployError, or whatever the runtime raises when it runs out of memory."""

    def make_files(self) -> None:  # noqa: B027  # most have nothing to make
        """Write what `open` would write first, so that its memory and time are not counted as the contender's."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {"kind": type(self).__name__, "values": dataclasses.asdict(self)}

    def images(self, batch: int, channels: int, dtype: Any = np.float32) -> np.ndarray:
        shape = (batch, channels, *self.img_size)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(dtype)


@dataclass(frozen=True)
class ArtifactContender(Contender):
    """A model file in one of `vimdeploy.runtimes`; `library` as for `open_session`."""

    path: str = ""
    runtime: str = "onnxruntime"
    library: str = "auto"
    plugin: str | None = None
    baseline: bool = False

    @property
    def role(self) -> str:  # type: ignore[override]
        return BASELINE if self.baseline else ARTIFACT

    def open(self, batch: int, threads: int | None) -> Opened:
        from vimdeploy.runtimes import open_session

        path = Path(self.path)
        session = open_session(
            path,
            runtime=self.runtime,
            library=self.library,
            threads=threads,
            plugin=Path(self.plugin) if self.plugin else None,
            cuda_graph=self.runtime == "tensorrt",
        )
        try:
            (spec,) = session.inputs.values()
            prepared = session.prepare(self.images(batch, session.info.config.in_chans, spec.dtype))
        except BaseException:
            session.close()
            raise
        plan = path.suffix == ".plan"
        size = path.stat().st_size
        return Opened(
            prepared,
            session.describe(),
            model_bytes=None if plan else size,
            engine_bytes=size if plan else None,
            notices=(session.notice,) if session.notice else (),
            close=session.close,
        )


@dataclass(frozen=True)
class PublishedContender(Contender):
    """The artifact's own network as upstream runs it (bench/published.py)."""

    path: str = ""
    mamba_library: str | None = None

    def open(self, batch: int, threads: int | None) -> Opened:
        from vimdeploy.bench.published import PublishedVim, find_parts
        from vimdeploy.bundle import checkpoint_of, read_info
        from vimdeploy.models.loading import load_exported

        info, path = read_info(Path(self.path)), Path(self.path)
        model = load_exported(info, path, checkpoint_of(path))
        parts = find_parts(Path(self.mamba_library) if self.mamba_library else None, cuda=self.on_card)
        device = "cuda" if self.on_card else "cpu"
        network = PublishedVim(model, parts, dtype=_dtype(self.precision), device=device)
        return torch_opened(self, network, batch, threads, info.config.in_chans, network.describe())


@dataclass(frozen=True)
class DeitContender(Contender):
    """timm's DeiT. ``runtime``: torch | torch-compile | onnxruntime | onnxruntime-cuda | tensorrt."""

    shape: DeitShape | None = None
    runtime: str = "torch"
    fused: bool = True

    family = "deit"

    def open(self, batch: int, threads: int | None) -> Opened:
        assert self.shape is not None
        if self.runtime in ("torch", "torch-compile"):
            return self._open_torch(self.shape, batch, threads)
        if self.runtime == "tensorrt":
            from vimdeploy.bench.deit_plan import open_plan

            images = self.images(batch, self.shape.in_chans)
            return open_plan(self.shape, cache_folder(), batch, self._half(), images)
        return _open_ort(self, self._onnx(), batch, threads, self._half())

    def make_files(self) -> None:
        if self.runtime.startswith("onnxruntime"):
            self._onnx()

    def _half(self) -> bool:
        return self.precision == "fp16" and self.on_card

    def _onnx(self) -> Path:
        assert self.shape is not None
        path = cache_folder() / deit.cache_name(self.shape, fused=self.fused, half=self._half())
        return deit.write_deit_onnx(self.shape, path, fused=self.fused, half=self._half())

    def _open_torch(self, shape: DeitShape, batch: int, threads: int | None) -> Opened:
        import torch

        device = "cuda" if self.on_card else "cpu"
        model = deit.make_deit(shape, fused=self.fused).to(device, _dtype(self.precision))
        how = f"timm {deit.timm_version()} eager, " + ("SDPA" if self.fused else "attention unfused")
        network: Any = model
        if self.runtime == "torch-compile":
            network = torch.compile(model, mode=COMPILE_MODE)
            how = f"timm {deit.timm_version()}, torch.compile {COMPILE_MODE}, SDPA"
        opened = torch_opened(self, torch.inference_mode()(network), batch, threads, shape.in_chans, how)
        if self.runtime == "torch-compile":
            opened.close = torch._dynamo.reset
            opened.prepared.run()
            if self.on_card:  # what compiling took is not what running takes
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
        opened.model_bytes = sum(p.nbytes for p in model.parameters())
        return opened


#: as performance.md's anchors were measured; records CUDA graphs too
COMPILE_MODE = "max-autotune"

_KINDS: dict[str, type[Contender]] = {
    kind.__name__: kind for kind in (ArtifactContender, PublishedContender, DeitContender)
}


def contender_from(values: Mapping[str, Any]) -> Contender:
    """The inverse of `Contender.to_dict`, after JSON."""
    fields = dict(values["values"])
    fields["img_size"] = tuple(fields["img_size"])
    if fields.get("shape"):
        fields["shape"] = DeitShape(**{**fields["shape"], "img_size": tuple(fields["shape"]["img_size"])})
    return _KINDS[values["kind"]](**fields)


def cache_folder() -> Path:
    """Where exports made for a benchmark are kept: VIMDEPLOY_CACHE, or `vimdeploy` in the user's cache folder."""
    named = os.environ.get(CACHE_ENVIRONMENT)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else base / "vimdeploy"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def short_name(info: ModelInfo) -> str:
    """Vim-Ti, Vim-S, Vim-B, or the variant's own name."""
    names = {192: "Vim-Ti", 384: "Vim-S", 768: "Vim-B"}
    config = info.config
    return names.get(config.d_model, info.variant) if config.depth == 24 else info.variant


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def torch_opened(
    contender: Contender, network: Callable[[Any], Any], batch: int, threads: int | None, channels: int, how: str
) -> Opened:
    """A function of a tensor, on the device and in the type of the contender."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if contender.on_card else "cpu"
    if contender.on_card and not torch.cuda.is_available():
        raise RuntimeMissing("PyTorch sees no NVIDIA GPU here", hint="leave out the baselines that need one")
    images = torch.from_numpy(contender.images(batch, channels)).to(device, _dtype(contender.precision))
    stream = torch.cuda.current_stream().cuda_stream if contender.on_card else None
    where = torch.cuda.get_device_name() if contender.on_card else "CPU"
    return Opened(Prepared(lambda: network(images), stream), f"torch {torch.__version__} {where}, {how}")


def _open_ort(contender: DeitContender, path: Path, batch: int, threads: int | None, half: bool) -> Opened:
    """Any ONNX file in plain ONNX Runtime, images and result left where the provider has them."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeMissing(
            f"ONNX Runtime is not installed ({error})", hint="pip install 'vimdeploy[onnxruntime]'"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    provider, device = ("CUDAExecutionProvider", "cuda") if contender.on_card else ("CPUExecutionProvider", "cpu")
    options.enable_mem_pattern = contender.on_card  # on the CPU off, as in OrtSession, so that both are alike
    if provider not in ort.get_available_providers():
        raise RuntimeMissing(f"this ONNX Runtime has no {provider}", hint="pip install 'vimdeploy[onnxruntime-gpu]'")
    session = ort.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeMissing(f"ONNX Runtime could not start its {provider}", hint="see that CUDA and cuDNN fit it")
    assert contender.shape is not None
    images = contender.images(batch, contender.shape.in_chans, np.float16 if half else np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("images", ort.OrtValue.ortvalue_from_numpy(images, device, 0))
    binding.bind_output("logits", device)
    attention = "MultiHeadAttention" if contender.fused else "attention written out"
    return Opened(
        Prepared(lambda: session.run_with_iobinding(binding)),  # which waits
        f"onnxruntime {ort.__version__} {'CUDA' if contender.on_card else 'CPU'}, {attention}",
        model_bytes=path.stat().st_size,
    )


def check_against(names: tuple[str, ...]) -> None:
    """Raise UsageError for a baseline that does not exist."""
    for name in names:
        if name not in AGAINST:
            raise UsageError(f"no baseline is called {name!r}", hint="baselines: " + ", ".join(AGAINST))


AGAINST = {
    "deit": "timm's DeiT of the same width in the artifact's runtime, and in PyTorch where that is another",
    "deit-compile": "the same in torch.compile",
    "deit-unfused": "the same in PyTorch with attention written out, as in the paper's time",
    "torch": "the same Vim as published: eager PyTorch in upstream's order of operations",
    "onnxruntime": "the same ONNX file in ONNX Runtime without vimdeploy's library",
}
