#!/usr/bin/env python3
"""What lies in folders: which images to score or to train on, what is left out and why; where outputs go.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import re
import stat
from pathlib import Path
from typing import Iterable

import numpy as np

if "fp" not in globals():
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif",
                  ".avif", ".pbm", ".pgm", ".ppm", ".pnm"}
_NOT_MEANT = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}  # and .names
_OUTPUT = re.compile(r"\.(map|mask)\.png$", re.IGNORECASE)  # what `score` writes
_MASK_OF = re.compile(r"[_-](mask|label|gt)$", re.IGNORECASE)
_FOLDERS = {  # what a folder's name says of the images in it
    "mask": "groundtruth gt mask masks label labels annotation annotations segmentation segmentations",
    "bad": "bad ng ko nok notok notgood nogood nio abnormal anomaly anomalies anomalous defect defects "
           "defective fail failed fault faulty reject rejects rejected broken scrap rework damage damaged "
           "crack cracks cracked scratches scratched dent dents dented contaminated contamination",
    "split": "test testing val valid validation",
    "good": "good ok okay normal pass passed nodefect nodefects defectfree anomalyfree io",
    "train": "train training",
    "wrapper": "data images image imgs img"}
_BESIDE_GOOD = {  # good_parts, but not ok_to_be_checked
    *"all data dataset image images img imgs only part parts photo photos picture pictures piece pieces "
    "product products sample samples set".split()}


def _kind(name: str) -> str:
    """A key of _FOLDERS for a folder's name: whole (no-defect), or for its words (good_parts); else ""."""
    words = re.findall("[a-z]+", name.lower())
    negated = {"no", "not", "non", "without"} & set(words)
    return next((kind for parts in (["".join(words)], [] if negated else words)
                 for kind, known in _FOLDERS.items() if set(parts) & set(known.split())), "")


def _surely_good(name: str) -> bool:
    """Whether a folder's name says so by every word."""
    known = {*_FOLDERS["good"].split(), *_FOLDERS["train"].split(), *_BESIDE_GOOD}
    words = re.findall("[a-z]+", name.lower())
    return "".join(words) in known or known >= {*words}


