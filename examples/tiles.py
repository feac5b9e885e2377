#!/usr/bin/env python3
"""Large images and odd shapes: overlapping square windows of an image, one model for all of them.

A window is what the network sees, so a small defect of a large image stays as large as it is, and an image
that is not square keeps its proportions. All windows share one model: for surfaces and webs, that look alike
everywhere. The image's score is that of its worst window. Maps of windows are averaged where these overlap,
weighted by the distance to the window's edge, so that there are no seams. Thresholds and p-values are of
whole images: read from good ones that no window was trained on, split conformal.

    prior = fastprior.Prior.fit("web/good", tile=448)
    result = prior.score("web/new.png")

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

LEAST_IMAGES = 2 * fp.MIN_HELD_OUT
_OVERLAP = .25  # of a window, at least
_MOST_WINDOWS = 800  # trained on, and at most 2^27 pixels: 0.4 GB


def starts(length: int, tile: int) -> list[int]:
    """First pixels of the windows along a side, evenly spread, the last one at its end."""
    count = 1 + math.ceil((length - tile) / (tile * (1 - _OVERLAP)) - 1e-9)
    return [round(x) for x in np.linspace(0, length - tile, count)]


def corners(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """(top, left) of every window. ShapeError for an image that is smaller than one."""
    if min(height, width) < tile:
        raise fp.ShapeError(f"{width}x{height} pixels, but windows of {tile}: expected no side to be smaller")
    return list(itertools.product(starts(height, tile), starts(width, tile)))


def window_prior(prior: fp.Prior) -> fp.Prior:
    """The same model, for a window."""
    if "_window" not in vars(prior):
        settings = dataclasses.replace(prior.settings, tile=0)
        prior._window = prior._with(settings, prior.calibrations, prior.summary)
    return prior._window


def _score(prior: fp.Prior, image: np.ndarray, with_map: bool, chunk: int) -> tuple[list, np.ndarray | None]:
    """Scores of an image's windows, and its map (H, W)."""
    tile, (height, width) = prior.settings.tile, image.shape[:2]
    places, scores, joined = corners(height, width, tile), [], None
    if with_map:
        ramp = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1)).astype(np.float32)
        joined = np.zeros((height, width), np.float32)
    for some in (places[i:i + chunk] for i in range(0, len(places), chunk)):
        windows = [image[y:y + tile, x:x + tile] for y, x in some]
        for (y, x), r in zip(some, window_prior(prior).score_batch(windows, with_map=with_map)):
            scores.append(r.score)
            if with_map:
                joined[y:y + tile, x:x + tile] += r.anomaly_map * ramp * ramp[:, None]
    if with_map:
        down, across = (sum(np.pad(ramp, (at, length - at - tile)) for at in starts(length, tile))
                        for length in (height, width))
        for row, weight in zip(joined, down):
            row /= weight * across
    return scores, joined


def score_batch(prior: fp.Prior, images: Sequence, with_map: bool, chunk: int, errors: str) -> list:
    """`Prior.score_batch` of a model with windows."""
    if isinstance(images, (str, os.PathLike)) or errors not in ("raise", "return"):
        raise fp.ShapeError("score_batch: expected a list of images, and errors='raise' or 'return'")
    results = []
    for source in images:
        try:
            if hasattr(source, "__cuda_array_interface__"):
                source = source.get() if hasattr(source, "get") else source.cpu().numpy()
            image = fp.load_image(source, prior.settings.bits)
            try:
                scores, joined = _score(prior, image, with_map, chunk)
            except fp.ShapeError as e:
                name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else "image"
                raise fp.ShapeError(fp._printable(f"{name}: {e}")) from e
            if len(scores) != (known := prior.summary.get("windows")):
                fp._log.warning("%d windows in an image of %dx%d, but %s in those that the threshold is of: "
                                "the false-alarm rate is another", len(scores), *image.shape[1::-1], known)
        except (fp.ImageError, fp.ShapeError) as e:
            if errors == "raise":
                raise
            results.append(e)
            continue
        frames = fp.Frames(np.array([np.max(scores)]), [joined], [])  # not a number if one of them is none
        results.append(fp.Result(frames, 0, prior))
    return results


