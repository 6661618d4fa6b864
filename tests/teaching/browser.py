"""A browser for the tests of pages: what they ask for, what is missing, what does not fit."""

import contextlib
import shutil

from playwright.sync_api import sync_playwright

from utils.setup import doctor

CHROMIUM = next(filter(None, map(shutil.which, doctor.CHROMIUMS)), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]

# What is seen of the page or of one of its parts beyond the edges (left, top, right, bottom) of the window, as words.
BEYOND = """([part, edges]) => [...part.querySelectorAll('*')].filter(e => {
  if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.closest('aside, mjx-assistive-mml, .scrolls')) return false;
  const box = e.getBoundingClientRect(), [left, top, right, bottom] = edges;
  return box.width && box.height && (box.left < left - 1 || box.top < top - 1 || box.right > right + 1 || box.bottom > bottom + 1);
}).map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 60)}`)"""
BROKEN = "() => [...document.images].filter(i => !i.complete || i.naturalWidth == 0).map(i => i.src.slice(0, 80))"
UNNAMED = "() => [...document.images].filter(i => !i.alt.trim()).map(i => i.src.slice(0, 80))"
FORMULAS = "() => [document.querySelectorAll('.math').length, document.querySelectorAll('mjx-container').length]"


@contextlib.contextmanager
def opened(path, width=1280, height=720):
    """A page of the file system in a fresh Chromium. `page.asked` fills up with addresses that leave the file system or are
    not there, `page.script_errors` with errors."""
    with _page(width, height) as page:
        page.asked, page.script_errors = [], []
        local = ("file:", "data:", "blob:", "about:")
        page.on(
            "request", lambda request: page.asked.append(request.url) if not request.url.startswith(local) else None
        )
        page.on("requestfailed", lambda request: page.asked.append(f"{request.url}: {request.failure}"))
        page.on("pageerror", lambda error: page.script_errors.append(str(error)))
        page.goto(path.as_uri())
        yield page


@contextlib.contextmanager
def opened_at(address, width, height):
    """A page of a server on this machine."""
    with _page(width, height) as page:
        page.goto(address)
        yield page


@contextlib.contextmanager
def _page(width, height):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()
