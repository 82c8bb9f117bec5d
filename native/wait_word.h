// A number that threads wait on: a bounded spin, because what they wait for is mostly less than a microsecond away, then
// sleep in the kernel, so that whoever the processor is needed for gets it. Knows nothing of what the number means.
#pragma once
#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <climits>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mooli {

class alignas(64) WaitWord {
 public:
  uint32_t load() const { return value_.load(std::memory_order_acquire); }

  // Returns once the value is another than `old`.
  void wait_while(uint32_t old, int spins) {
    for (int i = 0; i < spins; i++) {
      if (load() != old) return;
      pause();
    }
    // The counter before the value here, the value before the counter in `set`: one of the two sees the other.
    sleepers_.fetch_add(1);
    sleep_while(old);
    sleepers_.fetch_sub(1);
  }

  // Publishes what was written before, and wakes who sleeps.
  void set(uint32_t value) {
    value_.store(value);
    if (sleepers_.load() > 0) wake();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
#if defined(__linux__)
  static_assert(sizeof(std::atomic<uint32_t>) == 4);
  void sleep_while(uint32_t old) {
    while (value_.load() == old) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
  void wake() { syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep_while(uint32_t old) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return value_.load() != old; });
  }
  void wake() {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable wake_;
#endif
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace mooli
