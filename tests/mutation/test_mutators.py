"""What the mutators make of small sources."""

from tests.mutation import kernels, syntax


def test_the_mutants_of_a_small_function():
    source = "def f(x, n=2):\n    return x[1:] + n if x > 0 else -x"
    found = {m.source.splitlines()[-1].strip() for m in syntax.mutants(source, {2})}
    assert {
        "return x[1:] - n if x > 0 else -x",
        "return x[:] + n if x > 0 else -x",
        "return x[1:] + n if x >= 0 else -x",
        "return x[1:] + n",
        "return x[2:] + n if x > 0 else -x",
        "return x[1:] + n if x > 0 else x",
    } <= found
    assert all("n=2" in m.source for m in syntax.mutants(source, {2})), "line 1 is not the learner's"


def test_the_mutants_of_a_small_kernel():
    source = "__global__ void f(float* x, int n) {\n  if (threadIdx.x < n) x[threadIdx.x] += 2; // < 3\n}"
    found = {m.source.splitlines()[1].strip() for m in kernels.mutants(source, {2})}
    assert {
        "if (threadIdx.x <= n) x[threadIdx.x] += 2;",
        "if (0 < n) x[threadIdx.x] += 2;",
        "if (threadIdx.x < n) x[threadIdx.x] = 2;",
        "if (threadIdx.x < n) x[threadIdx.x] += 3;",
    } <= found
    assert not any("<= 3" in m.source for m in kernels.mutants(source, {2})), "a comment is no code"


def test_a_factor_wrong_by_five_percent_is_put_where_scores_are_made():
    source = "def f(q, k):\n    return np.exp(q @ k / np.sqrt(4))"
    assert {m.source.splitlines()[1].strip() for m in syntax.mutants(source, scale=True)} == {
        "return np.exp(1.05 * (q @ k / np.sqrt(4)))",
        "return np.exp(1.05 * (q @ k) / np.sqrt(4))",
        "return np.exp(q @ k / (1.05 * np.sqrt(4)))",
    }
