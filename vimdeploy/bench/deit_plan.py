"""DeiT as a TensorRT plan: built here by the version that is installed, run from a CUDA graph."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from vimdeploy.bench import deit
from vimdeploy.bench.contenders import Opened
from vimdeploy.bench.deit import DeitShape
from vimdeploy.bundle import replacing_file
from vimdeploy.engines.build import make_logger
from vimdeploy.engines.capabilities import TENSORRT, Capabilities, import_runtime
from vimdeploy.errors import EngineError
from vimdeploy.runtimes import cuda
from vimdeploy.runtimes.base import Prepared

_HINT = "leave out --against deit, or use another runtime"


def open_plan(shape: DeitShape, cache: Path, batch: int, half: bool, images: np.ndarray) -> Opened:
    """The DeiT of that shape, for exactly that batch, as a plan out of `cache` or built now.

    Raises RuntimeMissing without TensorRT or a card, EngineError when TensorRT fails.
    """
    card = cuda.device()
    module, can = import_runtime(TENSORRT)
    plan = _plan(module, can, card, shape, cache, batch, half)
    logger = make_logger(module)
    context = cuda.Context()
    try:
        return _open(module, can, logger, context, plan, images, half)
    except BaseException:
        context.close()
        raise


def _plan(
    module: Any, can: Capabilities, card: cuda.Device, shape: DeitShape, cache: Path, batch: int, half: bool
) -> Path:
    opset = can.max_opset or deit.OPSET
    onnx = cache / deit.cache_name(shape, fused=False, half=half and can.strongly_typed, opset=opset)
    key = repr((onnx.name, batch, half, can.version, card.name, card.sm))
    path = cache / f"deit-{hashlib.sha256(key.encode()).hexdigest()[:16]}.plan"
    if path.is_file():
        return path
    deit.write_deit_onnx(shape, onnx, fused=False, half=half and can.strongly_typed, opset=opset)
    logger = make_logger(module)
    builder = module.Builder(logger)
    flags = 0
    if can.strong_flag:
        flags |= 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if can.explicit_batch_flag:
        flags |= 1 << int(module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = builder.create_network(flags)
    parser = module.OnnxParser(network, logger)  # holds the weights until the plan is built
    if not parser.parse(onnx.read_bytes()):
        raise EngineError(f"{can} cannot read DeiT: {parser.get_error(0).desc()}", hint=_HINT)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    sides = (batch, shape.in_chans, *shape.img_size)
    profile.set_shape("images", sides, sides, sides)
    config.add_optimization_profile(profile)
    if half and not can.strongly_typed:
        config.set_flag(module.BuilderFlag.FP16)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise EngineError(f"{can} could not build DeiT: {'; '.join(logger.errors[:1])}", hint=_HINT)
    with replacing_file(path) as scratch:
        scratch.write_bytes(bytes(data))
    return path


def _open(
    module: Any, can: Capabilities, logger: Any, card: cuda.Context, plan: Path, images: np.ndarray, half: bool
) -> Opened:
    runtime = module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    context = engine and engine.create_execution_context()
    if context is None:
        raise EngineError(f"{can} cannot load {plan}", hint="remove it, and it is built again")
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype = np.dtype(module.nptype(engine.get_tensor_dtype(name)))
        if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT:
            batch = np.ascontiguousarray(images.astype(dtype))
            context.set_input_shape(name, batch.shape)
            address = card.allocate(batch.nbytes)
            card.upload(batch, address)
        else:
            address = card.allocate(int(np.prod(tuple(context.get_tensor_shape(name)))) * dtype.itemsize)
        context.set_tensor_address(name, address)
    card.synchronize()
    if not context.execute_async_v3(card.stream):
        raise EngineError(f"{can} could not run DeiT", hint=_HINT)
    card.synchronize()
    card.begin_capture()
    context.execute_async_v3(card.stream)
    graph = card.end_capture()
    kept = [context, engine, runtime]

    def close() -> None:
        graph.close()
        kept.clear()  # before the memory it works in
        card.close()

    how = f"{can} on {card.device.name}, {'fp16' if half else 'fp32'}, CUDA graph"
    return Opened(Prepared(graph.launch, card.stream), how, engine_bytes=plan.stat().st_size, close=close)
