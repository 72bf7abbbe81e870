// wgmma: products of four warps with operands in shared memory, which descriptors name. A warp multiplies when it comes
// to the instruction; what it reads and the registers it changes are held until a wait covers the group.
#include <algorithm>

#include "access.h"
#include "floats.h"
#include "tile.h"

namespace {

enum class In : u8 { F16, BF16, TF32 };

struct Plan {
  int n = 8;
  In in = In::F16;
  bool half_out = false, a_shared = true, negate_a = false, negate_b = false, a_mn_major = false, b_mn_major = false;
  bool scale_negated = false;
  u32 shape = 0;  // accumulators of equal shape follow each other without a fence
  std::vector<int> accumulators, fragments;  // registers
  // In Inst::r: scale-d, the descriptors of b and a, accumulators, fragments of a.
};

// A matrix in shared memory: 16-byte pieces of `kPieces` values of k (K-major) or of 8 rows (MN-major).
struct Descriptor {
  u32 start, leading, stride, swizzle;  // swizzle: bytes of a row of the pattern, 16 without

  Descriptor(u64 bits, int lane) {
    start = (u32)(bits & 0x3fff) << 4;
    leading = (u32)(bits >> 16 & 0x3fff) << 4;
    stride = (u32)(bits >> 32 & 0x3fff) << 4;
    static constexpr u32 kSwizzle[] = {16, 128, 64, 32};
    swizzle = kSwizzle[bits >> 62];
    if (bits >> 49 & 7) throw Violation{"unsupported", "matrix descriptor with a base offset", lane};
  }
  // The pattern repeats every 8 rows; bits 7 to 9 of the address are added, without carry, to bits 4 to 6.
  u32 swizzled(u32 address) const { return address ^ (address >> 3 & (swizzle - 16)); }
  // Piece `k` (0 or 1) of row `mn`.
  u32 k_major(u32 mn, u32 k) const {
    const u32 row = start + mn % 8 * swizzle + mn / 8 * stride;
    return swizzled(row + k * (swizzle == 16 ? leading : 16));
  }
  // Rows 8 `mn8` to 8 `mn8` + 7 at `k`.
  u32 mn_major(u32 mn8, u32 k) const {
    if (swizzle == 16) return start + mn8 * stride + k % 8 * 16 + k / 8 * leading;
    const u32 width = swizzle / 16;
    return swizzled(start + mn8 % width * 16 + mn8 / width * leading + k % 8 * swizzle + k / 8 * stride);
  }
};

float widen(u16 bits, In in) { return in == In::BF16 ? from_bfloat(bits) : from_half(bits); }
float cut_tf32(u32 bits) { return bits_as<float>(bits & 0xffffe000u); }

// Operand reads of one wgmma: checked, remembered, counted in groups of 8 pieces, one wavefront each at best.
class Reader {
 public:
  Reader(Warp& w, std::vector<u32>& held) : w_(w), held_(held) {}

  const u8* piece(u32 address) {
    SharedMemory& s = w_.block->shared;
    if (!s.inside(address, 16))
      throw Violation{
          "out-of-bounds",
          "wgmma reads shared + " + std::to_string((s64)address - kSharedBase) + ", outside every shared variable", 0,
          address};
    s.begin_async_read(address, w_.id, w_.clock);
    held_.push_back(address);
    return s.at(address);
  }
  void count(const Inst& I, const u64 (&address)[8]) {
    u64 lanes[kLanes] = {};
    std::copy(address, address + 8, lanes);
    count_shared(w_, I, 0xff, lanes, 16);
  }

