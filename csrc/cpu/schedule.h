// Sharing work out over the intra-op threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../kernels.h"
#include "float_mode.h"

namespace nvfp4::cpu {

// Runs body(thread, task) for every task in [0, tasks), thread in [0, most_threads); a thread that is done takes the
// next task.
template <class Body>
void for_each_task(int64_t most_threads, int64_t tasks, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Body* body;
  } shared;
  shared.tasks = tasks;
  shared.body = &body;
  const int64_t threads = most_threads < tasks ? most_threads : tasks;
  if (threads == 0) return;
  auto work = [](void* argument, int64_t thread) {
    const StandardFloatMode mode;
    auto& s = *static_cast<Shared*>(argument);
    for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.body)(thread, task);
  };
  if (threads == 1) return work(&shared, 0);
  parallel_for(threads, work, &shared);
}

// The same for tasks whose neighbours share what a thread makes for itself, such as gathered tokens: every thread
// begins with a range of tasks of its own, and then helps with the ranges of others.
template <class Body>
void for_each_task_in_ranges(int64_t most_threads, int64_t tasks, const Body& body) {
  constexpr int64_t kMostRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    Range ranges[kMostRanges];
    int64_t count;
    const Body* body;
  } shared;
  const int64_t threads = std::min(most_threads, tasks);
  if (threads == 0) return;
  shared.count = std::min(threads, kMostRanges);
  shared.body = &body;
  for (int64_t i = 0; i < shared.count; ++i) {
    shared.ranges[i].next.store(tasks * i / shared.count, std::memory_order_relaxed);
    shared.ranges[i].end = tasks * (i + 1) / shared.count;
  }
  auto work = [](void* argument, int64_t thread) {
    const StandardFloatMode mode;
    auto& s = *static_cast<Shared*>(argument);
    for (int64_t i = 0; i < s.count; ++i) {
      Range& range = s.ranges[(thread + i) % s.count];
      for (int64_t task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
        (*s.body)(thread, task);
      }
    }
  };
  if (threads == 1) return work(&shared, 0);
  parallel_for(threads, work, &shared);
}

}  // namespace nvfp4::cpu
