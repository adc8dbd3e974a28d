"""Read dt from the whole rows of x_proj, where a builder would copy it out of them first (TensorRT).

    Before: Slice (rows (B, L, P), 0 : R) -> MatMul (dt, W (R, D))
    After:  MatMul (rows, W with P - R rows of zeros below)

Exact: the other columns, B and C, are multiplied by zeros. It is more work for less traffic, which a GPU likes and a
CPU does not: on one AVX-512 core the product of Vim-Ti then takes 1.45 times as long (L = 197, ONNX Runtime 1.32), and
a file of it would be 8 % larger. So no file is written this way.
A Slice that does not start at column 0, or that anything but one MatMul by a weight reads, stays.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit


def read_whole_rows(model: ir.Model) -> ir.Model:
    """Rewrite `model`, typed or not, in place."""
    graph = model.graph
    for cut in [node for node in graph if node.op_type == "Slice" and len(node.inputs) == 4]:
        rows, product = cut.inputs[0], edit.only_reader(cut.outputs[0])
        if rows is None or rows.shape is None or product is None or product.op_type != "MatMul":
            continue
        weight, (start, axis) = product.inputs[1], (edit.ints(cut.inputs[i]) for i in (1, 3))
        matrix, width = edit.array_of(weight), rows.shape[-1]
        if start != [0] or len(axis) != 1 or not edit.last_axis(rows, axis[0]) or not isinstance(width, int):
            continue
        if product.inputs[0] is not cut.outputs[0] or weight is None or matrix is None or matrix.ndim != 2:
            continue
        padded = np.zeros((width, matrix.shape[1]), matrix.dtype)
        padded[: len(matrix)] = matrix
        product.replace_input_with(0, rows)
        product.replace_input_with(1, edit.constant(graph, f"{weight.name}:rows", padded))
    edit.drop_unread(graph)
    return model