 private:
  Warp& w_;
  std::vector<u32>& held_;
};

// Rows [first, first + rows) of a matrix whose k has K values, to out[row][k]; `counted` rows cost wavefronts.
template <int K>
void load_shared(Warp& w, const Inst& I, Reader& reader, const Descriptor& d, In in, bool mn_major, int rows,
                 int first_counted, int counted, float (*out)[K]) {
  const int values = K / 2;  // of k in a piece
  u64 address[8];
  if (mn_major) {
    for (int g = 0; g < rows / 8; ++g)
      for (int k = 0; k < K; ++k) {
        address[k % 8] = d.mn_major((u32)g, (u32)k);
        const u16* v = (const u16*)reader.piece((u32)address[k % 8]);
        for (int i = 0; i < 8; ++i) out[8 * g + i][k] = widen(v[i], in);
        if (k % 8 == 7 && 8 * g >= first_counted && 8 * g < first_counted + counted) reader.count(I, address);
      }
    return;
  }
  for (int g = 0; g < rows / 8; ++g)
    for (int part = 0; part < 2; ++part) {
      for (int i = 0; i < 8; ++i) {
        address[i] = d.k_major((u32)(8 * g + i), (u32)part);
        const u8* piece = reader.piece((u32)address[i]);
        for (int k = 0; k < values; ++k)
          out[8 * g + i][values * part + k] =
              in == In::TF32 ? cut_tf32(((const u32*)piece)[k]) : widen(((const u16*)piece)[k], in);
      }
      if (8 * g >= first_counted && 8 * g < first_counted + counted) reader.count(I, address);
    }
}

// The 16 rows of this warp from registers, as mma.sync has them.
template <int K>
void load_registers(const Warp& w, const Ref* r, In in, float (*a)[K]) {
  for (int j = 0; j < 4; ++j)
    for (int l = 0; l < kLanes; ++l) {
      const u32 bits = w.at<u32>(r[j])[l];
      float* row = a[l / 4 + 8 * (j % 2)];
      if (in == In::TF32) {
        row[l % 4 + 4 * (j / 2)] = cut_tf32(bits);
      } else {
        row[2 * (l % 4) + 8 * (j / 2)] = widen((u16)bits, in);
        row[2 * (l % 4) + 1 + 8 * (j / 2)] = widen((u16)(bits >> 16), in);
      }
    }
}

void agree(Warp& w, const WgmmaIssue& issue, int lane) {
  if (w.id / 4 >= w.block->wgmmas.size())
    throw Violation{"divergence", "wgmma in a warp that has no whole warpgroup", lane};
  auto& log = w.block->wgmmas[w.id / 4];
  const u64 k = w.wgmma.issued++;
  if (k == log.size()) return log.push_back(issue);
  if (log[k].pc != issue.pc || log[k].a != issue.a || log[k].b != issue.b)
    throw Violation{"divergence", "the warps of a warpgroup execute different wgmmas or descriptors", lane};
}

u64 uniform(const Warp& w, Ref r) {
  const u64* v = w.at<u64>(r);
  for (int i = 1; i < kLanes; ++i)
    if (v[i] != v[0]) throw Violation{"divergence", "lanes of a wgmma have different descriptors", i};
  return v[0];
}

[[noreturn]] void unfenced(const Warp& w, int reg) {
  throw Violation{"async", "register " + w.launch->program->kernel->registers[reg].name +
                               " was touched and no wgmma.fence follows before this wgmma"};
}

void hold_registers(Warp& w, const Plan& p, PendingWgmma& pending) {
  WgmmaState& s = w.wgmma;
  if (!s.fences) throw Violation{"async", "wgmma without a wgmma.fence before it"};
  for (int r : p.fragments)
    if (s.touched[r] == s.fences) unfenced(w, r);
  for (int r : p.accumulators) {
    if (s.touched[r] == s.fences) unfenced(w, r);
    if (s.held[r] && s.shape[r] != p.shape)
      throw Violation{
          "async", "register " + w.launch->program->kernel->registers[r].name + " is held by a wgmma of another shape"};
    s.shape[r] = p.shape;
  }
  for (auto* list : {&p.accumulators, &p.fragments})
    for (int r : *list) ++s.held[r];
  pending.accumulators = &p.accumulators;
  pending.fragments = &p.fragments;
}

template <int K>
void wgmma(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  const u64 b_bits = uniform(w, I.r[1]), a_bits = p.a_shared ? uniform(w, I.r[2]) : 0;
  if (m != kFullMask) throw Violation{"divergence", "wgmma by part of a warp", __builtin_ctz(m)};
  agree(w, {w.pc, a_bits, b_bits}, 0);
  PendingWgmma& pending = w.wgmma.pending.emplace_back();
  hold_registers(w, p, pending);
  Reader reader(w, pending.operands);
  alignas(32) static thread_local float a[64][K], b_rows[256][K];
  float (*mine)[K] = a;
  if (p.a_shared) {  // any warp may read any row
    load_shared<K>(w, I, reader, Descriptor(a_bits, 0), p.in, p.a_mn_major, 64, 16 * (int)(w.id % 4), 16, a);
    mine = a + 16 * (w.id % 4);
  } else {
    load_registers<K>(w, I.r + 3 + p.accumulators.size(), p.in, a);
  }
  load_shared<K>(w, I, reader, Descriptor(b_bits, 0), p.in, p.b_mn_major, p.n, 0, w.id % 4 ? 0 : p.n, b_rows);
  const u32 scale = w.pred(I.r[0]) ^ (p.scale_negated ? kFullMask : 0);
  if (scale != 0 && scale != kFullMask) throw Violation{"divergence", "lanes of a wgmma have different scale-d"};
  const float sign = p.negate_a != p.negate_b ? -1.f : 1.f;
  alignas(32) float rows[16][K];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k) rows[i][k] = sign * mine[i][k];
  for (int j = 0; j < p.n / 8; ++j) {
    alignas(32) float b[K][8], c[16][8];
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) b[k][n] = b_rows[8 * j + n][k];
    for (int h = 0; h < 2; ++h) {
      if (!scale) {
        std::memset(c[8 * h], 0, 8 * 8 * sizeof(float));
      } else if (p.half_out) {
        const u16* v = w.at<u16>(I.r[3 + 2 * j + h]);
        for (int i = 0; i < 64; ++i) c[8 * h + i / 8][i % 8] = from_half(v[i]);
      } else {
        const float *even = w.at<float>(I.r[3 + 4 * j + 2 * h]), *odd = w.at<float>(I.r[4 + 4 * j + 2 * h]);
        for (int l = 0; l < kLanes; ++l)
          c[8 * h + l / 4][2 * (l % 4)] = even[l], c[8 * h + l / 4][2 * (l % 4) + 1] = odd[l];
      }
    }
    multiply_tile(rows, b, c);
    for (int h = 0; h < 2; ++h) {
      if (p.half_out) {
        u16* v = w.at<u16>(I.r[3 + 2 * j + h]);
        for (int i = 0; i < 64; ++i) v[i] = float_to_half(c[8 * h + i / 8][i % 8]);
      } else {
        float *even = w.at<float>(I.r[3 + 4 * j + 2 * h]), *odd = w.at<float>(I.r[4 + 4 * j + 2 * h]);
        for (int l = 0; l < kLanes; ++l)
          even[l] = canonical(c[8 * h + l / 4][2 * (l % 4)]), odd[l] = canonical(c[8 * h + l / 4][2 * (l % 4) + 1]);
      }
    }
  }
}

