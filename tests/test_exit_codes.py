"""Exit codes: 0 all good, 1 an anomaly, 2 not all scored, 130 interrupted; and rows that nobody can forge."""
import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fastprior as fp
from conftest import ROOT

COMMAND = [sys.executable, str(ROOT / "fastprior.py")]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def run(*args, cwd=None, shell="", **environment):
    """The command; shell: what follows it on a line of bash."""
    args = [os.fspath(a) if isinstance(a, os.PathLike) else a if isinstance(a, bytes) else str(a)
            for a in args]
    command = ["bash", "-c", f'"$@" {shell}', "bash", *COMMAND, *args] if shell else [*COMMAND, *args]
    return subprocess.run(command, capture_output=True, cwd=cwd, env=os.environ | environment, timeout=300)


def lines(data: bytes):
    return data.decode().splitlines()


@pytest.fixture
def images(washers, tmp_path):
    """A folder of two good images and one stained."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, source in {"a.png": "good/000.png", "b.png": "good/001.png", "c.png": "stain/000.png"}.items():
        (folder / name).write_bytes((washers / "test" / source).read_bytes())
    return folder


def test_good_anomaly_and_error(model_file, images):
    score = ["score", "-m", model_file, "--fpr", ".04"]
    assert run(*score, images / "a.png", images / "b.png").returncode == 0
    assert run(*score, images).returncode == 1
    (images / "d.png").write_bytes((images / "a.png").read_bytes()[:999])
    (images / "e.png").write_text("no image")
    done = run(*score, images, images / "none.png", "", "x" * 500)
    assert done.returncode == 2
    assert [os.path.basename(line.split("\t")[0]) for line in lines(done.stdout)] == [
        "a.png", "b.png", "c.png"]
    errors = lines(done.stderr)
    assert len(errors) == 6 and errors[-1].startswith("5 of 8 could not be scored")
    assert all(line.startswith("error: ") for line in errors[:-1])
    rows = [json.loads(line) for line in lines(run(*score, "--json", images, images / "none.png").stdout)]
    assert [("error" in r, os.path.basename(r["path"])) for r in rows] == [
        (True, "none.png"), (False, "a.png"), (False, "b.png"), (False, "c.png"), (True, "d.png"),
        (True, "e.png")]


@LINUX
@pytest.mark.parametrize("shell, code", [("> /dev/full", 2), ("2> /dev/full", 1), (">&- 2>&- <&-", 2),
                                         (">&-", 2), ("<&-", 1), ("2>&-", 1),
                                         ("| true; exit ${PIPESTATUS[0]}", 2)])
def test_streams_that_are_closed_or_full(model_file, images, shell, code):
    done = run("score", "-m", model_file, images, shell=shell)
    assert done.returncode == code and b"Traceback" not in done.stderr and len(lines(done.stderr)) <= 1, done
    if shell == "2>&-":
        assert len(lines(done.stdout)) == 3


@LINUX
@pytest.mark.parametrize("args, shell, code", [
    (["--help"], "> /dev/full", 2), (["--version"], "> /dev/full", 2), (["info"], "> /dev/full", 2),
    (["info"], ">&-", 2), (["--help"], "| true; exit ${PIPESTATUS[0]}", 0)])
def test_every_command_fails_with_two(args, shell, code):
    assert run(*args, shell=shell).returncode in {code, 2}


def test_libtiff_does_not_speak_beside_us(model_file, images):
    Image.open(images / "a.png").convert("RGB").save(images / "t.tif", compression="tiff_adobe_deflate")
    data = bytearray((images / "t.tif").read_bytes())
    data[len(data) // 2] ^= 16
    (images / "t.tif").write_bytes(data)
    done = run("score", "-m", model_file, images / "t.tif")
    assert done.returncode == 2 and len(lines(done.stderr)) == 1
    assert b"t.tif: not a readable image" in done.stderr


@LINUX
def test_names_of_every_kind(model_file, images):
    data = (images / "a.png").read_bytes()
    folder = images.parent / "names"
    folder.mkdir()
    forged = "x\n" + "good.png\t0.00\t0.9\tgood"
    names = [forged.encode(), b"tab\t.png", b"\x1b[31mred.png", "日本.png".encode(), b"\xff\xfe.png",
             "\u202egnp.png".encode(), b"a b.png", b"r\r.png"]
    for name in names:
        name = name if name.endswith(b".png") else name + b".png"
        with open(os.path.join(os.fsencode(folder), name), "wb") as f:
            f.write(data)
    for environment in ({}, {"PYTHONIOENCODING": "cp1252:strict"}, {"PYTHONIOENCODING": "ascii:strict"},
                        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = run("score", "-m", model_file, "--fpr", ".04", folder, "--map", folder.parent / "maps",
                   **environment)
        rows = done.stdout.decode("cp1252" if "cp1252" in str(environment) else "utf-8").split("\n")[:-1]
        assert done.returncode == 0 and len(rows) == len(names), done
        assert all(len(row.split("\t")) == 4 and row.startswith(str(folder))
                   and (row.isprintable() or "\t" in row) for row in rows)
        assert not any(c in row for row in rows for c in "\x1b\r\u202e")
    done = run("score", "-m", model_file, "--json", folder)
    assert {os.fsencode(json.loads(line)["path"]) for line in lines(done.stdout)} == {
        os.path.join(os.fsencode(folder), n if n.endswith(b".png") else n + b".png") for n in names}
    (folder / "bad\n.png").write_bytes(b"")
    done = run("score", "-m", model_file, folder, folder / "no\nne")
    assert done.returncode == 2 and len(lines(done.stderr)) == 3


def test_json_is_json():
    text = fp._room("console").strict_json({"a": [float("nan"), 1.5], "b": -float("inf"), "c": "日\udcff"})
    assert text == '{"a": [null, 1.5], "b": null, "c": "\\u65e5\\udcff"}'


def test_a_score_that_is_no_number_is_an_error(model_file, images, monkeypatch, capsys):
    """Wherever it comes from; JSON stays JSON."""
    monkeypatch.setattr(fp.Result, "score", property(lambda self: float("nan")))
    assert in_process(monkeypatch, "score", "-m", str(model_file), "--json", str(images)) == 2
    out, error = capsys.readouterr()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert len(rows) == 3 and all("error" in r for r in rows), error


def in_process(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["fastprior", *args])
    with pytest.raises(SystemExit) as e:
        fp.main()
    return e.value.code


@pytest.mark.parametrize("raised", [ValueError("a\nb"), RuntimeError(), MemoryError(), RecursionError("deep"),
                                    OSError(errno.EIO, "Input/output error"),
                                    SystemExit(1), GeneratorExit(), np.linalg.LinAlgError("singular"),
                                    BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_whatever_happens_is_one_line_and_two(raised, monkeypatch, capsys):
    def machine():
        raise raised
    monkeypatch.setattr(fp._room("console"), "machine", machine)
    assert in_process(monkeypatch, "info") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and "Traceback" not in error
    assert in_process(monkeypatch, "--debug", "info") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["score", "--map", "", "a.png"], ["score", "--map=", "a.png"],
                                  ["score", "-m", "", "a.png"], ["bench", "--data", ""]])
def test_an_empty_value_is_not_this_folder(args, monkeypatch, capsys):
    assert in_process(monkeypatch, *args) == 2
    assert "is empty: expected a value" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch, capsys):
    def machine():
        raise KeyboardInterrupt
    monkeypatch.setattr(fp._room("console"), "machine", machine)
    assert in_process(monkeypatch, "info") == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_training_that_is_interrupted_is_saved_and_says_so(trained, washers, tmp_path, monkeypatch, capsys):
    """With --multi nothing is: the products after it have not been seen."""
    cut = trained._with(trained.settings, trained.calibrations, trained.summary | {"interrupted": True})
    monkeypatch.setattr(fp, "fit", lambda *_, **__: cut)
    assert in_process(monkeypatch, "train", str(washers), "-o", str(tmp_path / "m.npz")) == 130
    assert fp.Prior.load(tmp_path / "m.npz").summary["interrupted"]
    out, error = capsys.readouterr()
    assert out.strip() == str(tmp_path / "m.npz") and error.endswith("interrupted\n")
    (tmp_path / "products").mkdir()
    (tmp_path / "products" / "washer").symlink_to(washers / "train" / "good")
    args = "train", "--multi", str(tmp_path / "products"), "-o", str(tmp_path / "all.npz")
    assert in_process(monkeypatch, *args) == 130 and not (tmp_path / "all.npz").exists()


def test_memory_that_runs_out_for_one_image(model_file, images, monkeypatch, capsys):
    score = fp.Prior.score

    def short(self, image, **how):
        if not short.calls:
            short.calls.append(1)
            raise MemoryError
        return score(self, image, **how)
    short.calls = []
    monkeypatch.setattr(fp.Prior, "score", short)
    assert in_process(monkeypatch, "score", "-m", str(model_file), str(images)) == 2
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "a.png: out of memory" in error


def test_values_above_the_depth_warn_once(washers, tmp_path):
    files = fp.find_images(washers)[:12]
    for i, file in enumerate(files):
        Image.fromarray(fp.load_image(file)[..., 0].astype(np.uint16) << 4).save(tmp_path / f"{i}.png")
    assert run("train", tmp_path, "-o", tmp_path / "m.npz", "--iterations", 0, "--size", 64).returncode == 0
    assert fp.Prior.load(tmp_path / "m.npz").settings.bits == 12
    for i in range(3):
        Image.fromarray(np.asarray(Image.open(tmp_path / f"{i}.png")) * 8).save(tmp_path / f"{i}.png")
    done = run("score", "-m", tmp_path / "m.npz", tmp_path)
    said = lines(done.stderr)
    assert len(lines(done.stdout)) == 12 and done.stderr.count(b"above 12 bits") == 1
    assert [line for line in said if "above 12 bits" in line] == [
        line for line in said if line.startswith("warning: values")]


def test_errors_of_a_batch_come_back_in_their_places(trained, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    results = trained.score_batch([pictures[0], bad, np.zeros((4, 4)), pictures[1]], errors="return", chunk=1)
    assert [type(r) for r in results] == [fp.Result, fp.ImageError, fp.ShapeError, fp.Result]
    assert [results[0].score, results[3].score] == [trained.score(p).score for p in pictures[:2]]
    both = fp.MultiPrior({"a": trained})
    assert [type(r) for r in both.score_batch([bad, pictures[0]], errors="return")] == [
        fp.ImageError, fp.Result]
    for wrong in ({"errors": "raise"}, {}):
        with pytest.raises(fp.ImageError, match="bad.png"):
            trained.score_batch([pictures[0], bad], **wrong)
    for images, how in (("path.png", {}), (pictures, {"errors": "ignore"})):
        with pytest.raises(fp.ShapeError, match="score_batch"):
            trained.score_batch(images, **how)


def test_known_bad_with_a_truncated_file(model_file, washers, tmp_path):
    for name in ("good", "hole"):
        (tmp_path / "test" / name).mkdir(parents=True)
    for i, file in enumerate(fp.find_images(washers)[:12]):  # the model knows their mirror images
        Image.fromarray(fp.load_image(file)[:, ::-1]).save(tmp_path / "test" / "good" / f"{i}.png")
    for i, file in enumerate(fp.find_images(washers / "test" / "stain")):
        (tmp_path / "test" / "hole" / f"{i}.png").write_bytes(file.read_bytes())
    (tmp_path / "test" / "hole" / "cut.png").write_bytes(file.read_bytes()[:500])
    done = run("calibrate", tmp_path / "test" / "good", "-m", model_file, "-o", tmp_path / "o.npz",
               "--known-bad", tmp_path / "test")
    assert done.returncode == 0 and b"proposed" in done.stdout and done.stderr.count(b"cut.png") == 1, done


@pytest.mark.parametrize("threads", ["²", "0", "-1", "1.5", "", "two", "9" * 30])
def test_the_environment_is_no_trap(model_file, images, threads):
    done = run("score", "-m", model_file, images / "a.png", NUMBA_NUM_THREADS=threads)
    assert done.returncode in (0, 1) and len(lines(done.stdout)) == 1, done


def test_a_signal_between_two_images(model_file, images):
    for i in range(3000):
        os.link(images / "a.png", images / f"z{i:04}.png")
    child = subprocess.Popen([*COMMAND, "score", "-m", str(model_file), str(images)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=120)
    assert child.returncode == 130 and error.endswith("interrupted\n") and "Traceback" not in error
    assert all(line.count("\t") == 3 for line in out.splitlines())


def test_an_interrupt_amid_silence_is_still_said():
    """A signal may fall between the redirection of C code's stderr and its end."""
    code = """if True:
        import os, sys, fastprior as fp
        console = fp._room("console")
        def app():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise KeyboardInterrupt
        console.run(app)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "interrupted\n"
