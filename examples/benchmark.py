#!/usr/bin/env python3
"""Accuracy on data sets, other runtimes, whole processes: what `fastprior bench` does beyond its own speed.

    python examples/benchmark.py --data mvtec --variants gaussian,joint,full --steps 2,3,5 --seeds 0,1,2

is `fastprior bench` with the same options. fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp


# ------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------

GOOD = {"good", "ok", "normal"}  # folders of good images, as the layouts call them; in lower case
MASKS = {"ground_truth", "groundtruth", "gt", "mask", "masks", "labels", "annotations"}


class Category(NamedTuple):
    """One product: good images to train on, test images with labels, and masks where there are any."""
    name: str
    train: list[Path]
    test: list[Path]
    labels: np.ndarray  # bool, one a test image; True = anomalous
    masks: list[Path | None]  # one a test image: a file, or a folder of several that are joined


def find_categories(root: str | os.PathLike) -> list[Category]:
    """The categories of a data set: ROOT itself, or each folder of it, in any of these layouts.

    MVTec AD, MVTec LOCO, BTAD: train/good, test/<kind>, and masks in ground_truth/<kind>: <stem>_mask.png,
    <stem>.png, or a folder <stem> of several. VisA: Data/Images/{Normal,Anomaly}, Data/Masks/Anomaly, split
    by ROOT/split_csv/1cls.csv where it is there. anomalib's Folder: good, a folder for each kind of anomaly,
    and masks in mask or mask/<kind>. good may be called ok or normal. Without a split of its own every fifth
    good image (by name) is a test image. ImageError if there are none, or one lacks images of a kind.
    """
    root = Path(os.path.abspath(root))  # whose name and parent count
    own = _read_category(root)
    inside = [] if own else _folders(root)
    found = [own] if own else [c for c in map(_read_category, inside) if c]
    if not found:
        raise fp.ImageError(f"{root}: expected categories as MVTec AD, LOCO, BTAD (train/good, test/<kind>), "
                            "VisA (Data/Images/Normal) or anomalib's Folder (good/ beside bad/) do")
    for c in found:
        bad = int(c.labels.sum())
        if not (c.train and bad and len(c.test) - bad):
            raise fp.ImageError(f"{root}: category {c.name} has {len(c.train)} images to train on, and "
                                f"{len(c.test) - bad} good and {bad} anomalous ones to test; all are needed")
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []


def _kinds(folder: Path) -> tuple[list[Path], list[Path]]:
    """Good and anomalous images of a folder that holds a folder for each kind, as `score` finds them."""
    good, bad = [], []
    for kind in (k for k in _folders(folder) if k.name.lower() not in MASKS):
        found = fp._room("folders").Found()
        found.folder(kind)
        (good if kind.name.lower() in GOOD else bad).extend(sorted(found.images))
    return good, bad


def _read_category(folder: Path) -> Category | None:
    data = folder / "Data" if (folder / "Data" / "Images").is_dir() else None
    masks = [p for p in _folders(data or folder) if p.name.lower() in MASKS]
    images = data / "Images" if data else folder
    train, _ = _kinds(folder / "train")
    if train:
        good, bad = _kinds(folder / "test")
    elif not images.is_dir() or GOOD.isdisjoint(p.name.lower() for p in images.iterdir()):
        return None
    else:
        normal, bad = _kinds(images)
        train, split = [p for i, p in enumerate(normal) if i % 5], folder.parent / "split_csv" / "1cls.csv"
        if data and split.is_file():
            with split.open(newline="") as lines:
                part = {(folder.parent / r["image"]).resolve(): r["split"] for r in csv.DictReader(lines)}
            train = [p for p in normal if part.get(p.resolve()) == "train"]
            bad = [p for p in bad if part.get(p.resolve()) == "test"]
        good = sorted(set(normal) - set(train))
    return Category(folder.name, train, good + bad, np.arange(len(good) + len(bad)) >= len(good),
                    [None] * len(good) + [_find_mask(masks, p) for p in bad])


def _find_mask(folders: Iterable[Path], image: Path) -> Path | None:
    suffixes = (".png", ".bmp", image.suffix)
    names = [image.stem + tail for tail in (*("_mask" + s for s in suffixes), *suffixes, "")]
    places = [place for folder in folders for place in (folder / image.parent.name, folder)]
    return next((place / name for place in places for name in names if (place / name).exists()), None)


def load_mask(path: Path) -> np.ndarray:
    """bool (H, W): where the mask, or any mask of a folder, is not zero."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    black = {file: 127 if file.suffix.lower() in (".jpg", ".jpeg") else 0 for file in files}  # lossy
    return np.logical_or.reduce([fp.load_image(file).max(-1) > black[file] for file in files])


# ------------------------------------------------------------------------------------------------
# Metrics: of images by scikit-learn. Of pixels exact and from one count, equal scores merged: every
# curve bends only at scores that anomalous pixels have (the levels), so the normal pixels, which
# are most of them, are only counted at and between levels.
# ------------------------------------------------------------------------------------------------

def _import_sklearn():
    try:
        from sklearn import metrics
    except ImportError as e:
        raise fp.BackendUnavailable("accuracy needs scikit-learn: pip install 'fastprior[bench]'") from e
    return metrics


