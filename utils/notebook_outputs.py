"""What a cell's outputs come down to, and when two runs of a cell agree.

`clean` puts outputs in the form that notebooks keep; `differences` compares the kept ones with new ones. Text is
compared word for word and number for number, pictures by what they show. The tolerances cover another processor's
rounding and nothing more; tests/test_nbval_bites.py holds them to it.
"""

import base64
import copy
import difflib
import io
import math
import re

import numpy as np
from PIL import Image

# Written to stderr by libraries on some machines and not on others; says nothing about the course.
NOISE = re.compile(r".*(NNPACK|font cache|frozen modules|PYDEVD_DISABLE_FILE_VALIDATION).*\n?")

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
CONTENT_ID = re.compile(r"(?<![0-9A-Za-z])(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{8,64}(?![0-9A-Za-z])")
ADDRESS = re.compile(r"<.* at 0x[0-9a-fA-F]{6,}.*>")
RELATIVE = 2e-3  # of a printed float
ABSOLUTE = 1e-6  # below this, float32 rounding: "largest difference 1e-7" may read 3e-7 elsewhere

# A picture is compared in blocks of 8 x 8 pixels by mean colour, 0 to 255. Measured on 800 x 400 pictures of three
# curves: noise of 1 % on each curve moves no block by more than 20 levels; a curve left out, or one scaled by 0.95,
# moves 2 % of the blocks by more than 24. In an 8 x 8 heat map, one weight changed by 0.1 moves 0.5 %.
BLOCK, LEVELS, SHARE = 8, 24, 0.001


def clean(outputs):
    """Return a cell's outputs as a notebook keeps them: one stream of each name, no noise, PNGs of 64 colours."""
    cleaned, streams = [], {}
    for output in copy.deepcopy(outputs):
        if output["output_type"] == "stream":
            if output["name"] in streams:
                streams[output["name"]]["text"] += output["text"]
                continue
            streams[output["name"]] = output
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = _quantised(data["image/png"])
        cleaned.append(output)
    if "stderr" in streams:
        streams["stderr"]["text"] = NOISE.sub("", streams["stderr"]["text"])
    return [output for output in cleaned if output["output_type"] != "stream" or output["text"]]


def _quantised(encoded):
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if picture.mode == "P":
        return encoded.replace("\n", "")
    file = io.BytesIO()
    picture.convert("RGB").quantize(64).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def unfit(output):
    """Return why an output cannot be kept in a notebook that is compared elsewhere, as a sentence; "" if it can."""
    if output.get("name") == "stderr":
        return f"writes to stderr: {output['text'].strip()}"
    for text in (output.get("text", ""), output.get("data", {}).get("text/plain", "")):
        if found := ADDRESS.search(text):
            return f"shows an address in memory, another one each time: {found[0]}"
    return ""


def differences(expected, actual):
    """Return what distinguishes two lists of outputs, as sentences; an empty list if they agree.

    Compared are the number and order of outputs, their kinds, each representation that they carry and errors.
    Not compared: execution counts, metadata, tracebacks, widget views (their ids are random).
    """
    expected, actual = [[_parts(output) for output in clean(outputs)] for outputs in (expected, actual)]
    found = []
    if len(expected) != len(actual):
        found.append(f"{len(expected)} outputs expected, {len(actual)} came: {_kinds(expected)} / {_kinds(actual)}")
    for index, (old, new) in enumerate(zip(expected, actual), 1):
        for kind in sorted(old.keys() | new.keys()):
            if kind not in new:
                found.append(f"output {index}: {kind} is missing")
            elif kind not in old:
                found.append(f"output {index}: {kind} is new: {str(new[kind])[:200]}")
            elif message := _difference(kind, old[kind], new[kind]):
                found.append(f"output {index}, {kind}: {message}")
    return found


def _parts(output):
    """Return what of an output is compared, by kind."""
    if output["output_type"] == "stream":
        return {output["name"]: output["text"]}
    if output["output_type"] == "error":
        return {"error": f"{output['ename']}: {output['evalue']}"}
    return {kind: content for kind, content in output["data"].items() if "widget-view" not in kind}


def _kinds(outputs):
    return ", ".join("+".join(output) for output in outputs) or "none"


def _difference(kind, expected, actual):
    if kind == "image/png":
        return _picture_difference(expected, actual)
    if not isinstance(expected, str) or not isinstance(actual, str):
        return "" if expected == actual else f"expected {expected}, got {actual}"
    if kind in ("text/html", "image/svg+xml"):
        expected, actual = (CONTENT_ID.sub("id", text) for text in (expected, actual))
    return _text_difference(expected, actual)


def _text_difference(expected, actual):
    old, new = expected.splitlines(), actual.splitlines()
    if len(old) == len(new):
        pairs = [(a, b) for a, b in zip(old, new) if not _same_line(a, b)]
        return "\n".join(f"\n  expected: {a}\n  got:      {b}" for a, b in pairs[:5])
    return "\n" + "\n".join(difflib.unified_diff(old, new, "expected", "got", lineterm="", n=0))


def _same_line(expected, actual):
    if expected == actual:
        return True
    # Spaces beside a number do not count: a number that grows by a digit or a sign moves what is beside it.
    words = [re.sub(r"\s*\0\s*", "\0", NUMBER.sub("\0", line)).strip() for line in (expected, actual)]
    numbers = [NUMBER.findall(line) for line in (expected, actual)]
    return words[0] == words[1] and all(map(_same_number, *numbers))


def _same_number(expected, actual):
    """Integers agree exactly; floats to a relative tolerance, or to one in the last of at least three digits."""
    if expected == actual:
        return True
    if not all(re.search(r"[.eE]", text) for text in (expected, actual)):
        return False
    old, new = float(expected), float(actual)
    mantissa, _, exponent = expected.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    digits = len(re.sub(r"\D", "", mantissa).lstrip("0"))
    last_digit = 10.0 ** (int(exponent or 0) - decimals) if max(decimals, digits) >= 3 else 0.0
    return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=max(ABSOLUTE, 1.001 * last_digit))


def _picture_difference(expected, actual):
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA") for text in (expected, actual)]
    if pictures[0].size != pictures[1].size:
        return f"a picture of {pictures[1].size} pixels instead of {pictures[0].size}"
    old, new = (np.asarray(picture.reduce(BLOCK), dtype=float) for picture in pictures)
    changed = (np.abs(old - new).max(axis=-1) > LEVELS).mean()
    return f"{changed:.1%} of the picture has changed" if changed > SHARE else ""
