// Sharing work out over the intra-op threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "../kernels.h"

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
    auto& s = *static_cast<Shared*>(argument);
    for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.body)(thread, task);
  };
  if (threads == 1) return work(&shared, 0);
  parallel_for(threads, work, &shared);
}

}  // namespace nvfp4::cpu
