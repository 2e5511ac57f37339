"""Mends what Sphinx and the theme write and a browser or a screen reader stumbles over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

SIGNATURE = re.compile(r'<dt class="sig.*?</dt>', re.DOTALL)
RULES = [
    # Opened as a file, a page may not preload fonts: an error in the console, three times.
    (re.compile(r'\s*<link rel="preload" as="font"[^>]*>'), ""),
    # The book runs no kernel in the page, and the script of Thebe is declared twice.
    (re.compile(r"\s*<script>const THEBE_JS_URL.*?</script>", re.DOTALL), ""),
    (re.compile(r'\s*<script type="text/x-thebe-config">.*?</script>', re.DOTALL), ""),
    (re.compile(r"\s*<script>kernelName = .*?</script>", re.DOTALL), ""),
    (re.compile(r"\s*<(?:script|link)[^>]*sphinx-thebe\.[^>]*>(?:</script>)?"), ""),
    # The name that is read aloud has to contain the words that are seen ("Search Ctrl + K").
    (re.compile(r'(<button class="[^"]*search-button__button"[^>]*?) aria-label="Search"'), r"\1"),
    (re.compile(r'<summary aria-label="Toggle hidden content">'), "<summary>"),
    # The arrow beside a chapter that has pages of its own has no words at all.
    (
        re.compile(r'<summary>(?=\s*<span class="toctree-toggle")'),
        '<summary aria-label="Show or hide the pages below">',
    ),
    # On a narrow screen a line must not begin with the comma behind a formula.
    (
        re.compile(
            r"(\(?)(<span class=\"math notranslate nohighlight\">[^<]*</span>)((?:[.,;:!?)]|’s)*)"
        ),
        lambda f: f'<span class="formula">{f[0]}</span>' if f[1] or f[3] else f[0],
    ),
    # An entry is an item of the list around it.
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
]


def one_signature(found: re.Match[str]) -> str:
    """Parameters as lines, where Sphinx writes a definition list that defines nothing."""
    text = found[0].replace("<dl>", '<span class="sig-lines">').replace("</dl>", "</span>")
    return text.replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")


def tidy(html: str) -> str:
    for pattern, replacement in RULES:
        html = pattern.sub(replacement, html)
    return SIGNATURE.sub(one_signature, html)


def tidy_pages(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(tidy(text), encoding="utf-8")


def readable_defaults(
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str, returned: str
) -> tuple[str, str] | None:
    """The default of a dataclass's list is "<factory>", which Sphinx cannot parse and link."""
    return (signature.replace("<factory>", "..."), returned) if signature else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", readable_defaults)
    app.connect("build-finished", tidy_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
