#!/usr/bin/env python3
"""What the command says and does around the method: progress, rows, narration, exit codes.

Results go to stdout, everything else to stderr. fastprior loads this file by its path and
hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp


@functools.cache
def is_installed(name: str) -> bool:
    from importlib.util import find_spec
    return find_spec(name) is not None


def machine() -> dict[str, str | int]:
    """What a figure needs beside it."""
    import platform
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if is_installed("numba"):
        from importlib.metadata import version
        versions["numba"] = version("numba")
    return {"cpu": name, "cores": os.cpu_count() or 1, **versions}


class Bars:
    """rich progress bars on stderr, one a stage; silent where stderr is no terminal."""

    def __enter__(self):
        self.bars, self.tasks = None, {}
        try:
            from rich.console import Console
        except ImportError:
            return self
        from rich.progress import (BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn,
                                   TimeRemainingColumn)
        console = Console(file=sys.stderr or io.StringIO())
        self.bars = Bars(TextColumn("{task.description:>12}", markup=False), BarColumn(),
                         MofNCompleteColumn(), TimeRemainingColumn(),
                         console=console, disable=not console.is_terminal)
        self.bars.start()
        return self

    def __exit__(self, *_):
        if self.bars:
            self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.bars:
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.tasks[what], completed=done, total=total)


def say(*text) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        if sys.stderr:
            print(fp._printable(" ".join(map(str, text))), file=sys.stderr, flush=True)


@contextlib.contextmanager
def silence():
    """What C code writes to stderr goes nowhere: libtiff writes there what its caller raises too."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def strict_json(value) -> str:
    """Strict JSON: what is not a number is null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


def with_aside(t: "fp.Threshold", aside: int) -> "fp.Threshold":
    """What it promises if images that were set aside count as good ones above it."""
    return dataclasses.replace(t, count=t.count + aside)


def promise(prior) -> str:
    """What its threshold promises, in words. Images set aside count as good ones above it, to be safe."""
    t, aside = prior.threshold, prior.summary.get("held_out_aside", 0)
    safe = with_aside(t, aside)
    more = f" and {aside} set aside" if aside else ""
    text = (f"threshold {t.value:.2f}: {t.count} held-out good images{more} promise false alarms of "
            f"{safe.expected:.1%} on average, at most {safe.bound:.1%} with 95 % confidence")
    if aside:
        text += f" ({t.expected:.1%} on average if the {aside} are bad)"
    if safe.bound > t.fpr:
        text += f"; for {t.fpr:.1%} you need {t.needed} images"
        if t.estimate > t.value:
            text += f" (an estimate of its threshold, no promise: {t.estimate:.2f})"
    return text


def looks_at(prior) -> str:
    """How much of an image, in words."""
    if prior.roi is None:
        return "the whole image"
    return (f"{prior.roi.mask.mean():.1%} of the image, {prior.inside.sum()} of {prior.inside.size} places "
            "(region of interest)")


def numbers(text: str, name: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError as e:
        raise fp.ShapeError(f"--{name}: expected numbers separated by commas, got {text!r}") from e


def size_of(text: str, name: str = "size") -> int | tuple[int, int]:
    """"448" -> 448, "640x320", width x height -> (320, 640)."""
    try:
        width, *height = (int(n) for n in text.lower().split("x"))
        if min(width, *height, width) < 1 or len(height) > 1:
            raise ValueError("not one or two sides")
        return (*height, width) if height else width
    except ValueError as e:
        raise fp.ShapeError(f"--{name}: expected pixels a side, or WIDTHxHEIGHT, got {text!r:.60}") from e


def only_one(fpr: float | None, threshold: float | None) -> None:
    if fpr is not None and threshold is not None:
        raise fp.FastPriorError("--fpr and --threshold: both say where to judge; give one of them")


def tell_promise(prior: fp.Prior) -> None:
    say(promise(prior))
    if prior.threshold.value > 20:
        say("warning: good images rarely score above 10: there may be bad ones among them. Look at those "
            "that score highest (fastprior score --map), and take the bad ones out")


def tell_doubts(near_duplicates: int, aside: list[str]) -> None:
    if near_duplicates:
        say(f"{near_duplicates} images are near-duplicates of others (frames, crops, copies): the promise "
            "counts them once")
    if aside:
        say(f"{len(aside)} images are unlike the others and were set aside (--keep-all keeps them; look at "
            "them: fastprior score --map): " + ", ".join(aside))


def features_file(model: Path) -> Path:
    """Where the features of a model's images are kept: part.npz -> part.features.npz."""
    return model.with_suffix(".features" + model.suffix)


