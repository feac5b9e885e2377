"""Streams: whole files once each, restarts, interrupts, rotation, videos, and what is dropped or waits."""
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import fastprior as fp
from conftest import ROOT

watch = fp._room("watch")
COMMAND = [sys.executable, str(ROOT / "fastprior.py"), "watch"]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder to watch; the default journal lies elsewhere; patience is short."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(watch, "PATIENCE", .2)
    (tmp_path / "in").mkdir()
    return tmp_path


@pytest.fixture
def files(washers):
    return fp.find_images(washers / "test")


def put(folder, sources):
    for i, source in enumerate(sources):
        shutil.copy(source, folder / f"{i:03}.png")


def seen_of(stream, count=None):
    """The rows until nothing has come for .4 seconds."""
    rows, last = [], [time.monotonic()]
    threading.Thread(target=_stop_when_idle, args=(stream, last), daemon=True).start()
    for seen in itertools.islice(stream, count):
        rows.append(seen)
        last[0] = time.monotonic()
    return rows


def _stop_when_idle(stream, last):
    while time.monotonic() - last[0] < .4:
        time.sleep(.02)
    stream.stop()


class Slow:
    """A model that takes its time."""

    def __init__(self, prior, seconds):
        self.prior, self.seconds, self.settings, self.calls = prior, seconds, prior.settings, 0
        self.roi = prior.roi

    def score(self, image, **how):
        self.calls += 1
        time.sleep(self.seconds if self.calls > 1 else 0)  # the first compiles
        return self.prior.score(image, **how)


