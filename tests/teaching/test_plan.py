"""Plans are made from a lecture's source: minutes that fit, homework that has been taught, answers to every question."""

import pytest

from utils.authoring import seen
from utils.authoring import source as lecture_source
from utils.teaching import overview, plan, taught

LECTURES = taught.chosen([])

TITLE = """# Lecture 09 · A title
#
# **The question.** Why? **You will be able to** *write* it (9A), *build* and *test* it (9B). **You need** softmax (lectures 01 and
# 02), the tiles of lecture 06; of PyTorch `nn.Module`.
#
# | part | core minutes |
# |---|---|
# | Part 1: 9.1 and 9.2, exercises 9A, 9B | 40 |
# | **together** | **40** |
"""
NOTES = """**For the teacher.**
#
# - *Hour 1 (8).* The surprise (3) · 9.1: the loop,
#   twice (5).
# - *At home after hour 1.* 9A.
# - *Hour 2 (4).* 9.2, with 0.68 (4).
# - *At home after hour 2.* 9B. For volunteers 9A.
# - *Checkpoint 1.* Which row? (Row 3.) *Checkpoint 2.* How many? (Two.)
# - *Questions that come.* Is it so? No, it is not. Then why? Because.
"""
BODY = """
# %% [markdown]
# ### 9.1 A loop
#
# Text. *Predict.* What comes
# out?

# %%
x = 1

# %% [markdown]
# Three comes out. It was to be expected. Is that all?
#
# **Trap.** *"It is four."* It is three.
#
# #### Exercise 9A: a loop  (difficulty 2 of 5, essential, 10 minutes)

# %% tags=["exercise"]
def loop():
    ### BEGIN SOLUTION
    return 3
    ### END SOLUTION

# %%
loop = check("9A", loop)

# %% [markdown]
# ### 9.2 A test
#
# #### Exercise 9B: a test  (difficulty 2 of 5, useful, 5 minutes)

# %% tags=["exercise"]
def test():
    ### BEGIN SOLUTION
    return 4
    ### END SOLUTION

# %%
test = check("9B", test)
"""


def lecture(folder, title=TITLE, notes=NOTES):
    """A lecture from pieces of a source."""
    header = (
        "# ---\n# jupyter:\n#   course:\n#     edition: 2\n#     module: m\n#   kernelspec:\n#     display_name: Python 3\n"
        "#     language: python\n#     name: python3\n# ---\n\n"
    )
    path = folder / "09_title.py"
    path.write_text(f'{header}# %% [markdown]\n# {title}\n# %% [markdown] tags=["teacher"]\n# {notes}{BODY}')
    return taught.Taught(seen.view(lecture_source.read(path)))


def test_a_lecture_is_read_as_its_source_says_it(tmp_path):
    found = lecture(tmp_path)
    assert (found.number, found.title, found.question) == ("09", "A title", "Why?")
    assert found.objectives == ["*write* it (9A)", "*build* and *test* it (9B)"]
    assert found.needed_lectures == ["01", "02", "06"]
    assert [(hour.number, hour.minutes, hour.sections) for hour in found.hours] == [(1, 8, ["9.1"]), (2, 4, ["9.2"])]
    assert found.hours[0].steps[1] == taught.Step("9.1: the loop, twice", 5, ("9.1",))
    assert found.checkpoint(2) == ("How many?", "Two.")
    assert found.homework(2)[1:] == (["9B"], ["9A"])
    assert found.questions == [("Is it so?", "No, it is not."), ("Then why?", "Because.")]
    assert [(p.section, p.question, p.answer) for p in found.predictions] == [
        ("9.1", "What comes out?", "Three comes out. It was to be expected.")
    ]
    assert found.traps == [("It is four.", "It is three.")]
    assert [(e.number, e.goal, e.minutes, e.section) for e in found.exercises] == [
        ("9A", "a loop", 10, "9.1"),
        ("9B", "a test", 5, "9.2"),
    ]
    assert plan.problems(found) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Three. It was to be expected. Is that all?", "Three. It was to be expected."),
        ('Three. **Trap.** *"It is four."* It is three.', "Three."),
        ('**Trap.** *"It is four."* It is three.', ""),
        ("Three. *Predict.* And then?", "Three."),
        ("Three. Two of them are left over. What to ask of them:", "Three. Two of them are left over."),
        ("As the formula has it:", "As the formula has it:"),
        ("### 9.2 Next", ""),
    ],
)
def test_an_answer_ends_where_something_else_begins(text, answer):
    assert taught.first_words(text) == answer


