#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mooli {

double uniform(uint64_t seed, int64_t position) {
  uint64_t x = seed + 0x9E3779B97F4A7C15ull * uint64_t(position + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  return double(x >> 11) * 0x1p-53;
}

namespace {

void apply_penalties(float* x, int vocab, const SamplingRow& row, SamplerScratch& scratch) {
  std::vector<int>& seen = scratch.seen;  // 1 for each id of the history, and 1 more for each time in the output; 0 between calls
  std::vector<int>& ids = scratch.ids;
  seen.resize(std::max(seen.size(), size_t(vocab)));
  ids.resize(std::max(ids.size(), size_t(vocab)));
  size_t n = 0;
  for (int i = 0; i < row.history_length; i++) {
    const int id = row.history[i];
    if (id < 0 || id >= vocab) continue;
    if (seen[size_t(id)] == 0) {
      ids[n++] = id;
      seen[size_t(id)] = 1;
    }
    seen[size_t(id)] += i >= row.output_start;
  }
  for (size_t i = 0; i < n; i++) {
    const int id = ids[i], count = seen[size_t(id)] - 1;
    seen[size_t(id)] = 0;
    if (row.repetition_penalty != 1.f) x[id] = x[id] > 0 ? x[id] / row.repetition_penalty : x[id] * row.repetition_penalty;
    if (count > 0) x[id] -= row.frequency_penalty * float(count) + row.presence_penalty;
  }
  for (int i = 0; i < row.num_bias; i++)
    if (row.bias_ids[i] >= 0 && row.bias_ids[i] < vocab) x[row.bias_ids[i]] += row.bias_values[i];
}

// 32 values of `x` where the bit of `word` is 1, else minus infinity. As integers, which every compiler makes vectors of.
void copy_bits(const float* x, uint32_t word, float* out) {
  constexpr uint32_t kBanned = 0xff800000u;
  uint32_t values[32];
  std::memcpy(values, x, sizeof(values));
  constexpr uint32_t kBits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  for (int i = 0; i < 32; i += 8, word >>= 8)
    for (int j = 0; j < 8; j++) {
      const uint32_t keep = 0u - uint32_t((word & kBits[j]) != 0);
      values[i + j] = (values[i + j] & keep) | (kBanned & ~keep);
    }
  std::memcpy(out, values, sizeof(values));
}

// The values of `x` that are allowed, and minus infinity for all others, to `out`, which may be `x`.
void copy_allowed(const float* x, int vocab, const uint32_t* allowed, float* out) {
  constexpr float kBanned = -std::numeric_limits<float>::infinity();
  for (int first = 0; first < vocab; first += 32, allowed++) {
    const int n = std::min(32, vocab - first);
    const uint32_t word = *allowed;
    if (word == 0) std::fill_n(out + first, n, kBanned);
    else if (word == ~0u) {
      if (out != x) std::copy_n(x + first, n, out + first);
    } else if (n == 32) copy_bits(x + first, word, out + first);
    else
      for (int i = 0; i < n; i++) out[first + i] = word >> i & 1 ? x[first + i] : kBanned;
  }
}

// The tokens by their logits, largest first, equals by id, with exp((logit - largest) / temperature). Found and sorted only as far as
// they are asked for: most draws end among the first few of a hundred thousand.
class Ranking {
 public:
  Ranking(const Kernels& k, const float* x, int vocab, float largest, float temperature, SamplerScratch& scratch)
      : k_(k), x_(x), vocab_(vocab), largest_(largest), temperature_(temperature), scratch_(scratch), all_(scratch.candidates) {
    all_.clear();
    scratch_.ids.resize(std::max(scratch_.ids.size(), size_t(vocab)));
  }
  // Whether there is a token of rank i with a chance above zero; it is at [i] from then on.
  bool reaches(size_t i) {
    while (sorted_ <= i) {
      if (sorted_ == all_.size() && !find_more()) return false;
      sort_more();
    }
    return true;
  }
  const Candidate& operator[](size_t i) const { return all_[i]; }
  // Of all tokens together, in units of the largest one's.
  double mass() const {
    if (!std::isinf(largest_)) return k_.exp_sum(x_, vocab_, largest_, 1.f / temperature_, nullptr);
    return double(k_.find_between(x_, vocab_, largest_, kInfinity, scratch_.ids.data()));
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr size_t kFirst = 64;  // sorted at once, and then as many again as there are

  bool find_more() {
    static constexpr float kDepths[] = {4.6f, 9.2f, 13.8f, 90.f};  // of logits over temperature: 1e-2, 1e-4, 1e-6, anything above 0
    while (depth_ < 4) {
      const float below = depth_ ? from_ : kInfinity;
      from_ = largest_ - kDepths[depth_++] * temperature_;
      if (std::isinf(largest_)) { from_ = largest_; depth_ = 4; }  // infinite ones share all the mass
      const int n = k_.find_between(x_, vocab_, from_, below, scratch_.ids.data());
      if (n == 0) continue;
      std::vector<float>& p = scratch_.gathered;
      p.resize(size_t(n));
      for (int i = 0; i < n; i++) p[size_t(i)] = x_[scratch_.ids[size_t(i)]];
      if (std::isinf(largest_)) std::fill(p.begin(), p.end(), 1.f);
      else k_.exp_sum(p.data(), n, largest_, 1.f / temperature_, p.data());
      const size_t before = all_.size();
      for (int i = 0; i < n; i++)
        if (p[size_t(i)] > 0.f) all_.push_back({x_[scratch_.ids[size_t(i)]], p[size_t(i)], scratch_.ids[size_t(i)]});
      if (all_.size() > before) return true;
    }
    return false;
  }

  void sort_more() {
    const auto before = [](const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; };
    const auto begin = all_.begin() + std::ptrdiff_t(sorted_);
    const size_t count = std::min(std::max(kFirst, sorted_), all_.size() - sorted_);
    const auto end = begin + std::ptrdiff_t(count);
    if (end != all_.end()) std::nth_element(begin, end, all_.end(), before);
    std::sort(begin, end, before);
    sorted_ += count;
  }

  const Kernels& k_;
  const float* x_;
  int vocab_;
  float largest_, temperature_, from_ = 0;
  SamplerScratch& scratch_;
  std::vector<Candidate>& all_;
  size_t sorted_ = 0;
  int depth_ = 0;
};

// Top-k, then top-p, then min-p, then the draw among what is left.
int draw(Ranking& tokens, const SamplingRow& row, int vocab) {
  size_t n = size_t(vocab);
  double mass = 0;
  if (row.top_k > 0 && row.top_k < vocab) {
    for (n = 0; n < size_t(row.top_k) && tokens.reaches(n); n++) mass += tokens[n].p;
  } else if (row.top_p < 1.f || !(row.min_p > 0.f)) {
    mass = tokens.mass();
  }
  if (row.top_p < 1.f) {
    const double want = double(row.top_p) * mass;
    mass = 0;
    size_t i = 0;
    while (i < n && tokens.reaches(i)) {
      mass += tokens[i++].p;
      if (mass >= want) break;
    }
    n = i;
  }
  if (row.min_p > 0.f) {
    mass = 0;
    size_t i = 0;
    for (; i < n && tokens.reaches(i) && tokens[i].p >= row.min_p * tokens[0].p; i++) mass += tokens[i].p;
    n = i;
  }
  const double want = uniform(row.seed, row.position) * mass;
  double sum = 0;
  int last = tokens[0].id;
  for (size_t i = 0; i < n && tokens.reaches(i); i++) {
    last = tokens[i].id;
    sum += tokens[i].p;
    if (sum > want) break;
  }
  return last;  // also where rounding has left the sum just below
}

}  // namespace

int sample_row(const Kernels& k, const float* logits, int vocab, const SamplingRow& row, SamplerScratch& scratch) {
  float largest;
  int best = k.argmax(logits, vocab, &largest);
  if (best < 0) return -1;
  const float* x = logits;
  if (row.history_length > 0 || row.num_bias > 0 || row.allowed) {
    scratch.logits.resize(size_t(vocab));
    float* const changed = scratch.logits.data();
    if (row.history_length > 0 || row.num_bias > 0) {
      std::copy_n(logits, vocab, changed);
      apply_penalties(changed, vocab, row, scratch);
      if (row.allowed) copy_allowed(changed, vocab, row.allowed, changed);
    } else {
      copy_allowed(logits, vocab, row.allowed, changed);
    }
    x = changed;
    // The largest of all is mostly one of those that are allowed, and then the largest of these.
    const bool is_same = row.history_length == 0 && row.num_bias == 0 && (row.allowed[best / 32] >> best % 32 & 1);
    if (!is_same) best = k.argmax(x, vocab, &largest);
    if (best < 0) return -1;
  }
  if (row.temperature == 0.f || row.top_k == 1) return best;
  Ranking tokens(k, x, vocab, largest, row.temperature, scratch);
  return tokens.reaches(0) ? draw(tokens, row, vocab) : best;
}

LogprobRow logprob_row(const Kernels& k, const float* logits, int vocab, const uint32_t* allowed, int target, int num_top,
                       const std::vector<int>& ids, SamplerScratch& scratch) {
  if (allowed) {
    scratch.logits.resize(size_t(vocab));
    copy_allowed(logits, vocab, allowed, scratch.logits.data());
    logits = scratch.logits.data();
  }
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
    std::vector<int>& order = scratch.ids;
    order.resize(std::max(order.size(), size_t(vocab)));
    const float infinity = std::numeric_limits<float>::infinity();
    int found = 0;
    for (float depth : {4.f, 8.f, 16.f, infinity})
      if (found < n) found = k.find_between(logits, vocab, depth == infinity ? -infinity : largest - depth, infinity, order.data());
    std::partial_sort(order.begin(), order.begin() + n, order.begin() + found,
                      [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    for (int i = 0; i < n && at(order[size_t(i)]) != -infinity; i++) out.top.emplace_back(at(order[size_t(i)]), order[size_t(i)]);
  }
  return out;
}

}  // namespace mooli
