#!/usr/bin/env python3
"""Does the threshold keep its promise? Fits the joint Gaussian to 70 % of the good images, over and over.

    python examples/false_alarms.py photos/good --splits 30

For each way to calibrate and several rates: what the calibration promises on average, and the share of the
other 30 % of the images that is called an anomaly, with its standard error over the splits. No torch.
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
args = parser.parse_args()

images = [fp.load_image(p) for p in fp.find_images(args.good)]
count = round(.7 * len(images))
rates = (.02, .05, .1)
print(f"{args.good}: {len(images)} images, {args.splits} splits, {args.size} px")
print("calibration", "wished", "promised", "seen", "error", sep="\t")
for calibration in ("cross", "holdout"):
    seen: dict[float, list] = {r: [] for r in rates}
    for seed in range(args.splits):
        order = np.random.default_rng(seed).permutation(len(images))
        prior = fp.fit([images[i] for i in order[:count]], iterations=0, size=args.size, copies=2,
                       calibration=calibration, seed=seed)
        scores = [r.score for r in prior.score_batch([images[i] for i in order[count:]], with_map=False)]
        thresholds = {r: fp.conformal_threshold(prior.calibration["scores"], r) for r in rates}
        for rate, threshold in thresholds.items():
            seen[rate].append(np.mean(np.array(scores) > threshold.value))
    for rate in rates:
        print(f"{calibration}\t{rate:.1%}\t{thresholds[rate].expected:.1%}\t{np.mean(seen[rate]):.1%}\t"
              f"{np.std(seen[rate]) / np.sqrt(args.splits):.1%}", flush=True)
