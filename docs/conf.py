"""How Sphinx builds these pages; ``make docs`` does it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import OptionSpec

import lightning_pipebd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import figures  # noqa: E402  # stands beside this file

project = "lightning-pipebd"
author = "the lightning-pipebd authors"
version = release = lightning_pipebd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
# Examples and their output are checked by the tests; here they are only shown.
highlight_language = "text"

html_theme = "furo"
# The theme's own underlines imported names as if they were links.
pygments_dark_style = "monokai"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_show_sourcelink = False

autodoc_member_order = "bysource"
maximum_signature_line_length = 100
autodoc_typehints_format = "short"
toc_object_entries_show_parents = "hide"
# Hooks of Lightning's that our classes override are described by Lightning.
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False


class Picture(SphinxDirective):
    """A drawing of ``figures.py``, in the colours of the page's theme, above its caption."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[OptionSpec] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Give a figure of as many images as there are themes; the theme's style sheet hides all but one."""
        name = self.arguments[0]
        if name not in figures.PICTURES:
            raise self.error(f"`picture` must be one of {', '.join(figures.PICTURES)}, but is {name!r}.")
        if "alt" not in self.options:
            raise self.error("`picture` must have an `alt`: what a reader who cannot see it should know.")
        figure = nodes.figure()
        for theme in figures.THEMES:
            image = nodes.image(uri=f"/_figures/{name}_{theme}.svg", alt=self.options["alt"], classes=[f"only-{theme}"])
            figure += image
        text, messages = self.parse_inline(" ".join(self.content))
        figure += nodes.caption("", "", *text)
        return [figure, *messages]


class NumbersStayOnOneLine(SphinxTransform):
    """Mark cells of tables that hold a number, with its unit or range, so that the style sheet does not break them."""

    default_priority = 700
    most_characters = 24

    def apply(self, **kwargs: object) -> None:
        """Add the class `number` to such cells."""
        for cell in self.document.findall(nodes.entry):
            text = cell.astext().strip()
            if text[:1].isdigit() and len(text) <= self.most_characters:
                cell["classes"].append("number")


def setup(app: Sphinx) -> None:
    """Draw the pictures before the pages that show them are read."""
    app.add_directive("picture", Picture)
    app.add_transform(NumbersStayOnOneLine)
    figures.draw_all(HERE / "_figures")
