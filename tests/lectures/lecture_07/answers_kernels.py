"""Answers to exercise 7G of lecture 07, in CUDA: right ones and wrong ones, as in answers.py."""

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()

HEAD = r"""
template <int D, int BQ, int BK>                         // d in steps of 32; rows of a tile
__global__ void block_sparse(const float* q, const float* k, const float* v, const int* starts,
                             const int* blocks, float* out, int n_queries, int n_keys, int d,
                             int block_size, int causal, int window, float scale) {
  const int R = BQ / TILE;
  const int C = BK / TILE;
  const int G = (D / 4 + TILE - 1) / TILE;
  extern __shared__ float4 q_tile[];
  float4* k_tile = q_tile + BQ * (D / 4);
  float4* v_tile = k_tile + BK * (D / 4);
  float* p_rows = (float*)(v_tile + BK * (D / 4)) + threadIdx.y * (BK + (C % 2 == 0 ? 16 : 0));
  int tiles = (block_size + BQ - 1) / BQ;                // of queries, in a block
  int row = blockIdx.y / tiles;                          // of the block mask
  int first_query = row * block_size + blockIdx.y % tiles * BQ;
  int end_query = min(min(first_query + BQ, (row + 1) * block_size), n_queries);
  if (first_query >= end_query) return;                  // the last block may be short
  size_t head = blockIdx.x;
  size_t list = head * (gridDim.y / tiles) + row;
  q += head * n_queries * d;
  k += head * n_keys * d;
  v += head * n_keys * d;
  int visible = visible_keys(end_query, n_queries, n_keys, causal);
  load_chunks<D>(q_tile, BQ, q, first_query, end_query, d);
  float maximum[R];
  float total[R] = {};
  float4 sum[R][G] = {};
  for (int r = 0; r < R; ++r) maximum[r] = -INFINITY;
"""
TAIL = r"""  write_rows(out + head * n_queries * d, sum, total, first_query, end_query, d);
}
"""
# The walk in the usual way; the wrong ones replace one thing in it.
WALK = r"""
  for (int place = starts[list]; place < starts[list + 1]; ++place) {
    int begin = blocks[place] * block_size;
    int end = begin + block_size < visible ? begin + block_size : visible;
    for (int first = begin; first < end; first += BK) {
      __syncthreads();
      load_chunks<D>(k_tile, BK, k, first, end, d);
      load_chunks<D>(v_tile, BK, v, first, end, d);
      __syncthreads();
      attend_tile<D, R, C, G>(q_tile, k_tile, v_tile, p_rows, maximum, total, sum, first_query, first, end, n_queries,
                              n_keys, causal, window, scale);
    }
  }
"""
AS_ONE_LOOP = r"""
  int per_block = (block_size + BK - 1) / BK;
  int count = (starts[list + 1] - starts[list]) * per_block;
  for (int step = 0; step < count; ++step) {
    int block = blocks[starts[list] + step / per_block];
    int end = min((block + 1) * block_size, visible);
    int first = block * block_size + step % per_block * BK;
    if (first >= end) continue;  // the same for all threads
    load_chunks<D>(k_tile, BK, k, first, end, d);
    load_chunks<D>(v_tile, BK, v, first, end, d);
    __syncthreads();
    attend_tile<D, R, C, G>(q_tile, k_tile, v_tile, p_rows, maximum, total, sum, first_query, first, end, n_queries,
                            n_keys, causal, window, scale);
    __syncthreads();
  }
"""


def changed(old, new, count=-1):
    assert old in WALK
    return HEAD + WALK.replace(old, new, count) + TAIL


right("7G")(HEAD + WALK + TAIL)
right("7G")(HEAD + AS_ONE_LOOP + TAIL)

END = "begin + block_size < visible ? begin + block_size : visible"
ALL = """for (int block = 0; block * block_size < visible; ++block) {
    bool listed = false;
    for (int place = starts[list]; place < starts[list + 1]; ++place) listed = listed || blocks[place] == block;
    int begin = block * block_size;"""
LOOP = """for (int place = starts[list]; place < starts[list + 1]; ++place) {
    int begin = blocks[place] * block_size;"""
SKIPPED = changed(LOOP, ALL).replace("      attend_tile", "      if (listed) attend_tile")
for words, source in {
    "OUT OF BOUNDS": changed("place < starts[list + 1]", "place <= starts[list + 1]"),
    "the blocks of the list, and no others": changed(END, "visible"),
    "no byte more than the blocks that are there": changed(END, "min(begin + block_size, n_keys)"),
    "blocks of any size": changed(
        "first = begin; first < end; first += BK", "first = begin; first == begin && first < end; ++first"
    ),
    "RACE": changed("      __syncthreads();\n      load", "      load", 1),
    "all threads load": changed("      load_chunks<D>(k_tile", "      if (threadIdx.y < 8) load_chunks<D>(k_tile"),
    "several heads": changed("starts[list]", "starts[row]").replace("starts[list + 1]", "starts[row + 1]"),
    "one block that is there": HEAD + TAIL,
    "a row without blocks is 0": changed(
        "place = starts[list]; place", "place = min(starts[list], starts[list + 1] - 1); place"
    ),
    "short last blocks": changed(
        END, "max(begin + 1, begin + block_size < visible ? begin + block_size : visible - 1)"
    ),
    "causal, and a window": changed("n_keys, causal, window", "n_keys, 0, window"),
}.items():
    wrong("7G", words)(source)
wrong("7G", "no byte more than the blocks")(SKIPPED)
wrong("7G", "Which keys of a tile can no query of yours see?")(
    changed("n_keys, causal, window", "n_keys, causal, 1 << 28")
)
wrong("7G", "was not declared")(changed("begin + block_size < visible", "begin + block < visible"))
wrong("7G", "RACE")(changed("      __syncthreads();\n      attend", "      attend", 1))
wrong("7G", "a row")(changed("scale);\n    }", "1.05f * scale);\n    }"))
