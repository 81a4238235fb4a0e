"""Drawing: one card per picture or clip with its mask, its final weights and their histogram; sheets of cards."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import replace_file
from masked_loss_triton.files.notes import png_note, read_png_note

PANEL = 224  # longest side of a panel, pixels
STRIP = 140  # longest side of a frame of the strip, pixels
MAX_STRIP = 6  # as many as fit in the width of a card
GAP, TEXT = 10, 18
BACKGROUND, INK, FAINT, ACCENT = (250, 250, 248), (30, 30, 34), (130, 130, 138), (196, 30, 58)
EDGE = (206, 206, 202)
BINS = 20
COLOURS = ((214, 69, 65), (41, 121, 185), (46, 139, 87), (142, 68, 173), (211, 132, 0), (0, 139, 139), (120, 120, 120))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What is shown of one item.

    Args:
        name: heading.
        facts: lines of text below it.
        picture_label: what the pictures are.
        pictures: F arrays (H, W, 3) uint8, one for each time step or layer, or fewer: the last one is repeated.
        mask: (H, W) float32, the mask before it became weights.
        raw: (F, h, w) float32 in [0, 1], the weights in the cache.
        weights: (F, h, w) float32, after all options of the loss.
        region: of that shape, the weights of the prior, where there is one.
        labels: the share of each label, in that shape, where there are labels.
    """

    name: str
    facts: list[str]
    picture_label: str
    pictures: list[np.ndarray]
    mask: np.ndarray
    raw: np.ndarray
    weights: np.ndarray
    region: np.ndarray | None = None
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def overlay(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The picture where the weight is 1, a dark red print of it where the weight is 0; the cells stay visible.

    Args:
        picture: (H, W, 3) uint8.
        weights: (h, w) float32.
    """
    size = (picture.shape[1], picture.shape[0])
    w = np.asarray(Image.fromarray(weights.astype(np.float32)).resize(size, Image.Resampling.NEAREST))
    w = np.clip(w, 0, 1)[..., None]
    grey = picture.astype(np.float32).mean(axis=2, keepdims=True)
    outside = 0.4 * grey + 0.5 * np.array(ACCENT, np.float32)
    return np.rint(w * picture + (1 - w) * outside).clip(0, 255).astype(np.uint8)


def colour_of(index: int) -> tuple[int, int, int]:
    """A colour of its own for each label."""
    return COLOURS[index % len(COLOURS)]


def labelled(picture: np.ndarray, shares: Sequence[np.ndarray]) -> np.ndarray:
    """The picture under the colours of its labels, mixed by their shares, (h, w) each."""
    tint = sum(share[..., None] * np.array(colour_of(index), np.float32) for index, share in enumerate(shares))
    size = (picture.shape[1], picture.shape[0])
    scale = Image.Resampling.NEAREST
    tint = np.asarray(
        Image.fromarray(np.clip(np.asarray(tint), 0, 255).astype(np.uint8)).resize(size, scale), np.float32
    )
    total = np.asarray(Image.fromarray(np.clip(sum(shares), 0, 1).astype(np.float32)).resize(size, scale))[..., None]
    grey = picture.astype(np.float32).mean(axis=2, keepdims=True)
    return np.rint(0.4 * grey * np.ones(3) + 0.6 * tint + 0.3 * (1 - total) * grey).clip(0, 255).astype(np.uint8)


def _legend(card: Card) -> list[str]:
    return [f"{label} {share.mean():.1%}" for label, share in card.labels.items()]


def draw(card: Card) -> Image.Image:
    """One card: picture, mask, weights over the picture, histogram; below them a strip over time for clips."""
    heading, small = ImageFont.load_default(15), ImageFont.load_default(12)
    last = len(card.pictures) - 1
    middle = len(card.weights) // 2
    picture = card.pictures[min(middle, last)]
    mask = np.rint(card.mask * 255).astype(np.uint8)
    panels = [
        (card.picture_label, fit(Image.fromarray(picture), PANEL)),
        ("mask", fit(Image.fromarray(mask).convert("RGB"), PANEL)),
        ("weights", fit(Image.fromarray(overlay(picture, card.weights[middle])), PANEL)),
        ("histogram of weights", histogram(card.weights)),
    ]
    if card.region is not None:
        panels.insert(3, ("prior", fit(Image.fromarray(overlay(picture, card.region[middle])), PANEL)))
    if card.labels:
        panels[1] = (
            "labels",
            fit(Image.fromarray(labelled(picture, [x[middle] for x in card.labels.values()])), PANEL),
        )
    strip = []
    if len(card.weights) > 1:
        chosen = np.unique(np.linspace(0, len(card.weights) - 1, min(len(card.weights), MAX_STRIP)).round().astype(int))
        for step in chosen:
            pixels = overlay(card.pictures[min(step, last)], card.weights[step])
            strip.append((f"t={step}  {card.weights[step].mean():.2f}", fit(Image.fromarray(pixels), STRIP)))
    top = 2 * GAP + TEXT * (1 + len(card.facts) + bool(card.labels))
    row = max(panel.height for _, panel in panels) + TEXT
    strip_row = max((frame.height for _, frame in strip), default=0) + TEXT + GAP if strip else 0
    width = GAP + len(panels) * (PANEL + GAP)
    sheet = Image.new("RGB", (width, top + row + strip_row + GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), card.name, INK, heading)
    for line, fact in enumerate(card.facts, 1):
        pen.text((GAP, GAP + 4 + TEXT * line), fact, FAINT, small)
    x = float(GAP)
    for index, text in enumerate(_legend(card)):
        pen.text((x, GAP + 4 + TEXT * (1 + len(card.facts))), text, colour_of(index), small)
        x += pen.textlength(text, small) + 2 * GAP
    for column, (label, panel) in enumerate(panels):
        left = GAP + column * (PANEL + GAP)
        pen.text((left, top), label, FAINT, small)
        sheet.paste(panel, (left, top + TEXT))
        # A white mask would vanish in the page.
        pen.rectangle((left - 1, top + TEXT - 1, left + panel.width, top + TEXT + panel.height), outline=EDGE)
    left = GAP
    for label, frame in strip:
        pen.text((left, top + row + GAP), label, FAINT, small)
        sheet.paste(frame, (left, top + row + GAP + TEXT))
        left += frame.width + GAP
    pen.line((0, sheet.height - 1, sheet.width, sheet.height - 1), EDGE)
    return sheet


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image in a square of this side; small ones are enlarged without smoothing, so that cells stay visible."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def histogram(weights: np.ndarray) -> Image.Image:
    """Shares of the weights in 20 bins from 0 to 1; the axis ends at the largest share."""
    counts, _ = np.histogram(np.clip(weights, 0, 1), BINS, (0, 1))
    share = counts / max(counts.sum(), 1)
    image = Image.new("RGB", (PANEL, PANEL * 3 // 4), (255, 255, 255))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    floor, left, right = image.height - 18, 6, PANEL - 6
    height = floor - 20
    for index, value in enumerate(share):
        x0 = left + (right - left) * index / BINS
        x1 = left + (right - left) * (index + 1) / BINS - 1
        bar = height * value / max(share.max(), 1e-9)
        if value:
            pen.rectangle((x0, floor - max(bar, 1), x1, floor), (70, 90, 150))
    pen.line((left, floor, right, floor), FAINT)
    for label, x in (("0", left), ("0.5", PANEL / 2 - 8), ("1", right - 6)):
        pen.text((x, floor + 3), label, FAINT, font)
    pen.text((left, 4), f"top {share.max():.0%}", FAINT, font)
    return image


def sheet(images: list[Image.Image]) -> Image.Image:
    """The cards in one picture: one column, or two from the seventh card on."""
    columns = 1 if len(images) <= 6 else 2
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    width = max(image.width for image in images)
    whole = Image.new("RGB", (columns * width, sum(heights)), BACKGROUND)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            whole.paste(image, (column * width, y))
        y += height
    return whole


def page(title: str, cards: list[Card], images: list[Image.Image], notes: list[str]) -> str:
    """One HTML file with everything in it."""
    parts = []
    for card, image in zip(cards, images, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        alt = html.escape(f"{card.name}: {'; '.join([*card.facts, *_legend(card)])}", quote=True)
        parts.append(f'<img loading="lazy" alt="{alt}" src="data:image/png;base64,{data}">')
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;background:#fafaf8;color:#1e1e22}"
        "img{display:block;max-width:100%;height:auto}</style>"
        f"<h1>{html.escape(title)}</h1>{said}{''.join(parts)}</html>\n"
    )


def save_sheet(name: Path, title: str, cards: list[Card], images: list[Image.Image], notes: list[str]) -> None:
    """Writes the cards as NAME.png and as NAME.html, making their folder.

    Raises:
        UserError: naming the file that cannot be written, or that is no contact sheet and would be replaced.
    """
    png, page_file = Path(f"{name}.png"), Path(f"{name}.html")
    if "contact_sheet" not in (read_png_note(png) or {}):
        for file in (png, page_file):
            if os.path.lexists(file):
                raise UserError(f"{file} is there and is no contact sheet: give the sheet another name, or remove it")
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{png} cannot be written ({error.strerror})") from error
    text = page(title, cards, images, notes)
    replace_file(png, lambda file: sheet(images).save(file, "PNG", pnginfo=png_note({"contact_sheet": title})))
    replace_file(page_file, lambda file: file.write(text.encode("utf-8", "replace")))
