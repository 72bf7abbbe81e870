// A caching allocator. The C library returns freed memory to the system, which maps it again page by page, each filled
// with zeros: a tenth to a quarter of a training step, which frees all activations before the next step allocates the
// same again. Freed blocks are kept instead. Kept and used blocks together never take much more than the most that was
// in use at once, and blocks that stay unused for long are returned.
#include "cpu/kept_memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/huge_pages.h"

namespace resnet_fast {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kSmallest = size_t{1} << 20;  // bytes; smaller blocks cost the C library nothing
constexpr size_t kRounding = size_t{1} << 16;
constexpr std::align_val_t kAlignment{size_t{2} << 20};  // of huge pages
constexpr uint64_t kStale = 4096;  // blocks allocated since

class CachingAllocator {
 public:
  // A block of at least `bytes`, which is set to its size.
  void* allocate(size_t& bytes) {
    bytes = (bytes + kRounding - 1) / kRounding * kRounding;
    std::vector<void*> old;
    void* data = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++allocations_;
      auto fit = free_.lower_bound(bytes);
      if (fit != free_.end() && fit->first <= bytes + bytes / 4) {
        // Of several, the one freed last: it may still be in the caches.
        fit = std::prev(free_.upper_bound(fit->first));
        bytes = fit->first;
        data = fit->second.data;
        free_bytes_ -= bytes;
        free_.erase(fit);
      }
      used_bytes_ += bytes;
      most_bytes_ = std::max(most_bytes_, used_bytes_);
      if (!data) make_room(most_bytes_ + most_bytes_ / 2 - used_bytes_, old);
      if (allocations_ % kStale == 0) release_stale(old);
    }
    release(old);
    if (!data) data = from_system(bytes);
    return data;
  }

  void free(void* data, size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_bytes_ -= bytes;
      if (keep_) {
        free_.emplace(bytes, Free{data, allocations_});
        free_bytes_ += bytes;
        return;
      }
    }
    release({data});
  }

  void keep(bool on) {
    std::vector<void*> old;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      keep_ = on;
      if (!on) make_room(0, old);
      most_bytes_ = used_bytes_;
    }
    release(old);
  }

  bool keeps() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return keep_;
  }

  std::vector<int64_t> bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(free_bytes_), static_cast<int64_t>(used_bytes_)};
  }

 private:
  struct Free {
    void* data;
    uint64_t since;
  };
  typedef std::multimap<size_t, Free> Blocks;

  void* from_system(size_t bytes) {
    void* data = ::operator new(bytes, kAlignment, std::nothrow);
    if (!data) {
      std::vector<void*> all;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        make_room(0, all);
      }
      release(all);
      data = ::operator new(bytes, kAlignment, std::nothrow);
    }
    if (!data) {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_bytes_ -= bytes;
      most_bytes_ = used_bytes_;
    }
    RESNET_FAST_CHECK(data, "resnet_fast: no memory for ", bytes, " bytes");
    prefer_huge_pages(data, bytes);
    return data;
  }

  // Moves the oldest free blocks to `out` until the rest take at most `most` bytes.
  void make_room(size_t most, std::vector<void*>& out) {
    while (free_bytes_ > most) {
      take_out(std::min_element(free_.begin(), free_.end(),
                                [](const auto& a, const auto& b) { return a.second.since < b.second.since; }),
               out);
    }
  }

  void release_stale(std::vector<void*>& out) {
    for (auto block = free_.begin(); block != free_.end();) {
      const auto next = std::next(block);
      if (allocations_ - block->second.since > kStale) take_out(block, out);
      block = next;
    }
  }

  void take_out(Blocks::iterator block, std::vector<void*>& out) {
    free_bytes_ -= block->first;
    out.push_back(block->second.data);
    free_.erase(block);
  }

  static void release(const std::vector<void*>& blocks) {
    for (void* data : blocks) ::operator delete(data, kAlignment);
  }

  std::mutex mutex_;
  Blocks free_;
  size_t free_bytes_ = 0, used_bytes_ = 0, most_bytes_ = 0;
  uint64_t allocations_ = 0;
  bool keep_ = true;
};

// Never destroyed: tensors may outlive static objects.
CachingAllocator& allocator() {
  static CachingAllocator& it = *new CachingAllocator;
  return it;
}

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

// None where PyTorch is to allocate the memory.
// Bytes of an element; 0 of dtypes that no kernel here writes.
size_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Byte: return 1;
    default: return 0;
  }
}

std::optional<Tensor> kept_tensor(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType type) {
  size_t bytes = size_of(type);
  if (bytes == 0) return std::nullopt;
  for (const int64_t size : sizes) {
    const bool too_large = size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes);
    RESNET_FAST_CHECK(!too_large && bytes <= SIZE_MAX / 2, "resnet_fast: no memory for a tensor of ", sizes.size(),
                      " dimensions, one of them ", size);
  }
  if (bytes < kSmallest || !allocator().keeps()) return std::nullopt;
  void* data = allocator().allocate(bytes);
  return torch::stable::from_blob(data, sizes, strides, kCpu, type,
                                  [bytes](void* block) { allocator().free(block, bytes); });
}

void keep_memory(bool on) { allocator().keep(on); }
std::vector<int64_t> kept_memory() { return allocator().bytes(); }

}  // namespace

Tensor empty_tensor(std::initializer_list<int64_t> size, ScalarType type) {
  const int64_t* n = size.begin();
  if (size.size() == 4) {
    const int64_t strides[] = {n[1] * n[2] * n[3], 1, n[3] * n[1], n[1]};
    const auto kept = kept_tensor({n, 4}, {strides, 4}, type);
    return kept ? *kept
                : torch::stable::empty({n, 4}, type, std::nullopt, kCpu, std::nullopt,
                                       torch::headeronly::MemoryFormat::ChannelsLast);
  }
  const int64_t strides[] = {n[size.size() - 1], 1};
  const auto kept = kept_tensor({n, size.size()}, {strides + 2 - size.size(), size.size()}, type);
  return kept ? *kept : torch::stable::empty({n, size.size()}, type, std::nullopt, kCpu);
}

Tensor empty_tensor_like(const Tensor& t) {
  int64_t reach = 1;
  for (int64_t i = 0; i < t.dim(); ++i) reach += (t.size(i) - 1) * t.stride(i);
  const auto kept =
      t.numel() > 0 && reach == t.numel() ? kept_tensor(t.sizes(), t.strides(), t.scalar_type()) : std::nullopt;
  return kept ? *kept : torch::stable::empty_like(t);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("keep_memory", TORCH_BOX(&keep_memory));
  m.impl("kept_memory", TORCH_BOX(&kept_memory));
}

}  // namespace resnet_fast
