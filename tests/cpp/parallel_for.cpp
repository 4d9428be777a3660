// parallel_for on memlm's own pool, to be run under sanitizers: many callers, nesting, changing
// numbers of threads, forks, sleeping workers, exit.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/cpu/float_mode.h"
#include "../../csrc/cpu/threads.h"

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// Every item once; no slot twice at a time.
void check_loop(int64_t items, int64_t chunk, int threads) {
  std::vector<int> done(items);
  std::vector<std::atomic<bool>> busy(threads);
  memlm::parallel_for(items, chunk, threads, [&](int64_t begin, int64_t end, int slot) {
    require(end - begin <= chunk, "a piece is too large");
    require(slot >= 0 && slot < threads && !busy[slot].exchange(true), "two share a slot");
    for (int64_t i = begin; i < end; ++i) ++done[i];
    busy[slot] = false;
  });
  for (int count : done) require(count == 1, "an item was left out or done twice");
}

void check_loops() {
  for (int i = 0; i < 100; ++i)
    for (int threads : {2, 1, 8, 3}) check_loop(i, 1 + i % 3, threads);
}

// Pieces that wait for each other: so many threads there must be.
void check_all_take_part(int threads) {
  std::atomic<int> started{0};
  memlm::parallel_for(threads, 1, threads, [&](int64_t, int64_t, int) {
    ++started;
    while (started < threads) std::this_thread::yield();
  });
}

void check_nested() {
  std::atomic<int> sum{0};
  memlm::parallel_for(6, 1, 3, [&](int64_t, int64_t, int) {
    memlm::parallel_for(5, 1, 3, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
  });
  require(sum == 30, "nested loops");
}

void check_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(check_loops);
  for (auto& caller : callers) caller.join();
}

void check_float_mode() {
  const memlm::FloatControl before = memlm::float_control();
  for (const memlm::FloatControl mode : {memlm::kFloatMode, memlm::FloatControl{0}}) {
    const memlm::WithFloatMode with(mode);
    std::atomic<int> started{0};
    memlm::parallel_for(3, 1, 3, [&](int64_t, int64_t, int) {
      ++started;
      while (started < 3) std::this_thread::yield();
      require((memlm::float_control() & memlm::kFloatMode) == mode, "not the caller's mode");
    });
  }
  require(memlm::float_control() == before, "the caller's mode has changed");
}

void check_fork() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    check_all_take_part(3);
    check_loops();
    std::_Exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  require(status == 0, "the child hung or failed");
}

void check_fork_during_loops() {
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) check_loop(50, 1, 3);
  });
  for (int i = 0; i < 5; ++i) check_fork();
  stop = true;
  other.join();
}

void sleep_until_the_workers_do() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

}  // namespace

int main() {
  check_loops();
  check_all_take_part(8);
  sleep_until_the_workers_do();
  check_all_take_part(8);
  check_nested();
  check_callers();
  check_float_mode();
#if !defined(__SANITIZE_THREAD__)  // it knows no threads started in a child
  check_fork();
  check_all_take_part(3);
  check_fork_during_loops();
#endif
  sleep_until_the_workers_do();
  std::puts("done");
}
