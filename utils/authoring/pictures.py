"""When two pictures show the same, and files that show where they do not.

A picture is compared twice: by its pixels, which see curves and colours, and by its words (outputs.py), which see
what eight pixels of text say.
"""

import base64
import io

import numpy as np
from PIL import Image

# Compared in blocks of 8 x 8 pixels by mean colour, 0 to 255. Measured on 800 x 400 pictures of three curves: noise of
# 1 % on each curve moves no block by more than 20 levels; a curve left out, or one scaled by 0.95, moves 2 % of the
# blocks by more than 24. In an 8 x 8 heat map, one weight changed by 0.1 moves 0.5 %.
BLOCK, LEVELS, SHARE = 8, 24, 0.001


def quantised(encoded):
    """Return a base64 PNG in 64 colours, the form in which notebooks keep it."""
    picture = _opened(encoded)
    if picture.mode == "P":
        return encoded.replace("\n", "")
    file = io.BytesIO()
    picture.convert("RGB").quantize(64).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def difference(expected, actual, share=SHARE):
    """Return what distinguishes two base64 PNGs, as a sentence; "" if at most `share` of the blocks has changed."""
    old, new = (_opened(encoded).convert("RGB") for encoded in (expected, actual))
    if old.size != new.size:
        return f"it has {new.width} x {new.height} pixels instead of {old.width} x {old.height}"
    changed = (np.abs(_blocks(old) - _blocks(new)).max(axis=-1) > LEVELS).mean()
    return f"{changed:.1%} of it has changed" if changed > share else ""


def save(expected, actual, keep):
    """Write two base64 PNGs and, if their sizes are equal, where they differ. Return the paths of the files.

    `keep` is a path without an ending. The difference is the old picture, pale, with what has changed in red.
    """
    old, new = (_opened(encoded).convert("RGB") for encoded in (expected, actual))
    shown = {"kept": old, "new": new}
    if old.size == new.size:
        shown["difference"] = Image.blend(old, Image.new("RGB", old.size, "white"), 0.75)
        changed = np.abs(np.asarray(old, float) - np.asarray(new, float)).max(axis=-1) > LEVELS
        shown["difference"].paste((200, 0, 0), mask=Image.fromarray((changed * 255).astype(np.uint8)))
    keep.parent.mkdir(parents=True, exist_ok=True)
    paths = {kind: keep.with_name(f"{keep.name}_{kind}.png") for kind in shown}
    for kind, path in paths.items():
        shown[kind].save(path)
    return list(paths.values())


def _opened(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def _blocks(picture):
    return np.asarray(picture.reduce(BLOCK), dtype=float)
