"""What the host does to a program that runs for months: kills, limits, many frames.

    python tests/test_host.py FRAMES      # scores that many, and says how the memory grew
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])] * (__name__ == "__main__")
import fastprior as fp  # noqa: E402

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc and bash")


def grown(prior, images: list, frames: int) -> float:
    """Megabytes of resident memory that so many frames add after a tenth of them; all score the same."""
    want = [prior.score(image).score for image in images]

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    for i in range(frames + frames // 10):
        if i == frames // 10:
            before = resident()
        assert prior.score(images[i % len(images)]).score == want[i % len(images)]
    return resident() - before


@LINUX
def test_memory_does_not_grow_with_frames(model_file):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64 + 9 * i, 100 - 5 * i, 3), np.uint8) for i in range(7)]
    assert grown(fp.Prior.load(model_file, threads=1), images, 1000) < 5


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_leaves_whole_files_or_none(trained, tmp_path):
    """Models and maps, written again and again by a process that is killed at a random moment."""
    source, rng, r = tmp_path / "part.png", np.random.default_rng(0), random.Random(0)
    source.touch()
    for i in range(25):
        folder = tmp_path / str(i)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    trained.save(folder / "model.npz")
                    fp._room("folders").write_png(folder, Path("part.png"), "map",
                                                  rng.integers(0, 256, (300, 400, 3), np.uint8), source)
            finally:
                os._exit(1)
        time.sleep(r.uniform(.01, .2))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        for path in folder.iterdir():
            if path.name == "model.npz":
                assert fp.Prior.load(path).settings == trained.settings
            elif path.name[0] != ".":  # those are what was being written, and no run reads them
                Image.open(path).load()
    assert any((tmp_path / str(i) / "part.png.map.png").exists() for i in range(25))


@LINUX
@pytest.mark.parametrize("limit", ["ulimit -v 300000", "ulimit -v 1000000", "ulimit -n 5", "ulimit -n 16",
                                   "ulimit -f 0", "unset HOME"])
def test_limits_are_met_or_said_in_a_line(model_file, pictures, tmp_path, limit):
    import subprocess
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    done = subprocess.run(["bash", "-c", f'{limit}; "$@"', "bash", sys.executable, fp.__file__, "score", "-m",
                           str(model_file), str(tmp_path / "a.png"), "--threshold", "1e9"],
                          capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        assert done.stdout.endswith("\tgood\n"), done
    else:
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: "), done
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    drawn = np.random.default_rng(0).integers(0, 256, (7, 64, 96, 3), np.uint8)
    count = int(sys.argv[1])
    print(f"{count} frames: {grown(fp.Prior.load(fp.demo_model()), list(drawn), count):+.1f} MB")
