// A persistent pool of pinned threads. The caller is thread 0. Owns threads and barriers; knows nothing of kernels.
// Waiting is bounded spinning (a step's barriers are tens of nanoseconds apart), then sleeping, inside a region and between
// regions: an idle engine uses no processor time, and a busy neighbour costs its share and no more.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "wait_word.h"

namespace mooli {

class ThreadPool {
 public:
  // `cpus`: one processor number per thread, or empty for no pinning. The caller is pinned by pin_caller only.
  ThreadPool(int num_threads, std::vector<int> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }
  void pin_caller() const;
  // Runs job(thread) on every thread and returns when all are done. Not reentrant; callers take turns.
  void run(const std::function<void(int)>& job);
  // Inside a job: no thread passes before all have arrived.
  void barrier();

 private:
  void work(int thread);
  void stop();
  int num_threads_;
  std::vector<int> cpus_;
  std::mutex run_mutex_;
  WaitWord epoch_;  // one more for every job; wraps
  WaitWord phase_;  // one more for every barrier; wraps
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int)>* job_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace mooli
