"""Modules that have what each TensorRT has, and no more: enough to be asked what they can do."""

from __future__ import annotations

from types import SimpleNamespace


def names(*words: str) -> SimpleNamespace:
    return SimpleNamespace(**{word: i for i, word in enumerate(words)})


def trt_8_5() -> SimpleNamespace:
    """As 8.5.3.1's own dir() says."""
    return SimpleNamespace(
        __version__="8.5.3.1",
        Runtime=object,
        BuilderFlag=names("FP16", "INT8", "TF32", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"),
        NetworkDefinitionCreationFlag=names("EXPLICIT_BATCH", "EXPLICIT_PRECISION"),
        DataType=names("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8"),
        TacticSource=names("CUBLAS", "CUBLAS_LT", "CUDNN"),
        ITimingCache=object,
    )


def trt_10() -> SimpleNamespace:
    module = trt_8_5()
    module.__version__ = "10.14.1.48"
    module.NetworkDefinitionCreationFlag = names("EXPLICIT_BATCH", "STRONGLY_TYPED")
    module.BuilderFlag = names("FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS", "VERSION_COMPATIBLE")
    module.DataType = names("FLOAT", "HALF", "BF16")
    module.IPluginV3 = module.IProgressMonitor = object
    return module


def trt_11() -> SimpleNamespace:
    module = trt_10()
    module.__version__ = "11.4.0.106"
    module.NetworkDefinitionCreationFlag = names("STRONGLY_TYPED")
    module.BuilderFlag = names("TF32", "VERSION_COMPATIBLE")
    return module
