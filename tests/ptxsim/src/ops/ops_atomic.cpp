// atom and red on global and shared memory. The lanes of a warp go one after another, from a lane
// the seed picks.
#include "access.h"
#include "floats.h"

namespace {

using Update = u64 (*)(u64 old, u64 b, u64 c);

struct Plan {
  Address address;
  Update update;
  u32 bytes;
  bool acquire = false, release = false, returns = false;
  int width = 0;
};

template <class T>
Update integer(const std::string& op) {
  if (op == "add") return [](u64 o, u64 b, u64) { return (u64)(std::make_unsigned_t<T>)((T)o + (T)b); };
  if (op == "min") return [](u64 o, u64 b, u64) { return (u64)(std::make_unsigned_t<T>)((T)b < (T)o ? (T)b : (T)o); };
  if (op == "max") return [](u64 o, u64 b, u64) { return (u64)(std::make_unsigned_t<T>)((T)o < (T)b ? (T)b : (T)o); };
  if (op == "inc") return [](u64 o, u64 b, u64) { return (T)o >= (T)b ? 0 : o + 1; };
  if (op == "dec") return [](u64 o, u64 b, u64) { return o == 0 || (T)o > (T)b ? b : o - 1; };
  if (op == "and") return [](u64 o, u64 b, u64) { return o & b; };
  if (op == "or") return [](u64 o, u64 b, u64) { return o | b; };
  if (op == "xor") return [](u64 o, u64 b, u64) { return o ^ b; };
  if (op == "exch") return [](u64, u64 b, u64) { return b; };
  if (op == "cas") return [](u64 o, u64 b, u64 c) { return o == b ? c : o; };
  return nullptr;
}

template <bool kBf>
u16 half_sum(u16 a, u16 b) {
  return kBf ? to_bfloat(add_sticky(from_bfloat(a), from_bfloat(b))) : float_to_half(from_half(a) + from_half(b));
}

Update floating(const std::string& op, Ty t) {
  if (op == "exch" || op == "cas") return integer<u64>(op);
  if (op != "add") return nullptr;
  switch (t) {
    case Ty::F32:
      return [](u64 o, u64 b, u64) {
        return (u64)bits_as<u32>(canonical(flush(bits_as<float>((u32)o) + bits_as<float>((u32)b))));
      };
    case Ty::F64: return [](u64 o, u64 b, u64) { return bits_as<u64>(bits_as<double>(o) + bits_as<double>(b)); };
    case Ty::F16: return [](u64 o, u64 b, u64) { return (u64)half_sum<false>((u16)o, (u16)b); };
    case Ty::BF16: return [](u64 o, u64 b, u64) { return (u64)half_sum<true>((u16)o, (u16)b); };
    case Ty::F16x2:
      return [](u64 o, u64 b, u64) {
        return (u64)half_sum<false>((u16)o, (u16)b) | (u64)half_sum<false>((u16)(o >> 16), (u16)(b >> 16)) << 16;
      };
    case Ty::BF16x2:
      return [](u64 o, u64 b, u64) {
        return (u64)half_sum<true>((u16)o, (u16)b) | (u64)half_sum<true>((u16)(o >> 16), (u16)(b >> 16)) << 16;
      };
    default: return nullptr;
  }
}

// f32 sums of atomics on global memory keep subnormals.
u64 add_f32_global(u64 o, u64 b, u64) {
  return bits_as<u32>(canonical(bits_as<float>((u32)o) + bits_as<float>((u32)b)));
}

u64 lane_value(const Warp& w, Ref r, u32 bytes, int i) {
  return bytes == 2 ? w.at<u16>(r)[i] : bytes == 4 ? w.at<u32>(r)[i] : w.at<u64>(r)[i];
}

void atom(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  u8* at[kLanes];
  compute_addresses(w, p.address, address);
  Space space = p.address.space;
  if (space == Space::Generic) space = resolve_generic(m, address);
  if (space == Space::Shared) {
    check_shared_bounds(w, m, address, p.bytes);
    count_shared(w, I, m, address, p.bytes);
  } else {
    access_global(w, I, m, address, p.bytes, Access::Atomic, at);
  }
  const int first = (int)(w.launch->random() % kLanes);
  for (int k = 0; k < kLanes; ++k) {
    const int i = (first + k) % kLanes;
    if (!(m >> i & 1)) continue;
    if (space == Space::Shared) {
      w.block->shared.atomic((u32)address[i], p.bytes, w.id, i, w.clock);
      at[i] = w.block->shared.at((u32)address[i]);
    } else {
      w.launch->memory.synchronise(w.block->index, w.clock, w.id, address[i], p.acquire, p.release);
    }
    u64 old = 0;
    std::memcpy(&old, at[i], p.bytes);
    const u64 b = lane_value(w, I.r[1], p.bytes, i), c = lane_value(w, I.r[2], p.bytes, i);
    const u64 value = p.update(old, b, c);
    std::memcpy(at[i], &value, p.bytes);
    if (p.returns && I.r[0] != kNone) {
      if (p.width == 2)
        w.at<u16>(I.r[0])[i] = (u16)old;
      else if (p.width == 4)
        w.at<u32>(I.r[0])[i] = (u32)old;
      else
        w.at<u64>(I.r[0])[i] = old;
    }
  }
}

void lower_atomic(Lower& l) {
  Plan* p = l.program.make<Plan>();
  p->returns = l.s.op[0] == "atom";
  p->acquire = l.take("acquire");
  p->release = l.take("release");
  if (l.take("acq_rel")) p->acquire = p->release = true;
  l.drop({"relaxed", "cta", "gpu", "sys", "cluster"});
  const Space space = take_space(l);
  const std::string op = l.take_any();
  l.take("noftz");
  l.take("L2::cache_hint");
  const Ty t = l.take_type();
  p->bytes = (u32)ptx::bytes_of(t);
  const bool is_float =
      t == Ty::F16 || t == Ty::BF16 || t == Ty::F16x2 || t == Ty::BF16x2 || t == Ty::F32 || t == Ty::F64;
  p->update = is_float        ? floating(op, t)
              : t == Ty::S32  ? integer<s32>(op)
              : t == Ty::S64  ? integer<s64>(op)
              : p->bytes == 8 ? integer<u64>(op)
              : p->bytes == 2 ? integer<u16>(op)
                              : integer<u32>(op);
  if (!p->update) l.fail("unsupported atomic operation");
  if (t == Ty::F32 && op == "add" && space != Space::Shared) p->update = add_f32_global;
  const int a = p->returns ? 1 : 0;
  p->address = take_address(l, l.arg(a), space);
  auto value = [&](int i) {
    const ptx::Arg& v = l.arg(i);
    if (v.kind == ptx::Arg::Vec) {
      if (v.elems.size() != 1) l.fail("vector atomics need a newer target");
      return l.use(v.elems[0], t);
    }
    return l.use(v, t);
  };
  const Ref b = value(a + 1), c = op == "cas" ? value(a + 2) : b;
  Ref d = kNone;
  if (p->returns && l.arg(0).kind != ptx::Arg::Ignore) d = l.dest(l.arg(0), t), p->width = l.bytes(l.arg(0));
  l.operands({d, b, c});
  l.inst.x = p;
  l.inst.fn = atom;
  l.inst.cls = space == Space::Shared ? Class::AtomicShared : Class::AtomicGlobal;
  if (space != Space::Shared)
    l.program.global_granule = std::min(l.program.global_granule, p->bytes), l.program.synchronises_blocks = true;
  if (space != Space::Global) l.program.shared_granule = std::min(l.program.shared_granule, p->bytes);
}

}  // namespace

void add_atomic_ops(Table& t) { t["atom"] = t["red"] = lower_atomic; }
