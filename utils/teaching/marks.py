"""What marking leaves: a table of marks, a page for each learner, and a page that says which property failed how often."""

import collections
import csv
import html

TABLE, SUMMARY, PAGES = "marks.csv", "summary.html", "feedback"
HOLDS = {True: "yes", False: "no", None: "not tried"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
table {{ border-collapse: collapse; width: 100% }} th, td {{ text-align: left; vertical-align: top; padding: .2em .6em;
border-bottom: 1px solid #ccc }} pre {{ background: #f4f4f4; padding: .6em; overflow-x: auto; font-size: 14px }}
.number {{ text-align: right; white-space: nowrap }}
</style></head><body>
{body}
</body></html>
"""


def mark(task, verdict):
    """The points for a Task, to one digit."""
    return round(task.points * verdict.share, 1)


def row(manifest, learner, verdicts):
    """A learner's row of the table: name, points for each exercise, points in all, points there were."""
    points = [mark(task, verdict) for task, verdict in zip(manifest.tasks, verdicts)]
    total = sum(task.points for task in manifest.tasks)
    return [learner, *(f"{each:g}" for each in points), f"{sum(points):g}", f"{total:g}"]


def write(folder, manifest, verdicts):
    """Write table, pages and summary of {learner: Verdicts} into a new folder."""
    (folder / PAGES).mkdir(parents=True)
    numbers = [task.number for task in manifest.tasks]
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["learner", *numbers, "points", "of", *(f"{number} state" for number in numbers), "page"])
        for (learner, each), name in zip(verdicts.items(), page_names(verdicts)):
            (folder / PAGES / name).write_text(page(manifest, learner, each), encoding="utf-8")
            cells = row(manifest, learner, each) + [verdict.state for verdict in each] + [f"{PAGES}/{name}"]
            table.writerow([harmless(cells[0]), *cells[1:]])
    (folder / SUMMARY).write_text(summary(manifest, verdicts), encoding="utf-8")


def harmless(text):
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in "=+-@\t\r" else text


def page_names(learners):
    """A file name for each learner: letters, digits, points and lines of the name; a number where two are the same."""
    names, seen = [], collections.Counter()
    for learner in learners:
        stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in learner)[:80].strip(".") or "learner"
        seen[stem.lower()] += 1
        names.append(f"{stem}{f'-{seen[stem.lower()]}' if seen[stem.lower()] > 1 else ''}.html")
    return names


def page(manifest, learner, verdicts):
    """A learner's page, as HTML."""
    _, *points, total, most = row(manifest, learner, verdicts)
    body = [f"<h1>Lecture {manifest.lecture}: {html.escape(learner)}</h1>", f"<p>{total} of {most} points.</p>"]
    for task, verdict, each in zip(manifest.tasks, verdicts, points):
        body.append(f"<h2>Exercise {task.number} {html.escape(task.name)}: {each} of {task.points:g}</h2>")
        body.append(f"<p>{verdict.state}</p>")
        if verdict.rows:
            rows = [(name, HOLDS[holds], why) for name, holds, why in verdict.rows]
            body.append(_table(["property", "holds", "what was seen"], rows))
        more = "\n".join(verdict.report.split("\n")[len(verdict.rows) + 1 if verdict.rows else 0 :])
        if more and verdict.state != "passed":
            body.append(f"<pre>{html.escape(more)}</pre>")
    return PAGE.format(title=f"Lecture {manifest.lecture}: {html.escape(learner)}", body="\n".join(body))


def failures(verdicts):
    """{(exercise, property): learners for whom it did not hold or was not tried}, most first."""
    counts = collections.Counter()
    for each in verdicts.values():
        for verdict in each:
            counts.update((verdict.number, name) for name, holds, _ in verdict.rows if not holds)
    return dict(counts.most_common())


def summary(manifest, verdicts):
    """The teacher's page, as HTML."""
    body = [f"<h1>Lecture {manifest.lecture}: {len(verdicts)} notebooks</h1>"]
    rows = []
    for index, task in enumerate(manifest.tasks):
        states = collections.Counter(each[index].state for each in verdicts.values())
        mean = sum(mark(task, each[index]) for each in verdicts.values()) / max(1, len(verdicts))
        told = ", ".join(f"{n} {state}" for state, n in states.most_common())
        rows.append((f"{task.number} {task.name}", told, f"{mean:.1f} of {task.points:g}"))
    body.append(_table(["exercise", "learners", "mean"], rows))
    counted = [(number, name, str(n)) for (number, name), n in failures(verdicts).items()]
    body.append("<h2>Which property failed for how many</h2>")
    body.append(_table(["exercise", "property", "learners"], counted) if counted else "<p>None.</p>")
    told = [(learner, each[0].report) for learner, each in verdicts.items() if each and each[0].state == "not judged"]
    if told:
        body += ["<h2>Not judged</h2>", _table(["learner", "why"], told)]
    return PAGE.format(title=f"Lecture {manifest.lecture}: marks", body="\n".join(body))


def _table(head, rows):
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    made = "\n".join(f"<tr>{''.join(f'<td>{html.escape(str(text))}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>\n{made}</table>"
