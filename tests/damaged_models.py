"""Damages model files in every way: bytes, zip, header and arrays, with the digest recomputed or not.

    python tests/damaged_models.py [SECONDS [SEED]]

What loads must score finitely; all else must be refused by one line. It limits its memory. Prints how many
files were tried, loaded and refused; ends with an error and the seed of the first file that breaks the rule.
"""
import contextlib
import dataclasses
import io
import json
import math
import random
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastprior as fp  # noqa: E402

IMAGES = [np.full((40, 56, 3), 255, np.uint8),
          np.random.default_rng(1).integers(0, 256, (70, 64, 3), np.uint8)]


def tiny_backbone(rng, act=fp.RELU6, squeeze=False, channels=(5, 7, 8, 17, 6)):
    """A network of five blocks; widths that are no multiple of anything."""
    def half(*s):
        return (rng.standard_normal(s) / np.sqrt(max(1, np.prod(s[:-1])))).astype("f2").astype("f4")

    blocks, c_in = [], 4
    for i, (c_out, stride, kernel) in enumerate(zip(channels, (1, 2, 2, 2, 1), (3, 5, 3, 3, 5))):
        mid = c_in if i == 0 else 2 * c_in + 1
        p = {} if i == 0 else {"expand_w": half(c_in, mid), "expand_b": half(mid)}
        p |= {"dw_w": half(kernel, kernel, mid), "dw_b": half(mid), "project_w": half(mid, c_out),
              "project_b": half(c_out)}
        if squeeze:
            p |= {"se_reduce_w": half(mid, 3), "se_reduce_b": half(3), "se_expand_w": half(3, mid),
                  "se_expand_b": half(mid)}
        blocks.append(fp.InvertedResidual(p, stride, act, i > 0 and stride == 1 and c_in == c_out))
        c_in = c_out
    return fp.Backbone("tiny", (.5,) * 3, (.5,) * 3, act, half(3, 3, 3, 4), half(4), tuple(blocks),
                       tuple(range(5)))


def tiny_prior(seed=0, act=fp.RELU6, squeeze=False, denoiser=True, variant="whitened", backbone=None,
               roi=None, size=64):
    rng = np.random.default_rng(seed)
    backbone = backbone or tiny_backbone(rng, act, squeeze)
    settings = fp.Settings(backbone="tiny", size=size, factors=3 * (variant == "whitened"), width=16,
                           variant=variant, coarse=True)
    n, c = int(fp._inside(roi, settings.grid).sum()), sum(backbone.channels)
    whitener = 1 + rng.random((n, c)).astype("f4")
    if variant == "whitened":
        whitener = fp.pack_lower(np.tril(.1 * rng.standard_normal((n, c, c))) + np.eye(c))
    weights = fp._room("training").initial_denoiser(n, c, settings) if denoiser else None
    if denoiser:
        weights["out_w"] += .05
    coarse = coarse_of(rng, backbone, settings, roi)
    k = n + (len(coarse[0]) if coarse else 0)
    calibrations = {steps: {"offset": rng.standard_normal(k).astype("f4"),
                            "gain": (.1 + rng.random(k)).astype("f4"),
                            "moments": np.array([.5, 1.5, 20.]), "scores": np.sort(rng.standard_normal(12)),
                            "peaks": np.sort(30 + rng.random(12))} for steps in (1, 2, 3)}
    factors = fp.pack_factors(.05 * rng.standard_normal((3, n, c))) if settings.factors else None
    return fp.Prior(settings, backbone, rng.random((n, c)).astype("f4"), whitener, weights, calibrations,
                    {"images": 12, "unreadable": ["a.png: no"], "loss": .5}, 1, factors=factors,
                    fine=fine_of(rng, backbone, settings), roi=roi, coarse=coarse)


def half():
    """A region for images of 56 x 40 pixels, with a hole."""
    mask = np.zeros((40, 56), bool)
    mask[3:, :33], mask[10:18, 12:20] = True, False
    return fp.RegionOfInterest(mask)


def coarse_of(rng, backbone, settings, roi=None):
    """Mean, whitener and factors of the coarse places, random; None for the plain variant."""
    if not settings.coarse:
        return None
    shape = len(fp.coarse_cells(fp._inside(roi, settings.grid), settings.grid)), sum(backbone.channels)
    factors = .3 / np.sqrt(np.prod(shape)) * rng.standard_normal((settings.factors, *shape))
    return (rng.random(shape).astype("f4"),
            fp.pack_lower(np.tril(.1 * rng.standard_normal((*shape, shape[1]))) + np.eye(shape[1])),
            fp.pack_factors(factors) if settings.factors else None)


