// Large aligned memory, on huge pages where the system has them. Zeroed when allocated, without touching the pages.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
// The address sanitizer guards only what malloc gave.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define MOOLI_HUGE_PAGES 1
#include <sys/mman.h>
#endif

namespace mooli {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
#if defined(MOOLI_HUGE_PAGES)
    constexpr size_t huge = size_t(2) << 20;
    mapped_ = (bytes + huge - 1) / huge * huge + (bytes >= huge ? huge : 0);
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) { base_ = nullptr; throw std::bad_alloc(); }
    data_ = (char*)base_;
    if (bytes >= huge) {
      data_ = (char*)(((uintptr_t)base_ + huge - 1) & ~(uintptr_t)(huge - 1));
      madvise(data_, bytes / huge * huge, MADV_HUGEPAGE);  // the rest in small pages: no half empty huge one for every weight
    }
#else
    if (posix_memalign(&base_, 4096, bytes)) { base_ = nullptr; throw std::bad_alloc(); }
    memset(base_, 0, bytes);
    data_ = (char*)base_;
#endif
  }
  // A part of what `owner` keeps.
  Buffer(char* data, size_t bytes, std::shared_ptr<Buffer> owner) : data_(data), bytes_(bytes), owner_(std::move(owner)) {}
  ~Buffer() { release(); }
  Buffer(Buffer&& o) noexcept { swap(o); }
  Buffer& operator=(Buffer&& o) noexcept { swap(o); return *this; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }
  size_t size() const { return bytes_; }
  template <class T> T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  void swap(Buffer& o) {
    std::swap(base_, o.base_); std::swap(data_, o.data_); std::swap(bytes_, o.bytes_); std::swap(mapped_, o.mapped_);
    std::swap(owner_, o.owner_);
  }
  void release() {
    if (!base_) return;
#if defined(MOOLI_HUGE_PAGES)
    munmap(base_, mapped_);
#else
    std::free(base_);
#endif
  }
  void* base_ = nullptr;
  char* data_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
  std::shared_ptr<Buffer> owner_;
};

// Memory for many weights of some hundred kilobytes, one behind the other on huge pages, which each alone could not have: the
// processor fetches ahead across them and looks up fewer pages. A slab goes with the last weight in it.
class Slabs {
 public:
  Buffer take(size_t bytes) {
    if (bytes > kSlabBytes / 4) return Buffer(bytes);
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    if (!slab_ || used_ + whole > kSlabBytes) {
      slab_ = std::make_shared<Buffer>(kSlabBytes);
      used_ = 0;
    }
    used_ += whole;
    return Buffer(slab_->data() + used_ - whole, bytes, slab_);
  }

 private:
  static constexpr size_t kSlabBytes = size_t(32) << 20;
  std::shared_ptr<Buffer> slab_;
  size_t used_ = 0;
};

}  // namespace mooli
