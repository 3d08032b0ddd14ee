// Running tasks on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace sdcore {

// Calls task(i) for i in [0, count) on up to `threads` threads. Threads are started for the call
// and joined before it returns: it costs some 20 microseconds a thread, and nothing of ours is
// left running when a process forks or exits. The first exception is rethrown here.
template <typename Task>
void parallel_for(int64_t count, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    } catch (...) {
      next.store(count);
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  const auto workers = static_cast<int>(std::min<int64_t>(threads, count));
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < workers; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work();
  for (auto& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sdcore
