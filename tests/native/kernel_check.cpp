// Every kernel of every instruction set level of this processor against the scalar level, without Python.
//
// Checks what holds inside one machine, and ends with 1 if something does not. Prints "<level> <name> <digest>" for what can
// be compared between machines: names in "exact/" are the same bits at every level, those in "fused/" at every level but
// scalar, which has no fused multiply-add; the scalar level has the same bits everywhere.
#include <algorithm>

#include "formats.h"
#include "inputs.h"
#include "kernels.h"
#include "latent_check.h"
#include "sampler.h"
#include "pool_check.h"
#include "quantize_check.h"
#include "queue_check.h"
#include "tape_check.h"
#include "vnni_emulation.h"

using namespace mooli;
using namespace check;

namespace {

const char* const kKindNames[] = {"q8", "q4", "q4m", "iq4", "fp4", "q6", "bf16", "f16", "f32"};

Bytes prepare(const Kernels& k, int kind, const Floats& x, int first, int rows, int columns) {
  const int padded = (columns + kGroup - 1) / kGroup * kGroup;
  Bytes block(k.few[kind].row_bytes(padded) * size_t(rows));
  k.few[kind].prepare(x.data() + size_t(first) * size_t(columns), size_t(columns), columns, padded, block.data(), rows);
  return block;
}

// ---------------------------------------------------------------- rows as the integer kernels see them

struct Quantised { float scale; int32_t start[2]; int8_t q[kGroup]; };

Quantised group_of(const Bytes& block, int kind, int group, int row, int rows) {
  Quantised out{};
  const int parts = kind == Q6 ? 2 : 1, head = 4 + 4 * parts;
  const char* b = block.data() + size_t(group) * size_t(head + kGroup) * size_t(rows);
  memcpy(&out.scale, b + 4 * row, 4);
  for (int part = 0; part < parts; part++) memcpy(&out.start[part], b + 4 * (1 + part) * rows + 4 * row, 4);
  for (int i = 0; i < kGroup / 4; i++) memcpy(out.q + 4 * i, b + head * rows + 4 * row + 4 * rows * i, 4);
  return out;
}

// Rows of bfloat16 as the dot product takes them, two of K in a word, from rows as float.
Bytes paired(const Bytes& rows, int count) {
  Bytes out(rows.size() / 2);
  for (size_t i = 0; i < out.size() / 2; i++) {
    const size_t row = i / 2 % size_t(count), k = i / 2 / size_t(count) * 2 + i % 2;
    memcpy(out.data() + i * 2, rows.data() + (k * size_t(count) + row) * 4 + 2, 2);
  }
  return out;
}

void check_rows(const Kernels& k) {
  const Kernels& scalar = kernels_scalar();
  constexpr int kColumns = 300, kRows = 5, kGroups = 10;
  Floats x = Random(1).numbers(size_t(kRows) * kColumns, 3.f);
  for (int i = 0; i < 32; i++) x[kColumns + i] = 0.f;
  for (int i = 0; i < 32; i++) x[kColumns + 32 + i] *= 1e-42f;
  for (int i = 0; i < 32; i++) x[kColumns + 64 + i] = float(i) - 15.5f;  // every second one a tie
  x[kColumns + 64] = -127.f;
  x[2 * kColumns + 7] = std::nanf("");
  x[3 * kColumns + 40] = INFINITY;
  for (int kind = 0; is_integer(Kind(kind)); kind++) {
    const std::string name = std::string("exact/quantised/") + kKindNames[kind];
    Bytes actual = prepare(k, kind, x, 0, kRows, kColumns), expected = prepare(scalar, kind, x, 0, kRows, kColumns), digested;
    for (int r = 0; r < kRows; r++)
      for (int g = 0; g < kGroups; g++) {
        Quantised a = group_of(actual, kind, g, r, kRows), e = group_of(expected, kind, g, r, kRows);
        const bool bad = (r == 2 && g == 0) || (r == 3 && g == 1);
        expect(std::isnan(a.scale) == bad, k.name, name + ": a fault of the input does not show, or one shows that is none");
        expect(bad || a.scale == e.scale, k.name, name + ": scale");
        expect(memcmp(a.q, e.q, kGroup) == 0, k.name, name + ": codes");
        // Q8 may be prepared for signed or for unsigned weights
        const bool may_be_signed = kind == Q8 || kind == IQ4 || kind == FP4;
        for (int part = 0; part < 2; part++)
          expect(a.start[part] == e.start[part] || (may_be_signed && a.start[part] == 0), k.name, name + ": start of the sum");
        digested.insert(digested.end(), a.q, a.q + kGroup);
      }
    print_digest(k.name, name, digested.data(), digested.size());
  }
  const Floats plain = Random(2).numbers(size_t(kRows) * kColumns);
  for (int kind : {BF16, F16, F32}) {
    const Bytes actual = prepare(k, kind, plain, 0, kRows, kColumns);
    Bytes expected = prepare(scalar, kind, plain, 0, kRows, kColumns);
    if (kind == BF16 && k.has_bf16_dot) expected = paired(expected, kRows);
    expect(actual == expected, k.name, std::string("rows for ") + kKindNames[kind]);
  }
  std::vector<uint16_t> actual(77), expected(77);
  k.to_bf16(plain.data(), 77, actual.data());
  scalar.to_bf16(plain.data(), 77, expected.data());
  expect(actual == expected, k.name, "to_bf16");
}

// ---------------------------------------------------------------- linear weights

Floats multiply(const Kernels& k, int kind, const Bytes& panel, const Floats& x, int first, int rows, int columns) {
  const int padded = (columns + kGroup - 1) / kGroup * kGroup;
  Bytes block = prepare(k, kind, x, first, rows, columns);
  alignas(64) float tile[kMaxRows * kPanel];
  k.few[kind].gemm[rows](block.data(), panel.data(), padded, tile, panel.data(), 1);
  return Floats(tile, tile + rows * kPanel);
}

Floats one_by_one(const Kernels& k, int kind, const Bytes& panel, const Floats& x, int rows, int columns) {
  Floats out;
  for (int r = 0; r < rows; r++) {
    Floats row = multiply(k, kind, panel, x, r, 1, columns);
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

void check_linear(const Kernels& k, int kind) {
  constexpr int kColumns = 300, kPadded = 320, kRows = 12;  // as many as the largest block
  Bytes panel(panel_bytes(Kind(kind), kPadded) + 64);
  Random random(3);
  for (int column = 0; column < kPanel; column++) {
    const Floats w = random.numbers(kColumns);
    pack_columns(Kind(kind), kF32, (const uint8_t*)w.data(), 0, 1, kColumns, kPadded, panel.data(), column, k.quantize_q4);
  }
  const Floats x = random.numbers(size_t(kRows) * kColumns, 2.f);
  const Floats alone = one_by_one(k, kind, panel, x, kRows, kColumns);
  const std::string name = std::string("fused/linear/") + kKindNames[kind];
  for (int rows = 1; rows <= k.few[kind].max_rows; rows++)
    for (int first = 0; first + rows <= kRows; first++) {
      const Floats batched = multiply(k, kind, panel, x, first, rows, kColumns);
      expect(memcmp(batched.data(), alone.data() + first * kPanel, batched.size() * 4) == 0, k.name,
             name + ": a row depends on the " + std::to_string(rows) + " rows of its block");
    }
  const bool own_rounding = kind == BF16 && k.has_bf16_dot;
  expect(close(alone, one_by_one(kernels_scalar(), kind, panel, x, kRows, kColumns), own_rounding ? 1e-5f : 2e-6f), k.name, name);
  if (!own_rounding) print_digest(k.name, name, alone);
}

// Codes over their whole range under scales of one: sums are whole numbers below 2^24, and every level must have them.
void check_integer_sums(const Kernels& k, int kind) {
  constexpr int kColumns = 512;
  Random random(4);
  Bytes panel(panel_bytes(Kind(kind), kColumns) + 64);
  Floats weights(size_t(kPanel) * kColumns), x(size_t(kMaxRows) * kColumns);
  const Format formats[] = {kQ8_0, kQ4_0, kQ4_1, kIQ4_NL, kMXFP4, kQ6_K}, format = formats[kind];
  const size_t block = row_bytes(format, block_values(format));
  for (int column = 0; column < kPanel; column++) {
    std::vector<uint8_t> row(row_bytes(format, kColumns));
    for (size_t i = 0; i < row.size(); i++) row[i] = column == 0 ? 0x80 : column == 1 ? 0x7f : column == 2 ? 0xff : uint8_t(random.bits());
    for (size_t i = 0; i < row.size(); i += block) {
      const uint16_t one = float_to_half(1.f), minimum = float_to_half(-5.f);
      if (kind == FP4) row[i] = 128;
      else memcpy(&row[i + (kind == Q6 ? 208 : 0)], &one, 2);
      if (kind == Q4M) memcpy(&row[i + 2], &minimum, 2);
      if (kind == Q6) for (size_t part = 0; part < 16; part++) row[i + 192 + part] = part % 3 ? 1 : uint8_t(-2);
    }
    decode_row(format, row.data(), kColumns, &weights[size_t(column) * kColumns]);
    pack_columns(Kind(kind), format, row.data(), 0, 1, kColumns, kColumns, panel.data(), column, k.quantize_q4);
  }
  for (size_t i = 0; i < x.size(); i++) x[i] = i % kGroup == 0 ? 127.f : float(random.below(255) - 127);
  std::fill(x.begin(), x.begin() + kColumns, 127.f);
  std::fill(x.begin() + kColumns, x.begin() + 2 * kColumns, -127.f);
  const Floats actual = one_by_one(k, kind, panel, x, kMaxRows, kColumns);
  bool exact = true;
  for (int r = 0; r < kMaxRows; r++)
    for (int column = 0; column < kPanel; column++) {
      int64_t sum = 0;
      for (int i = 0; i < kColumns; i++) sum += int64_t(weights[size_t(column) * kColumns + i]) * int64_t(x[size_t(r) * kColumns + i]);
      exact &= actual[size_t(r) * kPanel + column] == float(sum);
    }
  const std::string name = std::string("exact/linear/") + kKindNames[kind];
  expect(exact, k.name, name);
  print_digest(k.name, name, actual);
}

void check_store(const Kernels& k) {
  Random random(5);
  constexpr int kRows = 3, kStride = 50;
  const Floats tile = random.numbers(kRows * kPanel, 20.f), bias = random.numbers(kPanel), residual = random.numbers(kRows * kStride);
  for (int columns : {5, 32})
    for (int which = 0; which < 4; which++) {
      Floats actual(kRows * kStride), expected(kRows * kStride);
      const float *b = which & 1 ? bias.data() : nullptr, *r = which & 2 ? residual.data() : nullptr;
      k.store(tile.data(), kRows, columns, b, r, actual.data(), kStride);
      kernels_scalar().store(tile.data(), kRows, columns, b, r, expected.data(), kStride);
      expect(same_bits(actual, expected), k.name, "store");
    }
  for (int shift : {0, 1})  // past the caches only where lines begin
    for (int columns : {5, 32})
      for (const float* b : {(const float*)nullptr, bias.data()}) {
        alignas(64) float actual[kRows * 64 + 1] = {}, expected[kRows * 64 + 1] = {};
        k.stream(tile.data(), kRows, columns, b, actual + shift, 64);
        kernels_scalar().store(tile.data(), kRows, columns, b, nullptr, expected + shift, 64);
        expect(memcmp(actual, expected, sizeof actual) == 0, k.name, "stream");
      }
  for (int columns : {3, 16}) {
    const char* const names[kNumGates] = {"silu", "gelu", "clamped"};
    for (int gate = 0; gate < kNumGates; gate++) {
      Floats actual(kRows * kStride), expected(kRows * kStride);
      k.store_gated[gate](tile.data(), kRows, columns, bias.data(), actual.data(), kStride);
      kernels_scalar().store_gated[gate](tile.data(), kRows, columns, bias.data(), expected.data(), kStride);
      expect(close(actual, expected, 1e-6f), k.name, std::string("store_gated, ") + names[gate]);
      print_digest(k.name, std::string("fused/") + names[gate] + "/" + std::to_string(columns), actual);
    }
  }
}

// ---------------------------------------------------------------- attention

const char* const kKvNames[] = {"f32", "f16", "bf16", "bf16_dot"};

// 330 tokens (three blocks, the last tile not full) and queries at seven positions.
class Attention {
 public:
  static constexpr int kRows = 7;

  Attention(const Kernels& k, KvType type, int head_dim, int window, float cap)
      : k_(k), type_(type), head_dim_(head_dim), window_(window), cap_(cap) {
    constexpr int kTokens = 330, kTiles = (kTokens + kTile - 1) / kTile;
    Random random(uint64_t(6 + head_dim));
    tile_ = size_t(kTile) * size_t(head_dim) * kv_element_bytes(type);
    keys_.resize(tile_ * kTiles);
    values_.resize(tile_ * kTiles);
    for (int t = 0; t < kTokens; t++) {
      const Floats key = random.numbers(size_t(head_dim), 2.f), value = random.numbers(size_t(head_dim));
      const size_t at = tile_ * size_t(t / kTile);
      k.store_kv[type](key.data(), value.data(), head_dim, &keys_[at], &values_[at], t % kTile);
    }
    queries_ = random.numbers(size_t(kRows * head_dim), 2.f);
  }

  // Rows [first, first + rows), as one block of rows.
  Floats attend(int first, int rows) const {
    const int positions[kRows] = {5, 127, 128, 200, 200, 328, 329}, last = positions[first + rows - 1];
    const size_t n = size_t(rows) * size_t(head_dim_);
    const float* q = &queries_[size_t(first * head_dim_)];
    std::vector<uint16_t> q16(n);
    k_.to_bf16(q, int(n), q16.data());
    Floats out(n), lanes(size_t(rows * 16)), maxima(size_t(rows), -1e30f), scores(size_t(kMaxRows) * kBlock), weights(scores), result(n);
    for (int begin = 0; begin <= last; begin += kBlock) {
      const int tiles = std::min(kBlockTiles, (last - begin) / kTile + 1);
      const void *kt[kBlockTiles], *vt[kBlockTiles];
      for (int t = 0; t < tiles; t++) {
        kt[t] = &keys_[tile_ * size_t(begin / kTile + t)];
        vt[t] = &values_[tile_ * size_t(begin / kTile + t)];
      }
      AttendBlock block{};
      block.q = type_ == KV_BF16_DOT ? (const void*)q16.data() : (const void*)q;
      block.positions = positions + first;
      block.k = kt;
      block.v = vt;
      block.rows = rows;
      block.tiles = tiles;
      block.first = begin;
      block.head_dim = block.value_dim = head_dim_;
      block.window = window_;
      block.scale_log2e = 0.3f;
      if (cap_ != 0.f) { block.inner = 0.2f / cap_; block.outer = cap_ / 0.2f; }
      block.out = out.data();
      block.lane_sums = lanes.data();
      block.maxima = maxima.data();
      block.scores = scores.data();
      block.weights = weights.data();
      k_.attend_block[type_](block);
    }
    for (int r = 0; r < rows; r++)
      k_.finish_attention(&out[size_t(r * head_dim_)], &lanes[size_t(r * 16)], head_dim_, &result[size_t(r * head_dim_)]);
    return result;
  }

  Floats& queries() { return queries_; }

 private:
  const Kernels& k_;
  KvType type_;
  int head_dim_, window_;
  float cap_;
  size_t tile_;
  Bytes keys_, values_;
  Floats queries_;
};

void check_attention(const Kernels& k) {
  constexpr int kRows = Attention::kRows;
  for (KvType type : {KV_F32, KV_F16, KV_BF16, KV_BF16_DOT})
    for (int head_dim : {32, 80})
      for (int window : {0, 40, -1}) {  // -1: none, and a cap
        const bool dot = type == KV_BF16_DOT;
        if (!k.attend_block[type] || (dot && head_dim % 32 != 0)) continue;
        const std::string name = "fused/attention/" + std::string(kKvNames[type]) + "/" + std::to_string(head_dim) + "/" + std::to_string(window);
        const float cap = window < 0 ? 1.5f : 0.f;
        Attention attention(k, type, head_dim, window, cap);
        const Floats all = attention.attend(0, kRows);
        const Floats expected = Attention(kernels_scalar(), dot ? KV_BF16 : type, head_dim, window, cap).attend(0, kRows);
        expect(close(all, expected, dot ? 0.02f : 5e-6f), k.name, name);
        if (!dot) print_digest(k.name, name, all);
        auto row = [&](const Floats& x, int r) { return Floats(x.begin() + r * head_dim, x.begin() + (r + 1) * head_dim); };
        for (int r = 0; r < kRows; r++)
          expect(same_bits(attention.attend(r, 1), row(all, r)), k.name, name + ": a row depends on the rows of its block");
        attention.queries()[size_t(head_dim) + 1] = std::nanf("");
        const Floats faulty = attention.attend(0, kRows);
        for (int r = 0; r < kRows; r++)
          expect(r == 1 ? all_nan(row(faulty, r)) : same_bits(row(faulty, r), row(all, r)), k.name,
                 name + ": a NaN does not show, or shows in another row");
      }
}

// ---------------------------------------------------------------- the rest of the table

// What is drawn under a mask, and its log-probability, are those of a row that is -inf elsewhere.
void check_masks(const Kernels& k, const Floats& x, SamplingRow row, SamplerScratch& scratch) {
  const int n = 1001;
  Random random(24);
  for (int trial = 0; trial < 60; trial++) {
    std::vector<uint32_t> words(32);
    for (uint32_t& word : words) word = trial % 3 == 0 ? 0 : trial % 3 == 1 ? ~0u : uint32_t(random.below(1 << 30)) << 2;
    for (int i = trial % 4; i > 0; i--) words[size_t(random.below(32))] ^= 1u << random.below(32);
    Floats masked(x);
    int num_allowed = 0;
    for (int i = 0; i < n; i++) {
      if (words[size_t(i) / 32] >> i % 32 & 1) num_allowed++;
      else masked[size_t(i)] = -INFINITY;
    }
    row.temperature = trial % 2 ? 0.f : 1.5f;
    row.top_p = trial % 5 ? 1.f : 0.9f;
    row.position = trial;
    row.allowed = nullptr;
    const int expected = sample_row(k, masked.data(), n, row, scratch);
    row.allowed = words.data();
    expect(sample_row(k, x.data(), n, row, scratch) == expected && (expected < 0) == (num_allowed == 0), k.name, "sample_row under a mask");
    if (expected < 0) continue;
    const LogprobRow of_masked = logprob_row(k, masked.data(), n, nullptr, expected, 5, {3, 700}, scratch);
    const LogprobRow under_mask = logprob_row(k, x.data(), n, words.data(), expected, 5, {3, 700}, scratch);
    expect(of_masked.logprob == under_mask.logprob && of_masked.top == under_mask.top && of_masked.chosen == under_mask.chosen &&
               int(under_mask.top.size()) == std::min(5, num_allowed), k.name, "logprob_row under a mask");
  }
}

void check_small_operations(const Kernels& k) {
  const Kernels& scalar = kernels_scalar();
  for (int n : {32, 100, 896}) {
    Random random(uint64_t(7 + n));
    const Floats x = random.numbers(size_t(n), 5.f), gain = random.numbers(size_t(n));
    Floats actual(static_cast<size_t>(n)), expected(static_cast<size_t>(n));
    const Floats added = random.numbers(size_t(n));
    k.rms_norm(x.data(), gain.data(), 1e-5f, n, added.data(), actual.data());
    scalar.rms_norm(x.data(), gain.data(), 1e-5f, n, added.data(), expected.data());
    expect(close(actual, expected, 1e-6f), k.name, "rms_norm, added");
    k.rms_norm(x.data(), gain.data(), 1e-5f, n, nullptr, actual.data());
    scalar.rms_norm(x.data(), gain.data(), 1e-5f, n, nullptr, expected.data());
    expect(close(actual, expected, 1e-6f), k.name, "rms_norm");
    print_digest(k.name, "fused/rms_norm/" + std::to_string(n), actual);

    actual = expected = x;
    k.rope(actual.data(), gain.data(), gain.data() + n / 2, n / 2);
    scalar.rope(expected.data(), gain.data(), gain.data() + n / 2, n / 2);
    expect(same_bits(actual, expected), k.name, "rope");
    print_digest(k.name, "exact/rope/" + std::to_string(n), actual);

    const float top = *std::max_element(x.begin(), x.end());
    const double sum = k.exp_sum(x.data(), n, top, 1.3f, actual.data()), right = scalar.exp_sum(x.data(), n, top, 1.3f, expected.data());
    expect(std::fabs(sum - right) <= 1e-6 * right && close(actual, expected, 1e-6f), k.name, "exp_sum");
    expect(k.exp_sum(x.data(), n, top, 1.3f, nullptr) == sum, k.name, "exp_sum without an output");
    print_digest(k.name, "fused/exp_sum/" + std::to_string(n), &sum, sizeof sum);
  }
  Floats x = Random(8).numbers(1001);
  float largest = 0;
  for (int at : {0, 3, 500, 999, 1000}) {
    Floats y = x;
    y[size_t(at)] = y[1000] = 9.f;
    expect(k.argmax(y.data(), 1001, &largest) == at && largest == 9.f, k.name, "argmax");
    y[size_t(at)] = std::nanf("");
    expect(k.argmax(y.data(), 1001, &largest) == -1, k.name, "argmax does not report a NaN");
  }
  std::fill(x.begin(), x.end(), -INFINITY);
  expect(k.argmax(x.data(), 1001, &largest) == -1, k.name, "argmax of nothing but -inf");
  for (int n : {1, 127, 128, 1001})
    for (float from : {-3.f, 0.5f, 1.9f, -INFINITY, INFINITY})
      for (float below : {0.6f, 2.f, INFINITY}) {
        Floats y = Random(10).numbers(size_t(n), 3.f);
        y[0] = from;
        y[size_t(n) / 2] = below;
        y[size_t(n) - 1] = -INFINITY;
        std::vector<int> found(static_cast<size_t>(n)), expected;
        found.resize(size_t(k.find_between(y.data(), n, from, below, found.data())));
        for (int i = 0; i < n; i++)
          if (y[size_t(i)] >= from && (y[size_t(i)] < below || below == INFINITY)) expected.push_back(i);
        expect(found == expected, k.name, "find_between");
      }
  SamplingRow row{0.f, 1.f, 0.f, 0.f, 0.f, 1.f, -1, 1, 0, nullptr, 0, 0, nullptr, nullptr, 0, nullptr};
  x = Random(9).numbers(1001);
  x[777] = 9.f;
  SamplerScratch scratch;
  expect(sample_row(k, x.data(), 1001, row, scratch) == 777, k.name, "sample_row, greedy");
  check_masks(k, x, row, scratch);
  expect(k.dot_gauge(80) > 0, k.name, "dot_gauge");
  k.read_gauge((const char*)x.data(), 3840);
}

}  // namespace

// Panels in order and out of order, whole and cut, as threads that help each other meet them.
void check_keep_largest(const Kernels& k) {
  const int rows = 3, n = 9 * kPanel + 5;
  Random random(23);
  for (int trial = 0; trial < 60; trial++) {
    Floats logits = random.numbers(size_t(rows) * n), bias = random.numbers(n + kPanel);
    for (float& x : logits) x = std::round(x * 4.f) / 4.f;  // many are equal
    for (float& x : bias) x = trial % 2 ? std::round(x) : 0.f;
    const float odd = trial % 5 == 1 ? INFINITY : trial % 5 == 2 ? -INFINITY : trial % 5 == 3 ? NAN : 9.f;
    for (int r = 0; r < rows; r++) logits[size_t(r) * n + random.below(n)] = odd;
    if (trial % 7 == 0) std::fill(logits.begin(), logits.begin() + n, -INFINITY);
    Floats kept(rows * 2 * kPanel, -INFINITY), rest(kPanel, 0.f);
    for (int r = 0; r < rows; r++) std::fill_n(kept.begin() + r * 2 * kPanel + kPanel, kPanel, -1.f);
    std::vector<uint32_t> allowed(10 * rows, ~0u);  // a word a row for each panel
    if (trial % 4 == 3)
      for (uint32_t& word : allowed) word = random.below(4) ? uint32_t(random.below(1 << 30)) * 5 : 0;
    std::vector<int> order;
    for (int p = 0; p < 10; p++) order.insert(order.begin() + random.below(trial % 3 ? int(order.size()) + 1 : 1), p);
    if (trial % 3 == 0) std::reverse(order.begin(), order.end());
    int last = -1;
    for (int p : order) {
      const int columns = std::min(kPanel, n - p * kPanel);
      Floats tile(rows * kPanel, 77.f);
      for (int r = 0; r < rows; r++) std::copy_n(logits.begin() + size_t(r) * n + p * kPanel, columns, tile.begin() + r * kPanel);
      k.keep_largest(tile.data(), rows, columns, trial % 2 ? bias.data() + p * kPanel : nullptr,
                     trial % 4 ? &allowed[size_t(p * rows)] : nullptr, p, p > last, kept.data(), rest.data());
      last = std::max(last, p);
    }
    bool finite = true, right = true, seen_finite = true;
    for (float x : rest) seen_finite &= x == x;
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < kPanel; c++) {
        float largest = -INFINITY, panel = -1;
        for (int i = c; i < n; i += kPanel) {
          const float x = logits[size_t(r) * n + i] + (trial % 2 ? bias[size_t(i)] : 0.f);
          finite &= std::isfinite(x);
          if (x > largest && (allowed[size_t(i / kPanel * rows + r)] >> c & 1)) { largest = x; panel = float(i / kPanel); }
        }
        const float* of_row = kept.data() + r * 2 * kPanel;
        right &= of_row[c] == largest && of_row[kPanel + c] == panel;
      }
    expect(finite == seen_finite, k.name, "keep_largest does not tell what is finite");
    expect(right || !finite, k.name, "keep_largest");
  }
}

void check_table(const Kernels& k) {
  check_rows(k);
  for (int kind = 0; kind < kNumKinds; kind++) {
    check_linear(k, kind);
    if (is_integer(Kind(kind))) check_integer_sums(k, kind);
  }
  check_store(k);
  check_quantize(k);
  check_attention(k);
  check_small_operations(k);
  check_keep_largest(k);
}

int main() {
  check_pool();
  check_queue();
  const std::vector<std::string> levels = available_isas();
  for (const std::string& level : levels) {
    const Kernels& k = select_kernels(level);
    expect(k.name == level, level, "the table of another level");
    check_table(k);
    check_tape(level);
    check_latents(level);
  }
#if defined(MOOLI_AVX2_VNNI) && defined(__linux__)
  auto has = [&](const char* level) { return std::find(levels.begin(), levels.end(), level) != levels.end(); };
  if (has("avx2") && !has("avx2_vnni")) {
    emulate_vnni();
    check_table(kernels_avx2_vnni());
  }
#endif
  if (failures) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures ? 1 : 0;
}