@contextlib.contextmanager
def features_beside(output: Path):
    """A file for features that takes its place when the model is saved: neither is ever without the other."""
    path = features_file(output)
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        yield temporary
        os.replace(temporary, os.path.realpath(path))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def update(good: str, model: Path, output: Path, iterations: int, keep_all: bool,
           threads: int | None) -> None:
    prior, known = fp.Prior.load(model, threads=threads), features_file(model)
    if isinstance(prior, fp.MultiPrior):
        raise fp.FastPriorError(f"{model}: holds {len(prior.priors)} products; update takes a model of one")
    if not known.is_file():
        raise fp.FastPriorError(f"{known} is not there: it holds what update needs of the first images; "
                                "write it with train --keep-features")
    fp._room("folders").check_output(features_file(output))
    with features_beside(output) as features:
        with Bars() as bars:
            new = prior.update(good, known, iterations=iterations, keep_all=keep_all, threads=threads,
                               features=features, progress=bars)
        new.save(output)
    tell_training(new)
    summary = new.summary
    if "gain_kept" in summary:
        now, then = summary["gain_kept"], 1 - summary["loss"] / summary["loss_start"]
        again = "" if now > then / 2 else ": train it again, with update --iterations 900"
        what = "denoiser kept" if now > 0 else "denoiser left out"
        say(f"{what}: it explains {now:.2%} of what is held out, {then:.2%} when it was trained{again}")
    print(output)


def tell_training(made) -> None:
    """What a training has to say, on stderr."""
    for name, prior in fp._products(made).items():
        s = prior.summary
        if name:
            say(f"{name}:")
        say(s["found"])
        for line in s["unreadable"]:
            say(f"cannot be read: {line}")
        if s["not_read"]:
            say(f"{s['not_read']} images could not be read")
        if s["repeated"]:
            say(f"{s['repeated']} images repeat the pixels of others: they count once")
        tell_doubts(s["near_duplicates"], s["set_aside"])
        low, high = s["proportions"] or (1, 1)
        if high > 1.1 * low and not prior.settings.tile:
            say(f"warning: images of different proportions (width / height {low:.2f} to {high:.2f}) are "
                "squashed to one: --tiles cuts windows instead")
        depth = f", {prior.settings.bits} bits" if prior.settings.bits else ""
        loss = f", held-out loss {s['loss_start']} -> {s['loss']}" if "loss" in s else ""
        size = f", resized to {fp._size_text(prior.settings.shape)}" if prior.grid[0] != prior.grid[1] else ""
        by = f"{s['held_out']} of them scored held out ({prior.settings.calibration})"
        if prior.settings.tile:
            by = f"{s['windows_trained_on']} windows of them train, {s['held_out']} other images calibrate"
        say(f"{s['images']} images{depth}{size}, {by}; "
            f"{s['iterations']} training steps{loss}; {s['seconds']:.0f} s")
        if prior.roi:
            say(f"looks at {looks_at(prior)}")
        tell_promise(prior)


