#include "thread_pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace mooli {
namespace {

constexpr int kSpins = 20000;        // about half a millisecond: longer than the Python between two decode steps
constexpr int kBarrierSpins = 8000;  // a fifth: longer than threads are ever apart that both have a processor

void pin(int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)cpu;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus) : num_threads_(num_threads), cpus_(std::move(cpus)) {
  try {
    for (int i = 1; i < num_threads_; i++) threads_.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system has no more threads to give: those already started must end before their members go
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_ = true;
  epoch_.set(epoch_.load() + 1);
  for (auto& t : threads_) t.join();
}

void ThreadPool::pin_caller() const {
  if (!cpus_.empty()) pin(cpus_[0]);
}

void ThreadPool::work(int thread) {
  if (size_t(thread) < cpus_.size()) pin(cpus_[thread]);
  for (uint32_t seen = 0;;) {
    epoch_.wait_while(seen, kSpins);
    seen = epoch_.load();
    if (stop_) return;
    (*job_)(thread);
    barrier();
  }
}

void ThreadPool::run(const std::function<void(int)>& job) {
  std::lock_guard<std::mutex> turn(run_mutex_);
  if (num_threads_ == 1) { job(0); return; }
  job_ = &job;
  epoch_.set(epoch_.load() + 1);
  job(0);
  barrier();
}

void ThreadPool::barrier() {
  if (num_threads_ == 1) return;
  const uint32_t phase = phase_.load();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.set(phase + 1);
    return;
  }
  phase_.wait_while(phase, kBarrierSpins);
}

}  // namespace mooli
