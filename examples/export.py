#!/usr/bin/env python3
"""A whole model, or a bare backbone, as one ONNX graph: what `fastprior export` writes.

The graph is fastprior.py's reference operations once more, in ONNX's own (opset 17) and in their order:
resize, backbone, cells, whitening, factors, DDIM inversion, density, score and map. It shares weights and
calibration with the engines in kernels/ and no code, so onnxruntime also checks them (tests/test_export.py).

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import numpy as np

if "fp" not in globals():
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

try:
    from onnx import TensorProto, checker, helper, numpy_helper
except ImportError as e:
    raise fp.BackendUnavailable("export needs onnx: pip install 'fastprior[export]'") from e

OPSET, IR_VERSION = 17, 8
MOST_BYTES = (2 << 30) - (1 << 20)  # of weights: a protobuf ends at 2 GiB


class Graph:
    """Nodes and constants of a graph, written front to back. A value is known by its name, a string."""

    def __init__(self):
        self.nodes, self.constants, self.bytes = [], {}, 0

    def __call__(self, kind: str, *inputs: str, **attributes) -> str:
        """Append a node -> the name of its output."""
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, name: str, value, dtype=np.float32) -> str:
        """A constant called `name`; the same name again is the same constant."""
        if name not in self.constants:
            value = np.asarray(value, dtype, order="C")
            self.bytes += value.nbytes
            if self.bytes > MOST_BYTES:
                raise fp.FastPriorError(f"more than {MOST_BYTES / 1e9:.1f} GB of weights, and an ONNX file "
                                        "ends at 2 GiB: train with a larger --cell, or a smaller --size")
            self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(str(list(values)), values, np.int64)

    def model(self, name: str, inputs: dict[str, tuple], outputs: dict[str, list],
              metadata: dict[str, str]) -> bytes:
        """The file, checked. inputs: type and shape by name; outputs: shapes of float32 by name."""
        made = helper.make_graph(
            self.nodes, name, [helper.make_tensor_value_info(k, *v) for k, v in inputs.items()],
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
            list(self.constants.values()))
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
                                  producer_name="fastprior", producer_version=fp.__version__)
        helper.set_model_props(model, metadata)
        checker.check_model(model, full_check=True)
        return model.SerializeToString()


# ------------------------------------------------------------------------------------------------
# The operations, named as in fastprior.py; N images, n = G G places, C channels
# ------------------------------------------------------------------------------------------------

def activate(g: Graph, x: str, act: int) -> str:
    if act == fp.RELU6:
        return g("Clip", x, g.constant("0", 0), g.constant("6", 6))
    return g("Mul", x, g("Sigmoid", x)) if act == fp.SILU else x


def tap_weights(g: Graph, n_in: str, n_out: str) -> str:
    """Taps before they are divided by their sum: int64 (n_out, n_in), for sizes known only as the graph runs.

    Output i lies at (i + 1/2) n_in / n_out, input j at j + 1/2. In units of 1 / (2 n_out) they are
    |(2j + 1) n_out - (2i + 1) n_in| apart and the filter reaches 2 max(n_in, n_out): integers, so exact.
    """
    def odd(n):
        return g("Range", g.constant("one", 1, np.int64), g("Mul", two, n), two)
    two = g.constant("two", 2, np.int64)
    centres = g("Mul", g("Unsqueeze", odd(n_out), g.integers(1)), n_in)
    distance = g("Abs", g("Sub", g("Mul", odd(n_in), n_out), centres))
    reach = g("Mul", two, g("Max", n_in, n_out))
    return g("Max", g("Sub", reach, distance), g.constant("zero", 0, np.int64))


def resize_taps(g: Graph, n_in: str, n_out: str) -> str:
    """The rule of `fastprior.resize_taps` as a matrix (n_out, n_in)."""
    weight = g("Cast", tap_weights(g, n_in, n_out), to=TensorProto.FLOAT)
    return g("Div", weight, g("ReduceSum", weight, g.integers(1), keepdims=1))


def fixed_point_taps(g: Graph, n_in: str, n_out: str) -> str:
    """The rule of `fastprior.fixed_point_taps`: `resize_taps` in 1/4096, float32 integers (n_out, n_in).

    round(4096 sum / total) of each running sum, by octal digits: even at 65535 pixels in 31 bits, which is
    what some runtimes count in.
    """
    total = g("CumSum", tap_weights(g, n_in, n_out), g.constant("one", 1, np.int64))
    end, eight = g("ReduceMax", total, axes=[1], keepdims=1), g.constant("eight", 8, np.int64)
    rest, ratio = total, ""
    for _ in range(4):
        rest = g("Mul", rest, eight)
        digit = g("Div", rest, end)
        rest = g("Sub", rest, g("Mul", digit, end))
        ratio = g("Add", g("Mul", ratio, eight), digit) if ratio else digit
    half = g("GreaterOrEqual", g("Add", rest, rest), end)
    ratio = g("Cast", g("Add", ratio, g("Cast", half, to=TensorProto.INT64)), to=TensorProto.FLOAT)
    before = g("Slice", g("Pad", ratio, g.integers(0, 1, 0, 0)), g.integers(0), g.integers(-1), g.integers(1))
    return g("Sub", ratio, before)


def resample(g: Graph, x: str, rows: str, columns: str) -> str:
    """rows (h, H) @ x (..., H, W) @ columns (w, W).T -> (..., h, w)."""
    return g("MatMul", g("MatMul", rows, x), g("Transpose", columns, perm=[1, 0]))


def sides(g: Graph, pixels: str) -> list[str]:
    """H and W of (N, H, W, 3), int64 scalars."""
    return [g("Squeeze", g("Shape", pixels, start=axis, end=axis + 1), g.integers(0)) for axis in (1, 2)]


def mask_at(g: Graph, mask: np.ndarray, pixels: str) -> str:
    """A region's mask at the images' own size, bool (H, W), by the rule of `RegionOfInterest.at`."""
    def nearest(n_in: int, n_out: str) -> str:
        odd = g("Range", g.constant("one", 1, np.int64), g("Mul", two, n_out), two)
        return g("Div", g("Mul", odd, g.constant(f"region/{n_in}", n_in, np.int64)), g("Mul", two, n_out))
    two, x = g.constant("two", 2, np.int64), g.constant("region", mask, bool)
    for axis, (n_in, n_out) in enumerate(zip(mask.shape, sides(g, pixels))):
        x = g("Gather", x, nearest(n_in, n_out), axis=axis)
    return x


def resize(g: Graph, pixels: str, shape: tuple[int, int], net, mask: str = "") -> str:
    """uint8 (N, H, W, 3) -> what `Backbone.pixels` returns, float32 (N, 3, *shape): painted outside mask."""
    x = g("Transpose", g("Cast", pixels, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = g("Where", mask, x, g.constant("grey", fp.GREY)) if mask else x
    out = (g.constant(f"size/{n}", n, np.int64) for n in shape)
    rows, columns = map(fixed_point_taps if net.integer else resize_taps, (g, g), sides(g, pixels), out)
    x = resample_integers(g, x, rows, columns) if net.integer else resample(g, x, rows, columns)
    x = g("Reshape", x, g.integers(0, 3, *shape))  # runtimes plan ahead with sizes that they know
    if net.integer:
        return x
    mean, std = np.reshape(net.mean, (3, 1, 1)), np.reshape(net.std, (3, 1, 1))
    x = g("Mul", x, g.constant("1/(255 std)", 1 / (255 * std)))
    return g("Sub", x, g.constant("mean/std", mean / std))


def resample_integers(g: Graph, x: str, rows: str, columns: str) -> str:
    """`resample` of pixels with fixed-point taps, rounded as in `fastprior.resize_integers`."""
    def rounded(x: str, unit: int) -> str:
        x = g("Mul", x, g.constant(f"1/{unit}", 1 / unit))
        return g("Floor", g("Add", x, g.constant("1/2", .5)))
    x = rounded(g("MatMul", rows, x), 256)
    x = rounded(g("MatMul", x, g("Transpose", columns, perm=[1, 0])), 16384)
    return g("Sub", x, g.constant("510", 510))


def requantize(g: Graph, total: str, name: str, m: np.ndarray, low: int, high: int) -> str:
    """clip(rint(total * m)), m (C,): of integers, so that the first node changes nothing.

    It is there for runtimes, which would make one of a convolution and the product after it: its weights
    times m are no integers.
    """
    total = g("Round" if low else "Relu", total)
    x = g("Round", g("Mul", total, g.constant(f"backbone/{name}_m", m.reshape(-1, 1, 1))))
    return g("Clip", x, g.constant(str(low), low), g.constant(str(high), high))


def backbone_outputs(g: Graph, x: str, net) -> list[tuple[str, int]]:
    """`Backbone.pixels` (N, 3, S, S) -> blocks' outputs, (N, C, S/stride, S/stride) each, and strides."""
    def conv(x, name, w, b, stride=1, group=1):  # w (out, in, k, k)
        return g("Conv", x, g.constant(f"backbone/{name}_w", w), g.constant(f"backbone/{name}_b", b),
                 strides=[stride] * 2, group=group, auto_pad="SAME_UPPER")

    def pointwise(x, i, name):  # w (in, out)
        p = net.blocks[i].arrays
        return conv(x, f"block{i}_{name}", p[f"{name}_w"].T[:, :, None, None], p[f"{name}_b"])

    def done(x, name, m, limits=fp._EXPANDED):  # a layer's output; m: in integers
        return activate(g, x, net.act) if m is None else requantize(g, x, name, m, *limits)
    x = done(conv(x, "stem", net.stem_w.transpose(3, 2, 0, 1), net.stem_b, 2), "stem", net.stem_m)
    outputs, stride = [], 2
    for i, block in enumerate(net.blocks):
        p, y, stride = block.arrays, x, stride * block.stride
        if "input_m" in p:
            m, most = p["input_m"][:1], int(p["input_m"][1])
            y = requantize(g, y, f"block{i}_input", m, -most, most)
        if "expand_w" in p:
            y = done(pointwise(y, i, "expand"), f"block{i}_expand", p.get("expand_m"))
        w = p["dw_w"].transpose(2, 0, 1)[:, None]
        y = conv(y, f"block{i}_dw", w, p["dw_b"], block.stride, len(w))
        y = done(y, f"block{i}_dw", p.get("dw_m"), (0, 255))
        if "se_reduce_w" in p:
            s = activate(g, pointwise(g("GlobalAveragePool", y), i, "se_reduce"), fp.SILU)
            y = g("Mul", y, g("Sigmoid", pointwise(s, i, "se_expand")))
        y = pointwise(y, i, "project")
        if net.integer:
            y = requantize(g, y, f"block{i}_project", p["project_m"], *fp._SUMS)
        x = g("Add", y, x) if block.skip else y
        if net.integer and block.skip:
            x = g("Clip", x, *(g.constant(str(limit), limit) for limit in fp._SUMS))
        outputs.append((x, stride))
    return outputs


