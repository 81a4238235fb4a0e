"""The pictures of the report, drawn once for light pages and once for dark ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

MAX_SHOWN = 6  # photographs
DPI = 144
WIDTH = 11.4  # inches, of every figure that has enough columns: text is then of one size throughout the page
MAX_TILE = 2.8  # inches
OUTLINE = 0.5  # the mask value that the contour follows
# One colour per way, the same in every chart: Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "base": "#8a8f98",
    "no_mask": "#d55e00",
    "mask": "#e69f00",
    "mask_min_weight": "#009e73",
    "mask_prior": "#3a8fd6",
}
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1d2127", "faint": "#d9dce1", "quiet": "#5c636e"},
    "dark": {"paper": "#16181c", "ink": "#e8eaed", "faint": "#363b43", "quiet": "#a2a9b4"},
}


@dataclass
class Curves:
    """How one way went: training loss per step, and scores at some steps (0 is before the first)."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    drift_outside: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """One photograph of the figures: uint8 pictures (H, W, 3), arrays (h, w) at latent size."""

    name: str
    photo: np.ndarray
    mask: np.ndarray
    decoded: np.ndarray  # encoded and decoded: the best that any model here could draw
    drifts: Mapping[str, np.ndarray]  # by the keys of the ways


def _grid(rows: int, columns: int, theme: Mapping[str, str], foot: float = 0.0) -> tuple[Figure, np.ndarray]:
    """Square tiles, with room for a line of text above and beside them, and `foot` inches below."""
    tile = min(MAX_TILE, (WIDTH - 0.3) / columns)
    size = (columns * tile + 0.3, rows * tile + 0.3 + foot)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=size, dpi=DPI, facecolor=theme["paper"], layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _tile(axes: Axes, picture: np.ndarray, mask: np.ndarray | None = None, **options: Any) -> Any:
    height, width = mask.shape if mask is not None else picture.shape[:2]
    image = axes.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased", **options)
    if mask is not None and mask.min() < OUTLINE < mask.max():
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        # Two lines, dark under light, so that the outline shows on any picture.
        axes.contour(x, y, mask, [OUTLINE], colors="black", linewidths=2.2, alpha=0.55)
        axes.contour(x, y, mask, [OUTLINE], colors="white", linewidths=1.0)
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    return image


def _name(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:19]}…"


def draw_photos(shown: Sequence[Shown], theme: Mapping[str, str]) -> Figure:
    """Each photograph; its weights at latent size, what is left out dimmed; what the 16 channels keep of it."""
    figure, axes = _grid(3, len(shown), theme)
    for column, item in zip(axes.T, shown, strict=True):
        _tile(column[0], item.photo)
        side = item.photo.shape[0] // item.mask.shape[0]
        weight = np.kron(item.mask, np.ones((side, side), np.float32))[..., None]
        grey = item.photo.mean(axis=2, keepdims=True) * 0.35
        _tile(column[1], (item.photo * weight + grey * (1 - weight)).astype(np.uint8), item.mask)
        _tile(column[2], item.decoded)
        column[0].set_title(_name(item.name), color=theme["ink"], fontsize=11, parse_math=False)
    for row, label in zip(axes[:, 0], ("photograph", "weight", "encoded, decoded"), strict=True):
        row.set_ylabel(label, color=theme["ink"], fontsize=11)
    return figure


def draw_samples(
    shown: Sequence[Shown],
    samples: Mapping[str, np.ndarray],
    places: Sequence[str],
    titles: Mapping[str, str],
    theme: Mapping[str, str],
) -> Figure:
    """What each model draws from pure noise: every photograph's subject at one place, then at another, then two places alone. The
    first row shows the photograph that the LoRAs saw; `samples` has the pictures of each model, as `Samples.pictures`."""
    count = len(places)
    spots = [(i, (i + turn) % count) for turn in (0, 2) for i in range(min(len(shown), count))]
    alone = next(iter(samples.values())).shape[0] - count
    chosen = [i * count + place for i, place in spots] + [alone, alone + 1]
    heads = [f"{_name(shown[i].name)},\n{places[place]}" for i, place in spots]
    heads += [f"nobody,\n{place}" for place in places[:2]]
    photos = [shown[i].decoded for i, _ in spots]
    rows = {"photograph": photos} | {title: [samples[key][i] for i in chosen] for key, title in titles.items()}
    return draw_rows(rows, heads, theme, masks=[shown[i].mask for i, _ in spots])


def draw_rows(
    rows: Mapping[str, Sequence[np.ndarray]],
    heads: Sequence[str],
    theme: Mapping[str, str],
    masks: Sequence[np.ndarray] = (),
) -> Figure:
    """Rows of pictures with a word beside each and one above each column; a shorter row leaves its end empty, and the first row
    shows the outlines of masks."""
    figure, axes = _grid(len(rows), len(heads), theme, foot=0.2)
    outlines = masks  # of the first row
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title.replace(" + ", "\n+ "), color=theme["ink"], fontsize=9)
        for tile in line[len(pictures) :]:
            tile.set_axis_off()
        for i, (tile, picture) in enumerate(zip(line, pictures, strict=False)):
            _tile(tile, picture, outlines[i] if i < len(outlines) else None)
        outlines = ()
    for tile, head in zip(axes[0], heads, strict=True):
        tile.set_title(head, color=theme["ink"], fontsize=9, parse_math=False)
    return figure


def draw_drifts(shown: Sequence[Shown], titles: Mapping[str, str], theme: Mapping[str, str]) -> Figure:
    """Where each way moved the model away from the base: one colour scale for all."""
    figure, axes = _grid(len(shown), len(titles), theme, foot=0.75)
    top = float(np.quantile(np.stack([drift for item in shown for drift in item.drifts.values()]), 0.98))
    image: Any = None
    for row, item in zip(axes, shown, strict=True):
        for tile, key in zip(row, titles, strict=True):
            image = _tile(tile, item.drifts[key], item.mask, cmap="magma", vmin=0, vmax=max(top, 1e-6))
        row[0].set_ylabel(_name(item.name), color=theme["ink"], fontsize=11, parse_math=False)
    for tile, title in zip(axes[0], titles.values(), strict=True):
        tile.set_title(title, color=theme["ink"], fontsize=11)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.4, aspect=40, pad=0.015)
    bar.set_label("squared distance from the base model", color=theme["quiet"], fontsize=10)
    bar.ax.tick_params(colors=theme["quiet"], labelsize=9)
    bar.outline.set_visible(False)
    return figure


def draw_curves(
    base_losses: Sequence[float], curves: Mapping[str, Curves], titles: Mapping[str, str], theme: Mapping[str, str]
) -> Figure:
    """The base model's loss, the four ways' losses, and what the losses do not tell: inside error and outside drift."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(WIDTH, 6.6), dpi=DPI, facecolor=theme["paper"], layout=layout)
    (base, loss), (inside, drift) = figure.subplots(2, 2)
    base.plot(*_smooth(base_losses), color=COLOURS["base"], linewidth=1.8)
    for key, curve in curves.items():
        style: dict[str, Any] = {"color": COLOURS[key], "linewidth": 1.8, "label": titles[key]}
        loss.plot(*_smooth(curve.losses), **style)
        inside.plot(curve.steps, curve.inside, marker="o", markersize=3.5, **style)
        drift.plot(curve.steps, curve.drift_outside, marker="o", markersize=3.5, **style)
    for axes, title in (
        (base, "Base model: training loss"),
        (loss, "LoRA: training loss (each way has its own)"),
        (inside, "Error inside the mask, fixed test"),
        (drift, "Drift of the outside from the base, fixed test"),
    ):
        axes.set_title(title, loc="left", color=theme["ink"], fontsize=11, fontweight="bold", pad=8)
        axes.set_facecolor(theme["paper"])
        axes.tick_params(colors=theme["quiet"], labelsize=9, length=0)
        axes.grid(axis="y", color=theme["faint"], linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("step", color=theme["quiet"], fontsize=9)
        axes.margins(x=0.01)
    drift.set_ylim(bottom=0)
    inside.legend(frameon=False, fontsize=9.5, labelcolor=theme["ink"])
    return figure


def _smooth(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean loss of the steps round each: the noise and times differ from step to step."""
    width = max(1, len(losses) // 25)
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means


def to_png(figure: Figure) -> bytes:
    """The finished file, without the metadata that would differ from one version of matplotlib to the next."""
    return _written(figure, format="png", metadata={"Software": None})


def to_webp(figure: Figure) -> bytes:
    """The same for a page: a tenth of the size."""
    return _written(figure, format="webp", pil_kwargs={"quality": 88, "method": 6})


def to_jpeg(figure: Figure) -> bytes:
    """The same for a page of documentation."""
    return _written(figure, format="jpg", pil_kwargs={"quality": 88, "optimize": True})


def _written(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure.savefig(buffer, **options)
    return buffer.getvalue()