class Found:
    """Images under folders, each once; what was left out, counted by reason; what cannot be read."""

    def __init__(self):
        self.images: dict[Path, Path] = {}  # and the name of an output for it
        self.left_out, self.suffixes = collections.Counter(), collections.Counter()
        self.errors: dict[str, str] = {}
        self.seen: set[str] = set()  # real paths
        self.left: set[str] = set()
        self.source = ""

    def __str__(self) -> str:
        parts = [f"{n} {reason}" for reason, n in self.left_out.items() if n]
        if self.suffixes:
            parts.append(f"{sum(self.suffixes.values())} not images ({', '.join(sorted(self.suffixes))})")
        return "; ".join(filter(None, (self.source, f"left out: {', '.join(parts)}" * bool(parts))))

    def size(self) -> int:
        return len(self.images) + len(self.errors) + self.left_out["seen by another name"]

    def problems(self) -> list[str]:
        return [f"{path}: {text}" for path, text in self.errors.items()]

    def folder(self, folder: Path, base: Path | None = None, without: str = "", deep: bool = True) -> None:
        """What lies under `folder`, links followed, but hidden names, masks of data sets, and our outputs.

        base: names of outputs are relative to it. without: the kind of folder (see _FOLDERS) left out too.
        """
        stack, found = [folder], {}
        while stack:
            here = stack.pop()
            real = os.path.realpath(here)
            try:
                entries = None if real in self.seen else sorted(
                    os.scandir(here), key=lambda e: (e.is_symlink(), e.name))
            except OSError as e:
                self.errors[str(here)] = f"cannot be read ({e.strerror})"
                continue
            if entries is None:
                self.left_out["seen by another name"] += 1
                continue
            self.seen.add(real)
            folders = {e.name: _kind(e.name) for e in entries if os.path.isdir(e.path)}
            stems = {Path(e.name).stem for e in entries if e.name not in folders and is_image(e.name)}
            in_layout = stems or set(folders.values()) - {"", "mask"}
            for e in entries:
                kind, path = folders.get(e.name), Path(e.path)
                if e.name.startswith(".") or e.name in _NOT_MEANT:
                    self.left_out["hidden"] += 1
                elif kind is None:
                    self.file(path, f"{real}/{e.name}", found, base or folder, stems)
                elif kind == "mask" and in_layout or kind and kind == without or not deep:
                    self.leave(path)
                else:
                    stack.append(path)
        self.images |= dict(sorted(found.items()))

    def file(self, path: Path, real: str, found: dict, base: Path, stems=frozenset()) -> None:
        """One file of a folder or glob, into `found`."""
        real = os.path.realpath(path) if path.is_symlink() else real
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except OSError as e:
            self.errors[str(path)] = f"cannot be read ({e.strerror})"
            return
        if not is_image(path.name):
            self.suffixes[path.suffix or "no suffix"] += 1
        elif _OUTPUT.search(path.name):
            self.left_out["maps and masks of fastprior"] += 1
        elif ((m := _MASK_OF.search(path.stem)) and path.stem[:m.start()] in stems
              and (m[1].lower() != "label" or path.suffix.lower() in (".png", ".bmp"))):  # a photo of a label
            self.left_out["masks beside their images"] += 1
        elif real in self.seen:
            self.left_out["seen by another name"] += 1
        elif not is_file:
            self.errors[str(path)] = "a pipe or device, no image file"
        else:
            self.seen.add(real)
            found[path] = path.relative_to(base)

    def leave(self, folder: Path) -> None:
        inside, real = Found(), os.path.realpath(folder)
        if real not in self.left:
            self.left.add(real)
            inside.folder(folder)
            self.left_out[f"in {folder.name}/"] += len(inside.images)


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def find_images(path: str | os.PathLike, without: str = "") -> list[Path]:
    """Image files under a folder (of an MVTec AD category: under train/good), sorted; or the file itself.

    without="good": only those that lie in no folder named as good ones are (ok, normal, ...).
    """
    if os.path.isfile(path):
        return [Path(path)]
    if not os.fspath(path) or not os.path.isdir(path):
        raise fp.ImageError(f"{os.fspath(path)!r}: no such file or folder")
    found, path = Found(), Path(path)
    found.folder(path / "train" / "good" if not without and (path / "train" / "good").is_dir() else path,
                 without=without)
    return _some(found, path)


def find_bad(path: str | os.PathLike) -> list[Path]:
    """Images known to be bad: those under a folder, but of good ones; ImageError if it is one of masks."""
    whole = Path(os.path.abspath(path))
    if os.path.isdir(path) and "mask" in (_kind(whole.name), _kind(whole.parent.name)):
        raise fp.ImageError(f"{path}: masks, by its name; expected images of bad parts")
    return find_images(path, without="good")


def _some(found: Found, path: Path) -> list[Path]:
    if not found.images:
        raise fp.ImageError(f"{path}: no images here (looked for "
                            f"{', '.join(sorted(IMAGE_SUFFIXES))}) {found}".rstrip())
    return list(found.images)


