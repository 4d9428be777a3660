#include "threads.h"

#include <sched.h>

#include <atomic>
#include <chrono>

#include "../include/memlm.h"
#include "float_mode.h"
#include "pause.h"
#include "pool.h"

namespace memlm {
namespace {

std::atomic<memlm_run> g_run{run_on_pool};

struct Loop {
  int64_t items, chunk;
  Body body;
  void* context;
  FloatControl mode;  // the caller's: the result must not depend on who does which piece

  int64_t pieces() const { return (items + chunk - 1) / chunk; }
  void piece(int64_t i, int slot) const {
    const int64_t begin = i * chunk, end = begin + chunk < items ? begin + chunk : items;
    body(context, begin, end, slot);
  }
};

// A loop on threads that the host lends for it alone.
struct HostLoop {
  Loop loop;
  std::atomic<int64_t> next{0};

  static void work(void* context, int64_t slot) {
    HostLoop& self = *static_cast<HostLoop*>(context);
    const WithFloatMode mode(self.loop.mode);
    const int64_t pieces = self.loop.pieces();
    for (int64_t i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
      self.loop.piece(i, static_cast<int>(slot));
  }
};

// Spins until `done()`, and yields the CPU between two looks after kSpin, or where the thread that
// is waited for was last seen on this one.
template <class Done>
void wait_until(const Done& done, const std::atomic<int>& cpu) {
  using Clock = std::chrono::steady_clock;
  // Where other processes keep the CPUs busy, who yields waits for a slice of some ms to end.
  constexpr std::chrono::milliseconds kSpin{1};
  constexpr int kPauses = 64;  // between two looks at the clock: some 3 us
  const auto end = Clock::now() + kSpin;
  for (bool yields = false;; yields = yields || Clock::now() > end) {
    for (int i = 0; i < kPauses; ++i) {
      if (done()) return;
      pause();
    }
    if (yields || sched_getcpu() == cpu.load(std::memory_order_relaxed)) sched_yield();
  }
}

// The threads that the host lends to one with_team.  Who comes first leads: it runs f, whose loops
// the others help with until f ends.  So nobody waits for a thread that may never come.
class Team {
 public:
  Team(void (*f)(void*), void* context) : f_(f), context_(context), mode_(float_control()) {}

  static void join(void* self, int64_t) { static_cast<Team*>(self)->join(); }

  // On the leader: all of loop, with at most `threads` of the team.
  void run(const Loop& loop, int64_t threads);

 private:
  // A loop in progress is a number of pieces that nobody has begun (low half of open_) for members
  // below a number (high half).  Who lowers it owns those pieces, and loop_ holds still until
  // unfinished_, lowered after them, is 0.
  static constexpr int kHalf = 32;

  void (*const f_)(void*);
  void* const context_;
  const FloatControl mode_;
  std::atomic<int> members_{0};
  Loop loop_;
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<bool> ended_{false};
  std::atomic<int> leader_cpu_{-1}, helper_cpu_{-1};  // of the last helper that took pieces

  void join();
  // How many pieces are open to this member.
  static uint32_t open_to(int member, uint64_t open) {
    return member < static_cast<int>(open >> kHalf) ? static_cast<uint32_t>(open) : 0;
  }
  // Takes and does pieces while some are open to this member.
  void work(int member);
};

// The team that this thread leads, outside of the pieces that it does itself.
thread_local Team* g_team = nullptr;

void Team::join() {
  const int member = members_.fetch_add(1, std::memory_order_relaxed);
  if (member == 0) {
    const WithFloatMode mode(mode_);
    g_team = this;
    f_(context_);
    g_team = nullptr;
    ended_.store(true, std::memory_order_release);
    return;
  }
  bool ended = false;
  while (!ended) {
    work(member);
    wait_until([&] {
      ended = ended_.load(std::memory_order_acquire);
      return ended || open_to(member, open_.load(std::memory_order_relaxed));
    }, leader_cpu_);
  }
}

void Team::work(int member) {
  // Several at first, one at the end: every look at open_ fetches it from another CPU.
  const auto share = [](uint64_t open, uint32_t left) {
    return left / (2 * static_cast<uint32_t>(open >> kHalf)) + 1;
  };
  int64_t done = 0;
  uint64_t open = open_.load(std::memory_order_relaxed);
  while (const uint32_t left = open_to(member, open)) {
    const uint32_t taken = share(open, left);
    if (!open_.compare_exchange_weak(open, open - taken, std::memory_order_acquire,
                                     std::memory_order_relaxed))
      continue;
    if (member > 0 && !done) helper_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
    const WithFloatMode mode(loop_.mode);
    const int64_t first = loop_.pieces() - left;
    for (uint32_t i = 0; i < taken; ++i) loop_.piece(first + i, member);
    done += taken;
    open = open_.load(std::memory_order_relaxed);
  }
  if (done) unfinished_.fetch_sub(done, std::memory_order_release);
}

void Team::run(const Loop& loop, int64_t threads) {
  const int64_t pieces = loop.pieces();
  loop_ = loop;
  unfinished_.store(pieces, std::memory_order_relaxed);
  leader_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  open_.store(static_cast<uint64_t>(threads) << kHalf | static_cast<uint32_t>(pieces),
              std::memory_order_release);
  g_team = nullptr;  // loops within a piece are no loops of the team: it has one at a time
  work(0);
  g_team = this;
  wait_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; }, helper_cpu_);
}

}  // namespace

void parallel_for(int64_t items, int64_t chunk, int threads, Body body, void* context) {
  const Loop loop = {items, chunk, body, context, float_control()};
  const int64_t pieces = loop.pieces();
  const int64_t count = threads < pieces ? threads : pieces;
  if (count <= 1) {
    for (int64_t i = 0; i < pieces; ++i) loop.piece(i, 0);
  } else if (g_team && pieces <= UINT32_MAX) {
    g_team->run(loop, count);
  } else {
    HostLoop host{loop};
    g_run.load(std::memory_order_relaxed)(count, HostLoop::work, &host);
  }
}

void with_team(int threads, void (*f)(void*), void* context) {
  if (threads <= 1 || g_team) return f(context);
  Team team(f, context);
  g_run.load(std::memory_order_relaxed)(threads, Team::join, &team);
}

}  // namespace memlm

void memlm_set_run(memlm_run run) { memlm::g_run = run ? run : memlm::run_on_pool; }
