#include "thread_pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace mooli {
namespace {

constexpr int kSpins = 20000;        // about half a millisecond: longer than the Python between two decode steps
constexpr int kBarrierSpins = 8000;  // a fifth: longer than threads are ever apart that both have a processor

constexpr uint64_t kArrived = 1, kMember = 1ull << 15, kOpen = 1ull << 30, kNext = 1ull << 32;
uint32_t phase_of(uint64_t state) { return WaitWord::upper(state); }
uint32_t arrived(uint64_t state) { return uint32_t(state % kMember); }
uint32_t members(uint64_t state) { return uint32_t(state % kOpen / kMember); }

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

class Job : public Region {
 public:
  explicit Job(const std::function<void(int)>& job) : job_(job) {}
  int num_stages() const override { return 1; }
  void compute(int, int thread) override { job_(thread); }
  void finish() override {}
  void drain() override {}

 private:
  const std::function<void(int)>& job_;
};

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus) : num_threads_(num_threads), cpus_(std::move(cpus)) {
  try {
    for (int i = 1; i < num_threads_; i++) threads_.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system has no more threads to give: those already started must end before their members go
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  abandon();
  stop();
}

void ThreadPool::stop() {
  stop_ = true;
  epoch_.value.fetch_add(kNext);
  epoch_.wake();
  for (auto& t : threads_) t.join();
}

void ThreadPool::pin_caller() const {
  if (!cpus_.empty()) pin(cpus_[0]);
}

void ThreadPool::work(int thread) {
  if (size_t(thread) < cpus_.size()) pin(cpus_[size_t(thread)]);
  for (uint32_t seen = 0;;) {
    epoch_.wait_while(seen, kSpins);
    seen = WaitWord::upper(epoch_.value.load());
    if (stop_) return;
    if (enter()) take_part(thread);
  }
}

void ThreadPool::run(Region& region) {
  std::lock_guard<std::mutex> turn(turn_);
  abandon_begun();
  open(region, 1);
  take_part(0);
}

void ThreadPool::run(const std::function<void(int)>& job) {
  Job region(job);
  run(region);
}

void ThreadPool::run_on_all(const std::function<void(int)>& job) {
  std::lock_guard<std::mutex> turn(turn_);
  abandon_begun();
  Job region(job);
  open(region, 1);
  while (members(state_.value.load()) < uint32_t(num_threads_)) std::this_thread::yield();
  take_part(0);
}

bool ThreadPool::begin(Region& region) {
  if (num_threads_ == 1) return false;
  std::lock_guard<std::mutex> turn(turn_);
  abandon_begun();
  open(region, 0);
  begun_ = &region;
  return true;
}

bool ThreadPool::join(const Region& region) {
  std::lock_guard<std::mutex> turn(turn_);
  if (begun_ != &region) return false;
  begun_ = nullptr;
  if (enter()) take_part(0);  // otherwise it is over
  return true;
}

void ThreadPool::abandon() {
  std::lock_guard<std::mutex> turn(turn_);
  abandon_begun();
}

void ThreadPool::abandon_begun() {
  if (begun_ == nullptr) return;
  state_.value.fetch_and(~kOpen);
  begun_->drain();
  begun_ = nullptr;
  while (members(state_.value.load()) > 0) std::this_thread::yield();
  // Its stage never ends: for those that have left and wait for that.
  state_.value.fetch_add(kNext);
  state_.wake();
}

// Nobody is in a region when this is called.
void ThreadPool::open(Region& region, int members) {
  region_ = &region;
  first_phase_ = phase_of(state_.value.load());
  num_stages_ = uint32_t(region.num_stages());
  state_.value.store(first_phase_ * kNext + kOpen + uint64_t(members) * kMember);
  epoch_.value.fetch_add(kNext);
  epoch_.wake();
}

bool ThreadPool::enter() {
  uint64_t state = state_.value.load();
  do {
    if (!(state & kOpen)) return false;
  } while (!state_.value.compare_exchange_weak(state, state + kMember));
  return true;
}

// The stage's number cannot change between a thread's entry, or its last arrival, and its next arrival. But once the last
// stage is over nobody is a member, and the next region may be open before a thread sees that.
void ThreadPool::take_part(int thread) {
  // A thread other than the caller may find the next region here: that is as good.
  while (!compute_stages(*region_, thread) && enter()) {}
}

// False if the thread has left, to sleep, and there may be more to compute.
bool ThreadPool::compute_stages(Region& region, int thread) {
  const uint32_t first_phase = first_phase_, num_stages = num_stages_;
  for (;;) {
    const uint64_t state = state_.value.load();
    const uint32_t stage = phase_of(state) - first_phase;
    if (stage >= num_stages) return true;
    const bool is_last = stage + 1 == num_stages, is_abandoned = !(state & kOpen);
    if (!is_abandoned) region.compute(int(stage), thread);
    if (is_last || is_abandoned) region.finish();
    if (is_abandoned) {
      leave(is_last);
      return true;
    }
    if (!arrive(region, is_last)) return false;
  }
}

// False if the stage took so long to end that the thread has left and slept. A member that sleeps would be waited for at the
// next stage, on a busy processor for as long as others may have it: milliseconds, at every stage.
bool ThreadPool::arrive(Region& region, bool is_last) {
  uint64_t state = state_.value.fetch_add(kArrived) + kArrived;
  const uint32_t phase = phase_of(state);
  if (arrived(state) == members(state)) advance(phase, is_last);
  if (is_last) {  // nobody waits for it any more
    state_.wait_while(phase, kBarrierSpins);
    return true;
  }
  if (state_.changes(phase, kBarrierSpins)) return true;
  region.finish();
  state = state_.value.load();
  do {
    if (phase_of(state) != phase) return true;
  } while (!state_.value.compare_exchange_weak(state, state - kMember - kArrived));
  state_.wait_while(phase, 0);
  return false;
}

void ThreadPool::leave(bool is_last) {
  const uint64_t state = state_.value.fetch_sub(kMember) - kMember;
  if (members(state) > 0 && arrived(state) == members(state)) advance(phase_of(state), is_last);
}

// Ends the stage, unless another thread has done so, or has entered the region meanwhile: the stage then ends when that
// arrives. With the last stage the region is closed, and empty.
void ThreadPool::advance(uint32_t phase, bool is_last) {
  uint64_t state = state_.value.load(), next;
  do {
    if (phase_of(state) != phase || arrived(state) != members(state)) return;
    next = (uint64_t(phase) + 1) * kNext + (is_last ? 0 : state % kNext / kMember * kMember);
  } while (!state_.value.compare_exchange_weak(state, next));
  state_.wake();
}

}  // namespace mooli
