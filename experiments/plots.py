"""Figures, drawn without a display and written atomically."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from experiments.comparison import Cell, yardstick
from experiments.story import DISAGREES, NOTABLE, Story
from kvenv.evaluation import FULL
from kvenv.files import write_atomic

MARKED: dict[str, tuple[object, str]] = {
    "full": ("black", ":"),
    "golden": ("goldenrod", "--"),
    "golden-expected": ("darkorange", "--"),
    "random": ("grey", "--"),
}
"""Colour and line of the policies that frame every comparison."""

COLOURS = matplotlib.colormaps["tab20"]
"""Colours of the others, in the order in which they come."""

PANELS = 5
"""Panels beside each other."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    write_atomic(path, data.getvalue())


def plot_losses(cells: Sequence[Cell], path: Path) -> None:
    """Draw what policies are judged by against budget, one panel per family, with 95 % intervals.

    That is the score where there is one, else answer loss, else LM loss.

    Parameters
    ----------
    cells : sequence of Cell
        From :meth:`experiments.comparison.Comparison.cells`.
    path : Path
        The PNG.
    """
    families = list(dict.fromkeys(cell.family for cell in cells))
    styles = _styles(cells)
    columns = min(len(families), PANELS)
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(4.5 * columns + 1.5, 4.5 * rows), layout="constrained")
    for number, family in enumerate(families, start=1):
        here = [cell for cell in cells if cell.family == family]
        metric = yardstick(family, set.intersection(*(set(cell.estimates) for cell in here)))
        axes = figure.add_subplot(rows, columns, number)
        for policy in dict.fromkeys(cell.policy for cell in here):
            points = sorted((c.budget, c.estimates[metric]) for c in here if c.policy == policy)
            budgets, means = [budget for budget, _ in points], [estimate.mean for _, estimate in points]
            colour, line = styles[policy]
            axes.plot(budgets, means, line, marker="o", markersize=3, color=colour, label=policy)
            lows, highs = [e.low for _, e in points], [e.high for _, e in points]
            axes.fill_between(budgets, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({cell.budget for cell in here}))
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        unit = "" if metric == "score" else " (nats)"
        axes.set(title=family, xlabel="budget (pairs per head)", ylabel=f"{metric.replace('_', ' ')}{unit}")
    _legend(figure)
    save(figure, path)


def plot_by_entropy(cells: Sequence[Cell], path: Path) -> None:
    """Draw how much the loss rose by tenth of the tokens' full-cache entropy: a row per family, a column per budget.

    ForesightKV's motivating figure: what eviction costs where the LLM was certain. In nats: the full cache's loss of
    the most certain tokens is nearly 0, and a share of that says nothing.

    Parameters
    ----------
    cells : sequence of Cell
        Some with losses by entropy.
    path : Path
        The PNG.
    """
    split = [(cell, *cell.by_entropy) for cell in cells if cell.by_entropy is not None and cell.policy != FULL]
    styles = _styles(cells)
    families = list(dict.fromkeys(cell.family for cell, *_ in split))
    budgets = sorted({cell.budget for cell, *_ in split})
    figure = Figure(figsize=(4.5 * len(budgets) + 1.5, 4 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), len(budgets), squeeze=False, sharey="row")
    for cell, lost, full in split:
        axes = grid[families.index(cell.family), budgets.index(cell.budget)]
        colour, line = styles[cell.policy]
        tenths = np.arange(1, len(lost) + 1)
        axes.plot(tenths, lost - full, line, marker="o", markersize=3, color=colour, label=cell.policy)
        axes.set(title=f"{cell.family}, budget {cell.budget}", xlabel="tenth of the tokens by full-cache entropy")
        axes.set_ylabel("rise of the loss (nats)")
    _legend(figure)
    save(figure, path)


def _styles(cells: Sequence[Cell]) -> dict[str, tuple[object, str]]:
    """Return colour and line of every policy, in the order in which they come."""
    others = [policy for policy in dict.fromkeys(cell.policy for cell in cells) if policy not in MARKED]
    return MARKED | {policy: (COLOURS(number % COLOURS.N), "-") for number, policy in enumerate(others)}


