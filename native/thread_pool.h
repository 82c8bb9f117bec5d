// A persistent pool of pinned threads, and the regions that they compute together. The caller is thread 0. Owns threads and
// barriers; knows nothing of kernels.
// Waiting is bounded spinning (a region's barriers are tens of nanoseconds apart), then sleeping: an idle engine uses no
// processor time, and a busy neighbour costs its share and no more.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "wait_word.h"

namespace mooli {

// Stages, one after the other. Each is computed by whoever takes part, and over when all of them are done with it. A thread
// takes part from the stage that is being computed as it comes, and leaves before it sleeps, so nobody waits for one that
// sleeps, or whose processor somebody else has.
class Region {
 public:
  virtual ~Region() = default;
  virtual int num_stages() const = 0;  // at least one
  virtual void compute(int stage, int thread) = 0;  // what is left of it
  virtual void finish() = 0;                        // on each thread, when it has no more to compute for now
  virtual void drain() = 0;                         // leave nothing of any stage; others may be computing
};

class ThreadPool {
 public:
  // `cpus`: one processor number per thread, or empty for no pinning. The caller is pinned by pin_caller only.
  ThreadPool(int num_threads, std::vector<int> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }
  void pin_caller() const;
  // Returns when all stages are over. Not reentrant; callers take turns, and what had begun is abandoned.
  void run(Region& region);
  // Runs job(thread) on the caller, and on threads that come before it returns.
  void run(const std::function<void(int)>& job);
  // Runs job(thread) once on every thread, at the same time.
  void run_on_all(const std::function<void(int)>& job);
  // Lets the other threads begin, and returns. False, and nothing done, where there are none.
  bool begin(Region& region);
  // Takes part in what has begun, until all stages are over. False if it was not `region`, or was abandoned since.
  bool join(const Region& region);
  // When this returns, nobody computes what had begun; parts of it may have been.
  void abandon();

 private:
  void work(int thread);
  void stop();
  void open(Region& region, int members);
  bool enter();
  void take_part(int thread);
  bool compute_stages(Region& region, int thread);
  bool arrive(Region& region, bool is_last);
  void leave(bool is_last);
  void advance(uint32_t phase, bool is_last);
  void abandon_begun();

  int num_threads_;
  std::vector<int> cpus_;
  std::mutex turn_;
  WaitWord epoch_;  // upper half: how many regions there have been; wraps
  // Upper half: how many stages there have been; wraps. Below: whether threads may enter the region, how many are in it, and how
  // many of them have arrived at the end of the stage.
  WaitWord state_;
  std::atomic<bool> stop_{false};
  // Of the region; written before it is opened.
  Region* region_ = nullptr;
  uint32_t first_phase_ = 0, num_stages_ = 0;
  Region* begun_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace mooli
