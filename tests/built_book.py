"""The built pages as the checks read them: where they lie, parsed once, their links resolved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
HTML = Path(os.environ.get("STRUCTOPT_BOOK") or ROOT / "_build" / "html").resolve()
MADE_BY_SPHINX = ("genindex.html", "search.html", "py-modindex.html", "_modules/")


def require_book() -> None:
    """Skips without a built book; fails instead where STRUCTOPT_BOOK promises one."""
    if (HTML / "index.html").exists():
        return
    reason = f"no book in {HTML}: run `make book` first"
    if "STRUCTOPT_BOOK" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


def sound(problems: Iterable[str]) -> None:
    """Fails with one problem a line, each once."""
    found = list(dict.fromkeys(problems))
    assert not found, "\n".join([f"{len(found)} problems", *found[:40]])


@cache
def pages() -> tuple[str, ...]:
    """Every page that a reader can open, as a path relative to the built book."""
    found = (path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html"))
    own = (name for name in found if not name.startswith(("_static/", "_sources/")))
    return tuple(sorted(name for name in own if not forwards(name)))


@cache
def written_pages() -> tuple[str, ...]:
    """The pages that have a source of ours."""
    return tuple(name for name in pages() if not name.startswith(MADE_BY_SPHINX))


@cache
def parsed(name: str) -> BeautifulSoup:
    return BeautifulSoup((HTML / name).read_text(encoding="utf-8"), "html.parser")


def forwards(name: str) -> bool:
    """True for a page that only sends the browser on to another, as Jupyter Book's index does."""
    return parsed(name).select_one("meta[http-equiv=Refresh]") is not None


def article(name: str) -> Tag:
    """The part of a page that its author wrote."""
    found = parsed(name).select_one("article") or parsed(name).body
    assert isinstance(found, Tag), f"{name} has no body"
    return found


def shown(element: Tag, length: int = 120) -> str:
    """The start of an element's HTML, for a message."""
    return " ".join(str(element).split())[:length]


def target(page: str, link: str) -> tuple[str, str]:
    """The file and the anchor that a link on `page` leads to; ("", "") for one that leaves."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return "", ""
    if not parts.path:
        return page, unquote(parts.fragment)
    path = Path(os.path.normpath((HTML / page).parent / unquote(parts.path)))
    if not path.is_relative_to(HTML):
        return f"{link} (outside the book)", ""
    return path.relative_to(HTML).as_posix(), unquote(parts.fragment)


@cache
def anchors(name: str) -> frozenset[str]:
    return frozenset(str(element["id"]) for element in parsed(name).select("[id]"))


def contents() -> list[str]:
    """The sources that the table of contents lists, without their suffix."""

    def files(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (str(node[key]) for key in ("root", "file") if key in node)
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from files(child)

    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    return [name.removesuffix(".md").removesuffix(".ipynb") for name in files(toc)]
