#!/usr/bin/env python3
"""Draw a small demo data set: lathe-turned steel washers on a conveyor belt, drilled plates, or webs.

The plates come in two hands, one the mirror image of the other, both good. Their faults are of logic: every
place of a bad plate looks as it does in good plates of one hand or the other, only not together.
Webs are grained strips, eight times as wide as high, as a line scan sees them; their fault is a speck.

Nothing is downloaded and nobody else's data is used: every image is computed
from a seed. The folder follows the MVTec AD layout::

    OUT_DIR/train/good/000.png ...
    OUT_DIR/test/good/000.png ...
    OUT_DIR/test/{scratch,dent,stain,chip}/000.png ...          (plates: mixed, missing, swapped; webs: speck)
    OUT_DIR/ground_truth/{scratch,dent,stain,chip}/000_mask.png ...   (0 or 255)

An image depends only on (part, seed, split, kind, number, size), so asking for more images
leaves the others as they are. The pictures in ``examples/washers`` are the first
ones of the test split, written by
``python examples/make_demo.py examples/washers --samples``.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

DEFECTS = ("scratch", "dent", "stain", "chip")
SPLITS = ("train", "test")
PARTS = {"washer": ("good",) + DEFECTS, "plate": ("good", "mixed", "missing", "swapped"),
         "web": ("good", "speck")}
MARKER = "fastprior_demo.txt"  # says that the folder is ours, and may be overwritten
SAMPLES = {"good_0": ("good", 0), "good_1": ("good", 1), **{k: (k, 0) for k in DEFECTS}}

# Lengths are in units of 1/256 of the image's side, whatever its size in pixels.
OUTER, INNER, BEVEL = 97.0, 43.0, 5.0
LIGHT = math.radians(232)  # the lamp's direction in the image: upper left (y points down)
STAINS = ((0.62, 0.30, 0.12), (0.36, 0.29, 0.21), (0.80, 0.58, 0.25))  # rust, oil, heat tint


def _smooth(rng, size, cells):
    """Return smooth noise, size x size, zero mean and unit variance, `cells` across."""
    table = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    at = np.linspace(1, cells + 1, size)
    weights = np.exp(-((at[:, None] - np.arange(cells + 3)) ** 2) / 0.7).astype(np.float32)
    noise = weights @ table @ weights.T
    return (noise - noise.mean()) / noise.std()


def _streaks(rng, radius, angle, pitch, arcs):
    """Return lathe marks: noise that is fine across the radius and long along the turn."""
    table = rng.standard_normal((int(140 / pitch), arcs), dtype=np.float32)
    # The twist makes the marks of neighbouring grooves end at different angles.
    turn = (angle / (2 * np.pi) + rng.random()) * arcs + 0.2 * radius
    return ndimage.map_coordinates(table, [radius / pitch, turn], order=1, mode="grid-wrap")


def _blob(rng, dx, dy, radius, wobble):
    """Return the distance to the centre of an irregular oval patch; its edge is at 1."""
    size = len(dx)
    dx = dx + wobble * radius * (_smooth(rng, size, 14) + 0.5 * _smooth(rng, size, 36))
    dy = dy + wobble * radius * (_smooth(rng, size, 14) + 0.5 * _smooth(rng, size, 36))
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.3)
    c, s = math.cos(turn), math.sin(turn)
    return np.hypot((c * dx + s * dy) / stretch, (c * dy - s * dx) * stretch) / radius


def _step(x, width):
    """Return a soft step from 0 to 1 around x = 0."""
    x = np.clip(x / width + 0.5, 0, 1)
    return x * x * (3 - 2 * x)


def _render(rng, kind, size):
    """Draw one washer; `kind` is "good" or one of DEFECTS. Returns what `_photograph` does."""
    pixel = 256 / size
    axis = ((np.arange(size) + 0.5) * pixel - 128).astype(np.float32)
    cx, cy = rng.uniform(-4, 4, 2).astype(np.float32)
    x, y = np.meshgrid(axis - cx, axis - cy)
    r, phi = np.hypot(x, y), np.arctan2(y, x)
    outer, inner = OUTER * rng.uniform(0.99, 1.01), INNER * rng.uniform(0.99, 1.01)
    light = LIGHT + rng.normal(0, 0.05)
    lx, ly = math.cos(light), math.sin(light)
    depth = np.minimum(outer - r, r - inner)  # how far inside the ring's edge

    # Turned metal is anisotropic: a lamp shows as two fans, frayed as each groove reflects a little aside.
    fine, broad = _streaks(rng, r, phi, 1.3 * max(pixel, 1), 17), _streaks(rng, r, phi, 4, 6)
    off = phi - light + 0.06 * fine + 0.035 * broad
    fans = np.exp(3.0 * (np.cos(2 * off) - 1)) * (1 + 0.25 * np.cos(off))
    fans += 0.28 * np.exp(9.0 * (np.cos(2 * off - 2.2) - 1))  # a second, fainter lamp
    gloss = 1 + 0.12 * fine + 0.045 * broad + 0.02 * _smooth(rng, size, 7)
    metal = (0.15 + 0.62 * fans + 0.05 * (lx * x + ly * y) / 128) * gloss

    # Bevels: the outer one faces away from the centre, the inner one towards it.
    facing = np.cos(phi - light) * np.where(outer - r < r - inner, 1, -1).astype(np.float32)
    bevel = (0.10 + 0.95 * np.clip(facing, 0, 1) ** 4 + 0.05 * facing) * (1 + 0.05 * fine)
    crest = np.exp(-(((depth - BEVEL) / 0.9) ** 2))  # the burnished line where bevel meets face
    metal = bevel + (metal - bevel) * _step(depth - BEVEL, 1.6) + 0.12 * crest * (0.4 + fans)
    metal = metal[..., None] * np.array([0.985, 1.0, 1.01], np.float32)

    solid, mask = depth, np.zeros((size, size), bool)
    if kind != "good":
        metal, solid, mask = _add_defect(rng, kind, metal, depth, (x, y), (outer, inner), (lx, ly))
    return _photograph(rng, metal, solid, mask, (x, y), (lx, ly))


def _render_plate(rng, kind, size):
    """Draw one plate: two holes at one end, a slot at the other, a pin hole. Returns what `_photograph` does.

    mixed: both ends alike. missing: no pin hole. swapped: the pin hole of the other hand.
    """
    pixel = 256 / size
    axis = ((np.arange(size) + 0.5) * pixel - 128).astype(np.float32)
    cx, cy = rng.uniform(-4, 4, 2).astype(np.float32)
    x, y = np.meshgrid(axis - cx, axis - cy)
    turn, light = math.radians(rng.uniform(-1.5, 1.5)), LIGHT + rng.normal(0, 0.05)
    lx, ly = math.cos(light), math.sin(light)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    hand = rng.choice((-1, 1))
    ends = [-hand, hand]  # a slot where it is 1, left and right
    pin = hand
    if kind == "mixed":
        ends[rng.integers(2)] *= -1
    elif kind == "missing":
        pin = 0
    elif kind == "swapped":
        pin = -hand

    def opening(at_u, at_v, radius, half=0.0):
        """Distance to the edge of a round or a long hole, negative inside."""
        return np.hypot(u - at_u, np.maximum(np.abs(v - at_v) - half, 0)) - radius * rng.uniform(0.98, 1.02)
    depth = 8 - np.hypot(np.maximum(np.abs(u) - 88, 0), np.maximum(np.abs(v) - 54, 0))
    for at_u, slot in zip((-60, 60), ends):
        for hole in [opening(at_u, 0, 9, 20)] if slot > 0 else [opening(at_u, w, 12) for w in (-25, 25)]:
            depth = np.minimum(depth, hole)
    if pin:
        depth = np.minimum(depth, opening(0, -34 * pin, 10))

    # Ground along its length: fine marks, and the lamp as a broad band across them.
    marks = rng.standard_normal((size, 12), dtype=np.float32)
    marks = ndimage.gaussian_filter1d(marks, 0.7 / pixel, axis=0, mode="wrap")
    where = [v / pixel + size / 2, u / 22 + 6]
    fine = ndimage.map_coordinates(marks / marks.std(), where, order=1, mode="grid-wrap")
    band = np.exp(-(((u * lx + v * ly + rng.normal(8, 5)) / 70) ** 2))
    metal = (0.22 + 0.30 * band) * (1 + 0.10 * fine + 0.03 * _smooth(rng, size, 7))
    slope_y, slope_x = np.gradient(depth, pixel)
    bevel = 0.30 + 0.28 * (-(slope_x * lx + slope_y * ly))
    metal = bevel + (metal - bevel) * _step(depth - 3, 2)
    metal = metal[..., None] * np.array([0.985, 1.0, 1.01], np.float32)

    mask = np.zeros((size, size), bool)
    if kind == "mixed":
        mask = (np.abs(np.abs(u) - 60) < 14) & (np.abs(v) < 38)
    elif kind != "good":
        sides = (-1, 1) if kind == "swapped" else (hand,)
        mask = np.min([np.hypot(u, v + 34 * side) for side in sides], 0) < 11
    return _photograph(rng, metal, depth, mask, (x, y), (lx, ly))


def _photograph(rng, metal, solid, mask, xy, lamp):
    """Lay a part on the belt and take its picture.

    Parameters
    ----------
    metal : (size, size, 3) float, its light; solid : (size, size), how far inside its edge
    mask : (size, size) bool, where a defect is; xy : coordinates from its centre; lamp : unit vector

    Returns
    -------
    image, mask : ndarrays of uint8, (size, size, 3) and (size, size)
        The mask is 255 where the defect is, 0 elsewhere.
    """
    (x, y), (lx, ly), size = xy, lamp, len(solid)
    pixel = 256 / size
    cover = np.clip(solid / pixel + 0.5, 0, 1)  # antialiased edge

    # Belt: dark rubber with a faint diagonal weave; the part casts a soft shadow away from the lamp.
    u, v = (x + y) * 0.8 + rng.uniform(0, 6.3), (x - y) * 0.8 + rng.uniform(0, 6.3)
    belt = 0.021 + 0.0025 * np.sin(u) * np.sin(v) + 0.0012 * _smooth(rng, size, 9)
    belt += 0.0028 * rng.standard_normal((size, size), dtype=np.float32)
    belt *= 1 + 0.45 * (lx * x + ly * y) / 128
    far = np.roll(cover, (round(-7 * ly / pixel), round(-7 * lx / pixel)), (0, 1))
    far = ndimage.gaussian_filter(far, 5.5 / pixel, truncate=2.5)
    near = ndimage.gaussian_filter(cover, 2.2 / pixel)
    belt *= (1 - 0.75 * far) * (1 - 0.5 * near)
    belt = belt[..., None] * np.array([0.96, 1.0, 1.06], np.float32)

    scene = belt + (metal - belt) * cover[..., None]
    # Camera: exposure, lens blur, highlights rolled off, gamma, sensor noise.
    scene = np.clip(scene * np.float32(rng.normal(1.15, 0.05)), 0, None)
    scene = ndimage.gaussian_filter(scene, (0.45 / pixel, 0.45 / pixel, 0))
    scene = (1.15 * scene / (1 + 0.3 * scene)) ** np.float32(1 / 2.2)
    scene += 0.004 * rng.standard_normal((size, size, 1), dtype=np.float32)
    image = (np.clip(scene, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image, mask.astype(np.uint8) * 255


def _add_defect(rng, kind, metal, depth, xy, radii, lamp):
    """Return the metal's light, its depth inside the edge, and the mask, with one defect."""
    (x, y), (outer, inner), (lx, ly) = xy, radii, lamp
    size = len(x)
    where = rng.uniform(0, 2 * np.pi)
    grain = _smooth(rng, size, 48)
    on_part = depth > 0

    def around(radius):
        return x - radius * math.cos(where), y - radius * math.sin(where)

    if kind == "scratch":
        dx, dy = around(rng.uniform(inner + 18, outer - 18))
        # Not along the turning marks, where nobody would find it.
        heading, half = where + rng.choice([-1, 1]) * rng.uniform(0.15, 1.15), rng.uniform(15, 30)
        c, s = math.cos(heading), math.sin(heading)
        along = (dx * c + dy * s) / half
        across = dy * c - dx * s + rng.uniform(-7, 7) * along**2 + rng.uniform(-3, 3) * along**3
        width = rng.uniform(0.8, 1.1) * max(1, 0.7 * 256 / size) * (1.15 - 0.3 * along)
        # The pressure fades at both ends and skips a little in between.
        press = _step(1 - np.abs(along), 0.5) * np.clip(0.85 + 0.25 * grain, 0.3, 1) * _step(depth - 3, 3)
        lit = 1 if s * lx - c * ly > 0 else -1
        groove = np.exp(-((across / width) ** 2)) * press
        flank = np.exp(-((across / width + 1.6 * lit) ** 2)) * press
        metal = metal * (1 - 0.65 * flank)[..., None]
        metal = metal + (0.80 - metal) * (0.75 * groove)[..., None]
        mask = (np.abs(across / width + 0.7 * lit) < 2.2) & (press > 0.1)
    elif kind == "dent":
        dx, dy = around(rng.uniform(inner + 18, outer - 18))
        radius = rng.uniform(8, 12)
        q = _blob(rng, dx, dy, radius, 0.10)
        # A pit with a slightly raised rim; its slopes turn toward the lamp or away from it.
        height = (q**2 - 1) * np.exp(-2 * q**2) * radius
        slope_y, slope_x = np.gradient(height, 256 / size)
        shade = np.tanh(-0.8 * (slope_x * lx + slope_y * ly))[..., None]
        metal = metal * (1 + 0.8 * np.minimum(shade, 0)) + 0.36 * np.maximum(shade, 0)
        mask = q < 1.3
    elif kind == "stain":
        dx, dy = around(rng.uniform(inner + 15, outer - 15))
        q = _blob(rng, dx, dy, rng.uniform(10, 16), 0.28)
        body, rim = _step(1 - q, 0.45), np.exp(-(((q - 0.92) / 0.12) ** 2))
        colour = STAINS[rng.integers(len(STAINS))]
        amount = np.clip(body * (0.78 + 0.08 * grain) + 0.15 * rim, 0, 1)[..., None]
        metal = metal * (1 - amount * (1 - np.array(colour, np.float32)))
        mask = q < 1.1
    else:
        # A bite out of either edge, and a rough broken face along it.
        outside = rng.random() < 0.6
        radius = rng.uniform(8, 13)
        shift = rng.uniform(0.1, 0.4) * radius
        dx, dy = around(outer + shift if outside else inner - shift)
        bite = (_blob(rng, dx, dy, radius, 0.13) - 1) * radius + 0.25 * grain
        broken = 3.2 + 1.0 * _smooth(rng, size, 30)
        turned = -(dx * lx + dy * ly) / np.maximum(np.hypot(dx, dy), 1)  # the broken face looks into the bite
        rough = np.clip(0.16 + 0.22 * turned + 0.09 * grain, 0.02, 0.8)[..., None]
        metal = rough + (metal - rough) * _step(bite - broken, 1.2)[..., None]
        mask = bite < broken
        depth = np.minimum(depth, bite)
    return metal, depth, mask & on_part


