"""Quizzes: five questions a lecture, each with one right letter that a cell computes, spread over the letters."""

import collections

import numpy as np
import pytest

from tests.teaching.browser import BROKEN, CHROMIUM, FORMULAS, opened
from utils import quiz as learners_quiz
from utils.teaching import page, quiz, taught

LETTERS = "abcd"
QUIZZES = {lecture.lecture.name: quiz.questions(lecture) for lecture in taught.chosen([])}
QUIZZES = {name: found for name, found in QUIZZES.items() if found}


def test_an_answer_is_the_option_that_was_computed(capsys):
    learners_quiz.answer({"a": 0, "b": 0.155, "c": "nothing"}, np.exp(0) / (1 + 2 * np.e), "Because.")
    assert capsys.readouterr().out == "b) 0.155. Because.\n"
    learners_quiz.answer({"a": True, "b": "as it was"}, "as it was", "Because.")
    assert capsys.readouterr().out == "b) as it was. Because.\n"


@pytest.mark.parametrize(
    ("options", "found"), [({"a": 1, "b": 2}, 3), ({"a": 1, "b": 1.0001}, 1), ({"a": 1, "b": 0}, True)]
)
def test_a_question_without_exactly_one_right_answer_is_refused(options, found):
    with pytest.raises(ValueError, match="exactly one of the options must be"):
        learners_quiz.answer(options, found, "Because.")


def test_the_first_lecture_has_a_quiz():
    assert quiz.lacking(taught.read("01")) == ""


@pytest.mark.parametrize("name", QUIZZES)
def test_a_quiz_has_five_questions_of_four_options_and_one_answer_each(name):
    found = QUIZZES[name]
    assert len(found) == quiz.QUESTIONS
    for question in found:
        assert [letter for letter, _ in question.options] == list(LETTERS)
        assert len({text for _, text in question.options}) == len(LETTERS)
        assert question.letter in LETTERS and question.why


@pytest.mark.parametrize("name", QUIZZES)
def test_no_letter_of_a_quiz_is_the_one_to_guess(name):
    counts = collections.Counter(question.letter for question in QUIZZES[name])
    assert max(counts.values()) <= 2 and len(counts) >= 3
    lengths = [
        len(dict(question.options)[question.letter]) == max(len(text) for _, text in question.options)
        for question in QUIZZES[name]
    ]
    assert sum(lengths) <= 2, "the longest option is right too often"


def test_over_all_quizzes_the_letters_are_balanced():
    counts = collections.Counter(question.letter for found in QUIZZES.values() for question in found)
    fair = sum(counts.values()) / len(LETTERS)
    assert all(abs(counts[letter] - fair) <= max(1, fair / 2) for letter in LETTERS), counts


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")
def test_the_sheet_has_its_answers_on_a_page_of_their_own(tmp_path):
    path = page.write("quiz.html", quiz.page_of(taught.read("01")), tmp_path)
    with opened(path, width=794, height=1123) as browser:
        browser.wait_for_function("MathJax.startup && MathJax.startup.promise.then(() => true)")
        asked, typeset = browser.evaluate(FORMULAS)
        assert asked == typeset > 0 and browser.evaluate(BROKEN) == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= 794
        browser.emulate_media(media="print")
        assert browser.locator("h2.new-page").evaluate("e => getComputedStyle(e).breakBefore") == "page"
        assert (browser.asked, browser.script_errors) == ([], [])
    questions, _, answers = path.read_text(encoding="utf-8").partition("Answers</h2>")
    assert questions.count("☐") == 4 * quiz.QUESTIONS and answers.count("<strong>") == quiz.QUESTIONS