def _check_scored(what: str, labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool, scores as float32 or wider, of one shape; or a ShapeError."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.shape != scores.shape:
        raise fp.ShapeError(f"{what}: expected one score per label, got labels {labels.shape} and scores "
                            f"{scores.shape}; give both the same shape")
    if labels.dtype != bool and not np.all((labels == 0) | (labels == 1)):
        raise fp.ShapeError(f"{what}: expected labels of 0 (normal) and 1 (anomalous), got other values; "
                            "threshold them first, as in mask > 127")
    if scores.dtype.kind not in "fiub":
        raise fp.ShapeError(f"{what}: expected real numbers as scores, got dtype {scores.dtype}; "
                            "convert them to float")
    if not np.isfinite(scores).all():
        raise fp.ShapeError(f"{what}: expected finite scores, got {np.sum(~np.isfinite(scores))} NaN or "
                            f"infinite of {scores.size}; mend or drop them")
    return labels.astype(bool, copy=False), scores.astype(np.result_type(scores, np.float32), copy=False)


def _check_both(what: str, anomalous: int, normal: int) -> None:
    if not anomalous or not normal:
        raise fp.ShapeError(f"{what}: expected normal and anomalous ones, got {anomalous} anomalous and "
                            f"{normal} normal; add the missing kind")


def image_metrics(labels, scores) -> dict[str, float]:
    """AUROC, average precision and the best F1 of any threshold (read from these labels: for reports only).

    labels : bool or 0/1, any shape; 1 is anomalous. scores : real, of that shape; higher is more anomalous.
    ShapeError if shapes differ, there is only one class, labels are not 0 and 1, or scores not finite.

    >>> image_metrics([0, 0, 1, 1], [.1, .4, .4, .8])
    {'image_auroc': 0.875, 'image_ap': 0.8333333333333333, 'image_f1_max': 0.8}
    """
    metrics = _import_sklearn()
    labels, scores = (a.ravel() for a in _check_scored("image metrics", labels, scores))
    _check_both("image metrics", labels.sum(), (~labels).sum())
    precision, recall, _ = metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {"image_auroc": float(metrics.roc_auc_score(labels, scores)),
            "image_ap": float(metrics.average_precision_score(labels, scores)),
            "image_f1_max": float(f1.max())}


def pixel_metrics(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray],
                  max_fpr: float = .3) -> dict[str, float]:
    """Pixel AUROC, pixel average precision and AUPRO of anomaly maps, from one count; exact.

    AUPRO (Bergmann et al. 2021, The MVTec Anomaly Detection Dataset, section 6): at each threshold
    the share of each 8-connected region that is flagged, averaged over the regions of all images,
    against the false-positive rate over the normal pixels of all images; the area up to max_fpr by
    trapezoids, the end point interpolated, divided by max_fpr.

    Memory beside the input: about 90 bytes per anomalous pixel and a few times 16 maps; time:
    that of one sort. Scores are compared in the widest dtype of the maps, float32 at least.

    Parameters
    ----------
    masks : sequence of (H, W), bool or 0/1; 1 is anomalous. All zero for a good image.
    maps : sequence of (H, W), real, of the mask's own size, which may differ from image to image;
        higher is more anomalous.
    max_fpr : false-positive rate to integrate to, in (0, 1].

    Returns
    -------
    dict with "pixel_auroc", "pixel_ap" and "aupro", each in [0, 1].

    Raises
    ------
    ShapeError : numbers or sizes of masks and maps differ, not 2-D, only normal or only anomalous
        pixels, masks with other values than 0 and 1, scores not finite, max_fpr out of range.

    Examples
    --------
    >>> mask = np.array([[0, 0, 0, 1], [0, 0, 0, 1]])
    >>> pixel_metrics([mask], [np.array([[.1, .2, .3, .9], [.1, .2, .5, .4]])], max_fpr=.5)
    {'pixel_auroc': 0.9166666666666666, 'pixel_ap': 0.8333333333333333, 'aupro': 0.8333333333333334}
    """
    from scipy import ndimage
    masks, maps = list(masks), list(maps)
    if len(masks) != len(maps):
        raise fp.ShapeError(f"pixel metrics: expected one mask per map, got {len(masks)} masks and "
                            f"{len(maps)} maps; give a good image a mask of zeros")
    if not 0 < max_fpr <= 1:
        raise fp.ShapeError(f"pixel metrics: expected max_fpr in (0, 1], got {max_fpr}; 0.3 is customary")
    scores, shares, regions, size, dtype = [], [], 0, 0, np.dtype(np.float32)
    for i, (mask, scored) in enumerate(zip(masks, maps)):
        masks[i], maps[i] = mask, scored = _check_scored(f"pixel metrics, image {i}", mask, scored)
        if mask.ndim != 2:
            raise fp.ShapeError(f"pixel metrics, image {i}: expected mask and map (H, W), got {mask.shape}; "
                                "drop other axes")
        size, dtype = size + mask.size, np.result_type(dtype, scored)
        if mask.any():
            label, found = ndimage.label(mask, np.ones((3, 3)))
            region = label[mask]
            scores.append(scored[mask])
            shares.append(1 / np.bincount(region)[region])
            regions += found
    anomalous = sum(map(len, scores))
    _check_both("pixel metrics, pixels", anomalous, size - anomalous)
    scores = np.concatenate(scores, dtype=dtype)
    levels, place, hits = np.unique(scores, return_inverse=True, return_counts=True)
    overlap = np.bincount(place, np.concatenate(shares)) / regions
    normal = np.zeros((2, len(levels)), np.int64)  # scores below, and not above, each of the ascending levels
    group = 16  # maps to a sort: few passes, and little memory
    for start in range(0, len(maps), group):
        pairs = zip(masks[start:start + group], maps[start:start + group])
        some = np.sort(np.concatenate([m[~mask] for mask, m in pairs], dtype=dtype))
        normal += some.searchsorted(levels, "left"), some.searchsorted(levels, "right")
    total = size - anomalous
    true, false = np.cumsum(hits[::-1])[::-1], total - normal[0]  # flagged with the threshold at each level
    return {"pixel_auroc": int(hits @ normal.sum(0)) / (2 * anomalous * total),  # in integers: exact
            "pixel_ap": float(hits @ (true / (true + false)) / anomalous),
            "aupro": _overlap_area(overlap, normal, total, max_fpr)}


