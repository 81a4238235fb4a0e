"""The table, report.json and report.html of one run."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masked_loss_triton.demo.evaluation import Claim, Samples, Scores
from masked_loss_triton.demo.template import FIGURE, PAGE

# Of each column: its heading, and whether more is better.
COLUMNS = {
    "inside": ("error inside", False),
    "outside": ("error outside", False),
    "drift_outside": ("drift outside", False),
    "subject_psnr": ("subject, dB", True),
    "background_psnr": ("background, dB", True),
    "empty_psnr": ("nobody, dB", True),
}
SHOWN = "It learned the subject and left the background alone"
NOT_SHOWN = "This run did not show everything it should"
QUICK = "A quick run, to see that everything works"
# Of each figure: what it shows, for who cannot see it, and its caption.
CAPTIONS = {
    "samples": (
        "Pictures that the base model and four LoRAs draw from noise: subjects at places where they never stood, empty places",
        "Drawn from pure noise, the same for every model. Top: the photograph that the LoRAs saw. Below, the base model and "
        "the four LoRAs, under the caption “SUBJECT, PLACE”; in the last columns nobody is asked for. Only with the prior does the "
        "subject leave its photograph and stand where the caption says.",
    ),
    "drifts": (
        "Maps of the squared distance from the base model, for the four LoRAs",
        "Squared distance of the prediction from the base model's, averaged over channels, noise and times. Bright inside the "
        "outline and dark outside of it is what masked training is for.",
    ),
    "photos": (
        "Photographs, their weights, and the photographs after encoding",
        "Top: what was read. Middle: the weight of each latent position, what is left out dimmed. Bottom: what the linear encoder "
        "keeps, the best that a prediction here could look like.",
    ),
    "curves": (
        "Training losses, error inside the mask, and drift outside of it, over the training steps",
        "The training losses of the four ways are not comparable, each weighs the picture differently; "
        "the two lower charts measure all of them in the same way.",
    ),
}


def table_of(scores: Mapping[str, Scores], samples: Mapping[str, Samples]) -> dict[str, dict[str, float | None]]:
    """The numbers of the table, unrounded, by row and column; the base model's pictures are not compared with themselves."""
    table: dict[str, dict[str, float | None]] = {}
    for key, score in scores.items():
        drawn, compared = samples[key], key != "base"
        table[key] = {
            "inside": score.inside,
            "outside": score.outside,
            "drift_outside": score.drift_outside,
            "subject_psnr": drawn.subject.psnr,
            "background_psnr": drawn.background.psnr if compared else None,
            "empty_psnr": drawn.empty.psnr if compared else None,
        }
    return table


def _cell(value: float | None, column: str) -> str:
    return "" if value is None else f"{value:.2f}" if column.endswith("psnr") else f"{value:.4f}"


def text_table(table: Mapping[str, Mapping[str, float | None]], titles: Mapping[str, str]) -> str:
    """The table for a terminal."""
    width = max(map(len, titles.values()))
    lines = [f"{'':{width}}  " + "  ".join(f"{title:>13}" for title, _ in COLUMNS.values())]
    for key, row in table.items():
        lines.append(f"{titles[key]:{width}}  " + "  ".join(f"{_cell(row[column], column):>13}" for column in COLUMNS))
    return "\n".join(lines)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _html_table(table: Mapping[str, Mapping[str, float | None]], titles: Mapping[str, str]) -> str:
    """The best number of each column is marked; the base model, which learned nothing, does not compete."""
    best = {}
    for column, (_, more) in COLUMNS.items():
        values = [value for key, row in table.items() if key != "base" and (value := row[column]) is not None]
        best[column] = max(values) if more else min(values)
    rows = []
    for key, row in table.items():
        cells = "".join(
            f"<td{' class=best' if key != 'base' and row[column] == best[column] else ''}>{_cell(row[column], column)}</td>"
            for column in COLUMNS
        )
        rows.append(f'<tr class="{key}"><th scope="row">{html.escape(titles[key])}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{title}</th>' for title, _ in COLUMNS.values())
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def figure_html(pictures: Mapping[str, bytes], alt: str, caption: str) -> str:
    """One figure with its two pictures, WebP, "light" and "dark", inside the page."""
    data = {theme: base64.b64encode(webp).decode() for theme, webp in pictures.items()}
    return FIGURE.substitute(light=data["light"], dark=data["dark"], alt=html.escape(alt, quote=True), caption=caption)


def write_html(
    file: Path,
    table: Mapping[str, Mapping[str, float | None]],
    titles: Mapping[str, str],
    claims: Sequence[Claim],
    figures: Mapping[str, str],
    facts: Mapping[str, str],
    quick: bool,
) -> None:
    """Writes the page. `figures` are what `figure_html` made, by the names the template uses; `facts` its last table; a
    `quick` run claims nothing in the heading."""
    verdicts = "".join(
        f'<li class="{"yes" if claim.holds else "no"}"><span>{"shown" if claim.holds else "not shown"}</span>'
        f"{html.escape(claim.text)}</li>"
        for claim in claims
    )
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()
    )
    verdict = QUICK if quick else SHOWN if all(claim.holds for claim in claims) else NOT_SHOWN
    page = PAGE.substitute(verdict=verdict, table=_html_table(table, titles), verdicts=verdicts, facts=rows, **figures)
    file.write_text(page, encoding="utf-8")
