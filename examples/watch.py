"""Scores what a camera delivers, as it comes: a folder that it writes into, a camera, a video.

    with Watch(fp.Prior.load("part.npz"), "incoming", keep="ng", log="results.jsonl") as stream:
        for seen in stream:
            if seen.row.get("verdict") != "good":
                eject()

What each does when scoring is slower than what comes:

- a folder drops nothing: what waits is counted (`backlog`);
- a camera drops the frames that come while one is scored, and counts them (`dropped`);
- a video is read no faster than it is scored.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np

if "fp" not in globals():
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

PATIENCE = 3.0  # seconds that a file may stay unchanged and unreadable before it is an error
REPORT = 10.0  # seconds between two reports
FORGET = 100_000  # files that have left the folder, remembered


class Frame(NamedTuple):
    """What a source hands on: an image, or why there is none."""
    path: str  # what its row is called
    name: Path  # of what is kept of it, below the folder for that
    owner: str  # no two images share it
    image: np.ndarray | None
    error: str
    began: float  # when the work on it began, of time.monotonic
    done: Callable[[], None]  # to be called when its row is out


class Seen(NamedTuple):
    """An image that was scored, or could not be."""
    row: dict[str, Any]  # as `score --json` prints it, with `time`; `error` where something failed
    image: np.ndarray | None  # uint8 (H, W, 3)
    result: fp.Result | None


class Watch:
    """Scores a stream; use it as a context manager, and iterate: a `Seen` for each image.

    An image counts as handled when the loop comes back for the next one, or the block ends without an
    exception: a folder's image that was not handled is scored again by the next Watch.

    source : a folder, a video file, or the number of a camera
    keep : a folder for anomalies, NAME.ng.png, and their maps, NAME.map.png
    log : a file of JSON lines, a row a line; at `log_bytes` it becomes LOG.1 and a new one begins
    journal : a folder's: the file that remembers which images were scored (default: see `default_journal`)
    every : a folder's: seconds between two looks at it
    with_map : whether rows hold regions, and results maps
    """

    def __init__(self, prior: fp.Prior | fp.MultiPrior, source: str | os.PathLike | int, *,
                 keep: str | os.PathLike | None = None, log: str | os.PathLike | None = None,
                 log_bytes: int = 10_000_000, journal: str | os.PathLike | None = None, every: float = .5,
                 with_map: bool = True):
        self.prior, self.with_map = prior, with_map or keep is not None
        self.keep = None if keep is None else Path(keep)
        self.count = self.anomalies = self.failed = 0
        self.told: set[str] = set()  # what was said of images and need not be said again
        self.stopped = False
        self._busy, self._last = 0.0, None
        is_folder = not isinstance(source, int) and os.path.isdir(source)
        if journal is not None and not is_folder:
            raise fp.FastPriorError("a journal is for a folder; a camera or video has none")
        if self.keep is not None and is_folder and Path(os.path.realpath(keep)).is_relative_to(
                os.path.realpath(source)):
            raise fp.FastPriorError(f"{keep}: lies in the folder that is watched, so what is kept would be "
                                    "scored; choose a folder outside")
        paths = [os.path.realpath(p) for p in (journal, log) if p is not None]
        if len({*paths}) < len(paths):
            raise fp.FastPriorError(f"{log}: is to be log and journal; give each a file of its own")
        if isinstance(source, int):
            self.source = Camera(source)
        elif is_folder:
            self.source = Folder(Path(source), fp._bits(prior), Path(journal or default_journal(source)),
                                 every)
        else:
            self.source = Video(Path(source))
        with contextlib.ExitStack() as opened:
            opened.enter_context(contextlib.closing(self.source))
            if self.keep is not None:
                fp._room("folders").check_folder(self.keep)
            self.log = log and opened.enter_context(contextlib.closing(Log(Path(log), log_bytes)))
            height, width = prior.roi.mask.shape if prior.roi else prior.settings.shape
            one = fp._room("tiles").window_prior(prior) if prior.settings.tile else prior
            one.score(np.zeros((height, width, 3), np.uint8))  # compile, before frames are dropped for it
            self._opened = opened.pop_all()
        self._began = self._reported = time.monotonic()
        self._then = 0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._handled()
        self._opened.close()
        fp._log.info("%s", self.summary())

    def stop(self) -> None:
        """The loop ends after the image in hand. May be called by a signal handler or another thread."""
        self.stopped = True

    @property
    def backlog(self) -> int:
        """Images of a folder that wait, with the one in hand."""
        return self.source.backlog

    @property
    def dropped(self) -> int:
        """Frames of a camera that came while another was scored."""
        return self.source.dropped

    def __iter__(self) -> Iterator[Seen]:
        for frame in self.source.frames(lambda: self.stopped):
            if frame is not None:
                seen = self._score(frame)
                self._busy += time.monotonic() - frame.began
                self._last = frame
                yield seen
                self._handled()
            now = time.monotonic()
            if now - self._reported >= REPORT:
                if self.count > self._then or self.backlog:
                    rate = (self.count - self._then) / (now - self._reported)
                    fp._log.info("%s; now %.1f a second", self.summary(), rate)
                self._reported, self._then = now, self.count

    def _handled(self) -> None:
        if self._last is not None:
            self._last.done()
            self._last = None

    def _score(self, frame: Frame) -> Seen:
        console, r = fp._room("console"), None
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        row: dict[str, Any] = {"path": frame.path, "time": now}
        self.count += 1
        try:
            if frame.image is None:
                raise fp.ImageError(frame.error)
            r = console.judge(self.prior, frame.image, self.with_map, self.told)
            row |= console.as_row(frame.path, r)
            self.anomalies += r.is_anomaly
        except (fp.FastPriorError, MemoryError) as e:
            r, text = None, str(e) or "out of memory"
            row["error"] = text if isinstance(e, fp.ImageError) else f"{frame.path}: {text}"
        unwritten = []
        if r is not None and r.is_anomaly and self.keep is not None:
            try:
                drawn = console.overlay(frame.image, r.anomaly_map, r.regions)
                for kind, pixels in (("ng", frame.image), ("map", drawn)):
                    row[kind] = fp._room("folders").write_png(self.keep, frame.name, kind, pixels,
                                                              Path(frame.owner))
            except (OSError, ValueError, MemoryError) as e:
                unwritten.append(f"it or its map cannot be kept ({getattr(e, 'strerror', None) or e})")
        if self.log:
            try:
                self.log.write(row)
            except OSError as e:
                unwritten.append(f"{self.log.path} cannot be written ({e.strerror or e})")
        if unwritten:
            row["error"] = "; ".join([row.get("error", f"{frame.path}: scored"), *unwritten])
        self.failed += "error" in row
        return Seen(row, frame.image, r)

    def summary(self) -> str:
        """What was done so far, in one line."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        each = f", {1e3 * self._busy / self.count:.0f} ms of work each" if self.count else ""
        return (f"{self.count} images in {seconds:.0f} s ({self.count / seconds:.1f} a second{each}): "
                f"{self.anomalies} anomalies, {self.failed} errors; {self.source.pressure()}")


