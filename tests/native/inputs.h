// Pseudo-random inputs that are the same bits on every machine, digests of outputs, and the count of failed checks.
#pragma once
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace check {

using Floats = std::vector<float>;
using Bytes = std::vector<char>;

inline int failures = 0;

inline void expect(bool holds, const std::string& level, const std::string& what) {
  if (holds) return;
  failures++;
  std::fprintf(stderr, "FAILED at level %s: %s\n", level.c_str(), what.c_str());
}

// splitmix64 (Steele, Lea and Flood 2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  }
  int below(int n) { return int((bits() >> 33) % uint64_t(n)); }
  // the sum of four uniform numbers, of mean 0 and variance 1/3
  float number() {
    int64_t sum = 0;
    for (int i = 0; i < 4; i++) sum += int64_t(bits() >> 40);
    return float(sum - (int64_t(1) << 25)) * 0x1p-24f;
  }
  Floats numbers(size_t n, float scale = 1.f) {
    Floats x(n);
    for (float& v : x) v = number() * scale;
    return x;
  }

 private:
  uint64_t state_;
};

// FNV-1a
inline void print_digest(const std::string& level, const std::string& name, const void* data, size_t bytes) {
  uint64_t h = 0xCBF29CE484222325ull;
  for (size_t i = 0; i < bytes; i++) h = (h ^ ((const uint8_t*)data)[i]) * 0x100000001B3ull;
  std::printf("%s %s %016" PRIx64 "\n", level.c_str(), name.c_str(), h);
}
inline void print_digest(const std::string& level, const std::string& name, const Floats& x) {
  print_digest(level, name, x.data(), x.size() * sizeof(float));
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
inline bool all_nan(const Floats& x) {
  for (float v : x) if (!std::isnan(v)) return false;
  return true;
}
// no element further off than `bound` times the largest expected magnitude; a NaN is as far as can be
inline bool close(const Floats& actual, const Floats& expected, float bound) {
  float largest = 0.f;
  for (float x : expected) largest = std::fmax(largest, std::fabs(x));
  for (size_t i = 0; i < expected.size(); i++)
    if (!(std::fabs(actual[i] - expected[i]) <= bound * largest)) return false;
  return actual.size() == expected.size();
}

}  // namespace check
