"""What a learner's notebook file holds: read, compared, and its solved exercises carried into a new version.

Standard library only. A notebook is the dictionary that its JSON holds.
"""

import copy
import hashlib
import json
import re

ONLY_IN_LECTURES = "lectures-only"  # the tag of cells that a learner's copy goes without
HEADER = re.compile(r"^#+ Exercise (\d+(?:\.\d+|[A-Z]))\b", re.MULTILINE)
CHECK = re.compile(r"\bcheck\(\s*[\"'][\w.]+[\"']\s*,\s*(\w+)")


def read(content):
    """Return the notebook in the bytes `content`. Raises ValueError with what is wrong, as a part of a sentence."""
    if not content.strip():
        raise ValueError("it is empty")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS and not the file itself")
    try:
        notebook = json.loads(content)
        texts = [source(cell) for cell in notebook["cells"]]
        kinds = {cell["cell_type"] for cell in notebook["cells"]}
        held = [part.get("metadata", {}) for part in (notebook, *notebook["cells"])]
        sound = all(isinstance(metadata, dict) and isinstance(metadata.get("tags", []), list) for metadata in held)
        sound = sound and isinstance(held[0].get("kernelspec", {}), dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        marks = re.search(rb"^(<{7}|>{7})", content, re.MULTILINE)
        raise ValueError("it holds the marks of a merge" if marks else "it is not a notebook") from None
    if any(re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE) for text in texts):
        raise ValueError("it holds the marks of a merge")
    if not sound or not kinds <= {"code", "markdown", "raw"}:
        raise ValueError("it is not a notebook")
    return notebook


def as_bytes(notebook):
    """Return a notebook as Jupyter writes it."""
    return (json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8")


def source(cell):
    """The text of a cell; in a file it is a string or a list of lines."""
    return "".join(cell["source"])


def _tags(cell):
    return cell.get("metadata", {}).get("tags") or ()


def without_outputs(lecture):
    """Return a learner's copy of a lecture: nothing run, and no cell that is about lectures/."""
    made = copy.deepcopy(lecture)
    made["cells"] = [cell for cell in made["cells"] if ONLY_IN_LECTURES not in _tags(cell)]
    for cell in made["cells"]:
        if cell.get("outputs"):
            cell["outputs"] = []
        if cell.get("execution_count"):
            cell["execution_count"] = None
    return made


def fingerprint(notebook):
    """A hash of what a person may change in a notebook: cells and all metadata, as far as running them leaves alone.

    Running writes outputs, times, the kernel's own description and the minor version of the format.
    """
    kept = copy.deepcopy(notebook)
    for name in ("nbformat", "nbformat_minor"):
        kept.pop(name, None)
    metadata = kept.get("metadata") or {}
    metadata.pop("language_info", None)
    metadata["kernelspec"] = (metadata.get("kernelspec") or {}).get("name")
    kept["metadata"] = metadata
    for cell in kept["cells"]:
        cell["source"] = source(cell)
        for name in ("outputs", "execution_count"):
            cell.pop(name, None)
        cell["metadata"] = {
            name: value
            for name, value in (cell.get("metadata") or {}).items()
            if name not in ("execution", "ExecuteTime", "trusted")
        }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# ---- Exercises ----------------------------------------------------------------------------------------------------


def _exercises(notebook):
    """Return (number, name of what is checked, cell) of each exercise cell. What is not known is None."""
    found, header = [], None
    for cell in notebook["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            header = ([header] + HEADER.findall(text))[-1]
        elif "exercise" in _tags(cell) or "exercise" in cell.get("metadata", {}):
            found.append([cell["metadata"].get("exercise") or header, None, cell])
        elif found and found[-1][1] is None and (check := CHECK.search(text)):
            found[-1][1] = check[1]
    return found


def stubs(notebook):
    """Return {number: hash of the exercise's cell} of a copy in which nothing has been solved."""
    return {number: _digest(cell) for number, _, cell in _exercises(notebook) if number}


def _digest(cell):
    return hashlib.sha256(f"code\n{source(cell)}".encode()).hexdigest()


def carry(versions, fresh, old_stubs):
    """Fill a learner's answers into the notebook `fresh`, where it asks for the same thing.

    `versions` are the learner's notebooks, as bytes, the latest last; `old_stubs` is `stubs` of what they were made
    from. The same is: number and name agree, or the cell had the same id, which comes from its text, or the name
    agrees and the exercise has another number now. Returns the numbers of those that were filled in.
    """
    answers = {}
    for content in versions:
        try:
            mine = read(content)
        except ValueError:
            continue
        for number, name, cell in _exercises(mine):
            # The id of an exercise's cell is made from the text that the course gave it.
            as_given = _digest(cell) == old_stubs.get(number) or _digest(cell)[:12] == str(cell.get("id"))[:12]
            if not as_given and source(cell).strip():
                keys = ((number, name), cell.get("id"), name)
                answers.update({key: cell["source"] for key in keys if key})
    carried = []
    for number, name, cell in _exercises(fresh):
        answer = next((answers[key] for key in ((number, name), cell.get("id"), name) if key in answers), None)
        if answer is not None and "".join(answer) != source(cell):
            cell["source"] = answer
            carried.append(str(number))
    return carried
