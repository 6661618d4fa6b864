"""The site: built from kept outputs, every link leads somewhere, and in a browser it fits a desk and a phone."""

import html.parser
import re
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from tests.teaching.browser import BROKEN, CHROMIUM, FORMULAS, UNNAMED, opened
from utils.teaching import site, taught

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)"),
]
AROUND = ("index", "prerequisites", "glossary", "papers")
LECTURES = [path.stem for path in taught.sources()]
WIDTHS = {"desk": (1280, 800), "phone": (390, 844)}

# Texts of low contrast (WCAG 2: 4.5, large ones 3), as words. Where no background is opaque, the page is white.
PALE = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0.99) return c; } return [255, 255, 255]; };
  const found = {};
  for (const e of document.querySelectorAll('main *')) {
    if (!e.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) || e.closest('svg, .headerlink, mjx-container')) continue;
    const style = getComputedStyle(e), a = light(numbers(style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || size >= 18.5 && parseInt(style.fontWeight) >= 700;
    if (ratio < (large ? 3 : 4.5)) found[`${style.color} on ${behind(e)}`] = `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`;
  }
  return found;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The site, built."""
    place = tmp_path_factory.mktemp("site")
    assert site.build(place / "source", place / "site") == 0
    return place / "site"


class Links(html.parser.HTMLParser):
    """What a page points at, what can be pointed at in it, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.names = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        for key in ("src", *(["href"] if tag == "link" else [])):
            if found.get(key):
                self.loads.append(found[key])


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(folder):
    pages = {
        path: Links(path.read_text(encoding="utf-8")) for path in folder.glob("*.html")
    }  # not the templates in _static
    assert len(pages) >= len(LECTURES) + len(AROUND)
    dead = []
    for path, found in pages.items():
        assert [load for load in found.loads if urlsplit(load).scheme not in ("", "data")] == [], path
        for link in [*found.links, *found.loads]:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("https", "data"), link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if (
                not target.exists()
                or parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].names
            ):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_pages_show_the_kept_outputs_and_every_picture_has_its_sentence(folder):
    for name in LECTURES:
        text = (folder / f"{name}.html").read_text(encoding="utf-8")
        notebook = nbformat.read(site.page.ROOT / "lectures" / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        pictures = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
        alternatives = re.findall(r'<img alt="([^"]*)"', text)
        assert len([a for a in alternatives if a]) >= len(pictures) > 0
        assert text.count("<div data-head-viewer=") == sum(
            "data-head-viewer=" in str(o.get("data", {})) for o in outputs
        )
        assert "You have opened the course's own copy" not in text


@pytest.mark.parametrize("name", [*AROUND, *LECTURES])
@pytest.mark.parametrize("device", WIDTHS)
def test_a_page_fits_and_asks_nobody(folder, name, device):
    width, height = WIDTHS[device]
    shots = site.page.BUILD / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    with opened(folder / f"{name}.html", width, height) as browser:
        browser.wait_for_function(
            "!document.querySelector('.math') || MathJax.startup.promise.then(() => true)", timeout=120_000
        )
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(BROKEN) == [] and browser.evaluate(UNNAMED) == []
        asked, typeset = browser.evaluate(FORMULAS)
        assert asked == typeset
        assert browser.evaluate(PALE) == {}
        browser.screenshot(path=shots / f"site-{name}-{device}.png")
        assert (browser.asked, browser.script_errors) == ([], [])


def test_the_search_finds_a_word_from_files(folder):
    with opened(folder / "search.html") as browser:
        browser.goto((folder / "search.html").as_uri() + "?q=vanishing")
        browser.wait_for_selector("#search-results li a")
        assert "01_attention_fundamentals.html" in browser.locator("#search-results li a").first.get_attribute("href")
        assert (browser.asked, browser.script_errors) == ([], [])


def test_a_view_works_and_the_keyboard_reaches_it(folder):
    with opened(folder / "01_attention_fundamentals.html") as browser:
        view = browser.locator("[data-head-viewer]").first
        before = view.inner_html()
        view.locator("select").first.focus()
        browser.keyboard.press("ArrowDown")
        assert view.inner_html() != before
        here = (
            "document.activeElement.closest('[data-head-viewer]') && document.activeElement.getAttribute('aria-label')"
        )
        for _ in range(2):  # the second choice, then the words
            browser.keyboard.press("Tab")
        word = browser.evaluate(here)
        browser.keyboard.press("ArrowDown")
        assert word and browser.evaluate(here) not in (None, word)


def test_the_keyboard_comes_to_the_text_at_once(folder):
    with opened(folder / "index.html") as browser:
        browser.keyboard.press("Tab")
        assert browser.evaluate("document.activeElement.textContent").strip() == "Skip to main content"
        browser.keyboard.press("Enter")
        assert browser.url.endswith("#main-content")


def test_names_of_papers_stand_with_their_own_numbers():
    found = site.papers_of(taught.read("01"))
    assert found["1706.03762"] == "Vaswani et al. 2017"
    assert "Wang" not in found["1908.10084"]  # two names and two numbers in one sentence
