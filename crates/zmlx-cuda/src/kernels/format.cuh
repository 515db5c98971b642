// How matrices lie in memory.

enum Format { AFFINE4 = 0, AFFINE8 = 1, MXFP4 = 2, DENSE16 = 3, DENSE32 = 4 };

constexpr bool AFFINE = FORMAT <= AFFINE8;
constexpr int CODES = FORMAT == AFFINE4 || FORMAT == MXFP4 ? 32 : FORMAT == AFFINE8 ? 16 : FORMAT == DENSE16 ? 8 : 4;
constexpr int QUADS = CODES / 4;

struct Matrix {
  const u32* codes;
  const SCALE* scales;
  const SCALE* biases;
};

// Scales and biases as floats. A byte is an e8m0: a power of two, the least of them below the normal numbers.
template <class T> DEVICE float scale_value(T v) {
  if constexpr (sizeof(T) == 1) {
    return __uint_as_float(v == 0 ? 0x00400000u : static_cast<u32>(v) << 23);
  } else {
    return widen<SCALE_KIND>(v);
  }
}

// One element of a row.
DEVICE float element(const Matrix& m, u64 row, int column) {
  u64 at = row * COLUMNS + column;
  if (FORMAT == DENSE32) return __uint_as_float(load_weights(reinterpret_cast<const u32*>(m.codes) + at));
  if (FORMAT == DENSE16) {
    u16 v = load_weights(reinterpret_cast<const u16*>(m.codes) + at);
    return DENSE_KIND == KIND_F16 ? half_to_float(v) : bfloat_to_float(v);
  }
  u64 group = at / GROUP;
  float scale = scale_value(load_weights(m.scales + group));
  if (FORMAT == AFFINE8) {
    u32 code = load_weights(m.codes + at / 4) >> (8 * (at % 4)) & 255u;
    return fmaf(scale, static_cast<float>(code), scale_value(load_weights(m.biases + group)));
  }
  u32 code = load_weights(m.codes + at / 8) >> (4 * (at % 8)) & 15u;
  if (FORMAT == AFFINE4) return fmaf(scale, static_cast<float>(code), scale_value(load_weights(m.biases + group)));
  u32 half = (code & 8u) << 12 | (code & 7u) << 9;
  return half_to_float(static_cast<u16>(half)) * 16384.0f * scale;
}
