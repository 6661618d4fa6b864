"""Mutants of attention/ that no input can tell from the original, or no machine without a GPU, with the reason."""

SUBTRACTED = "what is subtracted from -inf does not matter"
DIVIDED = "0 divided by anything is 0"
WRITTEN = "every entry is written"
WIDER = "a product with a wider type is computed in that"
ROUNDED = "the result is cast to the type of x in the end"
TWO_AXES = "of two axes number -1 is number 1"
TILES = "the sizes of tiles do not change the result, and chosen sizes are not promised"
IDLE = "more blocks of threads than needed: the rest find nothing to do"
MASKED = "tiles that nobody sees are masked: more work, the same numbers"
SYMMETRIC = "the order of the three does not matter"
COPY = "a copy that is not needed, or a view of the same numbers"
EMPTY = "without a key or a query the kernel writes zeros too"
ORDER = "an order that nothing depends on"
CHOSEN = "a size that is chosen and not promised"
NO_KEYS = "without a key the same is written"
ALONE = "the source has one kernel"
AGAIN = "the same is written once more"
HEADERS = "headers that nothing of the source needs"
ROUND = "one more round of the loop finds nothing left, and adds 0"
ONE_HEAD = "parts_of makes parts of one head at least"
RING = "every rank still meets every block once; the order of a merge changes nothing"

