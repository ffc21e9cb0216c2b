"""The HTML page: a self-contained file for screens, phones and printers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ds.evaluation.report.style import Drawing

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    """Its heading."""
    text: str
    """One or two sentences on what the figures show, or why there are none."""
    drawings: Sequence[Drawing] = ()
    """Its figures."""

    @property
    def anchor(self) -> str:
        """The fragment that links to the section."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """The contents of a report, as plain text."""

    title: str
    """Name of the run or model."""
    subtitle: str
    """The model and its data in one line."""
    numbers: Mapping[str, str]
    """The most important numbers by name."""
    sections: Sequence[Section]
    """The sections with figures."""
    tables: Mapping[str, Mapping[str, str]]
    """Tables of names and values, by heading."""
    command: str
    """The command line that generated the report."""
    notes: Sequence[str] = ()
    """Notes on what is missing or unusual."""


def render(page: Page, files: Mapping[str, bytes]) -> str:
    """Return the page as HTML.

    Args:
        page: the contents; everything is escaped.
        files: the PNG file of each drawing by name.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sources = {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in files.items()}
    drawings = [drawing.name for section in page.sections for drawing in section.drawings]
    numbers = {name: number for number, name in enumerate(drawings, 1)}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, sources=sources, figure_numbers=numbers)
