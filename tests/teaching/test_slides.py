"""Decks: what a tagged cell becomes, and in a browser that everything fits, is there and comes from this machine."""

import re

import pytest

from tests.teaching.browser import BEYOND, BROKEN, CHROMIUM, FORMULAS, UNNAMED, opened
from utils.teaching import deck, handout, page, slides, taught

LECTURES = taught.chosen([])
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")
LEAST_PICTURE = 200  # pixels of its height
SMALLEST = 17  # pixels of a slide's text


def test_a_text_cell_gives_its_first_section():
    text = "## Part 3\n\n### 3.1 Masks\n\n**Who?** Text.\n\n#### Exercise 3A\n\nMore."
    assert deck.first_section(text) == ("3.1 Masks", "**Who?** Text.")
    assert deck.first_section("Only text.") == ("", "Only text.")
    assert deck.first_section("Text first.\n\n### 3.1 Masks\n\nMore.") == ("", "Text first.")


def test_a_long_text_keeps_its_question_formulas_tables_and_prediction():
    long = "word " * 70
    text = f"**Why?** It is so.\n\n{long}\n\n$$x$$\n\n{long}\n\n|a|\n|---|\n\n*Predict.* What?"
    shown, rest = deck.shortened(text)
    assert shown == f"**Why?** It is so.\n\n{long}\n\n$$x$$\n\n|a|\n|---|\n\n*Predict.* What?"
    assert rest == long


@pytest.mark.parametrize("lecture", LECTURES, ids=lambda lecture: lecture.lecture.name)
def test_every_lecture_has_a_deck(lecture):
    made = deck.slides(lecture)
    assert deck.lacking(lecture, made) == ""
    hours = "\n".join(note for slide in made for note in slide.notes)
    assert "Hour 1, " in hours and "Hour 2, " in hours  # the teacher's notes stand where they are needed
    assert all(len(slide.text.split()) < 200 for slide in made)


@pytest.mark.parametrize("lecture", LECTURES, ids=lambda lecture: lecture.lecture.name)
def test_what_a_slide_asks_is_answered_on_it_or_on_the_next(lecture):
    made = deck.slides(lecture)
    for slide, after in zip(made, [*made[1:], None]):
        shown = slide.answer or slide.printed or slide.figures or slide.view
        assert not slide.predicts or shown or after.printed or after.figures or after.view, slide.text


def test_a_question_whose_experiment_has_no_slide_is_answered_there():
    lecture = taught.read("09")
    slide = next(slide for slide in deck.slides(lecture) if slide.heading.startswith("9.4") and slide.kind == "text")
    assert "MLA                576 elements" in slide.printed and slide.answer.startswith("2.25 groups.")
    page_of = slides.section(slide)
    assert page_of.index("Predict.") < page_of.index('"printed fragment"') < page_of.index('"answer fragment"')


def test_a_caption_gives_no_answer_away():
    code = (
        'x = 1\nplotting.heatmap(x,\n                 title="One")\nplotting.show("It is 1.")\ny = plotting.look(x)\n'
    )
    assert handout.without_pictures(code) == "x = 1\ny = plotting.look(x)"


def test_what_the_worked_example_asks_is_answered_on_the_page_of_answers():
    text = handout.page_of(taught.read("01"))
    asked, answered = text.split("What came out")
    assert "offer = np.array" in asked and "scores before the division\n" not in asked
    assert not any(number in asked for number in ("6.437", "0.42", "4.22"))
    assert "6.437" in answered and "scores before the division\n" in answered and "<img" in answered


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("lecture", LECTURES, ids=lambda lecture: lecture.lecture.name)
def test_a_deck_steps_through_without_overflow_or_network(lecture, tmp_path):
    (path, *_), _ = slides.write(lecture, tmp_path)
    made = deck.slides(lecture)
    folder = page.BUILD / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    with opened(path) as browser:
        browser.wait_for_selector("body[data-ready=yes]")
        seen = []
        for number, slide in enumerate(made, 1):
            assert browser.evaluate("Reveal.getSlidePastCount()") == number - 1
            here = f".slides > section:nth-of-type({number})"
            answer = browser.locator(f"{here} .answer")
            if slide.answer:
                assert answer.evaluate("e => getComputedStyle(e).visibility") == "hidden"  # the question comes first
            while browser.evaluate("Reveal.availableFragments().next"):
                browser.keyboard.press("ArrowRight")
            beyond = browser.locator(here).evaluate(f"part => ({BEYOND})([part, [0, 0, 1280, 720]])")
            assert beyond == [], f"slide {number}, {slide.heading}"
            if slide.answer:
                answer.wait_for(state="visible")  # it fades in; raises where it never comes
            for picture in browser.locator(f"{here} .figures img").all():
                assert picture.bounding_box()["height"] >= LEAST_PICTURE, f"slide {number}, {slide.heading}"
            arrows = browser.locator(".controls").bounding_box()
            for part in browser.locator(f"{here} > :not(aside, h2)").all():
                box = part.bounding_box()
                assert box["y"] + box["height"] <= arrows["y"] or box["x"] + box["width"] <= arrows["x"]
            size = float(browser.locator(here).evaluate("e => parseFloat(e.style.fontSize)"))
            assert size >= SMALLEST
            seen.append(browser.locator(f"{here} > h2").inner_text())
            browser.screenshot(path=folder / f"slides-{lecture.number}-{number:02}.png")
            browser.keyboard.press("ArrowRight")
        assert len(seen) == len(made) == browser.evaluate("Reveal.getTotalSlides()")
        assert browser.evaluate(BROKEN) == [] and browser.evaluate(UNNAMED) == []
        asked, typeset = browser.evaluate(FORMULAS)
        assert asked == typeset > 0
        assert (browser.asked, browser.script_errors) == ([], [])