def _legend(figure: Figure) -> None:
    """Say what the lines of all panels are, once."""
    lines = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(lines.values()), list(lines), fontsize="small", loc="outside right upper")


Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Updates, seconds of training, values."""


def plot_curves(panels: Mapping[str, Mapping[str, Curve]], path: Path, clock: str = "updates") -> None:
    """Draw training curves, a row of panels by update above the same by wall clock.

    Parameters
    ----------
    panels : dict of str to dict of str to Curve
        Curves by what is measured and by run.
    path : Path
        The PNG.
    clock : str
        What the curves' steps are.

    Raises
    ------
    ValueError
        If there is no curve.
    """
    if not panels:
        raise ValueError("the runs have measured nothing that could be drawn")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: COLOURS(number % COLOURS.N) for number, name in enumerate(names)}
    figure = Figure(figsize=(4.5 * len(panels) + 1.5, 7), layout="constrained")
    for number, (label, curves) in enumerate(panels.items(), start=1):
        for row, axis in enumerate((clock, "minutes of training")):
            axes = figure.add_subplot(2, len(panels), row * len(panels) + number)
            for name, (steps, seconds, values) in curves.items():
                at = np.asarray(seconds) / 60 if row else steps
                axes.plot(at, values, marker="o", markersize=2, linewidth=1, color=colours[name], label=name)
            axes.set(xlabel=axis, ylabel=label)
    handles = [figure.axes[0].plot([], [], color=colours[name])[0] for name in names]
    figure.legend(handles, names, fontsize="small", loc="outside lower center", ncols=4)
    save(figure, path)


def plot_story(story: Story, title: str, path: Path) -> None:
    """Draw what is kept at every decision, where golden disagrees, and the loss of every token; as PNG.

    Raises
    ------
    ValueError
        If there was no decision.
    """
    _check_decisions(story, title)
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(2, 1))
    held = figure.add_subplot(grid[0])
    # Tokens that a decision could not see yet stay blank.
    seen = np.arange(len(story.words)) < np.array(story.decisions)[:, None]
    image = held.imshow(np.where(seen, story.kept, np.nan), aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    decision, token = np.nonzero(story.disagreement >= DISAGREES)
    held.plot(token, decision, "r.", markersize=1.5, label=f"golden disagrees in {DISAGREES:.0%} of the heads or more")
    held.set(title=title, ylabel="decision")
    held.legend(fontsize="small", loc="upper right")
    figure.colorbar(image, ax=held, label="share of heads that keep the pair")
    loss = figure.add_subplot(grid[1], sharex=held)
    loss.fill_between(
        np.arange(len(story.words)),
        0,
        1,
        where=story.answer,
        transform=loss.get_xaxis_transform(),
        alpha=0.2,
        label="answers",
    )
    loss.plot(story.nll, linewidth=0.8, color="tab:red", label="policy")
    loss.plot(story.full_nll, linewidth=0.8, color="black", label="full cache")
    loss.set(xlabel="token", ylabel="loss (nats)", xlim=(-0.5, len(story.words) - 0.5))
    loss.legend(fontsize="small", loc="upper right")
    save(figure, path)


CELL = (64, 20)
"""Width and height of a token in a GIF, in pixels."""


def animate_story(story: Story, title: str, path: Path) -> None:
    """Draw the text with what is kept of it, one frame per decision; as GIF.

    A line holds one window. Colour says how many heads keep a token, a red frame that golden disagrees, red text
    that the loss of a token just fed rose.

    Raises
    ------
    ValueError
        If there was no decision.
    """
    _check_decisions(story, title)
    frames = [_frame(story, number, stop, title) for number, _, stop in story.windows()]
    data = io.BytesIO()
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:], duration=600, loop=0)
    write_atomic(path, data.getvalue())


def _check_decisions(story: Story, title: str) -> None:
    if not story.decisions:
        raise ValueError(f"{title}: nothing is evicted, so there is no picture of it")


def _frame(story: Story, number: int, stop: int, title: str) -> Image.Image:
    """Return the picture after a decision and the window that follows it: tokens before ``stop`` are shown."""
    start = story.decisions[number]
    columns = story.decisions[1] - story.decisions[0] if len(story.decisions) > 1 else 16
    lines = -(-len(story.words) // columns)
    picture = Image.new("RGB", (columns * CELL[0] + 8, (lines + 1) * CELL[1] + 8), "white")
    draw, font, colours = ImageDraw.Draw(picture), ImageFont.load_default(11), matplotlib.colormaps["viridis"]
    draw.text((6, 6), f"{title}: decision {number + 1} of {len(story.decisions)}", fill="black", font=font)
    for token in range(stop):
        line, column = divmod(token, columns)
        left, top = 4 + column * CELL[0], 4 + (line + 1) * CELL[1]
        box = (left, top, left + CELL[0] - 2, top + CELL[1] - 2)
        share = story.kept[number, token]
        fresh = token >= start
        lost = story.nll[token] - story.full_nll[token] >= NOTABLE
        fill = "white" if fresh else tuple(int(255 * c) for c in colours(share)[:3])
        marked = story.disagreement[number, token] >= DISAGREES
        draw.rectangle(box, fill=fill, outline="red" if marked else "white", width=2)
        ink = "red" if lost and fresh else "black" if fresh or share > 0.6 else "white"
        draw.text((left + 4, top + 3), story.words[token][:10], fill=ink, font=font)
    return picture