def spread(g: Graph, x: str, inside: np.ndarray) -> str:
    """Values of the places inside (N, n) -> of all places (N, G G'), 0 outside."""
    source = np.where(inside, inside.cumsum() - 1, inside.sum())  # the last is a 0
    return g("Gather", g("Pad", x, g.integers(0, 0, 0, 1)), g.constant("places", source, np.int64), axis=1)


def pool(g: Graph, x: str, grid: tuple[int, int], cell: int, scale: np.float32 | None = None) -> str:
    """Averages of the cells of a lattice, `cell` values a side; scale: of integers, see `fastprior.pool`."""
    if scale is None:
        return g("AveragePool", x, kernel_shape=[cell] * 2, strides=[cell] * 2) if cell > 1 else x
    if cell > 1:
        exact = -fp._SUMS[0] * cell * cell < 1 << 24  # in float32; those of a row always are
        x = g("Reshape", x, g.integers(0, 0, grid[0], cell, grid[1], cell))
        x = g("ReduceSum", x, g.integers(5), keepdims=0)
        x = x if exact else g("Cast", x, to=TensorProto.DOUBLE)
        x = g("ReduceSum", x, g.integers(3), keepdims=0)
        x = x if exact else g("Cast", x, to=TensorProto.FLOAT)
    return g("Mul", x, g.constant(f"unit/{scale}/{cell}", scale / np.float32(cell * cell)))


