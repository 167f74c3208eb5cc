"""Sphinx: ``make docs`` writes build/docs/index.html. Nothing is downloaded, and a warning is an error."""

import posixpath
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from soap_opt import __version__

project = "soap_opt"
author = "the authors of soap_opt"
copyright = "the authors of soap_opt, MIT licence"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"soap_opt {__version__}"
copybutton_exclude = ".linenos, .gp, .go"

myst_heading_anchors = 3  # [text](page.md#a-heading), as GitHub has them

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures carry them already
autodoc_typehints_format = "short"
autodoc_mock_imports = ["compressai"]  # of the extra "examples", which the documentation does not need
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

REPOSITORY = "https://github.com/soap-opt/soap_opt"
ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)(\[[^\]]*\])\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)")

logger = logging.getLogger(__name__)


def link_to_repository(app: Sphinx, page: str, source: list[str]) -> None:
    """Links from a page to files outside of docs/ become links to the repository's host.

    In the sources they are relative, so that they work in a clone and on the host as they stand. One that leads nowhere is a
    warning, which ``make docs`` takes for an error.
    """

    def target(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            logger.warning("%s links to %s, which is not there", page, path)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{text}({REPOSITORY}/{kind}/main/{path}{anchor})"

    source[0] = LINK.sub(target, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_to_repository)
