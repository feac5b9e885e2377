#!/usr/bin/env python3
"""A region of interest from a file or an array, checked against the images that it is for.

A mask is an image that is black where not to look. Polygons are a JSON file, in pixels of an image of that
size, x to the right and y down from its upper left corner; one within another is a hole (the even-odd rule):

    {"size": [640, 480], "polygons": [[[20, 10], [620, 10], [620, 470], [20, 470]],
                                      [[300, 200], [380, 200], [380, 230], [300, 230]]]}

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp


def region_of(roi, images: Sequence, settings: "fp.Settings") -> "fp.RegionOfInterest | None":
    """What `fastprior.fit` was given: a mask (H, W), a file or a region. None if all pixels are inside.

    ShapeError if it is empty, of other proportions than all images that can be read, or holds no place.
    """
    if not isinstance(roi, fp.RegionOfInterest):
        roi = fp.RegionOfInterest(read_mask(roi) if isinstance(roi, (str, os.PathLike)) else roi)
    others = []
    for image in fp._room("extraction").readable(images, settings.bits, None):
        if roi.fits(*image.shape[:2]):
            break
        others.append(image.shape[:2])
    else:
        if others:
            (h, w), (height, width) = roi.mask.shape, others[0]
            raise fp.ShapeError(f"roi: a region of {w}x{h} pixels, but images of {width}x{height}: draw it "
                                "on one of them")
    if not fp._inside(roi, settings.grid).any():
        raise fp.ShapeError("roi: no place, {0} pixels a side of {2}x{1}, is at least half inside: a larger "
                            "region, or a smaller cell (--cell)".format(settings.cell, *settings.shape))
    return None if roi.mask.all() else roi


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """bool (H, W) of an image, or of a .json file with polygons. ShapeError if it is none of them."""
    path = Path(path)
    if path.suffix.lower() == ".json":
        return _of_polygons(path)
    try:
        a = fp._pixels(path)
        from PIL import Image
        with Image.open(path) as image:
            if image.format in ("JPEG", "MPO", "WEBP", "AVIF"):
                raise ValueError(f"in a {image.format} black is not all 0: save the mask as PNG")
            transparent = "A" in image.getbands() or "transparency" in image.info
            transparent = transparent and image.convert("RGBA").getextrema()[3][0] < 255
    except Exception as e:  # whatever a decoder makes of foreign bytes
        raise e if isinstance(e, fp.BackendUnavailable) else fp.ShapeError(
            f"roi: {path}: expected a mask as an image, or polygons in a file called .json ({e})") from e
    if transparent:
        raise fp.ShapeError(f"roi: {path}: has transparent pixels: save the mask as black and white")
    return a.reshape(*a.shape[:2], -1).any(2)


def _of_polygons(path: Path) -> np.ndarray:
    try:
        told = json.loads(path.read_bytes())
        (width, height), polygons = told.pop("size"), told.pop("polygons")
        if told or not type(width) is type(height) is int or not 0 < width * height <= fp._MOST_PIXELS:
            raise ValueError(f"a size of {width!r:.20} x {height!r:.20}, and besides {[*told]!r:.80}")
        mask = np.zeros((height, width), bool)
        for polygon in polygons:
            corners = [(float(x), float(y)) for x, y in polygon]
            if len(corners) < 3 or not all(0 <= x <= width and 0 <= y <= height for x, y in corners):
                raise ValueError(f"a polygon of fewer than 3 corners, or beyond the image: {polygon!r:.80}")
            _toggle(mask, corners)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        text = getattr(e, "strerror", None) or str(e) or type(e).__name__
        wanted = '{"size": [width, height], "polygons": [[[x, y], ...], ...]}'
        raise fp.ShapeError(fp._printable(f"roi: {path}: expected {wanted} ({text})")) from e
    return mask


def _toggle(mask: np.ndarray, corners: list[tuple[float, float]]) -> None:
    """Turns the pixels whose centres lie within: right of an odd number of edges."""
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        first, last = (math.ceil(y - .5) for y in sorted((y0, y1)))
        if first < last:
            x = x0 + (np.arange(first, last) + .5 - y0) * (x1 - x0) / (y1 - y0)
            mask[first:last] ^= np.arange(mask.shape[1]) + .5 >= x[:, None]
