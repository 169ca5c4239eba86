// Sharing work out over the intra-op threads, and cutting one workspace into arrays.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../kernels.h"

namespace nvfp4::cpu {

// Runs body(thread, task) for every task in [0, tasks); a thread that is done takes the next task.
template <class Body>
void for_each_task(int64_t tasks, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Body* body;
  } shared;
  shared.tasks = tasks;
  shared.body = &body;
  const int64_t threads = num_threads() < tasks ? num_threads() : tasks;
  if (threads == 0) return;
  auto work = [](void* argument, int64_t thread) {
    auto& s = *static_cast<Shared*>(argument);
    for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.body)(thread, task);
  };
  if (threads == 1) return work(&shared, 0);
  parallel_for(threads, work, &shared);
}

// Hands out consecutive arrays of a workspace. Over a null base it only counts, so that one function both sizes and
// lays out a workspace.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace nvfp4::cpu
