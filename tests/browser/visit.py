"""Opens built pages in headless Chromium, network off, and notes what a reader would meet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, TimeoutError, sync_playwright

HERE = Path(__file__).parent
AXE = HERE / "node_modules" / "axe-core" / "axe.min.js"
OBSERVE = HERE / "observe.js"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# No name but this machine's own is ever looked up, and the browser itself stays silent.
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@dataclass
class Visit:
    """What one page showed. Each list holds problems, and is empty on a sound page."""

    requests: list[str] = field(default_factory=list)  # every address asked for
    messages: list[str] = field(default_factory=list)  # errors and warnings of the console
    images: list[str] = field(default_factory=list)
    formulas: list[str] = field(default_factory=list)
    overflow: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    barriers: dict[str, list[str]] = field(default_factory=dict)  # by theme
    backgrounds: dict[str, str] = field(default_factory=dict)  # by theme
    controls: int = 0


def chromium() -> str | None:
    """The browser: $CHROMIUM, or the first of the usual names on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browser(*, offline: bool) -> Iterator[BrowserContext]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        context = opened.new_context(viewport=DESK, offline=offline)
        context.set_default_timeout(120_000)  # a busy machine is no failure
        yield context
        opened.close()


def ready(page: Page, address: str, observed: Visit) -> None:
    """Loads a page and waits until scripts, images and formulas are done."""
    page.on("request", lambda request: observed.requests.append(request.url))
    page.on("pageerror", lambda error: observed.messages.append(str(error)))
    page.on("requestfailed", lambda request: observed.messages.append(f"no {request.url}"))
    page.on("console", lambda note: heard(note.type, note.text, observed))
    page.goto(address, wait_until="load")
    page.evaluate("window.MathJax?.startup?.promise?.then(() => null)")
    page.add_script_tag(path=OBSERVE)


def heard(kind: str, text: str, observed: Visit) -> None:
    if kind in ("error", "warning"):
        observed.messages.append(f"{kind}: {text}")


def settle(page: Page, condition: str) -> None:
    """Waits for a condition; where it never holds, what is observed next tells so."""
    with suppress(TimeoutError):
        page.wait_for_function(condition, timeout=3000)


def visit(context: BrowserContext, address: str, *, barriers: bool = AXE.exists()) -> Visit:
    """One page: wide and light, wide and dark, then on a phone."""
    observed, page = Visit(), context.new_page()
    ready(page, address, observed)
    observed.images = page.evaluate("observe.brokenImages()")
    observed.formulas = page.evaluate("observe.formulaProblems()")
    # What opens fades in; half faded its contrast is not its own.
    page.add_style_tag(content="* { animation: none !important; }")
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true })")
    if barriers:
        page.add_script_tag(path=AXE)
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        settle(page, f"document.documentElement.dataset.theme === '{theme}'")
        observed.backgrounds[theme] = page.evaluate("observe.background()")
        # Only colours differ between the themes; the other rules are slow.
        rules = "null" if theme == "light" else "['color-contrast']"
        asked = f"observe.barriers({rules})"
        observed.barriers[theme] = page.evaluate(asked) if barriers else []
    observed.controls = page.evaluate("observe.controls()")
    observed.idle = page.evaluate("observe.idleControls()")
    page.set_viewport_size(PHONE)
    settle(page, f"window.innerWidth === {PHONE['width']}")
    observed.overflow = page.evaluate("observe.overflowing()")
    page.close()
    return observed