def test_a_file_is_taken_when_it_is_whole(places, files):
    folder = watch.Folder(places / "in", None, places / "journal", every=0)
    data, path = files[0].read_bytes(), places / "in" / "a.png"
    path.write_bytes(data[:len(data) // 2])
    folder.look()
    assert folder.ready() == [] and folder.backlog == 1  # seen once
    folder.look()
    assert folder.ready() == [path] and folder.read(path) is None  # unchanged, but cannot be read
    folder.look()
    assert folder.ready() == []  # and is not tried again at once
    path.write_bytes(data)
    folder.look()
    assert folder.ready() == []
    folder.look()
    frame = folder.read(*folder.ready())
    assert not frame.error and (frame.image == fp.load_image(files[0])).all()
    frame.done()
    folder.look()
    folder.look()
    assert folder.backlog == 0 and folder.ready() == []
    folder.close()


def test_what_changes_while_it_is_read_waits(places, files, monkeypatch):
    folder = watch.Folder(places / "in", None, places / "journal", every=0)
    path = places / "in" / "a.png"
    shutil.copy(files[0], path)
    folder.look()
    folder.look()
    load = fp._room("console").load

    def loading(file, *how):
        image = load(file, *how)
        os.utime(file, (1, 1))
        return image
    monkeypatch.setattr(fp._room("console"), "load", loading)
    assert folder.read(path) is None
    monkeypatch.undo()
    path.unlink()
    assert folder.read(path) is None  # it left
    folder.look()
    assert folder.backlog == 0
    folder.close()


def test_rows_errors_replaced_files_and_a_restart(places, files, trained):
    folder = places / "in"
    put(folder, files[:3])
    (folder / "sub").mkdir()
    shutil.copy(files[-1], folder / "sub" / "deep.jpg")  # PNG by content
    (folder / "broken.png").write_bytes(files[0].read_bytes()[:300])
    for name in (".hidden.png", "000.png.map.png", "notes.txt", "half.png.part"):
        shutil.copy(files[0], folder / name)
    with watch.Watch(trained, folder, every=.02) as stream:
        rows = {os.path.relpath(s.row["path"], folder): s for s in seen_of(stream)}
        assert stream.backlog == 0 and (stream.count, stream.failed) == (5, 1)
    assert set(rows) == {"000.png", "001.png", "002.png", "sub/deep.jpg", "broken.png"}
    for i in range(3):
        want, got = trained.score(files[i]), rows[f"00{i}.png"]
        assert got.row["score"] == round(want.score, 4) and got.row["verdict"] == want.verdict
        assert got.result.score == want.score and len(got.row["regions"]) == len(want.regions)
    assert "broken.png: not a readable image" in rows["broken.png"].row["error"]
    # again: nothing; then a replaced one, one that is mended, a new one
    with watch.Watch(trained, folder, every=.02) as stream:
        assert seen_of(stream) == []
        put(folder, [files[5]])
        shutil.copy(files[1], folder / "broken.png")
        os.replace(shutil.copy(files[2], folder / ".x.tmp"), folder / "new.png")
        stream.stopped = False
        rows = {os.path.basename(s.row["path"]): s.row for s in seen_of(stream)}
    assert set(rows) == {"000.png", "broken.png", "new.png"}
    assert rows["000.png"]["score"] == round(trained.score(files[5]).score, 4)


def test_a_program_watches_too(places, files, model_file):
    """As README says it, from a checkout."""
    shutil.copy(files[0], places / "in" / "a.png")
    code = f"""if True:
        import fastprior as fp
        from examples import watch
        with watch.Watch(fp.Prior.load({str(model_file)!r}), {str(places / "in")!r}) as stream:
            for seen in stream:
                print(seen.row["path"], seen.row["verdict"])
                stream.stop()"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(str(places / "in" / "a.png ")) and done.stderr == "", done


def test_what_was_not_handled_comes_again(places, files, trained):
    put(places / "in", files[:4])
    handled = []
    with pytest.raises(ZeroDivisionError), watch.Watch(trained, places / "in", every=.02) as stream:
        for seen in stream:
            if len(handled) == 2:
                1 / 0
            handled.append(os.path.basename(seen.row["path"]))
    with watch.Watch(trained, places / "in", every=.02) as stream:
        for seen in stream:
            handled.append(os.path.basename(seen.row["path"]))
            break  # it was handled: the block ends well
    journal = watch.default_journal(places / "in")
    with watch.Watch(trained, places / "in", every=.02) as stream:
        handled += [os.path.basename(s.row["path"]) for s in seen_of(stream)]
    assert handled == ["000.png", "001.png", "002.png", "003.png"]
    data = journal.read_bytes()
    journal.write_bytes(data[:-9])  # a crash amid a line
    with watch.Watch(trained, places / "in", every=.02) as stream:
        assert [os.path.basename(s.row["path"]) for s in seen_of(stream)] == ["003.png"]
    entries = [json.loads(line)["path"] for line in journal.read_bytes().splitlines()
               if line.endswith(b"}")]
    assert entries == ["000.png", "001.png", "002.png", "003.png"]


def test_a_share_that_is_lost_for_a_while(places, files, trained, caplog):
    put(places / "in", files[:2])
    with watch.Watch(trained, places / "in", every=.02) as stream:
        assert len(seen_of(stream)) == 2
        (places / "in").rename(places / "away")
        stream.stopped = False
        assert seen_of(stream) == []
        (places / "away").rename(places / "in")
        shutil.copy(files[3], places / "in" / "new.png")
        stream.stopped = False
        assert [os.path.basename(s.row["path"]) for s in seen_of(stream)] == ["new.png"]
    assert sum("cannot be read" in r.getMessage() for r in caplog.records) == 1  # said once


def test_the_journal_forgets_the_oldest_that_left(places, monkeypatch):
    monkeypatch.setattr(watch, "FORGET", 3)
    with contextlib.closing(watch.Journal(places / "j")) as journal:
        for i in range(12):
            journal.add(f"{i}\udcff", (i, i))
        journal.tidy({"0\udcff"})
        journal.add("new", (1, 2))
    want = {"0\udcff": (0, 0), **{f"{i}\udcff": (i, i) for i in (9, 10, 11)}, "new": (1, 2)}
    assert journal.seen == want
    with contextlib.closing(watch.Journal(places / "j")) as journal:
        assert journal.seen == want and len((places / "j").read_bytes().splitlines()) == 5
        if sys.platform != "win32":
            with pytest.raises(fp.FastPriorError, match="another watch"):
                watch.Journal(places / "j")
    assert [p.name for p in places.iterdir() if p.name.startswith(".")] == []


def test_the_log_rotates_and_holds_whole_lines(places, monkeypatch):
    path = places / "results.jsonl"
    path.write_bytes(b'{"n": -1}\n{"n": ')  # of a crash
    with contextlib.closing(watch.Log(path, 500)) as log:
        for n in range(100):
            log.write({"n": n, "text": "x" * (n % 40)})
            parts = [p.read_bytes() for p in (places / "results.jsonl.1", path) if p.exists()]
            assert all(p.endswith(b"\n") and len(p) <= 500 for p in parts)
            last = [json.loads(line)["n"] for part in parts for line in part.splitlines()
                    if line != b'{"n": ']
            assert last == list(range(last[0], n + 1)) and (n < 20 or len(last) > 6)

        class Full:
            def __init__(self, file):
                self.file = file

            def write(self, line):
                return self.file.write(line[:5])

            def __getattr__(self, name):
                return getattr(self.file, name)
        before, log.file = path.read_bytes(), Full(log.file)
        with pytest.raises(OSError, match="No space"):
            log.write({"n": 1})
        assert path.read_bytes() == before


def test_anomalies_are_kept_with_their_maps(places, files, trained, monkeypatch):
    good, *_, bad = sorted(files, key=lambda f: trained.score(f).score)
    assert trained.score(bad).is_anomaly and not trained.score(good).is_anomaly
    (places / "in" / "a").mkdir()
    shutil.copy(bad, places / "in" / "a" / "1.png")
    shutil.copy(good, places / "in" / "2.png")
    log = places / "log.jsonl"
    how = {"every": .02, "keep": places / "ng", "log": log, "with_map": False}
    with watch.Watch(trained, places / "in", **how) as stream:
        rows = {os.path.basename(s.row["path"]): s.row for s in seen_of(stream)}
        Image.fromarray(fp.load_image(bad)[::-1]).save(places / "in" / "a" / "1.png")
        stream.stopped = False
        again, = seen_of(stream)

        def full(*_):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(fp._room("folders"), "write_png", full)
        shutil.copy(bad, places / "in" / "3.png")
        stream.stopped = False
        unkept, = seen_of(stream)
    row = rows["1.png"]
    assert "ng" not in rows["2.png"] and row["ng"] == str(places / "ng" / "a" / "1.png.ng.png")
    assert (fp.load_image(row["ng"]) == fp.load_image(bad)).all()
    with Image.open(row["map"]) as drawn:
        assert drawn.size == (96, 96)
    assert again.row["ng"] != row["ng"] and (fp.load_image(again.row["ng"]) == fp.load_image(bad)[::-1]).all()
    assert unkept.result.is_anomaly
    assert "scored; it or its map cannot be kept (No space" in unkept.row["error"]
    assert stream.failed == 1
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert logged[:3] == [*rows.values(), again.row] and len(logged) == 4


def test_a_slow_model_leaves_a_backlog(places, files, trained, monkeypatch, caplog):
    monkeypatch.setattr(watch, "REPORT", .1)
    put(places / "in", files[:6])
    waiting = []
    with caplog.at_level("INFO", "fastprior"), watch.Watch(Slow(trained, .05), places / "in",
                                                           every=.02) as stream:
        for _ in stream:
            waiting.append(stream.backlog)
            if len(waiting) == 3:
                shutil.copy(files[0], places / "in" / "late.png")
            if len(waiting) == 7:
                stream.stop()
    assert waiting[:3] == [6, 5, 4] and waiting[-1] == 1 and sum(waiting) > 21  # the late one was counted
    reports = [r.getMessage() for r in caplog.records if "waiting, none dropped" in r.getMessage()]
    assert len(reports) > 2 and "; now " in reports[0] and reports[-1].startswith("7 images in ")
    assert reports[-1].endswith("0 errors; 0 waiting, none dropped")


class FakeCamera:
    """OpenCV's interface: a frame every 5 ms, `frames` of them; each tells its number by its first pixel."""
    frames = 60

    def __init__(self, number):
        self.number, self.n = number, 0

    def isOpened(self):
        return self.number == 0

    def release(self):
        pass

    def read(self):
        time.sleep(.005)
        self.n += 1
        frame = np.zeros((96, 96, 3), np.uint8)
        frame[..., 0] = self.n  # blue
        return (True, frame) if self.n <= self.frames else (False, None)


@pytest.fixture
def fake_camera(monkeypatch):
    class OpenCV:
        VideoCapture = FakeCamera
    monkeypatch.setattr(watch, "_opencv", lambda: OpenCV)


def test_a_camera_drops_and_counts(trained, fake_camera):
    numbers = []
    with pytest.raises(fp.FastPriorError, match="camera 0: gives no more frames"):
        with watch.Watch(Slow(trained, .02), 0) as stream:
            for seen in stream:
                number = int(seen.row["path"].split("#")[1])
                assert (seen.image[0, 0] == [0, 0, number]).all()  # RGB, and the frame that it says
                numbers.append(number)
    assert numbers == sorted(set(numbers)) and stream.source.came == 60
    assert stream.dropped == 60 - len(numbers) > 20 and stream.count == len(numbers) > 3
    assert f"{stream.dropped} of 60 frames dropped" in stream.summary()
    with pytest.raises(fp.FastPriorError, match="camera 1: cannot be opened"):
        watch.Watch(trained, 1)


def test_a_stopped_camera_has_counted_every_frame(trained, fake_camera):
    with watch.Watch(Slow(trained, .02), 0, with_map=False) as stream:
        for seen in stream:
            assert "regions" not in seen.row
            if stream.count == 3:
                break
    assert not stream.source.thread.is_alive() and stream.source.came == 3 + stream.dropped


def test_a_video_drops_nothing(places, files, model_file, trained):
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is the extra `camera`")
    path = places / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 96))
    for file in files:
        writer.write(fp.load_image(file)[..., ::-1].copy())
    writer.release()
    with watch.Watch(Slow(trained, .02), path) as stream:
        seen = list(stream)
    assert [s.row["path"] for s in seen] == [f"{path}#{n}" for n in range(1, len(files) + 1)]
    assert stream.dropped == 0
    for file, s in zip(files, seen):
        assert np.abs(s.image.astype(int) - fp.load_image(file)).mean() < 8  # RGB, but for JPEG's loss
        assert s.result.score == trained.score(s.image).score
    done = subprocess.run([*COMMAND, path, "-m", model_file, "--keep", places / "ng"], capture_output=True,
                          text=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [r[0] for r in rows] == [s.row["path"] for s in seen]
    assert [float(r[1]) for r in rows] == pytest.approx([s.result.score for s in seen], abs=.006)
    anomalies = [s.result.is_anomaly for s in seen]
    assert done.returncode == int(any(anomalies)) and "none dropped" in done.stderr
    assert len(list((places / "ng" / "v.avi").iterdir())) == 2 * sum(anomalies)
    (places / "cut.avi").write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    done = subprocess.run([*COMMAND, places / "cut.avi", "-m", model_file, "--json"], capture_output=True,
                          text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2 and 2 < len(rows) < 9 and not any("error" in row for row in rows[:-1])
    assert f"ended after {len(rows) - 1} of the {len(files)} frames" in rows[-1]["error"]
    (places / "text.avi").write_text("no video")
    done = subprocess.run([*COMMAND, places / "text.avi", "-m", model_file], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {places / 'text.avi'}: no video that OpenCV can read\n"


@pytest.mark.parametrize("where", ["judge", "as_line"])
def test_an_interrupt_while_an_image_is_in_hand(places, files, model_file, monkeypatch, capsys, where):
    """The signal comes within its scoring, or before its row is out: it is scored, printed and noted."""
    put(places / "in", files[:5])
    console, calls = fp._room("console"), []
    real = getattr(console, where)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(console, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch.watch(str(places / "in"), None, model_file, False, None, places / "log", None, .02)
    rows = [os.path.basename(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    journal = [json.loads(e)["path"] for e in watch.default_journal(places / "in").read_text().splitlines()]
    logged = [os.path.basename(json.loads(r)["path"]) for r in (places / "log").read_text().splitlines()]
    assert rows == journal == logged == ["000.png", "001.png", "002.png"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_control_c_loses_no_row(places, files, model_file):
    for i in range(300):
        os.link(files[i % 4], places / "in" / f"{i:03}.png")
    paths = []
    command = [*COMMAND, str(places / "in"), "-m", str(model_file), "--json", "--every", ".05", "--log",
               str(places / "log.jsonl")]
    for round_ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            rows = []
            for line in child.stdout:
                rows.append(json.loads(line))
                if len(rows) == 20 and not round_:
                    child.send_signal(signal.SIGINT)
                if len(paths) + len(rows) == 300:
                    child.send_signal(signal.SIGTERM)
            error = child.stderr.read()
        assert child.returncode == 130 and "Traceback" not in error, error
        assert error.endswith("interrupted\n") and f": {len(rows)} images in" in error
        paths += [r["path"] for r in rows]
        journal = watch.default_journal(places / "in").read_text().splitlines()
        assert [str(places / "in" / json.loads(e)["path"]) for e in journal] == paths
        assert [json.loads(r)["path"] for r in (places / "log.jsonl").read_text().splitlines()] == paths
        assert (len(paths) == 300) == bool(round_)
    assert len(set(paths)) == 300


def test_a_log_that_cannot_be_renamed_grows_on(places, caplog):
    path = places / "results.jsonl"
    (places / "results.jsonl.1" / "in the way").mkdir(parents=True)
    with contextlib.closing(watch.Log(path, 300)) as log:
        for n in range(60):
            log.write({"n": n, "text": "x" * 20})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == list(range(60))
    assert caplog.text.count("cannot be renamed") == 1


def test_a_log_that_is_a_link_stays_one(places):
    (places / "disk").mkdir()
    link, path = places / "results.jsonl", places / "disk" / "log.jsonl"
    link.symlink_to(path)
    with contextlib.closing(watch.Log(link, 300)) as log:
        for n in range(30):
            log.write({"n": n, "text": "x" * 20})
    assert link.is_symlink() and path.is_file() and path.with_name("log.jsonl.1").is_file()


@pytest.mark.parametrize("tile", [64, 96])
def test_a_model_of_windows_watches(places, caplog, tile):
    rng = np.random.default_rng(0)
    webs = [rng.integers(90, 160, (96, 200, 3)).astype(np.uint8) for _ in range(20)]
    prior = fp.fit(webs, tile=tile, size=64, iterations=0, copies=0)
    with watch.Watch(prior, places / "in"):
        assert "windows" not in caplog.text


def test_what_cannot_be_watched_is_said(places, trained, monkeypatch, model_file, files):
    refused = [((places / "none",), {}, "no such folder or video"),
               ((places / "in",), {"keep": places / "in" / "ng"}, "lies in the folder that is watched"),
               ((places / "in",), {"keep": files[0]}, "expected a folder to write into"),
               ((files[0],), {"journal": places / "j"}, "a journal is for a folder"),
               ((places / "in",), {"journal": places / "j", "log": places / "j"}, "log and journal"),
               ((places / "in",), {"log": places / "no" / "log"}, "log cannot be written"),
               ((places / "in",), {"journal": files[0] / "j"}, "journal cannot be written")]
    for args, how, words in refused:
        with pytest.raises(fp.FastPriorError, match=words):
            watch.Watch(trained, *args, **how)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(fp.BackendUnavailable, match=r"fastprior\[camera\]"):
        watch.Watch(trained, 0)
    with pytest.raises(fp.BackendUnavailable, match=r"fastprior\[camera\]"):
        watch.Watch(trained, files[0])
    for args in ([], [str(places / "in"), "--camera", "0"]):
        done = subprocess.run([*COMMAND, *args, "-m", model_file], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == (
            "error: give a folder, a video, or --camera NUMBER: one of them\n")