# ------------------------------------------------------------------------------------------------
# Sources: frames(stopped) yields a Frame, or None now and then while there is nothing to do
# ------------------------------------------------------------------------------------------------

class Waiting(NamedTuple):
    """A file of a folder that is still to be scored."""
    name: Path
    state: tuple[int, int]  # size, time of change in ns
    since: float  # when it was first seen so
    stable: bool  # seen so twice
    tried: bool  # it could not be read


class Folder:
    """Image files that appear under a folder (by the rules of folders.py), whole ones only, each once.

    Whole: size and time of change are the same at two looks, and are still when it has been read. One that
    cannot be read is tried again when it changes, and once more after `PATIENCE` seconds without a change.
    """
    dropped = 0

    def __init__(self, folder: Path, bits: int | None, journal: Path, every: float):
        self.folder, self.bits, self.every = folder, bits, every
        self.journal = Journal(journal)
        self.waiting: dict[Path, Waiting] = {}
        self.told: set[str] = set()  # warnings
        self.troubles: dict[str, str] = {}  # folders and links that cannot be read
        self.looked = False

    def close(self) -> None:
        self.journal.close()

    @property
    def backlog(self) -> int:
        return len(self.waiting)

    def pressure(self) -> str:
        return f"{self.backlog} waiting, none dropped"

    def look(self) -> None:
        """What is there and still to be scored, into `waiting`."""
        found, now, before = fp._room("folders").Found(), time.monotonic(), self.waiting
        found.folder(self.folder)
        for path, text in found.errors.items():
            if self.troubles.get(path) != text:
                fp._log.warning("%s: %s", path, text)
        self.troubles, self.waiting, known = found.errors, {}, 0
        for path, name in found.images.items():
            try:
                state = _state(path)
            except OSError:  # it has left
                continue
            if self.journal.seen.get(str(name)) == state:
                known += 1
                continue
            old = before.get(path)
            self.waiting[path] = (old._replace(stable=True) if old and old.state == state
                                  else Waiting(name, state, now, False, False))
        if known and not self.looked:
            fp._log.info("%d images were scored before, by whatever model, and are not again (so says %s: "
                         "delete it, or name another by --journal)", known, self.journal.path)
        self.looked = True
        self.journal.tidy({str(name) for name in found.images.values()})

    def ready(self) -> list[Path]:
        """Whole files, the oldest first."""
        now = time.monotonic()
        return sorted((path for path, w in self.waiting.items()
                       if w.stable and (not w.tried or now - w.since >= PATIENCE)),
                      key=lambda path: (self.waiting[path].state[1], path))

    def frames(self, stopped: Callable[[], bool]) -> Iterator[Frame | None]:
        queue, looked, rest = [], -1e9, 0.0
        while not stopped():
            if time.monotonic() - looked >= rest:
                begin = time.monotonic()
                self.look()
                queue, looked = self.ready()[::-1], time.monotonic()
                rest = max(self.every, 2 * (looked - begin))  # a large folder is not looked at all the time
            frame = self.read(queue.pop()) if queue else None
            yield frame
            if not queue:
                _rest(looked + rest, stopped)

    def read(self, path: Path) -> Frame | None:
        """One file; None where it has changed, left, or may still become readable."""
        begin, w, image, error = time.monotonic(), self.waiting[path], None, ""
        try:
            image = fp._room("console").load(path, self.bits, self.told)
        except (fp.FastPriorError, MemoryError) as e:
            error = str(e) or f"{path}: out of memory"
        try:
            changed = _state(path) != w.state
        except OSError:
            changed = True
        if changed:
            return None
        if error and time.monotonic() - w.since < PATIENCE:
            self.waiting[path] = w._replace(tried=True)
            return None

        def done() -> None:
            self.waiting.pop(path, None)
            self.journal.add(str(w.name), w.state)
        return Frame(str(path), w.name, f"{os.path.abspath(path)}@{w.state[1]}", image, error, begin, done)