def _render_web(rng, kind, size):
    """Image (size, 8 size, 3) and mask of a grained strip; a speck is 8 x 8 pixels, whatever the size."""
    shape = size, 8 * size
    grain = sum(amount * layer / layer.std() for amount, layer in (
        (14, ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)),
        (8, ndimage.gaussian_filter(rng.standard_normal(shape), (1, 12)))))
    image, mask = 128 + grain, np.zeros(shape, np.uint8)
    if kind == "speck":
        y, x = (int(rng.integers(n - 8)) for n in shape)
        image[y:y + 8, x:x + 8] *= .35
        mask[y:y + 8, x:x + 8] = 255
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, 2), mask


def draw_part(rng, size=256):
    """Return the image of a good washer, (size, size, 3) uint8."""
    return _render(rng, "good", size)[0]


def draw_defect(rng, kind, size=256):
    """Return (image, mask) of a washer with a defect of the given kind, one of DEFECTS."""
    if kind not in DEFECTS:
        raise ValueError(f"unknown defect {kind!r}: choose from {', '.join(DEFECTS)}")
    return _render(rng, kind, size)


def _write(path, seed, split, kind, i, size, mask_path=None, part="washer"):
    """Write image number i of a split and kind, which depends on nothing else, and its mask if asked."""
    rng = np.random.default_rng([seed, SPLITS.index(split), PARTS[part].index(kind), i])
    images = {"plate": _render_plate, "web": _render_web, "washer": _render}[part](rng, kind, size)
    for target, array in zip((path, mask_path), images):
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(target, optimize=True)


