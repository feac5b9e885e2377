#!/usr/bin/env python3
"""From features of good images to a model: Gaussians of every fold, what is set aside, factors, calibration.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

FOLDS = 10


class Gaussians:
    """Gaussians of features (M, N, C) at each place, of all rows or of all but a fold (M,) of them.

    Sums over all rows are kept, and what a fold adds to them is taken away again.
    """

    def __init__(self, features: np.ndarray, fold: np.ndarray, diagonal: bool, threads: int | None = None):
        n, c = features.shape[1:]
        self.features, self.fold, self.diagonal, self.threads = features, fold, diagonal, threads
        self.centre = features.mean(0, dtype=np.float32)  # subtracted before squaring
        self.first = np.empty((n, c), np.float32)
        self.second = np.empty((n, c) if diagonal else (n, c, c), np.float32)

        def add(i):
            self.first[i], self.second[i] = self._sums(i, slice(None))
        fp._run(add, n, threads)

    def _sums(self, i: int, rows) -> tuple[np.ndarray, np.ndarray]:
        x = self.features[rows, i].astype(np.float32) - self.centre[i]
        return x.sum(0), (x * x).sum(0) if self.diagonal else x.T @ x

    def without(self, left_out: int | None, settings: fp.Settings) -> tuple[np.ndarray, np.ndarray]:
        """mean (N, C) and whitener of all folds but one: L^-1 (N, C, C), or (N, C) for the plain variant."""
        rows, mean = self.fold == left_out, np.empty(self.first.shape, np.float32)
        m, second = np.count_nonzero(~rows), np.empty(self.second.shape, np.float64)

        def moments(i):
            first, square = self._sums(i, rows)
            mean[i], second[i] = (self.first[i] - first) / m, (self.second[i] - square) / m
            if not self.diagonal:
                second[i] -= np.outer(mean[i], mean[i])
        fp._run(moments, len(mean), self.threads)
        if self.diagonal:  # one mean and deviation a channel, over images and positions
            overall = (self.centre + mean).mean(0)
            square = (second + 2 * self.centre * mean + self.centre ** 2).mean(0)
            deviation = np.sqrt(np.maximum(square - overall ** 2, 1e-8))
            return tuple(np.broadcast_to(a, mean.shape).astype(np.float32) for a in (overall, 1 / deviation))
        average, whitener = second.mean(0), np.empty(second.shape, np.float32)

        def invert(i):
            own = fp.shrink_covariance(second[i], average, settings.shrink, settings.floor)
            whitener[i] = fp.inverse_cholesky(own[None])[0]
        fp._run(invert, len(mean), self.threads)
        return mean + self.centre, whitener


def fit_fine(fine: Sequence[np.ndarray], settings: fp.Settings, roi=None) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F*F', C') float16 and whitener (C', C') of fine features: one covariance about places' means."""
    mean, inside = sum(x.astype(np.float32) for x in fine) / len(fine), fp._inside(roi, settings.fine)
    cov = np.zeros((mean.shape[1],) * 2)
    for x in fine:
        d = (x - mean)[inside]
        cov += d.T @ d / (len(fine) * len(d))
    own = fp.shrink_covariance(cov, cov, 0, settings.floor)
    return mean.astype(np.float16), fp.inverse_cholesky(own[None])[0]


def apply_whitener(features: np.ndarray, mean: np.ndarray, whitener: np.ndarray,
                    threads: int | None = None) -> np.ndarray:
    """features (M, N, C) float16 -> x0 (M, N, C) float16, position by position."""
    out = np.empty(features.shape, np.float16)

    def apply(i):
        d = features[:, i].astype(np.float32) - mean[i]
        out[:, i] = d * whitener[i] if whitener.ndim == 2 else d @ whitener[i].T
    fp._run(apply, features.shape[1], threads)
    return out


def to_unit_variance(x0: np.ndarray, whitener: np.ndarray, fresh: np.ndarray) -> None:
    """Scale all, in place, so that x0, images not fitted on, has unit variance: F = 0 starts right."""
    scale = np.float16(1 / math.sqrt(np.mean([np.mean(np.square(x, dtype=np.float32)) for x in x0])))
    for a in (x0, whitener, fresh):
        a *= scale


@dataclasses.dataclass
class View:
    """Places of good images in the coordinates of their Gaussians."""
    x0: np.ndarray  # (M, N, C) float16, a row an image or a jittered copy
    mean: np.ndarray  # (N, C)
    whitener: np.ndarray  # (N, C, C) or (N, C)
    fresh: np.ndarray  # (m, N, C) float16, images kept away from everything, one a group: "holdout"

    def remove_factors(self, fold: np.ndarray, count: int, threads: int | None) -> np.ndarray | None:
        """In place, to unit variance; returns them, `count`, or None."""
        factors = None
        to_unit_variance(self.x0, self.whitener, self.fresh)
        if count:
            factors = fp.fit_factors(self.x0, fold, count, threads)
            for x in self.fresh:
                x[...] = fp.remove_factors(x.astype(np.float32), factors)
            to_unit_variance(self.x0, self.whitener, self.fresh)
        return factors


