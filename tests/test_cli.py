"""The command line: results on stdout, narration on stderr, exit codes 0, 1, 2, one line for bad input."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import fastprior as fp
from conftest import ROOT


def run(*args, cwd=None, **environment):
    return subprocess.run([sys.executable, str(ROOT / "fastprior.py"), *map(str, args)], capture_output=True,
                          text=True, cwd=cwd,
                          env=os.environ | environment)


def refused(done, *words):
    """Exit code 2, nothing on stdout, one line on stderr that says why."""
    assert done.returncode == 2 and done.stdout == "", done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("no --model given")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_help_has_examples():
    commands = ("train", "score", "watch", "calibrate", "export", "bench", "info")
    for command in commands:
        text = run(command, "--help")
        assert text.returncode == 0 and f"Example: fastprior {command}" in text.stdout
    overview = run("--help").stdout
    assert all(command in overview for command in commands)
    assert run("--version").stdout.strip() == fp.__version__


def test_demo_good_parts_pass_and_bad_ones_do_not(tmp_path):
    done = run("score", "examples/washers", "--map", tmp_path / "maps", cwd=ROOT)
    assert done.returncode == 1
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(r[0].split("/")[-1], r[3]) for r in rows] == [
        ("chip.png", "anomaly"), ("dent.png", "anomaly"), ("good_0.png", "good"), ("good_1.png", "good"),
        ("scratch.png", "anomaly"), ("stain.png", "anomaly")]
    assert all(len(r) == 4 and 0 < float(r[2]) <= 1 for r in rows)
    assert "demo model" in done.stderr
    for p in (ROOT / "examples" / "washers").glob("*.png"):
        with Image.open(p) as a, Image.open(tmp_path / "maps" / f"{p.name}.map.png") as b:
            assert a.size == b.size
    assert run("score", "examples/washers/good_*.png", cwd=ROOT).returncode == 0


def test_the_demo_map_is_on_the_scratch():
    # the scratch that make_demo.py --samples draws crosses the left half of the ring
    result = fp.Prior.load(fp.demo_model()).score(ROOT / "examples" / "washers" / "scratch.png")
    y, x = np.unravel_index(result.anomaly_map.argmax(), result.anomaly_map.shape)
    assert 80 < y < 160 and x < 110 and result.regions


def test_json_lines(model_file, washers):
    done = run("score", "-m", model_file, "--json", "--fpr", ".1", washers / "test" / "good",
               washers / "test" / "stain")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6 and rows[0].keys() == {"path", "score", "p_value", "verdict", "threshold",
                                                 "regions"}
    assert all(r["verdict"] == ("anomaly" if r["score"] > r["threshold"] else "good") for r in rows)
    facts = json.loads(run("info", model_file, "--json").stdout)
    assert facts["size"] == 96
    assert facts["threshold"] == pytest.approx(fp.Prior.load(model_file).threshold.value, abs=1e-4)
    text = run("info").stdout
    assert all(word in text for word in ("backend", "threads", fp.__version__, "cuda"))


def test_train_then_score(washers, tmp_path):
    model = tmp_path / "m.npz"
    done = run("train", washers, "-o", model, "--size", 64, "--iterations", 8, "--fpr", .1, "--seed", 3)
    assert done.returncode == 0 and done.stdout.strip() == str(model)
    # one of so few may be set aside
    assert re.search(r"2[34] images, 2[34] of them scored held out \(cross\)", done.stderr)
    assert "promise" in done.stderr
    assert run("score", "-m", model, washers / "test" / "stain" / "000.png").returncode == 1


def test_bad_input_is_one_line_and_code_two(model_file, washers, tmp_path):
    good = washers / "test" / "good"
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "1.png").write_bytes((good / "000.png").read_bytes())
    (tmp_path / "model.npz").write_text("none")
    refused(run("score", "-m", model_file, tmp_path / "nowhere"), "nowhere", "no such file")
    refused(run("score", "-m", model_file, tmp_path / "empty"), "empty", "no images")
    refused(run("score", tmp_path / "nothing*.png"), "nothing*.png")
    refused(run("score", "-m", tmp_path / "model.npz", good), "model.npz")
    refused(run("score", "-m", tmp_path / "none.npz", good), "none.npz", "no such")
    refused(run("score", "-m", model_file, "--steps", 7, good), "calibrated for", "7")
    refused(run("score", "-m", model_file, "--fpr", 2, good), "fpr")
    refused(run("score", "-m", model_file, "--fpr", .1, "--threshold", 2, good), "one of them")
    refused(run("calibrate", good, "-m", model_file, "-o", tmp_path / "o.npz", "--known-bad", good),
            "4 images are good ones and in --known-bad too")
    refused(run("train", tmp_path / "few", "-o", tmp_path / "o.npz", "--iterations", 0), "1 good images",
            "at least 5")
    refused(run("train", tmp_path / "nowhere", "-o", tmp_path / "o.npz"), "nowhere")
    refused(run("train", good, "-o", tmp_path / "no" / "o.npz"), "does not exist")
    refused(run("train", good, "-o", tmp_path / "o.npz", "--size", 50), "multiple of 32")
    refused(run("train", washers, "-o", tmp_path / "o.npz", "--backbone", "vgg"), "vgg")
    refused(run("calibrate", good, "-m", model_file, "-o", tmp_path / "o.npz"), "4 readable", "at least 10")
    refused(run("info", tmp_path / "model.npz"), "model.npz")
    assert not (tmp_path / "o.npz").exists()
    bad_option = run("bench", "--steps", "two")
    assert bad_option.returncode == 2 and "--steps" in bad_option.stderr.splitlines()[-1]
    assert run("score").returncode == 2 and run("paint").returncode == 2


def test_a_gpu_that_is_not_there_is_said(model_file, washers):
    try:
        fp.resolve_device("cuda")
        pytest.skip("there is a GPU")
    except fp.BackendUnavailable:
        pass
    refused(run("score", "-m", model_file, "--device", "cuda", washers / "test"), "device 'cuda'")
    assert "no: " in run("info").stdout


def test_control_c_leaves_no_half_file(washers, tmp_path):
    child = subprocess.Popen([sys.executable, str(ROOT / "fastprior.py"), "train", str(washers), "-o",
                              str(tmp_path / "m.npz"),
                              "--size", "96", "--backbone", "lite0"], stderr=subprocess.PIPE, text=True)
    time.sleep(2.5)  # wherever it is by now: compiling, reading features or training
    child.send_signal(signal.SIGINT)
    _, narration = child.communicate(timeout=120)
    left = [p.name for p in tmp_path.iterdir()]
    assert "Traceback" not in narration
    if child.returncode == 0:
        assert left == ["m.npz"] and fp.Prior.load(tmp_path / "m.npz")
    else:
        assert left == [] and child.returncode == 130


def test_bench_without_data_says_untrained():
    done = run("bench", "--size", 64, "--cell", 32, "--batch", 2)
    assert done.returncode == 0 and "untrained" in done.stdout and "frames/s" in done.stdout
    refused(run("bench", "--tier", "best"), "--tier: expected fast, default, accurate")
    refused(run("bench", "--device", "cpu", "--precision", "float16"), "--precision: expected float32")
    assert "cpu=" in done.stderr and "matmul_gflop_per_s" in done.stderr
