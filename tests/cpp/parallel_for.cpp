// parallel_for and teams on memlm's own pool, to be run under sanitizers: many callers, nesting,
// changing numbers of threads, other hosts, forks, sleeping workers, exit.
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
#include "../../csrc/include/memlm.h"

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

// Loops one after the other, each of which reads what the one before wrote.
void check_team(int threads) {
  constexpr int kItems = 40, kLoops = 200;
  std::vector<int> a(kItems), b(kItems);
  int done = 0;
  memlm::with_team(threads, [&] {
    for (int loop = 0; loop < kLoops; ++loop, ++done) {
      memlm::parallel_for(kItems, 1 + loop % 5, 1 + loop % (threads + 2),
                          [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) b[i] = a[kItems - 1 - i] + 1;
      });
      a.swap(b);
    }
    check_loops();
  });
  require(done == kLoops, "the team's work was not done once");
  for (int count : a) require(count == kLoops, "a loop began before the end of the one before");
}

void check_team_takes_part(int threads) {
  memlm::with_team(threads, [&] { check_all_take_part(threads); });
}

void check_nested_teams() {
  std::atomic<int> sum{0};
  const auto add = [&](int64_t begin, int64_t end, int) { sum += end - begin; };
  memlm::with_team(3, [&] {
    memlm::with_team(2, [&] { memlm::parallel_for(7, 1, 2, add); });
    memlm::parallel_for(4, 1, 3, [&](int64_t, int64_t, int) {
      memlm::parallel_for(5, 1, 3, add);
      memlm::with_team(2, [&] { memlm::parallel_for(6, 1, 2, add); });
    });
    memlm::parallel_for(9, 2, 3, add);
  });
  require(sum == 7 + 4 * (5 + 6) + 9, "nested teams");
}

// Hosts that run the tasks on one thread, in either order, or late.
void check_hosts() {
  const memlm_run hosts[] = {
      [](int64_t count, memlm_task task, void* context) {
        for (int64_t i = 0; i < count; ++i) task(context, i);
      },
      [](int64_t count, memlm_task task, void* context) {
        while (count-- > 0) task(context, count);
      },
      [](int64_t count, memlm_task task, void* context) {
        std::vector<std::thread> late;
        for (int64_t i = 0; i < count; ++i)
          late.emplace_back([=] {
            std::this_thread::sleep_for(std::chrono::milliseconds(i % 2));
            task(context, i);
          });
        for (auto& thread : late) thread.join();
      }};
  for (const memlm_run host : hosts) {
    memlm_set_run(host);
    check_team(3);
    check_nested_teams();
  }
  memlm_set_run(nullptr);
}

void check_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([i] { i % 2 ? check_loops() : check_team(3); });
  for (auto& caller : callers) caller.join();
}

void check_mode_in_loop(memlm::FloatControl mode) {
  std::atomic<int> started{0};
  memlm::parallel_for(3, 1, 3, [&](int64_t, int64_t, int) {
    ++started;
    while (started < 3) std::this_thread::yield();
    require((memlm::float_control() & memlm::kFloatMode) == mode, "not the caller's mode");
  });
}

void check_float_mode() {
  const memlm::FloatControl before = memlm::float_control();
  for (const memlm::FloatControl mode : {memlm::kFloatMode, memlm::FloatControl{0}}) {
    const memlm::WithFloatMode with(mode);
    check_mode_in_loop(mode);
    memlm::with_team(3, [&] {
      check_mode_in_loop(mode);
      const memlm::WithFloatMode other(~mode & memlm::kFloatMode);
      check_mode_in_loop(~mode & memlm::kFloatMode);
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
    check_team(3);
    std::_Exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  require(status == 0, "the child hung or failed");
}

void check_fork_during_loops() {
  std::atomic<bool> stop{false};
  std::thread other([&] {  // without allocations: address sanitizer's locks are lost in a child
    std::atomic<int64_t> done{0};
    const auto add = [&](int64_t begin, int64_t end, int) { done += end - begin; };
    while (!stop) {
      memlm::parallel_for(50, 1, 3, add);
      memlm::with_team(3, [&] { memlm::parallel_for(50, 1, 3, add); });
    }
    require(done % 100 == 0, "an item was left out or done twice");
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
  for (int threads : {2, 1, 8, 3}) check_team(threads);
  check_team_takes_part(8);
  check_nested_teams();
  check_hosts();
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
