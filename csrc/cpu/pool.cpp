#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <new>

#include "pause.h"

namespace memlm {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread spins before it sleeps: about what it takes to wake it, so that the wait never
// costs more than twice the better choice.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kPauses = 8;  // between two looks at the clock: some 0.4 us

// A number that threads wait for, alone on its cache line.
struct alignas(64) Waited {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};

  // Returns when value is not `old`, and sometimes before.  On the CPU `yield_on` the thread yields
  // instead of spinning: whom it waits for is there.  (Where other processes keep the CPUs busy, a
  // worker is often woken on its caller's, and would hold up the caller for all of kSpin.)
  void wait_while(uint32_t old, int yield_on) {
    const auto end = Clock::now() + kSpin;
    do {
      for (int i = 0; i < kPauses; ++i) {
        if (value.load() != old) return;
        pause();
      }
      if (sched_getcpu() == yield_on) sched_yield();
    } while (Clock::now() < end);
    sleepers.fetch_add(1);  // before the kernel compares: else wake() might find no sleeper
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    sleepers.fetch_sub(1);
  }

  // After a change of value: wakes up to `count` of those who sleep.
  void wake(int64_t count) {
    if (sleepers.load()) syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
  }
};

// Trivially destroyed: workers may outlive main.
struct Pool {
  std::atomic<bool> taken{false};
  int64_t workers = 0;  // this and the next two belong to who has taken the pool
  memlm_task task = nullptr;
  void* context = nullptr;
  std::atomic<int> caller_cpu{-1};
  Waited slots;       // not yet begun
  Waited unfinished;  // begun or not

  // Works on the slots until none is left.  task and context hold still while a slot is unfinished.
  void work() {
    for (;;) {
      uint32_t left = slots.value.load();
      while (left && !slots.value.compare_exchange_weak(left, left - 1)) {}
      if (!left) return;
      task(context, left - 1);
      if (unfinished.value.fetch_sub(1) == 1) unfinished.wake(1);
    }
  }

  static void* worker(void* self) {
    Pool& pool = *static_cast<Pool*>(self);
    for (;;) {
      pool.slots.wait_while(0, pool.caller_cpu.load());
      pool.work();
    }
  }

  // Without a thread more the work is done all the same, by the others.
  void start_workers(int64_t wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // workers inherit it: signals are the host's
    for (pthread_t thread; workers < wanted; ++workers) {
      if (pthread_create(&thread, nullptr, worker, this)) break;
      pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
};

Pool g_pool;

// A child has the pool's memory, in whatever state, and none of its threads.
const int g_at_fork = pthread_atfork(nullptr, nullptr, [] { new (&g_pool) Pool; });

}  // namespace

void run_on_pool(int64_t count, memlm_task task, void* context) {
  Pool& pool = g_pool;
  if (pool.taken.exchange(true)) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  if (pool.workers < count - 1) pool.start_workers(count - 1);
  pool.task = task;
  pool.context = context;
  pool.caller_cpu.store(sched_getcpu());
  pool.unfinished.value.store(static_cast<uint32_t>(count));
  pool.slots.value.store(static_cast<uint32_t>(count));
  pool.slots.wake(count - 1);
  pool.work();
  constexpr int kNoCpu = -1;
  while (const uint32_t left = pool.unfinished.value.load())
    pool.unfinished.wait_while(left, kNoCpu);
  pool.taken.store(false);
}

}  // namespace memlm