def test_a_prediction_may_end_its_line():
    assert taught.PREDICT.split("Text. *Predict.*\nWhat?") == ["Text. ", "What?"]


@pytest.mark.parametrize("found", LECTURES, ids=lambda found: found.lecture.name)
def test_every_question_of_the_core_is_a_prediction_with_an_answer_to_it(found):
    asking = [cell for cell in found.view.core if cell.kind == "markdown" and "Predict." in cell.source]
    assert len(found.predictions) == len([cell for cell in asking if cell.place > 1])  # the title cell speaks of them
    assert [p.answer for p in found.predictions if "Trap." in p.answer or "Predict." in p.answer] == []


def test_one_long_hour_is_followed_by_the_homework_of_both(tmp_path):
    _, long = plan.text(lecture(tmp_path)).split("## One time 90 minutes")
    assert "All homework comes after it" in long
    assert "**Homework.** *Of hour 1:* 9A. *Of hour 2:* 9B. For volunteers 9A." in long


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("(5)", "(6)", "the items of hour 1 take 9 minutes, and its label says 8"),
        ("Hour 1 (8).* The surprise (3)", "Hour 1 (45).* The surprise (40)", "at most 40 of 50"),
        ("9.2, with", "9.7, with", "hour 2 names section 9.7"),
        ("*At home after hour 1.* 9A", "*At home after hour 1.* 9B", "section 9.2 has not been in class"),
        ("For volunteers 9A", "For volunteers 9C", "exercise 9C, which is not there"),
    ],
)
def test_a_plan_that_does_not_hold_is_refused(tmp_path, old, new, said):
    assert old in NOTES
    assert any(said in problem for problem in plan.problems(lecture(tmp_path, notes=NOTES.replace(old, new))))


def test_what_is_lacking_is_said_in_one_sentence(tmp_path):
    said = taught.lacking(lecture(tmp_path))
    assert said == "Lecture 09 does not say in its title and teacher cells: Board, Always works, Skip first."


@pytest.mark.parametrize("found", LECTURES, ids=lambda found: found.lecture.name)
def test_every_lecture_can_be_taught_from_its_plan(found):
    assert plan.problems(found) == []
    text = plan.text(found)
    assert all(step.text.replace("|", "\\|") in text for hour in found.hours for step in hour.steps)
    assert [hour.number for hour in found.hours] == [1, 2]
    assert found.objectives and found.question and found.needs
    unanswered = [p.question for p in found.predictions if not p.answer]
    assert unanswered == []


def test_the_first_lecture_lacks_nothing():
    assert taught.lacking(taught.read("01")) == ""


def test_what_is_generated_in_teaching_md_is_what_the_lectures_say():
    for name, text in overview.pages().items():
        said = f"{name} is older than a lecture: python -m utils.teaching.overview"
        assert (overview.ROOT / name).read_text(encoding="utf-8") == text, said


@pytest.mark.parametrize("name", overview.SYLLABI)
def test_a_syllabus_comes_to_nothing_before_what_it_needs(name):
    before = []
    for number in overview.SYLLABI[name]:
        lecture = next((found for found in LECTURES if found.number == number), None)
        if lecture:
            assert set(lecture.needed_lectures) <= set(before), f"{name}: {number}"
        before.append(number)
    hours = overview.HOURS * len(before)
    assert name == (f"{hours} hours" if "hours" in name else f"{len(before)} weeks")
