// Rows of a matrix, one a token.
DEVICE void embed(const u32* tokens, Matrix m, float* out) {
  zmlx_release();
  zmlx_wait();
  const int t = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= COLUMNS) return;
  // Ids beyond the vocabulary are refused before a run.
  u32 row = min(tokens[t], static_cast<u32>(ROWS - 1));
  float v = element(m, row, column);
  if (ROUNDED) {
    v = bfloat_to_float(float_to_bfloat(v * bfloat_to_float(float_to_bfloat(ROW_SCALE))));
  } else if (ROW_SCALE != 1.0f) {
    v *= ROW_SCALE;
  }
  out[static_cast<u64>(t) * COLUMNS + column] = v;
}