def load(path: str | os.PathLike, bits: int | None, told: set[str]) -> np.ndarray:
    """fp.load_image; what it warns of is said once and kept in `told`."""
    with silence(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = fp.load_image(path, bits)
    for text in {str(warning.message) for warning in said if issubclass(warning.category, fp.ImageWarning)}:
        if text not in told:
            told.add(text)
            say(f"warning: {text}")
    return image


def judge(prior: fp.Prior | fp.MultiPrior, image: np.ndarray, with_map: bool, told: set[str]) -> fp.Result:
    """Its result; ShapeError where it is not a number. Other proportions are said once and kept in `told`."""
    r = prior.score(image, with_map=with_map)
    own = fp._products(prior).get(r.product or "")
    if own and (text := fp._room("curation").squashed(image.shape, own)) and not any(
            "other proportions" in old for old in told):
        told.add(text)
        fp._log.warning("%s", text)
    if not math.isfinite(r.score) or r.device_map is not None and not np.isfinite(r.anomaly_map).all():
        raise fp.ShapeError("its score or map is not a number")
    return r


def as_row(path: str | os.PathLike, r: fp.Result) -> dict:
    """What --json prints of a result; regions where there is a map."""
    row = {"path": str(path), "score": round(r.score, 4), "p_value": round(r.p_value, 5),
           "verdict": r.verdict}
    row |= {"product": r.product} if r.product else {}
    if r.device_map is not None:
        row |= {"threshold": round(r.threshold, 4),
                "regions": [region._replace(peak=round(region.peak, 3))._asdict() for region in r.regions]}
    return row


def as_line(path: str | os.PathLike, r: fp.Result) -> str:
    """Path, score, p-value, verdict, and the product where there are several; tabs between."""
    cells = [str(path), f"{r.score:.2f}", f"{r.p_value:.4f}", r.verdict, *filter(None, [r.product])]
    return "\t".join(map(fp._printable, cells))


_MOST_TRAITS = 256  # images of a folder that tell its drift, some milliseconds each


def score(paths: list[str], model: Path | None, map_folder: Path | None, mask_folder: Path | None,
          as_json: bool, report: Path | None = None, **options) -> int:
    """A row an image; returns the exit code. What cannot be scored or written is said; the rest goes on."""
    only_one(options.get("fpr"), options.get("threshold"))
    if model is None:
        model = fp.demo_model()
        say(f"no --model given: using the demo model, which knows the washers of examples/ ({model})")
    folders = fp._room("folders")
    found = folders.find_all(paths)
    if str(found):
        say(found)
    anomalies, seen, scores, traits, told, failed = 0, 0, {}, {}, set(), []
    curation = fp._room("curation")

    def refuse(text: str, row: dict) -> None:
        failed.append(text)
        say(f"error: {text}")
        if as_json:
            print(strict_json(row | {"error": text}), flush=True)
    for path, text in found.errors.items():
        refuse(f"{path or repr(path)}: {text}", {"path": path})
    if not found.images:
        return 2
    prior = fp.Prior.load(model, **options)
    for folder in filter(None, (map_folder, mask_folder)):
        folders.check_folder(folder)
    known_images = {key for own in fp._products(prior).values() for key in own.summary.get("trained_on", ())}
    page = fp._room("report").Report(report, prior, model) if report else None
    with page or contextlib.nullcontext(), Bars() as bars:
        for i, (path, name) in enumerate(found.images.items()):
            row = {"path": str(path)}
            try:
                image = load(path, fp._bits(prior), told)
                looked_at = prior.roi.paint(image) if prior.roi else image
                seen += fp.image_key(looked_at) in known_images
                r = judge(prior, image, bool(map_folder or mask_folder or as_json or page), told)
            except (fp.FastPriorError, MemoryError) as e:
                refuse(str(e) if isinstance(e, fp.ImageError) else f"{path}: {str(e) or 'out of memory'}",
                       row)
                continue
            anomalies += r.is_anomaly
            scores.setdefault(r.product, []).append(r.score)
            if len(traits.setdefault(r.product, [])) < _MOST_TRAITS:
                traits[r.product].append(curation.traits(curation.look(looked_at)[None])[0])
            unwritten = ""
            try:
                row = as_row(path, r)
                if page:
                    page.add(path, image, r)
                if map_folder:
                    drawn = overlay(image, r.anomaly_map, r.regions)
                    row["map"] = folders.write_png(map_folder, name, "map", drawn, path)
                if mask_folder:
                    mask = (fp.label_regions(r.anomaly_map) > 0).astype(np.uint8) * 255
                    row["mask"] = folders.write_png(mask_folder, name, "mask", mask, path)
            except (OSError, ValueError, MemoryError) as e:
                unwritten = (f"{path}: scored, but its map or mask cannot be written "
                             f"({getattr(e, 'strerror', None) or e})")
            if not as_json:
                print(as_line(path, r), flush=True)
            elif not unwritten:
                print(strict_json(row), flush=True)
            if unwritten:
                refuse(unwritten, row)
            if len(found.images) > 1:
                bars("scoring", i + 1, len(found.images))
        notes = [f"warning: {text}" for text in told]
        if 2 * seen > len(found.images) > 1:
            notes.append(f"warning: {seen} of {len(found.images)} images were trained on: their scores say "
                         "nothing of new ones")
        for product, own in scores.items():
            known = fp._products(prior).get(product)
            moved = known and curation.drift(own, known.calibration["scores"], known.threshold.value,
                                             np.array(traits[product]), known.summary.get("traits"))
            if moved:
                notes.append("warning: " + f"{product}: " * bool(product) + moved)
        for note in notes[len(told):]:
            say(note)
        if page:
            page.finish(failed, notes)
    if failed and len(found.images) + len(found.errors) > 1:
        say(f"{len(failed)} of {len(found.images) + len(found.errors)} could not be scored, or their maps "
            "not written")
    return 2 if failed else int(anomalies > 0)


def calibrate(good: str, model: Path, output: Path, known_bad: str | None, fpr: float | None,
              threshold: float | None, keep_all: bool, device: str, threads: int | None) -> None:
    only_one(fpr, threshold)
    prior = fp.Prior.load(model, threads=threads, device=device)
    if isinstance(prior, fp.MultiPrior):
        raise fp.FastPriorError(f"{model}: holds {len(prior.priors)} products; calibrate takes a "
                                "model of one")
    found = fp._room("folders").find_good(good)
    bad_files = fp._room("folders").find_bad(known_bad) if known_bad else []
    if both := {*map(os.path.realpath, found.images)} & {*map(os.path.realpath, bad_files)}:
        raise fp.FastPriorError(f"{len(both)} images are good ones and in --known-bad too, as {min(both)}")
    with Bars() as bars:
        prior = prior.calibrate(found, keep_all=keep_all, progress=bars, fpr=fpr, threshold=threshold)
        tried = prior.score_batch(bad_files, with_map=False, errors="return")
    bad = [r.score for r in tried if isinstance(r, fp.Result)]
    unreadable = prior.summary["unreadable"] + [r for r in tried if isinstance(r, Exception)]
    if known_bad and not bad:
        raise fp.ImageError(f"--known-bad: none of {len(tried)} images can be read, the first: {tried[0]}")
    prior.save(output)
    say(found)
    for line in unreadable:
        say(f"left out: {line}")
    tell_doubts(prior.summary["near_duplicates_today"], prior.summary["set_aside_today"])
    tell_promise(prior)
    if known_bad:
        say(f"{len(bad)} bad images from {known_bad}; 'at most' with 95 % confidence, of the proposed one, "
            "which was chosen by looking at these, by a bound that holds for all thresholds at once")
        print("threshold\tfalse alarms\tat most\tmissed")
        aside = prior.summary["held_out_aside"]
        for t, wrong, most, missed, note in trade_off(prior.calibration["scores"], np.array(bad), aside):
            average = "-" if note else f"{wrong:.1%}"  # of a threshold chosen by looking it promises nothing
            print(f"{t:.2f}\t{average}\t{most:.1%}\t{missed:.1%}\t{note}".rstrip())
        say("to use one: fastprior score --threshold, or calibrate --threshold")
    else:
        print(output)


# matplotlib's "inferno" at nine points, interpolated: dark for little, bright for much
INFERNO = np.array([[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51],
                    [249, 140, 10], [249, 201, 50], [252, 255, 164]], np.float64)


def overlay(image: np.ndarray, anomaly_map: np.ndarray, regions=()) -> np.ndarray:
    """Blend an anomaly map into its image and frame regions: uint8 (H, W, 3), (H, W) -> uint8 (H, W, 3).

    The scale is logarithmic and the same for every image: colour begins at 0.3 of the threshold,
    about what a good image reaches somewhere, and is full at 10 times it.
    """
    out = np.empty_like(image)
    rows = max(1, (1 << 20) // image.shape[1])  # strips: the steps between are many times larger
    for part in (slice(y, y + rows) for y in range(0, len(image), rows)):
        strength = np.clip(np.log(np.maximum(anomaly_map[part], 1e-6) / .3) / math.log(10 / .3), 0, 1)
        at = strength * (len(INFERNO) - 1)
        colour = np.stack([np.interp(at, np.arange(len(INFERNO)), INFERNO[:, c]) for c in range(3)], -1)
        alpha = np.clip(strength * 5, 0, .65)[..., None]
        out[part] = np.rint(image[part] * (1 - alpha) + colour * alpha).astype(np.uint8)
    line = max(1, min(image.shape[:2]) // 256)
    for r in regions:
        box = out[r.top:r.bottom, r.left:r.right]
        for edge in (box[:line], box[-line:], box[:, :line], box[:, -line:]):
            edge[...] = 255
    return out


def trade_off(good: np.ndarray, bad: np.ndarray,
              aside: int = 0) -> list[tuple[float, float, float, float, str]]:
    """Thresholds, the false-alarm rate that good scores promise on average and at most, and bad missed.

    aside: good images that were set aside, which count as above any threshold, see `promise`.

    One for each of a few rates, and the one with the smallest sum of both errors: the middle of the widest
    gap between neighbouring scores that reaches it. That one was chosen by looking, so its rate is held by a
    bound for all thresholds at once: Dvoretzky, Kiefer, Wolfowitz, with Massart's constant, 95 %.
    """
    good, bad = np.sort(good), np.sort(bad)
    count = len(good) + aside
    slack = math.sqrt(math.log(1 / .05) / 2 / count)
    rows = []
    for fpr in (.1, .05, .02, .01):
        t = with_aside(fp.conformal_threshold(good, fpr), aside)
        rows.append((t.value, t.expected, t.bound, float(np.mean(bad <= t.value)), ""))
    every = np.unique(np.r_[good, bad])
    middles, gaps = (every[1:] + every[:-1]) / 2, np.diff(every)
    above = count - np.searchsorted(good, middles, side="right")
    wrong = (1 + above) / (1 + count)
    missed = np.searchsorted(bad, middles, side="right") / len(bad)
    total = wrong + missed
    best = max(np.flatnonzero(total <= total.min() + 1e-12), key=lambda i: gaps[i])
    rows.append((float(middles[best]), float(wrong[best]),
                 min(1.0, float(above[best] / count) + slack),
                 float(missed[best]), "proposed"))
    return sorted(set(rows))


def info(model: Path | None, as_json: bool) -> None:
    facts: dict[str, Any] = {"fastprior": fp.__version__, "file": fp.__file__, **machine()}
    try:
        engines = fp._engines("cpu")
        with fp._engine_errors():
            engines.load_kernels()
        facts |= {"backend": "numba (cpu)", "threads": engines.available_threads()}
    except fp.BackendUnavailable as e:
        facts |= {"backend": f"numpy (slow: {e})", "threads": 1}
    try:
        with fp._engine_errors():
            cupy = fp._engines("cuda").import_cupy()
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        facts["cuda"] = f"{name}, CuPy {cupy.__version__}"
    except fp.BackendUnavailable as e:
        facts["cuda"] = f"no: {e}"
    if model:
        made = fp.Prior.load(model)
        facts |= {"model": str(model), "megabytes": round(model.stat().st_size / 1e6, 1),
                  "backbone": made.backbone.name, "grid": "{1}x{0}".format(*made.grid),
                  "features": "integers" if made.backbone.integer else "floats",
                  "channels": sum(made.backbone.channels)}
        for name, prior in fp._products(made).items():
            own = {**dataclasses.asdict(prior.settings), "size": fp._size_text(prior.settings.size),
                   "threshold": round(prior.threshold.value, 4), "looks_at": looks_at(prior),
                   "timesteps": prior.timesteps.tolist(), "calibrated_steps": sorted(prior.calibrations),
                   "denoiser_parameters": sum(a.size for a in (prior.denoiser or {}).values()),
                   **{k: v for k, v in prior.summary.items() if k != "traits"},
                   "trained_on": f"{len(prior.summary.get('trained_on', []))} images",
                   "promise": promise(prior)}
            facts |= {f"{name}: {k}": v for k, v in own.items()} if name else own
    print(strict_json(facts) if as_json else "\n".join(f"{k:20} {v}" for k, v in facts.items()))


class Narration(logging.Handler):
    """What the library logs, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"fastprior: {record.getMessage()}")


def run(build_app: Callable) -> None:
    """The command. It ends with 0, 1 (an anomaly), 2 (an error, in one line) or 130 (interrupted)."""
    code, spoken = 2, None
    try:
        with contextlib.suppress(OSError):  # closed
            spoken = os.dup(2)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # a closed stream is None
                stream.reconfigure(errors="backslashreplace")  # names are any bytes, on any code page
        sys.stdout = sys.stdout or open(os.devnull)  # what is printed there fails, as on a full disk
        logging.getLogger("PIL").addHandler(logging.NullHandler())  # decoders speak by what they raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("once", fp.ImageWarning)
            warnings.showwarning = lambda text, *_: say(f"warning: {text}")
            code = _run(build_app)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BaseException as e:  # the last edge; a SystemExit here is what click makes of a closed pipe
        code = 2
        if "--debug" in sys.argv:
            import traceback
            traceback.print_exc()
        say(f"error: {e}" if isinstance(e, fp.FastPriorError) else "error: cannot write to standard output"
            if isinstance(e, (SystemExit, io.UnsupportedOperation))
             else f"error: {type(e).__name__}: {e} (--debug shows where)")
    if code == 130:
        if spoken is not None:
            os.dup2(spoken, 2)  # it may have come within `silence`
        say("interrupted")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # else Python tries again as it ends, and ends with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(build_app: Callable) -> int:
    try:
        import typer
    except ImportError as e:
        raise fp.BackendUnavailable("the command line needs typer: pip install typer") from e
    for option, value in zip(sys.argv[1:], [*sys.argv[2:], None]):  # a folder "" would be this very one
        if re.fullmatch("--?[a-z][a-z-]*", option) and value == "" or re.fullmatch("--[a-z-]+=", option):
            raise fp.FastPriorError(f"{option.rstrip('=')} is empty: expected a value (is a variable unset?)")
    handler = Narration()
    fp._log.addHandler(handler)
    fp._log.setLevel(logging.INFO)
    try:
        return build_app()(standalone_mode=False) or 0
    except typer.Abort as e:
        raise KeyboardInterrupt from e
    except Exception as e:
        if not hasattr(e, "show"):  # what click says of wrong options
            raise
        e.show()
        return 2
    finally:
        fp._log.removeHandler(handler)
