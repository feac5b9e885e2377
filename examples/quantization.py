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
from typing import Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

RANGE_IMAGES = 24


def quantize_on(b: fp.Backbone, images: Sequence, settings: fp.Settings, roi=None,
                progress=lambda *_: None) -> tuple[fp.Backbone, list[str]]:
    """The backbone in integers for good images (paths or arrays), and the keys of those that decided ranges.

    These are RANGE_IMAGES of the different images, those of the lowest keys: chance by the pixels, whatever
    the order. A backbone that is in integers already, or that cannot be (`fits`), is returned as it is.
    """
    if not fits(b):
        return b, []
    chosen: dict[str, np.ndarray] = {}
    for i, source in enumerate(images):
        with contextlib.suppress(fp.ImageError, fp.ShapeError):  # said when its features are to be used
            image = fp.load_image(source, settings.bits, roi)
            chosen[fp.image_key(image)] = image
            if len(chosen) > RANGE_IMAGES:
                del chosen[max(chosen)]
        progress("reading", i + 1, len(images))
    if not chosen:
        return b, []
    ranges = []
    for key in sorted(chosen):
        ranges.append(output_ranges(b, b.pixels(chosen[key], settings.shape)))
        progress("ranges", len(ranges), len(chosen))
    return quantize_backbone(b, np.max(ranges, 0)), sorted(chosen)


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


def quantize_backbone(b: fp.Backbone, ranges: np.ndarray) -> fp.Backbone:
    """`b` in integers for outputs of blocks as large as `ranges` (blocks,); residual sums may be twice that.

    A product's weights have a scale an output channel, activations one a tensor (that of ReLU6 ends at 6).
    In stem and depthwise layers a scale is as fine as sums below 2^24 allow: in 8 bits they move features by
    a whole deviation (over good images), in 16 by a third.
    """
    fraction, exponent = np.frexp(np.maximum(ranges, 1e-6))
    out = np.ldexp(np.ceil(fraction * 64) / 64, exponent) / 127  # up: the last bits depend on the machine
    sums, relu = out / 129, 6 / 255  # the first, 1/16384 of the range
    # one unit for all blocks that residuals connect
    for i in [*range(1, len(sums)), *range(len(sums) - 1, 0, -1)]:
        if b.blocks[i].skip:
            sums[i - 1:i + 1] = sums[i - 1:i + 1].max()

    def layer(name: str, w: np.ndarray, bias: np.ndarray, scale_in: float, scale_out: float,
              most: int = 0) -> dict:
        """most: the largest input of a layer with weights of 16 bits."""
        w, bias = w.astype(np.float64) * scale_in, bias.astype(np.float64)
        each, own = np.abs(w).reshape(-1, len(bias)), np.abs(bias)
        fits = (each.max(0) / 32767, (each.sum(0) * most + own) / (2 ** 24 - 2 ** 14)) if most else (
            each.max(0) / 127, own / 2 ** 22)
        scale = np.maximum(np.maximum(*fits), 1e-12)
        of = {"w": np.rint(w / scale), "b": np.rint(bias / scale), "m": scale / scale_out}
        return {f"{name}_{part}": a.astype(np.float32) for part, a in of.items()}
    blocks = []
    for i, block in enumerate(b.blocks):
        p, own = block.arrays, {}
        if i > 0:
            own = {"input_m": np.array([sums[i - 1] / out[i - 1]], np.float32)}
            own |= layer("expand", p["expand_w"], p["expand_b"], out[i - 1], relu)
        own |= layer("dw", p["dw_w"], p["dw_b"], relu, relu, 255)
        own |= layer("project", p["project_w"], p["project_b"], relu, sums[i])
        blocks.append(dataclasses.replace(block, arrays=own))
    made = dataclasses.replace(b, **layer("stem", b.stem_w, b.stem_b, 1 / 510, relu, 510),
                               blocks=tuple(blocks), scales=sums.astype(np.float32))
    fp._check_backbone(made)
    return made
