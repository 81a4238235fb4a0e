"""The page of the report: one file without scripts, fonts or anything else from elsewhere."""

from __future__ import annotations

from string import Template

FIGURE = Template(
    """<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/webp;base64,$dark">
<img alt="$alt" src="data:image/webp;base64,$light"></picture><figcaption>$caption</figcaption></figure>"""
)

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>masked_loss_triton: the demo's report</title>
<style>
:root { --paper: #ffffff; --ink: #1d2127; --quiet: #5c636e; --line: #d9dce1; --best: #e7f2fb; --yes: #00704f; --no: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e8eaed; --quiet: #a2a9b4; --line: #363b43; --best: #1d3447; --yes: #4fd0a5; --no: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 4rem 1.5rem 6rem; }
p, ul, h1, h2, .lead { max-width: 42rem; }
h1 { font-size: 2.3rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.01em; margin: 4rem 0 0.75rem; }
.lead { font-size: 1.15rem; color: var(--quiet); margin: 0 0 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1.5rem 0; }
.wide { overflow-x: auto; }
th, td { padding: 0.5rem 1.1rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 500; }
thead th { color: var(--quiet); font-size: 0.88rem; }
tr.base th, tr.base td { color: var(--quiet); }
td.best { background: var(--best); font-weight: 650; }
.facts th { color: var(--quiet); vertical-align: top; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.verdicts { list-style: none; padding: 0; }
.verdicts li { padding: 0.3rem 0 0.3rem 6.2rem; position: relative; }
.verdicts span { position: absolute; left: 0; font-weight: 650; }
.yes span { color: var(--yes); }
.no span { color: var(--no); }
figure { margin: 1.5rem 0 0; }
figure picture { display: block; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 42rem; margin-top: 0.75rem; color: var(--quiet); font-size: 0.92rem; line-height: 1.5; }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 2.5rem 1rem 4rem; }
  h1 { font-size: 1.8rem; }
  th, td { padding: 0.5rem 0.4rem; font-size: 0.85rem; white-space: normal; }
  figure img { max-width: none; width: 48rem; }
}
</style>
</head>
<body>
<main>
<h1>$verdict</h1>
<p class="lead">One small video transformer, four LoRAs. They start from the same weights and see the same photographs, the
same noise and the same times. Only the loss differs.</p>
<div class="wide">$table</div>
<ul class="verdicts">$verdicts</ul>
<p>Errors are mean squared errors of the predicted velocity on noise and times that no training saw, weighted with the mask
(inside) or with what the mask leaves out (outside). Drift is the squared distance from what the base model predicts there.
Lower is better. A low error outside is not what these LoRAs are for: it means that the background was learned as well. The
last three columns compare pictures drawn from pure noise, in decibels (PSNR), higher is better: the subject with its
photograph, inside the mask; the background, outside of it, and places with nobody in them, with what the base model draws from
the same noise. The best of each column is marked.</p>

<h2>What the models draw</h2>
$samples

<h2>Where the model changed</h2>
$drifts

<h2>Photographs and masks</h2>
$photos

<h2>While they were trained</h2>
$curves

<h2>How it was made</h2>
<p>Masks by <code>masked-loss generate</code> without words, of what stands out, unless the photographs came with their own. As
<code>masked-loss cache</code> does it, they are averaged to the size of the latents and kept in the latent caches, where training
finds them. The base model is a <code>WanTransformer3DModel</code> of diffusers, trained by flow matching on eight
places without a subject. A caption is a subject's word and a place's word; while the LoRAs are trained, the place's word is
drawn anew at every step. The LoRAs are peft's, on every attention and feed-forward matrix.</p>
<p><strong>What it is not.</strong> No weights of a real VAE or text encoder can be shipped with a package, and none are
downloaded. In their place stand a fixed linear encoder (16 frequencies of each 8×8 patch, lapped, decoded by its transpose) and
random vectors for each word of a caption. The model has 0.6 million parameters and a minute of training, so its pictures are
coarse, and it knows eight places and four photographs by heart. What carries over to a real model is the loss and the path
of the masks, not the pictures.</p>
<table class="facts">$facts</table>
</main>
</body>
</html>
"""
)
