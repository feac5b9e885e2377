#!/usr/bin/env python3
"""Does the threshold keep its promise? Trains the Gaussian prior on 70 % of a folder of good images, over and over.

    python examples/false_alarms.py photos/good --splits 30

For each way to calibrate and several rates: what the calibration scores promise on average, and the share of the other
30 % of the images that is called an anomaly. Features are computed once; no torch.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastprior as fp  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("good", help="folder of good images")
parser.add_argument("--splits", type=int, default=30)
parser.add_argument("--size", type=int, default=128)
parser.add_argument("--copies", type=int, default=2)
args = parser.parse_args()

files = fp.find_images(args.good)
settings = fp.Settings(size=args.size, copies=args.copies)
features, owner, _ = fp.extract_features(files, settings, fp.load_backbone(settings.backbone))
clean = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])


def cached(images, *_):
    rows = [np.flatnonzero(owner == i) for i in images]
    return features[np.concatenate(rows)], np.repeat(np.arange(len(images)), [len(r) for r in rows]), []


fp.extract_features = cached
rates = (.02, .05, .1)
print(f"{args.good}: {len(files)} images, {args.splits} splits, {args.size} px\ncalibration\twished\tpromised\tseen\terror")
for calibration in ("cross", "holdout"):
    rng, seen, promised = np.random.default_rng(1), {r: [] for r in rates}, {}
    for seed in range(args.splits):
        order = rng.permutation(len(files))
        count = round(.7 * len(files))
        prior = fp.fit(list(np.sort(order[:count])), iterations=0, size=args.size, copies=args.copies,
                       calibration=calibration, seed=seed)
        x0 = fp._apply_whitener(features[clean[order[count:]]], prior.mean, fp.unpack_lower(prior.whitener, features.shape[2]))
        v = fp.unpack_factors(prior.factors, prior.settings.factors, *x0.shape[1:])
        x0 = np.stack([fp.remove_factors(x.astype(np.float32), v) for x in x0])
        own = prior.calibration
        nll = fp._nll_of(x0, None, prior.timesteps, prior.prediction)
        scores = prior._image_scores(nll * own["scale"] + own["location"])
        for rate in rates:
            threshold = fp.conformal_threshold(own["scores"], rate)
            seen[rate].append(np.mean(scores > threshold.value))
            promised[rate] = threshold.expected
    for rate in rates:
        print(f"{calibration}\t{rate:.1%}\t{promised[rate]:.1%}\t{np.mean(seen[rate]):.1%}\t"
              f"{np.std(seen[rate]) / np.sqrt(args.splits):.1%}", flush=True)