def _overlap_area(overlap: np.ndarray, normal: np.ndarray, total: int, max_fpr: float) -> float:
    """Area under the overlap curve up to max_fpr, over max_fpr; overlap (K,): what each level adds."""
    # Going down, each level has two corners: normal pixels strictly above it flagged, then those at it too.
    fpr = np.r_[0, (total - normal[::-1, ::-1]).ravel("F") / total, 1]
    pro = np.repeat(np.r_[0, np.cumsum(overlap[::-1])], 2)
    inside = fpr <= max_fpr
    fpr, pro = np.append(fpr[inside], max_fpr), np.append(pro[inside], np.interp(max_fpr, fpr, pro))
    return float(np.diff(fpr) @ (pro[1:] + pro[:-1]) / 2 / max_fpr)


def box_metrics(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> dict[str, float]:
    """How tight the boxes of regions lie: bool masks (H, W), maps in units of their threshold (H, W).

    A defect, an 8-connected part of a mask, is found where a region (`find_regions`) covers a pixel of it.
    "defects_found": the share of defects that are; "box_ratio": the area of the box of the highest such
    region over that of the defect's box, the median over those found. Neither is there without any.
    """
    from scipy import ndimage
    ratios, defects = [], 0
    for mask, scored in zip(masks, maps):
        parts, count = ndimage.label(mask, np.ones((3, 3)))
        defects += count
        areas = fp.label_regions(scored)
        regions = ndimage.find_objects(areas)
        for number, (y, x) in enumerate(ndimage.find_objects(parts), 1):
            hit = areas[y, x][parts[y, x] == number]
            if hit.any():
                most = max(np.unique(hit[hit > 0]), key=lambda k: scored[regions[k - 1]][
                    areas[regions[k - 1]] == k].max())
                down, across = regions[most - 1]
                box = (down.stop - down.start) * (across.stop - across.start)
                ratios.append(box / ((y.stop - y.start) * (x.stop - x.start)))
    return (({"defects_found": len(ratios) / defects} if defects else {})
            | ({"box_ratio": float(np.median(ratios))} if ratios else {}))


def evaluate(prior, category: Category, progress: Callable = lambda *_: None) -> dict[str, float]:
    """`image_metrics` and, where there are masks, `pixel_metrics` and `box_metrics` at the images' size."""
    scores, maps, masks = [], [], []
    with_masks = any(category.masks)
    for start in range(0, len(category.test), 8):
        part = slice(start, start + 8)
        for result, mask, label in zip(prior.score_batch(category.test[part], with_map=with_masks),
                                       category.masks[part], category.labels[part]):
            scores.append(result.score)
            if with_masks and (mask or not label):
                maps.append(result.anomaly_map)
                masks.append(load_mask(mask) if mask else np.zeros(maps[-1].shape, bool))
        progress(f"scoring {category.name}", min(start + 8, len(category.test)), len(category.test))
    pixels = pixel_metrics(masks, maps) | box_metrics(masks, maps) if with_masks else {}
    return image_metrics(category.labels, scores) | pixels


# ------------------------------------------------------------------------------------------------
# The grid: backbones x numbers of images x variants x steps, over categories and seeds
# ------------------------------------------------------------------------------------------------

def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprior"


VARIANTS = {  # settings, and training steps (None: as many as asked for)
    "gaussian": ({"factors": 0}, 0),  # each place alone
    "joint": ({}, 0),  # and the factors that places share
    "full": ({}, None),  # and the denoiser
    "unshared": ({"factors": 0}, None),  # the denoiser without the factors
    "plain": ({"variant": "plain"}, None),  # the paper's
}


def cache_files(name: str, images: Sequence[Path], backbone) -> Callable[..., Path]:
    """(kind, key ...) -> a file of the cache folder, under a digest of what decides a fit of these images."""
    common = hashlib.sha256(repr([fp.__version__, fp.FORMAT, fp.FIT_REVISION]).encode())
    for part in itertools.chain(backbone.to_arrays().values(), (p.read_bytes() for p in images)):
        common.update(part)

    def kept(kind: str, *key) -> Path:
        digest = common.copy()
        digest.update(json.dumps(key).encode())
        return _cache_folder() / f"{name}-{kind}-{digest.hexdigest()[:24]}.npz"
    return kept


def kept_features(file: Path, make: Callable) -> Any:
    """What `make` returns, from the file, whose name says what it is of, if it is there."""
    try:
        return fp._room("kept").read(file, {})
    except fp.ModelError:  # not there yet, or spoilt
        made = make()
        file.parent.mkdir(0o700, parents=True, exist_ok=True)
        fp._room("kept").write(made, file, {})
        return made


def train(category: Category, backbone, config, variants: Sequence[str], counts: Sequence[int | None],
          iterations: int | None, threads: int | None, progress: Callable,
          ranged: Sequence[str] = ()) -> Iterator[tuple[tuple, Path]]:
    """((variant, count), model file) for each variant and number of images (None: all of them).

    Everything is kept in the cache folder, under a digest of all that decides it: the features, which are
    computed once, and the models. Gaussians are fitted once a number of images (and once more for "plain").
    ranged: of a backbone that is in integers already, see `Extracted`.
    """
    kept = cache_files(category.name, category.train, backbone)
    backbone, own = fp._room("quantization").quantize_on(backbone, category.train, config, None, progress)
    ranged = own or ranged

    @functools.cache
    def features():
        key = config.size, config.cell, config.copies, config.seed, config.bits
        return kept_features(kept("features", *key), lambda: fp._room("extraction").extract_features(
            category.train, config, backbone, threads, progress)._replace(ranged=ranged))

    @functools.lru_cache(1)
    def whitened(count: int | None, variant: str):
        every = features()
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(every.keys))[:count])
        own = dataclasses.replace(config, variant=variant)
        return fp._room("fitting").whiten_features(every.of(chosen), own, progress=progress, threads=threads)

    for count, variant in itertools.product(counts, variants):
        changes, most = VARIANTS[variant]
        most = iterations if most is None else most
        own = dataclasses.replace(config, **changes)
        file = kept("model", dataclasses.asdict(own), count, most)
        try:
            fp._read_npz(file)
        except fp.ModelError:
            shared = copy.deepcopy(whitened(count, own.variant))  # the fit works in it
            fp._room("fitting").fit_whitened(shared, own, backbone, most, None, threads, progress).save(file)
        yield (variant, count), file


