// Weights to four bits: a group at a time and written plainly, beside what the kernels do with several.
#pragma once
#include <algorithm>
#include <cmath>

#include "formats.h"
#include "inputs.h"

namespace check {

// The scale of least squared error among five, errors weighted by |x|; scale NaN where no code can express the group.
inline void quantize_q4_plainly(const float* x, float& scale, uint8_t* code) {
  using mooli::float_to_half, mooli::half_to_float;
  auto round_even = [](float v) { return (v + 12582912.f) - 12582912.f; };
  bool is_finite = true;
  for (int i = 0; i < 32; i++) is_finite &= std::isfinite(x[i]);
  float extreme = 0.f;
  for (int i = 0; i < 32; i++) if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  scale = 0.f;
  std::fill(code, code + 32, uint8_t(8));
  if (!is_finite || std::fabs(extreme) > 8.f * 65504.f) { scale = NAN; return; }
  if (extreme == 0.f) return;
  float best_error = INFINITY;
  for (int t = -2; t <= 2; t++) {
    float s = half_to_float(float_to_half(extreme / (-8.f + 0.4f * float(t))));
    if (s == 0.f) continue;
    const float inverse = 1.f / s;
    float q[32], xq[4] = {}, qq[4] = {}, ee[4] = {};  // sums weighted by |x|
    for (int i = 0; i < 32; i++) q[i] = std::min(7.f, std::max(-8.f, round_even(x[i] * inverse)));
    for (int i = 0; i < 32; i += 4)
      for (int j = 0; j < 4; j++) {
        const float wq = std::fabs(x[i + j]) * q[i + j];
        xq[j] += wq * x[i + j];
        qq[j] += wq * q[i + j];
      }
    const float squares = qq[0] + qq[1] + qq[2] + qq[3];
    if (squares == 0.f) continue;
    const float fitted = half_to_float(float_to_half((xq[0] + xq[1] + xq[2] + xq[3]) / squares));
    for (int i = 0; i < 32; i += 4)
      for (int j = 0; j < 4; j++) { float d = x[i + j] - fitted * q[i + j]; ee[j] += std::fabs(x[i + j]) * d * d; }
    const float error = ee[0] + ee[1] + ee[2] + ee[3];
    if (error < best_error) {
      best_error = error;
      scale = fitted;
      for (int i = 0; i < 32; i++) code[i] = uint8_t(int(q[i]) + 8);
    }
  }
}

inline void check_quantize(const mooli::Kernels& k) {
  Random random(40);
  std::vector<uint8_t> digested;
  bool is_same = true;
  for (int round = 0; round < 400; round++) {
    const int groups = 1 + random.below(8);
    Floats x = random.numbers(size_t(groups) * 32, std::ldexp(1.f, random.below(60) - 40));
    for (int i = 0; i < round % 4; i++) {
      const float odd[] = {0.f, -0.f, INFINITY, -INFINITY, NAN, 3e38f, 524032.f, -524033.f, 1e-45f, 65504.f, -8.f, 7.5f};
      x[size_t(random.below(groups * 32))] = odd[random.below(12)];
    }
    if (round % 7 == 0) std::fill(x.begin(), x.begin() + 32, round % 2 ? 0.f : -0.5f);
    if (round % 9 == 0) for (float& v : x) v = std::rint(v * 4.f) / 4.f;  // many ties
    std::vector<float> scales(8, -1.f);
    std::vector<uint8_t> codes(256, 99), plain(32);
    k.quantize_q4(x.data(), groups, scales.data(), codes.data());
    for (int g = 0; g < 8; g++) {
      float scale = -1.f;
      std::fill(plain.begin(), plain.end(), uint8_t(99));
      if (g < groups) quantize_q4_plainly(x.data() + g * 32, scale, plain.data());
      is_same &= std::isnan(scale) ? std::isnan(scales[size_t(g)]) : memcmp(&scale, &scales[size_t(g)], 4) == 0;
      is_same &= memcmp(plain.data(), codes.data() + g * 32, 32) == 0;
    }
    digested.insert(digested.end(), codes.begin(), codes.end());
  }
  expect(is_same, k.name, "four bits, several groups at a time");
  print_digest(k.name, "exact/quantize_q4", digested.data(), digested.size());
}

}  // namespace check
