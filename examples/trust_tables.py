#!/usr/bin/env python3
"""Can verdicts on real images be trusted? The tables of BENCHMARKS.md, "Trust".

    python examples/trust_tables.py refits mvtec --splits 67     # false alarms, images set aside, drift
    python examples/trust_tables.py traits mvtec                 # drift of light, focus and place alone
    python examples/trust_tables.py mixtures mvtec               # defects among the training images
    python examples/trust_tables.py products mvtec               # several products, and strangers

Joint Gaussian (no torch), default settings, one thread. Features of all images are computed once and kept
in the cache folder, as by `bench --data`; a fit takes some of them. A row of JSON a fit, then the table of
what is done, also after Ctrl-C.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastprior as fp  # noqa: E402

extraction = fp._room("extraction")
fitting = fp._room("fitting")
RATES = .01, .05, .1  # false-alarm rates wished for
FRAMES = 40  # images that drift is judged by
SHARES = .01, .02, .05  # of bad images among the good


def shifted(image: np.ndarray) -> np.ndarray:
    """Right and down by 2 % of a side; the edge repeats."""
    n = round(.02 * len(image))
    return np.pad(image, ((n, 0), (n, 0), (0, 0)), "edge")[:len(image), :image.shape[1]]


DRIFTS = {"darker": lambda a: (a * .9 + .5).astype(np.uint8),  # every value, by a tenth
          "shifted": shifted,
          "defocused": lambda a: ndimage.gaussian_filter(a, (s := .003 * len(a), s, 0))}  # of a side


class Changed(list):
    """Files that are read, and changed, one after the other."""
    change = None

    def __iter__(self):
        return (self.change(fp.load_image(file)) for file in super().__iter__())


class Kept:
    """Features of a category's images."""

    def __init__(self, category, config, net, ranged=()):
        bench = fp._room("benchmark")

        def kept(images, kind, change=None):
            own, files, key = config, images, (config.size, config.cell, config.bits, config.copies,
                                                  config.seed)
            if change:
                own, files, key = dataclasses.replace(config, copies=0), Changed(images), key[:3]
                files.change = change
            return bench.kept_features(bench.cache_files(category.name, images, net)(kind, *key),
                                       lambda: extraction.extract_features(files, own, net, 1))
        self.name, self.good = category.name, kept(category.train, "features")._replace(ranged=ranged)
        self.test, self.drifts = kept(category.test, "features"), {}
        self.files, self.bad = (np.asarray(a)[self.test.sources] for a in (category.test, category.labels))
        for name, change in DRIFTS.items():
            e = kept(category.train, name, change)
            order = [e.sources.index(s) for s in self.good.sources]
            self.drifts[name] = e.features[order], fp._room("curation").traits(e.looks[order])
        self.traits = fp._room("curation").traits(self.good.looks)


class Traits:
    """`traits` of a category's good images, as they are and changed: no network."""

    def __init__(self, category, config, net):
        curation = fp._room("curation")
        images = [fp.load_image(file) for file in category.train]
        self.name, self.good, *changed = category.name, *(
            curation.traits(np.array([curation.look(change(a)) for a in images]))
            for change in (lambda a: a, *DRIFTS.values()))
        self.drifts = dict(zip(DRIFTS, changed))


def refit(e: extraction.Extracted, config, net) -> fp.Prior:
    return fitting.fit_whitened(fitting.whiten_features(e, config, threads=1), config, net, 0, threads=1)


