"""Scores of the demo model on a few washers, kept in golden.json: a change of a score must be meant.

    python tests/golden.py    # writes the file anew, after the model, the images or the method changed
"""
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fastprior as fp  # noqa: E402

FILE = Path(__file__).with_name("golden.json")
IMAGES = sorted((ROOT / "examples" / "washers").glob("*.png"))


def digest() -> str:
    """Of all that the scores are made from, but the code."""
    files = [fp.demo_model(), *IMAGES]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def scores(threads: int, batch: bool) -> dict[str, list[str]]:
    """By image its score and the maximum of its map, in hexadecimal: every bit."""
    prior = fp.Prior.load(fp.demo_model(), threads=threads)
    results = prior.score_batch(IMAGES) if batch else [prior.score(path) for path in IMAGES]
    return {path.name: [r.score.hex(), float(r.anomaly_map.max()).hex()] for path, r in zip(IMAGES, results)}


if __name__ == "__main__":
    found = {(threads, batch): scores(threads, batch) for threads in (1, 2) for batch in (False, True)}
    if any(other != found[1, False] for other in found.values()):
        sys.exit(f"scores depend on threads or batch: {found}")
    FILE.write_text(json.dumps({"digest": digest(), "scores": found[1, False]}, indent=1) + "\n")
    print(FILE)
