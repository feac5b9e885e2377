"""The same truncated backbone in other runtimes: what `fastprior bench --against` is timed with.

Each function returns a callable without arguments that runs the backbone alone, batch 1, float32, on
an input that is already resized and normalised, up to the stage outputs. As a program,

    python tests/other_runtimes.py {onnxruntime,torch} BACKBONE.npz SIZE THREADS

answers every line on stdin, a number of calls, with their median in ms.
"""
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastprior as fp  # noqa: E402


def onnxruntime(backbone: fp.Backbone, size: int, threads: int):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = to_onnx(backbone, size).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    return lambda: session.run(None, {"image": x})


def torch(backbone: fp.Backbone, size: int, threads: int, device: str = "cpu", x: np.ndarray | None = None):
    """Eager mode, channels-last memory; x (size, size, 3) in place of noise."""
    import torch
    from torch.nn import functional
    torch.set_num_threads(threads)

    def tensor(a):
        return torch.from_numpy(np.ascontiguousarray(a, np.float32)).to(device)

    def conv(w, b, stride=1, group=1):  # w (out, in, k, k)
        w, b = tensor(w).to(memory_format=torch.channels_last), tensor(b)

        def run(x):
            (top, bottom), (left, right) = (fp._same_padding(n, w.shape[-1], stride) for n in x.shape[2:])
            if top == bottom and left == right:
                return functional.conv2d(x, w, b, stride, (top, left), 1, group)
            return functional.conv2d(functional.pad(x, (left, right, top, bottom)), w, b, stride, 0, 1, group)
        return run

    def pointwise(w, b):
        return conv(w.T[:, :, None, None], b)

    acts = {fp.RELU6: functional.relu6, fp.SILU: functional.silu}
    stem = conv(backbone.stem_w.transpose(3, 2, 0, 1), backbone.stem_b, 2)
    layers = []
    for block in backbone.blocks:
        p = block.arrays
        layers.append((block.skip, acts[block.act],
                       pointwise(p["expand_w"], p["expand_b"]) if "expand_w" in p else None,
                       conv(p["dw_w"].transpose(2, 0, 1)[:, None], p["dw_b"], block.stride, p["dw_b"].size),
                       (pointwise(p["se_reduce_w"], p["se_reduce_b"]), pointwise(p["se_expand_w"], p["se_expand_b"]))
                       if "se_reduce_w" in p else None, pointwise(p["project_w"], p["project_b"])))

    def run(x):
        stages = []
        with torch.inference_mode():
            x = acts[backbone.act](stem(x))
            for i, (skip, act, expand, depthwise, squeeze, project) in enumerate(layers):
                y = act(depthwise(act(expand(x)) if expand else x))
                if squeeze:
                    y = y * torch.sigmoid(squeeze[1](functional.silu(squeeze[0](y.mean((2, 3), keepdim=True)))))
                x = project(y) + x if skip else project(y)
                if i in backbone.stages:
                    stages.append(x)
        return stages
    noise = np.random.default_rng(0).standard_normal((1, 3, size, size))
    image = tensor(noise if x is None else x.transpose(2, 0, 1)[None]).to(memory_format=torch.channels_last)
    return lambda: run(image)


def torch_cuda(backbone: fp.Backbone, size: int) -> dict:
    """Eager and as one CUDA graph, each with the wait for its result; cuDNN may use TF32."""
    import torch as runtime
    eager = torch(backbone, size, 1, "cuda")
    with runtime.cuda.stream(runtime.cuda.Stream()):  # a capture needs calls before it, on a stream of their own
        for _ in range(3):
            eager()
    runtime.cuda.synchronize()
    graph = runtime.cuda.CUDAGraph()
    with runtime.cuda.graph(graph):
        eager()
    return {"torch": lambda: (eager(), runtime.cuda.synchronize()),
            "torch_graph": lambda: (graph.replay(), runtime.cuda.synchronize())}


def to_onnx(backbone: fp.Backbone, size: int):
    """ONNX model: float32 (1, 3, size, size), normalised -> the stage outputs, (1, C, h, w) each."""
    from onnx import TensorProto, helper, numpy_helper
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
    name, path, size, threads = sys.argv[1:]
    call = {"onnxruntime": onnxruntime, "torch": torch}[name](
        fp.Backbone.from_arrays(*fp._read_npz(path)), int(size), int(threads))
    for _ in range(5):
        call()
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        print(1e3 * float(np.median(times)), flush=True)
