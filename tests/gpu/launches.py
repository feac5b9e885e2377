#!/usr/bin/env python3
"""Time of every launch of a frame on this GPU, by CUDA events: which kernels to look at first.

    python tests/gpu/launches.py [--backbone lite0] [--size 256] [--precision float32] [--batch 1]
"""
import argparse
import collections
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fastprior as fp  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()

    prior = fp._room("benchmark").untrained(args.backbone, args.size, device="cuda", precision=args.precision)
    engine = prior._engine()
    cupy = engine.cupy
    image = cupy.asarray(np.random.default_rng(0).integers(0, 256, (args.size, args.size, 3), np.uint8))
    engine.run([image] * args.batch, with_map=True)
    built, stream = engine.frames[args.batch], cupy.cuda.Stream(non_blocking=True)
    totals = collections.Counter()
    with stream:
        for stage, launch in zip(built.stages, built.launches):
            graph = engine.capture([launch] * 20)  # long beside what events and launching cost
            times = []
            for _ in range(args.repeats):
                begin, end = cupy.cuda.Event(), cupy.cuda.Event()
                begin.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                times.append(1e3 * cupy.cuda.get_elapsed_time(begin, end) / 20)
            name = getattr(launch.kernel, "name", str(launch.kernel))
            totals[stage, name] += float(np.median(times))
            print(f"{stage:10} {name:22} grid {str(launch.grid):18} {np.median(times):8.2f} us", flush=True)
    print("\nby stage and kernel, us a frame")
    for (stage, name), us in totals.most_common():
        print(f"{stage:10} {name:22} {us:8.2f}")
    print(f"{'all':33} {sum(totals.values()):8.2f}")


if __name__ == "__main__":
    main()
