"""The table, report.json and report.html of one run."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masked_loss_triton.demo.evaluation import Claim, Scores
from masked_loss_triton.demo.template import FIGURE, PAGE

COLUMNS = {
    "inside": "error inside",
    "outside": "error outside",
    "drift_outside": "drift outside",
}
SHOWN = "It learned the subject and left the background alone"
NOT_SHOWN = "This run did not show everything it should"
QUICK = "A quick run, to see that everything works"
# Of each figure: what it shows, for who cannot see it, and its caption.
CAPTIONS = {
    "predictions": (
        "Photographs, and what the base model and the four LoRAs predict of them",
        "The clean picture as each model predicts it in one step from noise level 0.7, with the outline of the mask. Outside the "
        "outline, the closer to the base model the better. Without a mask the background is learned like the subject; "
        "with a mask alone nothing holds the background in place; the prior holds it.",
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


def table_of(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The numbers of the table, unrounded, by row and column."""
    return {key: {column: getattr(score, column) for column in COLUMNS} for key, score in scores.items()}


def text_table(table: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """The table for a terminal."""
    width = max(map(len, titles.values()))
    lines = [f"{'':{width}}  " + "  ".join(f"{title:>13}" for title in COLUMNS.values())]
    for key, row in table.items():
        lines.append(f"{titles[key]:{width}}  " + "  ".join(f"{row[column]:13.4f}" for column in COLUMNS))
    return "\n".join(lines)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _html_table(table: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """The best number of each column is marked; the base model, which learned nothing, does not compete."""
    best = {column: min(row[column] for key, row in table.items() if key != "base") for column in COLUMNS}
    rows = []
    for key, row in table.items():
        cells = "".join(
            f"<td{' class=best' if key != 'base' and row[column] == best[column] else ''}>{row[column]:.4f}</td>"
            for column in COLUMNS
        )
        rows.append(f'<tr class="{key}"><th scope="row">{html.escape(titles[key])}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{title}</th>' for title in COLUMNS.values())
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def figure_html(pictures: Mapping[str, bytes], alt: str, caption: str) -> str:
    """One figure with its two pictures, "light" and "dark", inside the page."""
    data = {theme: base64.b64encode(png).decode() for theme, png in pictures.items()}
    return FIGURE.substitute(light=data["light"], dark=data["dark"], alt=html.escape(alt, quote=True), caption=caption)


def write_html(
    file: Path,
    table: Mapping[str, Mapping[str, float]],
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
