"""Write a Vim's layers with the fused ops, as far as asked: "none", "bidirectional" (the two scans), "full".

    Before: 54 nodes a layer: residual and norm 8; in_proj, Split; each direction 21; their sum; out_proj
    After:  11: AddRMSNorm, MatMul, BiCausalConv1d, 2 x (MatMul, Slice, MatMul), BiSelectiveScan, MatMul

The passes, one a file, in the order they run; what none of them matches stays as it is:

1. fuse_scan.py    two scans and their sum            -> BiSelectiveScan     bidirectional, full
2. fuse_conv.py    taps and SiLU of both directions   -> BiCausalConv1d      full
3. fuse_norm.py    residual add and RMSNorm           -> AddRMSNorm          full
4. prune.py        the last block for the token that the head reads only     full
5. below: a Split of which one part is still read becomes a Slice.

The graph must be the exporter's, fp32 and not typed yet: precision.py types the fused graph afterwards. Values that
both graphs have keep their names, so the unfused graph says layer by layer what the fused one must compute.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit
from vimdeploy.passes.fuse_conv import fuse_convolutions
from vimdeploy.passes.fuse_norm import fuse_norms
from vimdeploy.passes.fuse_scan import fuse_scans
from vimdeploy.passes.prune import prune_last_block

FUSIONS = ("none", "bidirectional", "full")


def fuse(model: ir.Model, fusion: str) -> ir.Model:
    """Rewrite `model` in place; functions are not looked at. A graph that is partly fused is fused further."""
    if fusion not in FUSIONS:
        raise ValueError(f"fusion {fusion!r} is not one of {', '.join(FUSIONS)}")
    if fusion == "none":
        return model
    graph = model.graph
    fuse_scans(graph)
    if fusion == "full":
        fuse_convolutions(graph)
        fuse_norms(graph)
        prune_last_block(graph)
    _slice_for_split(graph)
    edit.drop_unread(graph)
    return model


def _slice_for_split(graph: ir.Graph) -> None:
    """5. A Split copies every part; the fused ops read most of them in place."""
    for split in [node for node in graph if node.op_type == "Split"]:
        read = [i for i, part in enumerate(split.outputs) if part.uses() or part.is_graph_output()]
        sizes = edit.ints(split.inputs[1]) if len(split.inputs) > 1 else []
        if len(read) != 1 or not sizes:
            continue
        part = split.outputs[read[0]]
        start = sum(sizes[: read[0]])
        axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
        bounds = [
            edit.constant(graph, f"const/int64/1/{value}", np.array([value], dtype=np.int64))
            for value in (start, start + sizes[read[0]], axis)
        ]
        cut = edit.node("Slice", [split.inputs[0], *bounds], f"{split.name}:{read[0]}", [(None, None, None)])
        graph.insert_before(split, cut)
        edit.take_over(part, cut.outputs[0])
        graph.remove(split, safe=True)
