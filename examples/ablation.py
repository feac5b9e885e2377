#!/usr/bin/env python3
"""What each ingredient is worth, over categories and seeds, from features that are computed once and kept.

    python examples/ablation.py mvtec --backbone lite0 --seeds 0,1,2 --steps 2,3,5

Trains on the good images of every category in ROOT (layouts as in `fastprior bench --data`) and scores its test
images. Variants: gaussian (each place alone), joint (and the factors that places share), full (and the trained
denoiser), full without factors. Results: a JSON line a row on stdout; a table of means at the end on stderr.
"""
import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastprior as fp  # noqa: E402

VARIANTS = {"gaussian": ({"factors": 0}, 0), "joint": ({}, 0), "full": ({}, None), "no factors": ({"factors": 0}, None)}


def cached_features(category, settings, backbone):
    """`extract_features`, kept in the cache folder under everything that decides it."""
    key = hashlib.sha256(repr((fp.__version__, fp.FIT_REVISION, backbone.name, settings.size, settings.copies, settings.seed)).encode())
    for array in backbone.to_arrays().values():
        key.update(array.tobytes())
    for path in category.train:
        key.update(path.read_bytes())
    file = fp._cache_folder() / f"features-{category.name}-{key.hexdigest()[:24]}.npz"
    if not file.is_file():
        features, owner, _ = fp.extract_features(category.train, settings, backbone)
        file.parent.mkdir(parents=True, exist_ok=True)
        fp._write_npz(file, {}, {"features": features, "owner": owner})
    kept = fp._read_npz(file)[1]
    return kept["features"], kept["owner"], []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--categories", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", default="2", help="DDIM inversion steps, comma-separated")
    parser.add_argument("--variants", default="gaussian,joint,full")
    parser.add_argument("--images", default="", help="numbers of good images to train on; default: all")
    args = parser.parse_args()
    backbone = fp.load_backbone(args.backbone)
    steps = [int(n) for n in args.steps.split(",")]
    results = {}
    for category in fp.find_categories(args.root):
        if args.categories and category.name not in args.categories.split(","):
            continue
        for seed in map(int, args.seeds.split(",")):
            settings = fp.Settings(backbone=backbone.name, size=args.size, seed=seed, steps=max(steps))
            kept = cached_features(category, settings, backbone)
            for count in map(int, args.images.split(",")) if args.images else (len(category.train),):
                chosen = np.sort(np.random.default_rng(seed).permutation(len(category.train))[:count])
                rows = np.isin(kept[1], chosen)
                part = kept[0][rows], np.searchsorted(chosen, kept[1][rows]), []
                whitened = fp._whiten_features(*part, settings)
                for variant in args.variants.split(","):
                    changes, iterations = VARIANTS[variant]
                    own = dataclasses.replace(whitened, x0=whitened.x0.copy(), whitener=whitened.whitener.copy())
                    prior = fp._fit_whitened(own, dataclasses.replace(settings, **changes), backbone, iterations)
                    for n in steps:
                        row = {"backbone": backbone.name, "size": args.size, "category": category.name, "seed": seed,
                               "images": count, "variant": variant, "steps": n, "iterations": prior.summary["iterations"],
                               **fp.evaluate(prior.with_steps(n), category)}
                        print(json.dumps(row), flush=True)
                        results.setdefault((count, variant, n), {}).setdefault(category.name, []).append(row)
    for (count, variant, n), own in results.items():
        means = {name: np.mean([r["image_auroc"] for r in rows]) for name, rows in own.items()}
        print(f"{count} images, {variant}, {n} steps: " + " ".join(f"{k} {v:.4f}" for k, v in means.items())
              + f" mean {np.mean(list(means.values())):.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