@in_a_browser
@pytest.mark.slow
def test_the_view_in_a_deck_answers(tmp_path):
    lecture = taught.read("01")
    (path, *_), _ = slides.write(lecture, tmp_path)
    number = next(i for i, slide in enumerate(deck.slides(lecture)) if slide.kind == "view")
    with opened(path) as browser:
        browser.wait_for_selector("body[data-ready=yes]")
        browser.evaluate(f"Reveal.slide({number})")
        view = browser.locator("section.present [data-head-viewer]")
        before = view.inner_html()
        view.locator("select").first.select_option(index=3)
        assert view.inner_html() != before
        assert browser.evaluate("Reveal.getSlidePastCount()") == number


@in_a_browser
@pytest.mark.slow
def test_a_picture_stands_beside_its_text_where_it_is_larger_there(tmp_path):
    picture = next(slide.figures for slide in deck.slides(taught.read("01")) if slide.heading.startswith("1.3 "))
    asked = f"{'word ' * 60}\n\n*Predict.* {'word ' * 20}?"
    made = [
        deck.Slide("picture", "Much text", asked, figures=picture, answer="word " * 30, predicts=True),
        deck.Slide("picture", "Hardly any", "*Predict.* Which?", figures=picture, answer="This.", predicts=True),
    ]
    page.copy(page.REVEAL, tmp_path / "assets", page.REVEAL_FILES)
    path = page.write("slides.html", slides.deck_page(taught.read("01"), made), tmp_path)
    with opened(path) as browser:
        browser.wait_for_selector("body[data-ready=yes]")
        sections = browser.locator(".slides > section")
        beside = ["beside" in sections.nth(place).get_attribute("class").split() for place in range(2)]
        assert beside == [True, False]
        box = sections.first.locator("img").bounding_box()
        assert box["width"] > 600 and box["height"] > 300


@in_a_browser
@pytest.mark.slow
def test_what_does_not_fit_or_is_missing_is_noticed(tmp_path):
    lecture = taught.read("01")
    made = [deck.Slide("text", "Too much", "word " * 2000), deck.Slide("text", "A picture", '<img src="gone.png">')]
    page.copy(page.REVEAL, tmp_path / "assets", page.REVEAL_FILES)
    path = page.write("slides.html", slides.deck_page(lecture, made), tmp_path)
    with opened(path) as browser:
        browser.wait_for_selector("body[data-ready=yes]")
        section = browser.locator(".slides > section").first
        assert section.evaluate(f"part => ({BEYOND})([part, [0, 0, 1280, 720]])")
        assert len(browser.evaluate(BROKEN)) == 1 and "gone.png" in browser.asked[0]


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("lecture", LECTURES, ids=lambda lecture: lecture.lecture.name)
def test_a_handout_prints(lecture, tmp_path):
    (_, path, *_), _ = slides.write(lecture, tmp_path)
    with opened(path, width=794, height=1123) as browser:  # A4 at 96 dpi
        browser.wait_for_selector("mjx-container")
        browser.wait_for_function("MathJax.startup.promise.then(() => true)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 794
        assert browser.evaluate(BROKEN) == [] and browser.evaluate(UNNAMED) == []
        browser.pdf(
            path=tmp_path / "handout.pdf",
            format="A4",
            margin={side: "15mm" for side in ("top", "bottom", "left", "right")},
        )
        assert 2 <= len(re.findall(rb"/Type /Page\b", (tmp_path / "handout.pdf").read_bytes())) <= 8
        assert (browser.asked, browser.script_errors) == ([], [])
    text = path.read_text(encoding="utf-8")
    assert "What came out" in text and text.count('class="room"') == len(lecture.predictions) > 0
