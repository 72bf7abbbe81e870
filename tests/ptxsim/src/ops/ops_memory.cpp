// ld and st of every space and vector width.
#include "access.h"

namespace {

struct Plan {
  Address address;
  u32 elem = 4, n = 1, bytes = 4;  // element, count, all together
  bool sign = false;
  Access read = Access::Read, write = Access::Write;
  bool acquire = false, release = false;
  bool uniform = false;  // every register as wide as the element
  int widths[8] = {};
};

void put(const Warp& w, Ref r, int width, int lane, u64 v) {
  if (width == 2)
    w.at<u16>(r)[lane] = (u16)v;
  else if (width == 4)
    w.at<u32>(r)[lane] = (u32)v;
  else
    w.at<u64>(r)[lane] = v;
}
u64 get(const Warp& w, Ref r, int width, int lane) {
  return width == 2 ? w.at<u16>(r)[lane] : width == 4 ? w.at<u32>(r)[lane] : w.at<u64>(r)[lane];
}

template <class T>
void scatter(const Warp& w, const Inst& I, u32 m, u32 n, u8* const* at) {
  for (u32 k = 0; k < n; ++k) {
    if (I.r[k] == kNone) continue;
    T* d = w.at<T>(I.r[k]);
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      std::memcpy(&d[i], at[i] + k * sizeof(T), sizeof(T));
    }
  }
}

void to_registers(Warp& w, const Inst& I, const Plan& p, u32 m, u8* const* at) {
  if (p.uniform) {
    switch (p.elem) {
      case 2: return scatter<u16>(w, I, m, p.n, at);
      case 4: return scatter<u32>(w, I, m, p.n, at);
      case 8: return scatter<u64>(w, I, m, p.n, at);
    }
  }
  for (u32 k = 0; k < p.n; ++k)
    for (u32 rest = m; rest && I.r[k] != kNone; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      u64 v = 0;
      copy_bytes(&v, at[i] + k * p.elem, p.elem);
      const int shift = 64 - 8 * (int)p.elem;
      if (p.sign) v = (u64)((s64)(v << shift) >> shift);
      put(w, I.r[k], p.widths[k], i, v);
    }
}

void from_registers(const Warp& w, const Inst& I, const Plan& p, u32 m, u8 (*out)[16]) {
  for (u32 k = 0; k < p.n; ++k)
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const u64 v = get(w, I.r[k], p.widths[k], i);
      copy_bytes(out[i] + k * p.elem, &v, p.elem);
    }
}

void load(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  u8* at[kLanes];
  compute_addresses(w, p.address, address);
  Space space = p.address.space;
  if (space == Space::Generic) space = resolve_generic(m, address);
  switch (space) {
    case Space::Global:
    case Space::Const:
      access_global(w, I, m, address, p.bytes, p.read, at);
      if (p.read == Access::ReadSync)
        for (u32 rest = m; rest; rest &= rest - 1)
          w.launch->memory.synchronise(w.block->index, w.clock, w.id, address[__builtin_ctz(rest)], p.acquire, false);
      break;
    case Space::Shared:
      check_shared_bounds(w, m, address, p.bytes);
      for (u32 rest = m; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        if (p.read != Access::ReadSync) w.block->shared.read((u32)address[i], p.bytes, w.id, i, w.clock);
        at[i] = w.block->shared.at((u32)address[i]);
      }
      count_shared(w, I, m, address, p.bytes);
      break;
    case Space::Local: access_local(w, m, address, p.bytes, at); break;
    default: {
      auto& params = w.launch->params;
      for (u32 rest = m; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        if (address[i] + p.bytes > params.size())
          throw Violation{"out-of-bounds", "read past the kernel's parameters", i, address[i]};
        at[i] = params.data() + address[i];
      }
    }
  }
  to_registers(w, I, p, m, at);
}

void store(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  u8* at[kLanes];
  u8 value[kLanes][16];
  compute_addresses(w, p.address, address);
  from_registers(w, I, p, m, value);
  Space space = p.address.space;
  if (space == Space::Generic) space = resolve_generic(m, address);
  if (space == Space::Shared) {
    check_shared_bounds(w, m, address, p.bytes);
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      if (p.write == Access::WriteSync)
        w.block->shared.land_copy((u32)address[i], p.bytes, value[i], w.id, i, w.clock);
      else
        w.block->shared.write((u32)address[i], p.bytes, value[i], w.id, i, w.clock);
    }
    count_shared(w, I, m, address, p.bytes);
    return;
  }
  if (space == Space::Local)
    access_local(w, m, address, p.bytes, at);
  else
    access_global(w, I, m, address, p.bytes, p.write, at);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    copy_bytes(at[i], value[i], p.bytes);
    if (p.write == Access::WriteSync && space == Space::Global)
      w.launch->memory.synchronise(w.block->index, w.clock, w.id, address[i], false, p.release);
  }
}