def _different(images: Sequence, bits: int | None,
               progress) -> tuple[list[int], list[str], np.ndarray, np.ndarray, list[str]]:
    """Of the different images: places, keys, groups of near-duplicates, looks. And the unreadable ones.

    In the order of their keys, so that names decide nothing. ShapeError unless they are of one size.
    """
    curation, found, unreadable, shapes = fp._room("curation"), {}, [], {}
    for i, source in enumerate(images):
        try:
            image = fp.load_image(source, bits)
        except (fp.ImageError, fp.ShapeError) as e:
            unreadable.append(str(e))
            continue
        shapes.setdefault(image.shape[:2], source if isinstance(source, (str, os.PathLike)) else f"image {i}")
        found.setdefault(fp.image_key(image), (i, curation.look(image)))
        progress("reading", i + 1, len(images))
    if len(shapes) > 1:
        ((h, w), one), ((height, width), other) = list(shapes.items())[:2]
        raise fp.ShapeError(f"tile: expected good images of one size, got {w}x{h} ({one}) and "
                            f"{width}x{height} ({other})")
    if 2 * len(unreadable) > len(images):
        raise fp.ImageError(f"{len(unreadable)} of {len(images)} images cannot be read, the first: "
                            f"{unreadable[0]}")
    keys = sorted(found)
    from scipy.sparse.csgraph import connected_components
    looks = np.array([found[k][1] for k in keys])
    linked = curation.look_alike(looks) if keys else np.zeros((0, 0), bool)
    group = connected_components(linked, directed=False)[1]
    return [found[k][0] for k in keys], keys, group, looks, unreadable


def _calibrated(prior: fp.Prior, images: Sequence, keep_all: bool, progress) -> tuple[dict, np.ndarray]:
    """Calibration of whole images from good ones, for the model's steps; and which were kept, bool."""
    own, values, peaks = dict(prior.calibration), [], []
    window = window_prior(prior)
    for i, source in enumerate(images):
        scores, joined = _score(prior, fp.load_image(source, prior.settings.bits), True, 16)
        values.append(scores)
        peaks.append(float(joined.max()))
        progress("calibration", i + 1, len(images))
    values, peaks = np.array(values), np.array(peaks)
    kept = np.ones(len(values), bool)
    if not keep_all:
        kept = ~fp._room("curation").outliers(values, 1 / values.shape[1])[0]
    worst = values.max(1)[kept]
    low, middle, high = np.quantile(worst, [.25, .5, .75])
    spread = max((high - low) / 1.349, 1e-6)
    zero, unit, ground = own["moments"]
    weight, _ = window._map_weights()
    one = float(1 / (weight[0] * own["gain"][0])) + ground
    own["moments"] = np.array([zero + middle * unit, spread * unit, ground])
    own["scores"] = np.sort((worst - middle) / spread)
    own["peaks"] = np.sort(peaks[kept]) * (one - ground) + ground
    return own, kept


def calibrate(prior: fp.Prior, images: Sequence, unreadable: list[str], keep_all: bool, progress,
              settings: fp.Settings) -> fp.Prior:
    """`Prior.calibrate` of a model with windows."""
    places, keys, group, looks, own = _different(images, prior.settings.bits, progress)
    unreadable = unreadable + own
    if seen := len(set(keys) & set(prior.summary.get("trained_on", ()))):
        raise fp.ImageError(f"{seen} of {len(images)} images were trained on: calibrate needs good "
                            "images that the model has not seen")
    curation = fp._room("curation")
    first = curation.first_of(group)
    lone = [places[i] for i in np.flatnonzero(first)]
    if len(lone) < fp.MIN_HELD_OUT:
        raise fp.ImageError(f"{len(lone)} readable, different good images (near-duplicates count once): at "
                            f"least {fp.MIN_HELD_OUT} are needed to calibrate"
                            + (f" (first problem: {unreadable[0]})" if unreadable else ""))
    made, kept = _calibrated(prior, [images[i] for i in lone], keep_all, progress)
    aside = fp._names(images, [lone[i] for i in np.flatnonzero(~kept)])
    size = fp.load_image(images[lone[0]], prior.settings.bits).shape[:2]
    told = {"calibrated_on": int(kept.sum()), "held_out_aside": len(aside), "set_aside_today": aside,
            "near_duplicates_today": len(places) - len(lone), "unreadable": unreadable[:20],
            "windows": len(corners(*size, prior.settings.tile)),
            "traits": curation.known_traits(looks[first][kept])}
    return curation.doubted(prior, prior._with(settings, {prior.settings.steps: made}, prior.summary | told))


