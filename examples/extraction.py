#!/usr/bin/env python3
"""Features of good images and of their jittered copies: what a training begins with.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

MOST_FINE = 1200  # images whose fine features are held, 0.4 MB each at 448 pixels


def jitter(image: np.ndarray, rng: np.random.Generator, light: float = .15,
           shift: float = .03) -> tuple[np.ndarray, tuple[float, float]]:
    """Brightness and contrast within +-light; and a shift (rows, columns) within +-shift of a side.

    The shift is left to the resampling (`resize_taps`), which does it to a fraction of a pixel.
    """
    brightness, contrast = rng.uniform(1 - light, 1 + light, 2)
    mean = image.mean()
    table = ((np.arange(256) - mean) * contrast + mean) * brightness
    dy, dx = rng.uniform(-shift, shift, 2)
    return np.rint(np.clip(table, 0, 255)).astype(np.uint8)[image], (dy, dx)


class Extracted(NamedTuple):
    """Features of different images, ordered by their keys, so that names and order decide nothing."""
    features: np.ndarray  # (M, N, C), a row an image or a jittered copy, an image's own row first
    owner: np.ndarray  # (M,), ascending: the image of each row
    looks: np.ndarray  # complex64 (I, 128, 65), see `look` of examples/curation.py
    keys: list[str]  # of each image
    sources: list[int]  # of each image, its place in the sequence that was given
    repeated: int  # images left out since their pixels were there already
    unreadable: list[str]  # a line for each image that could not be read
    fine: Sequence[np.ndarray]  # float16 (F*F', C') of each image itself, of the first MOST_FINE
    names: Sequence[str] = ()  # of what `sources` counts, where a file keeps it
    roi: fp.RegionOfInterest | None = None  # N above counts the places inside
    ranged: Sequence[str] = ()  # keys of the images that decided the backbone's ranges

    @property
    def clean(self) -> np.ndarray:
        """bool (M,): the rows that are an image itself."""
        return np.diff(self.owner, prepend=-1) > 0

    def of(self, images) -> "Extracted":
        """Only these images: a bool mask or indices, ascending."""
        chosen = np.arange(len(self.keys))[images]
        rows = np.isin(self.owner, chosen)
        return self._replace(features=self.features[rows], owner=np.searchsorted(chosen, self.owner[rows]),
                             looks=self.looks[chosen],
                             keys=[self.keys[i] for i in chosen], sources=[self.sources[i] for i in chosen],
                             fine=[self.fine[i] for i in chosen[chosen < len(self.fine)]])


def readable(images: Iterable, bits: int | None, roi: fp.RegionOfInterest | None) -> Iterator[np.ndarray]:
    for source in images:
        with contextlib.suppress(fp.ImageError, fp.ShapeError):
            yield fp.load_image(source, bits, roi)


def copies_of(different: int, settings: fp.Settings) -> int:
    """Of each image: at most 2400 rows are held in memory."""
    return max(0, min(settings.copies, 2400 // max(different, 1) - 1))


def extract_features(images: Sequence, settings: fp.Settings, backbone: fp.Backbone,
                     threads: int | None = None, progress: fp.Progress = fp._quiet, dtype=np.float16,
                     known: Extracted | None = None, roi: fp.RegionOfInterest | None = None) -> Extracted:
    """Features of every different image and of its jittered copies (whose jitter its pixels decide).

    known: images whose features are there already. They come first in what `sources` counts.
    """
    kept, fine, repeated, unreadable, before = {}, {}, 0, [], 0
    if known:
        before = len(known.names)
        rows = np.split(known.features, np.flatnonzero(known.clean)[1:])
        kept = {key: (f, source, look) for key, f, source, look in zip(
            known.keys, rows, known.sources, known.looks)}
        fine = dict(zip(known.keys, known.fine))
    inside, c = fp._inside(roi, settings.grid), sum(backbone.channels)
    look = fp._room("curation").look
    different = len(images) + len(kept)
    if copies_of(different, settings) < settings.copies:  # it may be less, with what was given twice
        different = len({*kept, *(fp.image_key(a) for a in readable(images, settings.bits, roi))})
    copies = copies_of(different, settings)
    engine = fp._feature_engine(backbone, settings, threads=threads) if len(images) else None
    for i, source in enumerate(images):
        try:
            image = fp.load_image(source, settings.bits, roi)
        except (fp.ImageError, fp.ShapeError) as e:
            unreadable.append(str(e))
            continue
        key = fp.image_key(image)
        repeated += key in kept
        if key not in kept:
            rng = np.random.default_rng([settings.seed, int(key, 16)])
            batch = [(image, (0.0, 0.0))] + [jitter(image, rng) for _ in range(copies)]
            batch = [(roi.paint(a, shift), shift) for a, shift in batch] if roi else batch
            if engine:
                f, own = engine.run([a for a, _ in batch], shifts=[s for _, s in batch], outputs=True).outputs
            else:
                f, own = map(np.stack, zip(*(fp._reference_tokens(a, backbone, settings, s)
                                             for a, s in batch)))
            kept[key] = f[:, inside].astype(dtype), before + i, look(image)
            fine[key] = own[0].astype(np.float16)
            if len(fine) > MOST_FINE:
                del fine[max(fine)]
        progress("features", i + 1, len(images))
    keys = sorted(kept)
    rows = [kept[key][0][:copies + 1] for key in keys]
    return Extracted(np.concatenate(rows) if rows else np.empty((0, inside.sum(), c), dtype),
                     np.repeat(np.arange(len(keys)), [len(f) for f in rows]),
                     np.array([kept[key][2] for key in keys]), keys,
                     [kept[key][1] for key in keys], repeated, unreadable,
                     [fine[key] for key in sorted(fine)], roi=roi)