void load_or_store(Lower& l) {
  const bool is_load = l.s.op[0][0] == 'l';
  Plan* p = l.program.make<Plan>();
  // Strong accesses order blocks; everything else is plain.
  const bool is_volatile = l.take("volatile"), relaxed = l.take("relaxed");
  p->acquire = l.take("acquire");
  p->release = l.take("release");
  l.take("weak");
  if (is_volatile || relaxed || p->acquire || p->release) {
    p->read = Access::ReadSync, p->write = Access::WriteSync;
    l.program.synchronises_blocks = true;
    l.drop({"cta", "gpu", "sys", "cluster"});
  }
  if (l.take("nc")) p->read = Access::ReadOnce;
  const Space space = take_space(l);
  l.drop({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "unified", "L1::evict_normal", "L1::evict_unchanged",
          "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last",
          "L2::evict_normal", "L2::64B", "L2::128B", "L2::256B"});
  l.take("L2::cache_hint");  // its operand comes last and is not looked at
  p->n = l.take("v2") ? 2 : l.take("v4") ? 4 : l.take("v8") ? 8 : 1;
  const Ty t = l.take_type();
  p->elem = (u32)ptx::bytes_of(t);
  p->bytes = p->elem * p->n;
  p->sign = t == Ty::S8 || t == Ty::S16 || t == Ty::S32;
  if (p->bytes > 16 || t == Ty::Pred || t == Ty::F16x2) l.fail("unsupported access");
  p->address = take_address(l, l.arg(is_load ? 1 : 0), space);
  const ptx::Arg& data = l.arg(is_load ? 0 : 1);
  std::vector<ptx::Arg> elems = data.kind == ptx::Arg::Vec ? data.elems : std::vector<ptx::Arg>{data};
  if (elems.size() != p->n) l.fail("vector length does not match");
  p->uniform = p->elem > 1;
  std::vector<Ref> refs;
  for (size_t k = 0; k < elems.size(); ++k) {
    p->widths[k] = l.bytes(elems[k]);
    if (elems[k].kind == ptx::Arg::Ignore) {
      refs.push_back(kNone);
      p->widths[k] = (int)p->elem;
      continue;
    }
    if (p->widths[k] < 0) {
      if (is_load) l.fail("register expected");
      p->widths[k] = std::max(2, (int)p->elem);
      refs.push_back(l.use(elems[k], p->elem == 1 ? Ty::B16 : t));
      continue;
    }
    if (p->widths[k] < (int)p->elem) l.fail("register too narrow");
    p->uniform &= p->widths[k] == (int)p->elem;
    refs.push_back(l.reg(elems[k]));
  }
  l.operands(refs);
  l.inst.x = p;
  l.inst.fn = is_load ? load : store;
  const Space s = p->address.space;
  if (s == Space::Param && !is_load) l.fail("store to a kernel parameter");
  l.inst.cls = s == Space::Shared  ? (is_load ? Class::LoadShared : Class::StoreShared)
               : s == Space::Local ? (is_load ? Class::LoadLocal : Class::StoreLocal)
               : s == Space::Param ? Class::LoadParam
                                   : (is_load ? Class::LoadGlobal : Class::StoreGlobal);
  if (s == Space::Global || s == Space::Generic || s == Space::Const)
    l.program.global_granule = std::min(l.program.global_granule, p->bytes);
  if (s == Space::Shared || s == Space::Generic)
    l.program.shared_granule = std::min(l.program.shared_granule, p->bytes);
}

void prefetch(Lower& l) {
  while (!l.peek().empty()) l.take_any();
  l.inst.fn = [](Warp&, const Inst&, u32) {};
}

}  // namespace

void add_memory_ops(Table& t) {
  t["ld"] = t["st"] = t["ldu"] = load_or_store;
  t["prefetch"] = t["prefetchu"] = t["discard"] = t["applypriority"] = prefetch;  // hints
  t["createpolicy"] = [](Lower& l) {  // a cache policy: a value only hints take
    while (!l.peek().empty()) l.take_any();
    l.operands({l.dest(l.arg(0), Ty::B64)});
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) { for_lanes(m, [&](int i) { w.at<u64>(I.r[0])[i] = 0; }); };
  };
}