def _cut(images: Sequence, count: int, settings: fp.Settings) -> Iterator[tuple[int, np.ndarray]]:
    """Windows of good images, `count` of each, drawn without return; and the image's place."""
    rng = np.random.default_rng(settings.seed)
    for place, source in enumerate(images):
        image = fp.load_image(source, settings.bits)
        every = corners(*image.shape[:2], settings.tile)
        for i in np.sort(rng.permutation(len(every))[:count]):
            y, x = every[i]
            yield place, image[y:y + settings.tile, x:x + settings.tile].copy()


def fit(images: Sequence, locked: list[str], found: str, config: fp.Settings, backbone: fp.Backbone,
        keep_all: bool, not_with: tuple, progress, **options) -> fp.Prior:
    """`fp.fit` with windows: a fifth of the images, at least MIN_HELD_OUT, calibrate; the others' train.

    Near-duplicates stay on one side, and of those that calibrate one counts. ImageError if there are fewer
    than LEAST_IMAGES different ones.
    """
    began = time.perf_counter()
    if any(other is not None for other in not_with):
        raise fp.ShapeError("tile: not together with a region of interest or kept features")
    places, keys, group, looks, unreadable = _different(images, config.bits, progress)
    groups = group.max(initial=-1) + 1
    if groups < LEAST_IMAGES:
        raise fp.ImageError(f"{groups} readable, different good images: at least {LEAST_IMAGES} are needed "
                            "to train on windows"
                            + (f" (first problem: {unreadable[0]})" if unreadable else ""))
    chosen = np.random.default_rng(config.seed).permutation(groups) < max(fp.MIN_HELD_OUT, groups // 5)
    lone = fp._room("curation").first_of(group)
    held = [places[i] for i in np.flatnonzero(chosen[group] & lone)]
    rest = [places[i] for i in np.flatnonzero(~chosen[group])]
    windows = len(corners(*fp.load_image(images[rest[0]], config.bits).shape[:2], config.tile))
    most = min(_MOST_WINDOWS, (1 << 27) // config.tile ** 2)
    count = max(1, min(windows, most // len(rest)))
    settings = dataclasses.asdict(config) | {"tile": 0, "backbone": backbone, "calibration": "cross"}
    settings["copies"] = min(config.copies, max(1, 400 // (count * len(rest))))  # windows are shifted already
    owner, cut = zip(*_cut([images[i] for i in rest[:most]], count, config))
    inner = fp.fit(cut, keep_all=keep_all, progress=progress, **options, **settings)
    learned = {*inner.summary["trained_on"]}
    unlike = {rest[i] for i, window in zip(owner, cut) if fp.image_key(window) not in learned}
    told = {"windows": windows, "windows_trained_on": inner.summary["images"], "images": len(rest),
            "trained_on": keys, "traits": fp._room("curation").known_traits(looks), "found": found,
            "unreadable": (locked + unreadable)[:20],
            "not_read": len(locked + unreadable), "near_duplicates": len(places) - int(groups),
            "repeated": len(images) - len(unreadable) - len(places)}
    prior = inner._with(dataclasses.replace(inner.settings, tile=config.tile, calibration=config.calibration),
                        inner.calibrations,
                        inner.summary | told)
    made, kept = _calibrated(prior, [images[i] for i in held], keep_all, progress)
    aside = [held[i] for i in np.flatnonzero(~kept)]
    told = {"held_out": int(kept.sum()), "held_out_aside": len(aside),
            "set_aside": fp._names(images, {*aside} | unlike),
            "seconds": round(time.perf_counter() - began, 1)}
    return prior._with(prior.settings, {config.steps: made}, prior.summary | told)
