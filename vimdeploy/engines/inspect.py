"""What precision an engine's layers really have, and whether that is what was asked for.

TensorRT's engine inspector lists the layers after fusion, each with the ONNX nodes it came from and the types it reads
and writes. The proof (design.md, "Precision"):

1. Every projection (MatMul, Gemm, Conv of the typed graph) that shows must read the low type; in an fp32 build, fp32;
   where the graph quantizes what it reads, int8. Where the builder chooses the types beside int8, fp32 will do as well.
2. Every island (the mean of squares of a norm) that shows as a layer of its own must read fp32, and every AddRMSNorm
   that shows must read the residual stream in fp32.
3. At least one projection must show. Where TensorRT compiles regions as a whole ("ForeignNode"), it lists only the
   region's ends: the projections inside are counted as hidden.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from vimdeploy.errors import CheckFailed, ModelFileError
from vimdeploy.export import schema
from vimdeploy.passes.quantize import quantized_products

_PROJECTIONS = {"MatMul", "Gemm", "Conv"}
#: Spellings of 8.5 ("Row major linear FP16 format"), 10 ("Half") and the Python enum.
_TYPES = (
    ("bf16", re.compile(r"\b(bf16|bfloat16)\b", re.I)),
    ("fp16", re.compile(r"\b(fp16|half|float16)\b", re.I)),
    ("fp32", re.compile(r"\b(fp32|float|float32)\b", re.I)),
    ("int8", re.compile(r"\bint8\b", re.I)),
    ("int32", re.compile(r"\bint32\b", re.I)),
    ("int64", re.compile(r"\bint64\b", re.I)),
    ("bool", re.compile(r"\bbool\b", re.I)),
)
#: What stands between the names of merged nodes; our own node names hold none of it.
_SEPARATORS = re.compile(r"\.\.\.|[\s,()\[\]{}+\x1e]+")
_OPAQUE = re.compile(r"ForeignNode|__myl_|myelin", re.I)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: the ONNX nodes in it, and the types it reads and writes ("fp16", ... or "?")."""

    name: str
    nodes: frozenset[str]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    opaque: bool = False  # a region compiled as a whole, of which only the ends are named


@dataclass(frozen=True)
class Wanted:
    """What the typed graph says: names of the projections, and of the nodes kept in fp32 for their range.

    `streams`: those that take the residual stream, in fp32, as their second input. `quantized`: the projections that
    must be int8, whatever `low` is. `chosen`: whether the builder chooses between `low` and fp32 for the others.
    """

    low: str
    projections: frozenset[str]
    islands: frozenset[str]
    streams: frozenset[str] = frozenset()
    quantized: frozenset[str] = frozenset()
    chosen: bool = False

    @property
    def asked(self) -> str:
        """What a build of this graph is called."""
        return "int8" if self.quantized else self.low

    @classmethod
    def of(cls, graph: ir.Graph, low: str, *, chosen: bool = False) -> Wanted:
        """Read from the typed main graph."""
        named = [(node.op_type, node.name or "") for node in graph if node.domain in ("", "ai.onnx")]
        ours = [(node.op_type, node.name or "") for node in graph if node.domain == schema.DOMAIN]
        return cls(
            low,
            frozenset(name for op, name in named if op in _PROJECTIONS),
            frozenset(name for op, name in named if op == "ReduceMean"),
            frozenset(name for op, name in ours if op == schema.ADD_NORM.name),
            frozenset(node.name or "" for node in quantized_products(graph)),
            chosen,
        )


@dataclass(frozen=True)
class Found:
    """What was seen. `hidden`: projections in no layer that shows them. `layers`: layers by the type they write."""

    asked: str
    source: str  # inspector | network
    projections: dict[str, int]
    islands: dict[str, int]
    hidden: int
    layers: dict[str, int]
    rest: str  # the type of what is not int8; `asked` where nothing is

    def to_dict(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "rest": self.rest,
            "source": self.source,
            "projections": self.projections,
            "islands": self.islands,
            "hidden": self.hidden,
            "layers": self.layers,
        }


def type_of(text: str) -> str:
    """fp32, fp16, bf16, ... from the inspector's words for a format, "?" when none is in them."""
    return next((name for name, pattern in _TYPES if pattern.search(text)), "?")


def names_in(text: str) -> frozenset[str]:
    """The names of ONNX nodes in a layer's name or metadata."""
    return frozenset(part.removeprefix("PWN") for part in _SEPARATORS.split(text) if part)


