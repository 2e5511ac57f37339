"""Laws of the built pages that only a browser can tell. Headless Chromium, network off."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser.visit import AXE, Visit, browser, chromium, ready, visit
from built_book import HTML, pages, require_book, sound

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium on the path (or in $CHROMIUM)"),
]


@pytest.fixture(scope="module")
def visits() -> dict[str, Visit]:
    """What each page showed. Pages of source code, all alike, are not searched for barriers."""
    require_book()
    with browser(offline=True) as context:
        return {
            name: visit(context, (HTML / name).as_uri(), barriers=searched(name))
            for name in pages()
        }


def searched(name: str) -> bool:
    return AXE.exists() and not name.startswith("_modules/")


def problems(visits: dict[str, Visit], kind: str) -> list[str]:
    return [f"{name}: {text}" for name, seen in visits.items() for text in getattr(seen, kind)]


def test_no_request_leaves_the_machine(visits: dict[str, Visit]) -> None:
    asked = [(name, url) for name, seen in visits.items() for url in seen.requests]
    assert len(asked) > len(visits)  # the watch is on
    local = ("file://", "data:", "blob:")
    sound(f"{name}: {url}" for name, url in asked if not url.startswith(local))


def test_the_console_stays_silent(visits: dict[str, Visit]) -> None:
    sound(problems(visits, "messages"))


def test_every_image_is_drawn(visits: dict[str, Visit]) -> None:
    sound(problems(visits, "images"))


def test_every_formula_is_typeset(visits: dict[str, Visit]) -> None:
    sound(problems(visits, "formulas"))


def test_every_page_fits_a_phone(visits: dict[str, Visit]) -> None:
    sound(problems(visits, "overflow"))


def test_interactive_figures_answer_their_controls(visits: dict[str, Visit]) -> None:
    assert sum(seen.controls > 0 for seen in visits.values()) >= 2, "two pages have such figures"
    sound(problems(visits, "idle"))


def test_the_theme_follows_the_reader(visits: dict[str, Visit]) -> None:
    shades = {name: seen.backgrounds for name, seen in visits.items()}
    sound(f"{name}: {shade}" for name, shade in shades.items() if shade["light"] == shade["dark"])


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: run `npm install` in tests/browser")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_barrier_for_any_reader(visits: dict[str, Visit], theme: str) -> None:
    sound(f"{name}: {text}" for name, seen in visits.items() for text in seen.barriers[theme])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Says nothing: the log of the test run is for failures."""


@pytest.fixture
def address() -> Iterator[str]:
    require_book()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_search_finds_a_word_without_a_network(address: str) -> None:
    observed = Visit()
    with browser(offline=False) as context:
        page = context.new_page()
        ready(page, f"{address}/search.html?q=entropy", observed)
        page.wait_for_selector("#search-results li a", timeout=20_000)
        found = page.locator("#search-results li a").all_inner_texts()
    assert any("loss" in title.lower() for title in found), found
    sound(url for url in observed.requests if not url.startswith(address))
