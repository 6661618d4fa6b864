"""Make the pictures of README.md that follow from the course: python -m data.recorded.pictures. Needs Chromium.

model.png is a figure of lecture 12 as the lecture keeps it; report.png is the report of ROW_SUMS below, as a notebook shows it.
"""

import base64
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np

from utils import cuda
from utils.paths import DATA, ROOT

PICTURES = DATA / "pictures"
ROW_SUMS = r"""
__global__ void row_sums(const float* x, float* sums, int n) {
  __shared__ float part[64];
  int row = blockIdx.x, i = threadIdx.x;
  float own = 0.0f;
  for (int j = i; j < n; j += 64)
    own += x[(size_t)row * n + j];
  part[i] = own;
  for (int gap = 32; gap > 0; gap /= 2) {
    if (i < gap) part[i] += part[i + gap];
    __syncthreads();
  }
  if (i == 0) sums[row] = part[0];
}
"""


def model_figure(root=ROOT):
    """The PNG of lecture 12 in which a router chooses among the heads of the language model, as bytes."""
    notebook = nbformat.read(root / "lectures" / "12_mixture_of_experts_attention.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and "loss_with_heads(smollm" in c.source]
    return next(base64.b64decode(o.data["image/png"]) for o in cell.outputs if "image/png" in o.get("data", {}))


def report():
    """The report of a kernel in which a barrier is missing."""
    x, sums = np.ones((4, 256), np.float32), np.zeros(4, np.float32)
    return cuda.compile(ROW_SUMS).check[4, 64](x, sums, 256)


def main():
    from tests.teaching.browser import opened

    (PICTURES / "model.png").write_bytes(model_figure())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(
            f"<meta charset='utf-8'><body style='margin: 0'><div style='padding: 12px'>{report()._repr_html_()}</div>",
            encoding="utf-8",
        )
        with opened(page, 960, 600) as browser:
            browser.locator("body > div").screenshot(path=PICTURES / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