def find_good(path: str | os.PathLike) -> Found:
    """The images to train on: those of good/ (ok, normal, train/good, Data/Images/Normal, ...) if there.

    ImageError where names and places of folders do not say which images are good ones.
    """
    found = Found()
    if not os.fspath(path) or not os.path.isdir(path):
        found.images = {file: file for file in find_images(path)}
        return found
    here, aside, masked = Path(path), [], False
    kind = _kind(os.path.basename(os.path.abspath(here)))
    while True:
        try:
            entries = [e for e in os.scandir(here) if not e.name.startswith(".") and e.name not in _NOT_MEANT]
        except OSError as e:
            raise fp.ImageError(f"{here}: cannot be read ({e.strerror})") from e
        folders = {Path(e.path): _kind(e.name) for e in entries if os.path.isdir(e.path)}
        loose = any(is_image(e.name) and not _OUTPUT.search(e.name) for e in entries
                    if Path(e.path) not in folders)
        sure = any(k == "good" and _surely_good(f.name) for f, k in folders.items())
        contrast = not sure and {"bad", "split"} & {*folders.values()}  # good_bottles, beside bad_bottles
        chosen = [f for f, k in folders.items()
                  if k == "train" or k == "good" and (contrast or _surely_good(f.name))]
        others = [f for f, k in folders.items() if k != "mask"]
        if not chosen and not loose and len(others) == 1 and folders[others[0]] in ("", "wrapper", "good"):
            chosen = others  # the only one there is
        unclear = (len(chosen) > 1 or chosen and loose
                   or kind != "good" and loose and "mask" in folders.values())
        if unclear or not chosen:
            break
        aside += [f for f in folders if f != chosen[0]]
        here = chosen[0]
        masked |= folders[here] != "train" and "mask" in folders.values()  # of these, not of a test's images
        kind = folders[here] if folders[here] in ("good", "train") else kind
        if kind == "good":
            break
    whole = Path(os.path.abspath(here))
    named = {_kind(whole.name), _kind(whole.parent.name) == "mask" and "mask"}
    if kind != "good" and (unclear or folders and not loose or named & {"bad", "mask"} or
                           masked):
        names = ", ".join(sorted(f"{f.name}/" for f in folders)[:6])
        raise fp.ImageError(f"{here}: which images are good is not clear "
                            f"({'images beside ' * bool(loose and folders)}"
                            f"{names or 'by its name, none'}); give the folder of good images, "
                            "or put its folders into one called good/ (for a folder a product, --multi)")
    found.folder(here, without="bad", deep=kind == "good")
    for folder in sorted(aside):
        found.leave(folder)
    if found.left_out["masks beside their images"]:
        raise fp.ImageError(f"{here}: masks lie beside images, so some of these are not good; name a folder "
                            "of good images")
    inner = sorted({f.relative_to(here).parts[0] for f in found.images if f.parent != here})
    below = ", ".join(f"{name}/" for name in inner[:6]) + ", ..." * (len(inner) > 6)
    below = f" and its {below}" if below else ""
    found.source = f"{len(_some(found, here))} images from {here}{below}"
    return found


def find_all(patterns: Iterable[str]) -> Found:
    """Files, folders and globs -> image files, each once."""
    import glob
    found = Found()
    for pattern in patterns:
        path, before = Path(pattern), found.size()
        if pattern and os.path.isdir(path):
            found.folder(path)
        elif pattern and os.path.lexists(path):
            found.images.setdefault(path, Path(path.name))
            continue
        else:
            fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
            below = [match.relative_to(fixed).parts[:None if match.is_dir() else -1] for match in matches]
            in_layout = {_kind(name) for own in below for name in own} - {"", "mask"}
            named = {*path.parts[len(fixed.parts):]}  # by whoever means them
            for match, own in zip(matches, below):
                masks = [i for i, name in enumerate(own) if _kind(name) == "mask" and name not in named]
                if masks and in_layout:
                    found.leave(fixed.joinpath(*own[:masks[0] + 1]))
                elif match.is_dir():
                    found.folder(match, fixed)
                else:
                    found.file(match, os.path.realpath(match), found.images, fixed)
        if found.size() == before:
            found.errors[pattern] = ("no images here" if os.path.isdir(path) and pattern
                                     else "no such file, folder or glob of images")
    return found


KINDS = {"model": b"PK\3\4", "ONNX file": b"\x08", "web page": b"<!doctype html", "file of JSON lines": b"{"}


def check_kind(path: Path, kind: str) -> None:
    """FastPriorError where a file is there already that begins as none of its kind: somebody's image, say."""
    if not os.path.isfile(path):
        return
    with contextlib.suppress(OSError), open(path, "rb") as f:  # said when it is to be written
        head = f.read(64).lstrip()
        if head and not head.lower().startswith(KINDS[kind].lower()):
            raise fp.FastPriorError(f"{path}: is there and is no {kind}, so it is not replaced: give another "
                                    "name, or delete it first")


def check_output(path: Path, kind: str = "model") -> None:
    """Before the work, not after: can `path` be written, and is what it replaces of its kind?"""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise fp.FastPriorError(f"{path}: the folder {target.parent} does not exist")
    if os.path.exists(target) and not target.is_file():  # which does not raise for a long name
        raise fp.FastPriorError(f"{path}: a folder or a device; expected a file to write")
    check_kind(target, kind)
    _try_to_write(target)


