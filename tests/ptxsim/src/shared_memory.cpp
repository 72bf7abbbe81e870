#include "shared_memory.h"

#include <algorithm>

void SharedMemory::reset(u32 bytes, u32 granule_bytes, u32 warps) {
  shift_ = granule_bytes >= 16 ? 4 : granule_bytes >= 8 ? 3 : granule_bytes >= 4 ? 2 : granule_bytes >= 2 ? 1 : 0;
  warps_ = warps;
  if (bytes > capacity_) data_ = std::make_unique<u8[]>(bytes), capacity_ = bytes;
  size_ = bytes;
  const u32 n = (bytes + (1u << shift_) - 1) >> shift_;
  cells_.assign(n, Cell());
  reads_.assign((size_t)n * warps, 0);
  async_readers_.clear();
}

void SharedMemory::allow(u32 offset, u32 bytes) {
  if (!bytes) return;
  for (u32 g = offset >> shift_; g <= (offset + bytes - 1) >> shift_; ++g) cells_[g].flags |= kAddressable;
}

void SharedMemory::fault(const char* kind, const char* what, u32 address, int lane) const {
  throw Violation{kind, std::string(what) + " at shared + " + std::to_string(address - kSharedBase), lane, address};
}

void SharedMemory::race(const char* what, u32 address, u32 warp, int lane, u32 other_warp, int other_lane) const {
  std::string who = other_warp >= warps_ ? "a bulk copy"
                    : other_warp != warp ? "warp " + std::to_string(other_warp)
                                         : "the same warp";
  if (other_lane < kLanes && other_warp < warps_) who += ", lane " + std::to_string(other_lane);
  throw Violation{
      "race",
      std::string(what) + " at shared + " + std::to_string(address - kSharedBase) + ", not ordered after " + who, lane,
      address};
}

void SharedMemory::read_slow(u32 g, u32 address, u32 warp, int lane, const WarpClock& c) const {
  const u8 f = cells_[g].flags;
  if (f & kInFlight) fault("async", "read of the destination of an asynchronous copy before its wait", address, lane);
  if (!(f & kWritten)) fault("uninitialised", "read of uninitialised shared memory", address, lane);
  const u32 who = cells_[g].writer, ww = who >> 5;
  if (ww != warp || !lanes_ordered(c, cells_[g].stamp, who & 31, lane))
    race("read of data written", address, warp, lane, ww, who & 31);
}

// Some read is not known to come before: a race, unless the lane read it itself or part of the warp synchronised.
void SharedMemory::check_readers(const u32* reads, u32 address, u32 warp, int lane, const WarpClock& c) const {
  for (u32 w = 0; w < warps_; ++w) {
    if (reads[w] <= c.limits[w]) continue;
    const u32 tick = reads[w] >> 6;
    const int reader = reads[w] & 63;
    bool ok = w == warp && reader == lane;
    if (!ok && w == warp && c.pairs)  // of several readers only that there were some is known: any order will do
      for (int l = 0; l < kLanes && !ok; ++l)
        ok = (reader == kAnyLane || l == reader) && l != lane && tick <= c.pairs[l * kLanes + lane];
    if (!ok) race("write over data read", address, warp, lane, w, reader);
  }
}

template <int kWarps>
static bool any_above_of(const u32* reads, const u32* limits) {
  u32 late = 0;
  for (int w = 0; w < kWarps; ++w) late |= reads[w] > limits[w];
  return late;
}

// The usual block sizes have loops of known length, which vectorise.
static inline bool any_above(const u32* reads, const u32* limits, u32 warps) {
  if (warps == 4) return any_above_of<4>(reads, limits);
  if (warps == 8) return any_above_of<8>(reads, limits);
  u32 late = 0;
  for (u32 w = 0; w < warps; ++w) late |= reads[w] > limits[w];
  return late;
}

