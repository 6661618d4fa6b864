# ---
# jupyter:
#   course:
#     module: sample
#     public:
#     - mean
#     - KERNEL
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A sample lecture
#
# It has one of everything that the build knows about.

# %%
import sys; sys.path.insert(0, "..")

import matplotlib.pyplot as plt

from utils import plotting

# %% [markdown]
# What the exercises use.

# %%
import math

import numpy as np


# %%
def check(number, answer):
    """Stand in for utils.check: a stub is not attempted, and the reference takes its place."""
    from attention import sample

    name = getattr(answer, "__name__", "KERNEL")
    try:
        open_ = "your code here" in answer if isinstance(answer, str) else answer(np.ones(2)) is None
    except NotImplementedError:
        open_ = True
    print(f"{number} {name}: {'not attempted yet' if open_ else '1 of 1 properties holds'}")
    return getattr(sample, name) if open_ else answer

# %% [markdown]
# ### Exercise 1.1: a mean  (difficulty 1 of 5, 2 minutes)
#
# The mean of a row.

# %% tags=["exercise", "export"]
def mean(row):
    """Return the mean of `row`, shape (n,)."""
    row = np.asarray(row)
    ### BEGIN SOLUTION
    total_of_the_row = math.fsum(row.tolist())
    return total_of_the_row / len(row)
    ### END SOLUTION


# %%
mean = check("1.1", mean)

# %% tags=["solution-only"]
print(f"The solution sums exactly: {mean(np.array([0.1] * 10)):.4f}")

# %% [markdown] tags=["teacher"]
# A class usually asks about empty rows here.

# %%
print(f"mean {mean(np.array([1.0, 2.0, 4.0])):.4f}, of 3 numbers")
print(f"agrees to 1e-6: {bool(abs(mean(np.ones(3)) - 1) < 1e-6)}")

# %% [markdown]
# ### Exercise 1.2: a kernel  (difficulty 2 of 5, 5 minutes)
#
# Add one to each element.

# %% tags=["exercise", "export"]
KERNEL = r"""
__global__ void add_one(float *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    // BEGIN SOLUTION
    if (i < n) x[i] = x[i] + 1.0f;   // the last block is ragged
    // END SOLUTION
}
"""

# %%
KERNEL = check("1.2", KERNEL)

# %%
plt.figure(figsize=(4, 2))
plt.plot([0, 1, 2], [0, 1, 4])
plt.title("A square grows faster than its side")
plotting.show("A curve through (0, 0), (1, 1) and (2, 4).")