@dataclasses.dataclass
class Whitened:
    """Good images in the coordinates of the Gaussians, from which any denoiser can be trained."""
    views: list[View]  # of the places; and of the coarse ones, where there are any
    fold: np.ndarray  # (M,)
    clean: np.ndarray  # (M,) bool, the rows that are an image itself, one of each group of near-duplicates
    fine: tuple[np.ndarray, np.ndarray]  # see `fit_fine`
    details: np.ndarray  # see `_details`: of the clean rows' images, or of the fresh ones if there are any
    summary: dict
    roi: fp.RegionOfInterest | None


def half_squares(x: np.ndarray) -> np.ndarray:
    """|x|^2 / 2 of x (M, N, C), float32 (M, N)."""
    return .5 * np.stack([np.square(a, dtype=np.float32).sum(-1) for a in x])


def cross_fit(features: np.ndarray, fold: np.ndarray, config: fp.Settings, threads: int | None,
              progress: fp.Progress = fp._quiet) -> tuple[np.ndarray, Callable]:
    """x0 of features (M, N, C), each fold (M,) by the Gaussians of the others; what gives those of all."""
    gaussians = Gaussians(features, fold, config.variant == "plain", threads)
    x0, folds = np.empty(features.shape, np.float16), fold.max() + 1
    for k in range(folds):
        x0[fold == k] = apply_whitener(features[fold == k], *gaussians.without(k, config), threads)
        progress("whitening", k + 1, folds)
    return x0, functools.cache(lambda: gaussians.without(None, config))


