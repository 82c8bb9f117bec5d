// Choosing a token from one row of logits. A function of the row, its parameters, seed and position: never of other rows.
// The meaning is that of the NumPy reference (backends/reference_sampling.py); this is the fast form.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"

namespace mooli {

// Which ids rows may sample: `rows` has for each of them the row of `allowed`, or -1 for all ids. Bit i % 32 of word i / 32 is
// that of id i, and a row has `words` of them, for the whole vocabulary.
struct Masks {
  const uint32_t* allowed = nullptr;
  const int32_t* rows = nullptr;  // null: no row has a mask
  size_t words = 0;
  const uint32_t* of(int row) const { return rows && rows[row] >= 0 ? allowed + size_t(rows[row]) * words : nullptr; }
};

struct SamplingRow {
  float temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty;
  int top_k;
  uint64_t seed;
  int64_t position;
  const int32_t* history;  // prompt and output, only for rows with a penalty
  int history_length, output_start;
  const int32_t* bias_ids;
  const float* bias_values;
  int num_bias;
  const uint32_t* allowed;  // null: all ids
};

struct LogprobRow {
  float logprob;
  std::vector<std::pair<float, int>> top, chosen;
};

// u in [0, 1): splitmix64 of seed and position (Steele, Lea and Flood 2014).
double uniform(uint64_t seed, int64_t position);

struct Candidate { float logit, p; int id; };

// Memory that is used again from row to row, of one thread.
struct SamplerScratch {
  std::vector<float> logits, gathered;
  std::vector<int> ids, seen;
  std::vector<Candidate> candidates;
};

// Token id, or -1 if the logits hold NaN, allowed or not, or nothing can be chosen.
int sample_row(const Kernels& k, const float* logits, int vocab, const SamplingRow& row, SamplerScratch& scratch);

// Log-softmax of the raw logits of the ids allowed (null: of all), at `target` (NaN if target < 0), at the `num_top` best, of
// which those without any chance are left out, and at `ids`.
LogprobRow logprob_row(const Kernels& k, const float* logits, int vocab, const uint32_t* allowed, int target, int num_top,
                       const std::vector<int>& ids, SamplerScratch& scratch);

}  // namespace mooli
