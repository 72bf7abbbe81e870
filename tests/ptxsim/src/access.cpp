#include "access.h"

#include <algorithm>

Space take_space(Lower& l) {
  static const std::pair<const char*, Space> kSpaces[] = {
      {"global", Space::Global},      {"shared", Space::Shared},
      {"shared::cta", Space::Shared}, {"shared::cluster", Space::Shared},  // clusters have one block
      {"local", Space::Local},        {"param", Space::Param},
      {"param::entry", Space::Param}, {"const", Space::Const}};
  for (auto& [name, space] : kSpaces)
    if (l.take(name)) return space;
  return Space::Generic;
}

Address take_address(Lower& l, const ptx::Arg& a, Space space) {
  if (a.kind != ptx::Arg::Addr) l.fail("address expected");
  Address r;
  r.space = space;
  r.offset = a.imm;
  if (a.elems.empty()) return r;
  const ptx::Arg& base = a.elems[0];
  if (base.kind == ptx::Arg::Var) {
    r.offset += base.var->address + base.imm;
    if (base.var->space == Space::Shared) r.offset += kSharedBase;
    if (space == Space::Param && base.var->space == Space::Local)
      r.space = Space::Local;
    else if (space == Space::Generic)
      l.fail("generic access to a named variable");
  } else if (base.kind == ptx::Arg::Reg) {
    const int bytes = l.bytes(base);
    if (bytes != 4 && bytes != 8) l.fail("address register has the wrong width");
    r.wide = bytes == 8;
    r.base = l.reg(base);
  } else {
    l.fail("unreadable address");
  }
  return r;
}

Space resolve_generic(u32 mask, u64* address) {
  Space found = Space::Generic;
  for (u32 m = mask; m; m &= m - 1) {
    u64& a = address[__builtin_ctz(m)];
    Space s = Space::Global;
    if (a - kSharedWindow < kWindowBytes)
      s = Space::Shared, a -= kSharedWindow;
    else if (a - kLocalWindow < kWindowBytes)
      s = Space::Local, a -= kLocalWindow;
    if (found != Space::Generic && s != found)
      throw Violation{"unsupported", "generic access to several state spaces by one instruction", __builtin_ctz(m), a};
    found = s;
  }
  return found;
}

// Sectors of 32 bytes a request touches, and the least its distinct bytes could touch.
static void count_sectors(Cost& cost, u32 mask, const u64* address, u32 bytes) {
  u64 sorted[kLanes];
  int n = 0;
  bool ascending = true;
  for (u32 m = mask; m; m &= m - 1) {
    sorted[n] = address[__builtin_ctz(m)];
    ascending &= n == 0 || sorted[n] >= sorted[n - 1];
    ++n;
  }
  if (!ascending) std::sort(sorted, sorted + n);
  u64 sectors = 0, distinct = 0, last_sector = ~0ull, last = ~0ull;
  for (int i = 0; i < n; ++i) {
    distinct += sorted[i] != last;
    last = sorted[i];
    const u64 s = sorted[i] >> 5;
    sectors += s != last_sector;
    last_sector = s;
  }
  cost.units += sectors;
  cost.ideal += (distinct * bytes + 31) / 32;
  cost.bytes += (u64)n * bytes;
}

void access_global(Warp& w, const Inst&, u32 mask, const u64* address, u32 bytes, Access kind, u8** at) {
  GlobalMemory& g = w.launch->memory;
  const u32 block = w.block->index;
  for (u32 m = mask; m; m &= m - 1) {
    const int i = __builtin_ctz(m);
    const u64 a = address[i];
    Buffer* b = g.find(a, bytes);
    if (!b) throw Violation{"out-of-bounds", std::to_string(bytes) + "-byte access to " + g.describe(a), i, a};
    if (a & (bytes - 1))
      throw Violation{"misaligned", std::to_string(bytes) + "-byte access to " + g.describe(a), i, a};
    if (kind == Access::Read)
      g.check_read(*b, a, bytes, {block, w.id, i, w.clock});
    else {
      if (b->constant && kind != Access::ReadSync && kind != Access::ReadOnce)
        throw Violation{"read-only", "write to constant " + g.describe(a), i, a};
      g.check(*b, a, bytes, kind, {block, w.id, i, w.clock});
    }
    at[i] = b->host + (a - b->base);
  }
  count_sectors(cost_of(w), mask, address, bytes);
}

