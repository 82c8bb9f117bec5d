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

// 64 bits, so that what is waited for and what belongs to it change together. Threads wait for the upper half to change, and
// whoever changes it calls `wake` afterwards.
class alignas(64) WaitWord {
 public:
  static uint32_t upper(uint64_t value) { return uint32_t(value >> 32); }

  // Whether the upper half has become another than `old` within so many looks.
  bool changes(uint32_t old, int spins) const {
    for (int i = 0; i < spins; i++) {
      if (upper(value.load(std::memory_order_acquire)) != old) return true;
      pause();
    }
    return false;
  }

  // Returns once the upper half is another than `old`.
  void wait_while(uint32_t old, int spins) {
    if (changes(old, spins)) return;
    // The counter before the value here, the value before the counter where it is changed: one of the two sees the other.
    sleepers_.fetch_add(1);
    sleep_while(old);
    sleepers_.fetch_sub(1);
  }

  void wake() {
    if (sleepers_.load() > 0) wake_sleepers();
  }

  std::atomic<uint64_t> value{0};

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
#if defined(__linux__)
  static_assert(sizeof(std::atomic<uint64_t>) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  uint32_t* upper_half() { return reinterpret_cast<uint32_t*>(&value) + 1; }
  void sleep_while(uint32_t old) {
    while (upper(value.load()) == old) syscall(SYS_futex, upper_half(), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
  void wake_sleepers() { syscall(SYS_futex, upper_half(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep_while(uint32_t old) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return upper(value.load()) != old; });
  }
  void wake_sleepers() {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable wake_;
#endif
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace mooli
