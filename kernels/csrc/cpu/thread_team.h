// Threads that work on one job together, with a barrier between its steps.
//
// A parallel region a step would cost more than a small layer takes. The pool's own parallel_for starts the members,
// who meet before the work starts. A pool that runs its chunks one after the other, or a machine too busy to run them
// all, would keep them waiting for ever: threads of the team's own then take the places of those who have not come. The
// team is as large as was asked for, always: what it adds up, it adds up in the same parts.
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

class Team {
 public:
  int64_t size() const { return size_; }

  // Returns once every member has come here.
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
        std::this_thread::yield();  // someone has lost its core: let it have this one
      }
    }
  }

  // Calls body(rank, team) on `threads` threads at once. Where the system starts no more threads, on fewer.
  template <typename Body>
  static void run(int64_t threads, const Body& body) {
    if (threads == 1) {
      Team alone;
      body(0, alone);
      return;
    }
    Team team;
    team.expected_ = threads;
    team.body_ = [&](int64_t rank) { body(rank, team); };
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t rank = team.join(end - begin);
      if (rank >= 0) body(rank, team);
    });
    for (std::thread& thread : team.hired_) thread.join();
  }

 private:
  enum State { kGathering, kCounting, kComplete, kAlone };
  enum Hiring { kWaiting, kStarted, kRefused };
  static constexpr int64_t kSpins = 1 << 14;
  static constexpr std::chrono::milliseconds kPatience{20};

  // The caller's rank once all shares of the region have come, or -1 where others do the work.
  int64_t join(int64_t shares) {
    const int64_t rank = members_.fetch_add(1, std::memory_order_acq_rel);
    const auto start = std::chrono::steady_clock::now();
    if (arrived_.fetch_add(shares, std::memory_order_acq_rel) + shares == expected_) {
      // The size is written between two states: a member that went ahead without others must keep its team.
      int gathering = kGathering;
      if (!state_.compare_exchange_strong(gathering, kCounting, std::memory_order_acq_rel)) return -1;
      complete(members_.load(std::memory_order_acquire));
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

  // Makes a team of `present` members as large as is expected. Threads wait for each other: with fewer than are needed
  // nobody would come past the first barrier.
  void complete(int64_t present) {
    size_ = expected_;
    try {
      for (int64_t rank = present; rank < expected_; ++rank) {
        hired_.emplace_back([this, rank] {
          while (hiring_.load(std::memory_order_acquire) == kWaiting) std::this_thread::yield();
          if (hiring_.load(std::memory_order_acquire) == kStarted) body_(rank);
        });
      }
      hiring_.store(kStarted, std::memory_order_release);
    } catch (const std::system_error&) {
      size_ = present;
      hiring_.store(kRefused, std::memory_order_release);
    }
  }

  int64_t expected_ = 1;
  int64_t size_ = 1;
  std::function<void(int64_t)> body_;
  std::vector<std::thread> hired_;
  std::atomic<int> state_{kGathering}, hiring_{kWaiting};
  std::atomic<int64_t> members_{0}, arrived_{0}, waiting_{0}, round_{0};
};

// Those who work on the same images: a whole team, or one of its members alone.
struct Crew {
  int64_t rank, size;
  Team& team;

  void wait() const {
    if (size > 1) team.wait();
  }
  // Calls body(begin, end) with this member's share of [0, n).
  template <typename Body>
  void share(int64_t n, const Body& body) const {
    body(n * rank / size, n * (rank + 1) / size);
  }
};

}  // namespace resnet_fast