def fine_of(rng, backbone, settings):
    """Mean and whitener of the fine view, random."""
    c = backbone.fine_channels
    return (rng.random((math.prod(settings.fine), c)).astype("f2"),
            (np.tril(.1 * rng.standard_normal((c, c))) + np.eye(c)).astype("f4"))


# -- taking a file apart and putting it together -------------------------------------------------

def entries_of(path):
    """[(name, bytes)] without the digest."""
    with zipfile.ZipFile(path) as archive:
        return [(e.filename, archive.read(e)) for e in archive.infolist() if e.filename != "sha256.npy"]


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def array_of(data):
    return np.load(io.BytesIO(data))


def assemble(path, entries, digest=True, how=lambda name: {}):
    """A zip of these entries, and the digest of those that are arrays; how: fields of a ZipInfo by name."""
    arrays = {}
    for name, data in entries:
        with contextlib.suppress(Exception):
            arrays[name.removesuffix(".npy")] = array_of(data)
    if digest:
        entries = [*entries, ("sha256.npy", npy(fp._digest(arrays)))]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # names that are there twice
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            for k, v in how(name).items():
                setattr(info, k, v)
            archive.writestr(info, data)


def with_header(entries, change):
    """The header's text changed by `change`, bytes to bytes."""
    return [(n, npy(np.frombuffer(change(array_of(d).tobytes()), np.uint8)) if n == "header.npy" else d)
            for n, d in entries]


def canonical(header):
    return json.dumps(header, sort_keys=True).encode()


# -- damage --------------------------------------------------------------------------------------

VALUES = [None, True, False, 0, 1, 2, 3, -1, 5, 31, 32, 96, 128, 2048, 1 << 31, 1 << 63, 1 << 70, 10 ** 400,
          0.0, -0.0, 1.0, 2.0,
          .5, 1e-300, 1e-9, 1e10, 1e300, float("inf"), float("-inf"), float("nan"), "", "x", "2", "a\nb\t",
          "../x", "é", "\ud800",
          "x" * 5000, [], {}, [1], [1.5, 2.5, 3.5], [0, 0, 0], [64, 96], [96, 64],
          [64, 8192], [8192, 8192], [64, 1e300], [64] * 30000, {"a": 1}, [[[[]]]], "prior", "priors", "plain",
          "whitened", "tiny"]
NUMBERS = [0, -1, 1, 1e-30, -1e-30, 1e-9, 1e4, -1e5, 1e10, 1e14, 1e20, 1e37, 3e38, np.inf, -np.inf, np.nan,
           65504, 5e-324]
TYPES = ["f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "u8", ">f4", ">f2", "c8", "?", "S3", "U2", "M8[s]",
         "f4,i1", fp.QTILE]


def places(tree, at=()):
    yield at
    for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(v, (*at, k))


def header_damage(r, text):
    if r.random() < .15:  # the text itself
        i, j = sorted(r.choices(range(len(text) + 1), k=2))
        piece = r.choice([b"", b" ", b"NaN", b"1e400", b"9" * 5000, b"[" * 100000, b"{" * 3000, b"\xff",
                          b'"a": 1, ', b"-", b"\0"])
        return r.choice([text[:i] + piece + text[i:], text[:i] + piece + text[i + 1:], text[:i] + text[j:],
                         text * 2,
                         text.replace(b'"size": 64', b'"size": 64, "size": 64'), text.replace(b", ", b","),
                         piece])
    header = json.loads(text)
    for _ in range(r.choice([1, 1, 1, 2, 5])):
        *way, last = r.choice([p for p in places(header) if p])
        inside = header
        for k in way:
            inside = inside[k]
        old, value = inside[last], r.choice(VALUES)
        if isinstance(old, (int, float)) and r.random() < .5:
            value = r.choice([old + 1, old - 1, -old, old * 2, old * 1e6, old / 1e6, float(old), int(old),
                              old == 1, str(old)])
        kind = r.random()
        if kind < .75:
            inside[last] = value
        elif kind < .85:
            del inside[last]
        elif isinstance(inside, dict):
            inside[r.choice(["new", last + "_", "", "format", "size"])] = value
        else:
            inside.insert(0, value)
    return canonical(header)


