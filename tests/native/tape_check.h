// A small random layer and its head, run as a tape: any number of threads and any company of rows give the same bits.
#pragma once
#include <memory>

#include "device.h"
#include "inputs.h"
#include "tape.h"

namespace check {

struct Sequence {
  std::vector<int32_t> ids;
  int first_position;
  int first_page;  // of five
};

class Layer {
 public:
  static constexpr int kHidden = 32, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kWide = 40, kVocabulary = 50, kTokens = 200,
                       kExperts = 6;
  static constexpr int kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;

  Layer(const std::string& level, int threads, mooli::Kind kind, mooli::KvType kv) : device_(threads, {}, level), tape_(device_), head_tape_(device_) {
    Random random(20);
    const Floats rows = random.numbers(size_t(kVocabulary) * kHidden);
    device_.fill(table_, (const uint8_t*)rows.data(), kHidden * 4);
    gain_ = random.numbers(kHidden, 2.f);
    qkv_weight_ = weight(random, kind, kQkv, kHidden, false);
    out_weight_ = weight(random, kind, kHidden, kHeads * kHeadDim, false);
    gated_ = weight(random, kind, kWide, kHidden, true);
    down_ = weight(random, kind, kHidden, kWide, false);
    head_ = weight(random, kind, kVocabulary, kHidden, false);
    router_ = weight(random, mooli::F32, kExperts, kHidden, false);
    correction_ = random.numbers(kExperts, 0.1f);
    for (int i = 0; i < kExperts; i++) {
      each_.push_back(weight(random, kind, kWide, kHidden, true));
      experts_.gated.push_back(each_.back().get());
      each_.push_back(weight(random, kind, kHidden, kWide, false));
      experts_.down.push_back(each_.back().get());
    }
    for (int i = 0; i < kHeadDim / 2; i++) rope_.inv_freq.push_back(std::pow(0.6, i));
    device_.allocate_kv(kv, {kKvHeads}, {kHeadDim}, 32, 30);
    device_.allocate_scratch(kTokens, 128, kHeads, kHeadDim);
    device_.allocate_experts(kTokens, shape_.slots, kHidden, kWide);
    for (Floats* buffer : {&scores_, &routing_, &x_, &normed_, &qkv_, &attended_, &wide_, &hidden_, &logits_}) buffer->assign(size_t(kTokens) * kQkv, 0.f);
    tape_.embed(&table_, 1.f, x_.data());
    tape_.linear(x_.data(), qkv_weight_.get(), gain_.data(), 1e-5f, nullptr, qkv_.data());
    tape_.rope(qkv_.data(), &rope_, kHeads, kKvHeads, kHeadDim, qkv_.data());
    tape_.attend(0, qkv_.data(), kHeads, 0.2f, 0, 0.f, nullptr, attended_.data());
    tape_.linear(attended_.data(), out_weight_.get(), nullptr, 0.f, x_.data(), x_.data());
    tape_.rms_norm(x_.data(), gain_.data(), 1e-5f, kHidden, nullptr, normed_.data());
    if (mooli::is_integer(kind)) {
      tape_.gated_linear_down(normed_.data(), gated_.get(), nullptr, 0.f, down_.get(), x_.data(), x_.data());
    } else {
      tape_.linear(normed_.data(), gated_.get(), nullptr, 0.f, nullptr, wide_.data());
      tape_.linear(wide_.data(), down_.get(), nullptr, 0.f, x_.data(), x_.data());
    }
    tape_.linear(x_.data(), router_.get(), gain_.data(), 1e-5f, nullptr, scores_.data());
    tape_.route(scores_.data(), &shape_, &correction_, routing_.data());
    tape_.experts(x_.data(), routing_.data(), shape_.slots, &experts_, x_.data(), x_.data());
    tape_.linear(x_.data(), head_.get(), nullptr, 0.f, nullptr, logits_.data());
    head_tape_.linear(hidden_.data(), head_.get(), nullptr, 0.f, nullptr, logits_.data());
  }

  // The logits of all tokens of a step.
  Floats run(const std::vector<Sequence>& sequences) {
    const int n = plan(sequences);
    tape_.run(n);
    return Floats(logits_.begin(), logits_.begin() + n * kVocabulary);
  }
  // The tokens below `vocab` with the largest of them.
  std::vector<int32_t> choose(const std::vector<Sequence>& sequences, int vocab, const mooli::Masks& masks = {}) {
    std::vector<int32_t> chosen(size_t(plan(sequences)));
    tape_.run_choosing(int(chosen.size()), head_tape_, x_.data(), hidden_.data(), kHidden, vocab, masks, chosen.data());
    return chosen;
  }
  void spoil_head(float value) { head_->bias.assign(2 * mooli::kPanel, 0.f); head_->bias[33] = value; }