def _state(path: Path) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def _rest(until: float, stopped: Callable[[], bool]) -> None:
    while not stopped() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, .1))


def _opencv():
    try:
        import cv2
    except ImportError as e:
        raise fp.BackendUnavailable("cameras and videos need OpenCV: pip install 'fastprior[camera]'") from e
    return cv2


class Video:
    """The frames of a video file, every one, in order."""
    backlog = dropped = 0

    def __init__(self, path: Path):
        if not path.is_file():
            raise fp.FastPriorError(f"{path}: no such folder or video")
        cv2 = _opencv()
        with fp._room("console").silence():
            self.capture = cv2.VideoCapture(str(path))
        if not self.capture.isOpened():
            self.capture.release()
            raise fp.FastPriorError(f"{path}: no video that OpenCV can read")
        self.path, self.named = path, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def close(self) -> None:
        self.capture.release()

    def pressure(self) -> str:
        return "none dropped"

    def frames(self, stopped: Callable[[], bool]) -> Iterator[Frame]:
        there, n = True, 0
        while there and not stopped():
            begin, n = time.monotonic(), n + 1
            there, frame = self.capture.read()
            image, error, missing = _rgb(frame) if there else None, "", self.named - (n - 1)
            if not there and missing > 0:
                error = f"{self.path}: ended after {n - 1} of the {self.named} frames that its header names"
                if missing <= max(2, self.named // 100):  # in some formats that is an estimate
                    fp._log.warning("%s", error)
                    return
            if there or error:
                yield Frame(f"{self.path}#{n}", Path(self.path.name) / f"{n:06}",
                            f"{os.path.abspath(self.path)}#{n}", image, error, begin, lambda: None)


class Camera:
    """The newest frame of a camera, always; those that came and went while one was scored are counted."""
    backlog = 0

    def __init__(self, number: int):
        cv2 = _opencv()
        with fp._room("console").silence():
            self.capture = cv2.VideoCapture(number)
        if not self.capture.isOpened():
            self.capture.release()
            raise fp.FastPriorError(f"camera {number}: cannot be opened")
        self.number, self.came, self.dropped = number, 0, 0
        self.newest, self.ended = None, False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._grab, daemon=True)

    def close(self) -> None:
        self.ended = True
        if self.thread.ident:
            self.thread.join(5)  # a camera may have stopped within a read
        if not self.thread.is_alive():
            self.capture.release()
        with self.changed:
            self.dropped += self.newest is not None
            self.newest = None

    def pressure(self) -> str:
        return f"{self.dropped} of {self.came} frames dropped"

    def _grab(self) -> None:
        try:
            while not self.ended:
                there, frame = self.capture.read()
                if not there:
                    break
                with self.changed:
                    self.came += 1
                    self.dropped += self.newest is not None
                    self.newest = self.came, datetime.datetime.now(), frame
                    self.changed.notify()
        finally:  # whatever a driver raises: nobody waits for ever
            with self.changed:
                self.ended = True
                self.changed.notify()

    def frames(self, stopped: Callable[[], bool]) -> Iterator[Frame | None]:
        if not self.thread.ident:
            self.thread.start()
        while not stopped():
            with self.changed:
                if self.newest is None and not self.ended:
                    self.changed.wait(.1)
                newest, self.newest = self.newest, None
            if newest is None:
                if self.ended:
                    raise fp.FastPriorError(f"camera {self.number}: gives no more frames")
                yield None
                continue
            begin, (n, when, frame) = time.monotonic(), newest
            name = f"{when:%Y%m%dT%H%M%S}_{n:06}"
            yield Frame(f"camera {self.number}#{n}", Path(f"camera{self.number}") / name,
                        f"camera {self.number} {name}", _rgb(frame), "", begin, lambda: None)


