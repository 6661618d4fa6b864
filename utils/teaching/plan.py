"""Plans for a class, made from a lecture's source: python -m utils.teaching.plan [NN ...].

Two hours of 50 minutes and one of 90, each with ten minutes to spare; what to ask at the board and what to expect; what
to skip; homework that has been taught by then. Written to build/teaching/ as pages that print.
"""

import sys

from utils.teaching import overview, page, taught
from utils.teaching.taught import CLASS, SPARE

LONG = 90  # minutes of the one long hour
IN_ONE = (
    "Both hours in one, without a break between them. All homework comes after it: what hour 2 takes up from home is done "
    "in class, or left out."
)


def problems(lecture):
    """What is wrong with a lecture's notes for a class, as sentences."""
    found, done = [], []
    for hour in lecture.hours:
        listed = sum(step.minutes for step in hour.steps)
        if listed != hour.minutes:
            found.append(f"the items of hour {hour.number} take {listed} minutes, and its label says {hour.minutes}")
        if hour.minutes > CLASS - SPARE:
            found.append(f"hour {hour.number} takes {hour.minutes} minutes; at most {CLASS - SPARE} of {CLASS}")
        unknown = [section for section in hour.sections if section not in lecture.headings]
        found += [f"hour {hour.number} names section {section}, which is not there" for section in unknown]
        done += hour.sections
        found += untaught(lecture, hour.number, done)
    total = sum(hour.minutes for hour in lecture.hours)
    if total > LONG - SPARE:
        found.append(f"both hours take {total} minutes; at most {LONG - SPARE} of {LONG}")
    return found


def untaught(lecture, hour, sections):
    """The exercises given as homework after an hour whose section has not been reached in class by then."""
    _, for_all, volunteers = lecture.homework(hour)
    where = {exercise.number: exercise.section for exercise in lecture.exercises}
    reached = max(map(order, sections), default=(0, 0))
    for number in [*for_all, *volunteers]:
        if number not in where:
            yield f"the homework after hour {hour} names exercise {number}, which is not there"
        elif number in for_all and where[number] not in sections:
            yield f"exercise {number} is homework after hour {hour}, and section {where[number]} has not been in class"
        elif not where[number] or order(where[number]) > reached:
            yield f"exercise {number} is for volunteers after hour {hour}, and class has not come to its section"


def order(section):
    return tuple(map(int, section.split(".")))


def text(lecture):
    """The plan of one lecture in Markdown."""
    parts = [f"# Plan · Lecture {lecture.number} · {lecture.title}", f"**The question.** {lecture.question}"]
    parts += ["## Learning objectives", "At the end a learner can", _list(lecture.objectives)]
    parts += [f"**Needed before:** {lecture.needs}"]
    parts += [f"## Two times {CLASS} minutes", f"Each leaves {SPARE} minutes to spare."]
    for hour in lecture.hours:
        parts += [f"### Hour {hour.number}", _timetable(hour.steps, 0), *_round_off(lecture, hour)]
    parts += [f"## One time {LONG} minutes", IN_ONE]
    steps = [step for hour in lecture.hours for step in hour.steps]
    parts += [_timetable(steps, 0), f"That leaves {LONG - sum(step.minutes for step in steps)} minutes to spare."]
    given = [(hour.number, lecture.homework(hour.number)[0]) for hour in lecture.hours]
    parts += ["**Homework.** " + " ".join(f"*Of hour {number}:* {homework}" for number, homework in given if homework)]
    parts += ["## What to skip", *_skip(lecture)]
    parts += ["## The demonstration that always works", lecture.note("Always works")]
    for hour in lecture.hours:
        parts += [f"## Questions for the board, hour {hour.number}", *_board(lecture, hour)]
    parts += ["## Misconceptions", *_misconceptions(lecture)]
    parts += ["## Exercises", _exercises(lecture)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _list(lines):
    return "\n".join(f"- {line}" for line in lines)


def _table(head, rows):
    cells = ["|" + "|".join(cell.replace("|", "\\|") for cell in row) + "|" for row in [head, *rows]]
    return "\n".join([cells[0], "|" + "---|" * len(head), *cells[1:]])


def clock(minutes):
    return f"{minutes // 60}:{minutes % 60:02}"


def _timetable(steps, start):
    rows = []
    for step in steps:
        rows.append([f"{clock(start)} to {clock(start + step.minutes)}", str(step.minutes), step.text])
        start += step.minutes
    return _table(["time", "minutes", "what"], rows)


def _round_off(lecture, hour):
    question, answer = lecture.checkpoint(hour.number)
    homework = lecture.homework(hour.number)[0]
    if question:
        yield f"**Checkpoint.** {question} *Expected:* {answer or 'see the lecture.'}"
    if homework:
        yield f"**Homework.** {homework}"


def _skip(lecture):
    yield lecture.note("Skip first")
    taught_in_class = {section for hour in lecture.hours for section in hour.sections}
    left = [s for s in dict.fromkeys(lecture.sections.values()) if s and s not in taught_in_class]
    if left:
        names = "; ".join(f"{section} {lecture.headings[section]}" for section in left)
        yield f"Not in class as planned, to be read at home: {names}."
    yield 'All of "Going further" can be left out: no later lecture needs it.'


def _board(lecture, hour):
    if hour.number == 1 and lecture.note("Board"):
        yield f"**On the board.** {lecture.note('Board')}"
    sections = {*hour.sections, ""} if hour.number == 1 else set(hour.sections)
    asked = [p for p in lecture.predictions if p.section in sections]
    rows = [[p.section, p.question, p.answer] for p in asked]
    yield _table(["section", "ask before the cell is run", "expected answer"], rows) if rows else ""


def _misconceptions(lecture):
    rows = [[f'"{claim}"', truth] for claim, truth in lecture.traps]
    rows += [[question, answer] for question, answer in lecture.questions]
    yield _table(["what is said or asked", "what is so"], rows) if rows else ""


def _exercises(lecture):
    rows = [
        [e.number, e.goal, e.importance, f"{e.difficulty} of 5", str(e.minutes), e.section] for e in lecture.exercises
    ]
    return _table(["", "goal", "importance", "difficulty", "minutes", "section"], rows)


def main(numbers):
    """Write the plans of these lectures, or of all. Returns the exit status."""
    status = overview.main()
    for lecture in taught.chosen(numbers):
        if said := taught.lacking(lecture):
            print(said, flush=True)
        if not lecture.hours:
            status |= bool(numbers)
            continue
        body = page.markdown(text(lecture))
        path = page.write(f"plan-{lecture.number}.html", page.document(f"Plan, lecture {lecture.number}", body))
        print(f"{path.relative_to(page.ROOT).as_posix()}: written", flush=True)
        for problem in problems(lecture):
            print(f"FAILED  lecture {lecture.number}: {problem}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, page.Missing) as problem:
        sys.exit(str(problem))