void wait(Warp& w, const Inst& I, u32) {
  WgmmaState& s = w.wgmma;
  while (!s.pending.empty()) {
    PendingWgmma& p = s.pending.front();
    if (p.group == kNone || p.group + I.imm >= s.committed) break;
    for (auto* list : {p.accumulators, p.fragments})
      for (int r : *list) --s.held[r];
    for (u32 address : p.operands) w.block->shared.end_async_read(address, w.id, w.clock);
    s.pending.pop_front();
  }
}

void lower_order(Lower& l, const std::string& op) {
  l.inst.control = Control::Collective;
  l.inst.cls = Class::Barrier;
  l.program.uses_wgmma = true;
  if (!l.take("sync") || !l.take("aligned")) l.fail("needs .sync.aligned");
  if (op == "fence") {
    l.inst.fn = [](Warp& w, const Inst&, u32) { ++w.wgmma.fences; };
  } else if (op == "commit_group") {
    l.inst.fn = [](Warp& w, const Inst&, u32) {
      for (PendingWgmma& p : w.wgmma.pending)
        if (p.group == kNone) p.group = w.wgmma.committed;
      ++w.wgmma.committed;
    };
  } else if (op == "wait_group") {
    l.inst.imm = l.immediate(l.arg(0));
    l.inst.fn = wait;
  } else {
    l.fail("unknown wgmma");
  }
}

