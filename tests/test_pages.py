"""Laws of the built pages that need no browser. Each failure names the page and the element."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from bs4 import Tag
from built_book import (
    BOOK,
    HTML,
    ROOT,
    anchors,
    article,
    contents,
    pages,
    parsed,
    require_book,
    shown,
    sound,
    target,
    written_pages,
)
from PIL import Image

pytestmark = pytest.mark.pages
FILE_NAME = re.compile(r"\S*\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)
SHAPE = re.compile(r"<(path|circle|rect|line|poly|text|ellipse)")
FOREIGN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""")
MACHINE_PATH = re.compile(r"/home/\w+|/root/|/Users/\w+|/tmp/\w+|site-packages|ipykernel_\d+")
MARK_UP_LEFT = re.compile(r"\{[\w:]+\}`|\[@\w+|:::|TODO|FIXME|XXX")
FORMULA_LEFT = re.compile(r"\$[^$\n]*\\[a-z]+[^$\n]*\$")
WRONG_INSTALL = re.compile(r"pip\s+install\s+(?:-\S+\s+)*['\"]?structopt(?![\w-])")
LOADED = "script[src], img[src], source[src], video[src], audio[src], iframe[src], embed[src]"
NAMES = ("aria-label", "aria-labelledby", "aria-hidden")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    require_book()


def test_every_source_is_in_the_contents_and_every_entry_is_a_page() -> None:
    sources = [*BOOK.glob("*.md"), *BOOK.glob("api/*.md"), *BOOK.glob("chapters/*.ipynb")]
    names = {path.relative_to(BOOK).with_suffix("").as_posix() for path in sources}
    listed, made = contents(), {name.removesuffix(".html") for name in written_pages()}
    sound(f"{name}: not listed in book/_toc.yml" for name in sorted(names - set(listed)))
    sound(f"{name}: listed twice" for name, count in Counter(listed).items() if count > 1)
    sound(f"{name}: listed, but no page was built" for name in sorted(set(listed) - made))
    sound(f"{name}: a page of an older build" for name in sorted(made - set(listed)))


def test_every_page_links_to_every_other_in_its_sidebar() -> None:
    def missing(name: str) -> set[str]:
        links = parsed(name).select(".bd-sidebar-primary a[href]")
        return set(written_pages()) - {name} - {target(name, str(a["href"]))[0] for a in links}

    sound(f"{name}: no link to {other}" for name in written_pages() for other in missing(name))


def test_every_image_says_what_it_shows() -> None:
    def unsaid(name: str) -> Iterator[str]:
        for image in article(name).select("img"):
            alt = str(image.get("alt") or "").strip()
            if len(alt) < 15 or FILE_NAME.fullmatch(alt):
                yield f"{name}: alt={alt!r} in {shown(image)}"
        for drawing in article(name).select("svg"):
            hidden = drawing.find_parent(attrs={"aria-hidden": "true"}) or drawing.find("title")
            if not hidden and not any(drawing.get(key) for key in NAMES):
                yield f"{name}: no name for {shown(drawing)}"

    sound(problem for name in written_pages() for problem in unsaid(name))


def test_every_figure_is_drawn() -> None:
    def empty(name: str) -> Iterator[str]:
        for image in parsed(name).select("img[src]"):
            path = HTML / target(name, str(image["src"]))[0]
            if path.suffix == ".png" and path.exists() and one_colour(path):
                yield f"{name}: one colour only in {image['src']}"
            elif path.suffix == ".svg" and not SHAPE.search(path.read_text(encoding="utf-8")):
                yield f"{name}: nothing drawn in {image['src']}"
        for figure in article(name).select("figure"):
            if not figure.select("img, svg, canvas, table, .cell_output"):
                yield f"{name}: nothing in {shown(figure)}"

    sound(problem for name in written_pages() for problem in empty(name))


def one_colour(path: Path) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[0, 0]).all())


def test_every_internal_link_and_anchor_leads_somewhere() -> None:
    def lost(name: str) -> Iterator[str]:
        for link in parsed(name).select("a[href]"):
            path, anchor = target(name, str(link["href"]))
            if link["href"] in ("", "None") or (path and not (HTML / path).is_file()):
                yield f"{name}: no page for {shown(link)}"
            elif anchor and path in pages() and anchor not in anchors(path):
                yield f"{name}: no anchor #{anchor} in {path}"
        for element in parsed(name).select("img[src], script[src]"):
            path, _ = target(name, str(element["src"]))
            if path and not (HTML / path).is_file():
                yield f"{name}: no file for {shown(element)}"

    sound(problem for name in pages() for problem in lost(name))


def test_nothing_is_loaded_from_elsewhere() -> None:
    def foreign(name: str) -> Iterator[str]:
        for element in parsed(name).select(LOADED):
            if urlsplit(str(element["src"])).netloc:
                yield f"{name}: {shown(element)}"
        for link in parsed(name).select("link[href]:not([rel=canonical])"):
            if urlsplit(str(link["href"])).netloc:
                yield f"{name}: {shown(link)}"
        for style in parsed(name).select("style"):
            yield from (f"{name}: {url}" for url in FOREIGN_STYLE.findall(style.get_text()))

    sound(problem for name in pages() for problem in foreign(name))
    sheets = {path: path.read_text(encoding="utf-8") for path in HTML.rglob("*.css")}
    sound(f"{path.name}: {u}" for path, text in sheets.items() for u in FOREIGN_STYLE.findall(text))


