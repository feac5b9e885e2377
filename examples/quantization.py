#!/usr/bin/env python3
"""A backbone of the Lite family in integers, see `Backbone`: its ranges come from good images.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import heapq
import sys
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

RANGE_IMAGES = 24
PIXELS = 1024  # of each image's maps, by which a product is rounded
# channels from which on an expansion's inputs have 8 bits instead of 11: errors of many average out, as do
# those of the pixels of places of more than 16
MANY, MANY_FINE = 24, 64


def quantize_on(b: fp.Backbone, images: Sequence, settings: fp.Settings, roi=None,
                progress=lambda *_: None, without=()) -> tuple[fp.Backbone, list[str]]:
    """The backbone in integers for good images (paths or arrays), and the keys of those that decided ranges.

    These are RANGE_IMAGES of the different images, those of the lowest keys but for `without`: chance by the
    pixels, whatever the order. A backbone in integers, or one that cannot be (`fits`), is returned as it is.
    """
    if not fits(b):
        return b, []
    chosen: dict[str, np.ndarray] = {}
    for i, source in enumerate(images):
        with contextlib.suppress(fp.ImageError, fp.ShapeError):  # said when its features are to be used
            image = fp.load_image(source, settings.bits, roi)
            if (key := fp.image_key(image)) not in without:
                chosen[key] = image
            if len(chosen) > RANGE_IMAGES:
                del chosen[max(chosen)]
        progress("reading", i + 1, len(images))
    if not chosen:
        return b, []
    images, ranges = [chosen[key] for key in sorted(chosen)], []
    for image in images:
        ranges.append(output_ranges(b, b.pixels(image, settings.shape)))
        progress("ranges", len(ranges), len(images))
    pixels = [fp.resize_integers(image, settings.shape) for image in images]
    many = MANY if settings.cell > 16 else MANY_FINE
    return quantize_backbone(b, np.max(ranges, 0), pixels, many, progress), sorted(chosen)


def fits(b: fp.Backbone) -> bool:
    """Whether it is in floats and `quantize_backbone` takes it: of the Lite family."""
    return not b.integer and b.act == fp.RELU6 and b.mean == b.std == (.5,) * 3 and all(
        "se_reduce_w" not in block.arrays and ("expand_w" in block.arrays) == (i > 0)
        for i, block in enumerate(b.blocks))


def output_ranges(b: fp.Backbone, x: np.ndarray) -> np.ndarray:
    """Largest magnitude of each block's output in a normalised image, (blocks,)."""
    x, tops = fp.stem(x, b.stem_w, b.stem_b, b.act), []
    for block in b.blocks:
        x = fp.mbconv(x, block)
        tops.append(np.abs(x).max())
    return np.array(tops, np.float64)


