"""Every picture of the course, in one style. Draw, then end the cell with show("One sentence that says what is seen.").

All functions take NumPy arrays, torch tensors (also with grad, on any device) and lists. Weights have queries as rows.
"""

from utils.cuda.figures import bank_map, tiles_over_time, walk, walk_picture, warp_access
from utils.plots.attention import alignment, bipartite, heads, heatmap, masks, matrix
from utils.plots.diagrams import memory_layout, tiles, timeline
from utils.plots.figure import show, style
from utils.plots.measurements import bars, curves, roofline, scaling
from utils.plots.viewers import bertviz_head_view, bertviz_model_view, head_viewer

__all__ = ["alignment", "bank_map", "bars", "bertviz_head_view", "bertviz_model_view", "bipartite", "curves",
           "head_viewer", "heads", "heatmap", "masks", "matrix", "memory_layout", "roofline", "scaling", "show", "style",
           "tiles", "tiles_over_time", "timeline", "walk", "walk_picture", "warp_access"]

style()
