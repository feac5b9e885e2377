"""Export a fastprior backbone to ONNX (NCHW, batch norms folded): what other runtimes are timed with.

    python tests/export_onnx.py lite0 256 lite0.onnx
"""
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

import fastprior as fp


def export(backbone: fp.Backbone, size: int):
    """ONNX model: float32 (1, 3, size, size), normalised -> the stage outputs, (1, C, h, w) each."""
    nodes, weights = [], []

    def tensor(a):
        weights.append(numpy_helper.from_array(np.ascontiguousarray(a, np.float32), f"w{len(weights)}"))
        return weights[-1].name

    def node(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, inputs, [f"x{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def conv(x, w, b, stride=1, group=1):
        return node("Conv", x, tensor(w), tensor(b), strides=[stride] * 2, group=group, auto_pad="SAME_UPPER")

    def activate(x, act):
        if act == fp.RELU6:
            return node("Clip", x, tensor(0.0), tensor(6.0))
        return node("Mul", x, node("Sigmoid", x))

    def pointwise(x, w, b):
        return conv(x, w.T[:, :, None, None], b)

    x = activate(conv("image", backbone.stem_w.transpose(3, 2, 0, 1), backbone.stem_b, 2), backbone.act)
    outputs = []
    for i, block in enumerate(backbone.blocks):
        p, y = block.arrays, x
        if "expand_w" in p:
            y = activate(pointwise(y, p["expand_w"], p["expand_b"]), block.act)
        y = conv(y, p["dw_w"].transpose(2, 0, 1)[:, None], p["dw_b"], block.stride, p["dw_b"].size)
        y = activate(y, block.act)
        if "se_reduce_w" in p:
            s = activate(pointwise(node("GlobalAveragePool", y), p["se_reduce_w"], p["se_reduce_b"]), fp.SILU)
            y = node("Mul", y, node("Sigmoid", pointwise(s, p["se_expand_w"], p["se_expand_b"])))
        y = pointwise(y, p["project_w"], p["project_b"])
        x = node("Add", y, x) if block.skip else y
        if i in backbone.stages:
            outputs.append(x)
    graph = helper.make_graph(
        nodes, backbone.name, [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


if __name__ == "__main__":
    save(export(fp.load_backbone(sys.argv[1]), int(sys.argv[2])), sys.argv[3])
