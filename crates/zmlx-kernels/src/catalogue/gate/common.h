// The unsigned integer that orders a float: both zeros alike, NaN above all; no float gives 0.
GATE_FN unsigned gate_order(unsigned bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  if ((bits << 1) == 0u) bits = 0u;
  return (bits >> 31) ? ~bits : bits | 0x80000000u;
}
// The float that an order stands for.
GATE_FN float gate_value(unsigned order) {
  return gate_float((order >> 31) ? order ^ 0x80000000u : ~order);
}
// Whether (order, place) comes after (last, at) when sorted largest first, lower places first.
GATE_FN bool gate_after(unsigned order, unsigned place, unsigned last, unsigned at) {
  return order < last || (order == last && place > at);
}