  // The rows of the last step with one token more each.
  bool begin_next(const std::vector<int32_t>& ids) { return tape_.begin_next(int(ids.size()), ids.data()); }
  bool is_ahead() const { return device_.ahead != mooli::Device::NONE; }
  void copy_page(int source, int target) { device_.copy_page(source, target, 32); }
  // The tokens of five pages, out and into five others, by way of memory that is not aligned.
  void carry(int first_source, int first_target, int tokens) {
    int32_t sources[5], targets[5];
    for (int i = 0; i < 5; i++) { sources[i] = first_source + i; targets[i] = first_target + i; }
    std::vector<char> bytes(5 * device_.page_bytes() + 1);
    device_.read_pages(sources, 5, tokens, bytes.data() + 1, bytes.size() - 1);
    device_.write_pages(targets, 5, bytes.data() + 1, bytes.size() - 1);
  }

 private:
  int plan(const std::vector<Sequence>& sequences) {
    std::vector<int32_t> ids, positions, lengths, pages, asked;
    for (const Sequence& s : sequences) {
      for (size_t i = 0; i < s.ids.size(); i++) positions.push_back(s.first_position + int(i));
      ids.insert(ids.end(), s.ids.begin(), s.ids.end());
      lengths.push_back(int32_t(s.ids.size()));
      for (int i = 0; i < 5; i++) pages.push_back(s.first_page + i);
    }
    const int n = int(ids.size());
    for (int i = 0; i < n; i++) asked.push_back(i);
    device_.plan(n, ids.data(), positions.data(), positions.data(), int(lengths.size()), lengths.data(), pages.data(), 5, n, asked.data(), kVocabulary);
    return n;
  }
  std::unique_ptr<mooli::Linear> weight(Random& random, mooli::Kind kind, int n, int k, bool gated) {
    auto w = std::make_unique<mooli::Linear>(memory_, kind, n, k, gated);
    for (int part = 0; part < (gated ? 2 : 1); part++) {
      const Floats values = random.numbers(size_t(n) * size_t(k), 0.2f);
      device_.pack(*w, part, 0, mooli::kF32, (const uint8_t*)values.data(), size_t(k) * 4, n);
    }
    return w;
  }

