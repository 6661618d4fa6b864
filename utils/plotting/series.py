"""One name and one look for each thing in the whole course."""

import itertools

from utils.plotting.figure import COLOURS, LINES

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS
SOLID, DASHED, DASHDOT, DOTTED, DASHDOTDOT, LONG, DOTS = LINES

# {name: (colour, line)}. A label that is such a name, or begins with one and one of ENDS, gets its look.
SERIES = {
    # who looks: lecture 01
    "attention": (BLUE, SOLID),
    "fixed vector": (VERMILION, DASHED),
    "LSTM": (VERMILION, DASHDOT),
    "GRU": (ORANGE, DASHDOT),
    "uniform": (BLACK, DOTTED),
    "chance": (BLACK, DOTS),
    # heads: lecture 02
    "two layers": (BLUE, SOLID),
    "one layer": (VERMILION, DASHED),
    "best previous-token head": (PURPLE, DASHED),
    "best induction head": (ORANGE, DOTTED),
    "accuracy": (GREEN, DASHDOT),
    "rollout": (BLUE, SOLID),
    "removal": (VERMILION, DASHED),
    # positions: lectures 02 to 04
    "RoPE": (BLUE, SOLID),
    "ALiBi": (GREEN, DASHED),
    "learned": (PURPLE, DASHDOT),
    "sinusoidal": (ORANGE, DOTTED),
    "no positions": (BLACK, LONG),
    "NoPE": (BLACK, LONG),
    "PI": (VERMILION, DASHED),
    "interpolation": (VERMILION, DASHED),
    "NTK": (GREEN, DASHDOT),
    "dynamic NTK": (SKY, LONG),
    "YaRN": (PURPLE, DOTTED),
    # what is asked of a long text: lecture 04
    "needle": (BLUE, SOLID),
    "many needles": (VERMILION, DASHED),
    "tracking": (GREEN, DASHDOT),
    "common word": (PURPLE, DOTTED),
    "scratchpad": (BLUE, SOLID),
    "blank tokens": (VERMILION, DASHED),
    # what is kept: lectures 05 to 09
    "cache": (BLUE, SOLID),
    "with a cache": (BLUE, SOLID),
    "no cache": (VERMILION, DASHED),
    "without a cache": (VERMILION, DASHED),
    "pages": (GREEN, DASHDOT),
    "full": (BLACK, SOLID),
    "all keys": (BLACK, SOLID),
    "window": (ORANGE, DASHED),
    "last 64": (ORANGE, DASHED),
    "window with sinks": (GREEN, DASHDOT),
    "4 sinks": (GREEN, DASHDOT),
    "H2O": (PURPLE, DOTTED),
    "SnapKV": (SKY, LONG),
    "random": (BLACK, DOTS),
    "facts first": (BLUE, DASHDOTDOT),
    "naive": (VERMILION, DASHED),
    "flash": (GREEN, DASHDOT),
    "flash attention": (GREEN, DASHDOT),
    "MHA": (BLACK, SOLID),
    "MQA": (ORANGE, DOTTED),
    "GQA": (GREEN, DASHED),
    "MLA": (BLUE, DASHDOT),
    # other mechanisms: lectures 06 and 10 to 12
    "softmax": (BLUE, SOLID),
    "sigmoid": (ORANGE, DASHED),
    "linear": (VERMILION, DASHED),
    "delta rule": (GREEN, DASHDOT),
    "Mamba": (PURPLE, DOTTED),
    "recurrent": (ORANGE, DOTTED),
    "chunks of 64": (VERMILION, DASHED),
    "Euler": (VERMILION, DASHED),
    "zero-order hold": (GREEN, DASHDOT),
    "trapezoid": (BLUE, SOLID),
    "differential": (GREEN, DASHED),
    "norm and factor": (GREEN, DASHED),
    "norm alone": (VERMILION, DASHDOT),
    "neither": (PURPLE, DOTTED),
    "one key group": (GREEN, DASHED),
    "two key groups": (ORANGE, DOTTED),
    "gates": (PURPLE, DASHDOT),
    "experts": (PURPLE, DASHDOT),
    # who chooses: lecture 12
    "own heads": (BLUE, SOLID),
    "router": (PURPLE, DASHDOT),
    "same heads": (VERMILION, DASHED),
    "largest load": (BLUE, SOLID),
    "smallest load": (ORANGE, DASHED),
    "auxiliary loss": (PURPLE, DASHDOT),
    "no auxiliary loss": (VERMILION, DASHED),
}
ENDS = (",", ":", " (", " +", " as ")  # what may follow a name in a label: "RoPE, 40 steps", "RoPE as it is"


def registered(label):
    """The name of the registry that a label is or begins with, or None."""
    names = [name for name in SERIES if label == name or label.startswith(tuple(name + end for end in ENDS))]
    return max(names, key=len, default=None)


def _variants(colour, line):
    """The same colour with every line, from `line` on."""
    first = LINES.index(line)
    return [(colour, other) for other in LINES[first:] + LINES[:first]]


def looks(labels):
    """A (colour, line) for each of some labels: the registry's, and for others what none of them has.

    No two of a figure are alike: the second of one name keeps the colour and takes another line.
    """
    names = {label: registered(label) for label in labels}
    colours = {SERIES[name][0] for name in names.values() if name}
    free = sorted(zip(COLOURS, LINES, strict=True), key=lambda look: look[0] in colours)
    every = list(itertools.product(COLOURS, LINES))
    taken = {}  # {look: the name that has it}
    drawn = {}
    for label in sorted(labels, key=lambda label: names[label] is None):  # who has a look of its own takes it first
        name, choices = names[label], free + every
        if name:
            choices = [SERIES[name], *(_variants(*SERIES[name]) if name in taken.values() else ()), *choices]
        drawn[label] = next((look for look in choices if look not in taken), choices[0])
        taken.setdefault(drawn[label], name)
    return [drawn[label] for label in labels]