def array_damage(r, data):
    a = array_of(data).copy()
    rng = np.random.default_rng(r.getrandbits(32))
    kind = r.randrange(8)
    if kind < 3 and a.size:  # values
        flat = a.reshape(-1)
        part = flat["scale"].reshape(-1) if a.dtype == fp.QTILE else flat
        where = r.choice([slice(None), slice(r.randrange(len(part)), None), [r.randrange(len(part))]])
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if r.random() < .4:
                part[where] = (part[where]
                               * part.dtype.type(r.choice([2, 10, 1e3, 1e6, 1e12, -1, 1e-6, 1e-12]))
                               if part.dtype.kind == "f" else r.randrange(256))
            elif part.dtype.kind == "f":
                part[where] = r.choice(NUMBERS)
            else:
                part[where] = r.randrange(256)
        if a.dtype == fp.QTILE:
            flat["scale"] = part.reshape(flat["scale"].shape)
    elif kind == 3:
        dtype = np.dtype(r.choice(TYPES))
        size = a.size if a.size < 1e5 else 10
        a = (np.frombuffer(rng.bytes(dtype.itemsize * size), dtype) if dtype.kind in "fiuV"
             else np.zeros(size, dtype))
        a = a.reshape(array_of(data).shape) if size == array_of(data).size else a
    elif kind == 4:
        a = r.choice([a[:-1], a[..., :-1], a[:0], a[None], a.reshape(-1), np.concatenate([a, a]), a.T,
                      np.asfortranarray(a),
                      a[::-1], a["scale"] if a.dtype == fp.QTILE else a.astype("f8")])
    elif kind == 5 and a.ndim == 1 and a.dtype.kind == "f":
        rng.shuffle(a)
    elif kind == 6:  # the text before the values
        head = bytearray(data[:128])
        for _ in range(r.choice([1, 3])):
            head[r.randrange(len(head))] = r.choice(b"0123456789,()[]{}':<>|fiuOVb. \n\0\xff")
        return bytes(head) + data[128:]
    else:
        return data.replace(b"'shape': (", b"'shape': ("
                            + r.choice([b"1, ", b"0, ", b"9" * 30 + b", ", b"-1, ", b"1" * 400]), 1)
    return npy(a)


def zip_damage(r, path, entries):
    kind = r.randrange(8)
    names = [n for n, _ in entries]
    if kind == 0:
        chosen = {n for n in names if r.random() < .3} | {r.choice(names)}
        method = r.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        return assemble(path, entries, how=lambda n: {"compress_type": method} if n in chosen else {})
    if kind == 1:  # an entry that inflates to much more than the file is long
        bomb = npy(np.zeros(r.choice(9 * [1 << 18] + [1 << 25]), "f4"))
        i = r.randrange(len(entries))
        method = r.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        return assemble(path, [(n, bomb if j == i else d) for j, (n, d) in enumerate(entries)],
                        how=lambda n: {"compress_type": method} if n == names[i] else {})
    if kind == 2:
        i, new = r.randrange(len(entries)), r.choice(["../x.npy", "/etc/x.npy", "a\\b.npy", "mean.npy", "",
                                                      "x" * 3000, "0/mean.npy",
                                                      "calibration/2.npy", "calibration/02/scale.npy",
                                                      "calibration/2/x/y.npy",
                                                      "calibration/x/scale.npy", "calibration/+3/scale.npy",
                                                      "denoiser/é.npy",
                                                      "backbone/block9_dw_w.npy", "sha256.npy", "header.npy",
                                                      "denoiser/mix1_token1.npy"])
        again = [entries[i]] * r.randrange(2)
        entries = [(new if j == i else n, d) for j, (n, d) in enumerate(entries)] + again
    elif kind == 3:
        entries = entries + [(r.choice(names), r.choice(entries)[1])]
    elif kind == 4:
        r.shuffle(entries)
    elif kind == 5:
        del entries[r.randrange(len(entries))]
    elif kind == 6:
        i, j = r.choices(range(len(entries)), k=2)
        entries[i], entries[j] = (names[i], entries[j][1]), (names[j], entries[i][1])
    assemble(path, entries, digest=r.random() < .9, how=lambda n: {"extra": b"\1\0\4\0abcd"} if kind == 7
             and r.random() < .2 else {})
    if kind == 7:
        data = bytearray(path.read_bytes())
        starts = [i for i in range(len(data) - 4) if data[i:i + 4] in (b"PK\1\2", b"PK\5\6") or i == 0]
        at = r.choice(starts)
        fields = [4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42]
        where = at + r.choice(fields)
        value = r.choice([0, 1, 8, 12, 0xffff, 0x7fffffff, 0xffffffff, r.getrandbits(32)])
        data[where:where + 4] = struct.pack("<I", value)[:r.choice([2, 4])].ljust(len(data[where:where + 4]),
                                                                                  b"\0")[:4]
        if r.random() < .3:
            data = r.choice([b"PK\3\4junk" + data, data + b"junk",
                             data[:-22] + b"PK\6\6" + bytes(52) + b"PK\6\7" + bytes(16) + data[-22:]])
        path.write_bytes(bytes(data))


