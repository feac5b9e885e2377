#!/usr/bin/env python3
"""Is one checkout slower than another? Frames of both, in turn, so that a noisy machine is noisy for both.

    git worktree add /tmp/old ca106fb && python examples/in_turns.py /tmp/old . 256

Each is a process of its own that sleeps while the other runs: lite0, so many pixels a side (256 in places of
16), two steps, an array to score and map, two threads. Of forty turns of twenty frames the medians, in
thirds, and their ratio.
"""
import subprocess
import sys

import numpy as np

CHILD = """import os, statistics, sys, time
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
import fastprior as fp, numpy as np
make = getattr(fp, "untrained", None) or fp._room("benchmark").untrained  # 0.1 had it in the core
side = int(sys.argv[2])
prior = make("lite0", side, 2)
image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        began = time.perf_counter()
        prior.score(image)
        times.append(1e3 * (time.perf_counter() - began))
    print(statistics.median(times), flush=True)
"""


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    children = [subprocess.Popen([sys.executable, "-c", CHILD, root, sys.argv[3]], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE) for root in sys.argv[1:3]]

    def ask(child):
        try:
            print(20, file=child.stdin, flush=True)
            return float(child.stdout.readline())
        except (OSError, ValueError):
            sys.exit(f"error: {child.args[-2]} scores no frame; what it says stands above")
    for child in children:
        ask(child)  # compiled and warm
    times = np.array([[ask(child) for child in children] for _ in range(40)])
    for part in np.array_split(times, 3):
        first, second = np.median(part, 0)
        print(f"{first:.2f} ms and {second:.2f} ms a frame: {second / first:.3f}")
    print(f"all: {np.median(times[:, 1] / times[:, 0]):.3f}, the best of each "
          f"{times[:, 1].min() / times[:, 0].min():.3f}")
    for child in children:
        child.stdin.close()
        child.wait()


if __name__ == "__main__":
    main()