def run(roots: Sequence[Path], measure: Callable[..., dict], progress: Callable, *, backbones: Sequence[str],
        variants: Sequence[str], steps: Sequence[int], seeds: Sequence[int], images: Sequence[int],
        iterations: int | None, multi: bool, report: Path | None, as_json: bool, threads: int | None,
        device: str, **settings) -> None:
    """Train, evaluate and `measure` (prior, **facts -> facts and speed) every configuration; print them.

    multi: also one model for all categories, the category not given. settings: fields of `fp.Settings`.
    """
    _import_sklearn()
    if report:
        _import_figure()
        fp._room("folders").check_folder(report)
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise fp.ShapeError(f"--variants: expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if any(VARIANTS[v][1] is None for v in variants) and not fp._room("console").is_installed("torch"):
        fp._room("training").import_torch()  # says what to install
    other = [n for n in steps if n not in fp._CALIBRATED_STEPS]
    if len(other) > 1:
        raise fp.ShapeError(f"--steps: with --data at most one besides {fp._CALIBRATED_STEPS}, got {other}")
    categories = [c for root in roots for c in find_categories(root)]
    for c in categories:
        if [own.name for own in categories].count(c.name) > 1:
            raise fp.ImageError(f"--data: two categories are called {c.name}; run them one after the other")
        if images and not fp.MIN_IMAGES <= min(images) <= max(images) <= len(c.train):
            raise fp.ShapeError(f"--images: expected {fp.MIN_IMAGES} to {len(c.train)}, which {c.name} has, "
                                f"got {list(images)}")
    points = []
    for backbone in [fp.load_backbone(name) for name in backbones]:
        base = fp.Settings(backbone=backbone.name, steps=(other or [fp.Settings.steps])[0], **settings)
        base.check()
        files, settle = {}, fp._room("curation").settle
        together, ranged, everything = None, [], [f for c in categories for f in c.train]
        if multi:  # products of one model share a backbone
            together, quantize = settle(everything, base)[0], fp._room("quantization").quantize_on
            backbone, ranged = quantize(backbone, everything, together, None, progress)
        settled = {c.name: together or settle(c.train, base)[0] for c in categories}
        with _interrupted_at_once():
            for category, seed in itertools.product(categories, seeds):
                own = dataclasses.replace(settled[category.name], seed=seed)
                for key, file in train(category, backbone, own, variants,
                                       images or [None], iterations, threads, progress, ranged):
                    files[key, category.name, seed] = file

        def load(key, category, seed, n):
            return fp.Prior.load(files[key, category.name, seed], threads=threads, steps=n, device=device)

        @functools.lru_cache(1)
        def load_all(key, seed, n):
            return fp.MultiPrior({c.name: load(key, c, seed, n) for c in categories})

        joints = [False, True] if multi else [False]
        for count, variant, joint, n in itertools.product(images or [None], variants, joints, steps):
            label = variant + f", {count} images" * bool(count) + ", one model" * joint
            facts, rows = {"backbone": backbone.name, "variant": label, "steps": n}, []
            for seed, category in itertools.product(seeds, categories):
                key = variant, count
                prior = load_all(key, seed, n) if joint else load(key, category, seed, n)
                own = {"category": category.name, "seed": seed, "images": count or len(category.train)}
                rows.append(facts | own | evaluate(prior, category, progress))
                if as_json:
                    print(json.dumps(rows[-1]), flush=True)
            points.append(measure(prior, **facts, **_means(rows)) | {"rows": rows})
    if not as_json:
        print("\n" + accuracy_table(points))
    for file in write_report(points, report) if report else ():
        fp._room("console").say(file)


@contextlib.contextmanager
def _interrupted_at_once():
    """Ctrl-C ends the run: training alone would go on with the weights it has, and they would be kept."""
    def stop(*_):
        fp._room("console").say("interrupted")
        sys.exit(130)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _means(rows: list[dict]) -> dict[str, float]:
    """Mean over categories and seeds of every metric that all rows have."""
    metrics = [k for k in rows[0] if all(isinstance(r.get(k), float) for r in rows)]
    return {k: float(np.mean([r[k] for r in rows])) for k in metrics}


def _frame_ms(point: dict) -> float:
    return point["batches"][1]["p50_ms"] if "batches" in point else point["frame_p50_ms"]


def accuracy_table(points: list[dict]) -> str:
    """Markdown: a row a configuration: image AUROC a category, means over categories and seeds, speed."""
    names, seeds = (list(dict.fromkeys(r[k] for r in points[0]["rows"])) for k in ("category", "seed"))
    head = ["backbone", "variant", "steps", *names, "mean", "pixel AUROC", "pixel AP", "AUPRO",
            "box ÷ defect", "ms a frame", "frames/s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for p in points:
        each = [[r["image_auroc"] for r in p["rows"] if r["category"] == n] for n in names]
        cells = [f"{np.mean(v):.4f}" + (f" ± {np.std(v):.4f}" if len(v) > 1 else "") for v in each]
        cells += [f"{p[k]:.4f}" if k in p else "–"
                  for k in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro", "box_ratio")]
        cells += [f"{_frame_ms(p):.2f}", f"{1e3 / _frame_ms(p):.0f}"]
        lines.append("| " + " | ".join([p["backbone"], p["variant"], str(p["steps"]), *cells]) + " |")
    spread = " (mean ± deviation)" if len(seeds) > 1 else ""
    return "\n".join([*lines, f"\nImage AUROC; seeds {', '.join(map(str, seeds))}{spread}; "
                      "speed at batch 1, uint8 array to score and map."])


def _import_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise fp.BackendUnavailable("--report needs matplotlib: pip install 'fastprior[bench]'") from e
    return Figure


def write_report(points: list[dict], folder: Path) -> list[Path]:
    """table.md and the trade-off of speed and image AUROC as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = _import_figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys((p["backbone"], p["variant"]) for p in points):
        own = [p for p in points if (p["backbone"], p["variant"]) == label]
        x, y = [1e3 / _frame_ms(p) for p in own], [p["image_auroc"] for p in own]
        axes.plot(x, y, "o-", label=", ".join(label))
        for p, *at in zip(own, x, y):
            axes.annotate(str(p["steps"]), at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="frames a second, batch 1 (numbers: DDIM inversion steps)", xscale="log",
             ylabel="image AUROC, mean of categories")
    axes.grid(alpha=.3, which="both")
    axes.legend()
    files = [folder / name for name in ("tradeoff.png", "tradeoff.svg", "table.md")]
    for file in files[:2]:
        figure.savefig(file, dpi=150)
    files[2].write_text(accuracy_table(points) + "\n")
    return files


# ------------------------------------------------------------------------------------------------
# Speed of a frame on this machine
# ------------------------------------------------------------------------------------------------

def bench(progress: Callable, *, steps: Sequence[int], model: Path | None, backbones: Sequence[str],
          size: int | tuple[int, int], cell: int, input_size: int | tuple[int, int] | None, batch: int,
          precision: str, against: Sequence[str], processes: bool, data: Sequence[Path], as_json: bool,
          device: str, threads: int | None, report: Path | None, **accuracy) -> None:
    """What `fastprior bench` does with its options; a line or a JSON object for each thing that is timed."""
    if report and not data:
        raise fp.FastPriorError("--report shows speed against accuracy: give --data too")
    if model and data:
        raise fp.FastPriorError("--model times that model alone: leave out --data, which trains its own")
    device = fp.resolve_device(device)
    if precision != "float32" and device != "cuda":
        raise fp.ShapeError("--precision: expected float32 on the CPU (float16 with --device cuda), got "
                            f"{precision!r:.20}")
    if against:
        check_runtimes(against, device)
    fp._check_size(*np.broadcast_to(input_size or 448, 2).tolist())
    peaks = measure_peaks() if device == "cpu" else {}
    facts = fp._room("console").machine() | {"fastprior": fp.__version__}
    fp._room("console").say(*(f"{k}={v}" for k, v in facts.items()),
                            *(f"{k}={v:.0f}" for k, v in peaks.items()))

    def measure(prior, **facts) -> dict:
        facts["dtype"] = "int8 features and " * prior.backbone.integer + precision
        pixels = np.broadcast_to(input_size or _first(prior).settings.shape, 2).tolist()
        if prior.device == "cuda":
            speed = fp._engines("cuda").bench_cuda(prior._engine(), pixels=pixels)
        else:
            speed = bench_speed(prior, pixels, batch) | peaks
        speed |= bench_against(prior, against, backbones=backbones) if against else {}
        speed |= bench_process(prior) | bench_neighbours(prior) if processes else {}
        print(json.dumps(facts | speed) if as_json else _speed_text(dict(facts), speed), flush=True)
        return facts | speed
    if data:
        run(data, measure, progress, backbones=backbones, steps=steps, size=size, cell=cell, report=report,
            as_json=as_json, threads=threads, device=device, **accuracy)
        return
    for name in [model] if model else backbones:
        prior = (fp.Prior.load(model, threads=threads, device=device, precision=precision) if model
                 else untrained(name, size, threads, device, precision, cell))
        for count in steps:
            measure(prior.with_steps(count), backbone=Path(name).stem, steps=count,
                    variant="as trained" if model else "untrained")


def _median_ms(call: Callable[[], Any], seconds: float, least: int = 20, pause: float = 0) -> np.ndarray:
    """Milliseconds of every call within a time budget, after three calls that are not counted."""
    for _ in range(3):
        call()
    times, began = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        if pause:  # else not even sleep(0): it gives up the interpreter's lock
            time.sleep(pause)
        t = time.perf_counter()
        call()
        times.append((time.perf_counter() - t) * 1e3)
    return np.array(times)


def bench_speed(prior, pixels: Sequence[int], batch: int = 16, seconds: float = 2.0) -> dict:
    """Latency and throughput of this model on this machine; milliseconds, warm, decode apart.

    The frame is `Prior.score` on a uint8 array (*pixels, 3): resize, features, inversion, density, map and
    Python. Stages are the same program run in parts.
    """
    from PIL import Image
    rng = np.random.default_rng(0)
    height, width = pixels
    noise = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((width, height), Image.BICUBIC))
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    frame = _median_ms(lambda: prior.score(image), seconds)
    batched = _median_ms(lambda: prior.score_batch([image] * batch), seconds, 5)
    first = _first(prior)

    def decode():
        return np.asarray(Image.open(stream).convert("RGB"))
    report = {"size": fp._size_text(first.settings.size), "input_size": f"{width}x{height}",
              "steps": first.settings.steps,
              "threads": first._engine().threads if prior.backend == "numba" else 1,
              "frame_p50_ms": np.median(frame), "frame_p95_ms": np.percentile(frame, 95),
              "frame_p99_ms": np.percentile(frame, 99),
              "frames_per_second": 1e3 / np.median(frame), "batch": batch,
              "batch_frames_per_second": 1e3 * batch / np.median(batched),
              "decode_png_ms": np.median(_median_ms(decode, .3))}
    if prior.backend == "numba" and isinstance(prior, fp.Prior):
        engine = prior._engine()
        for name, stages in {"resize": ["resize"], "features": ["features"], "map": ["map"],
                             "inversion": ["whitening", "denoiser", "density"]}.items():
            ms = _median_ms(lambda: engine.run_only(stages, [image]), seconds / 4)
            report[f"{name}_ms"] = np.median(ms)
        flops, read = count_work(prior)
        for name in flops:
            report |= {f"{name}_gflop": flops[name] / 1e9, f"{name}_weights_mb": read[name] / 1e6,
                       f"{name}_gflop_per_s": flops[name] / report[f"{name}_ms"] / 1e6}
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in report.items()}


def count_work(prior) -> tuple[dict[str, float], dict[str, float]]:
    """Operations (a multiplication and an addition are two) and bytes of weights read, a frame, by stage."""
    flops, read, net = 0.0, 0.0, prior.backbone
    pixels = math.prod(prior.settings.shape) // 4
    for i, block in enumerate(net.blocks):
        p = block.arrays
        weights = dict(p) | ({"stem_w": net.stem_w} if i == 0 else {})
        out = pixels // block.stride ** 2
        for name, a in weights.items():
            if name in ("stem_w", "expand_w"):
                flops += 2 * a.size * pixels
            elif name in ("dw_w", "project_w"):
                flops += 2 * a.size * out
            read += a.size * (np.dtype(fp._written_as(name, True)).itemsize if net.integer else 4)
        pixels = out
    n, d = math.prod(prior.grid), prior.denoiser or {}
    a_step = 2 * n * sum(a.size for k, a in d.items() if k.endswith(("in_w", "out_w", "_w1", "_w2")))
    a_step += 2 * d["in_w"].shape[1] * sum(a.size for k, a in d.items() if "_token" in k) if d else 0
    products = preconditioning = 0
    for _, whitener, factors in ((prior.mean, prior.whitener, prior.factors), *filter(None, [prior.coarse])):
        factors = np.empty(0, fp.QTILE) if factors is None else factors
        weights = whitener["weight"] if whitener.dtype == fp.QTILE else whitener
        products += weights.size + 2 * factors["weight"].size
        preconditioning += whitener.nbytes + 2 * factors.nbytes
    steps = prior.settings.steps
    return ({"features": flops, "inversion": 2.0 * products + steps * a_step},
            {"features": read,
             "inversion": preconditioning + steps * 4.0 * sum(a.size for a in d.values())})


def measure_peaks(seconds: float = .5) -> dict[str, float]:
    """What this machine reaches now: float32 matrix product (NumPy's BLAS, its threads) and memory copy."""
    a = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    out = np.empty_like(a)
    product = _median_ms(lambda: np.dot(a, a, out=out), seconds, 5).min()
    big = [np.ones(1 << 25, np.float32) for _ in range(2)]  # zeros would be one page, read from the cache
    copy = _median_ms(lambda: np.copyto(big[1], big[0]), seconds, 5).min()
    return {"matmul_gflop_per_s": 2 * 1024 ** 3 / product / 1e6,
            "copy_gb_per_s": 2 * big[0].nbytes / copy / 1e6}


def untrained(backbone: str, size: int | tuple[int, int], threads: int | None = None, device: str = "cpu",
              precision: str = "float32", cell: int = 0) -> "fp.Prior":
    """A prior of random numbers with the shapes of a trained one: for timing, its scores mean nothing."""
    settings = fp.Settings(backbone=backbone, size=size, cell=cell)
    settings.check()
    picture = np.random.default_rng(0).integers(0, 256, (*settings.shape, 3), np.uint8)
    net, _ = fp._room("quantization").quantize_on(fp.load_backbone(backbone), [picture], settings)
    n, c = math.prod(settings.grid), sum(net.channels)
    rng, panels = np.random.default_rng(0), -(-c // fp._PANEL)
    denoiser = fp._room("training").initial_denoiser(n, c, settings)
    m = len(fp._cells(settings, np.ones(n, bool)))
    calibration = {"gain": np.ones(n + m, np.float32), "offset": np.zeros(n + m, np.float32),
                   "moments": np.array([0., 1., 0.]), "scores": np.arange(100.), "peaks": np.arange(1., 101.)}
    counts = panels * (panels + 1) // 2, panels * -(-settings.factors // fp._PANEL)

    def view(n: int) -> tuple[np.ndarray, ...]:
        whitener, factors = (
            fp.quantize(scale * rng.standard_normal((n, count, fp._PANEL, fp._PANEL), np.float32))
            for scale, count in zip((.01, .001), counts))
        return np.zeros((n, c), np.float32), whitener, factors.reshape(n * panels, -1)
    mean, whitener, factors = view(n)
    return fp.Prior(settings, net, mean, whitener, denoiser, {k: calibration for k in range(1, 51)}, {},
                    threads, device, precision, factors=factors, coarse=view(m) if m else None,
                    fine=(np.zeros((math.prod(settings.fine), net.fine_channels), np.float16),
                          np.eye(net.fine_channels, dtype=np.float32)))


def _speed_text(facts: dict, speed: dict) -> str:
    """What was timed in a line, then every figure under its name."""
    import textwrap

    def flat(of: dict, prefix: str = ""):
        for name, value in of.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name} {value:.4g}" if isinstance(value, float) else f"{prefix}{name} {value}"
    head = f"{facts.pop('backbone')}, {facts.pop('variant')}, {facts.pop('steps')} steps"
    if "frame_p50_ms" in speed:
        head += (f": {speed['frame_p50_ms']:.2f} ms a frame (p95 {speed['frame_p95_ms']:.2f}), "
                 f"{speed['frames_per_second']:.0f} frames/s")
    return head + "\n" + textwrap.indent(textwrap.fill(", ".join(flat(facts | speed)), 108), "  ")


# ------------------------------------------------------------------------------------------------
# Whole processes, and the bare backbone in other runtimes
# ------------------------------------------------------------------------------------------------

# A child imports the very file that its parent is, whatever that is called there.
_CHILD = """import atexit, importlib.util, sys
spec = importlib.util.spec_from_file_location("fastprior", sys.argv.pop(1))
fastprior = sys.modules["fastprior"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fastprior)
"""


def _command(code: str, *arguments) -> list[str]:
    return [sys.executable, "-c", _CHILD + code, fp.__file__, *map(str, arguments)]


def _first(prior):
    return next(iter(fp._products(prior).values()))


def _pixels(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def bench_process(prior) -> dict[str, float]:
    """Processes that score one PNG, start to exit, kernels cached and compiled anew; peak resident memory."""
    from PIL import Image
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        model, image = Path(folder) / "model.npz", Path(folder) / "image.png"
        prior.save(model)
        report["model_load_s"] = float(np.median(_median_ms(lambda: fp.Prior.load(model), 0, 3)) / 1e3)
        Image.fromarray(_pixels(_first(prior).settings.shape)).save(image)
        # the kernel's own count (getrusage) would include what this process held when it forked
        tell = "atexit.register(lambda: print(open('/proc/self/status').read(), file=sys.stderr))"
        command = _command(f"{tell}\nfastprior.main()", "score", image, "-m", model)
        for name, runs, environment in (("process", 5, {}), ("first_process", 1, {"XDG_CACHE_HOME": folder})):
            times = []
            for _ in range(runs):
                began = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
                times.append(time.perf_counter() - began)
                if done.returncode not in (0, 1):
                    raise fp.FastPriorError(f"--processes: scoring failed: {done.stderr.split(chr(10))[0]}")
            report[f"{name}_s"] = float(np.median(times))
            peak = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("VmHWM")]
            report |= {f"{name}_peak_mb": int(peak[0]) / 1e3} if peak else {}  # Linux only
    return report


def bench_neighbours(prior, calls: int = 100, rounds: int = 3) -> dict[str, float]:
    """Frames 20 ms apart (p50), beside a busy Python thread of this process (p50) and a busy process (p95),
    by the p50 of those that follow each other on a quiet machine."""
    image = _pixels(_first(prior).settings.shape)

    def frames(pause: float = 0) -> np.ndarray:
        return _median_ms(lambda: prior.score(image), 0, calls, pause)

    def apart() -> np.ndarray:
        return frames(.02)

    def beside_thread() -> np.ndarray:
        done = threading.Event()

        def spin():
            while not done.is_set():
                pass
        thread = threading.Thread(target=spin)
        thread.start()
        try:
            return frames()
        finally:
            done.set()
            thread.join()

    def beside_process() -> np.ndarray:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            return frames()
        finally:
            other.kill()
            other.wait()
    quiet, spaced, thread, process = np.array([[f() for f in (frames, apart, beside_thread, beside_process)]
                                              for _ in range(rounds)]).swapaxes(0, 1).reshape(4, -1)
    p50 = np.median(quiet)
    return {"quiet_p50_ms": float(p50), "apart_p50_ratio": float(np.median(spaced) / p50),
            "busy_thread_p50_ratio": float(np.median(thread) / p50),
            "busy_process_p95_ratio": float(np.percentile(process, 95) / p50)}


def check_runtimes(names: Sequence[str], device: str) -> None:
    known = ["torch"] if device == "cuda" else list(RUNTIMES)
    for name in names:
        if name not in known:
            raise fp.ShapeError(f"--against: expected some of {', '.join(known)}, got {name!r}")
        packages = {"torch": ("torch",), "openvino-int8": ("openvino", "nncf", "onnx")}
        for package in packages.get(name, (name.partition("-")[0], "onnx")):
            if not fp._room("console").is_installed(package):
                raise fp.BackendUnavailable(f"--against {name} needs {package}: pip install {package}")


def in_floats(net, sources: Iterable = ()):
    """The backbone `net` in floats, as it is before `quantize_on`: by its name, or from one of `sources`."""
    if not net.integer:
        return net
    for source in (net.name, *sources):
        with contextlib.suppress(fp.FastPriorError):
            found = fp.load_backbone(source)
            if found.header() | {"integer": True} == net.header():
                return found
    raise fp.BackendUnavailable(f"--against: other runtimes take the backbone {net.name} in floats, and by "
                                "this name there is none: give the weights it is made of, --backbone")


def bench_against(prior, names: Sequence[str], rounds: int = 10, calls: int = 20,
                  backbones: Iterable = ()) -> dict[str, float]:
    """Whole frames of ours against the bare backbone, in floats, in other runtimes, in turn.

    Ours: uint8 (H, W, 3) array -> score and map. Theirs: the truncated backbone alone, its input already
    resized and normalised, each in a process of its own that sleeps while others run. Of every round of calls
    the median, of these the best (a round that was disturbed counts for nobody), in ms, and the ratio
    ours/theirs; same threads, batch 1, float32. On a GPU (torch only, eager and as a CUDA graph) all is one
    process, the arrays are there already, and every call waits for its result. backbones: see `in_floats`.
    """
    check_runtimes(names, prior.device)
    on_gpu, first = prior.device == "cuda", _first(prior)
    net, shape, engine = in_floats(prior.backbone, backbones), first.settings.shape, first._engine()
    threads, image = engine.threads if engine else 1, _pixels(shape)

    def timer(call):
        return lambda: float(np.median(_median_ms(call, 0, calls)))
    with contextlib.ExitStack() as stack:
        if on_gpu:
            pixels = engine.cupy.asarray(image)
            runs = {"fastprior": timer(lambda: engine.run([pixels], with_map=True).stream.synchronize())}
            runs |= {name: timer(call) for name, call in torch_cuda(net, shape).items()}
        else:
            runs = {"fastprior": timer(lambda: prior.score(image))}
            backbone = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "backbone.npz"
            fp._write_npz(backbone, net.header(), net.to_arrays())
            for name in names:
                serve = 'fastprior._room("benchmark").serve(*sys.argv[1:])'
                child = stack.enter_context(subprocess.Popen(
                    _command(serve, name, backbone, *shape, threads), text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE))

                def ask(child=child, name=name):
                    with contextlib.suppress(BrokenPipeError):
                        print(calls, file=child.stdin, flush=True)
                    if not (answer := child.stdout.readline()):
                        raise fp.BackendUnavailable(f"--against: {name} failed, see above")
                    return float(answer)
                runs[name] = ask
                ask()
        times: dict[str, list] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, call in runs.items():
                times[name].append(call())
    best = {name: min(t) for name, t in times.items()}
    return ({f"{name}_ms": ms for name, ms in best.items()}
            | {f"ratio_{name}": best["fastprior"] / ms for name, ms in best.items() if name != "fastprior"})


def serve(name: str, backbone: str, height: str, width: str, threads: str) -> None:
    """A child of `bench_against`: answers every line on stdin, a number of calls, with their median in ms."""
    net = fp.Backbone.from_arrays(*fp._read_npz(backbone))
    call = RUNTIMES[name](net, (int(height), int(width)), int(threads))
    for line in sys.stdin:
        print(float(np.median(_median_ms(call, 0, int(line)))), flush=True)


# Each returns a callable that runs the backbone alone, batch 1, float32, up to the stage outputs.

def onnxruntime(backbone, shape: tuple[int, int], threads: int) -> Callable[[], list]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_onnx(backbone, shape), options, ["CPUExecutionProvider"])
    image = {"image": _noise(shape)}
    return lambda: session.run(None, image)


def openvino(backbone, shape: tuple[int, int], threads: int, numbers: str = "f32") -> Callable[[], list]:
    """In numbers f32 or bf16, or in int8: quantised by NNCF, its ranges those of one image of noise."""
    import openvino
    core = openvino.Core()
    model = core.read_model(_onnx(backbone, shape))
    if numbers == "int8":
        with contextlib.redirect_stdout(sys.stderr):  # of `serve`, whose answers are on stdout
            import nncf
            nncf.set_log_level("ERROR")
            model = nncf.quantize(model, nncf.Dataset([{"image": _noise(shape)}]), subset_size=1)
    compiled = core.compile_model(model, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if numbers == "bf16" else "f32"})
    request, image = compiled.create_infer_request(), {"image": _noise(shape)}
    return lambda: list(request.infer(image, share_inputs=True, share_outputs=True).values())


def torch(backbone, shape: tuple[int, int], threads: int, device: str = "cpu",
          x: np.ndarray | None = None) -> Callable:
    """Eager mode, channels-last memory; x (*shape, 3) in place of noise."""
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
                       [pointwise(p[f"se_{part}_w"], p[f"se_{part}_b"]) for part in ("reduce", "expand")]
                       if "se_reduce_w" in p else None, pointwise(p["project_w"], p["project_b"])))

    def run(x):
        stages = []
        with torch.inference_mode():
            x = acts[backbone.act](stem(x))
            for i, (skip, act, expand, depthwise, squeeze, project) in enumerate(layers):
                y = act(depthwise(act(expand(x)) if expand else x))
                if squeeze:
                    reduce, grow = squeeze
                    y = y * torch.sigmoid(grow(functional.silu(reduce(y.mean((2, 3), keepdim=True)))))
                x = project(y) + x if skip else project(y)
                if i in backbone.stages:
                    stages.append(x)
        return stages
    image = tensor(_noise(shape) if x is None else x.transpose(2, 0, 1)[None])
    image = image.to(memory_format=torch.channels_last)
    return lambda: run(image)


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "torch": torch,
            "openvino-bf16": functools.partial(openvino, numbers="bf16"),
            "openvino-int8": functools.partial(openvino, numbers="int8")}


def _onnx(backbone, shape: tuple[int, int]) -> bytes:
    return fp._room("export").backbone_model(backbone, shape)


def _noise(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, *shape)).astype(np.float32)


def torch_cuda(backbone, shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Eager and as one CUDA graph, each with the wait for its result; cuDNN may use TF32."""
    import torch as runtime
    eager = torch(backbone, shape, 1, "cuda")
    with runtime.cuda.stream(runtime.cuda.Stream()):  # a capture needs calls before it
        for _ in range(3):
            eager()
    runtime.cuda.synchronize()
    graph = runtime.cuda.CUDAGraph()
    with runtime.cuda.graph(graph):
        eager()
    return {"torch": lambda: (eager(), runtime.cuda.synchronize()),
            "torch_graph": lambda: (graph.replay(), runtime.cuda.synchronize())}


if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    fp.main()