bool minus_one(Lower& l, int i) {
  const u64 v = l.immediate(l.arg(i));
  if (v != 1 && v != ~0ull) l.fail("scales of operands are 1 or -1");
  return v != 1;
}

int take_columns(Lower& l, const char* k) {  // "m64n128k16"
  const std::string shape = l.take_any();
  const size_t at = shape.find('k');
  const int n = shape.rfind("m64n", 0) == 0 && at != std::string::npos ? std::atoi(shape.c_str() + 4) : 0;
  if (n < 8 || n > 256 || n % 8 || shape.substr(at) != k) l.fail("unsupported shape");
  return n;
}

void lower_wgmma(Lower& l) {
  const std::string op = l.take_any();
  if (op != "mma_async") return lower_order(l, op);
  if (l.take("sp")) l.fail("sparse wgmma is not supported");
  if (!l.take("sync") || !l.take("aligned")) l.fail("needs .sync.aligned");
  const bool tf32 = l.has("tf32");
  Plan* p = l.program.make<Plan>();
  p->n = take_columns(l, tf32 ? "k8" : "k16");
  const Ty d = l.take_type(), a = l.take_type(), b = l.take_type();
  if (a != b || (a != Ty::F16 && a != Ty::BF16 && a != Ty::TF32) || (d != Ty::F32 && !(d == Ty::F16 && a == Ty::F16)))
    l.fail("unsupported types");
  p->in = a == Ty::F16 ? In::F16 : a == Ty::BF16 ? In::BF16 : In::TF32;
  p->half_out = d == Ty::F16;
  p->a_shared = l.arg(1).kind != ptx::Arg::Vec;
  p->shape = (u32)p->n << 2 | (u32)p->half_out << 1 | (u32)tf32;
  if (l.arg(0).kind != ptx::Arg::Vec) l.fail("accumulators must be a vector");
  if ((int)l.arg(0).elems.size() != p->n / (p->half_out ? 4 : 2) || (!p->a_shared && l.arg(1).elems.size() != 4))
    l.fail("vector length does not match the shape");
  const int transposes = tf32 ? 0 : p->a_shared ? 2 : 1;
  if (l.count() != 6 + transposes) l.fail("wrong number of operands");
  std::vector<Ref> refs(3, kNone);
  refs[0] = l.pred_use(l.arg(3), &p->scale_negated);
  refs[1] = l.use(l.arg(2), Ty::B64);
  if (p->a_shared) refs[2] = l.use(l.arg(1), Ty::B64);
  for (const auto& e : l.arg(0).elems) refs.push_back(l.dest(e, Ty::B32)), p->accumulators.push_back(e.reg);
  if (!p->a_shared)
    for (const auto& e : l.arg(1).elems) refs.push_back(l.dest(e, Ty::B32)), p->fragments.push_back(e.reg);
  p->negate_a = minus_one(l, 4), p->negate_b = minus_one(l, 5);
  if (transposes == 2) p->a_mn_major = l.immediate(l.arg(6)) != 0;
  if (transposes) p->b_mn_major = l.immediate(l.arg(5 + transposes)) != 0;
  l.operands(refs);
  l.inst.x = p;
  l.inst.fn = tf32 ? wgmma<8> : wgmma<16>;
  l.inst.control = Control::Collective;
  l.inst.cls = Class::Mma;
  l.inst.imm = 2ull * 16 * (u64)p->n * (tf32 ? 8 : 16);
  l.program.uses_wgmma = true;
}

}  // namespace

void add_wgmma_ops(Table& t) { t["wgmma"] = lower_wgmma; }
