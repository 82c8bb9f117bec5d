// Attention to latents: a row's bits depend neither on the rows of its block nor on threads and chunks, levels agree, and what
// is not a number shows in its own row alone.
#pragma once
#include <memory>

#include "device.h"
#include "inputs.h"
#include "tape.h"

namespace check {

class Latents {
 public:
  static constexpr int kHeads = 3, kRank = 32, kNope = 16, kRope = 16, kValue = 24, kVocabulary = 40, kTokens = 200, kPages = 14;
  static constexpr int kQueries = kHeads * (kNope + kRope), kWidth = kRank + kRope, kOut = kHeads * kValue;

  Latents(const std::string& level, int threads, mooli::Kind kind, mooli::KvType kv) : device_(threads, {}, level), tape_(device_) {
    Random random(30);
    gain_ = random.numbers(kRank, 2.f);
    for (auto* table : {&queries_, &latents_}) {
      const Floats rows = random.numbers(size_t(kVocabulary) * size_t(table->columns), 2.f);
      device_.fill(*table, (const uint8_t*)rows.data(), size_t(table->columns) * 4);
    }
    for (int head = 0; head < kHeads; head++) {
      up_.keys.push_back(weight(random, kind, kRank, kNope));
      up_.values.push_back(weight(random, kind, kValue, kRank));
    }
    for (int i = 0; i < kRope / 2; i++) rope_.inv_freq.push_back(std::pow(0.6, i));
    device_.allocate_kv(kv, {0}, {kWidth}, 32, kPages);
    device_.allocate_scratch(kTokens, 64, kHeads, kWidth);
    q_.assign(size_t(kTokens) * kQueries, 0.f);
    latent_.assign(size_t(kTokens) * kWidth, 0.f);
    out_.assign(size_t(kTokens) * kOut, 0.f);
    tape_.embed(&queries_, 1.f, q_.data());
    tape_.embed(&latents_, 1.f, latent_.data());
    tape_.attend_latent(0, q_.data(), latent_.data(), gain_.data(), 1e-5f, &up_, &rope_, {kHeads, kRank, kNope, kRope, kValue}, 0.3f, out_.data());
  }

  // Tokens [first, first + count) of a sequence in seven pages, beside the first `others` of one in the other seven.
  Floats run(const std::vector<int32_t>& ids, int first, int count, int others = 0) {
    std::vector<int32_t> tokens(ids.begin() + first, ids.begin() + first + count), positions, lengths{count}, pages, asked;
    for (int i = 0; i < count; i++) positions.push_back(first + i);
    if (others) lengths.push_back(others);
    tokens.insert(tokens.end(), ids.begin(), ids.begin() + others);
    for (int i = 0; i < others; i++) positions.push_back(i);
    for (int i = 0; i < 14; i++) pages.push_back(i);
    const int n = int(tokens.size());
    device_.plan(n, tokens.data(), positions.data(), positions.data(), int(lengths.size()), lengths.data(), pages.data(), 7, 0, nullptr, kVocabulary);
    tape_.run(n);
    return Floats(out_.begin(), out_.begin() + count * kOut);
  }
  // The first head's query of token id 0.
  void spoil_query() { ((float*)queries_.data.data())[3] = std::nanf(""); }

 private:
  const mooli::Linear* weight(Random& random, mooli::Kind kind, int n, int k) {
    weights_.push_back(std::make_unique<mooli::Linear>(memory_, kind, n, k, false));
    const Floats values = random.numbers(size_t(n) * size_t(k), 0.5f);
    device_.pack(*weights_.back(), 0, 0, mooli::kF32, (const uint8_t*)values.data(), size_t(k) * 4, n);
    return weights_.back().get();
  }

  mooli::Slabs memory_;
  mooli::Device device_;
  mooli::Tape tape_;
  mooli::Embedding queries_{mooli::kF32, kVocabulary, kQueries}, latents_{mooli::kF32, kVocabulary, kWidth};
  mooli::RopeTable rope_;
  mooli::LatentWeight up_;
  std::vector<std::unique_ptr<mooli::Linear>> weights_;
  Floats gain_, q_, latent_, out_;
};

inline void check_latents(const std::string& level) {
  using namespace mooli;
  Random random(31);
  std::vector<int32_t> ids(Latents::kTokens);
  for (int32_t& id : ids) id = 1 + random.below(Latents::kVocabulary - 1);
  ids[169] = 1;
  for (Kind kind : {F32, Q8})
    for (KvType kv : {KV_F32, KV_F16, KV_BF16}) {
      const std::string name = "latents, weights " + std::to_string(kind) + ", kept as " + std::to_string(kv);
      Latents alone(level, 1, kind, kv), layer(level, 3, kind, kv), scalar("scalar", 1, kind, kv);
      const Floats whole = alone.run(ids, 0, 170);
      expect(close(whole, scalar.run(ids, 0, 170), kind == Q8 ? 0.02f : 1e-4f), level, name + ": levels do not agree");
      Floats parts;
      int first = 0;
      for (int count : {1, 30, 98, 1, 40}) {
        const Floats part = layer.run(ids, first, count, 3 * (count % 4));
        parts.insert(parts.end(), part.begin(), part.end());
        first += count;
      }
      expect(same_bits(parts, whole), level, name + ": a row depends on threads, chunks or other rows");
      ids[169] = 0;
      const Floats before = alone.run(ids, 0, 170);
      alone.spoil_query();
      const Floats faulty = alone.run(ids, 0, 170);
      bool is_right = true;
      for (int i = 0; i < int(faulty.size()); i++) {
        const bool is_faulty = i >= 169 * Latents::kOut && i < 169 * Latents::kOut + Latents::kValue;
        is_right &= is_faulty ? faulty[size_t(i)] != faulty[size_t(i)] : faulty[size_t(i)] == before[size_t(i)];
      }
      expect(is_right, level, name + ": a NaN does not show, or shows in another head or row");
      ids[169] = 1;
    }
}

}  // namespace check
