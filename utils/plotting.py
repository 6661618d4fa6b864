"""Every picture of the course, in one style. Draw, then end the cell with show("One sentence that says what is seen.").

All functions take NumPy arrays, torch tensors (also with grad, on any device) and lists. Weights have queries as rows.
"""

from utils.plots.attention import alignment, bipartite, heads, heatmap, masks, matrix
from utils.plots.diagrams import memory_layout, tiles, timeline
from utils.plots.figure import show, style
from utils.plots.measurements import bars, curves, roofline, scaling

__all__ = ["alignment", "bars", "bipartite", "curves", "heads", "heatmap", "masks", "matrix", "memory_layout", "roofline",
           "scaling", "show", "style", "tiles", "timeline"]

style()
