"""Style of a report's figures: one typeface, a few colors that color-blind readers can distinguish, no decoration."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

INK, MUTED, HAIRLINE = "#1b1f24", "#5b6470", "#d5dae0"
"""Text and axes, secondary text, grid lines; also used by the page."""
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SKY, AMBER, BROWN, GRAY, VIOLET = "#56b4e9", "#e69f00", "#8c564b", "#7f7f7f", "#5e4fa2"
"""Colors of curves, from the palette of Okabe and Ito."""
COMPUTE = "viridis"
"""Color map of experts per token: monotonic in lightness, so that it also works in print."""
BALANCE = "PuOr_r"
"""Diverging color map of load, whose middle is balanced."""
PANEL = (4.3, 2.75)
"""Width and height of a panel in inches; a column of the page is as wide."""
SHEET_WIDTH = 5.6
"""Width of a sheet of pictures in inches."""
DPI = 200
"""Resolution of the files: twice that of a screen."""

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures look the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,  # names of classes and runs may contain dollar signs
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption."""

    name: str
    """Name of the file, without its suffix."""
    title: str
    """What is shown; starts the caption."""
    caption: str
    """Sentences on the number of images and on how to read the figure."""
    figure: Any
    """The `matplotlib.figure.Figure`."""
    is_wide: bool = False
    """Whether it takes the full width of the page."""

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels: a full sheet is 640 wide."""
        inches: float = self.figure.get_figwidth()
        return round(inches * 640 / SHEET_WIDTH)

    def png(self) -> bytes:
        """Return the figure as a PNG file."""
        buffer = io.BytesIO()
        with styled():
            # without the version of matplotlib, so that equal figures give equal files
            self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style to all figures created within the context."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def panel(width: float = PANEL[0], height: float = PANEL[1]) -> tuple[Any, Any]:
    """Return a figure with one pair of axes, with horizontal grid lines.

    Args:
        width: in inches.
        height: in inches.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may look for a display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.tick_params(length=3)
    return figure, axes


def images_axis(axes: Any) -> None:
    """Label the x axis as images trained on, with short numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("images trained on")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def short_number(value: float) -> str:
    """Return a number with at most three digits and a suffix, such as 30k or 1.2M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def depth_colors(count: int) -> list[Any]:
    """Return one color per layer, from dark for the first to light for the last."""
    from matplotlib import colormaps

    return [colormaps[COMPUTE](x) for x in np.linspace(0.05, 0.8, max(count, 1))]


def layer_name(block: int) -> str:
    """Return the name of the MoE layer in a block."""
    return f"block {block}"


class Sheet:
    """A figure of pictures and labels at given positions, in inches from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        """Create an empty sheet.

        Args:
            width: in inches.
            height: in inches.
        """
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height))
        self._size = width, height
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()

    def place(self, picture: Any, x: float, y: float, side: float, **options: Any) -> None:
        """Draw a picture.

        Args:
            picture: uint8 [H, W, C] with one or three channels, or numbers [H, W] with a ``cmap`` among the options.
            x: of its left edge.
            y: of its upper edge.
            side: width and height.
            options: of matplotlib's ``imshow``.
        """
        if picture.ndim == 3 and picture.shape[2] == 1:
            picture = np.repeat(picture, 3, axis=2)
        self._axes.imshow(picture, extent=(x, x + side, y + side, y), aspect="auto", **options)
        self._axes.set(xlim=(0, self._size[0]), ylim=(self._size[1], 0))

    def write(self, text: str, x: float, y: float, **options: Any) -> None:
        """Write a label; the options are matplotlib's."""
        self._axes.text(x, y, text, **options)

    def color_bar(self, image_map: Any, label: str, x: float, y: float, width: float) -> None:
        """Draw a horizontal color bar with a label below it.

        Args:
            image_map: a `matplotlib.cm.ScalarMappable`.
            label: what the colors stand for.
            x: of its left edge.
            y: of its upper edge.
            width: of the bar.
        """
        total, height = self._size
        axes = self.figure.add_axes((x / total, 1 - (y + 0.1) / height, width / total, 0.1 / height))
        bar = self.figure.colorbar(image_map, cax=axes, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.set_label(label)
        axes.tick_params(length=3)


@dataclass(frozen=True)
class PictureRow:
    """A row of pictures with a label on its left."""

    label: str
    """A few lines."""
    pictures: Sequence[Any]
    """uint8 [H, W, C]."""
    starts_group: bool = False
    """Whether to leave some space above the row."""


def picture_sheet(
    name: str, title: str, caption: str, rows: Sequence[PictureRow], heads: Sequence[str] = ()
) -> Drawing:
    """Draw rows of pictures.

    Args:
        name: name of the file.
        title: of the figure.
        caption: of the figure.
        rows: the rows; the longest decides how large the pictures are.
        heads: labels above the columns, which may take several lines; none if empty.
    """
    gap, space = 0.05, 0.16
    longest = max(len(line) for row in rows for line in row.label.splitlines())
    left = 0.12 + 0.082 * longest
    columns = max(len(row.pictures) for row in rows)
    side = min(0.95, (SHEET_WIDTH - left) / columns - gap)
    heads = [wrapped(head, round(side / 0.075), lines=4) for head in heads]
    top = 0.12 + 0.12 * max(head.count("\n") + 1 for head in heads) if heads else 0.02
    height = top + len(rows) * (side + gap) + space * sum(row.starts_group for row in rows)
    sheet = Sheet(left + columns * (side + gap), height)
    for column, head in enumerate(heads):
        sheet.write(head, left + column * (side + gap) + side / 2, top - 0.07, ha="center", fontsize=8)
    y = top
    for row in rows:
        y += space * row.starts_group
        sheet.write(row.label, left - 0.08, y + side / 2, ha="right", va="center")
        for column, picture in enumerate(row.pictures):
            sheet.place(picture, left + column * (side + gap), y, side)
        y += side + gap
    return Drawing(name, title, caption, sheet.figure, is_wide=True)


def wrapped(text: str, width: int, lines: int) -> str:
    """Return a text in at most ``lines`` lines of ``width`` characters, cut with an ellipsis."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="…"))


def shorten(text: str, length: int) -> str:
    """Return a text with at most ``length`` characters, cut with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