def test_headings_form_an_outline() -> None:
    def broken(name: str) -> Iterator[str]:
        levels = [int(tag.name[1]) for tag in article(name).select("h1, h2, h3, h4, h5, h6")]
        if levels.count(1) != 1 or levels[0] != 1:
            yield f"{name}: {levels.count(1)} headings of level 1"
        jumps = (f"{name}: h{b} follows h{a}" for a, b in pairwise(levels) if b > a + 1)
        yield from jumps

    sound(problem for name in pages() for problem in broken(name))


def test_pages_state_their_language_and_have_a_title_of_their_own() -> None:
    def html(name: str) -> Tag:
        return parsed(name).find("html") or pytest.fail(f"{name}: no html element")

    sound(f"{name}: no language" for name in pages() if not html(name).get("lang"))
    titles = Counter(shown(parsed(name).find("title") or html(name)) for name in written_pages())
    sound(f"{count} pages are called {title}" for title, count in titles.items() if count > 1)


def test_identifiers_are_unique_in_an_article() -> None:
    def twice(name: str) -> list[str]:
        counts = Counter(str(element["id"]) for element in article(name).select("[id]"))
        return [key for key, count in counts.items() if count > 1]

    sound(f"{name}: id {key!r} stands twice" for name in written_pages() for key in twice(name))


def test_no_error_or_reminder_was_left_in_the_text() -> None:
    def left(name: str) -> Iterator[str]:
        for text in article(name).find_all(string=MARK_UP_LEFT):
            if not text.find_parent(["pre", "code"]):
                yield f"{name}: {' '.join(text.split())[:100]}"
        for output in article(name).select(".cell_output"):
            meant = output.find_parent(class_="tag_raises-exception")
            if "Traceback" in output.get_text() and not meant:
                yield f"{name}: an error that its cell does not announce: {shown(output)}"
            warned = [s.get_text(strip=True) for s in output.select(".stderr")]
            yield from (f"{name}: written to stderr: {text[:100]}" for text in warned if text)

    sound(problem for name in written_pages() for problem in left(name))


def test_no_page_shows_a_path_of_the_machine_that_built_it() -> None:
    texts = {name: parsed(name).get_text(" ") for name in pages()}
    sound(f"{name}: {p}" for name, text in texts.items() for p in MACHINE_PATH.findall(text))
    files = [path for path in HTML.rglob("*") if path.suffix in (".html", ".js", ".svg", ".md")]
    whole = {path: path.read_text(encoding="utf-8") for path in files}
    sound(f"{path.relative_to(HTML)}: {ROOT}" for path, text in whole.items() if str(ROOT) in text)


def test_formulas_are_sources_for_mathjax_which_the_page_loads() -> None:
    def unread(name: str) -> Iterator[str]:
        texts = [element.get_text().strip() for element in parsed(name).select(".math")]
        formulas = [re.sub(r"^\([\d.]+\)#\s*", "", text) for text in texts]  # without its number
        for text in formulas:
            if (text[:2], text[-2:]) not in ((r"\(", r"\)"), (r"\[", r"\]")):
                yield f"{name}: {text[:80]!r} is not between MathJax's brackets"
        scripts = " ".join(str(script["src"]) for script in parsed(name).select("script[src]"))
        if formulas and not re.search(r"/tex-\w+\.js|mathjax", scripts.lower()):
            yield f"{name}: formulas, but no MathJax"
        for text in article(name).find_all(string=FORMULA_LEFT):
            if not text.find_parent(["code", "pre", "script"]):
                yield f"{name}: a formula left as text: {text.strip()[:80]}"

    sound(problem for name in written_pages() for problem in unread(name))


def test_no_line_can_begin_with_the_comma_behind_a_formula() -> None:
    def loose(name: str) -> Iterator[str]:
        for formula in article(name).select("span.math"):
            if re.match(r"[.,;:!?)]", str(formula.next_sibling or "")) and not (
                isinstance(formula.parent, Tag) and "formula" in formula.parent.get("class", [])
            ):
                yield f"{name}: {shown(formula)}{str(formula.next_sibling)[:10]}"

    sound(problem for name in written_pages() for problem in loose(name))


def test_tables_name_their_columns() -> None:
    bare = [(name, t) for name in pages() for t in article(name).select("table") if not t.th]
    own = [
        (name, t) for name, t in bare if not {"indextable", "footnote"} & set(t.get("class", []))
    ]
    sound(f"{name}: no header cell in {shown(table)}" for name, table in own)


def test_nobody_is_told_to_install_the_wrong_distribution() -> None:
    texts = {name: parsed(name).get_text(" ") for name in pages()}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")}
    sound(name for name, text in texts.items() if WRONG_INSTALL.search(text))
