#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

namespace mooli {

double uniform(uint64_t seed, int64_t position) {
  uint64_t x = seed + 0x9E3779B97F4A7C15ull * uint64_t(position + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  return double(x >> 11) * 0x1p-53;
}

namespace {

void apply_penalties(float* x, int vocab, const SamplingRow& row) {
  std::unordered_map<int, int> output_count;  // every id of the history; 0 for those of the prompt only
  for (int i = 0; i < row.history_length; i++) {
    int id = row.history[i];
    if (id < 0 || id >= vocab) continue;
    int& count = output_count[id];
    if (i >= row.output_start) count++;
  }
  for (auto [id, count] : output_count) {
    if (row.repetition_penalty != 1.f) x[id] = x[id] > 0 ? x[id] / row.repetition_penalty : x[id] * row.repetition_penalty;
    if (count > 0) x[id] -= row.frequency_penalty * float(count) + row.presence_penalty;
  }
  for (int i = 0; i < row.num_bias; i++)
    if (row.bias_ids[i] >= 0 && row.bias_ids[i] < vocab) x[row.bias_ids[i]] += row.bias_values[i];
}

struct Candidate { float p; int id; };

// Walks the candidates, best first, applying top-k, top-p and min-p. Returns the chosen id, or -1 if the answer needs
// candidates beyond those given (only when they are not all there are).
int walk(const std::vector<Candidate>& c, bool all, double total, float largest, const SamplingRow& row, int vocab) {
  size_t limit = row.top_k > 0 && row.top_k < vocab ? size_t(row.top_k) : size_t(vocab);
  size_t n = std::min(limit, c.size());
  if (n < limit && !all) {
    // without a top-k in reach the mass of the whole vocabulary counts, which `total` holds
    if (row.top_k > 0 && row.top_k < vocab) return -1;
  }
  double mass = total;
  if (limit < size_t(vocab)) {
    mass = 0;
    for (size_t i = 0; i < n; i++) mass += c[i].p;
  }
  bool complete = all || n == limit;
  if (row.top_p < 1.f) {
    double sum = 0, want = double(row.top_p) * mass;
    size_t i = 0;
    while (i < n) { sum += c[i++].p; if (sum >= want) break; }
    if (sum < want && !complete) return -1;
    n = i;
    mass = sum;
    complete = true;
  }
  if (row.min_p > 0.f) {
    size_t i = 0;
    double sum = 0;
    while (i < n && c[i].p >= row.min_p * largest) sum += c[i++].p;
    if (i == n && !complete) return -1;
    n = i;
    mass = sum;
    complete = true;
  }
  double want = uniform(row.seed, row.position) * mass, sum = 0;
  for (size_t i = 0; i < n; i++) {
    sum += c[i].p;
    if (sum > want) return c[i].id;
  }
  if (!complete) return -1;
  return n ? c[n - 1].id : -1;
}

}  // namespace

int sample_row(const Kernels& k, const float* logits, int vocab, const SamplingRow& row, std::vector<float>& scratch) {
  float largest;
  int best = k.argmax(logits, vocab, &largest);
  if (best < 0) return -1;
  const float* x = logits;
  const bool is_greedy = row.temperature == 0.f || row.top_k == 1;
  if (is_greedy && row.history_length == 0 && row.num_bias == 0) return best;
  if (scratch.size() < 2 * size_t(vocab)) scratch.resize(2 * size_t(vocab));
  if (row.history_length > 0 || row.num_bias > 0) {
    std::copy(logits, logits + vocab, scratch.begin());
    apply_penalties(scratch.data(), vocab, row);
    x = scratch.data();
    best = k.argmax(x, vocab, &largest);
    if (best < 0) return -1;
  }
  if (is_greedy) return best;
  float* p = scratch.data() + vocab;
  double total = 0;
  if (std::isinf(largest)) {  // infinite logits share all the mass
    for (int i = 0; i < vocab; i++) total += p[i] = x[i] == largest ? 1.f : 0.f;
  } else {
    total = k.exp_sum(x, vocab, largest, 1.f / row.temperature, p);
  }
  std::vector<Candidate> candidates;
  // most draws end among the few likely tokens: sort those first, and more only if the answer needs more
  for (float floor : {1e-2f, 1e-4f, 1e-6f, 0.f}) {
    candidates.clear();
    for (int i = 0; i < vocab; i++)
      if (p[i] >= floor) candidates.push_back({p[i], i});
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.p != b.p ? a.p > b.p : a.id < b.id; });
    int id = walk(candidates, floor == 0.f, total, 1.f, row, vocab);
    if (id >= 0) return id;
  }
  return best;
}

LogprobRow logprob_row(const Kernels& k, const float* logits, int vocab, int target, int num_top, const std::vector<int>& ids) {
  LogprobRow out{std::numeric_limits<float>::quiet_NaN(), {}, {}};
  float largest;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool usable = k.argmax(logits, vocab, &largest) >= 0;
  double sum = 0;
  if (usable && std::isinf(largest)) {
    for (int i = 0; i < vocab; i++) sum += logits[i] == largest;
  } else if (usable) {
    sum = k.exp_sum(logits, vocab, largest, 1.f, nullptr);
  }
  const double log_sum = std::log(sum);
  auto at = [&](int id) {
    if (!usable || id < 0 || id >= vocab) return nan;
    return logits[id] == largest ? float(-log_sum) : float(double(logits[id]) - double(largest) - log_sum);
  };
  out.logprob = at(target);
  for (int id : ids) out.chosen.emplace_back(at(id), id);
  int n = std::min(num_top, vocab);
  if (usable && n > 0) {
    std::vector<int> order(static_cast<size_t>(vocab));
    for (int i = 0; i < vocab; i++) order[i] = i;
    std::partial_sort(order.begin(), order.begin() + n, order.end(),
                      [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    for (int i = 0; i < n; i++) out.top.emplace_back(at(order[i]), order[i]);
  }
  return out;
}

}  // namespace mooli
