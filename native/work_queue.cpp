#include "work_queue.h"

#include <algorithm>
#include <system_error>
#include <utility>

namespace mooli {

int64_t WorkQueue::add(std::function<void()> job) {
  std::unique_lock<std::mutex> lock(mutex_);
  jobs_.push_back(std::move(job));
  const int64_t number = ++added_;
  if (works_) return number;
  if (thread_.joinable()) thread_.join();  // it has said that it ends, and needs the mutex no more
  try {
    thread_ = std::thread(&WorkQueue::work, this);
    works_ = true;
  } catch (const std::system_error&) {
    run(lock);
  }
  return number;
}

int64_t WorkQueue::wait(int64_t number) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return failure_ || added_ - int64_t(jobs_.size()) >= std::min(number, added_); });
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  return added_ - int64_t(jobs_.size());
}

void WorkQueue::drop() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (jobs_.size() > 1) jobs_.erase(jobs_.begin() + 1, jobs_.end());
  changed_.wait(lock, [&] { return jobs_.empty(); });
  if (thread_.joinable()) thread_.join();
}

void WorkQueue::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!jobs_.empty()) run(lock);
  works_ = false;
}

// The first job, without the mutex meanwhile.
void WorkQueue::run(std::unique_lock<std::mutex>& lock) {
  const std::function<void()> job = std::move(jobs_.front());
  lock.unlock();
  std::exception_ptr failure;
  try {
    job();
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  jobs_.pop_front();
  if (failure && !failure_) failure_ = failure;
  changed_.notify_all();
}

}  // namespace mooli