def write_samples(out, size=256, seed=0):
    """Write the six pictures of SAMPLES, the first ones of the test split, into `out`."""
    for name, (kind, i) in SAMPLES.items():
        _write(out / f"{name}.png", seed, "test", kind, i, size)


def write_dataset(out, good=80, test_good=12, defects_per_type=6, size=256, seed=0, part="washer"):
    """Write the data set into `out` in the MVTec AD layout; numbered images already there go."""
    kinds = sorted({kind for own in PARTS.values() for kind in own})
    for folder in ("train/good", *(f"{top}/{k}" for top in ("test", "ground_truth") for k in kinds)):
        for old in (out / folder).glob("[0-9]*.png"):
            old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Written by fastprior's examples/make_demo.py, which may overwrite "
                              "this folder.\n")
    for split, kind, count in [("train", "good", good), ("test", "good", test_good)]:
        for i in range(count):
            _write(out / split / kind / f"{i:03d}.png", seed, split, kind, i, size, part=part)
    for kind in PARTS[part][1:]:
        for i in range(defects_per_type):
            mask_path = out / "ground_truth" / kind / f"{i:03d}_mask.png"
            _write(out / "test" / kind / f"{i:03d}.png", seed, "test", kind, i, size, mask_path, part)


def main(argv=None):
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Draw a seeded demo data set of steel parts, good and defective, in the MVTec AD layout.",
        epilog="example: python examples/make_demo.py /tmp/washers --good 80 --seed 0",
    )
    add = parser.add_argument
    add("out_dir", metavar="OUT_DIR", type=Path, help="a new or empty folder, or an earlier demo")
    add("--part", choices=sorted(PARTS), default="washer", help="what to draw (default %(default)s)")
    add("--good", type=int, default=80, help="good training images (default %(default)s)")
    add("--test-good", type=int, default=12, help="good test images (default %(default)s)")
    add("--defects-per-type", type=int, default=6,
        help="test images of each kind of defect (default %(default)s)")
    add("--size", type=int, default=256,
        help="side of an image in pixels, a web's height (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed draws other parts (default %(default)s)")
    add("--samples", action="store_true", help="write only six sample pictures, straight into OUT_DIR")
    args = parser.parse_args(argv)
    if min(args.good, args.test_good, args.defects_per_type, args.seed) < 0 or args.size < 32:
        parser.error("counts and the seed must be 0 or more, --size 32 or more")

    out = args.out_dir
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    ours = names >= {f"{n}.png" for n in SAMPLES} if args.samples else MARKER in names
    if (names and not ours) or (out.exists() and not out.is_dir()):
        print(f"make_demo: {out} is not an empty folder, nor an earlier demo: choose another",
              file=sys.stderr)
        return 2
    if args.samples:
        write_samples(out, args.size, args.seed)
    else:
        write_dataset(out, args.good, args.test_good, args.defects_per_type, args.size, args.seed, args.part)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