  mooli::Slabs memory_;
  mooli::Device device_;
  mooli::Tape tape_, head_tape_;
  mooli::Embedding table_{mooli::kF32, kVocabulary, kHidden};
  mooli::RopeTable rope_;
  std::unique_ptr<mooli::Linear> qkv_weight_, out_weight_, gated_, down_, head_, router_;
  std::vector<std::unique_ptr<mooli::Linear>> each_;
  mooli::RouteShape shape_{kExperts, 3, mooli::RouteShape::SIGMOID, 3, 2, 2, true, 1e-20f, 0.f, 2.5f};
  mooli::Experts experts_;
  Floats correction_, scores_, routing_, gain_, x_, normed_, qkv_, attended_, wide_, hidden_, logits_;
};

// What the other threads have begun with gives what computing anew gives, and what was wrong about it leaves no trace.
template <class Expected>
void check_ahead(const std::string& level, const std::string& name, Layer& alone, Layer& layer, const std::vector<int32_t>& ids, Expected expected) {
  auto token = [&](int position, int page) { return Sequence{{ids[size_t(position)]}, position, page}; };
  expect(!alone.begin_next({ids[0]}), level, name + ": begins without other threads");
  layer.run({{{ids.begin(), ids.begin() + 60}, 0, 10}, {{ids.begin(), ids.begin() + 40}, 0, 15}});
  Random random(22);
  bool is_right = true, all_begun = true, is_used = true;
  for (int a = 60, b = 40; a < 140; a++, b++) {
    const int way = random.below(6);
    int32_t next_a = ids[size_t(a)], next_b = ids[size_t(b)];
    if (way == 1) next_b = (next_b + 1) % Layer::kVocabulary;
    all_begun &= layer.begin_next({next_a, next_b});
    for (volatile int spin = 0; spin < random.below(20000);) spin = spin + 1;
    if (way == 2) layer.copy_page(25, 26);
    if (way == 5) layer.carry(15, 25, b);
    is_used &= layer.is_ahead() == (way != 2 && way != 5);
    Floats out;
    if (way == 3) {  // one row has ended
      layer.run({token(b, 15)});
      out = layer.run({token(a, 10), token(b, 15)});
    } else if (way == 4) {  // another has come
      out = layer.run({token(a, 10), token(b, 15), {{ids.begin(), ids.begin() + 9}, 0, 20}});
      out.resize(2 * Layer::kVocabulary);
      is_right &= same_bits(out, layer.run({token(a, 10), token(b, 15)}));
    } else {
      out = layer.run({token(a, 10), token(b, 15)});
    }
    Floats both = expected(a, a + 1), second = expected(b, b + 1);
    both.insert(both.end(), second.begin(), second.end());
    is_right &= same_bits(out, both);
    expect(!layer.is_ahead(), level, name + ": nothing is ahead after a step");
  }
  expect(is_right, level, name + ": steps that had begun before they were planned");
  expect(all_begun && is_used, level, name + ": steps begin where they can");
  expect(!layer.begin_next({1}) && !layer.begin_next({1, -1}), level, name + ": begins what cannot be");
  layer.run({{{ids.begin(), ids.begin() + 33}, 127, 10}});  // to the end of its five pages
  expect(!layer.begin_next({1}), level, name + ": begins where there is no page");
}

// Choosing while logits are computed gives what looking through them gives, whatever they hold.
inline void check_choosing(const std::string& level, const std::string& name, Layer& layer, const std::vector<int32_t>& ids) {
  for (float spoilt : {0.f, INFINITY, -INFINITY, std::nanf("")}) {
    if (spoilt != 0.f) layer.spoil_head(spoilt);
    for (int count : {1, 5, 70}) {
      const std::vector<Sequence> sequences{{{ids.begin(), ids.begin() + count}, 0, 10}};
      const Floats logits = layer.run(sequences);
      // some ids, nothing, what does not exist, one, all; two words a row, whose bits beyond the vocabulary mean nothing
      const uint32_t allowed[] = {0x10203040, 0x5, 0, 0, 0, 0xfffc0000, 0, 2, ~0u, ~0u};
      std::vector<int32_t> rows;
      for (int r = 0; r < count; r++) rows.push_back(r % 6 - 1);
      mooli::SamplerScratch scratch;
      for (int vocab : {Layer::kVocabulary, 40, 20})
        for (const mooli::Masks& masks : {mooli::Masks{}, mooli::Masks{allowed, rows.data(), 2}}) {
          const std::vector<int32_t> chosen = layer.choose(sequences, vocab, masks);
          bool is_right = true, is_allowed = true;
          for (int r = 0; r < count; r++) {
            mooli::SamplingRow greedy{};
            greedy.allowed = masks.of(r);
            const int id = chosen[size_t(r)];
            is_right &= id == mooli::sample_row(mooli::kernels_scalar(), logits.data() + r * Layer::kVocabulary, vocab, greedy, scratch);
            is_allowed &= id < 0 || (id < vocab && (!greedy.allowed || (greedy.allowed[id / 32] >> id % 32 & 1)));
          }
          expect(is_right && is_allowed, level, name + ": tokens chosen, " + std::to_string(spoilt));
        }
    }
  }
}

inline void check_tape(const std::string& level) {
  using namespace mooli;
  const std::pair<Kind, KvType> variants[] = {{Q8, KV_F32}, {Q4, KV_F16}, {Q4M, KV_BF16}, {IQ4, KV_F32}, {FP4, KV_F16}, {Q6, KV_BF16}, {BF16, KV_BF16}, {F16, KV_F16}, {F32, KV_F32}, {F32, KV_INT8}};
  std::vector<int32_t> ids;
  Random random(21);
  for (int i = 0; i < 150; i++) ids.push_back(random.below(Layer::kVocabulary));
  auto cut = [&](int from, int to) { return std::vector<int32_t>(ids.begin() + from, ids.begin() + to); };
  for (const auto& [kind, kv] : variants) {
    const std::string name = "a tape with weights of kind " + std::to_string(kind);
    Layer layer(level, 1, kind, kv);
    const Floats whole = layer.run({{ids, 0, 0}});
    expect(close(whole, whole, 0.f), level, name + ": not finite");
    auto expected = [&](int from, int to) { return Floats(whole.begin() + from * Layer::kVocabulary, whole.begin() + to * Layer::kVocabulary); };
    Layer other(level, 2, kind, kv);
    expect(same_bits(other.run({{ids, 0, 0}}), whole), level, name + ": another number of threads");
    // in chunks beside other requests, then token by token
    other.run({{cut(9, 30), 0, 5}, {cut(0, 37), 0, 10}, {cut(3, 4), 0, 15}});
    Floats out = other.run({{cut(3, 9), 1, 15}, {cut(37, 145), 37, 10}, {cut(40, 41), 21, 5}});
    const Floats chunk(out.begin() + 6 * Layer::kVocabulary, out.begin() + 114 * Layer::kVocabulary);
    expect(same_bits(chunk, expected(37, 145)), level, name + ": a chunk beside others");
    out = other.run({{cut(145, 146), 145, 10}, {cut(2, 3), 22, 5}});
    out.resize(Layer::kVocabulary);
    expect(same_bits(out, expected(145, 146)), level, name + ": a token beside another");
    expect(same_bits(other.run({{cut(146, 147), 146, 10}}), expected(146, 147)), level, name + ": a token alone");
    other.carry(10, 25, 146);
    other.run({{cut(0, 150), 0, 10}});
    expect(same_bits(other.run({{cut(146, 147), 146, 25}}), expected(146, 147)), level, name + ": pages that were carried elsewhere");
    check_ahead(level, name, layer, other, ids, expected);
    check_choosing(level, name, other, ids);
  }
}

}  // namespace check
