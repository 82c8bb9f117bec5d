// The thread pool: every item of a region is computed once, stages in order, whoever comes when; what has begun can be joined
// at any time or abandoned.
#pragma once
#include <chrono>
#include <memory>
#include <thread>

#include "inputs.h"
#include "thread_pool.h"

namespace check {

class Counted : public mooli::Region {
 public:
  // is_slow: some items take longer than threads spin for the end of a stage, so the others leave, and come again.
  Counted(int stages, int items, bool is_slow = false) : stages_(stages), items_(items), is_slow_(is_slow), next_(new std::atomic<int>[size_t(stages)]), done_(new std::atomic<int>[size_t(stages)]) {
    for (int i = 0; i < stages; i++) next_[i] = done_[i] = 0;
  }
  int num_stages() const override { return stages_; }
  void compute(int stage, int thread) override {
    if (!is_computing) computing_++;
    is_computing = true;
    if (stage > 0 && done_[stage - 1] < items_ && !is_drained_) in_order_ = false;
    for (int i; (i = next_[stage].fetch_add(1)) < items_;) {
      for (volatile int spin = 0; spin < 50 * (1 + (i + thread) % 3);) spin = spin + 1;
      if (is_slow_ && (stage + i) % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      done_[stage]++;
    }
  }
  void finish() override {
    if (is_computing) computing_--;
    is_computing = false;
    is_finished_ = true;
  }
  void drain() override {
    is_drained_ = true;
    for (int i = 0; i < stages_; i++) next_[i] = items_;
  }
  bool is_finished() const { return is_finished_ && computing_ == 0; }
  bool in_order() const { return in_order_; }
  bool is_done() const {
    for (int i = 0; i < stages_; i++) if (done_[i] != items_) return false;
    return true;
  }
  int total() const {
    int sum = 0;
    for (int i = 0; i < stages_; i++) sum += done_[i];
    return sum;
  }

 private:
  const int stages_, items_;
  const bool is_slow_;
  std::unique_ptr<std::atomic<int>[]> next_, done_;
  static inline thread_local bool is_computing = false;  // and has not finished since
  std::atomic<int> computing_{0};
  std::atomic<bool> in_order_{true}, is_drained_{false}, is_finished_{false};
};

inline void check_pool() {
  Random random(30);
  for (int threads : {1, 2, 3, 5}) {
    const std::string name = "a pool of " + std::to_string(threads);
    Counted last(20, 8);  // outlives the pool
    mooli::ThreadPool pool(threads, {});
    auto pause = [&] {  // longer than a thread spins, rarely
      const int what = random.below(40);
      if (what == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      else for (volatile int spin = 0; spin < what * 200;) spin = spin + 1;
    };
    for (int round = 0; round < 600; round++) {
      Counted region(1 + random.below(12), random.below(9), random.below(10) == 0), other(1 + random.below(3), 4);
      const int way = random.below(6);
      if (way == 0) {
        pool.run(region);
      } else if (way == 1) {
        std::atomic<int> seen{0}, sum{0};
        pool.run_on_all([&](int thread) { seen++; sum += thread; });
        expect(seen == threads && sum == threads * (threads - 1) / 2, name, "a job on every thread once");
        continue;
      } else {
        const bool has_begun = pool.begin(region);
        expect(has_begun == (threads > 1), name, "begins where there are others");
        pause();
        if (way == 2) {
          pool.abandon();
          const int total = region.total();
          pause();
          expect(region.total() == total && region.in_order(), name, "nobody computes what is abandoned");
          expect(!pool.join(region), name, "what is abandoned is not joined");
          continue;
        }
        if (way == 3) {
          pool.run(other);
          expect(other.is_done() && other.in_order() && !pool.join(region), name, "a region instead of what had begun");
          continue;
        }
        if (way == 4) expect(!pool.join(other), name, "another region is not joined");
        if (!pool.join(region)) {
          expect(!has_begun, name, "what has begun is joined");
          pool.run(region);
        }
      }
      expect(region.is_done() && region.in_order(), name, "every item once, stages in order");
      expect(region.is_finished(), name, "every thread finishes what it computes, before it leaves");
    }
    pool.begin(last);  // and the pool goes
  }
}

}  // namespace check