def frames_of(prior: fp.Prior, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of features (B, N, C): scores (B,) and z (B, N)."""
    frames = [prior._frames(None, False, [tokens[i:i + 16]]) for i in range(0, len(tokens), 16)]
    return tuple(map(np.concatenate, zip(*((f.scores, f.outputs[0]) for f in frames))))


def alarms(scores: np.ndarray, calibration: np.ndarray, aside: int) -> list:
    """[promised on average as printed, seen, more than in 95 % of draws] for each of RATES."""
    rows = []
    for t in (fp.conformal_threshold(calibration, rate) for rate in RATES):
        t = dataclasses.replace(t, count=t.count + aside)  # as it is printed: those set aside count as good
        seen = int(np.sum(scores > t.value))
        most = stats.betabinom(len(scores), t.count + 1 - t.rank, t.rank).ppf(.95)
        rows.append([t.expected, seen / len(scores), bool(seen > most)])
    return rows


def refits(kept: list[Kept], config, net, args):
    """Fits n images, and with "holdout" n / 4 more, of which a fifth is kept away; scores the rest."""
    low, high = args.images
    for seed, own in itertools.product(range(args.splits), kept):
        rng, count = np.random.default_rng(seed), len(own.good.keys)
        n = round(np.exp(rng.uniform(np.log(low), np.log(min(high, (count - FRAMES) / 1.25)))))
        order, more = rng.permutation(count), n + n // 4
        fitted, new = order[:n], order[more:]
        prior = refit(own.good.of(np.sort(fitted)), dataclasses.replace(config, seed=seed), net)
        exact = refit(own.good.of(np.sort(order[:more])),
                      dataclasses.replace(config, seed=seed, calibration="holdout"), net)
        clean, aside = own.good.features[own.good.clean], prior.summary["held_out_aside"]
        scores, apart = (frames_of(p, clean[new])[0] for p in (prior, exact))
        known = prior.calibration["scores"], prior.threshold.value
        kept_traits, drift = prior.summary["traits"], fp._room("curation").drift
        parts = [slice(None), *(slice(i, i + FRAMES) for i in range(0, len(new) - FRAMES + 1, FRAMES))]
        row = {"category": own.name, "seed": seed, "images": n, "new": len(new), "set_aside": aside,
               "cross": alarms(scores, known[0], aside),
               "holdout": alarms(apart, exact.calibration["scores"], exact.summary["held_out_aside"]),
               "false_warnings": [bool(drift(scores[p], *known, own.traits[new[p]], kept_traits))
                                  for p in parts]}
        for name, (features, traits) in own.drifts.items():
            s, some = frames_of(prior, features[new[:FRAMES]])[0], traits[new[:FRAMES]]
            row[name] = [bool(drift(s, *known, some, kept_traits)), float(np.mean(s > known[1])),
                         float(np.median(s) - np.median(scores[:FRAMES]))]
        yield row


def refits_table(rows: list[dict]) -> list[list]:
    names = [*dict.fromkeys(r["category"] for r in rows), "all"]
    groups, table = [[r for r in rows if name in (r["category"], "all")] for name in names], [["", *names]]

    def line(label, figure):
        table.append([label, *map(figure, groups)])

    def means(own, pick, forms):
        return " / ".join(f"{mean:{form}}" for mean, form in zip(np.mean([pick(r) for r in own], 0), forms))
    line("refits; images", lambda own: "{}; {} to {}".format(len(own), *(f(r["images"] for r in own)
                                                                        for f in (min, max))))
    line("set aside", lambda own: f"{sum(r['set_aside'] for r in own) / sum(r['images'] for r in own):.2%}")
    for way, (i, rate) in itertools.product(("cross", "holdout"), enumerate(RATES)):
        line(f"{way}, wished {rate:.0%}: promised / seen / refits above 95 % of draws",
             lambda own: means(own, lambda r: r[way][i], (".1%", ".1%", ".0%")))
    for what, part in (("all new images", slice(1)), (f"{FRAMES} at a time", slice(1, None))):
        line(f"false warnings of drift, {what}", lambda own: "{} of {}".format(
            *(sum(f(r["false_warnings"][part]) for r in own) for f in (sum, len))))
    for name in DRIFTS:
        line(f"{name}: warned / called anomalies / rise of the median",
             lambda own: means(own, lambda r: r[name], (".0%", ".1%", ".2f")))
    return table


def traits(kept: list[Traits], config, net, args):
    """A model's traits from n images, and those of the rest, 40 at a time."""
    curation, low, high = fp._room("curation"), *args.images
    for seed, own in itertools.product(range(args.splits), kept):
        rng, count = np.random.default_rng(seed), len(own.good)
        n = round(np.exp(rng.uniform(np.log(low), np.log(min(high, count - FRAMES)))))
        order = rng.permutation(count)
        fitted, new = own.good[order[:n]], order[n:]
        known = [n, fitted.mean(0).tolist(), fitted.std(0).tolist()]
        parts = (new[i:i + FRAMES] for i in range(0, len(new) - FRAMES + 1, FRAMES))
        yield {"category": own.name, "seed": seed, "images": n,
               "false_warnings": [bool(curation.moved(own.good[p], known)) for p in parts],
               **{name: bool(curation.moved(a[new[:FRAMES]], known)) for name, a in own.drifts.items()}}


def traits_table(rows: list[dict]) -> list[list]:
    table = [["", "refits; images", f"false warnings, {FRAMES} at a time",
              *(f"{name}: warned" for name in DRIFTS)]]
    for category in [*dict.fromkeys(r["category"] for r in rows), "all"]:
        own = [r for r in rows if category in (r["category"], "all")]
        wrong = [w for r in own for w in r["false_warnings"]]
        count = "{}; {} to {}".format(len(own), *(f(r["images"] for r in own) for f in (min, max)))
        table.append([category, count, f"{sum(wrong)} of {len(wrong)}",
                      *(f"{np.mean([r[name] for r in own]):.0%}" for name in DRIFTS)])
    return table


def merged(a: extraction.Extracted, b: extraction.Extracted) -> extraction.Extracted:
    """As `extract_features` would return the images of both; sources of b become negative."""
    keys, owner = np.array([*a.keys, *b.keys]), np.r_[a.owner, b.owner + len(a.keys)]
    order, sources, fine = np.argsort(keys), [*a.sources, *(-1 - s for s in b.sources)], [*a.fine, *b.fine]
    rows = np.concatenate([np.flatnonzero(owner == i) for i in order])
    return extraction.Extracted(np.concatenate([a.features, b.features])[rows],
                                np.repeat(np.arange(len(order)), np.bincount(owner)[order]),
                                np.concatenate([a.looks, b.looks])[order], keys[order].tolist(),
                                [sources[i] for i in order], 0, [], [fine[i] for i in order])


def mixtures(kept: list[Kept], config, net, args):
    """Fits n good images, then with some defects of a kind among them; judged by the other test images."""
    for seed, own in itertools.product(range(args.seeds), kept):
        seeded, rng = dataclasses.replace(config, seed=seed), np.random.default_rng(seed)
        good = own.good.of(np.sort(rng.permutation(len(own.good.keys))[:args.images[1]]))
        kinds, tokens = np.array([p.parent.name for p in own.files]), own.test.features[own.test.clean]
        clean = refit(good, seeded, net)
        for i, (kind, share) in enumerate(itertools.product(np.unique(kinds[own.bad]), SHARES)):
            if not args.all_seeds and (i // len(SHARES) + i) % args.seeds != seed:
                continue  # each kind at each share once, by the seeds in turn
            inside = np.sort(rng.permutation(np.flatnonzero(kinds == kind))[:round(share * len(good.keys))])
            prior, rest = refit(merged(good, own.test.of(inside)), seeded, net), np.ones(len(kinds), bool)
            rest[inside], aside = False, prior.summary["set_aside"]
            row = {"category": own.name, "kind": str(kind), "share": share, "seed": seed,
                   "inside": len(inside), "named": sum(s < 0 for s in aside),
                   "good_aside": sum(s >= 0 for s in aside)}
            for name, p in (("clean", clean), ("mixed", prior)):
                s, bad = frames_of(p, tokens[rest])[0], own.bad[rest]
                auroc = fp._room("benchmark").image_metrics(bad, s)["image_auroc"]
                row[name] = [float(np.mean(s[bad] > p.threshold.value)), auroc]
            yield row


def mixtures_table(rows: list[dict]) -> list[list]:
    table = [["", *(f"{s:.0%}: named; detection; AUROC" for s in SHARES)]]
    for name, kind in dict.fromkeys((r["category"], r["kind"]) for r in rows):
        table.append([f"{name}, {kind}"])
        for share in SHARES:
            own = [r for r in rows if (r["category"], r["kind"], r["share"]) == (name, kind, share)]
            if not own:
                table[-1].append("–")
                continue
            (was, before), (now, after) = np.mean([[r["clean"], r["mixed"]] for r in own], 0)
            named, inside = (sum(r[k] for r in own) for k in ("named", "inside"))
            table[-1].append(f"{named} of {inside}; {was:.2f} → {now:.2f}; {after - before:+.4f}")
    return table


def products(kept: list[Kept], config, net, args):
    """One model of all categories, and one without each: what each kind of image is taken for."""
    priors = {own.name: refit(own.good, config, net) for own in kept}
    known = fp.MultiPrior(priors)
    for own in kept:
        others = fp.MultiPrior({name: p for name, p in priors.items() if name != own.name})
        yield taken(known, f"{own.name}, good", own.files[~own.bad])
        yield taken(known, f"{own.name}, defective", own.files[own.bad])
        yield taken(others, f"{own.name}, unknown to the model", own.files[~own.bad])
    with tempfile.TemporaryDirectory() as folder:
        for part in ("washer", "plate"):
            fp._room("make_demo").write_dataset(Path(folder) / part, 0, args.drawn, 0, part=part)
            yield taken(known, f"{part}, drawn, unknown to the model", fp.find_images(Path(folder) / part))


def taken(model, label: str, files) -> dict:
    results = model.score_batch(list(files), with_map=False)
    return {"images": label, "count": len(files), "anomalies": sum(r.is_anomaly for r in results),
            **{name: sum(r.product == name for r in results) for name in (*model.priors, "unknown")}}


def products_table(rows: list[dict]) -> list[list]:
    names = list(rows[0])
    return [names, *([r.get(name, "–") for name in names] for r in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("refits", "traits", "mixtures", "products"))
    parser.add_argument("data", help="a data set, as of bench --data")
    parser.add_argument("--splits", type=int, default=67, help="refits of a category")
    parser.add_argument("--images", type=int, nargs=2, default=(50, 150), metavar=("FEWEST", "MOST"),
                        help="good ones in a refit; in a mixture MOST")
    parser.add_argument("--seeds", type=int, default=3, help="of mixtures")
    parser.add_argument("--all-seeds", action="store_true", help="each mixture with each of them")
    parser.add_argument("--drawn", type=int, default=30, help="images of a drawn product")
    parser.add_argument("--size", type=int, default=fp.Settings.size, help="pixels")
    args, net, rows = parser.parse_args(), fp.load_backbone(fp.Settings.backbone), []
    fp._CALIBRATED_STEPS = ()  # but the default: with F = 0 the number of steps changes no score
    try:
        categories = fp._room("benchmark").find_categories(args.data)
    except fp.ImageError as e:
        parser.error(str(e))
    least = args.images[0] + FRAMES if args.table == "traits" else -(-5 * args.images[0] // 4) + FRAMES
    if args.table in ("traits", "refits") and (few := [c.name for c in categories if len(c.train) < least]):
        parser.error(f"{', '.join(few)}: {args.table} needs {least} good images to train on; try --images "
                     "with fewer")
    config, _ = fp._room("curation").settle([f for c in categories for f in c.train],
                                            fp.Settings(backbone=net.name, size=args.size))
    if args.table == "traits":
        kept = [Traits(c, config, net) for c in categories]
    else:  # one backbone for all, as of products of one model
        files = [f for c in categories for f in c.train]
        net, ranged = fp._room("quantization").quantize_on(net, files, config)
        kept = [Kept(c, config, net, ranged) for c in categories]
    with contextlib.suppress(KeyboardInterrupt):
        for row in globals()[args.table](kept, config, net, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
    for i, cells in enumerate(globals()[f"{args.table}_table"](rows)):
        print("| " + " | ".join(map(str, cells)) + " |" + ("\n" + "|---" * len(cells) + "|") * (i == 0))


if __name__ == "__main__":
    main()
