// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements; lanes 8j..8j+7 give the row addresses of
// matrix j, and lane l holds the elements (l / 4, 2 * (l % 4)) and its right neighbour.
#include "access.h"

namespace {

struct Plan {
  Address address;
  int n = 1;
  bool transpose = false;
};

void transposed(const u16* in, u16* out) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) out[c * 8 + r] = in[r * 8 + c];
}

void addresses(Warp& w, const Inst& I, const Plan& p, u64* address, u32* rows) {
  compute_addresses(w, p.address, address);
  *rows = p.n == 4 ? kFullMask : (1u << (8 * p.n)) - 1;
  if (p.address.space == Space::Generic && resolve_generic(*rows, address) != Space::Shared)
    throw Violation{"out-of-bounds", "matrix access outside shared memory", 0, address[0]};
  check_shared_bounds(w, *rows, address, 16);
  count_shared(w, I, *rows, address, 16);
}

void load(Warp& w, const Inst& I, u32) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  u32 rows;
  addresses(w, I, p, address, &rows);
  alignas(32) u16 matrix[4][64];
  for (int k = 0; k < 8 * p.n; ++k) {
    w.block->shared.read((u32)address[k], 16, w.id, kAnyLane, w.clock);
    std::memcpy(&matrix[k / 8][k % 8 * 8], w.block->shared.at((u32)address[k]), 16);
  }
  for (int j = 0; j < p.n; ++j) {
    u16* d = w.at<u16>(I.r[j]);
    if (p.transpose)
      transposed(matrix[j], d);
    else
      std::memcpy(d, matrix[j], sizeof matrix[j]);
  }
}

void store(Warp& w, const Inst& I, u32) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  u32 rows;
  addresses(w, I, p, address, &rows);
  u16 matrix[64];
  for (int k = 0; k < 8 * p.n; ++k) {
    const u16* a = w.at<u16>(I.r[k / 8]);
    if (p.transpose)
      transposed(a, matrix);
    else
      std::memcpy(matrix, a, sizeof matrix);
    w.block->shared.write((u32)address[k], 16, matrix + k % 8 * 8, w.id, k, w.clock);
  }
}

void matrix(Lower& l) {
  const bool loads = l.s.op[0] == "ldmatrix";
  Plan* p = l.program.make<Plan>();
  if (!l.take("sync") || !l.take("aligned")) l.fail("needs .sync.aligned");
  if (!l.take("m8n8")) l.fail("unsupported matrix shape");
  p->n = l.take("x4") ? 4 : l.take("x2") ? 2 : l.take("x1") ? 1 : 0;
  if (!p->n) l.fail("needs .x1, .x2 or .x4");
  p->transpose = l.take("trans");
  const Space space = take_space(l);
  if (l.take_type() != Ty::B16) l.fail("needs .b16");
  p->address = take_address(l, l.arg(loads ? 1 : 0), space);
  const ptx::Arg& v = l.arg(loads ? 0 : 1);
  std::vector<Ref> refs;
  if (v.kind == ptx::Arg::Vec)
    for (const auto& e : v.elems) refs.push_back(l.use(e, Ty::B32));
  else
    refs.push_back(l.use(v, Ty::B32));
  if ((int)refs.size() != p->n) l.fail("vector length does not match");
  l.operands(refs);
  l.inst.x = p;
  l.inst.fn = loads ? load : store;
  l.inst.control = Control::Collective;
  l.inst.cls = Class::Matrix;
}

}  // namespace

void add_matrix_ops(Table& t) { t["ldmatrix"] = t["stmatrix"] = matrix; }