def quantize_backbone(b: fp.Backbone, ranges: np.ndarray, images: Sequence[np.ndarray] = (),
                      many: int = MANY, progress=lambda *_: None) -> fp.Backbone:
    """`b` in integers for outputs of blocks as large as `ranges` (blocks,); residual sums may be twice that.

    A product's weights have a scale an output channel, activations one a tensor (that of ReLU6 ends at 6).
    In stem and depthwise layers a scale is as fine as sums below 2^24 allow: with weights of 8 bits they move
    features by a whole deviation (over good images). images: what `resize_integers` made of some, by
    which products are rounded, see `followed` and `rounded`; without them each weight is rounded by itself.
    """
    fraction, exponent = np.frexp(np.maximum(ranges, 1e-6))
    out = np.ldexp(np.ceil(fraction * 64) / 64, exponent) / 1023  # up: the last bits depend on the machine
    sums, expanded, depth = out / 16, 6 / 2047, 6 / 255  # the first, 1/16368 of the range
    # one unit for all blocks that residuals connect
    for i in [*range(1, len(sums)), *range(len(sums) - 1, 0, -1)]:
        if b.blocks[i].skip:
            sums[i - 1:i + 1] = sums[i - 1:i + 1].max()

    rng = np.random.default_rng(0)

    def layer(name: str, p: dict, scale_in: float, scale_out: float, most: int, inputs=None) -> dict:
        """most: the largest input; inputs: `pairs` of a product, with weights of 8 bits, others have 16."""
        w, bias = p[f"{name}_w"].astype(np.float64) * scale_in, p[f"{name}_b"].astype(np.float64)
        if inputs:
            u, w = followed(w, inputs, scale_in)
        each = np.abs(w).reshape(-1, len(bias))
        scale = np.maximum(each.max(0) / (32767 if inputs is None else 127),
                           (each.sum(0) * most + np.abs(bias)) / (.99 * 2 ** 24))
        scale = np.maximum(scale, 1e-12)
        of = {"w": rounded(w / scale, u) if inputs else np.rint(w / scale), "b": np.rint(bias / scale),
              "m": scale / scale_out}
        return {f"{name}_{part}": a.astype(np.float32) for part, a in of.items()}

    def pairs(maps: Sequence, change: Callable, exact: Callable) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each image what a product takes at some pixels, (n, K): in integers, and as it is in floats."""
        made = []
        for x, y in maps:
            x, y = (a.reshape(-1, a.shape[-1]) for a in (change(x.astype(np.float32)), exact(y)))
            at = slice(None) if len(x) <= PIXELS else rng.integers(len(x), size=PIXELS)
            made.append((x[at], y[at]))
        return made

    own = layer("stem", {"stem_w": b.stem_w, "stem_b": b.stem_b}, 1 / 510, expanded, 510)
    made, blocks = dataclasses.replace(b, **own, scales=sums.astype(np.float32)), []
    maps = []  # of each image in integers, of 16 bits as long as they wait, and in floats
    for x in images:
        y = fp.requantize(fp.stem(x, made.stem_w, made.stem_b, fp.NONE), made.stem_m, *fp._EXPANDED)
        maps.append((y.astype(np.int16), fp.stem(x / 510, b.stem_w, b.stem_b, b.act)))
    for i, block in enumerate(b.blocks):
        own, p = {}, block.arrays

        def narrowed(x: np.ndarray) -> np.ndarray:
            return fp.requantize(x, own["input_m"][0], -most, most)

        def inner(x: np.ndarray) -> np.ndarray:
            if i > 0:
                x = fp.linear(narrowed(x), own["expand_w"], own["expand_b"])
                x = fp.requantize(x, own["expand_m"], *fp._EXPANDED)
            x = fp.depthwise(x, own["dw_w"], own["dw_b"], block.stride, fp.NONE)
            return fp.requantize(x, own["dw_m"])

        def exact(x: np.ndarray) -> np.ndarray:
            x = fp.linear(x, p["expand_w"], p["expand_b"], b.act) if i > 0 else x
            return fp.depthwise(x, p["dw_w"], p["dw_b"], block.stride, b.act)
        if i > 0:
            most = 127 if block.channels[0] >= many else 1023
            unit = out[i - 1] * 1023 / most
            own["input_m"] = np.array([sums[i - 1] / unit, most], np.float32)
            own |= layer("expand", p, unit, expanded, most, pairs(maps, narrowed, lambda x: x))
        own |= layer("dw", p, expanded, depth, 2047)
        own |= layer("project", p, depth, sums[i], 255, pairs(maps, inner, exact))
        blocks.append(dataclasses.replace(block, arrays=own))
        for at, (x, y) in enumerate(maps):  # one by one: large ones are let go
            maps[at] = fp.mbconv(x.astype(np.float32), blocks[-1]).astype(np.int16), fp.mbconv(y, block)
        progress("rounding", i + 1, len(b.blocks))
    made = dataclasses.replace(made, blocks=tuple(blocks))
    fp._check_backbone(made)
    return made


def followed(w: np.ndarray, inputs: Sequence[tuple[np.ndarray, np.ndarray]],
             unit: float) -> tuple[np.ndarray, np.ndarray]:
    """What `rounded` needs to know of the inputs, u (K, K), and w (K, M) with what comes before in mind.

    inputs: pairs of (n, K), x in integers and what they stand for in floats, of which x * unit misses what
    was rounded before. What of it x tells, by least squares, the weights make up for, as far as there are
    more pixels than weights: it moves features by a fifth less. Li et al. 2025 (GPTAQ, arXiv:2504.02692).
    """
    from scipy import linalg
    h, missed, n = 0., 0., sum(len(x) for x, _ in inputs)
    some = max(1, 2 * PIXELS * len(inputs) // n)  # images at once: of small ones many
    for i in range(0, len(inputs), some):
        x, y = map(np.concatenate, zip(*inputs[i:i + some]))
        x = x.astype(np.float64)
        h, missed = h + x.T @ x, missed + x.T @ (y / unit - x)  # the first of integers, exact
    h[np.diag_indices(len(h))] += .01 * h.diagonal().mean() + 1e-6
    # inv(h) = u.T @ u, of the Cholesky factor of h from its end
    u = linalg.solve_triangular(linalg.cholesky(h[::-1, ::-1], lower=True)[::-1, ::-1], np.eye(len(h)))
    return u, w + n / (n + 4 * len(w)) * (u.T @ (u @ (missed @ w)))


def rounded(w: np.ndarray, u: np.ndarray) -> np.ndarray:
    """w (K, M) to integers within +-127, so that x @ w moves little for inputs with inv(x.T @ x) = u.T @ u.

    u: (K, K), upper triangle. Input by input: what rounding leaves goes to inputs that are still to come, as
    far as they vary with this one (Frantar et al. 2022, arXiv:2210.17323). It moves features by a third less.
    """
    w, out = w.copy(), np.empty_like(w)
    for k in range(len(w)):
        out[k] = np.clip(np.rint(w[k]), -127, 127)
        w[k + 1:] -= np.outer(u[k, k + 1:], (w[k] - out[k]) / u[k, k])
    return out
