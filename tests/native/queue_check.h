// The work queue: jobs in order, one at a time, whoever waits for what; failures are told, and what is dropped is not done.
#pragma once
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "inputs.h"
#include "work_queue.h"

namespace check {

inline void check_what_is_dropped(const std::string& name) {
  mooli::WorkQueue queue;
  std::atomic<int> num_done{0};
  std::atomic<bool> may_end{false};
  queue.add([&] { while (!may_end) std::this_thread::yield(); num_done++; });
  for (int i = 0; i < 3; i++) queue.add([&] { num_done++; });
  std::thread later([&] { std::this_thread::sleep_for(std::chrono::milliseconds(200)); may_end = true; });
  queue.drop();
  expect(num_done == 1, name, "what had not begun is forgotten");
  expect(queue.wait(4) == 4, name, "what was forgotten counts as done");
  expect(queue.wait(queue.add([&] { num_done++; })) == 5 && num_done == 2, name, "goes on after that");
  later.join();
}

inline void check_queue() {
  const std::string name = "a work queue";
  check_what_is_dropped(name);
  Random random(31);
  for (int round = 0; round < 300; round++) {
    std::vector<int> done;
    std::atomic<int> running{0};
    std::atomic<int64_t> num_done{0};
    int64_t added = 0;
    const int failing = random.below(30);
    bool has_failed = false;
    {
      mooli::WorkQueue queue;
      auto wait = [&](int64_t number) {
        try {
          const int64_t seen = queue.wait(number);
          expect(seen >= std::min(number, added) && seen <= added, name, "waits for as many as it is told");
        } catch (const std::runtime_error&) {
          expect(!has_failed && added > failing, name, "tells a failure once");
          has_failed = true;
        }
      };
      expect(queue.wait(0) == 0 && queue.wait(5) == 0, name, "nothing to wait for");
      for (int i = random.below(25); i > 0; i--) {
        const int job = int(added), length = random.below(4) == 0 ? 20000 : 50;
        const int64_t number = queue.add([&, job, length] {
          expect(running++ == 0, name, "one job at a time");
          done.push_back(job);
          for (volatile int spin = 0; spin < length;) spin = spin + 1;
          running--;
          num_done++;
          if (job == failing) throw std::runtime_error("a job that fails");
        });
        expect(number == ++added, name, "numbers of jobs");
        if (random.below(3) == 0) wait(random.below(int(added) + 2));
      }
      if (random.below(3) == 0) {
        queue.drop();
        const int64_t so_far = num_done;
        expect(running == 0, name, "nothing is done any more when it has dropped the rest");
        for (volatile int spin = 0; spin < 5000;) spin = spin + 1;
        expect(num_done == so_far, name, "what is dropped is not done");
        wait(added);
      } else if (random.below(2) == 0) {
        wait(added);
        wait(added);  // the first may have told a failure instead
        expect(num_done == added, name, "all done");
      }
    }
    expect(running == 0, name, "goes when nothing is being done");
    for (size_t i = 0; i < done.size(); i++) expect(done[i] == int(i), name, "in order");
  }
}

}  // namespace check
