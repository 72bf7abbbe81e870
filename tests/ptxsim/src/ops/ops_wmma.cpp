// wmma.load, .mma, .store: PTX leaves the layout of fragments open, so this file has its own: element
// e of a fragment lives in lane e % 32 at place e / 32; registers the instruction names beyond that
// stay unused.
#include "access.h"
#include "floats.h"

namespace {

struct Shape {
  int m, n, k;
};
struct Plan {
  Shape shape;
  char part = 'a';
  Ty type = Ty::F16, type_d = Ty::F32;
  bool column = false, column_b = false;
  Address address;
  int rows = 0, columns = 0, registers = 0;
};

Shape take_shape(Lower& l) {
  const std::string s = l.take_any();
  if (s == "m16n16k16") return {16, 16, 16};
  if (s == "m32n8k16") return {32, 8, 16};
  if (s == "m8n32k16") return {8, 32, 16};
  if (s == "m16n16k8") return {16, 16, 8};
  l.fail("unsupported shape");
}

bool take_column(Lower& l) {
  const bool column = l.take("col");
  if (!column && !l.take("row")) l.fail("needs .row or .col");
  return column;
}

// Where element e is kept, in units of its own size.
void* slot(Warp& w, const Ref* r, int e, int size) {
  const int lane = e % kLanes, place = e / kLanes;
  if (size == 4) return &w.at<u32>(r[place])[lane];
  return &w.at<u16>(r[place / 2])[lane * 2 + place % 2];
}

void transfer(Warp& w, const Inst& I, const Plan& p, bool loads) {
  const int size = ptx::bytes_of(p.type), n = p.rows * p.columns;
  u64 base[kLanes];
  compute_addresses(w, p.address, base);
  const u32 stride = w.at<u32>(I.r[0])[0];
  for (int first = 0; first < n; first += kLanes) {
    u64 address[kLanes];
    u8* at[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int e = first + i, row = e / p.columns, column = e % p.columns;
      address[i] = base[i] + (u64)size * (p.column ? (u64)column * stride + (u64)row : (u64)row * stride + (u64)column);
    }
    const Space space = p.address.space == Space::Generic ? resolve_generic(kFullMask, address) : p.address.space;
    if (space == Space::Shared) {
      check_shared_bounds(w, kFullMask, address, (u32)size);
      count_shared(w, I, kFullMask, address, (u32)size);
    } else {
      access_global(w, I, kFullMask, address, (u32)size, loads ? Access::Read : Access::Write, at);
    }
    for (int i = 0; i < kLanes; ++i) {
      void* s = slot(w, I.r + 1, first + i, size);
      if (space == Space::Shared) {
        if (loads)
          w.block->shared.read((u32)address[i], (u32)size, w.id, kAnyLane, w.clock),
              at[i] = w.block->shared.at((u32)address[i]);
        else
          w.block->shared.write((u32)address[i], (u32)size, s, w.id, i, w.clock);
      }
      if (loads)
        std::memcpy(s, at[i], (size_t)size);
      else if (space != Space::Shared)
        std::memcpy(at[i], s, (size_t)size);
    }
  }
}

float element(Warp& w, const Ref* r, int e, Ty t) {
  if (t == Ty::F32) return *(float*)slot(w, r, e, 4);
  if (t == Ty::TF32) return bits_as<float>(*(u32*)slot(w, r, e, 4) & 0xffffe000u);
  const u16 h = *(u16*)slot(w, r, e, 2);
  return t == Ty::BF16 ? from_bfloat(h) : from_half(h);
}

struct Product {
  Shape shape;
  Ty a, c, d;
  int at_a, at_b, at_c;
};

void multiply(Warp& w, const Inst& I, u32) {
  const Product& p = *(const Product*)I.x;
  const auto [m, n, k] = p.shape;
  float a[32 * 16], b[16 * 32], out[32 * 32];
  for (int e = 0; e < m * k; ++e) a[e] = element(w, I.r + p.at_a, e, p.a);
  for (int e = 0; e < k * n; ++e) b[e] = element(w, I.r + p.at_b, e, p.a);
  for (int e = 0; e < m * n; ++e) out[e] = element(w, I.r + p.at_c, e, p.c);
  for (int i = 0; i < m; ++i)
    for (int x = 0; x < k; ++x)
      for (int j = 0; j < n; ++j) out[i * n + j] += a[i * k + x] * b[x * n + j];
  for (int e = 0; e < m * n; ++e) {
    if (p.d == Ty::F32)
      *(float*)slot(w, I.r, e, 4) = canonical(out[e]);
    else
      *(u16*)slot(w, I.r, e, 2) = float_to_half(out[e]);
  }
}

std::vector<Ref> vector_of(Lower& l, const ptx::Arg& v, Ty t) {
  std::vector<Ref> refs;
  if (v.kind != ptx::Arg::Vec) l.fail("vector expected");
  for (const auto& e : v.elems) refs.push_back(l.use(e, t == Ty::F32 ? Ty::F32 : Ty::B32));
  return refs;
}

void transfer_op(Lower& l, bool loads) {
  Plan* p = l.program.make<Plan>();
  p->part = l.take_any()[0];
  if (!l.take("sync") || !l.take("aligned")) l.fail("needs .sync.aligned");
  p->column = take_column(l);
  p->shape = take_shape(l);
  const Space space = take_space(l);
  p->type = l.take_type();
  if (p->type != Ty::F16 && p->type != Ty::BF16 && p->type != Ty::TF32 && p->type != Ty::F32)
    l.fail("unsupported type");
  p->rows = p->part == 'b' ? p->shape.k : p->shape.m;
  p->columns = p->part == 'a' ? p->shape.k : p->shape.n;
  p->address = take_address(l, l.arg(loads ? 1 : 0), space);
  std::vector<Ref> refs = vector_of(l, l.arg(loads ? 0 : 1), p->type);
  const int size = ptx::bytes_of(p->type), needed = p->rows * p->columns * size / (4 * kLanes);
  if ((int)refs.size() < needed) l.fail("too few registers for the fragment");
  refs.insert(refs.begin(),
              l.count() > 2 ? l.use(l.arg(2), Ty::U32) : l.constant((u64)(p->column ? p->rows : p->columns), 4));
  l.operands(refs);
  l.inst.x = p;
  l.inst.fn = loads ? (Handler)[](Warp & w, const Inst& I, u32) { transfer(w, I, *(const Plan*)I.x, true); } : (Handler)[](Warp& w, const Inst& I, u32) { transfer(w, I, *(const Plan*)I.x, false); };
  l.inst.cls = space == Space::Global ? (loads ? Class::LoadGlobal : Class::StoreGlobal)
               : loads                ? Class::LoadShared
                                      : Class::StoreShared;
  if (space != Space::Shared) l.program.global_granule = std::min(l.program.global_granule, (u32)size);
  if (space != Space::Global) l.program.shared_granule = std::min(l.program.shared_granule, (u32)size);
}

void multiply_op(Lower& l) {
  Product* p = l.program.make<Product>();
  if (!l.take("sync") || !l.take("aligned")) l.fail("needs .sync.aligned");
  // Fragments are kept by (row, column), so their memory layout does not matter here.
  const std::string la = l.take_any(), lb = l.take_any();
  if ((la != "row" && la != "col") || (lb != "row" && lb != "col")) l.fail("needs two layouts");
  p->shape = take_shape(l);
  p->d = l.take_type();
  Ty t = l.take_type();
  const Ty second = l.maybe_type();
  if (second == Ty::None)
    p->a = Ty::F16, p->c = t;  // .d.c: the operands are f16
  else
    p->a = t, p->c = l.take_type();
  if (p->a != Ty::F16 && p->a != Ty::BF16 && p->a != Ty::TF32) l.fail("unsupported types");
  if ((p->d != Ty::F32 && p->d != Ty::F16) || (p->c != Ty::F32 && p->c != Ty::F16)) l.fail("unsupported accumulator");
  std::vector<Ref> refs = vector_of(l, l.arg(0), p->d);
  const auto append = [&](int i, Ty ty) {
    const int at = (int)refs.size();
    for (Ref r : vector_of(l, l.arg(i), ty)) refs.push_back(r);
    return at;
  };
  p->at_a = append(1, p->a);
  p->at_b = append(2, p->a);
  p->at_c = append(3, p->c);
  l.operands(refs);
  l.inst.x = p;
  l.inst.fn = multiply;
  l.inst.cls = Class::Mma;
  l.inst.imm = 2ull * (u64)p->shape.m * (u64)p->shape.n * (u64)p->shape.k;
}

}  // namespace

void add_wmma_ops(Table& t) {
  t["wmma"] = [](Lower& l) {
    l.inst.control = Control::Collective;
    if (l.take("load"))
      transfer_op(l, true);
    else if (l.take("store"))
      transfer_op(l, false);
    else if (l.take("mma"))
      multiply_op(l);
    else
      l.fail("unknown wmma operation");
  };
}
