// Jobs done one after the other on a thread of their own, while whoever hands them out goes on. Owns that thread, which lives
// from the first job to the end of the last; knows nothing of what is done.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace mooli {

class WorkQueue {
 public:
  WorkQueue() = default;
  ~WorkQueue() { drop(); }
  WorkQueue(const WorkQueue&) = delete;

  // The number of the job: the first is 1. Where no thread can be had, the job has been done when this returns.
  int64_t add(std::function<void()> job);
  // Waits until job `number` and all before it are done; how many are. Throws what a job threw, once.
  int64_t wait(int64_t number);
  // Forgets what has not begun; nothing is being done when this returns. What was forgotten counts as done.
  void drop();

 private:
  void work();
  void run(std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;  // the first is being done
  int64_t added_ = 0;
  std::exception_ptr failure_;
  std::thread thread_;
  bool works_ = false;  // whether the thread will look for jobs again
};

}  // namespace mooli