def features(g: Graph, outputs: list[tuple[str, int]], net, shape: tuple[int, int], grid: tuple[int, int],
             blocks: tuple[int, ...]) -> str:
    """A view of images (*shape), see `Backbone.views`: (N, C, n), of these blocks' outputs side by side."""
    pooled = [pool(g, x, grid, shape[0] // grid[0] // stride, net.scales[i] if net.integer else None)
              for i, (x, stride) in enumerate(outputs) if i in blocks]
    return g("Reshape", g("Concat", *pooled, axis=1), g.integers(0, 0, math.prod(grid)))


def coarsen(g: Graph, f: str, cells: np.ndarray) -> str:
    """Means of the places of each of `cells` (m, 4): f (N, C, n) -> (N, C, m)."""
    a, b, c, d = (g("Gather", f, g.constant(f"cells/{i}", cells[:, i], np.int64), axis=2) for i in range(4))
    return g("Mul", g("Add", g("Add", a, b), g("Add", c, d)), g.constant("1/4", .25))


def whiten(g: Graph, f: str, mean: np.ndarray, w: np.ndarray, view: str = "") -> str:
    """W_n (f_n - mean_n): f (N, C, n) -> (N, n, C); mean (n, C), w (n, C, C), or (n, C) diagonal."""
    d = g("Sub", g("Transpose", f, perm=[2, 0, 1]), g.constant(f"{view}mean", mean[:, None]))
    if w.ndim == 2:
        x = g("Mul", d, g.constant(f"{view}whitener", w[:, None]))
    else:
        x = g("MatMul", d, g.constant(f"{view}whitener", w.swapaxes(1, 2)))
    return g("Transpose", x, perm=[1, 0, 2])


def remove_factors(g: Graph, x: str, v: np.ndarray, view: str = "") -> str:
    """x - V^T V x: x (N, n, C), v (K, n, C)."""
    k, n, c = v.shape
    factors = g.constant(f"{view}factors", v.reshape(k, n * c))
    along = g("Gemm", g("Reshape", x, g.integers(0, n * c)), factors, transB=1)
    return g("Sub", x, g("Reshape", g("Gemm", along, factors), g.integers(0, n, c)))


def denoise(g: Graph, denoiser: dict[str, np.ndarray], x: str, t: int) -> str:
    """F(x_t, t): (N, n, C) -> (N, n, C). Constants that depend on t are there once a step, the rest once."""
    p = fp._at_time(denoiser, t)

    def w(name):
        return g.constant(f"denoiser/{name}" + f"/t{t}" * (p[name] is not denoiser[name]), p[name])

    def norm(x, name):
        return g("LayerNormalization", x, w(f"{name}_gain"), w(f"{name}_bias"), axis=-1, epsilon=1e-5)

    def linear(x, weight, bias):
        return g("Add", g("MatMul", x, w(weight)), w(bias))
    h = linear(x, "in_w", "pos")
    for i in range(fp._num_mixers(p)):
        u = activate(g, g("MatMul", w(f"mix{i}_token1"), norm(h, f"mix{i}_norm1")), fp.SILU)
        h = g("Add", g("MatMul", w(f"mix{i}_token2"), u), h)
        u = activate(g, linear(norm(h, f"mix{i}_norm2"), f"mix{i}_w1", f"mix{i}_b1"), fp.SILU)
        h = g("Add", linear(u, f"mix{i}_w2", f"mix{i}_b2"), h)
    return linear(norm(h, "norm"), "out_w", "out_b")


def ddim_invert(g: Graph, x: str, denoiser: dict[str, np.ndarray] | None, timesteps, prediction: str) -> str:
    """x0 -> x_T, (N, n, C); without a denoiser F = 0."""
    for t, (a, b) in zip(timesteps.tolist(), fp.rotation(timesteps, prediction)):
        y = g("Mul", x, g.constant(f"a/t{t}", a))
        if denoiser:
            y = g("Add", y, g("Mul", denoise(g, denoiser, x, t), g.constant(f"b/t{t}", b)))
        x = y
    return x


def standardise(g: Graph, x: str, gain: np.ndarray, offset: np.ndarray) -> str:
    """z_i = gain_i |x_i|^2 / 2 + offset_i of each place i: (N, n, C) -> (N, n), see `Prior.z`."""
    # The Reshape between is for OpenVINO's CPU plugin (2026.4): it would fuse a product by place into the
    # reduction, and get it wrong from the second image of a batch on.
    squares = g("ReduceSumSquare", x, axes=[2], keepdims=1)
    nll = g("Mul", g("Reshape", squares, g.integers(0, len(gain))), g.constant("1/2", .5))
    return g("Add", g("Mul", nll, g.constant("gain", gain)), g.constant("offset", offset))


def worst_mean(g: Graph, z: str, count: int) -> str:
    """Mean of the `count` highest of the places, (N, n) -> (N,)."""
    g.nodes.append(helper.make_node("TopK", [z, g.integers(count)], ["worst", "worst_places"], axis=1))
    return g("ReduceMean", "worst", axes=[1], keepdims=0)


def fine_density(g: Graph, f: str, mean: np.ndarray, w: np.ndarray) -> str:
    """|W (f_n - mean_n)|^2 / 2: f (N, C, n) -> (N, n); mean (n, C), w (C, C)."""
    d = g("Sub", g("Transpose", f, perm=[0, 2, 1]), g.constant("fine/mean", mean))
    x = g("MatMul", d, g.constant("fine/whitener", w.T))
    return g("Mul", g("ReduceSumSquare", x, axes=[2], keepdims=0), g.constant("1/2", .5))


def sharpen(g: Graph, cells: str, f: str, down: np.ndarray, across: np.ndarray) -> str:
    """Cells (N, G G') enlarged, times sqrt(f / its maximum over 5 x 5 places), f (N, F F'): (N, 1, F, F')."""
    fine, grid = zip(down.shape, across.shape)
    f = g("Reshape", f, g.integers(0, 1, *fine))
    most = g("MaxPool", f, kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4)
    most = g("Max", most, g.constant("tiny", np.finfo(np.float32).tiny))
    enlargers = g.constant("enlarge/down", down), g.constant("enlarge/across", across)
    x = resample(g, g("Reshape", cells, g.integers(0, 1, *grid)), *enlargers)
    return g("Mul", x, g("Sqrt", g("Div", f, most)))


def anomaly_map(g: Graph, x: str, pixels: str) -> str:
    """The fine map at the images' own size: (N, 1, F, F') -> (N, H, W)."""
    size = g("Concat", g("Shape", x, start=0, end=2), g("Shape", pixels, start=1, end=3), axis=0)
    x = g("Resize", x, "", "", size, mode="linear", coordinate_transformation_mode="half_pixel")
    return g("Squeeze", x, g.integers(1))


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def backbone_model(net, shape: tuple[int, int]) -> bytes:
    """float32 (1, 3, *shape), normalised -> the stages, (1, C, h, w) each: for `bench --against`."""
    g = Graph()
    blocks = backbone_outputs(g, "image", net)
    outputs = {blocks[i][0]: [1, c, *(n // blocks[i][1] for n in shape)]
               for i, c in zip(net.stages, net.channels)}
    return g.model(net.name, {"image": (TensorProto.FLOAT, [1, 3, *shape])}, outputs, {})


def prior_model(prior, name: str, metadata: dict[str, str]) -> bytes:
    """`pixels`, uint8 (N, H, W, 3), N, H, W free -> `score` (N,) and `map` (N, H, W) as in `Result`."""
    s, net, calibration = prior.settings, prior.backbone, prior.calibration
    zero, unit = calibration["moments"][:2]
    g = Graph()
    mask = mask_at(g, prior.roi.mask, "pixels") if prior.roi else ""
    outputs = backbone_outputs(g, resize(g, "pixels", s.shape, net, mask), net)
    x, fine = (features(g, outputs, net, s.shape, *view) for view in net.views(s))
    if not prior.inside.all():
        x = g("Gather", x, g.constant("inside", np.flatnonzero(prior.inside), np.int64), axis=2)
    views, parts = [(x, "", prior.denoiser)], []
    if prior.coarse:
        views.append((coarsen(g, x, prior.cells), "coarse/", None))
    for (x, view, denoiser), (mean, whitener, factors) in zip(views, prior._preconditioning):
        x = whiten(g, x, mean, whitener, view)
        x = x if factors is None else remove_factors(g, x, factors, view)
        parts.append(ddim_invert(g, x, denoiser, prior.timesteps, prior.prediction))
    x = g("Concat", *parts, axis=1)
    z = standardise(g, x, calibration["gain"], calibration["offset"])
    worst = worst_mean(g, z, fp._worst_count(s.worst, len(calibration["gain"])))
    score = g("Div", g("Sub", worst, g.constant("score/zero", zero)), g.constant("score/unit", unit))
    weight, offset = prior._map_weights()
    cells = g("Slice", z, g.integers(0), g.integers(len(weight)), g.integers(1))
    cells = g("Add", g("Mul", cells, g.constant("map/weight", weight)), g.constant("map/offset", offset))
    cells = cells if prior.inside.all() else spread(g, cells, prior.inside)
    fine_map = sharpen(g, cells, fine_density(g, fine, *prior.fine), *fp._enlargers(s))
    m = anomaly_map(g, fine_map, "pixels")
    m = g("Where", mask, m, g.constant("0", 0)) if mask else m
    for value, output in ((score, "score"), (m, "map")):
        g.nodes.append(helper.make_node("Identity", [value], [output]))
    return g.model(name, {"pixels": (TensorProto.UINT8, ["N", "H", "W", 3])},
                   {"score": ["N"], "map": ["N", "H", "W"]}, metadata)


def describe(prior, name: str, product: str) -> dict[str, str]:
    """What travels with the graph as its metadata_props: text by name."""
    bits = prior.settings.bits
    deep = "" if bits is None else (f"; of images with 16 bits a value, {bits} of them used: "
                                    f"min(value, {(1 << bits) - 1}) >> {bits - 8}")
    if prior.roi:
        deep += "; {1}x{0} pixels or in these proportions: it has a region of interest".format(
            *prior.roi.mask.shape)
    return {
        "fastprior": fp.__version__, "model": name, **({"product": product} if product else {}),
        "backbone": prior.backbone.name, "steps": str(prior.settings.steps),
        "input": "pixels: uint8 (N, H, W, 3), RGB, upright (EXIF), of any size, the N of one call of the "
                 "same; grey repeated, no alpha, neither resized nor normalised" + deep,
        "threshold": repr(prior.threshold.value),
        "verdict": "good if score <= threshold, else anomaly (also where the score is no number)",
        "map_threshold": "1.0",
        "promise": fp._room("console").promise(prior)}


def export(model: Path, output: Path, product: str | None, **changes) -> None:
    """`model` (.npz) to `output` (.onnx), atomically. FastPriorError where that cannot be."""
    if output.suffix.lower() != ".onnx":
        raise fp.ShapeError(f"{output}: expected the name of a file to write that ends in .onnx")
    fp._room("folders").check_output(output, "ONNX file")
    made = fp.Prior.load(model, **changes)
    products = fp._products(made)
    if "" in products and product:
        raise fp.FastPriorError(f"{model}: holds one product without a name: leave --product out")
    if (product or "") not in products:
        got = f"; got {product!r:.80}" if product else ""
        raise fp.FastPriorError(f"{model}: a graph is of one product: give --product, one of "
                                f"{', '.join(products)}{got}")
    if products[product or ""].settings.tile:
        raise fp.FastPriorError(f"{model}: cuts images into windows (--tiles), and a graph does not")
    told = describe(products[product or ""], fp._printable(model.name), product or "")
    data = prior_model(products[product or ""], fp._printable(model.stem), told)
    target = Path(os.path.realpath(output))  # a link stays a link
    temporary = target.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as e:
        raise fp.FastPriorError(f"{output}: cannot be written ({e.strerror})") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    for line in (f"{len(data) / 1e6:.1f} MB, opset {OPSET}; {told['input']}", told["promise"]):
        fp._room("console").say(line)
    print(output)