void check_shared_bounds(Warp& w, u32 mask, const u64* address, u32 bytes) {
  const SharedMemory& s = w.block->shared;
  for (u32 m = mask; m; m &= m - 1) {
    const int i = __builtin_ctz(m);
    const u64 a = address[i];
    if (a >> 32 || !s.inside((u32)a, bytes))
      throw Violation{"out-of-bounds",
                      std::to_string(bytes) + "-byte access at shared + " + std::to_string((s64)a - kSharedBase) +
                          ", outside every shared variable (" + std::to_string(s.size()) + " bytes in all)",
                      i, a};
    if (a & (bytes - 1))
      throw Violation{"misaligned",
                      std::to_string(bytes) + "-byte access at shared + " + std::to_string(a - kSharedBase), i, a};
  }
}

// Wavefronts: lanes are served in phases of 128 bytes (all 32, or 16 or 8 for wider accesses); a
// phase takes as many wavefronts as its busiest bank has distinct words.
static u32 busiest_bank(u32 lanes, const u64* address, int words) {
  u32 seen[32][8];  // a bank's distinct words; more than eight are counted without merging
  u8 count[32] = {};
  u32 worst = 1;
  for (u32 m = lanes; m; m &= m - 1) {
    const u32 word = (u32)(address[__builtin_ctz(m)] >> 2);
    for (int k = 0; k < words; ++k) {
      const u32 v = word + (u32)k, bank = v & 31;
      u8& c = count[bank];
      bool known = false;
      for (int j = 0; j < c && j < 8; ++j) known |= seen[bank][j] == v;
      if (known) continue;
      if (c < 8) seen[bank][c] = v;
      ++c;
      worst = std::max<u32>(worst, c);
    }
  }
  return worst;
}

void count_shared(Warp& w, const Inst&, u32 mask, const u64* address, u32 bytes) {
  Cost& cost = cost_of(w);
  const u32 unit = std::max(4u, bytes), lanes = 128 / unit, shift = (u32)__builtin_ctz(unit);
  for (u32 first = 0; first < kLanes; first += lanes) {
    const u32 part = lanes == 32 ? mask : mask & ((1u << lanes) - 1) << first;
    if (!part) continue;
    // No two lanes in the same bank is the usual case.
    u32 used = 0, collide = 0;
    for (u32 m = part; m; m &= m - 1) {
      const u32 bank = 1u << (address[__builtin_ctz(m)] >> shift & (lanes - 1));
      collide |= used & bank;
      used |= bank;
    }
    cost.units += collide ? busiest_bank(part, address, (int)unit / 4) : 1;
    cost.ideal += 1;
  }
  cost.bytes += (u64)__builtin_popcount(mask) * bytes;
}

void access_local(Warp& w, u32 mask, const u64* address, u32 bytes, u8** at) {
  const u64 size = w.launch->program->kernel->local_bytes;
  for (u32 m = mask; m; m &= m - 1) {
    const int i = __builtin_ctz(m);
    const u64 a = address[i];
    if (a >= size || size - a < bytes)
      throw Violation{"out-of-bounds",
                      "access at local + " + std::to_string(a) + " of " + std::to_string(size) + " bytes", i, a};
    if (a & (bytes - 1))
      throw Violation{"misaligned", std::to_string(bytes) + "-byte access at local + " + std::to_string(a), i, a};
    at[i] = w.local.data() + (u64)i * size + a;
  }
}