@fp._one_blas_thread
def whiten_features(e, config: fp.Settings, keep_all: bool = False, progress: fp.Progress = fp._quiet,
                    threads: int | None = None) -> Whitened:
    """The Gaussian of each place, cross-fitted: each fold of `Extracted` by the Gaussian of the others.

    Images that are unlike the others (`outliers`) do not calibrate; those that are so by far do not train
    either, and the Gaussians are fitted again until there are none: a rare good one left out costs more
    than a bad one left in. Near-duplicates share a fold, and one of them calibrates. With "holdout" a fifth
    of the images takes no part in any of this.
    """
    count, first_problem = len(e.keys), f" (first problem: {e.unreadable[0]})" if e.unreadable else ""
    alike = f", and {e.repeated} with the same pixels" if e.repeated else ""
    if count < fp.MIN_IMAGES:
        raise fp.ImageError(f"{count} readable, different good images{alike}: at least {fp.MIN_IMAGES} are "
                            f"needed{first_problem}")
    curation = fp._room("curation")
    group = curation.near_duplicates(e, threads)
    lone, groups = curation.first_of(group), len(np.unique(group))
    alike += f", {count} with near-duplicates" if groups < count else ""
    holdout = config.calibration == "holdout"
    needed = 5 * fp.MIN_HELD_OUT if holdout else fp.MIN_IMAGES
    if groups < needed:
        what = "calibration 'holdout' needs at least {}; 'cross' does with fewer" if holdout else (
            "at least {} are needed")
        raise fp.ImageError(f"{groups} readable, different good images{alike}: {what.format(needed)}"
                            + first_problem)
    shuffled = np.random.default_rng(config.seed).permutation(groups)
    if holdout:  # what decided the backbone's ranges stays out of it
        decided = group[np.isin(e.keys, e.ranged)]
        shuffled[decided] += groups
        shuffled = shuffled.argsort().argsort()
    away = (shuffled < (groups // 5 if holdout else 0))[group]
    aside, cells = np.zeros(count, bool), fp._cells(config, fp._inside(e.roi, config.grid))

    def coarser(features: np.ndarray) -> np.ndarray:
        out = np.empty((len(features), len(cells), features.shape[2]), np.float16)
        for x, f in zip(out, features):
            x[...] = fp.coarsen(f.astype(np.float32), cells)
        return out

    def views_of(features: np.ndarray) -> list[np.ndarray]:
        return [features, coarser(features)] if len(cells) else [features]
    while True:
        used = ~away & ~aside
        part = e.of(used)
        _, kind = np.unique(group[used], return_inverse=True)
        rows = (np.random.default_rng(config.seed).permutation(kind.max() + 1) % FOLDS)[kind][part.owner]
        fits = [cross_fit(x, rows, config, threads, progress) for x in views_of(part.features)]
        nll = np.concatenate([half_squares(x0[part.clean]) for x0, _ in fits], 1)
        unlike, far = curation.outliers(nll, config.worst) if not keep_all else np.zeros((2, len(nll)), bool)
        if not far.any() or aside.any() and aside.sum() + far.sum() > 2 * curation.MOST_ASIDE * count:
            break
        aside[np.flatnonzero(used)[far]] = True
    clean, held_out, fresh = part.clean, np.flatnonzero(away & lone), e.of(away & lone)
    trained_on, calibrates = e.of(~aside).keys, curation.first_of(kind) & ~unlike
    clean[clean] = calibrates
    fine = fit_fine(part.fine, config, e.roi)
    details = fp._details(fresh.fine if holdout else itertools.compress(part.fine, calibrates), *fine, config,
                          e.roi)
    fresh = fresh.features[fresh.clean]
    views = [View(x0, *gaussian(), apply_whitener(new, *gaussian()))
             for (x0, gaussian), new in zip(fits, views_of(fresh))]
    if not holdout:
        aside[np.flatnonzero(used)[unlike]] = True
    elif not keep_all:  # each is judged by the training images, not by each other: see `outliers`
        own = np.concatenate([half_squares(v.fresh) for v in views], 1)
        unlike, _ = curation.outliers(nll[curation.first_of(kind)], config.worst, own)
        aside[held_out[unlike]] = True
        for v in views:
            v.fresh = v.fresh[~unlike]
        details = details[~unlike[:len(details)]]
    summary = {"images": len(trained_on), "held_out": len(views[0].fresh) or int(clean.sum()),
               "held_out_aside": int(aside[away].sum() if holdout else aside.sum()),
               "set_aside": [e.sources[i] for i in np.flatnonzero(aside)], "repeated": e.repeated,
               "near_duplicates": count - groups, "unreadable": e.unreadable[:20], "trained_on": trained_on,
               "traits": curation.known_traits(e.of(~aside).looks)}
    return Whitened(views, rows, clean, fine, details, summary, e.roi)


@fp._one_blas_thread
def fit_whitened(w: Whitened, config: fp.Settings, backbone: fp.Backbone, iterations: int | None,
                 minutes: float | None = None, threads: int | None = None,
                 progress: fp.Progress = fp._quiet,
                 kept: dict[str, np.ndarray] | None = None) -> fp.Prior:
    """Factors, denoiser (trained, or `kept`) and calibration; works in the views."""
    (view, *_), fold, factors = w.views, w.fold, [None, None]
    x0, preconditioned = view.x0, view.whitener.ndim == 3
    config = dataclasses.replace(config, factors=min(config.factors,
                                                     int(w.clean.sum()) // 2 if preconditioned else 0))
    if preconditioned:
        factors = [v.remove_factors(fold, config.factors, threads) for v in w.views]
        progress("factors", 1, 1)
    prediction = "v" if config.variant == "whitened" else "eps"
    denoiser, trained = None, {"iterations": 0}
    held_out = fold < max(1, (fold.max() + 1) // 5)  # from the denoiser's training: about a fifth
    if kept is not None:
        held = x0[held_out & w.clean][:32].astype(np.float32)
        loss = fp._room("training").denoiser_loss
        gain = 1 - loss(held, kept, prediction) / loss(held, None, prediction)
        denoiser, trained = kept if gain > 0 else None, {"iterations": 0, "gain_kept": round(gain, 5)}
    elif iterations is None or iterations > 0:
        denoiser, trained = fp._room("training").train_denoiser(
            x0, held_out, config, iterations or 900, minutes, prediction, progress, threads)
        if not trained["iterations"]:  # none lowered the held-out loss
            denoiser = None
    calibrations = {}
    for steps in sorted({config.steps, *fp._CALIBRATED_STEPS}):
        grid = fp.select_timesteps(steps, config.first, config.last)

        def nll_of(*parts: np.ndarray) -> np.ndarray:
            return np.concatenate([fp._nll_of(x, f, grid, prediction, threads)
                                   for x, f in zip(parts, (denoiser, None))], 1)
        nll = nll_of(*(v.x0[w.clean] for v in w.views))
        own, z = fp._calibrate(nll)
        if len(view.fresh):  # zero and unit of each place from all others: to these images it is all new
            nll = nll_of(*(v.fresh for v in w.views))
            z = nll * own["gain"] + own["offset"]
        raw = fp.worst_mean(z, config.worst)
        calibrations[steps] = own | fp._read_scores(raw, nll, w.details, config, w.roi)
        progress("calibration", len(calibrations), len({config.steps, *fp._CALIBRATED_STEPS}))

    def packed(v: View, own: np.ndarray | None) -> tuple:
        return (v.mean.astype(np.float32), fp.pack_lower(v.whitener) if preconditioned else v.whitener,
                None if own is None else fp.pack_factors(own))
    (mean, whitener, own), *coarse = map(packed, w.views, factors)
    return fp.Prior(config, backbone, mean, whitener, denoiser, calibrations, w.summary | trained, threads,
                    factors=own, fine=w.fine, roi=w.roi, coarse=coarse[0] if coarse else None)