def check_folder(path: Path) -> None:
    """Before the work: can `path` be a folder of outputs? It is made where it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise fp.FastPriorError(f"{path}: a file; expected a folder to write into") from e
    except OSError as e:
        raise fp.FastPriorError(f"{path}: the folder cannot be made ({e.strerror})") from e
    _try_to_write(path / "trial")


def _try_to_write(path: Path) -> None:
    trial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        trial.touch()
        trial.unlink()
    except OSError as e:
        raise fp.FastPriorError(f"{path}: cannot be written ({e.strerror})") from e


def write_png(folder: Path, name: Path, kind: str, array: np.ndarray, source: Path) -> str:
    """An output for `source`, at its own place below `folder` -> its path. Never replaces another image's."""
    import hashlib
    from PIL import Image, PngImagePlugin
    owner = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()
    path = folder / name.with_name(f"{name.name}.{kind}.png")
    try:
        with open(path, "rb") as f:
            taken = fp._open_pillow(f).info.get("fastprior") != owner
    except FileNotFoundError:
        taken = False
    except Exception:  # a decoder, and a file that is none of ours
        taken = True
    path = path.with_name(f"{name.name}.{owner[:8]}.{kind}.png") if taken else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    info = PngImagePlugin.PngInfo()
    info.add_text("fastprior", owner)
    try:
        Image.fromarray(array).save(temporary, "PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return str(path)


def find_products(root: str | os.PathLike) -> dict[str, Found]:
    """`find_good` for every folder of ROOT, by its name."""
    root = Path(root)
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    folders = [p for p in folders if p.name[0] != "." and p.name not in _NOT_MEANT]
    if not folders:
        raise fp.ImageError(f"{root}: expected a folder of good images for each product")
    return {folder.name: find_good(folder) for folder in folders}


def good_images(images) -> tuple[list, list[str], str]:
    """A folder of good images, or what `find_good` found in one -> images, unreadable ones, the left out."""
    if isinstance(images, (str, os.PathLike)):
        images = find_good(images)
    if hasattr(images, "problems"):
        return list(images.images), images.problems(), str(images)
    return list(images), [], ""


def fit_many(root: str | os.PathLike, *, progress=fp._quiet, **options) -> "fp.MultiPrior":
    """`fit` for every product of ROOT, a folder each (of good images, or a data set's), in one model."""
    for what in ("features", "tile", "known"):
        if options.get(what):
            raise fp.ShapeError(f"{what}: of one product; train it alone")
    found = find_products(root)
    fp.MultiPrior.check_names(found)
    for name, own in found.items():
        if len(own.images) < fp.MIN_IMAGES:
            raise fp.ImageError(f"{name}: {len(own.images)} good images: at least {fp.MIN_IMAGES} are needed")
    names = {f.name for f in dataclasses.fields(fp.Settings)} - {"backbone"}
    settings = fp.Settings(**{k: v for k, v in options.items() if k in names})
    settings.check()
    files = [file for own in found.values() for file in own.images]
    settings, _ = fp._room("curation").settle(files, settings)
    backbone = fp.load_backbone(options.pop("backbone", fp.Settings.backbone))
    roi = options.get("roi")
    roi = None if roi is None else fp._room("region").region_of(roi, files, settings)
    options |= {"bits": settings.bits, "size": settings.shape, "cell": settings.cell}
    far, again = set(), True
    while again:  # until no image that is set aside by far has decided the rounding, as in `fit`
        made, ranged = fp._room("quantization").quantize_on(backbone, files, settings, roi, progress, far)
        priors = {product: fp.fit(own, backbone=made, ranged=ranged, **options, progress=lambda
                                  what, done, of, name=product: progress(f"{name}: {what}", done, of))
                  for product, own in found.items()}
        if any(p.summary.get("interrupted") for p in priors.values()):
            raise KeyboardInterrupt  # one product's training alone would be cut short
        far |= (again := {*ranged}.difference(*(p.summary["trained_on"] for p in priors.values())))
    return fp.MultiPrior(priors)