def parse_layers(text: str) -> list[Layer]:
    """The inspector's JSON as layers. Raises ModelFileError for an engine built without detailed layer information."""
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"TensorRT's engine inspector gave no readable layer list ({error})") from error
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ModelFileError("the engine carries no layer information", hint="build it with `vimdeploy build-engine`")

    def types(side: Any) -> tuple[str, ...]:
        return tuple(type_of(str(t.get("Format/Datatype") or t.get("Format") or t.get("Datatype"))) for t in side or ())

    return [
        Layer(
            name=str(entry.get("Name", "")),
            nodes=names_in(f"{entry.get('Name', '')} {entry.get('Metadata') or ''}".replace("ONNX Layer:", " ")),
            reads=types(entry.get("Inputs")),
            writes=types(entry.get("Outputs")),
            opaque=bool(_OPAQUE.search(f"{entry.get('Name', '')} {entry.get('LayerType', '')}")),
        )
        for entry in entries
    ]


def engine_layers(module: Any, engine: Any, input_name: str, shape: tuple[int, ...]) -> list[Layer]:
    """The layers of a deserialised engine as they run for `input_name` of `shape`.

    Of a dynamic batch the engine alone tells no types ("N/A due to dynamic shapes"); a context that has shapes does.
    """
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None and context.set_input_shape(input_name, shape):
        if hasattr(context, "set_binding_shape"):  # 8.5 takes the one above for the run, and tells of this one
            context.set_binding_shape(engine.get_binding_index(input_name), shape)
        inspector.execution_context = context
    return parse_layers(inspector.get_engine_information(module.LayerInformationFormat.JSON))


def network_layers(network: Any) -> list[Layer]:
    """The layers of a strongly typed network: what the builder must keep, where no engine can be opened (no card).

    A layer that reads what a dequantize layer gives counts as reading int8: the pair is the order to compute in it.
    """
    made_of_int8: set[str] = set()

    def types(count: int, get: Any) -> tuple[str, ...]:
        tensors = (get(i) for i in range(count))
        return tuple(
            "int8" if t.name in made_of_int8 else type_of(str(t.dtype).rsplit(".", 1)[-1])
            for t in tensors
            if t is not None
        )

    layers = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if str(layer.type).endswith(".DEQUANTIZE"):
            made_of_int8.add(layer.get_output(0).name)
        reads = types(layer.num_inputs, layer.get_input)
        layers.append(Layer(layer.name, names_in(layer.name), reads, types(layer.num_outputs, layer.get_output)))
    return layers


def prove(layers: Sequence[Layer], wanted: Wanted, source: str) -> Found:
    """Hold the layers against what was asked for. Raises CheckFailed naming the first ones that differ."""
    shown = [layer for layer in layers if not layer.opaque]
    allowed = {wanted.low, "fp32"} if wanted.chosen else {wanted.low}
    floats, wrong = _seen(shown, wanted.projections - wanted.quantized, allowed)
    int8, not_int8 = _seen(shown, wanted.quantized, {"int8"})
    projections = floats + int8
    islands, wide_lost = _seen([layer for layer in shown if not layer.nodes - wanted.islands], wanted.islands, {"fp32"})
    streams, stream_lost = _seen(shown, wanted.streams, {"fp32"}, schema.ADD_NORM.inputs.index("r"))
    counted = Counter(layer.writes[0] for layer in layers if layer.writes)
    found = Found(
        asked=wanted.asked,
        source=source,
        projections=dict(projections),
        islands=dict(islands + streams),
        hidden=len(wanted.projections) - sum(projections.values()),
        layers=dict(counted),
        rest=wanted.low,
    )
    if not_int8:
        raise CheckFailed(
            f"{len(not_int8)} of {len(wanted.quantized)} quantized projections are not in int8 in the engine: "
            + _list(not_int8),
            hint="build without --int8, or report it with the TensorRT version",
        )
    if wanted.quantized and not int8:
        raise CheckFailed(
            f"the {source} shows none of the {len(wanted.quantized)} quantized projections, so int8 is not proven",
            hint="report it with the TensorRT version",
        )
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} of {len(wanted.projections - wanted.quantized)} projections are not in {wanted.low} in the "
            f"engine: {_list(wrong)}",
            hint="build without the timing cache; if it stays, report it with the TensorRT version",
        )
    if wide_lost or stream_lost:
        raise CheckFailed(
            f"norms that must stay in fp32 are not: {_list(wide_lost + stream_lost)}", hint="build with --bf16, or fp32"
        )
    if not projections:
        raise CheckFailed(
            f"the {source} shows none of the {len(wanted.projections)} projections, so their precision is not proven",
            hint="report it with the TensorRT version",
        )
    return found


def _seen(
    layers: Iterable[Layer], names: frozenset[str], allowed: set[str], position: int = 0
) -> tuple[Counter[str], list[str]]:
    """How many of the named nodes show which type at that input, and those of a type that is not allowed."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    done: set[str] = set()
    for layer in layers:
        here = (layer.nodes & names) - done
        if not here or len(layer.reads) <= position:
            continue
        done |= here
        kind = layer.reads[position]
        counts[kind] += len(here)
        if kind not in allowed:
            wrong.append(f"{min(here)} ({kind})")
    return counts, wrong


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
