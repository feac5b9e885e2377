"""Every kind of image file, array and PIL image: the pixels of its plain twin, or refused in one line."""
import io
import re
import os
import struct
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

import fastprior as fp

settle = fp._room("curation").settle

RNG = np.random.default_rng(0)
RGB = np.kron(RNG.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)[:45, :61]  # odd sides
GREY = RGB[..., 0]
DEEP = RGB.astype(np.uint16) << 8 | RNG.integers(0, 256, RGB.shape).astype(np.uint16)  # all 16 bits in use
ALPHA = RNG.integers(0, 256, GREY.shape).astype(np.uint8)
LE = "<"


def grey(a=GREY):
    return np.repeat(a[..., None], 3, 2)


# -- writers of what Pillow does not write ---------------------------------------------------------

def png(array, kind, bits=8, before=b"", spoil=False):
    """PNG of an array; kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ spoil)
    rows = array.astype(">u2" if bits == 16 else np.uint8).reshape(len(array), -1)
    lines = np.packbits(rows, 1) if bits == 1 else rows
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)[:-4] \
        + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + before \
        + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(array, order="<", white_is_zero=False, planar=False, kind=1, strips=None, pages=1, **tags):
    """An uncompressed TIFF; numbers of further tags as t320=values."""
    array = np.moveaxis(array, -1, 0) if planar else array
    data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder(order)).tobytes()
    height, width = array.shape[-2:] if planar else array.shape[:2]
    samples = array.size // (height * width)
    entries = {256: width, 257: height, 258: [array.dtype.itemsize * 8] * samples, 259: 1,
               262: 2 if samples >= 3 else 1 - white_is_zero,
               273: 8, 277: samples, 278: height, 279: len(data), 284: 1 + planar, 339: [kind] * samples}
    if planar:
        entries |= {273: [8 + i * len(data) // samples for i in range(samples)],
                    279: [len(data) // samples] * samples}
    entries |= {int(k[1:]): v for k, v in tags.items()}
    extra, body, at = b"", b"", 8 + len(data)
    size = 2 + 12 * len(entries) + 4
    for page in range(pages):
        body += struct.pack(order + "H", len(entries))
        for number, value in sorted(entries.items()):
            values = value if isinstance(value, (list, tuple)) else [value]
            code, form = (3, "H") if max(values) < 65536 and number not in (273, 279) else (4, "I")
            packed = struct.pack(order + form * len(values), *values)
            if len(packed) > 4:
                packed, extra = struct.pack(order + "I", at + size * pages + len(extra)), extra + packed
            body += struct.pack(order + "HHI", number, code, len(values)) + packed.ljust(4, b"\0")
        body += struct.pack(order + "I", at + len(body) + 4 if page + 1 < pages else 0)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at) + data + body + extra


def saved(array, form, mode=None, **how):
    stream = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, form, **how)
    return stream.getvalue()


def several(form, **how):
    return saved(RGB, form, save_all=True, append_images=[Image.fromarray(RGB[::-1])], **how)


def netpbm(magic, maxval, array):
    pixels = array.astype(">u2" if maxval > 255 else np.uint8).tobytes()
    return f"{magic}\n{array.shape[1]} {array.shape[0]}\n{maxval}\n".encode() + pixels


def plain_netpbm(magic, maxval, array):
    pixels = " ".join(map(str, array.ravel()))
    return f"{magic}\n{array.shape[1]} {array.shape[0]}\n{maxval}\n{pixels}\n".encode()


def turned(form, **how):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to show
    return saved(RGB, form, exif=exif, **how)


def as_pillow_shows(data):
    """What any viewer shows of a lossy file."""
    with Image.open(io.BytesIO(data)) as image:
        return data, np.asarray(image.convert("RGB"))


def cut_but_ended(data, share=.6, behind=b""):
    whole = data.rstrip(b"\0")
    return whole[:int(len(whole) * share)] + b"\xff\xd9" + behind + data[len(whole):]


def scans(data):
    """Where the scans of a JPEG begin."""
    return [m.start() for m in re.finditer(rb"\xff\xda\0[\x08\x0a\x0c]", data)]


PALETTE = Image.fromarray(RGB // 64 * 64).quantize(64)
CMYK = Image.fromarray(RGB).convert("CMYK")
BITS = np.where(GREY > 127, 255, 0).astype(np.uint8)
FLAT_END = np.concatenate([RGB] + [0 * RGB] * 20)
COLOURS = RNG.integers(0, 65536, (3, 256))
STILL_PNG = png(RGB, 2)
PROGRESSIVE = saved(RGB, "JPEG", progressive=True)

SAME = {  # name: (file, its plain twin)
    "rgb.png": (saved(RGB, "PNG"), RGB),
    "grey.png": (saved(GREY, "PNG"), grey()),
    "alpha.png": (saved(np.dstack([RGB, ALPHA]), "PNG"), RGB),
    "grey alpha.png": (saved(np.dstack([GREY, ALPHA]), "PNG"), grey()),
    "palette.png": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "palette, transparent.png": (saved(PALETTE, "PNG", transparency=bytes(range(64))),
                                 np.asarray(PALETTE.convert("RGB"))),
    "transparent colour.png": (saved(RGB, "PNG", transparency=tuple(map(int, RGB[0, 0]))), RGB),
    "bits.png": (saved(Image.fromarray(BITS).convert("1"), "PNG"), grey(BITS)),
    "bits by hand.png": (png(BITS > 0, 0, 1), grey(BITS)),
    "deep grey.png": (png(DEEP[..., 0], 0, 16), grey()),
    "deep rgb.png": (png(DEEP, 2, 16), RGB),
    "deep alpha.png": (png(np.dstack([DEEP, ALPHA]), 6, 16), RGB),
    "turned.png": (turned("PNG"), np.rot90(RGB, -1)),
    "more behind.png": (STILL_PNG + b"more", RGB),
    "rgb.jpg": as_pillow_shows(saved(RGB, "JPEG")),
    "grey.jpg": as_pillow_shows(saved(GREY, "JPEG")),
    "cmyk.jpg": as_pillow_shows(saved(CMYK, "JPEG")),
    "progressive.jpg": as_pillow_shows(saved(RGB, "JPEG", progressive=True)),
    "padded.jpg": as_pillow_shows(saved(RGB, "JPEG") + bytes(2000)),
    "more behind.jpg": as_pillow_shows(saved(RGB, "JPEG") + b"more"),
    **{f"{name}.jpg": as_pillow_shows(saved(array, "JPEG", **how)) for name, array, how in (
        ("fine", RGB, {"quality": 100, "subsampling": 0}), ("coarse", RGB, {"quality": 1}),
        ("restarts", RGB, {"restart_marker_rows": 1}), ("optimised", RGB, {"optimize": True}),
        ("a flat end", FLAT_END, {}), ("flat", 0 * RGB, {}),
        ("commented", RGB, {"comment": b"\xff\xda\0\1\xff\xd9"}))},
    "rgb as such.jpg": as_pillow_shows(saved(RGB, "JPEG", keep_rgb=True)),
    "turned.jpg": (turned("JPEG"), np.rot90(as_pillow_shows(saved(RGB, "JPEG"))[1], -1)),
    "first of two.jpg": (several("MPO"), as_pillow_shows(saved(RGB, "JPEG"))[1]),
    "a png named.jpg": (STILL_PNG, RGB),
    "rgb.bmp": (saved(RGB, "BMP"), RGB),
    "grey.bmp": (saved(GREY, "BMP"), grey()),
    "palette.bmp": (saved(PALETTE, "BMP"), np.asarray(PALETTE.convert("RGB"))),
    "bits.bmp": (saved(Image.fromarray(BITS).convert("1"), "BMP"), grey(BITS)),
    "alpha.bmp": (saved(np.dstack([RGB, ALPHA]), "BMP"), RGB),
    "still.gif": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "grey.gif": (saved(GREY, "GIF"), grey()),
    "lossless.webp": (saved(RGB, "WEBP", lossless=True), RGB),
    "lossy.webp": as_pillow_shows(saved(RGB, "WEBP")),
    "alpha.webp": (saved(np.dstack([RGB, ALPHA | 1]), "WEBP", lossless=True), RGB),
    "turned.webp": (turned("WEBP", lossless=True), np.rot90(RGB, -1)),
    "grey.pgm": (netpbm("P5", 255, GREY), grey()),
    "rgb.ppm": (netpbm("P6", 255, RGB), RGB),
    "white at 100.pgm": (netpbm("P5", 100, GREY // 3), grey(np.rint(GREY // 3 / 100 * 255).astype(np.uint8))),
    "bits.pbm": (saved(Image.fromarray(BITS).convert("1"), "PPM"), grey(BITS)),
    "plain.pgm": (plain_netpbm("P2", 255, GREY), grey()),
    "plain.ppm": (plain_netpbm("P3", 255, RGB), RGB),
    "deep.pgm": (netpbm("P5", 65535, DEEP[..., 0]), grey()),
    "white at 60000.pgm": (netpbm("P5", 65000, np.minimum(DEEP[..., 0], 65000)),
                           grey(np.minimum(DEEP[..., 0], 65000) >> 8)),
    "plain deep.pgm": (plain_netpbm("P2", 65535, DEEP[..., 0]), grey()),
    **{f"rgb {c}.tif": (saved(RGB, "TIFF", compression=c), RGB)
       for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")},
    "jpeg.tif": as_pillow_shows(saved(RGB, "TIFF", compression="jpeg")),
    "fax.tif": (saved(Image.fromarray(BITS).convert("1"), "TIFF", compression="group4"), grey(BITS)),
    "cmyk.tif": (saved(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB"))),
    "alpha.tif": (saved(np.dstack([RGB, ALPHA]), "TIFF"), RGB),
    "turned.tif": (turned("TIFF"), np.rot90(RGB, -1)),
    "palette.tif": (tiff(GREY, t262=3, t320=COLOURS.ravel().tolist()),
                    (COLOURS >> 8).astype(np.uint8).T[GREY]),
    **{f"grey {o}.tif": (tiff(GREY, o), grey()) for o in "<>"},
    **{f"white is 0 {o}.tif": (tiff(255 - GREY, o, white_is_zero=True), grey()) for o in "<>"},
    **{f"planes {o}.tif": (tiff(RGB, o, planar=True), RGB) for o in "<>"},
    **{f"deep grey {o}.tif": (tiff(DEEP[..., 0], o), grey()) for o in "<>"},
    **{f"deep rgb {o}.tif": (tiff(DEEP, o), RGB) for o in "<>"},
    **{f"deep rgb {c}.tif": (saved(DEEP[..., 0], "TIFF", compression=c), grey())
       for c in ("tiff_lzw", "tiff_adobe_deflate")},
    "deep, turned.tif": (tiff(DEEP[..., 0], t274=6), np.rot90(grey(), -1)),
    "unsigned 32 bits, as 16.tif": (tiff(DEEP[..., 0].astype(np.uint32)), grey()),
}
if "avif" in features.get_supported():
    SAME |= {"rgb.avif": as_pillow_shows(saved(RGB, "AVIF")),
             "turned.avif": (turned("AVIF"), np.rot90(as_pillow_shows(saved(RGB, "AVIF"))[1], -1))}

HALF = DEEP[..., 0] >> 4  # 12 bits in 16
REFUSED = {  # name: (file, words of the reason)
    "12 bits.png": (png(HALF, 0, 16), "uses 12 of them"),
    "12 bits rgb.png": (png(DEEP >> 4, 2, 16), "uses 12 of them"),
    "8 bits and a hot pixel.png": (png(np.where(np.arange(GREY.size).reshape(GREY.shape) == 9, 65535, GREY),
                                       0, 16), "uses 8 of them"),
    "black, 16 bits.png": (png(0 * GREY, 0, 16), "uses 8 of them"),
    "deep grey alpha.png": (png(np.dstack([DEEP[..., 0], ALPHA]), 4, 16), "cuts to 8"),
    "checksum.png": (png(RGB, 2, spoil=True), "not a readable image"),
    "cut.png": (STILL_PNG[:len(STILL_PNG) // 2], "not a readable image"),
    "head.png": (STILL_PNG[:20], "not a readable image"),
    "moving.png": (several("PNG"), "several pages or frames"),
    "moving.gif": (several("GIF"), "several pages or frames"),
    "moving.webp": (several("WEBP"), "several pages or frames"),
    "pages.tif": (several("TIFF"), "several pages or frames"),
    "cut.jpg": (saved(RGB, "JPEG")[:-200], "truncated"),
    **{f"cut, with an end mark, {how}.jpg": (cut_but_ended(data), "not a readable|missing") for how, data in {
        "rgb": saved(RGB, "JPEG"), "grey": saved(GREY, "JPEG", quality=30), "cmyk": saved(CMYK, "JPEG"),
        "padded": saved(RGB, "JPEG") + bytes(2000), "restarts": saved(RGB, "JPEG", restart_marker_rows=1),
        "turned": turned("JPEG"), "a flat end": saved(FLAT_END, "JPEG")}.items()},
    "cut, with an end mark and junk.jpg": (cut_but_ended(saved(RGB, "JPEG"), .6, b"junk" * 99),
                                           "not a readable|missing"),
    **{f"progressive, {share:.0%} of it.jpg": (cut_but_ended(saved(RGB, "JPEG", progressive=True), share),
                                               "of this JPEG is missing") for share in (.5, .7, .9, .98)},
    **{f"progressive, {i} scans.jpg": (PROGRESSIVE[:at] + b"\xff\xd9", "part of this JPEG is missing")
       for i, at in enumerate(scans(PROGRESSIVE)) if i},
    "cut.bmp": (saved(RGB, "BMP")[:-200], "truncated"),
    "cut.tif": (saved(RGB, "TIFF", compression="tiff_lzw")[:-2000], "not a readable image"),
    "cut.ppm": (netpbm("P6", 255, RGB)[:-20], "not a readable image"),
    "deep.ppm": (netpbm("P6", 65535, DEEP), "cuts to 8"),
    "float.pfm": (b"Pf\n61 45\n-1.0\n" + GREY.astype("<f4").tobytes(), "kind F|no image of a kind"),
    **{f"float {o}.tif": (tiff((GREY / 255).astype(np.float32), o, kind=3), "kind F") for o in "<>"},
    "float 0 to 65535.tif": (tiff(DEEP[..., 0].astype(np.float32), kind=3), "kind F"),
    "float nan.tif": (tiff(np.full((20, 20), np.nan, np.float32), kind=3), "kind F"),
    "signed 8.tif": (tiff(GREY.view(np.int8), kind=2), "signed"),
    **{f"signed 16 {o}.tif": (tiff((DEEP[..., 0] >> 1).astype(np.int16), o, kind=2), "signed") for o in "<>"},
    "signed 32.tif": (tiff(DEEP[..., 0].astype(np.int32), kind=2), "signed"),
    "unsigned 32.tif": (tiff(DEEP[..., 0].astype(np.uint32) << 8), "expected 0 to 65535"),
    "unsigned 32, 8 used.tif": (tiff(GREY.astype(np.uint32)), "uses 8 of them"),
    "deep, white is 0.tif": (tiff(65535 - DEEP[..., 0], white_is_zero=True), "white at 0"),
    **{f"deep planes {o}.tif": (tiff(DEEP, o, planar=True), "separate planes") for o in "<>"},
    "deep palette.tif": (tiff(DEEP[..., 0], t262=3, t320=[0] * 3), "not a readable image"),
    "8-bit palette.tif": (tiff(GREY, t262=3, t320=(COLOURS >> 8).ravel().tolist()), "palette of 8 bits"),
    "lab.tif": (tiff(RGB, t262=8), "kind LAB"),
    "preview.tif": (tiff(RGB, t254=1), "preview"),
    "few strips.tif": (tiff(RGB, t278=10), "strips or tiles are missing"),
    "pages by hand.tif": (tiff(GREY, pages=3), "several pages or frames"),
    "a page in itself.tif": (tiff(GREY, pages=2), "several pages or frames"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n40 40 scale\n",
                       "no image of a kind"),
    "text.png": (b"hello", "no image of a kind"),
    "nothing.png": (b"", "empty file"),
    "icon.png": (saved(RGB[:32, :32], "ICO"), "no image of a kind"),
    "targa.png": (saved(RGB, "TGA"), "no image of a kind"),
    "small.png": (saved(RGB[:7], "PNG"), "8 to 65535 pixels a side"),
    "bomb.png": (png(RGB, 2).replace(struct.pack(">II", 61, 45), struct.pack(">II", 40000, 40000)),
                 "not a readable|at most"),
    "bomb.bmp": (saved(RGB, "BMP").replace(struct.pack("<II", 61, 45), struct.pack("<II", 40000, 40000)),
                 "at most 268 million"),
}


@pytest.mark.parametrize("name", SAME)
def test_a_file_is_its_plain_twin(name, tmp_path):
    data, want = SAME[name]
    path = tmp_path / name
    path.write_bytes(data)
    got = fp.load_image(path)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.uint8 and got.flags.c_contiguous


@pytest.mark.parametrize("name", REFUSED)
def test_or_refused_in_one_line(name, tmp_path):
    data, words = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(fp.ImageError, match=words) as e:
        fp.load_image(path)
    assert name in str(e.value) and str(e.value).isprintable()


# -- arrays and PIL images ---------------------------------------------------------------------------

def test_arrays():
    for array, want in ((RGB, RGB), (GREY, grey()), (GREY[..., None], grey()), (np.dstack([RGB, ALPHA]), RGB),
                        (DEEP, RGB),
                        (DEEP.astype(">u2"), RGB), (DEEP[..., 0], grey()), (RGB[::-1, ::2], RGB[::-1, ::2]),
                        (RGB.tolist(), None)):
        if want is None:
            with pytest.raises(fp.ShapeError, match="int64"):
                fp.load_image(array)
            continue
        got = fp.load_image(array)
        np.testing.assert_array_equal(got, want)
        assert got.flags.c_contiguous and got.dtype == np.uint8


@pytest.mark.parametrize("bad, match", [
    (np.zeros((4, 40, 40, 3), np.uint8), "got shape"), (np.zeros((40, 40, 2), np.uint8), "got shape"),
    (7, "got shape"),
    (np.zeros((0, 40, 3), np.uint8), "8 to 65535"), (np.zeros((40, 7, 3), np.uint8), "8 to 65535"),
    (np.zeros((8, 65536), np.uint8), "8 to 65535"),
    (np.broadcast_to(np.uint8(0), (60000, 60000)), "at most 268 million"),
    (np.zeros((40, 40, 3)), "float64"), (np.full((40, 40, 3), np.nan, np.float32), "float32"),
    (np.zeros((40, 40), bool), "bool"),
    (np.array([["a"] * 9] * 9, object), "object"), (np.zeros((40, 40, 3), np.int16), "int16"),
    ([[1], [1, 2]], "not a readable"),
    (np.zeros((40, 40), np.uint32), "uint32"), (HALF, "uses 12 of them"), (b"path", "got shape"),
    (None, "got shape")])
def test_arrays_that_are_no_images(bad, match):
    with pytest.raises(fp.ShapeError, match=match) as e:
        fp.load_image(bad)
    assert str(e.value).isprintable()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK",
                                  "YCbCr", "HSV"])
def test_pil_images_are_what_their_files_are(mode):
    image = Image.fromarray(np.dstack([RGB, ALPHA | 128]))
    image = {"P": lambda: PALETTE, "PA": lambda: PALETTE.convert("PA"),
             "La": lambda: image.convert("LA").convert("La"),
             "RGBX": lambda: Image.fromarray(RGB).convert("RGBX")}.get(mode, lambda: image.convert(mode))()
    want = image.convert(image.mode.upper()) if mode in ("La", "RGBa") else image
    np.testing.assert_array_equal(fp.load_image(image), np.asarray(want.convert("RGB")))


def test_pil_images_with_a_turn_or_a_depth(tmp_path):
    before = Image.open(io.BytesIO(turned("PNG")))
    np.testing.assert_array_equal(fp.load_image(before), np.rot90(RGB, -1))
    assert before.size == (61, 45) and before.getexif()[0x0112] == 6  # the caller's image stays as it is
    np.testing.assert_array_equal(fp.load_image(Image.fromarray(DEEP[..., 0])), grey())
    np.testing.assert_array_equal(fp.load_image(Image.fromarray(HALF), bits=12), grey())
    for image, match in ((Image.fromarray(GREY.astype(np.float32)), "kind F"),
                         (Image.new("LAB", (20, 20)), "kind LAB"),
                         (Image.fromarray(DEEP[..., 0].astype(np.int32) - 60000), "expected 0 to 65535"),
                         (Image.open(io.BytesIO(png(DEEP, 2, 16))), "cuts to 8"),
                         (Image.open(io.BytesIO(several("GIF"))), "several pages"),
                         (Image.fromarray(HALF), "uses 12"),
                         (Image.open(io.BytesIO(SAME["rgb.jpg"][0][:-300])), "truncated")):
        with pytest.raises(fp.ShapeError, match=match):
            fp.load_image(image)


# -- depth -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_depth_holds_for_every_source(bits, tmp_path):
    deep = DEEP >> (16 - bits)
    sources = [deep, Image.fromarray(deep[..., 0])]
    for name, data in {"a.png": png(deep, 2, 16), "b.png": png(deep[..., 0], 0, 16), "c.tif": tiff(deep),
                       "d.tif": tiff(deep, ">"),
                       "e.tif": tiff(deep[..., 0], ">"), "g.png": png(np.dstack([deep, deep[..., 0]]), 6, 16),
                       "h.pgm": netpbm("P5", 65535, deep[..., 0]),
                       "i.pgm": netpbm("P5", (1 << bits) - 1, deep[..., 0])}.items():
        (tmp_path / name).write_bytes(data)
        sources.append(tmp_path / name)
    for source in sources:
        got = fp.load_image(source, bits)
        np.testing.assert_array_equal(got, RGB if (got[..., 0] != got[..., 1]).any() else grey(),
                                      err_msg=str(source))
    assert find_depth(sources) == bits and find_depth(sources[:1]) == bits
    np.testing.assert_array_equal(fp.load_image(RGB, bits), RGB)  # 8 bits a value are 8 bits


def test_values_above_the_depth_are_cut_with_a_warning(tmp_path):
    deep = np.minimum(DEEP[..., 0], 9000)
    with pytest.warns(fp.ImageWarning, match="above 12 bits"):
        got = fp.load_image(deep, bits=12)
    np.testing.assert_array_equal(got, grey((np.minimum(deep, 4095) >> 4).astype(np.uint8)))
    with pytest.raises(fp.ShapeError, match="expected one of 8, 10, 12, 14, 16"):
        fp.load_image(deep, bits=11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.load_image(np.minimum(deep, 4095), bits=12)


def test_the_depth_is_that_of_the_set_not_of_a_hot_pixel(tmp_path):
    images = [HALF.copy() for _ in range(6)] + [RGB]
    images[0][3, 3] = 65535
    assert find_depth(images) == 12 and find_depth([RGB]) is None and find_depth([]) is None
    with pytest.raises(fp.ShapeError, match="6 of 7 images use at most 12 bits, others 16"):
        find_depth([HALF] * 6 + [DEEP])
    assert find_depth([HALF >> 2, HALF]) == 12 and find_depth([tmp_path / "none.png", HALF]) == 12


def find_depth(sources):
    return settle(sources, fp.Settings())[0].bits


def test_a_model_keeps_its_depth(tmp_path):
    rng = np.random.default_rng(0)
    images = [np.clip(800 + 300 * rng.random((64, 64, 3)) + 2000 * (RGB[:1, :1] > 0), 0,
                      4095).astype(np.uint16) for _ in range(12)]
    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(png(image, 2, 16))
    prior = fp.fit(files, size=64, iterations=0, copies=0)
    assert prior.settings.bits == 12
    prior.save(tmp_path / "m.npz")
    prior = fp.Prior.load(tmp_path / "m.npz")
    for file, image in zip(files, images):
        twin = (image >> 4).astype(np.uint8)
        assert prior.score(file).score == prior.score(image).score == prior.score(twin).score
    assert fp.fit(files, size=64, iterations=0, copies=0, bits=14).settings.bits == 14
    with pytest.raises(fp.ShapeError, match="bits"):
        fp.fit(files, bits=11)


# -- the host ----------------------------------------------------------------------------------------

def test_large_images_are_read_and_the_hosts_pillow_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("rgb.png", "rgb.jpg", "rgb raw.tif", "rgb tiff_lzw.tif", "deep rgb <.tif", "rgb.bmp",
                 "palette.png", "still.gif"):
        data, want = SAME[name]
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(fp.load_image(tmp_path / name), want)
    for name in ("cut.png", "cut.jpg", "cut.bmp", "cut.tif"):
        (tmp_path / name).write_bytes(REFUSED[name][0])
        with pytest.raises(fp.ImageError, match=name):
            fp.load_image(tmp_path / name)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (1000, True)


def test_decoding_in_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("rgb.png", "deep rgb.png"):
        (tmp_path / name).write_bytes(SAME[name][0])
    (tmp_path / "cut.jpg").write_bytes(REFUSED["cut.jpg"][0])
    wrong = []

    def work():
        for _ in range(20):
            wrong.extend(1 for name in ("rgb.png", "deep rgb.png")
                         if (fp.load_image(tmp_path / name) != RGB).any())
            try:
                fp.load_image(tmp_path / "cut.jpg")
                wrong.append("cut")
            except fp.ImageError:
                pass
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_line_scan(tmp_path):
    line = np.zeros((512, 33280), np.uint8)
    line[:, ::7] = 200
    Image.fromarray(line).save(tmp_path / "line.png")
    np.testing.assert_array_equal(fp.load_image(tmp_path / "line.png")[..., 1], line)


@pytest.mark.parametrize("raised", [RuntimeError("a\nb\x1b[31m"), struct.error("short"), TypeError(),
                                    MemoryError(), RecursionError("deep"),
                                    AssertionError(), UserWarning("odd"), ZeroDivisionError("by 0"),
                                    SystemError("null")])
def test_whatever_a_decoder_raises_is_the_images_error(raised, tmp_path, monkeypatch):
    (tmp_path / "a\tb.png").write_bytes(STILL_PNG)

    def load(*_):
        raise raised
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(fp.ImageError, match="not a readable image") as e:
        fp.load_image(tmp_path / "a\tb.png")
    assert str(e.value).isprintable() and r"a\tb.png" in str(e.value)


# -- mutated files -----------------------------------------------------------------------------------

def mutated(data: bytes, rng) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = int(rng.integers(len(data) if rng.random() < .5 else min(len(data), 200)))
        kind = rng.integers(5)
        if kind == 0:
            data[at] = rng.integers(256)
        elif kind == 1:
            data[at:at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\1\0"])
        elif kind == 2:
            del data[at:at + int(rng.integers(1, 50))]
        elif kind == 3:
            data[at:at] = data[at // 2:at // 2 + int(rng.integers(1, 50))]
        else:
            data[at] ^= 1 << int(rng.integers(8))
        if not data:
            return b""
    return bytes(data)


def try_mutated(path, rng):
    """Writes a mutated file: it is read or refused in one line. Anything else is raised."""
    files = [data for data, _ in SAME.values()] + [data for data, _ in REFUSED.values() if data]
    path.write_bytes(mutated(files[rng.integers(len(files))], rng))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = fp.load_image(path, bits=rng.choice([None, 12, 16]))
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        assert image.ndim == 3 and image.shape[2] == 3
        return "read"
    except fp.ImageError as e:
        assert str(e).isprintable()
        return "refused"


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_read_or_refused(seed, tmp_path):
    rng = np.random.default_rng(seed)
    for _ in range(500):
        try_mutated(tmp_path / "a.png", rng)


def main(seconds, seed=0):
    """Mutated files for so long; the one that broke stays, with its seed."""
    path, tried, until, slowest = Path(f"mutated_{os.getpid()}.img"), Counter(), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        began = time.process_time()
        try:
            tried[try_mutated(path, np.random.default_rng(seed))] += 1
        except BaseException:
            print(f"seed {seed}: {path}", file=sys.stderr)
            raise
        slowest, seed = max(slowest, time.process_time() - began), seed + 1
    path.unlink()
    print({"files": sum(tried.values()), **tried, "slowest_s": round(slowest, 2)})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
