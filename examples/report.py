"""One page of what a folder scored: thumbnails with heat maps, a histogram, a threshold to move.

The page needs no network and no other file. It is written row by row to a temporary name, so that
memory does not grow with the images. Whatever comes from outside (names, errors, products) travels as JSON
and is put in as text; the page's policy runs its own script only, by its hash, and fetches nothing.
fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

if "fp" not in globals():
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

SIDE, MAP_SIDE = 224, 56  # pixels, the longer side of a thumbnail and of its map
MOST_REGIONS = 20  # framed in a thumbnail, the highest first


class Report:
    """A page that is being written; `finish` puts it in its place, to leave the block without it leaves none.

    path : where it will be
    prior : the model, with its calibration
    model : its file, for the page to name
    """

    def __init__(self, path: Path, prior: fp.Prior | fp.MultiPrior, model: Path):
        fp._room("folders").check_output(path, "web page")
        self.path, self.target = path, Path(os.path.realpath(path))  # a link stays a link
        self.temporary = self.target.with_name(f".{os.urandom(8).hex()}.tmp")
        self.trouble: OSError | None = None
        self.count = 0
        self.facts = {"model": fp._printable(model.name), "date": time.strftime("%Y-%m-%d %H:%M"),
                      "version": fp.__version__, "multi": isinstance(prior, fp.MultiPrior),
                      "products": {name: _calibration(own) for name, own in fp._products(prior).items()}}
        script = PAGE.partition("<script>")[2].partition("</script>")[0]
        policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        tables = [" ".join(f"{v / 255:.3f}" for v in channel) for channel in fp._room("console").INFERNO.T]
        head, self.tail = PAGE.replace("@@HASH", policy).split("@@ROWS")
        for channel, table in zip("RGB", tables):
            head = head.replace(f"@@{channel}", table)
        try:
            self.file = open(self.temporary, "xb", buffering=0)
        except OSError as e:
            raise self._unwritten(e) from e
        self._write(head)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while self.trouble is None and data:
                data = data[self.file.write(data):]
        except OSError as e:  # said at the end: the rows on stdout go on
            self.trouble = e

    def _unwritten(self, e: OSError) -> fp.FastPriorError:
        return fp.FastPriorError(f"{self.path}: cannot be written ({e.strerror or e})")

    def add(self, path: Path, image: np.ndarray, result: fp.Result) -> None:
        """One image, uint8 (H, W, 3), with its result and map."""
        high, wide = image.shape[:2]
        regions = sorted(result.regions, key=lambda r: -r.peak)[:MOST_REGIONS]
        row = {"path": fp._printable(path), "score": result.score, "p": round(result.p_value, 5),
               "product": result.product, "wide": wide, "high": high,
               "image": _jpeg(_smaller(image, SIDE), 80), "map": _jpeg(_strength(result.anomaly_map), 85),
               "regions": [[round(100 * v, 2) for v in (  # left, top, width, height in percent
                   r.left / wide, r.top / high, (r.right - r.left) / wide, (r.bottom - r.top) / high)]
                   for r in regions]}
        self._write(",\n" * (self.count > 0) + _json(row))
        self.count += 1

    def finish(self, errors: list[str], notes: list[str]) -> None:
        """The end of the page: what could not be scored, and what else there is to say. FastPriorError if
        anything of it cannot be written."""
        self.facts |= {"errors": [fp._printable(text) for text in errors],
                       "notes": [fp._printable(text) for text in notes]}
        self._write(self.tail.replace("@@FACTS", _json(self.facts)))
        try:
            if self.trouble is not None:
                raise self.trouble
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.target)
        except OSError as e:
            raise self._unwritten(e) from e


def _calibration(prior: fp.Prior) -> dict[str, Any]:
    """What the page needs to count anew at another threshold. Not rounded: the threshold is one of them."""
    t, aside = prior.threshold, prior.summary.get("held_out_aside", 0)
    return {"threshold": t.value, "aside": aside,
            "bound": fp._room("console").with_aside(t, aside).bound,
            "scores": np.sort(prior.calibration["scores"]).astype(float).tolist()}


def _smaller(image: np.ndarray, side: int):
    """uint8 (H, W, 3) or float32 (H, W) -> a Pillow image of at most side x side."""
    from PIL import Image
    high, wide = image.shape[:2]
    scale = min(1, side / max(high, wide))
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    return Image.fromarray(image).resize(size, Image.Resampling.BOX)


def _strength(anomaly_map: np.ndarray):
    """float32 (H, W) -> a small grey Pillow image, on the scale of console.py's `overlay`."""
    from PIL import Image
    small = np.asarray(_smaller(anomaly_map, MAP_SIDE))
    strength = np.log(np.maximum(small, 1e-6) / .3) / math.log(10 / .3)
    return Image.fromarray(np.rint(np.clip(strength, 0, 1) * 255).astype(np.uint8))


