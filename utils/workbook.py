"""The learner's own copies of the lectures.

`lectures/` belongs to the course and changes when the course is updated; `workbook/` belongs to the learner. A copy
that nobody has edited follows the course. An edited one is never written to: the new version is put beside it.

Standard library only.
"""

import hashlib
import json
import os
from datetime import date

MANIFEST = ".manifest.json"


def update(lectures, workbook):
    """Bring `workbook` up to date with `lectures` (both folders, as Path).

    Returns (written, messages): the notebooks that were written, and a sentence for each thing the learner should know.
    """
    workbook.mkdir(exist_ok=True)
    manifest = _read_manifest(workbook)
    written, messages = [], []
    for lecture in sorted(lectures.glob("*.ipynb")):
        copy = workbook / lecture.name
        new = {"file": _hash(lecture.read_bytes()), "cells": fingerprint(lecture)}
        old = manifest.get(lecture.name, {})
        if not copy.exists():
            _write(copy, lecture.read_bytes())
            written.append(copy)
        elif new["file"] == old.get("file"):
            pass
        elif fingerprint(copy) == old.get("cells"):
            _write(copy, lecture.read_bytes())
            written.append(copy)
            messages.append(f"{copy.name} has been updated; you had not edited it.")
        elif new["cells"] not in (old.get("cells"), fingerprint(copy)):
            beside = _free_name(copy)
            _write(beside, lecture.read_bytes())
            written.append(beside)
            messages.append(f"{copy.name} has changed in the course. Yours is untouched; the new one is {beside.name}.")
        manifest[lecture.name] = new
    _write(workbook / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return written, messages


def fingerprint(notebook):
    """A hash of what a person types into a notebook: its cells, without outputs. Of the whole file if it is not one."""
    content = notebook.read_bytes()
    try:
        cells = [[cell["cell_type"], "".join(cell["source"])] for cell in json.loads(content)["cells"]]
    except (ValueError, KeyError, TypeError):
        return _hash(content)
    return _hash(json.dumps(cells).encode())


def _free_name(copy):
    """The first of NN_topic.new-DATE.ipynb, NN_topic.new-DATE-2.ipynb, ... that is not taken."""
    stem = f"{copy.stem}.new-{date.today().isoformat()}"
    candidate, number = copy.with_name(f"{stem}.ipynb"), 2
    while candidate.exists():
        candidate, number = copy.with_name(f"{stem}-{number}.ipynb"), number + 1
    return candidate


def _read_manifest(workbook):
    """What each copy was made from; empty if that is not known, and then every copy counts as edited."""
    try:
        manifest = json.loads((workbook / MANIFEST).read_text(encoding="utf-8"))
        return {name: dict(entry) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path, content):
    """Write a file in one step, so that an interruption leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _hash(content):
    return hashlib.sha256(content).hexdigest()
