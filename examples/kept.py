#!/usr/bin/env python3
"""Features of good images, kept in a file, and a model that learns more images with them.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

extraction = fp._room("extraction")


def about(settings: fp.Settings, backbone: fp.Backbone, roi: fp.RegionOfInterest | None = None) -> dict:
    """All that decides the features of an image and of its copies."""
    network = hashlib.sha256()
    for a in backbone.to_arrays().values():
        network.update(a.tobytes())
    region = roi and fp.image_key(roi.mask)
    made_by = {"network": network.hexdigest(), "revision": fp.FIT_REVISION, "region": region}
    return made_by | {k: getattr(settings, k) for k in ("size", "cell", "copies", "seed", "bits")}


def write(e: extraction.Extracted, path: str | os.PathLike, made_by: dict) -> None:
    """Into a file that `read` reads if `made_by` is the same; FastPriorError if it cannot be written."""
    arrays = {"features": e.features, "owner": e.owner, "looks": e.looks.view(np.float32),
              "sources": np.array(e.sources, np.int64), "fine": np.array(e.fine)}
    fp._write_npz(path, {"kind": "features", "about": made_by, "keys": e.keys, "names": e.names,
                         "ranged": e.ranged}, arrays)


def read(path: str | os.PathLike, made_by: dict) -> extraction.Extracted:
    """ModelError if it is no such file, or another network, size, seed ... made its features."""
    header, a = fp._read_npz(path)
    if header.get("kind") != "features":
        raise fp.ModelError(f"{path}: expected features that `train --keep-features` wrote, got a "
                            f"{header.get('kind')!r:.40}")
    made_by = json.loads(json.dumps(made_by))
    if other := [k for k, v in made_by.items() if header["about"].get(k) != v]:
        raise fp.ModelError(f"{path}: its features were made with another {', '.join(other)}: give what "
                            "made them, or train anew")
    return extraction.Extracted(a["features"], a["owner"], a["looks"].view(np.complex64), header["keys"],
                                a["sources"].tolist(), 0, [], a["fine"], header["names"],
                                ranged=header["ranged"])


def update(prior: fp.Prior, images, known: str | os.PathLike, *, iterations: int | None = 0,
           **options) -> fp.Prior:
    """The model trained on `images` too, without the images it was trained on.

    images: as for `fit`, may repeat old ones. known: the features that `fit(features=)` kept of the old
    ones. The backbone stays. Gaussians, factors and calibration are bit for bit those of a training with
    it on all images at its size.
    iterations: 0 keeps the denoiser while it still lowers the held-out loss; `summary["gain_kept"]` is by
    what share, which at its training was 1 - loss / loss_start. Else it is trained again. options: those of
    `fit`.
    """
    kept, summary = prior.denoiser if iterations == 0 else None, prior.summary
    keys, trained_on = {*read(known, {}).keys}, {*summary.get("trained_on", ())}
    if not trained_on <= keys or len(keys - trained_on) > len(summary.get("set_aside", ())):
        raise fp.ModelError(f"{known}: features of {len(keys)} images, not of those that the model was "
                            "trained on: give what was written with it, or train anew")
    settings = dataclasses.asdict(prior.settings) | {
        "backbone": prior.backbone, "roi": prior.roi, "size": prior.settings.shape, "threshold": None,
        "factors": summary.get("factors", fp.Settings.factors)}  # it may have less, for it had few images
    if isinstance(images, (str, os.PathLike)):
        images = fp._room("folders").find_good(images)
    elif not hasattr(images, "problems"):  # what found them in a folder
        images = list(images)
    some = list(getattr(images, "images", images))[:32]
    tried = [r for r in prior.score_batch(some, with_map=False, errors="return") if isinstance(r, fp.Result)]
    odd = sum(r.is_anomaly for r in tried)
    if 2 * odd > len(tried):
        fp._log.warning("%d of the first %d new images are anomalies to the model: if they show another "
                        "product, train a model of it", odd, len(tried))
    new = fp.fit(images, known=known, denoiser=kept, iterations=iterations, **settings | options)
    ratios = [*prior.summary.get("proportions", ()), *new.summary.get("proportions", ())]
    new.summary["proportions"] = [min(ratios), max(ratios)] if ratios else []
    new.summary |= {k: prior.summary[k] for k in ("loss_start", "loss") if k in prior.summary and kept}
    return new
