"""Answers to exercise 9F of lecture 09, in CUDA: right ones and wrong ones, as in answers.py."""

from attention.latent import LATENT_SPLIT
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


def changed(*pairs):
    """The lecture's kernel with each first text replaced by the second."""
    source = LATENT_SPLIT
    for old, new in pairs:
        assert old in source, old
        source = source.replace(old, new)
    return source


LOAD = "load_latents<C>(tile, c_kv, k_rope, rows + first, n, d_latent, d_rope);"
BEFORE = "    __syncthreads();                                     // the last tile is used up\n"
AFTER = "    __syncthreads();                                     // the new tile is there\n"
DOT = "for (int c = 0; c < C; ++c) s += query[c] * tile[(t * C + c) * 32 + lane];"
BLEND = "for (int c = 0; c < C; ++c) sum[c] += w * tile[(t * C + c) * 32 + lane];"
SHRINK = "    for (int c = 0; c < C; ++c) sum[c] *= shrink;\n"
SHORT = "int n = min(KEYS, end - first);"

RIGHT["9F"] = [
    changed((BEFORE, ""), ("    for (int t = 0; t < n; ++t) {                        // as values", "    for (int t = 0; t < n; ++t) {"), (BLEND + "\n    }\n", BLEND + "\n    }\n    __syncthreads();\n")),
    changed((DOT, "const float* key = tile + t * C * 32 + lane;\n      for (int c = C - 1; c >= 0; --c) s = fmaf(query[c], key[32 * c], s);")),
]  # fmt: skip

WRONG["9F"] = [
    (changed((DOT, "for (int c = 0; c < C; ++c)\n        if (32 * c + lane < d_latent) s += query[c] * tile[(t * C + c) * 32 + lane];")), "one tile: scores from the whole row"),
    (changed((BLEND, "for (int c = 0; c < C; ++c)\n        if (32 * c + lane < d_latent) sum[c] += w * c_kv[(rows + first + t) * d_latent + 32 * c + lane];")), "what is read from c_kv again"),
    (changed((BEFORE, "    if (h >= heads) return;\n" + BEFORE)), "Warps without a head"),
    (changed((BEFORE, "")), "Two barriers a tile"),
    (changed((AFTER, "")), "a barrier after load_latents"),
    (changed((SHRINK, "")), "more tiles"),
    (changed(("float w = __shfl_sync(0xffffffff, weight, t);", "float w = weight;")), "one tile"),
    (changed((SHORT, "int n = KEYS;")), "any length"),
    (changed((DOT, DOT.replace("query[c]", "1.05f * query[c]"))), "one tile"),
    (changed((LOAD, "for (int t = threadIdx.y * 32 + lane; t < n; t += blockDim.y * 32)\n      for (int c = 0; c < 32 * C; ++c)\n        tile[t * 32 * C + c] = c < d_latent ? c_kv[(rows + first + t) * d_latent + c]\n                                 : c < d_latent + d_rope ? k_rope[(rows + first + t) * d_rope + c - d_latent] : 0.0f;")), "neighbouring lanes"),
    (changed((LOAD, "if (threadIdx.y == 0 && lane == 0)\n      for (int t = 0; t < n; ++t)\n        for (int c = 0; c < 32 * C; ++c)\n          tile[t * 32 * C + c] = c < d_latent ? c_kv[(rows + first + t) * d_latent + c]\n                                 : c < d_latent + d_rope ? k_rope[(rows + first + t) * d_rope + c - d_latent] : 0.0f;")), "all threads bring rows"),
    (changed((LOAD, "if (threadIdx.y == 0)\n      for (int t = 0; t < n; ++t)\n        for (int c = lane; c < 32 * C; c += 32)\n          tile[t * 32 * C + c] = c < d_latent ? c_kv[(rows + first + t) * d_latent + c]\n                                 : c < d_latent + d_rope ? k_rope[(rows + first + t) * d_rope + c - d_latent] : 0.0f;")), "all threads bring rows"),
    (changed(("float score = -INFINITY;", "float score = 0.0f;")), "any length"),
    (changed(("float weight, shrink = rescale(score, weight, maximum, total);", "float weight = expf(score), shrink = 1.0f;\n    maximum = 0.0f;\n    total += warp_sum(weight);")), "do not overflow"),
    (changed(("rows + first, n", "(size_t)first, n")), "more tiles"),
]  # fmt: skip