def _jpeg(image, quality: int) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def _json(value) -> str:
    """JSON that no HTML parser reads a tag in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-@@HASH'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fastprior report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --panel: #fff; --line: #d9dce1; --text: #1b1f24; --faint: #5d6671; --well: #e6e8ec;
  --good: #2467c9; --bad: #c4400c; --known: #8a929d; --bad-text: #fff; --focus: #2467c9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1d2126; --line: #353b43; --text: #e7eaee; --faint: #9aa4af; --well: #0c0e11;
    --good: #6aa8ff; --bad: #ff8652; --known: #7b8591; --bad-text: #1b1207; --focus: #6aa8ff;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1480px; margin: 0 auto; padding: 20px 24px 60px; }
h1 { font-size: 20px; margin: 0; font-weight: 650; }
p { margin: 0; }
.faint, #about { color: var(--faint); }
#about { overflow-wrap: anywhere; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin-top: 14px; }
#tiles { display: flex; flex-wrap: wrap; gap: 6px 40px; margin-bottom: 14px; }
#tiles div { min-width: 76px; }
#tiles b { display: block; font-size: 28px; line-height: 1.15; font-weight: 650;
  font-variant-numeric: tabular-nums; }
#tiles span { color: var(--faint); font-size: 13px; }
#flagged { color: var(--bad); }
#plot svg { display: block; width: 100%; }
#plot text { fill: var(--faint); font-size: 12px; }
#plot .good { fill: var(--good); } #plot .bad { fill: var(--bad); } #plot .known { fill: var(--known); }
#plot .axis { stroke: var(--line); } #plot .at { stroke: var(--text); stroke-width: 1.5; }
#plot .was { stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 3 3; }
#plot .name { fill: var(--text); font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--faint); }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
#slider { display: block; width: 100%; margin: 4px 0 8px; height: 24px;
  accent-color: var(--good); cursor: grab; }
#at { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; }
#at output { flex: 1 1 340px; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--well);
  border-radius: 5px; padding: 2px 6px; overflow-wrap: anywhere; }
input[type=number], input[type=search], select, button { font: inherit; color: inherit;
  background: var(--page); border: 1px solid var(--line); border-radius: 7px; padding: 5px 10px; }
input[type=number] { width: 104px; font-variant-numeric: tabular-nums; }
input[type=search] { flex: 1 1 150px; max-width: 320px; min-width: 0; }
button { cursor: pointer; } button:disabled { opacity: .45; cursor: default; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
#bar { position: sticky; top: 0; z-index: 2; background: var(--page); padding: 12px 0 10px; display: flex;
  flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-top: 6px; }
fieldset { border: 0; padding: 0; margin: 0; display: flex; }
fieldset label { position: relative; border: 1px solid var(--line); background: var(--panel);
  padding: 5px 13px; margin-left: -1px; cursor: pointer; white-space: nowrap; }
fieldset label:first-of-type { border-radius: 7px 0 0 7px; margin-left: 0; }
fieldset label:last-of-type { border-radius: 0 7px 7px 0; }
fieldset input { position: absolute; opacity: 0; }
fieldset label:has(:checked) { background: var(--text); color: var(--page); border-color: var(--text); }
fieldset label:has(:focus-visible) { outline: 2px solid var(--focus); outline-offset: 2px; z-index: 1; }
fieldset span { font-variant-numeric: tabular-nums; opacity: .7; }
.check { white-space: nowrap; cursor: pointer; }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(176px, 1fr)); gap: 12px; }
.card { content-visibility: auto; contain-intrinsic-size: auto 190px auto 268px; background: var(--panel);
  border: 1px solid var(--line); border-top-width: 3px; border-radius: 10px; overflow: hidden; }
.card:focus-visible { outline-offset: 1px; }
.card.bad { border-color: var(--bad); }
.well { aspect-ratio: 1; background: var(--well); display: grid; place-items: center; }
.frame { position: relative; overflow: hidden; }
.frame img { position: absolute; width: 100%; height: 100%; }
.frame .map, .frame i { visibility: hidden; }
.map { filter: url(#heat); }
.frame i { position: absolute; border: 1.5px solid #fff; outline: 1px solid #0009; }
.card:hover :is(.map, i), .card:focus :is(.map, i), .maps .card :is(.map, i) { visibility: visible; }
.text { padding: 7px 10px 9px; font-size: 13px; }
.text .top { display: flex; align-items: baseline; gap: 8px; }
.text b { font-size: 16px; font-variant-numeric: tabular-nums; }
.text em { font-style: normal; margin-left: auto; color: var(--good); font-weight: 600; white-space: nowrap; }
.bad .text em { background: var(--bad); color: var(--bad-text); border-radius: 5px; padding: 0 6px; }
.changed .text em { outline: 1.5px dashed currentColor; outline-offset: 2px; border-radius: 3px; }
.text div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.text .top { overflow: visible; }
#errors summary { cursor: pointer; font-weight: 600; }
#errors ul { margin: 8px 0 0; padding-left: 20px; max-height: 260px; overflow: auto;
  overflow-wrap: anywhere; }
#notes p { overflow-wrap: anywhere; }
#none { padding: 40px; text-align: center; }
@media (max-width: 560px) {
  main { padding: 12px 12px 40px; } #tiles { column-gap: 22px; } #bar { position: static; }
  #cards { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 8px; }
}
@media print { #bar, #slider, #at { display: none; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<svg width="0" height="0" style="position:absolute" aria-hidden="true">
  <filter id="heat" x="0" y="0" width="1" height="1" color-interpolation-filters="sRGB">
    <feColorMatrix in="SourceGraphic" result="mask" values="0 0 0 0 0  0 0 0 0 0  0 0 0 0 0  5 0 0 0 0"/>
    <feComponentTransfer in="mask" result="alpha"><feFuncA type="linear" slope=".65"/></feComponentTransfer>
    <feComponentTransfer in="SourceGraphic" result="colour">
      <feFuncR type="table" tableValues="@@R"/>
      <feFuncG type="table" tableValues="@@G"/>
      <feFuncB type="table" tableValues="@@B"/>
    </feComponentTransfer>
    <feComposite in="colour" in2="alpha" operator="in"/>
  </filter>
</svg>
<main>
<header><h1>fastprior report</h1><p id="about"></p></header>
<noscript><p class="panel">This page needs JavaScript. It contains all that it shows.</p></noscript>
<section class="panel" id="notes" hidden></section>
<section class="panel" aria-label="Scores and threshold">
  <div id="tiles">
    <div><b id="total"></b><span>images scored</span></div>
    <div><b id="flagged"></b><span>anomalies <span id="share"></span></span></div>
    <div><b id="passed"></b><span>good</span></div>
    <div id="failed-tile"><b id="failed"></b><span>not scored</span></div>
  </div>
  <div class="key"><span><i style="background:var(--good)"></i>good</span>
    <span><i style="background:var(--bad)"></i>anomaly</span>
    <span><i style="background:var(--known)"></i>held-out good images of the calibration</span></div>
  <div id="plot"></div>
  <input type="range" id="slider" min="0" max="2000" step="1" aria-label="Threshold">
  <div id="at">
    <label>Threshold <input type="number" id="number" step="0.01"></label>
    <button id="reset" type="button">Reset</button>
    <output id="promise" for="slider number"></output>
    <code id="command" hidden></code>
  </div>
</section>
<details class="panel" id="errors" open hidden><summary></summary><ul></ul></details>
<section id="bar" aria-label="Filter">
  <fieldset id="verdicts" aria-label="Verdict">
    <label><input type="radio" name="verdict" value="all" checked>All <span id="n-all"></span></label>
    <label><input type="radio" name="verdict" value="anomaly">Anomalies <span id="n-anomaly"></span></label>
    <label><input type="radio" name="verdict" value="good">Good <span id="n-good"></span></label>
  </fieldset>
  <select id="product" aria-label="Product" hidden></select>
  <select id="order" aria-label="Order">
    <option value="high">Highest score first</option>
    <option value="low">Lowest score first</option>
    <option value="path">By name</option>
  </select>
  <input type="search" id="search" placeholder="Part of a name" aria-label="Part of a name">
  <label class="check"><input type="checkbox" id="maps"> Heat maps</label>
</section>
<section id="cards" aria-label="Images"></section>
<p id="none" class="faint" hidden>No image passes the filter.</p>
</main>
<script type="application/json" id="rows">[@@ROWS]</script>
<script type="application/json" id="facts">@@FACTS</script>
<script>
"use strict";
const $ = id => document.getElementById(id);
const rows = JSON.parse($("rows").textContent), facts = JSON.parse($("facts").textContent);
const products = new Map(Object.entries(facts.products)), single = !facts.multi;
const thresholds = new Map([...products].map(([name, own]) => [name, own.threshold]));
const make = (kind, className, text) => {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const minus = number => String(number).replace("-", "−");
const percent = x => (100 * x).toFixed(1) + " %";

// ---- what the address says: #t=3.2&show=anomaly&product=bolt
const wished = new URLSearchParams(location.hash.slice(1));
let product = single ? "" : wished.get("product") ?? null;  // null: all of them
if (product !== null && !products.has(product) && product !== "unknown") product = null;
if (wished.get("t") && Number.isFinite(+wished.get("t")) && thresholds.has(product))
  thresholds.set(product, +wished.get("t"));
const show = document.querySelector(`[name=verdict][value=${CSS.escape(wished.get("show") || "all")}]`);
if (show) show.checked = true;
if (wished.has("maps")) $("maps").checked = true;

const isBad = (row, threshold) => !single && row.product === "unknown" || !(row.score <= threshold);
const judge = row => { row.bad = isBad(row, thresholds.get(row.product) ?? -Infinity); };
for (const row of rows) {
  row.was = isBad(row, products.get(row.product)?.threshold ?? -Infinity);
  row.lower = row.path.toLowerCase();
  judge(row);
}

// ---- the axis: even where most scores are, logarithmic beyond
const squeeze = s => Math.asinh(s / 2), stretch = x => 2 * Math.sinh(x);
const everything = [...rows.map(row => row.score),
                    ...[...products.values()].flatMap(own => [...own.scores, own.threshold])];
let low = Infinity, high = -Infinity;
for (const s of everything) { low = Math.min(low, squeeze(s)); high = Math.max(high, squeeze(s)); }
const margin = .02 * (high - low) + .02;
low -= margin; high += margin;
const place = s => Math.min(1, Math.max(0, (squeeze(s) - low) / (high - low)));

const inScope = row => product === null || row.product === product;
function histogram() {
  const width = Math.max(300, $("plot").clientWidth), inset = 8;  // half a slider's thumb
  const up = 120, down = 44, top = 22, base = top + up, height = base + down + 22;
  const bins = Math.min(90, Math.floor(width / 9)), step = (width - 2 * inset) / bins;
  const x = s => inset + place(s) * (width - 2 * inset);
  const bin = s => Math.min(bins - 1, Math.floor(place(s) * bins));
  const good = new Array(bins).fill(0), bad = [...good], known = [...good];
  for (const row of rows) if (inScope(row)) (row.bad ? bad : good)[bin(row.score)]++;
  for (const [name, own] of products)
    if (product === null || name === product) for (const s of own.scores) known[bin(s)]++;
  const most = Math.max(1, ...good.map((n, i) => n + bad[i])), mostKnown = Math.max(1, ...known);
  const parts = [];
  const rect = (kind, i, y, tall, title) => parts.push(`<rect class="${kind}" x="${inset + i * step + .5}"
    y="${y}" width="${Math.max(1, step - 1)}" height="${tall}"><title>${title}</title></rect>`);
  for (let i = 0; i < bins; i++) {
    const tall = n => n && Math.max(2, up * n / most), [g, b] = [good[i], bad[i]].map(tall);
    const range = [i, i + 1].map(k => stretch(low + k / bins * (high - low)).toFixed(2)).join(" to ");
    if (g) rect("good", i, base - g, g, `${good[i]} good, ${range}`);
    if (b) rect("bad", i, base - g - b, b, `${bad[i]} anomalies, ${range}`);
    const deep = known[i] && Math.max(2, down * known[i] / mostKnown);
    if (known[i]) rect("known", i, base + 1, deep, `${known[i]} of the calibration, ${range}`);
  }
  parts.push(`<line class="axis" x1="0" x2="${width}" y1="${base + .5}" y2="${base + .5}"/>`);
  let last = -99;
  for (const t of [-1000, -100, -30, -10, -5, -3, -2, -1, 0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500,
                   1000, 1e4, 1e5, 1e6])
    if (squeeze(t) > low && squeeze(t) < high && x(t) - last > 34) {
      last = x(t);
      parts.push(`<text x="${last}" y="${height - 5}" text-anchor="middle">${minus(t)}</text>`);
    }
  const at = thresholds.get(product), line = (kind, s) =>
    parts.push(`<line class="${kind}" x1="${x(s)}" x2="${x(s)}" y1="${top - 4}" y2="${base + down + 4}"/>`);
  if (at !== undefined) {
    if (at !== products.get(product).threshold) line("was", products.get(product).threshold);
    line("at", at);
    parts.push(
      `<text class="name" x="${x(at)}" y="${top - 9}" text-anchor="${place(at) > .9 ? "end" : place(at) < .1 ?
        "start" : "middle"}">threshold ${at.toFixed(2)}</text>`);
  }
  $("plot").innerHTML = `<svg viewBox="0 0 ${width} ${height}" height="${height}" role="img"
    aria-label="Histogram of scores">${parts.join("")}</svg>`;  // numbers alone, nothing from outside
}

function count() {
  const scope = rows.filter(inScope), bad = scope.filter(r => r.bad).length, n = scope.length;
  $("total").textContent = n;
  $("flagged").textContent = bad;
  $("share").textContent = n ? `(${percent(bad / n)})` : "";
  $("passed").textContent = n - bad;
  $("n-all").textContent = n; $("n-anomaly").textContent = bad; $("n-good").textContent = n - bad;
  const at = thresholds.get(product), own = products.get(product);
  const movable = at !== undefined;
  $("slider").hidden = $("number").parentNode.hidden = $("reset").hidden = !movable;
  $("command").hidden = true;
  if (!movable) {
    $("promise").textContent = product === null
      ? "Each product has a threshold of its own: choose one to move it."
      : "These fit no product: they are anomalies at any threshold.";
    return;
  }
  // images that were set aside count as good ones above any threshold
  const moved = at !== own.threshold, known = own.scores.length + own.aside;
  const above = own.scores.filter(s => s > at).length + own.aside;
  $("reset").disabled = !moved;
  $("reset").textContent = `Back to ${own.threshold.toFixed(2)}`;
  $("slider").value = Math.round(2000 * place(at));
  $("slider").setAttribute("aria-valuetext", `${at.toFixed(2)}, ${bad} anomalies`);
  if (document.activeElement !== $("number")) $("number").value = at.toFixed(2);
  // a threshold chosen by looking: a bound for all of them at once (Dvoretzky, Kiefer, Wolfowitz)
  const most = moved ? Math.min(1, above / known + Math.sqrt(Math.log(20) / 2 / known)) : own.bound;
  const more = own.aside ? ` and ${own.aside} set aside` : "";
  $("promise").textContent = `${own.scores.length} held-out good images${more} promise false alarms of `
    + `${percent((above + 1) / (known + 1))} on average, at most ${percent(most)} with 95 % confidence.`;
  $("command").hidden = !moved || !single;
  $("command").textContent = `fastprior score --threshold ${at.toFixed(2)}`;
}

// ---- the cards: made once, their pictures when they come near
const folder = (() => {  // what all paths begin with
  if (!rows.length) return "";
  let common = rows[0].path.slice(0, rows[0].path.lastIndexOf("/") + 1);
  for (const row of rows)
    while (!row.path.startsWith(common)) common = common.slice(0, common.slice(0, -1).lastIndexOf("/") + 1);
  return common;
})();
const nearing = new IntersectionObserver(seen => {
  for (const entry of seen) if (entry.isIntersecting) {
    nearing.unobserve(entry.target);
    fill(entry.target.row);
  }
}, {rootMargin: "800px"});
function fill(row) {
  for (const [kind, data] of [["photo", row.image], ["map", row.map]]) {
    const picture = make("img", kind);
    picture.alt = "";
    picture.decoding = "async";
    picture.src = "data:image/jpeg;base64," + data;
    row.frame.append(picture);
  }
  for (const [left, top, width, height] of row.regions) {
    const box = make("i");
    Object.assign(box.style, {left: left + "%", top: top + "%", width: width + "%", height: height + "%"});
    row.frame.append(box);
  }
}
for (const row of rows) {
  const card = row.card = make("article", "card"), well = make("div", "well"), text = make("div", "text");
  card.row = row;
  card.tabIndex = 0;
  row.frame = make("div", "frame");
  row.frame.style.aspectRatio = `${row.wide} / ${row.high}`;
  row.frame.style[row.wide >= row.high ? "width" : "height"] = "100%";
  well.append(row.frame);
  const line = make("div", "top");
  row.label = make("em");
  line.append(make("b", "", minus(row.score.toFixed(2))), row.label);
  const name = row.path.lastIndexOf("/") + 1;
  text.append(line, make("div", "", row.path.slice(name)),
    make("div", "faint", `p ${row.p.toFixed(4)}` + (single ? "" : ` · ${row.product}`)));
  if (name > folder.length) text.append(make("div", "faint", row.path.slice(folder.length, name)));
  card.title = row.path;
  card.append(well, text);
}
const order = {high: (a, b) => b.score - a.score, low: (a, b) => a.score - b.score,
               path: (a, b) => a.path < b.path ? -1 : 1};
function arrange() {
  rows.sort(order[$("order").value]);
  $("cards").append(...rows.map(row => row.card));
}
function filter() {
  const verdict = document.querySelector("[name=verdict]:checked").value;
  const part = $("search").value.toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const card = row.card, state = row.bad + 2 * row.was;
    if (row.state !== state) {
      row.state = state;
      card.classList.toggle("bad", row.bad);
      card.classList.toggle("changed", row.bad !== row.was);
      row.label.textContent = row.bad ? "anomaly" : "good";
      row.label.title = row.bad === row.was ? "" : "the other verdict at the model's own threshold";
      card.setAttribute("aria-label", `${row.path}: score ${row.score.toFixed(2)}, ${row.label.textContent}`);
    }
    const hidden = !inScope(row) || verdict !== "all" && (verdict === "anomaly") !== row.bad
      || part && !row.lower.includes(part);
    if (card.hidden !== !!hidden) card.hidden = !!hidden;
    shown += !hidden;
  }
  $("none").hidden = shown > 0;
  document.body.classList.toggle("maps", $("maps").checked);
}

let waiting = 0;
function update() {
  for (const row of rows) judge(row);
  histogram(); count(); filter();
}
function remember() {
  const state = new URLSearchParams();
  if (!single && product !== null) state.set("product", product);
  if (thresholds.has(product) && thresholds.get(product) !== products.get(product).threshold)
    state.set("t", thresholds.get(product));
  const verdict = document.querySelector("[name=verdict]:checked").value;
  if (verdict !== "all") state.set("show", verdict);
  if ($("maps").checked) state.set("maps", "");
  history.replaceState(null, "", "#" + state);
}
function moveTo(t) {
  if (!Number.isFinite(t) || !thresholds.has(product)) return;
  thresholds.set(product, t);
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(update);
}
const two = t => Math.round(100 * t) / 100;  // what is shown is what counts
$("slider").addEventListener("input", e => moveTo(two(stretch(low + e.target.value / 2000 * (high - low)))));
$("number").addEventListener("input", e => { if (e.target.value !== "") moveTo(+e.target.value); });
$("reset").addEventListener("click", () => { moveTo(products.get(product).threshold); remember(); });
for (const id of ["slider", "number"]) $(id).addEventListener("change", remember);
for (const id of ["verdicts", "maps"]) $(id).addEventListener("change", () => { filter(); remember(); });
$("search").addEventListener("input", filter);
$("order").addEventListener("change", arrange);
$("product").addEventListener("change", e => {
  product = e.target.selectedIndex ? e.target.value : null;
  update(); remember();
});
addEventListener("resize", histogram);
addEventListener("beforeprint", () => { for (const row of rows) if (!row.frame.firstChild) fill(row); });

// ---- what does not change
$("about").textContent = [facts.model, facts.date, `fastprior ${facts.version}`, folder].filter(Boolean)
  .join(" · ");
$("failed").textContent = facts.errors.length;
$("failed-tile").hidden = $("errors").hidden = !facts.errors.length;
$("errors").open = facts.errors.length <= 20;
$("errors").querySelector("summary").textContent = `${facts.errors.length} not scored`;
$("errors").querySelector("ul").append(...facts.errors.map(text => make("li", "", text)));
$("notes").hidden = !facts.notes.length;
$("notes").append(...facts.notes.map(text => make("p", "", text)));
if (!single) {
  $("product").hidden = false;
  $("product").append(make("option", "", "All products"));
  const names = [...products.keys()];
  if (!products.has("unknown") && rows.some(r => r.product === "unknown")) names.push("unknown");
  for (const name of names) {
    const option = make("option", "", name);
    option.value = name;
    option.selected = name === product;
    $("product").append(option);
  }
}
arrange(); update();
for (const row of rows) nearing.observe(row.card);
</script>
</body>
</html>
"""