REASONS = {
    "fundamentals": {
        SUBTRACTED: [
            "softmax line 12.26: 0 becomes -1",
            "softmax line 12.26: 0 becomes 1",
            "attention_torch line 22.75: 0 becomes -1",
            "attention_torch line 22.75: 0 becomes 1",
        ],
        DIVIDED: ["softmax line 14.11: 1 becomes 2", "attention_torch line 24.61: 1 becomes 2"],
        WIDER: [
            "attention_weights line 14.11: q.astype(work, copy=False) without .astype",
            "attention_weights line 14.39: k.astype(work, copy=False) without .astype",
            "attention_numpy line 15.18: a.astype(cuda.work_type(q), copy=False) without .astype",
        ],
        SYMMETRIC: [
            "attention_weights line 12.64: (q, k): the first two change places",
            "attention_backward line 18.29: (*range(ahead), *axes): the first two change places",
        ],
        "the score of a key with nan is set in the next line": [
            "attention_torch line 12.39: 0 becomes -1",
            "attention_torch line 12.39: 0 becomes 1",
        ],
        "what stands there is multiplied by a weight of 0": [
            "attention_backward line 21.14: 0 becomes -1",
            "attention_backward line 21.14: 0 becomes 1",
            "attention_backward line 24.10: 0 becomes -1",
            "attention_backward line 24.10: 0 becomes 1",
        ],
        EMPTY: ["attention_cuda line 11.31: 2 becomes 1"],
        "nobody reads the mask that is not there": [
            "attention_launch line 6.14: torch.ones(1, dtype=torch.uint8, devi...: zeros instead"
        ],
        ORDER: ["Seq2Seq line 13.28: ('additive', None): the first two change places"],
        TWO_AXES: ["Seq2Seq line 38.45: -1 becomes 1"],
    },
    "multi_head": {
        TWO_AXES: ["weights_from_torch line 7.35: -1 becomes 1"],
        CHOSEN: ["EncoderLayer line 8.50: 2 becomes 1"],
        "a few bytes more are no room for one more score": ["attend_launch line 10.11: 1024 becomes 1025"],
    },
    "rotary": {
        "of four axes number -2 is number 2": ["interleaved_to_half_split line 11.30: -2 becomes 2"],
        ALONE: ["rope_kernel line 6.11: cuda.compile(TURN + ROPE, name='rope'... without name"],
        "what is too long is cut off, and one less is enough": [
            "alibi_slopes line 13.40: 1 becomes 0",
            "alibi_slopes line 13.40: 1 becomes 2",
            "alibi_slopes line 13.40: 2 * power + 1 becomes its left side",
            "alibi_slopes line 13.40: 2 * power + 1: + becomes -",
            "alibi_slopes line 13.40: 2 becomes 3",
        ],
        ROUNDED: [
            "apply_rope_numpy line 12.10: (attention_scale * np.cos(angles)).as... without .astype",
            "apply_rope_numpy line 13.10: (attention_scale * np.sin(angles)).as... without .astype",
            "apply_rope_numpy line 15.11: x[..., first].astype(work) without .astype",
            "apply_rope_numpy line 15.39: x[..., second].astype(work) without .astype",
        ],
        COPY: [
            "apply_rope_cuda line 8.46: np.array(a) if isinstance(a, np.ndarr... becomes a",
            "apply_rope_cuda line 8.46: np.array(a) if isinstance(a, np.ndarr... becomes np.array(a)",
        ],
        "only a GPU can tell; the rows for a GPU in the contract ask it there": [
            "apply_rope_cuda line 7.13: x.device if isinstance(x, torch.Tenso... becomes 'cpu'",
        ],
    },
    "long_context": {
        "numbers other than 0 choose as True does": [
            "relative_attention_numpy line 10.22: np.tri(n_queries, n_keys, n_keys - n_... without dtype",
        ],
        SUBTRACTED: [
            "softmax_rows_torch line 9.29: 0.0 becomes -1.0",
            "softmax_rows_torch line 9.29: 0.0 becomes 1.0",
        ],
        DIVIDED: ["softmax_rows_torch line 11.21: 1.0 becomes 2.0"],
        "at the border between two kernels both are right": [
            "softmax_rows_cuda line 11.15: n_columns <= LONGEST_KEPT: <= becomes <",
        ],
        "a few bytes more of shared memory than are needed": [
            "softmax_rows_cuda line 12.17: 0 becomes 1",
            "softmax_rows_cuda line 12.17: 4 becomes 5",
        ],
        IDLE: [
            "matmul_cuda line 13.47: -m // 64 becomes its left side",
            "matmul_cuda line 13.47: 64 becomes 63",
            "matmul_cuda line 13.60: -n // 64 becomes its left side",
            "matmul_cuda line 13.60: 64 becomes 63",
        ],
    },
    "kv_cache": {
        "all counts are equal here": ["evict line 12.54: 0 becomes -1"],
        ORDER: [
            "KVCache line 9.20: ('k', 'v'): the first two change places",
            "quantize line 8.19: (2, 4, 8): the first two change places",
        ],
        NO_KEYS: ["ATTEND_SPLIT line 11.12: if (begin >= end) {: >= becomes >", "in_splits line 7.63: 0 becomes 1"],
        WRITTEN: ["decode_attention_numpy line 13.10: np.zeros(q.shape, work): ones instead"],
        "a product of half and single is computed in single": [
            "decode_attention_numpy line 15.16: cache[row, :, :length].astype(work) without .astype",
            "decode_attention_numpy line 16.50: q[row].astype(work) without .astype",
        ],
        "what lies behind the end gets the weight 0, whatever finite number stands there": [
            "decode_attention_torch line 11.59: 0 becomes -1",
            "decode_attention_torch line 11.59: 0 becomes 1",
        ],
        "of equal scores, whatever they are, the softmax is the same; and the values there are 0": [
            "decode_attention_torch line 15.56: 0 becomes -1",
            "decode_attention_torch line 15.56: 0 becomes 1",
            "decode_attention_torch line 15.89: 0 becomes -1",
            "decode_attention_torch line 15.89: 0 becomes 1",
        ],
    },
    "grouped_query": {
        "columns and bytes that nobody uses": [
            "grouped_launch line 20.74: 32 becomes 31",
            "grouped_launch line 23.79: 2 becomes 3",
        ],
        "one more key is read, and masked": [
            "GROUPED_SPLIT line 11.70: int visible = keys_of_block(top, min(top + (int)blockDim.y, : 1 becomes 0"
        ],
        AGAIN: ["GROUPED_SPLIT line 38.12: if (top + threadIdx.y >= rows) return;: threadIdx.y becomes 0"],
        HEADERS: ["grouped_kernel line 4.13: HALF_HEADERS + GROUPED_SPLIT becomes its right side"],
        "what is called next takes arrays too": [
            "grouped_query_attention_torch line 8.11: torch.from_numpy(mask) if isinstance(... becomes mask",
        ],
        "one part, merged, is itself": [
            "grouped_query_attention_cuda line 21.8: if n_splits == 1 becomes False",
            "grouped_query_attention_cuda line 21.23: 1 becomes 0",
        ],
        "a few bytes more of shared memory than are needed": [
            "grouped_query_attention_cuda line 24.42: 4 becomes 5",
        ],
    },
    "latent": {
        "further directions have no weight": ["joint_latent line 13.76: False becomes True"],
        AGAIN: ["LATENT_SPLIT line 14.37: if (begin >= end && lane == 0 && h < heads) lses[split] = -I: < becomes <="],
        HEADERS: ["latent_kernel line 6.24: HALF_HEADERS + LATENT_SPLIT becomes its right side"],
        EMPTY: ["latent_launch line 13.52: 0 becomes -1"],
        "without a row nothing is launched": ["latent_decode_attention_cuda line 13.106: 0 becomes -1"],
        "what lies behind the end gets the weight 0, whatever finite number stands there": [
            "latent_decode_attention_torch line 9.61: 0 becomes -1",
            "latent_decode_attention_torch line 9.61: 0 becomes 1",
        ],
        "a few bytes more of shared memory than are needed": [
            "latent_decode_attention_cuda line 20.47: 4 becomes 5",
        ],
    },
    "flash": {
        "a mask where nothing is hidden": ["tiled_attention line 27.40: i + shift becomes its right side"],
        IDLE: ["flash_launch line 22.59: 128 becomes 127"],
        ONE_HEAD: ["flash_attention_numpy line 18.20: 1 becomes 0"],
        TILES: [
            "flash_attention_numpy line 15.37: 2 becomes 1",
            "flash_attention_numpy line 15.50: 2 becomes 1",
            "flash_attention_torch line 13.4: if block_q is None becomes True",
            "flash_attention_torch line 14.22: 16 becomes 15",
            "flash_attention_torch line 14.22: 16 becomes 17",
            "flash_attention_torch line 14.52: 2 becomes 1",
            "flash_attention_torch line 14.26: min(TILE_QUERIES, q.shape[-2], TILE_S...: max instead",
            "flash_attention_torch line 14.57: TILE_SCORES // max(1, math.prod(lead)... becomes its left side",
            "flash_attention_torch line 14.57: TILE_SCORES // max(1, math.prod(lead)... becomes its right side",
            "flash_attention_torch line 14.57: TILE_SCORES // max(1, math.prod(lead)...: // becomes /",
            "flash_attention_torch line 14.76: 1 becomes 2",
            "flash_attention_torch line 14.79: math.prod(lead) * TILE_KEYS becomes its left side",
            "flash_attention_torch line 14.79: math.prod(lead) * TILE_KEYS becomes its right side",
            "flash_attention_torch line 14.79: math.prod(lead) * TILE_KEYS: * becomes /",
            "flash_attention_torch line 15.37: 2 becomes 1",
            "flash_attention_torch line 15.50: 2 becomes 1",
        ],
        WRITTEN: [
            "flash_attention_numpy line 19.10: np.zeros((*lead, q.shape[-2], v.shape...: ones instead",
            "flash_attention_numpy line 20.10: np.zeros((*lead, q.shape[-2]), cuda.w...: ones instead",
            "flash_forward_torch line 7.35: -math.inf becomes math.inf",
        ],
        "its log-sum-exp is -inf, so its share is 0": [
            "ring_attention_numpy line 16.14: np.zeros((*q.shape[:-1], v.shape[-1])...: ones instead",
        ],
        RING: [
            "ring_attention_numpy line 20.19: (rank - step) % len(q) becomes its left side",
            "ring_attention_numpy line 20.19: rank - step becomes its right side",
            "ring_attention_numpy line 20.19: rank - step: - becomes +",
        ],
        SYMMETRIC: [
            "flash_attention_backward_numpy line 13.41: (q, k, v): the first two change places",
            "flash_attention_backward_torch line 5.66: (q, k, v): the first two change places",
            "flash_attention_backward_cuda line 18.60: (q, k, v): the first two change places",
        ],
        MASKED: [
            "flash_forward_torch line 10.14: min(n_keys, stop + shift) if causal e... becomes n_keys",
            "flash_forward_torch line 10.14: min(n_keys, stop + shift): max instead",
            "flash_forward_torch line 17.26: 1 becomes 0",
            "flash_forward_torch line 17.26: j_stop - 1 > i + shift: > becomes >=",
            "flash_forward_torch line 17.26: j_stop - 1 becomes its left side",
            "flash_forward_torch line 17.26: j_stop - 1: - becomes +",
            "flash_forward_torch line 17.39: i + shift becomes its right side",
        ],
        "a block has one score at least": [
            "online_softmax line 10.26: scores.max(axis=-1, initial=-np.inf) without initial",
        ],
        SUBTRACTED: [
            "online_softmax line 11.13: 0 becomes -1",
            "online_softmax line 11.13: 0 becomes 1",
            "merge_by_lse line 14.13: 0 becomes -1",
            "merge_by_lse line 14.13: 0 becomes 1",
            "flash_forward_torch line 20.59: 0 becomes -1",
            "flash_forward_torch line 20.59: 0 becomes 1",
        ],
        DIVIDED: ["merge_by_lse line 19.28: 1 becomes 2", "flash_forward_torch line 25.61: 1 becomes 2"],
        "only a warning, of the logarithm of 0": [
            "merge_by_lse line 20.9: np.errstate(divide='ignore') without divide"
        ],
        "the last axis has one entry": [
            "flash_forward_torch line 26.53: 0 becomes -1",
            "flash_attention_backward_cuda line 13.72: 0 becomes -1",
        ],
        "one number is broadcast to all": [
            "flash_forward_torch line 12.36: 1 becomes 0",
            "flash_forward_torch line 13.62: 1 becomes 0",
        ],
        "what is called next looks at them too": ["flash_attention_cuda line 16.4: leading_axes(q, k, v): left out"],
        "only a start from which the larger type follows": [
            "flash_forward_torch line 12.12: torch.full((*q_i.shape[:-1], 1), -mat... without dtype",
            "flash_forward_torch line 13.38: torch.zeros(*q_i.shape[:-1], v.shape[... without dtype",
        ],
        EMPTY: ["flash_attention_cuda line 23.31: 2 becomes 1"],
        "any positive size is as good": ["flash_attention_cuda line 15.19: 1 becomes 2"],
    },
    "sparse": {
        "a stride moves bank conflicts, not numbers": [
            "SPARSE_TILE line 8.48: const int P_STRIDE = C * TILE + (C % 2 == 0 ? 16 : 0);: 16 becomes 15"
        ],
        COPY: [
            "block_lists line 3.11: block_mask if isinstance(block_mask, ... becomes torch.from_numpy(np.array(block_mask))"
        ],
        ALONE: ["block_sparse_kernel line 10.11: cuda.compile(FLASH_HEAD + HALF_TILES.... without name"],
        EMPTY: [
            "block_sparse_attention_cuda line 15.31: 2 becomes 1",
            "sliding_window_attention_cuda line 13.17: 5 becomes 4",
            "sliding_window_attention_cuda line 13.40: 2 becomes 1",
        ],
        SYMMETRIC: ["sliding_window_attention_cuda line 8.30: (int, np.integer): the first two change places"],
        WRITTEN: ["block_sparse_attention_numpy line 18.10: np.zeros((*lead, n_queries, v.shape[-...: ones instead"],
        "rows are written once more by their own block": ["block_sparse_attention_numpy line 21.49: 1 becomes 2"],
        "without queries or texts nothing is computed": [
            "block_sparse_attention_torch line 14.15: attention_torch(q, k, v, causal=causa... without causal",
            "block_sparse_attention_torch line 14.15: attention_torch(q, k, v, causal=causa... without scale",
        ],
        "what is called next makes double of integers too": [
            "block_sparse_attention_torch line 11.15: t if t.is_floating_point() else t.dou... becomes t",
        ],
        "arrays and tensors on a CPU become the same array": [
            "block_sparse_attention_torch line 15.12: block_mask.cpu().numpy() if isinstanc... becomes np.asarray(block_mask)",
        ],
    },
    "differential": {
        "all widths are equal here": ["check_differential line 12.38: 0 becomes 1"],
        "two numbers that are the same: one tensor, or one device": [
            "differential_attention_cuda line 13.31: 0 becomes -1",
            "differential_attention_cuda line 16.73: 0 becomes -1",
            "differential_attention_cuda line 16.73: 0 becomes 1",
        ],
        "the way for values that are not finite is right for all": [
            "differential_attention_cuda line 14.4: if not values.isfinite().all() becomes True",
        ],
        WIDER: [
            "differential_attention_cuda line 16.14: torch.as_tensor(lam, dtype=torch.floa... without dtype",
            "differential_attention_numpy line 12.53: k.astype(work) without .astype",
            "differential_attention_numpy line 12.69: v.astype(work) without .astype",
        ],
        EMPTY: ["differential_attention_cuda line 20.31: 2 becomes 1"],
    },
    "mixture": {
        "counted in floats it is the same": ["kept_slots line 7.23: np.eye(n_experts, dtype=int) without dtype"],
        EMPTY: ["routed_slots line 11.61: 1 becomes 0"],
        CHOSEN: ["experts_on_processes line 1.67: 120.0 becomes 121.0"],
        "what is left out is the default": [
            "mixture_attention_torch line 8.45: torch.sort(rows @ w_router, dim=-1, d... without dim",
            "top_k_gates line 9.13: np.argsort(-logits, axis=-1, kind='st... without axis",
            "top_k_gates line 11.13: np.take_along_axis(logits, chosen, ax... without axis",
            "load_balancing_loss line 12.13: rows.topk(top_k, dim=-1) without dim",
        ],
        "torch's sort of short rows is stable on a CPU in any case": [
            "mixture_attention_torch line 8.45: torch.sort(rows @ w_router, dim=-1, d... without stable",
            "mixture_attention_torch line 8.105: True becomes False",
        ],
        TWO_AXES: [
            "mixture_attention_torch line 8.77: -1 becomes 1",
            "mixture_attention_torch line 16.41: -1 becomes 1",
            "load_balancing_loss line 12.34: -1 becomes 1",
            "load_balancing_loss line 14.45: -1 becomes 1",
        ],
        "the last axis has one entry": ["mixture_attention_torch line 9.56: 0 becomes -1"],
        SYMMETRIC: [
            "mixture_attention_torch line 19.13: (rows, w_router, w_q, w_k, w_v, w_o): the first two change places",
        ],
        "a least size: the count has a place for every expert that was chosen": [
            "mixture_attention_cuda line 11.80: 0 becomes -1",
            "mixture_attention_cuda line 11.80: 0 becomes 1",
        ],
        "a sum of nothing is 0": ["mixture_attention_torch line 20.14: out + a.flatten()[:0].sum(): + becomes -"],
    },
    "linear": {
        ROUND: ["LINEAR_CHUNKED line 14.28: for (int first = 0; first < before; first += TILE) {: < becomes <="],
        "launches with 512 threads": [
            "SELECTIVE_SCAN line 4.29: __global__ __launch_bounds__(512) void selective_scan(const : 512 becomes 513"
        ],
        "the size of a chunk does not change the result": [
            "linear_attention_numpy line 1.55: 64 becomes 63",
            "linear_attention_numpy line 1.55: 64 becomes 65",
            "linear_attention_numpy line 24.55: int(chunk) if finite else 1 becomes 1",
            "linear_attention_torch line 1.55: 64 becomes 63",
            "linear_attention_torch line 1.55: 64 becomes 65",
            "linear_attention_cuda line 1.54: 64 becomes 63",
            "linear_attention_cuda line 1.54: 64 becomes 65",
            "linear_attention_torch line 14.23: int(chunk) if finite else 1 becomes 1",
        ],
        "only its type is taken": [
            "linear_attention_numpy line 16.31: np.ones_like(v[..., :1], shape=(*v.sh... without shape",
            "linear_attention_numpy line 16.46: (..., :1): the first two change places",
            "linear_attention_numpy line 16.51: :1 without its upper end",
            "linear_attention_numpy line 16.52: 1 becomes 0",
            "linear_attention_numpy line 16.52: 1 becomes 2",
        ],
        "used where it is causal only": [
            "linear_attention_numpy line 18.67: 0 becomes -1",
            "linear_attention_numpy line 18.67: 0 becomes 1",
            "linear_attention_torch line 10.67: 0 becomes -1",
            "linear_attention_torch line 10.67: 0 becomes 1",
        ],
        "where it is not causal the state holds all keys, and no chunk is left": [
            "linear_attention_numpy line 21.4: if causal becomes True",
            "linear_attention_torch line 12.4: if causal becomes True",
        ],
        "a later key of nan is cut off by the triangle": [
            "linear_attention_numpy line 22.17: np.isfinite(k).all(): any instead",
            "linear_attention_torch line 13.22: k.isfinite().all(): any instead",
        ],
        DIVIDED: [
            "linear_attention_numpy line 29.14: 1 becomes 2",
            "linear_attention_torch line 25.60: 1 becomes 2",
            "linear_attention_cuda line 24.61: 1 becomes 2",
        ],
        EMPTY: ["linear_attention_cuda line 19.17: 3 becomes 2"],
        WIDER: ["selective_scan_numpy line 13.21: d.astype(work) without .astype"],
        "of a text without tokens no number is looked at": [
            "selective_scan_torch line 12.14: x * delta * a.sum(-1) * (b * c).sum(-...: * becomes /",
            "selective_scan_torch line 12.14: x * delta * a.sum(-1): * becomes /",
            "selective_scan_torch line 12.14: x * delta: * becomes /",
            "selective_scan_torch line 12.32: -1 becomes 1",
            "selective_scan_torch line 12.39: b * c: * becomes /",
        ],
        "a round without queries adds nothing": [
            "linear_attention_torch line 15.34: n - blind becomes its left side",
            "linear_attention_torch line 15.34: n - blind: - becomes +",
            "linear_attention_torch line 15.45: 1 becomes 2",
        ],
    },
    "beyond": {"of one column the first is the last": ["blend_edges line 6.27: 0 becomes -1"]},
}
SAME = {module: {name: why for why, names in reasons.items() for name in names} for module, reasons in REASONS.items()}
EVERYWHERE = {  # what a mutant's name ends with
    "(size_t) becomes nothing": "only an array of 2^31 numbers can tell",
    "without device": "only a GPU can tell; the rows for a GPU in the contract ask it there",
}


def reason(change):
    """Why a Change is taken for equivalent; "" where it is not."""
    everywhere = (why for ending, why in EVERYWHERE.items() if change.mutant.name.endswith(ending))
    return SAME.get(change.module, {}).get(change.name) or next(everywhere, "")
