#!/usr/bin/env python3
"""Curation of good images: near-duplicates, images unlike the others, the depth of 16-bit ones, drift.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp


MOST_ASIDE = .1  # of the images may be set aside; twice that, where they stand far apart: see `outliers`


def settle(images: Iterable, settings: fp.Settings) -> tuple[fp.Settings, list[float]]:
    """The settings with what good images decide, where it was not given: proportions of the size, depth.

    And the least and the greatest width / height of the images.
    """
    shapes, deep = [], []
    for source in images:
        with contextlib.suppress(Exception):  # what cannot be read is said when it is to be used
            a = fp._pixels(source, deep_only=True)
            shapes.append(a.shape[:2])
            if a.dtype == np.uint16:
                deep.append((fp._beyond(a), a.size))
    settled = dataclasses.replace(settings, bits=settings.bits or find_depth(deep),
                                  size=find_shape(shapes, settings))
    ratios = [width / height for height, width in shapes]
    return settled, [min(ratios), max(ratios)] if ratios else []


def squashed(shape: Sequence[int], prior: fp.Prior) -> str:
    """That an image (H, W, ...) has other proportions than all that trained, by over 2 %; "" if not."""
    try:
        low, high = map(float, prior.summary["proportions"])
    except (AttributeError, KeyError, TypeError, ValueError):  # not known
        return ""
    if prior.settings.tile or low / 1.02 <= shape[1] / shape[0] <= high * 1.02:
        return ""
    known = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    return (f"{shape[1]}x{shape[0]} pixels: other proportions than the images that trained (width / height "
            f"{known}) are squashed, and the scores mean little")


def find_shape(shapes: Sequence[tuple[int, int]], settings: fp.Settings) -> int | tuple[int, int]:
    """For a size that is one number: (height, width) of about its area and the images' median proportions.

    A number where it is a square. Windows (tile) are squares. Sides are as `Settings.check` wants them: at
    least 64 and a cell, so that what is very long has more than that area.
    """
    if isinstance(settings.size, tuple) or settings.tile or not shapes:
        square = len({*settings.shape}) == 1
        return settings.shape[0] if square else settings.size
    unit = math.lcm(settings.cell, 32)
    least, most = -(-64 // unit), 8192 // unit
    aspect = sorted(width / height for height, width in shapes)[(len(shapes) - 1) // 2]
    longer = max(aspect, 1 / aspect)  # of the proportions, and then of the sides
    short = max(least, round(settings.size / unit / math.sqrt(longer)))
    long = min(round(short * longer), most, 1024 ** 2 // (short * unit ** 2))
    shape = (short * unit, long * unit) if aspect > 1 else (long * unit, short * unit)
    return settings.size if shape[0] == shape[1] else shape


def find_depth(deep: Sequence[tuple[np.ndarray, int]]) -> int | None:
    """The smallest depth (see `load_image`) that holds all but 1/1000 of the 16-bit values; None without.

    deep: of each 16-bit image, how many values lie beyond each depth, and how many values it has. ShapeError
    where most images use 4 bits less: then two depths are mixed.
    """
    if not deep:
        return None
    beyond, counts = zip(*deep)
    depth = fp._depth(sum(beyond), sum(counts))
    lower = [own for own in map(fp._depth, beyond, counts) if own <= depth - 4]
    if 2 * len(lower) > len(counts):
        raise fp.ShapeError(f"{len(lower)} of {len(counts)} images use at most {max(lower)} bits, "
                            f"others {depth}: say which is meant (--bits)")
    return depth


def near_duplicates(e, threads: int | None = None) -> np.ndarray:
    """(I,) a number for each image, 0, 1, 2 ...: frames of a video, crops, re-compressed copies share one.

    Two are linked if they look the same (`look_alike`), or if their features are as close as an image's to
    those of its own jittered copy (the median): by cosine, where images differ more than such copies, in the
    generalised eigenvectors of the copies' covariance W about their image in the images' covariance T, both
    pooled over the places, W v = lambda T v, each weighted by sqrt(1 - lambda). Linked ones share a group.
    """
    from scipy import linalg, sparse
    first, copies, (_, n, c) = np.flatnonzero(e.clean), np.flatnonzero(~e.clean), e.features.shape
    linked = look_alike(e.looks)
    if len(first) > 1 and len(copies):
        mean = e.features[first].mean(0, dtype=np.float32)

        def scatter(k):
            sums = np.zeros((2, c, c))
            for i in range(k, n, 8):
                x = e.features[first, i].astype(np.float32)
                d = e.features[copies, i] - x[e.owner[copies]]
                x -= mean[i]
                sums += x.T @ x / len(x), d.T @ d / len(d)
            return sums
        total, within = sum(fp._run(scatter, min(n, 8), threads))
        total += 1e-3 * max(np.trace(total) / c, 1e-12) * np.eye(c)
        ratio, v = linalg.eigh(within, total)
        v = (v * np.sqrt(np.maximum(1 - ratio, 0)))[:, ratio < .95].astype(np.float32)

        def directions(rows):
            x = ((e.features[rows].astype(np.float32) - mean) @ v).reshape(len(rows), -1)
            return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        own = np.concatenate([directions(first[i:i + 64]) for i in range(0, len(first), 64)])
        alike = [(directions(rows) * own[e.owner[rows]]).sum(1)
                 for rows in np.array_split(copies, -(-len(copies) // 64))]
        linked |= own @ own.T >= max(np.median(np.concatenate(alike)), .3)  # below, nothing is alike
    return sparse.csgraph.connected_components(linked, directed=False)[1]


_LOOK = 128  # side, pixels


def look(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> complex64 spectrum (128, 65) of its grey middle band, see `look_alike`."""
    x = fp.resize_normalize(image, _LOOK, (0, 0, 0), (1, 1, 1), dtype=np.float32).mean(-1)
    f = np.fft.rfft2((x - x.mean()) * np.sqrt(np.outer(np.hanning(_LOOK), np.hanning(_LOOK))))
    square = (2 * np.pi * np.hypot(np.fft.fftfreq(_LOOK)[:, None], np.fft.rfftfreq(_LOOK))) ** 2
    f *= np.exp(-square * .7 ** 2 / 2) - np.exp(-square * 4 ** 2 / 2)  # Gaussians of 0.7 and 4 pixels
    return f.astype(np.complex64)