def byte_damage(r, data):
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 8])):
        i, j = sorted(r.choices(range(len(data) + 1), k=2))
        near = r.choice([i, r.randrange(max(1, len(data))), max(0, len(data) - r.randrange(1, 3000)),
                         r.randrange(min(200, len(data)) or 1)])
        kind = r.randrange(7)
        if kind < 2 and near < len(data):
            data[near] ^= 1 << r.randrange(8)
        elif kind == 2:
            data = data[:i]
        elif kind == 3:
            data = data[:i] + data[j:]
        elif kind == 4:
            data[near:near] = r.randbytes(r.choice([1, 4, 100]))
        elif kind == 5:
            data[near:near + 8] = bytes(8)
        else:
            piece = data[i:min(j, i + 5000)]
            data[near:near + len(piece) * r.randrange(2)] = piece
        if not data:
            break
    return bytes(data)


def damage(r, source, path):
    """One damaged copy of `source` at `path`; returns what was done."""
    entries, kind = entries_of(source), r.random()
    if kind < .2:
        path.write_bytes(byte_damage(r, Path(source).read_bytes()))
        return "bytes"
    if kind < .35:
        zip_damage(r, path, entries)
        return "zip"
    if kind < .65:
        try:
            entries = with_header(entries, lambda text: header_damage(r, text))
        except (ValueError, OverflowError, TypeError, RecursionError):  # 1e300 as an int, a deep nest
            entries = with_header(entries, lambda text: text[1:])
        what = "header"
    else:
        for i in r.sample([i for i, (n, _) in enumerate(entries) if n != "header.npy"],
                          r.choice([1, 1, 1, 2, 4])):
            entries[i] = entries[i][0], array_damage(r, entries[i][1])
        what = "array"
    assemble(path, entries)
    return what


def verdict(path):
    """"scored" or "refused"; AssertionError for anything else."""
    began = time.process_time()
    try:
        model = fp.Prior.load(path, threads=1)
    except (fp.ModelError, fp.ShapeError) as e:
        assert "\n" not in str(e) and str(path) in str(e) and len(str(e)) < 700, str(e)[:1000]
        return "refused"
    finally:
        assert time.process_time() - began < 2, "slow to load"
    own = [np.full((*model.roi.mask.shape, 3), 99, np.uint8)] if model.roi else []
    if tile := model.settings.tile:  # may be larger than these images
        own = [] if model.roi or tile > 400 else [np.full((tile, tile + 9, 3), 99, np.uint8)]
        if not own:
            return "scored"
    results = model.score_batch(IMAGES + own, errors="return")
    assert model.roi or tile or not any(isinstance(result, Exception) for result in results)
    assert isinstance(results[-1], fp.Result), results[-1]
    for result in (r for r in results if not isinstance(r, fp.ShapeError)):  # of another region's proportions
        assert np.isfinite([result.score, result.p_value, result.threshold]).all(), result
        assert np.isfinite(result.anomaly_map).all(), "map"
    return "scored"


def main(seconds=20.0, seed=0):
    import faulthandler
    import resource
    faulthandler.enable()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        models = [tiny_prior(), tiny_prior(1, fp.SILU, True), tiny_prior(2, denoiser=False),
                  tiny_prior(3, variant="plain"), tiny_prior(6, roi=half()), tiny_prior(7, size=(96, 64))]
        one = tiny_backbone(np.random.default_rng(9))
        cut = dataclasses.replace(models[0].settings, tile=64)
        models.append(models[0]._with(cut, models[0].calibrations, models[0].summary | {"windows": 2}))
        models.append(fp.MultiPrior({"a": tiny_prior(4, backbone=one), "b": tiny_prior(5, backbone=one)}))
        for i, model in enumerate(models):
            model.save(folder / f"{i}.npz")
            assert verdict(folder / f"{i}.npz") == "scored"
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").exists() else 1 << 20
        limit = pages * resource.getpagesize() + (96 << 20)
        tried, until, path = Counter(), time.monotonic() + seconds, folder / "damaged.npz"
        while time.monotonic() < until:
            r = random.Random(f"{seed}")
            what = damage(r, folder / f"{r.randrange(len(models))}.npz", path)
            resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
            try:
                tried[what, verdict(path)] += 1
            except BaseException:
                print(f"seed {seed}: {what}", file=sys.stderr)
                raise
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            seed += 1
    print(json.dumps({"files": sum(tried.values()), **{" ".join(k): v for k, v in sorted(tried.items())}}))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))
