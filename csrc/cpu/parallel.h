// Running tasks on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace sdcore {

// What the threads of one call share. It outlives the call if one of them comes late.
struct Shared {
  std::atomic<int64_t> next{0};
  std::atomic<int> working{0};
  std::mutex mutex;
  std::condition_variable idle;
  std::exception_ptr error;
};

// Takes tasks till there are none. `task` is alive as long as one is left: a thread that finds none
// must not touch it, for the call may be over.
template <typename Task>
void take_tasks(Shared& shared, int64_t count, const Task& task) {
  shared.working.fetch_add(1);
  try {
    for (int64_t i; (i = shared.next.fetch_add(1)) < count;) task(i);
  } catch (...) {
    shared.next.store(count);
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (!shared.error) shared.error = std::current_exception();
  }
  const std::lock_guard<std::mutex> lock(shared.mutex);
  if (shared.working.fetch_sub(1) == 1) shared.idle.notify_all();
}

// Calls task(i) for i in [0, count) on up to `threads` threads. They are started for the call, some
// 20 microseconds each. It waits for those that work, and not for one that has not begun: where
// other threads, such as OpenMP's after PyTorch's last call, keep all cores busy, that may take
// milliseconds. Such a thread finds nothing to do, and ends. The first exception is rethrown here.
template <typename Task>
void parallel_for(int64_t count, int threads, const Task& task) {
  const auto shared = std::make_shared<Shared>();
  const auto workers = static_cast<int>(std::min<int64_t>(threads, count));
  try {
    for (int i = 1; i < workers; ++i) {
      std::thread([shared, count, &task] { take_tasks(*shared, count, task); }).detach();
    }
  } catch (...) {
    // No more threads to be had, or no memory for one: those that there are do the work.
  }
  take_tasks(*shared, count, task);
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->idle.wait(lock, [&] { return shared->working.load() == 0; });
  if (shared->error) std::rethrow_exception(shared->error);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sdcore
