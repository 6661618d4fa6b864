"""The answer to a question with letters, computed where it is asked and folded until somebody wants to see it."""

import html
import math

from IPython import get_ipython
from IPython.display import display


def answer(options, found, why):
    """Show which letter is right, folded away, and why.

    options {letter: value}; found: the value that the cell has computed; numbers agree to one in a thousand, other values
    if they are equal. why: a sentence. Raises ValueError unless exactly one option agrees.
    """
    right = [letter for letter, value in options.items() if agree(value, found)]
    if len(right) != 1:
        raise ValueError(f"exactly one of the options must be {found!r}, and there are {len(right)}: {options}")
    shown = f"{found:.3g}" if is_number(found) else str(found)
    said = f"{right[0]}) {shown}. {why}"
    if get_ipython() is None:
        print(said)
    else:
        folded = (
            f"<details><summary>Answer</summary><b>{right[0]})</b> {html.escape(shown)}. {html.escape(why)}</details>"
        )
        display({"text/html": folded, "text/plain": said}, raw=True)


def agree(value, found):
    if is_number(value) and is_number(found):
        return math.isclose(value, found, rel_tol=1e-3, abs_tol=5e-4)
    return is_number(value) == is_number(found) and value == found


def is_number(value):
    try:
        return not isinstance(value, (str, bool)) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
