#!/usr/bin/env python3
"""Images, their heat maps and their scores side by side, as one picture.

    python examples/contact_sheet.py examples/washers -o examples/contact_sheet.png
    python examples/contact_sheet.py broken/*.png -m part.npz -o sheet.png
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastprior as fp  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("paths", nargs="+", help="files, folders or globs")
parser.add_argument("-m", "--model", default=fp.demo_model())
parser.add_argument("-o", "--output", required=True)
parser.add_argument("--columns", type=int, default=6)
parser.add_argument("--cell", type=int, default=256, help="pixels a side of each picture")
args = parser.parse_args()

prior, tiles, found = fp.Prior.load(args.model), [], fp._room("folders").find_all(args.paths)
problems = found.problems()
for path in found.images:
    try:
        image = fp.load_image(path)
    except (fp.ImageError, fp.ShapeError) as e:
        problems.append(str(e))
        continue
    result = prior.score(image)
    pair = [ImageOps.pad(Image.fromarray(a), (args.cell, args.cell), Image.LANCZOS, "white")
            for a in (image, fp._room("console").overlay(image, result.anomaly_map))]
    tile = Image.new("RGB", (args.cell, 2 * args.cell + 22), "white")
    tile.paste(pair[0], (0, 0))
    tile.paste(pair[1], (0, args.cell))
    text = f"{path.parent.name}/{path.stem}: {result.score:.1f}  p {result.p_value:.3f}  {result.verdict}"
    ImageDraw.Draw(tile).text((4, 2 * args.cell + 4), text, fill="black")
    tiles.append(np.asarray(tile))
for line in problems:
    print(f"error: {line}", file=sys.stderr)
if not tiles:
    sys.exit(2)
while len(tiles) % min(args.columns, len(tiles)):
    tiles.append(np.full_like(tiles[0], 255))
columns = min(args.columns, len(tiles))
rows = [np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)]
Image.fromarray(np.concatenate(rows, 0)).save(args.output, optimize=True)
print(args.output)
sys.exit(2 if problems else 0)