def _rgb(frame: np.ndarray) -> np.ndarray:
    """OpenCV's order of colours, BGR, turned."""
    return np.ascontiguousarray(frame[:, :, ::-1] if frame.ndim == 3 else np.repeat(frame[:, :, None], 3, 2))


# ------------------------------------------------------------------------------------------------
# Files that remember
# ------------------------------------------------------------------------------------------------

def default_journal(folder: str | os.PathLike) -> Path:
    """A file for this folder in ~/.local/state/fastprior (or XDG_STATE_HOME)."""
    import hashlib
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return home / "fastprior" / f"watch-{key}.jsonl"


class Journal:
    """Which files were scored, with size and time of change: a JSON line each, only ever appended to.

    A line that was cut short by a crash is ignored: its image is scored again, never lost.
    """

    def __init__(self, path: Path):
        self.path, self.seen, self.lines = path, {}, 0
        self.warned = False
        fp._room("folders").check_kind(path, "file of JSON lines")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+")
            _lock(self.file, path)
            self.file.seek(0)
            data = self.file.read()
            if data and not data.endswith(b"\n"):
                self.file.write(b"\n")
                self.file.flush()
        except OSError as e:
            raise fp.FastPriorError(f"{path}: the journal cannot be written ({e.strerror or e})") from e
        for line in data.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._note(entry["path"], (int(entry["size"]), int(entry["mtime_ns"])))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `add` has said so
            self.file.close()

    def _note(self, name: str, state: tuple[int, int]) -> None:
        self.seen.pop(name, None)  # the newest last
        self.seen[name] = state
        self.lines += 1

    def add(self, name: str, state: tuple[int, int]) -> None:
        self._note(name, state)
        try:
            self.file.write(_entry(name, state))
            self.file.flush()  # what a full disk refuses is tried again with the next
        except OSError as e:
            if not self.warned:
                fp._log.warning("%s: the journal cannot be written (%s): after a restart images will be "
                                "scored again", self.path, e.strerror or e)
            self.warned = True

    def tidy(self, there: set[str]) -> None:
        """Forget files that have long left the folder. Not all that have: it may be a share that was lost."""
        if self.lines <= 2 * (len(there) + FORGET):
            return
        gone = [name for name in self.seen if name not in there]
        for name in gone[:max(0, len(gone) - FORGET)]:
            del self.seen[name]
        temporary = self.path.with_name(f".{os.urandom(8).hex()}.tmp")
        try:
            file = open(temporary, "xb+")
            _lock(file, temporary)
            file.write(b"".join(_entry(*item) for item in self.seen.items()))
            file.flush()
            os.replace(temporary, self.path)
        except OSError:  # the long one serves too
            self.lines = len(self.seen)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        self.close()
        self.file, self.lines = file, len(self.seen)


