#!/usr/bin/env python3
"""Make weights/demo.npz: a prior of the washers that examples/make_demo.py draws. Needs torch.

    python weights/scripts/train_demo.py
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

here = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(here.parent))
import fastprior as fp  # noqa: E402


def said(what: str, done: int, of: int) -> None:
    if done == of:
        fp._room("console").say(what)


with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # a model names what it was trained on
    draw = here.parent / "examples" / "make_demo.py"
    subprocess.run([sys.executable, draw, "washers", "--good", "200"], check=True)
    prior = fp.fit("washers", size=256, cell=32, progress=said)
    os.chdir(here)
prior.save(here / "demo.npz")
print(f"\n{here / 'demo.npz'}", prior.summary)
