// Threads that run one job together, with a barrier between its steps.
//
// A parallel region for each step would cost more than a small layer. PyTorch's parallel_for starts the threads, which
// meet before the work starts. If the pool runs its chunks one after the other, or the machine is too busy to run all
// of them, they would wait forever: then the team spawns threads of its own for those that are missing. The team always
// has the size that was asked for, so that reductions always split the same way.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace resnet_fast {

inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class ThreadTeam {
 public:
  int64_t size() const { return size_; }

  // A barrier: returns when every thread of the team has called this.
  void wait() {
    if (size_ == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        spin_pause();
      } else {
        std::this_thread::yield();  // a thread has lost its core: give it this one
      }
    }
  }

  // Calls body(rank, team) on `threads` threads at once; on fewer where the system spawns no more.
  template <typename Body>
  static void run(int64_t threads, const Body& body) {
    if (threads == 1) {
      ThreadTeam alone;
      body(0, alone);
      return;
    }
    ThreadTeam team;
    team.expected_ = threads;
    team.body_ = [&](int64_t rank) { body(rank, team); };
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t rank = team.join(end - begin);
      if (rank >= 0) body(rank, team);
    });
    for (std::thread& thread : team.spawned_) thread.join();
  }

 private:
  enum State { kGathering, kCounting, kComplete, kAlone };
  enum Spawning { kWaiting, kStarted, kRefused };
  static constexpr int64_t kSpins = 1 << 14;
  static constexpr std::chrono::milliseconds kPatience{20};

  // The caller's rank when all shares of the region have arrived, or -1 where others do the work.
  int64_t join(int64_t shares) {
    const int64_t rank = joined_.fetch_add(1, std::memory_order_acq_rel);
    const auto start = std::chrono::steady_clock::now();
    if (arrived_.fetch_add(shares, std::memory_order_acq_rel) + shares == expected_) {
      // kCounting: no thread may leave for kAlone while the size is written.
      int gathering = kGathering;
      if (!state_.compare_exchange_strong(gathering, kCounting, std::memory_order_acq_rel)) return -1;
      complete(joined_.load(std::memory_order_acquire));
      state_.store(kComplete, std::memory_order_release);
      return rank;
    }
    for (int64_t spins = 1;; ++spins) {
      const int state = state_.load(std::memory_order_acquire);
      if (state == kComplete) return rank;
      if (state == kAlone) return -1;
      spin_pause();
      if (spins % 1024 == 0) {
        std::this_thread::yield();
        int gathering = kGathering;
        if (std::chrono::steady_clock::now() - start > kPatience &&
            state_.compare_exchange_strong(gathering, kAlone, std::memory_order_acq_rel)) {
          complete(1);
          return 0;
        }
      }
    }
  }

  // Spawns threads until a team of `present` threads has the expected size: with fewer, none would pass the first
  // barrier.
  void complete(int64_t present) {
    size_ = expected_;
    try {
      for (int64_t rank = present; rank < expected_; ++rank) {
        spawned_.emplace_back([this, rank] {
          while (spawning_.load(std::memory_order_acquire) == kWaiting) std::this_thread::yield();
          if (spawning_.load(std::memory_order_acquire) == kStarted) body_(rank);
        });
      }
      spawning_.store(kStarted, std::memory_order_release);
    } catch (const std::system_error&) {
      size_ = present;
      spawning_.store(kRefused, std::memory_order_release);
    }
  }

  int64_t expected_ = 1;
  int64_t size_ = 1;
  std::function<void(int64_t)> body_;
  std::vector<std::thread> spawned_;
  std::atomic<int> state_{kGathering}, spawning_{kWaiting};
  std::atomic<int64_t> joined_{0}, arrived_{0}, waiting_{0}, round_{0};
};

// The threads that work on the same images: a whole team, or one of its threads alone.
struct ThreadGroup {
  int64_t rank, size;
  ThreadTeam& team;

  void wait() const {
    if (size > 1) team.wait();
  }
  // Calls body(begin, end) with this thread's share of [0, n).
  template <typename Body>
  void share(int64_t n, const Body& body) const {
    body(n * rank / size, n * (rank + 1) / size);
  }
};

}  // namespace resnet_fast