def _entry(name: str, state: tuple[int, int]) -> bytes:
    return json.dumps({"path": name, "size": state[0], "mtime_ns": state[1]}).encode() + b"\n"


def _lock(file, path: Path) -> None:
    """Two watches of one folder would score everything twice."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise fp.FastPriorError(f"{path}: another watch uses this journal; give one of its own "
                                "(--journal) or stop the other") from e
    except OSError:  # a file system without locks
        pass


class Log:
    """JSON lines for other programs. At `most` bytes it is renamed to PATH.1, in place of the one before.

    A reader sees whole lines: each is one write, and what a full disk cut short is taken back.
    """

    def __init__(self, path: Path, most: int):
        self.path, self.most = Path(os.path.realpath(path)), most  # a link stays a link
        try:
            fp._room("folders").check_kind(path, "file of JSON lines")
            self._open()
        except OSError as e:
            raise fp.FastPriorError(f"{path}: the log cannot be written ({e.strerror or e})") from e

    def _open(self) -> None:
        self.file = open(self.path, "ab+", buffering=0)
        self.size = self.file.seek(0, os.SEEK_END)
        if self.size:
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # of a crash
                self.size += self.file.write(b"\n")

    def close(self) -> None:
        self.file.close()

    def write(self, row: dict) -> None:
        """OSError where it cannot be."""
        line = fp._room("console").strict_json(row).encode() + b"\n"
        if self.size and self.size + len(line) > self.most and not self.file.closed:
            self.file.close()
            try:
                os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))
            except OSError as e:
                fp._log.warning("%s cannot be renamed, so it grows on: %s", self.path, e.strerror)
                self.most = math.inf
        if self.file.closed:  # also where the last time failed between the two
            self._open()
        try:
            if self.file.write(line) < len(line):
                raise OSError(28, "No space left on device")
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)
            raise
        self.size += len(line)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def watch(source: str | None, camera: int | None, model: Path, as_json: bool, keep: Path | None,
          log: Path | None, journal: Path | None, every: float, **options) -> int:
    """Rows until the video ends, or a signal comes; then the image in hand is finished, and nothing lost."""
    console = fp._room("console")
    if (source is None) == (camera is None):
        raise fp.FastPriorError("give a folder, a video, or --camera NUMBER: one of them")
    prior = fp.Prior.load(model, **options)
    with Watch(prior, source if camera is None else camera, keep=keep, log=log, journal=journal, every=every,
               with_map=as_json or log is not None) as stream, _ended_by_signals(stream):
        for seen in stream:
            if "error" in seen.row:
                console.say(f"error: {seen.row['error']}")
            if as_json:
                print(console.strict_json(seen.row), flush=True)
            elif seen.result is not None:
                print(console.as_line(seen.row["path"], seen.result), flush=True)
    if stream.stopped:
        raise KeyboardInterrupt
    return 2 if stream.failed else int(stream.anomalies > 0)


@contextlib.contextmanager
def _ended_by_signals(stream: Watch):
    """Ctrl-C and a service's end stop the stream after the image in hand; a second one at once."""
    def stop(*_):
        if stream.stopped:
            raise KeyboardInterrupt
        stream.stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler or signal.SIG_DFL)