def look_alike(looks: np.ndarray) -> np.ndarray:
    """bool (I, I): which correlate by 0.965, and by 0.96 in what they do not have in common with all others.

    Each where it is highest within a shift of 5 % of a side.
    """
    reach = np.arange(-_LOOK // 20, _LOOK // 20 + 1)
    root = np.full(looks.shape[-1], 2 ** .5 / _LOOK, np.float32)  # energy: a real image's other half counts
    root[[0, -1]] = 1 / _LOOK

    def unit(f):
        energy = np.linalg.norm((np.abs(f) * root).reshape(len(f), -1), axis=1)
        return f / np.maximum(energy, 1e-3)[:, None, None]

    def correlation(f, i, j):
        return np.fft.irfft2(f[j] * f[i].conj(), (_LOOK, _LOOK))[:, reach][:, :, reach].max((1, 2))
    whole, own = unit(looks), unit(looks - looks.mean(0))
    size = (np.abs(whole) * root).reshape(len(looks), -1)
    linked = np.eye(len(looks), dtype=bool)
    for i, row in enumerate(size):
        at = i + 1 + np.flatnonzero(size[i + 1:] @ row >= .965)  # no shift can give more than that
        for j in np.array_split(at, -(-len(at) // 64)) if len(at) else ():
            linked[i, j] = (correlation(whole, i, j) >= .965) & (correlation(own, i, j) >= .96)
    return linked | linked.T


def first_of(group: np.ndarray) -> np.ndarray:
    """bool: the first of each group."""
    first = np.zeros(len(group), bool)
    first[np.unique(group, return_index=True)[1]] = True
    return first


def outliers(nll: np.ndarray, worst: float, of: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which images are unlike the others, and which of them by far? Held-out nll (n, N) -> bool (n,), twice.

    of (m, N): judge these, each by nll alone -> bool (m,), twice. What one is called depends on no other of
    them (but where a tenth is passed): what they promise of the next image stays exact.

    None of fewer than MIN_HELD_OUT, a tenth at most. Each place is standardised by median and quartiles, an
    image judged by the mean of its worst places. The tail of good images is taken as exponential beyond the
    median, its rate from the 90 % quantile; unlike is what lies beyond the level that one of so many, or of
    a hundred if they are fewer, is expected to exceed. By far: twice as far from the median as the farthest
    of the rest. More than a tenth, up to a fifth, where these decide the 90 % quantile: three times as far
    from the median as the farthest of the rest, and beyond that level by the upper quartile.
    """
    count = len(nll)
    unlike, far = np.zeros((2, count if of is None else len(of)), bool)
    if count < fp.MIN_HELD_OUT:
        return unlike, far
    low, middle, high = np.quantile(nll, [.25, .5, .75], 0)
    variance = ((high - low) / 1.349) ** 2
    deviation = np.sqrt(.5 * variance + .5 * variance.mean()) + 1e-12
    raw = fp.worst_mean((nll - middle) / deviation, worst)
    centre, upper, top = np.quantile(raw, [.5, .75, .9])
    if of is not None:
        raw = fp.worst_mean((of - middle) / deviation, worst)
    beyond = raw - centre
    order = np.argsort(-beyond, kind="stable")
    most, gross = int(MOST_ASIDE * len(raw)), 0
    if of is None:
        level = math.log(max(count, 100) / 2) * (upper - centre) / math.log(2)
        gross = max((k for k in range(most + 1, int(2 * MOST_ASIDE * count) + 1)
                     if beyond[order[k - 1]] > max(3 * beyond[order[k]], level)), default=0)
    if gross:
        unlike[order[:gross]] = far[order[:gross]] = True
        return unlike, far
    p = .5 * np.exp(-beyond * math.log(5) / max(top - centre, 1e-12))
    unlike[order[:most]] = p[order[:most]] < 1 / max(count, 100)
    far[unlike] = beyond[unlike] > 2 * beyond[~unlike].max(initial=0)
    return unlike, far


def traits(looks: np.ndarray) -> np.ndarray:
    """`look` of images (I, 128, 65) -> float64 (I, 4), of their fine contrast:

    log of its amplitude, log of the amplitude above 1/8 cycle a pixel to that below, and its centre of
    energy, down and across, in sides (the window of `look` about halves its way).
    Light, focus and position move them, whatever the network makes of it.
    """
    frequency = np.hypot(np.fft.fftfreq(_LOOK)[:, None], np.fft.rfftfreq(_LOOK))
    at, energy, where = np.arange(_LOOK) / _LOOK, [], []
    for f in looks:
        power = np.abs(f).astype(np.float64) ** 2
        power[:, 1:-1] *= 2  # a real image's other half
        energy.append([power[frequency <= .125].sum() + 1e-9, power[frequency > .125].sum() + 1e-9])
        own = np.fft.irfft2(f, (_LOOK, _LOOK)) ** 2 + 1e-12
        where.append([own.sum(1) @ at / own.sum(), own.sum(0) @ at / own.sum()])
    low, high = np.reshape(energy, (-1, 2)).T
    return np.column_stack([.5 * np.log(low + high), .5 * np.log(high / low), np.reshape(where, (-1, 2))])


def known_traits(looks: np.ndarray) -> list:
    """What a model keeps of `traits`: number of images, means, deviations."""
    own = traits(looks)
    return [len(own), own.mean(0).tolist(), own.std(0).tolist()]


def moved(new: np.ndarray, known: list) -> str:
    """How the `traits` of new images (I, 4) differ from those a model keeps; "" if they do not.

    Where their means differ by Welch's test, p < 0.0001 a trait, and by at least one deviation.
    """
    try:
        count, mean, deviation = int(known[0]), *np.array(known[1:], np.float64).reshape(2, 4)
    except (TypeError, ValueError, LookupError, OverflowError):  # no such list
        return ""
    if min(count, len(new)) < 20:
        return ""
    from scipy.stats import ttest_ind_from_stats
    p = [ttest_ind_from_stats(x.mean(), x.std() + 1e-9, len(x), m, s + 1e-9, count, equal_var=False).pvalue
         for x, m, s in zip(new.T, mean, deviation)]
    by = new.mean(0) - mean
    light, focus, down, across = np.where((np.array(p) < 1e-4) & (np.abs(by) > deviation), by, 0)
    words = {f"{abs(math.expm1(light)):.0%} less light or contrast": light < 0,
             f"{abs(math.expm1(light)):.0%} more light or contrast": light > 0,
             "blurred": focus < 0, "sharper, or noisier": focus > 0,
             "lower": down > 0, "higher": down < 0, "further right": across > 0, "further left": across < 0}
    return ", ".join(word for word, so in words.items() if so)


def doubted(old: fp.Prior, new: fp.Prior) -> fp.Prior:
    """`new`, calibrated on good images, after a warning if `old`, the model before, doubts them.

    By their median score, in its unit. Images that trained score below nearly all that did not, and so do
    copies of them, whose pixels are others.
    """
    zero, unit = old.calibration["moments"][:2]
    median, threshold = (new.calibration["moments"][0] - zero) / unit, old.threshold.value
    if median < np.quantile(old.calibration["scores"], .05):
        fp._log.warning("most of these images score lower than new ones do (median %.2f): if they are copies "
                        "of images that trained, most new good images will be called anomalies", median)
    elif median > threshold:
        fp._log.warning("most of these images are anomalies to the model (median score %.2f, threshold "
                        "%.2f): if they show another product, train a model of it", median, threshold)
    return new


def drift(scores: Sequence[float], calibration: np.ndarray, threshold: float,
          new_traits: np.ndarray | None = None, known: list | None = None) -> str:
    """Why the good-looking images cannot be as good as the calibration's; "" if they can, or are below 20.

    A one-sided two-sample Kolmogorov-Smirnov test, p < 0.001, of the scores below the threshold in both: only
    higher scores are a drift, since those of a cross-fitted calibration lie a little above new ones. And
    `moved`, of the traits (I, 4) of the same images, or of the first of them, and of those that trained.
    """
    new, old = np.asarray(scores), calibration[calibration <= threshold]
    if len(new) < 20:
        return ""
    kept = new[new <= threshold]
    if 2 * len(kept) < len(new):
        return (f"{len(new) - len(kept)} of {len(new)} images are called anomalies: another "
                "product, camera or lighting? If they are good: fastprior calibrate, or train")
    from scipy.stats import ks_2samp
    if len(old) >= 10 and ks_2samp(kept, old, alternative="less").pvalue < .001:
        return (f"the good-looking images have drifted: their median score is {np.median(kept):.2f}, that of "
                f"held-out good images {np.median(old):.2f}; the false-alarm rate is no longer promised. "
                "See fastprior calibrate")
    if known and new_traits is not None:
        how = moved(new_traits[new[:len(new_traits)] <= threshold], known)
        if how:
            return (f"the good-looking images have drifted, against the model's own: {how}; the "
                    "false-alarm rate is no longer promised. See fastprior calibrate")
    return ""
