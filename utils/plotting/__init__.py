"""Every picture of the course, in one style. Draw, then end the cell with show("One sentence that says what is seen.").

All functions take NumPy arrays, torch tensors (also with grad, on any device) and lists. Weights have queries as rows.
"""

from utils.plotting.accesses import bank_map, tiles_over_time, walk, walk_picture, warp_access
from utils.plotting.attention import alignment, bipartite, heads, heatmap, masks, matrix
from utils.plotting.diagrams import memory_layout, tiles, timeline
from utils.plotting.figure import show, style
from utils.plotting.flow import flow
from utils.plotting.ladder import ladder
from utils.plotting.measurements import bars, curves, roofline, scaling
from utils.plotting.memory import memory
from utils.plotting.series import SERIES
from utils.plotting.token_text import text
from utils.plotting.views import bertviz_head_view, bertviz_model_view, head_viewer

__all__ = [
    "SERIES",
    "alignment",
    "bank_map",
    "bars",
    "bertviz_head_view",
    "bertviz_model_view",
    "bipartite",
    "curves",
    "flow",
    "head_viewer",
    "heads",
    "heatmap",
    "ladder",
    "masks",
    "matrix",
    "memory",
    "memory_layout",
    "roofline",
    "scaling",
    "show",
    "style",
    "text",
    "tiles",
    "tiles_over_time",
    "timeline",
    "walk",
    "walk_picture",
    "warp_access",
]

style()
