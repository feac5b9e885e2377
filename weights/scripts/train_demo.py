#!/usr/bin/env python3
"""Make weights/demo.npz: a prior of the washers that examples/make_demo.py draws. Needs torch.

    python weights/scripts/train_demo.py
"""
import subprocess
import sys
import tempfile
from pathlib import Path

here = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(here.parent))
import fastprior as fp  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    draw = here.parent / "examples" / "make_demo.py"
    subprocess.run([sys.executable, draw, folder, "--good", "200"], check=True)
    prior = fp.fit(folder, size=256, cell=32, progress=lambda what, done, of: done == of and fp._room("console").say(what))
prior.save(here / "demo.npz")
print(f"\n{here / 'demo.npz'}", prior.summary)
