template <typename T>
inline unsigned gate_bits(T v) { return as_type<uint>(float(v)); }
inline float gate_float(unsigned bits) { return as_type<float>(bits); }
inline unsigned gate_max(unsigned v) { return simd_max(v); }
inline unsigned gate_min(unsigned v) { return simd_min(v); }
inline float gate_sum(float v) { return simd_sum(v); }
inline float gate_exp(float v) { return metal::precise::exp(v); }
#define GATE_FN inline
