// Attention of a few tokens over a cache: what the loop over positions, plain or on tensor cores, and all around it share.
//
// A block has a key/value head, up to QUERY_ROWS rows of queries (query heads of the group, tokens) and a part of the
// positions. A loop gives
//   QUERY_FLOATS  floats of shared memory for the queries of a block; place_query puts an element there
//   KEPT          type in which shared memory keeps new keys and values ([LENGTH][KEY + VALUE]); kept() makes it
//   Loop          a thread's share: load() asks for the first positions, run() goes over all, merge() leaves the warp's part.

constexpr int KEY = WIDTH_1, VALUE = WIDTH_2;
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int ALL_ROWS = GROUP * LENGTH;
constexpr int PIECES = (ALL_ROWS + QUERY_ROWS - 1) / QUERY_ROWS;
constexpr float LOWEST = -3.402823466e38f;  // no position yet
constexpr int BLOCKS = SEQUENCES * PIECES * KV_HEADS * SPLITS;

struct Call {
  const float *queries, *keys, *values;  // rows of products; queries alone where not FRESH
  HeadData q, k, v;
  const int* position;
  int capacity;
  const float* sinks;
  CACHE *cached_keys, *cached_values;
  float *gates, *scratch, *out;
  u32* arrived;
};

// Which token a row of queries is.
DEVICE int token_of(int row) { return row / GROUP; }

// What warps leave in shared memory for each row of queries: values, then the largest score and the sum.
struct Parts {
  // 8 more than VALUE: rows of tensor cores' accumulators are written two apart.
  static constexpr int STRIDE = VALUE + 8;
  float* room;

  DEVICE float* values(int warp, int row) const { return room + (warp * QUERY_ROWS + row) * STRIDE; }
  DEVICE float2& stats(int warp, int row) const {
    return reinterpret_cast<float2*>(room + WARPS * QUERY_ROWS * STRIDE)[warp * QUERY_ROWS + row];
  }
};