void SharedMemory::check_write(u32 g, u32 address, const void* value, u32 at, u32 n, u32 warp, int lane,
                               const WarpClock& c, bool is_atomic) {
  const Cell& cell = cells_[g];
  const u8 f = cell.flags;
  if (f & kInFlight)
    fault("async", "write over the destination of an asynchronous copy before its wait", address, lane);
  if (!async_readers_.empty() && async_readers_[g])
    fault("async", "write over an operand of a wgmma before the wait that covers it", address, lane);
  if ((f & kWritten) && !(is_atomic && (f & kAtomicWrite))) {
    const u32 who = cell.writer, ww = who >> 5, stamp = cell.stamp;
    const bool other =
        ww != warp ? stamp > c.seen[ww] : (int)(who & 31) != lane && !lanes_ordered(c, stamp, who & 31, lane);
    // Storing the value that is already there cannot be observed: compilers let replicated
    // threads do it.
    if (other && !(value && !std::memcmp(data_.get() + at, value, n)))
      race("write over data written", address, warp, lane, ww, who & 31);
  }
  const u32* r = &reads_[(size_t)g * warps_];
  const u32* limits = c.limits.data();
  if (any_above(r, limits, warps_)) check_readers(r, address, warp, lane, c);
}

void SharedMemory::write(u32 address, u32 bytes, const void* value, u32 warp, int lane, const WarpClock& c) {
  const u32 o = address - kSharedBase;
  const u32 unit = std::min(bytes, 1u << shift_);
  for (u32 at = o; at < o + bytes; at += unit) {
    const u32 g = at >> shift_;
    check_write(g, address, (const u8*)value + (at - o), at, unit, warp, lane, c, false);
    cells_[g].write(c.tick, warp, lane);
  }
  copy_bytes(data_.get() + o, value, bytes);
}

void SharedMemory::atomic(u32 address, u32 bytes, u32 warp, int lane, const WarpClock& c) {
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + bytes - 1) >> shift_; g <= end; ++g) {
    if (!(cells_[g].flags & kWritten)) fault("uninitialised", "atomic on uninitialised shared memory", address, lane);
    check_write(g, address, nullptr, o, bytes, warp, lane, c, true);
    cells_[g].write(c.tick, warp, lane);
    cells_[g].flags |= kAtomicWrite;
  }
}

void SharedMemory::begin_copy(u32 address, u32 bytes, u32 warp, int lane, const WarpClock& c) {
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + bytes - 1) >> shift_; g <= end; ++g) {
    check_write(g, address, nullptr, o, bytes, warp, lane, c, false);
    cells_[g].flags |= kInFlight;
  }
}

void SharedMemory::land_copy(u32 address, u32 bytes, const void* value, u32 warp, int lane, const WarpClock& c) {
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + bytes - 1) >> shift_; g <= end; ++g) {
    cells_[g].write(c.tick, warp, lane);
  }
  copy_bytes(data_.get() + o, value, bytes);
}

// Writes through the generic proxy reach the async proxy only behind a fence.proxy.async, on the writer's or on the
// reader's side of what orders them.
void SharedMemory::check_proxy(u32 address, u32 bytes, const WarpClock& c, const char* what) const {
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + bytes - 1) >> shift_; g <= end; ++g) {
    const Cell& cell = cells_[g];
    if (!(cell.flags & kWritten) || cell.writer >> 5 >= warps_ || cell.stamp <= c.proxied[cell.writer]) continue;
    fault("async", (std::string(what) + " data stored without a fence.proxy.async").c_str(), address, cell.writer & 31);
  }
}

void SharedMemory::begin_async_read(u32 address, u32 warp, const WarpClock& c) {
  if (async_readers_.empty()) async_readers_.assign(cells_.size(), 0);
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + 15) >> shift_; g <= end; ++g) {
    const Cell& cell = cells_[g];
    const u32 writer = cell.writer >> 5;
    const bool ordered = cell.stamp <= (writer == warp ? c.warp_sync : c.seen[writer]);
    if ((cell.flags & (kWritten | kInFlight)) != kWritten || !ordered) read_slow(g, address, warp, kAnyLane, c);
    ++async_readers_[g];
  }
  check_proxy(address, 16, c, "wgmma reads");
}

void SharedMemory::end_async_read(u32 address, u32 warp, const WarpClock& c) {
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + 15) >> shift_; g <= end; ++g) {
    --async_readers_[g];
    reads_[(size_t)g * warps_ + warp] = c.tick << 6 | kAnyLane;
  }
}

void SharedMemory::land_bulk_copy(u32 address, u32 bytes, const void* value, u32 agent, u32 tick) {
  const u32 o = address - kSharedBase;
  for (u32 g = o >> shift_, end = (o + bytes - 1) >> shift_; g <= end; ++g) cells_[g].write(tick, agent, 0);
  copy_bytes(data_.get() + o, value, bytes);
}
