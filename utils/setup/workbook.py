"""The learner's own copies of the lectures.

`lectures/` belongs to the course and changes when the course is updated; `workbook/` belongs to the learner. A copy
is a lecture without outputs. One that nobody has touched follows the course. A touched one is never written to: the
new version is put beside it, with the learner's exercises filled in, and NEWS says so in JupyterLab's file list.

Standard library only.
"""

import hashlib
import json
import os
from datetime import date

from utils.setup import notebooks
from utils.setup.environment import Stop

MANIFEST = ".manifest.json"
NEWS = "what-is-new.md"


def update(lectures, workbook):
    """Bring `workbook` up to date with `lectures` (both folders, as Path).

    Returns (written, messages): the notebooks that were written, and a sentence for each thing the learner should know.
    Raises Stop if `workbook` cannot be a folder of the learner's.
    """
    try:
        workbook.mkdir(exist_ok=True)
        manifest = _read_manifest(workbook)
        written, messages = [], []
        for lecture in sorted(lectures.glob("*.ipynb")):
            entry, path, message = _update_one(lecture, workbook / lecture.name, manifest.get(lecture.name, {}))
            manifest[lecture.name] = entry
            written += [path] if path else []
            messages += [message] if message else []
        _write(workbook / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        _tell(workbook / NEWS, messages)
    except FileExistsError:
        raise Stop(f"{workbook} is not a folder, and your copies of the lectures belong there: rename it.") from None
    except OSError as error:
        raise Stop(f"{error.filename or workbook} cannot be read or written ({error.strerror}).") from None
    return written, messages


def _update_one(lecture, copy, old):
    """Bring one copy up to date. Returns (its entry in the manifest, the file that was written, what to say)."""
    try:
        given = lecture.read_bytes()
        kept = notebooks.read(given)
    except ValueError as problem:
        state = f"your {copy.name} stays as it is" if copy.exists() else "you have no copy of it yet"
        again = f"git checkout -- lectures/{lecture.name}"
        return old, None, f"lectures/{lecture.name} is damaged: {problem}. So {state}; `{again}` gets it again."
    fresh = notebooks.without_outputs(kept)
    new = given if fresh == kept else notebooks.as_bytes(fresh)
    entry = {"copy": notebooks.fingerprint(fresh), "stubs": notebooks.stubs(fresh)}
    if copy.is_dir():
        return old, None, f"{copy} is a folder, and your copy of the lecture belongs there: rename it."
    if not copy.exists():
        _write(copy, new)
        return entry, copy, None
    content = copy.read_bytes()
    mine = fingerprint(content)
    if entry["copy"] in (old.get("copy"), mine):
        return entry, None, None
    # Copies of the first edition were the lecture's own bytes, and their hash is in the manifest as "file".
    if mine == old.get("copy") or _hash(content) == old.get("file"):
        _write(copy, new)
        return entry, copy, f"{copy.name} has been updated; you had not changed it."
    versions = sorted([copy, *copy.parent.glob(f"{copy.stem}.new-*.ipynb")], key=lambda path: path.stat().st_mtime)
    carried = notebooks.carry([path.read_bytes() for path in versions], fresh, old.get("stubs", {}))
    beside = _free_name(copy)
    _write(beside, notebooks.as_bytes(fresh) if carried else new)
    message = f"{copy.name} has changed in the course. Yours is untouched; the new one is {beside.name}"
    if carried:
        message += f", with your exercises {', '.join(carried)} filled in: run their checks again"
    return entry, beside, message + "."


def fingerprint(content):
    """A hash of what a person may change in a notebook, given as bytes. Of the bytes if they are not a notebook."""
    try:
        return notebooks.fingerprint(notebooks.read(content))
    except ValueError:
        return _hash(content)


def _tell(news, messages):
    """Put messages on top of the note that stands beside the copies; what stands in it stays, byte by byte."""
    old = news.read_bytes() if news.exists() else b""
    lines = [f"- {date.today().isoformat()}: {message}".encode(errors="replace") for message in messages]
    new = [line for line in lines if line not in old.splitlines()]
    if new:
        _write(news, b"\n".join([*new, old]))


def _free_name(copy):
    """The first of NN_topic.new-DATE.ipynb, NN_topic.new-DATE-2.ipynb, ... that is not taken."""
    stem = f"{copy.stem}.new-{date.today().isoformat()}"
    candidate, number = copy.with_name(f"{stem}.ipynb"), 2
    while candidate.exists():
        candidate, number = copy.with_name(f"{stem}-{number}.ipynb"), number + 1
    return candidate


def _read_manifest(workbook):
    """What each copy was made from; empty if that is not known, and then every copy counts as touched."""
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
