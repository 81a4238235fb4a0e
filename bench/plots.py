"""The plots of the results: one idea each, readable without the table."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]
OURS, COMPILED, PEER, YARDSTICK = "#1b7f5c", "#c98a1b", "#9aa5b1", "#3b4252"


def is_eager(loss: str) -> bool:
    return not loss.startswith(("ours", "torch.compile", "copy", "floor"))


def _color(loss: str) -> str:
    if loss.startswith("ours"):
        return OURS
    return PEER if is_eager(loss) else COMPILED if loss.startswith("torch.compile") else YARDSTICK


def _bars(axes: Any, names: list[str], values: list[float], title: str, label: str, form: str) -> None:
    axes.barh(range(len(names)), values, color=[_color(name) for name in names], height=0.72)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    for index, value in enumerate(values):
        axes.text(value, index, " " + format(value, form), va="center", fontsize=7)
    axes.set_xlim(0, 1.13 * max(values))
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, folder: pathlib.Path, name: str, alternative: str) -> list[str]:
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)
    return [f"![{alternative}]({name}.png)"]


def time(rows: Rows, folder: pathlib.Path) -> list[str]:
    """Forward and backward of every loss, one panel per case, at most eight."""
    both = [row for row in rows if row["part"] == "both" and row["loss"] != "copy"]
    cases = list(dict.fromkeys(row["case"] for row in both))[:8]
    height = -(-len(cases) // 2)
    figure, grid = plt.subplots(height, 2, figsize=(12, 3.1 * height), layout="constrained", squeeze=False)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    for axes, case in zip(grid.flat, cases, strict=False):
        of_case = sorted((row for row in both if row["case"] == case), key=lambda row: row["milliseconds"])
        names, values = [row["loss"] for row in of_case], [row["milliseconds"] for row in of_case]
        _bars(axes, names, values, case, "ms, forward + backward", ".2f")
    figure.suptitle(
        "Time of a step's loss: ours green, torch.compile amber, eager recipes grey, floor dark", fontsize=10
    )
    return _save(figure, folder, "time", "time of forward and backward")


def traffic(rows: Rows, folder: pathlib.Path) -> list[str]:
    """Bytes of each loss in units of pred, without and with prior, of the first case of each."""
    panels = []
    for prior in (False, True):
        of_kind = [
            row for row in rows if ("prior" in row["case"].split()) == prior and "flow" not in row["case"].split()
        ]
        panels.append([row for row in of_kind if row["case"] == of_kind[0]["case"]] if of_kind else [])
    panels = [panel for panel in panels if panel]
    figure, grid = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        panel = sorted(panel, key=lambda row: row["bytes"])
        prior = "prior" in panel[0]["case"].split()
        names, values = [row["name"] for row in panel], [row["bytes"] for row in panel]
        _bars(axes, names, values, panel[0]["case"], "bytes moved / bytes of pred", ".2f")
        floor = 4 if prior else 3
        axes.axvline(floor, color=YARDSTICK, linewidth=1, linestyle="--")
        axes.set_ylim(len(panel) + 0.1, -0.6)
        axes.text(floor, len(panel) - 0.1, f" floor: {floor}, and the mask", fontsize=7, color=YARDSTICK)
    figure.suptitle("Memory traffic of forward + backward, counted", fontsize=10)
    return _save(figure, folder, "traffic", "bytes moved")


def registers(rows: Rows, folder: pathlib.Path) -> list[str]:
    """Registers of the loss kernel, by variant and target."""
    of_kernel = [row for row in rows if row["kernel"] == "loss_kernel"]
    variants = list(dict.fromkeys(row["variant"] for row in of_kernel))
    targets = list(dict.fromkeys(row["target"] for row in of_kernel))
    most = {(row["variant"], row["target"]): row for row in sorted(of_kernel, key=lambda row: row["registers"])}
    values = [[most[variant, target]["registers"] for target in targets] for variant in variants]
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(variants) + 1.4), layout="constrained")
    axes.imshow(values, cmap="YlOrBr", aspect="auto", vmin=0, vmax=max(128, *map(max, values)))
    axes.set_xticks(range(len(targets)), targets, fontsize=8)
    axes.set_yticks(range(len(variants)), variants, fontsize=8)
    for y, variant in enumerate(variants):
        for x, target in enumerate(targets):
            row = most[variant, target]
            spills = f", {row['spills']} spills" if row["spills"] else ""
            text = f"{row['registers']} ({row['occupancy']:.0%}){spills}"
            axes.text(
                x, y, text, ha="center", va="center", fontsize=7, color="white" if row["registers"] > 90 else "black"
            )
    axes.set_title("Loss kernel: registers per thread (occupancy)", fontsize=9, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _save(figure, folder, "registers", "registers of the loss kernel")


KEPT = {"1": YARDSTICK, "0.75": OURS, "0.5": COMPILED, "0.25": "#b3423a"}


def routing(rows: Rows, folder: pathlib.Path) -> list[str]:
    """Error inside and drift outside while LoRAs are learned with some of the tokens: a line of panels for each model, means over
    seeds; time is processor time, in units of the whole training with all tokens."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = plt.subplots(len(models), 3, figsize=(12, 3.5 * len(models)), layout="constrained", squeeze=False)
    for line, name in zip(grid, models, strict=True):
        of_model = [row for row in rows if row["model"] == name]
        whole = {
            row["seed"]: float(row["cpu_seconds"])
            for row in of_model
            if row["arm"] == "keep 1" and row["step"] == row["steps"]
        }
        for arm in dict.fromkeys(row["arm"] for row in of_model if row["arm"].startswith("keep")):
            of_arm = [row for row in of_model if row["arm"] == arm and row["seed"] in whole]
            steps = [float(row["step"]) for row in of_arm]
            times = [float(row["cpu_seconds"]) / whole[row["seed"]] for row in of_arm]
            inside, drift = ([float(row[field]) for row in of_arm] for field in ("inside", "drift_outside"))
            keep, *rest = arm.removeprefix("keep ").split(", ")
            style = ":" if "prior" in rest else "--" if "equal work" in rest else "-." if rest else "-"
            look = {"color": KEPT[keep], "linestyle": style, "marker": ".", "markersize": 5, "linewidth": 1.3}
            for axes, x, y in zip(line, (steps, times, times), (inside, inside, drift), strict=True):
                if not (axes is line[0] and "equal work" in rest):
                    axes.plot(*_means(steps, x, y), **look, label=arm)
        for axes, title, label in zip(
            line,
            ("error inside against steps", "error inside against time", "drift outside against time"),
            (
                "steps",
                "processor time, of the training with all tokens",
                "processor time, of the training with all tokens",
            ),
            strict=True,
        ):
            axes.set_title(f"{name} model: {title}", fontsize=9, loc="left")
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_visible(len({row["step"] for row in of_model}) > 1)
        # Beside: no place inside is free.
        line[2].legend(fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
    return _save(figure, folder, "routing", "error and drift against steps and time, by the share of tokens kept")


def _means(steps: list[float], x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """The means over seeds of x and y at each step."""
    at = sorted(set(steps))
    picked = [[index for index, step in enumerate(steps) if step == one] for one in at]
    average = lambda values: [sum(values[index] for index in some) / len(some) for some in picked]  # noqa: E731
    return average(x), average(y)


def dial(lines: dict[str, list[tuple[str, float, float]]], folder: pathlib.Path) -> list[str]:
    """Error inside against drift outside: prior weights as one curve, the mask alone as it trains as another, others as points."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for (name, points), color in zip(lines.items(), (OURS, COMPILED, YARDSTICK), strict=True):
        labels, inside, drift = zip(*points, strict=True)
        axes.plot(drift, inside, "o-" if name else "o", color=color, markersize=4, label=name or None)
        marked = range(len(points)) if name in ("prior_weight", "") else (len(points) // 4, len(points) - 1)
        for i in marked:
            axes.annotate(labels[i], (drift[i], inside[i]), (5, 4), textcoords="offset points", fontsize=8, color=color)
    axes.set_xlabel("drift outside, from the base model", fontsize=9)
    axes.set_ylabel("error inside", fontsize=9)
    axes.set_title("Lower left is better", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, folder, "proof_dial", "error inside against drift outside")
