#include "tape.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace mooli {
namespace {
// What a thread fetches of the next linear's panels before it waits for others, and while one row is prepared by another.
// Together less than a second level cache.
constexpr size_t kNextFetchBytes = 16 << 10, kIdleFetchBytes = 32 << 10;
// How far ahead of what is multiplied with the only block of rows its weights are fetched; measured with Q8, Q4, Q4M and FP4.
size_t stream_fetch_bytes(Kind kind, int rows) { return kind == Q4 && rows == 1 ? 1024 : 8192; }
constexpr size_t kStreamedBytes = 8 << 20;  // of results, beyond what is found in a cache when it is read
constexpr int kConvChannels = 64;  // that a thread convolves at a time
constexpr size_t kLargeBytes = 1 << 20;  // of activations, beyond half a second level cache
}

void Tape::embed(const Embedding* table, float scale, float* out) { Op o{EMBED}; o.table = table; o.number = scale; o.out = out; add(o); }
void Tape::rms_norm(const float* x, const float* weight, float eps, int width, const float* residual, float* out) {
  Op o{RMS_NORM}; o.x = x; o.a = weight; o.b = residual; o.number = eps; o.width = width; o.out = out; add(o);
}
void Tape::linear(const float* x, const Linear* weight, const float* norm, float eps, const float* residual, float* out) {
  Op o{LINEAR}; o.x = x; o.weight = weight; o.b = norm; o.number = eps; o.a = residual; o.out = out; add(o);
}
void Tape::gated_linear_down(const float* x, const Linear* gated, const float* norm, float eps, const Linear* down, const float* residual,
                             float* out) {
  linear(x, gated, norm, eps, nullptr, nullptr);
  ops_.back().next = down;
  Op o{LINEAR}; o.weight = down; o.a = residual; o.out = out; o.is_prepared = true; add(o);
}
void Tape::head_norm(const float* x, const float* q, const float* k, float eps, int heads, int kv_heads, int head_dim, bool is_joint,
                     float* out) {
  Op o{HEAD_NORM}; o.x = x; o.a = q; o.b = k; o.number = eps; o.heads = heads; o.kv_heads = kv_heads; o.head_dim = head_dim; o.is_joint = is_joint;
  o.out = out; add(o);
}
void Tape::rope(const float* x, RopeTable* table, int heads, int kv_heads, int head_dim, float* out) {
  Op o{ROPE}; o.x = x; o.rope = table; o.heads = heads; o.kv_heads = kv_heads; o.head_dim = head_dim; o.out = out; add(o);
}
void Tape::attend(int layer, const float* qkv, int heads, float scale, int window, float cap, const float* sinks, float* out) {
  Op o{ATTEND}; o.x = qkv; o.sinks = sinks; o.layer = layer; o.heads = heads; o.number = scale; o.window = window; o.cap = cap; o.out = out; add(o);
}

void Tape::conv(int layer, const float* x, const ConvWeight* weight, bool is_gated, float* out) {
  Op o{CONV}; o.layer = layer; o.x = x; o.conv = weight; o.is_gated = is_gated; o.out = out; add(o);
}
void Tape::delta(int layer, const float* qkv, const float* gates, const DeltaWeight* weight, const DeltaShape* shape, float* out) {
  Op o{DELTA}; o.layer = layer; o.x = qkv; o.a = gates; o.decay = weight; o.shape = shape; o.out = out; add(o);
}
void Tape::gated_norm(const float* x, const float* gate, const float* weight, float eps, int heads, int head_dim, float* out) {
  Op o{GATED_NORM}; o.x = x; o.a = gate; o.b = weight; o.number = eps; o.heads = heads; o.head_dim = head_dim; o.out = out; add(o);
}
void Tape::sigmoid_mul(const float* x, const float* gate, int width, bool is_one, float* out) {
  Op o{SIGMOID_MUL}; o.x = x; o.a = gate; o.width = width; o.heads = is_one ? width : 1; o.out = out; add(o);
}
void Tape::route(const float* logits, const RouteShape* shape, const std::vector<float>* correction, float* out) {
  Op o{ROUTE}; o.x = logits; o.route = shape; o.correction = correction; o.out = out; add(o);
}
void Tape::experts(const float* x, const float* routing, int slots, const Experts* weight, const float* residual, float* out) {
  Op o{EXPERTS}; o.x = x; o.a = routing; o.heads = slots; o.experts = weight; o.b = residual; o.out = out; add(o);
}

void Tape::silu_mul(const float* x, const float* gate, int width, float* out) {
  Op o{SILU_MUL}; o.x = x; o.a = gate; o.width = width; o.out = out; add(o);
}

void Tape::scan(int layer, const float* qkv, const float* gates, const DeltaWeight* weight, const DeltaShape* shape, float* out) {
  Op o{SCAN}; o.layer = layer; o.x = qkv; o.a = gates; o.decay = weight; o.shape = shape; o.out = out; add(o);
}
void Tape::soft_cap(const float* x, float cap, int width, float* out) {
  Op o{SOFT_CAP}; o.x = x; o.cap = cap; o.width = width; o.out = out; add(o);
}

void Tape::asked_rows(const float* x, int width, float* out) { Op o{ASKED_ROWS}; o.x = x; o.width = width; o.out = out; add(o); }

const char* Tape::name(int code) {
  static const char* names[] = {"embed", "rms_norm", "linear", "head_norm", "rope", "attend", "asked_rows", "conv", "delta_rule", "gated_norm",
                                "sigmoid_mul", "scan", "silu_mul", "attend_latent", "route", "experts", "soft_cap"};
  return names[code];
}

Tape::Blocks Tape::blocks_of(const Op& op, int rows) const {
  const RowKernels& kernels = device_.kernels.of(op.weight->kind, rows);
  const int count = (rows + kernels.max_rows - 1) / kernels.max_rows, panels = op.weight->panels();
  // Activations that no second level cache holds are read once for several panels.
  const bool is_large = kernels.is_chunked && size_t(rows) * kernels.row_bytes(op.weight->padded_k) > kLargeBytes;
  const int together = std::min(kPanelsTogether, panels / (2 * device_.pool.size()));
  return {kernels, rows, count, op.next ? 2 : is_large && together > 1 ? together : 1};
}

void Tape::add(const Op& op) {
  const int index = int(ops_.size());
  ops_.push_back(op);
  if (!op.is_prepared) stages_.push_back({index, 0});
  if (op.code == LINEAR || op.code == ATTEND || op.code == DELTA || op.code == SCAN || op.code == LATENT) stages_.push_back({index, 1});
  if (op.code == LATENT) stages_.push_back({index, 2});
  for (int phase = 1; op.code == EXPERTS && phase < kExpertPhases; phase++) stages_.push_back({index, phase});
}

int Tape::phase_items(const Op& op, int rows, int phase) const {
  if (rows == 0) return 0;
  if (op.code == ASKED_ROWS) return 1;  // in place, so one after the other
  if (op.code == LINEAR && phase == 0) return blocks_of(op, rows).count;
  if (op.code == LINEAR) {
    const int together = blocks_of(op, rows).panels;
    return (op.weight->panels() + together - 1) / together;
  }
  if (op.code == CONV) return device_.num_rows * ((op.conv->channels + kConvChannels - 1) / kConvChannels);
  if ((op.code == DELTA || op.code == SCAN) && phase == 1) return device_.num_rows * op.shape->heads() * (op.shape->value_dim / kDeltaColumns);
  if (op.code == LATENT) return latent_items(op, rows, phase);
  if (op.code == EXPERTS) return expert_items(op, rows, phase);
  if (op.code == ATTEND) return int(phase == 0 ? device_.tile_runs.size() : op.plan->jobs.size());
  return rows;
}

void Tape::start(int rows) {
  is_drained_ = false;
  if (rows <= 0 || rows > device_.max_tokens) throw std::invalid_argument("a tape runs on 1 to max_tokens rows");
  const int given = rows;
  const RopeTable* ready = nullptr;
  for (Op& op : ops_) {
    const bool is_of_step = op.code == EMBED || op.code == ROPE || op.code == ATTEND || op.code == CONV || op.code == DELTA ||
                            op.code == SCAN || op.code == LATENT;
    if (op.code == ASKED_ROWS) rows = int(device_.asked.size());
    else if (is_of_step && rows != given) throw std::invalid_argument("an operation of all tokens after rows were left out");
    op.rows = rows;
    if ((is_of_step || op.code == ASKED_ROWS) && given != device_.num_tokens)
      throw std::invalid_argument("this tape needs the planned step's number of rows");
    // What was recorded must fit what is allocated: a weight loaded later, a table smaller than another, a layer too many.
    if (op.code == LINEAR && size_t(rows) * device_.kernels.of(op.weight->kind, rows).row_bytes(op.weight->padded_k) >
                                 (op.is_prepared ? device_.gated : device_.activations).size())
      throw std::invalid_argument("a linear weight wider than the buffers: capture again after loading it");
    if (op.code == EMBED && device_.max_token_id >= op.table->rows)
      throw std::invalid_argument("token id " + std::to_string(device_.max_token_id) + " outside the embedding table");
    if (op.code == ATTEND) {
      if (op.layer < 0 || size_t(op.layer) >= device_.kv_layers.size()) throw std::invalid_argument("a layer outside the KV pool");
      const KvLayer& layer = device_.kv_layers[size_t(op.layer)];
      if (op.heads <= 0 || op.heads % layer.kv_heads != 0 || size_t(rows) * op.heads * layer.head_dim * 4 > device_.queries.size())
        throw std::invalid_argument("query heads that do not fit the KV pool or the buffers");
      op.plan = &device_.plan_attention(op.heads, layer.kv_heads, op.window);
    }
    if (op.code == LATENT) {
      check_latent(op);
      op.plan = &device_.plan_attention(op.heads, 1, 0);
    }
    if (op.code == CONV || op.code == DELTA || op.code == SCAN) check_states(op);
    if (op.code == EXPERTS) check_experts(op);
    if ((op.code == ROPE || op.code == LATENT) && op.rope != ready) {
      device_.prepare_rope(*op.rope);
      ready = op.rope;
    }
  }
  const size_t threads = size_t(device_.pool.size());
  if (parts_.size() != stages_.size() * threads) parts_ = std::vector<Part>(stages_.size() * threads);
  for (size_t i = 0; i < stages_.size(); i++) {
    const Op& op = ops_[size_t(stages_[i].op)];
    const uint64_t items = uint64_t(phase_items(op, op.rows, stages_[i].phase));
    for (size_t t = 0; t < threads; t++)
      parts_[i * threads + t].range.store((items * t / threads) << 32 | items * (t + 1) / threads, std::memory_order_relaxed);
  }
}

void Tape::run(int rows) {
  if (device_.ahead == Device::PLANNED && rows == device_.num_tokens && device_.pool.join(*this)) {
    device_.ahead = Device::NONE;
    return;
  }
  device_.settle();
  start(rows);
  device_.pool.run(*this);
}

void Tape::run_to(int rows, const float* result, float* input, int width) {
  run(rows);
  bool are_left = false;  // nothing but asked rows
  for (const Op& op : ops_) are_left |= op.code == ASKED_ROWS;
  for (size_t i = 0; i < device_.asked.size(); i++)
    memcpy(input + i * size_t(width), result + (are_left ? i : size_t(device_.asked[i])) * size_t(width), size_t(width) * 4);
}

void Tape::run_then(int rows, Tape& head, const float* result, float* input, int width) {
  run_to(rows, result, input, width);
  head.run(int(device_.asked.size()));
}

void Tape::run_choosing(int rows, Tape& head, const float* result, float* input, int width, int vocab, const Masks& masks, int32_t* token_ids) {
  run_to(rows, result, input, width);
  head.choose(int(device_.asked.size()), vocab, masks, token_ids);
}

void Tape::choose(int rows, int vocab, const Masks& masks, int32_t* token_ids) {
  const Op& last = ops_.back();
  // The rules for what is not finite are the sampler's, and so are those for what a cap has made equal.
  auto choose_of_stored = [&](int width) {
    run(rows);
    SamplingRow greedy{};
    for (int r = 0; r < rows; r++) {
      greedy.allowed = masks.of(r);
      token_ids[r] = sample_row(device_.kernels, last.out + size_t(r) * width, vocab, greedy, device_.sampling[0]);
    }
  };
  if (last.code == SOFT_CAP && vocab > 0 && vocab <= last.width) return choose_of_stored(last.width);
  if (last.code != LINEAR || last.weight->gated || last.a || vocab <= 0 || vocab > last.weight->n)
    throw std::invalid_argument("tokens are chosen among the outputs of a last linear without residual, or of a cap after it");
  device_.settle();
  start(rows);
  for (Device::Work& work : device_.work) {
    if (work.chosen.size() < size_t(rows) * 2 * kPanel) work.chosen.resize(size_t(rows) * 2 * kPanel);
    for (int r = 0; r < rows; r++) {
      std::fill_n(&work.chosen[size_t(r) * 2 * kPanel], kPanel, -std::numeric_limits<float>::infinity());
      std::fill_n(&work.chosen[size_t(r) * 2 * kPanel + kPanel], kPanel, -1.f);
    }
    std::fill_n(work.unfit, kPanel, 0.f);
    work.last_panel = -1;
  }
  choose_below_ = vocab;
  choose_among_ = masks;
  device_.pool.run(*this);
  choose_below_ = 0;
  choose_among_ = {};
  bool is_fit = true;
  for (const Device::Work& work : device_.work)
    for (float x : work.unfit) is_fit &= x == x;
  if (!is_fit) return choose_of_stored(last.weight->n);
  for (int r = 0; r < rows; r++) {
    float largest = -std::numeric_limits<float>::infinity();
    int best = -1;
    for (const Device::Work& work : device_.work) {
      const float* kept = &work.chosen[size_t(r) * 2 * kPanel];
      for (int i = 0; i < kPanel; i++) {
        const int id = int(kept[kPanel + i]) * kPanel + i;
        if (kept[i] > largest || (kept[i] == largest && id >= 0 && id < best)) { largest = kept[i]; best = id; }
      }
    }
    token_ids[r] = best;
  }
}

bool Tape::begin_next(int num_rows, const int32_t* token_ids) {
  if (device_.pool.size() == 1 || !device_.advance(num_rows, token_ids)) return false;
  start(device_.num_tokens);
  device_.pool.begin(*this);
  device_.ahead = Device::BEGUN;
  return true;
}

void Tape::compute(int stage, int thread) {
  const Stage s = stages_[size_t(stage)];
  const Op& op = ops_[size_t(s.op)];
  Part* parts = &parts_[size_t(stage * device_.pool.size())];
  const Kernels& k = device_.kernels;
  const int rows = op.rows;
  switch (op.code) {
    case EMBED:
      share(parts, thread, [&](int i) {
        float* row = op.out + size_t(i) * op.table->columns;
        op.table->gather(device_.token_ids[size_t(i)], row);
        if (op.number != 1.f) for (int c = 0; c < op.table->columns; c++) row[c] *= op.number;
      });
      break;
    case RMS_NORM:
      share(parts, thread, [&](int i) {
        const size_t row = size_t(i) * op.width;
        k.rms_norm(op.x + row, op.a, op.number, op.width, op.b ? op.b + row : nullptr, op.out + row);
      });
      break;
    case LINEAR:
      if (s.phase == 0) prepare_rows(op, thread, parts);
      else compute_linear(op, thread, parts);
      break;
    case HEAD_NORM:
    case ROPE:
      share(parts, thread, [&](int i) {
        const int width = (op.heads + 2 * op.kv_heads) * op.head_dim, half = op.rope ? int(op.rope->inv_freq.size()) : 0;
        const size_t angles = size_t(device_.rope_positions[size_t(i)]) * size_t(half);
        const float* x = op.x + size_t(i) * width;
        float* y = op.out + size_t(i) * width;
        if (x != y) memcpy(y, x, size_t(width) * 4);
        if (op.is_joint) {
          const int queries = op.heads * op.head_dim;
          k.rms_norm(y, op.a, op.number, queries, nullptr, y);
          k.rms_norm(y + queries, op.b, op.number, op.kv_heads * op.head_dim, nullptr, y + queries);
          return;
        }
        for (int h = 0; h < op.heads + op.kv_heads; h++) {
          float* head = y + h * op.head_dim;
          if (op.code == HEAD_NORM) k.rms_norm(head, h < op.heads ? op.a : op.b, op.number, op.head_dim, nullptr, head);
          else k.rope(head, &op.rope->cosines[angles], &op.rope->sines[angles], half);
        }
        if (op.code == ROPE && op.rope->growth != 0) {
          const float temperature = op.rope->temperatures[size_t(device_.rope_positions[size_t(i)])];
          for (int c = 0; c < op.heads * op.head_dim; c++) y[c] *= temperature;
        }
      });
      break;
    case ATTEND:
      if (s.phase == 0) store_tokens(op, thread, parts);
      else share(parts, thread, [&](int index) {
        const AttendJob* job = &op.plan->jobs[size_t(index)];
        attend_job(op, *job, size_t(index) + 1 < op.plan->jobs.size() ? job + 1 : nullptr, rows, device_.work[size_t(thread)]);
      });
      break;
    case LATENT: latent_phase(op, s.phase, thread, parts); break;
    case CONV: share(parts, thread, [&](int i) { convolve(op, i); }); break;
    case DELTA:
      if (s.phase == 0) share(parts, thread, [&](int i) { make_units(op, i); });
      else share(parts, thread, [&](int i) { delta_columns(op, i); });
      break;
    case GATED_NORM:
      share(parts, thread, [&](int i) {
        for (int h = 0; h < op.heads; h++) {
          const size_t head = (size_t(i) * op.heads + h) * op.head_dim;
          k.rms_norm(op.x + head, op.b, op.number, op.head_dim, nullptr, op.out + head);
          k.silu_mul(op.out + head, op.a + head, op.head_dim, op.out + head);
        }
      });
      break;
    case SCAN:
      if (s.phase == 0) share(parts, thread, [&](int i) { make_gates(op, i); });
      else share(parts, thread, [&](int i) { scan_columns(op, i); });
      break;
    case SILU_MUL:
      share(parts, thread, [&](int i) {
        const size_t row = size_t(i) * op.width;
        k.silu_mul(op.x + row, op.a + row, op.width, op.out + row);
      });
      break;
    case SIGMOID_MUL:
      share(parts, thread, [&](int i) {
        const size_t row = size_t(i) * op.width;
        if (op.heads > 1) scale_row(op, i);
        else k.sigmoid_mul(op.x + row, op.a + row, op.width, op.out + row);
      });
      break;
    case ROUTE: share(parts, thread, [&](int i) { choose_experts(op, i); }); break;
    case EXPERTS: compute_experts(op, s.phase, stage, thread); break;
    case SOFT_CAP:
      share(parts, thread, [&](int i) {
        const size_t row = size_t(i) * op.width;
        k.soft_cap(op.x + row, op.width, op.cap, op.out + row);
      });
      break;
    case ASKED_ROWS:
      share(parts, thread, [&](int) {
        for (int i = 0; i < rows; i++) {  // never before its own place
          const float* x = op.x + size_t(device_.asked[size_t(i)]) * op.width;
          float* y = op.out + size_t(i) * op.width;
          if (x != y) memcpy(y, x, size_t(op.width) * 4);
        }
      });
      break;
  }
  const size_t next = size_t(stage) + 1;
  if (next < stages_.size() && stages_[next].op != s.op) fetch_panels(ops_[size_t(stages_[next].op)], thread, 0, kNextFetchBytes);
}

void Tape::finish() {
  if (device_.kernels.finish) device_.kernels.finish();
}

void Tape::drain() {
  is_drained_ = true;  // before the parts: whoever deals out others looks at it afterwards
  for (Part& part : parts_) part.range.store(0);
}

// Its stages, with the time at which each operation began on the calling thread. One that the others began while that slept has
// no time of its own: it counts as part of the one before.
class Tape::Timed : public Region {
 public:
  explicit Timed(Tape& tape) : began(tape.ops_.size() + 1), tape_(tape) {}
  int num_stages() const override { return tape_.num_stages(); }
  void compute(int stage, int thread) override {
    const Stage s = tape_.stages_[size_t(stage)];
    if (thread == 0 && (stage == 0 || tape_.stages_[size_t(stage) - 1].op != s.op)) began[size_t(s.op)] = std::chrono::steady_clock::now();
    tape_.compute(stage, thread);
  }
  void finish() override { tape_.finish(); }
  void drain() override { tape_.drain(); }
  std::vector<std::chrono::steady_clock::time_point> began;

 private:
  Tape& tape_;
};

std::vector<double> Tape::run_timed(int rows) {
  device_.settle();
  start(rows);
  Timed timed(*this);
  device_.pool.run(timed);
  timed.began.back() = std::chrono::steady_clock::now();
  for (size_t i = ops_.size(); i-- > 0;)
    if (timed.began[i] == std::chrono::steady_clock::time_point{}) timed.began[i] = timed.began[i + 1];
  std::vector<double> seconds(ops_.size());
  for (size_t i = 0; i < seconds.size(); i++) seconds[i] = std::chrono::duration<double>(timed.began[i + 1] - timed.began[i]).count();
  return seconds;
}

// What is fetched while `count` values of K from `first` on are multiplied with a row block, some lines at each step of K. With
// one block, what comes a little later in the same stream: the processor's own prefetcher alone leaves memory waiting. With
// more, parts of what is multiplied next.
Tape::Ahead Tape::ahead_of(const Product& x, int panel, int block, int first, int count) {
  const Linear& w = x.weight;
  const bool is_whole = count == w.padded_k;
  const size_t steps = size_t(count / kGroup);
  if (x.blocks.count == 1 && is_whole && !x.blocks.kernels.open)
    return {w.panel(panel) + stream_fetch_bytes(w.kind, x.blocks.rows), int((w.stride / 64 + steps - 1) / steps)};
  const char* next = w.panel(panel + 1) + panel_bytes(w.kind, first);
  if (panel + 1 == x.end && !is_whole) next = w.panel(x.begin) + panel_bytes(w.kind, first + count);
  const char* end = w.data.data() + w.data.size();
  const size_t bytes = panel_bytes(w.kind, count), all = steps * size_t(x.blocks.count), lines = (bytes / 64 + all - 1) / all;
  const size_t begin = size_t(block) * steps * lines * 64;
  if (begin >= bytes || next + begin >= end) return {nullptr, 0};
  return {next + begin, int(lines)};
}

// Where memory is the limit, it must not pause between operations. Only for one block of rows: more have arithmetic enough.
void Tape::fetch_panels(const Op& op, int thread, size_t from, size_t bytes) const {
  if (op.code != LINEAR || op.rows == 0 || blocks_of(op, op.rows).count > 1) return;
  const Linear& w = *op.weight;
  const size_t item = size_t(phase_items(op, op.rows, 1)) * size_t(thread) / size_t(device_.pool.size());
  const char* begin = w.panel(int(item) * blocks_of(op, op.rows).panels) + from;
  const char* end = std::min(begin + bytes, static_cast<const char*>(w.data.data() + w.data.size()));
  for (const char* p = begin; p < end; p += 64) device_.kernels.prefetch(p);
}

void Tape::prepare_rows(const Op& op, int thread, Part* parts) {
  const Kernels& k = device_.kernels;
  const Linear& w = *op.weight;
  const Blocks blocks = blocks_of(op, op.rows);
  const size_t row_size = blocks.kernels.row_bytes(w.padded_k);
  share(parts, thread, [&](int b) {
    const int r0 = blocks.first_row(b), r = blocks.first_row(b + 1) - r0;
    const float* x = op.x + size_t(r0) * w.k;
    if (op.b) {
      float* normed = device_.work[thread].rows.as<float>();
      for (int i = 0; i < r; i++) k.rms_norm(x + size_t(i) * w.k, op.b, op.number, w.k, nullptr, normed + size_t(i) * w.k);
      x = normed;
    }
    blocks.kernels.prepare(x, size_t(w.k), w.k, w.padded_k, device_.activations.data() + r0 * row_size, r);
  });
  // Threads without a block wait for those that have one: they begin to fetch the panels they will read.
  if (thread >= blocks.count) fetch_panels(op, thread, kNextFetchBytes, kIdleFetchBytes);
}

// Two panels of a gated weight give 32 columns: a group of the next linear's input, which is quantised here.
void Tape::gate_panels(const Op& op, const Blocks& blocks, int pair, int thread) {
  const Kernels& k = device_.kernels;
  const Linear &w = *op.weight, &next = *op.next;
  const RowKernels& down = k.of(next.kind, blocks.rows);
  const size_t next_size = down.row_bytes(next.padded_k);
  const int columns = std::min(kGroup, w.n - pair * kGroup);
  float* first_half = device_.work[size_t(thread)].half.as<float>();  // of all rows, while the second panel is read
  alignas(64) float group[kMaxRows * kGroup];
  const Product product{w, blocks, 2 * pair, columns > 16 ? 2 * pair + 2 : 2 * pair + 1, thread, device_.activations.data()};
  const auto gated = k.store_gated[w.gate];
  multiply(product, [&](int p, int r0, int r, const float* sums) {
    const int half = p - 2 * pair;
    const float* bias = w.bias.empty() ? nullptr : w.bias.data() + size_t(p) * kPanel;
    if ((half + 1) * 16 < columns) {
      gated(sums, r, 16, bias, first_half + size_t(r0) * 16, 16);
      return;
    }
    gated(sums, r, columns - half * 16, bias, group + half * 16, kGroup);
    if (half) for (int i = 0; i < r; i++) memcpy(group + i * kGroup, first_half + size_t(r0 + i) * 16, 64);
    down.prepare(group, kGroup, columns, kGroup, device_.gated.data() + size_t(r0) * next_size + size_t(pair) * down.group_bytes * size_t(r), r);
  });
}

// The words of panel `p` for `count` rows from `first` on. False if none of them has a mask.
static bool allowed_of(const Masks& masks, int first, int count, int p, uint32_t* words) {
  static_assert(kPanel == 32, "a panel of columns has one word of a mask");
  if (!masks.rows) return false;
  bool any = false;
  for (int r = 0; r < count; r++) {
    const uint32_t* mask = masks.of(first + r);
    words[r] = mask ? mask[p] : ~0u;
    any |= mask != nullptr;
  }
  return any;
}

void Tape::compute_linear(const Op& op, int thread, Part* parts) {
  const Kernels& k = device_.kernels;
  const Linear& w = *op.weight;
  const Blocks blocks = blocks_of(op, op.rows);
  if (op.next) {
    share(parts, thread, [&](int pair) { gate_panels(op, blocks, pair, thread); });
    return;
  }
  const char* prepared = (op.is_prepared ? device_.gated : device_.activations).data();
  const size_t width = size_t(w.n);
  Device::Work& work = device_.work[size_t(thread)];
  const bool is_streamed = !op.a && width * size_t(op.rows) * 4 > kStreamedBytes;
  share(parts, thread, [&](int item) {
    const int begin = item * blocks.panels, end = std::min(begin + blocks.panels, w.panels());
    multiply({w, blocks, begin, end, thread, prepared}, [&](int p, int r0, int r, const float* sums) {
      if (w.gated) {
        int column = p * 16, columns = std::min(16, w.n - column);
        k.store_gated[w.gate](sums, r, columns, w.bias.empty() ? nullptr : w.bias.data() + p * kPanel, op.out + r0 * width + column, width);
      } else {
        int column = p * kPanel, columns = std::min(kPanel, w.n - column);
        const float* bias = w.bias.empty() ? nullptr : w.bias.data() + column;
        float* out = op.out + r0 * width + column;
        if (choose_below_ && &op == &ops_.back()) {
          columns = std::min(columns, choose_below_ - column);
          if (columns > 0) {
            uint32_t allowed[kMaxRows];
            const bool is_masked = allowed_of(choose_among_, r0, r, p, allowed);
            k.keep_largest(sums, r, columns, bias, is_masked ? allowed : nullptr, p, p > work.last_panel,
                           &work.chosen[size_t(r0) * 2 * kPanel], work.unfit);
            if (r0 + r == op.rows) work.last_panel = std::max(work.last_panel, p);
          }
        } else if (is_streamed) k.stream(sums, r, columns, bias, out, width);
        else k.store(sums, r, columns, bias, op.a ? op.a + r0 * width + column : nullptr, out, width);
      }
    });
  });
}

void Tape::check_states(const Op& op) const {
  const Device& d = device_;
  if (op.layer < 0 || size_t(op.layer) >= d.state_layers.size()) throw std::invalid_argument("a layer that keeps no state");
  if (int(d.row_state.size()) != d.num_rows) throw std::invalid_argument("a step without states of a model that has some");
  const StateLayer& layer = d.state_layers[size_t(op.layer)];
  if (op.code == CONV && (op.conv->columns != layer.columns || op.conv->channels != layer.channels))
    throw std::invalid_argument("a convolution of another shape than its layer keeps");
  if (op.code == CONV) return;
  const DeltaShape& shape = *op.shape;
  if (shape.heads() != layer.heads || shape.key_dim != layer.key_dim || shape.value_dim != layer.value_dim)
    throw std::invalid_argument("a delta rule of another shape than its layer keeps");
  if (size_t(op.rows) * size_t(2 * shape.keys() + 2 * shape.heads()) * 4 > d.units.size())
    throw std::invalid_argument("a delta rule wider than the buffers");
}

// `count` floats at `offset` of a row's state, from token to token: f(first, tokens, floats) for each piece, in the slot in
// which they are to be after it.
template <class F> void Tape::go_on(int row, size_t offset, size_t count, F f) {
  Device& d = device_;
  const int first = d.row_first[size_t(row)];
  const bool begins = d.positions[size_t(first)] == 0;
  const float* before = begins ? nullptr : d.state(d.row_state[size_t(row)]) + offset;
  int at = 0;
  for (const StatePiece& piece : d.row_pieces[size_t(row)]) {
    float* now = d.state(piece.slot) + offset;
    if (!before) std::fill(now, now + count, 0.f);
    else if (before != now) memcpy(now, before, count * 4);
    f(first + at, piece.end - at, now);
    before = now;
    at = piece.end;
  }
}

void Tape::convolve(const Op& op, int index) {
  Device& d = device_;
  const ConvWeight& w = *op.conv;
  const int parts = (w.channels + kConvChannels - 1) / kConvChannels, row = index / parts;
  const int begin = index % parts * kConvChannels, end = std::min(w.channels, begin + kConvChannels);
  const size_t channels = size_t(w.channels), stride = op.is_gated ? 3 * channels : channels;
  const size_t offset = d.state_layers[size_t(op.layer)].conv;
  const int first_row = d.row_first[size_t(row)];
  const bool begins = d.positions[size_t(first_row)] == 0;
  const float* before = begins ? nullptr : d.state(d.row_state[size_t(row)]) + offset;
  int at = 0;
  for (const StatePiece& piece : d.row_pieces[size_t(row)]) {
    float* now = d.state(piece.slot) + offset;
    for (int i = 0; i + 1 < w.columns; i++) {  // its own channels alone: others compute the rest
      float* to = now + size_t(i) * channels + begin;
      if (!before) std::fill(to, to + (end - begin), 0.f);
      else if (before != now) memcpy(to, before + size_t(i) * channels + begin, size_t(end - begin) * 4);
    }
    const size_t token = size_t(first_row + at);
    d.kernels.convolve({op.x + token * stride, stride, piece.end - at, w.channels, begin, end, w.columns, op.is_gated, w.weight.data(),
                        w.bias.data(), now, op.out + token * channels});
    before = now;
    at = piece.end;
  }
}

static double softplus_of(float x, float bias) {
  const double a = double(x) + double(bias);
  return a > 0 ? a + std::log1p(std::exp(-a)) : std::log1p(std::exp(a));
}

// [queries | keys] of length one of a token, then for each head what is kept of the state, and beta.
void Tape::make_units(const Op& op, int token) {
  const Device& d = device_;
  const DeltaShape& s = *op.shape;
  const size_t width = size_t(2 * s.keys() + 2 * s.heads());
  float* out = const_cast<float*>(d.units.as<float>()) + size_t(token) * width;
  const float* x = op.x + size_t(token) * size_t(s.width());
  const float scale = 1.f / __builtin_sqrtf(float(s.key_dim));
  for (int h = 0; h < 2 * s.num_key_heads; h++)
    d.kernels.unit(x + h * s.key_dim, s.key_dim, h < s.num_key_heads ? scale : 1.f, out + h * s.key_dim);
  float* gates = out + 2 * s.keys();
  const float* ba = op.a + size_t(token) * size_t(2 * s.heads());
  for (int h = 0; h < s.heads(); h++) {
    const double softplus = softplus_of(ba[s.heads() + h], op.decay->dt_bias[size_t(h)]);
    gates[2 * h] = float(std::exp(double(op.decay->decay[size_t(h)]) * softplus));
    gates[2 * h + 1] = float(1.0 / (1.0 + std::exp(-double(ba[h]))));
  }
}

// For each head what is kept of its state, and how much of its values is added.
void Tape::make_gates(const Op& op, int token) {
  const Device& d = device_;
  const int heads = op.shape->heads();
  float* out = const_cast<float*>(d.units.as<float>()) + size_t(token) * size_t(2 * heads);
  const float* dt = op.a + size_t(token) * size_t(heads);
  for (int h = 0; h < heads; h++) {
    const double softplus = softplus_of(dt[h], op.decay->dt_bias[size_t(h)]);
    out[2 * h] = float(std::exp(double(op.decay->decay[size_t(h)]) * softplus));
    out[2 * h + 1] = float(softplus);
  }
}

void Tape::scan_columns(const Op& op, int index) {
  Device& d = device_;
  const DeltaShape& s = *op.shape;
  const int blocks = s.value_dim / kDeltaColumns, block = index % blocks, head = index / blocks % s.heads(), row = index / blocks / s.heads();
  const size_t width = size_t(2 * s.heads()), count = size_t(s.key_dim) * kDeltaColumns;
  const size_t offset = d.state_layers[size_t(op.layer)].delta + (size_t(head) * blocks + block) * count;
  const int column = head * s.value_dim + block * kDeltaColumns;
  go_on(row, offset, count, [&](int first, int tokens, float* state) {
    const float* x = op.x + size_t(first) * size_t(s.width());
    const float* q = x + s.key_heads[size_t(head)] * s.key_dim;
    d.kernels.scan({q, q + s.keys(), x + 2 * s.keys() + column, d.units.as<float>() + size_t(first) * width + 2 * head,
                    op.decay->skip[size_t(head)], size_t(s.width()), width, size_t(s.values()), tokens, s.key_dim, state,
                    op.out + size_t(first) * size_t(s.values()) + column});
  });
}

void Tape::delta_columns(const Op& op, int index) {
  Device& d = device_;
  const DeltaShape& s = *op.shape;
  const int blocks = s.value_dim / kDeltaColumns, block = index % blocks, head = index / blocks % s.heads(), row = index / blocks / s.heads();
  const size_t width = size_t(2 * s.keys() + 2 * s.heads()), count = size_t(s.key_dim) * kDeltaColumns;
  const size_t offset = d.state_layers[size_t(op.layer)].delta + (size_t(head) * blocks + block) * count;
  const int column = head * s.value_dim + block * kDeltaColumns;
  go_on(row, offset, count, [&](int first, int tokens, float* state) {
    const float* units = d.units.as<float>() + size_t(first) * width;
    const float* q = units + s.key_heads[size_t(head)] * s.key_dim;
    const float* v = op.x + size_t(first) * size_t(s.width()) + 2 * s.keys() + column;
    d.kernels.delta_rule({q, q + s.keys(), v, units + 2 * s.keys() + 2 * head, width, size_t(s.width()), width, size_t(s.values()), tokens,
                          s.key_dim, state, op.out + size_t(first) * size_t(s.values()) + column});
  });
}

void Tape::store_tokens(const Op& op, int thread, Part* parts) {
  Device& d = device_;
  const Kernels& k = d.kernels;
  const KvLayer& layer = d.kv_layers[size_t(op.layer)];
  const int rows = op.rows, D = layer.head_dim, group = op.heads / layer.kv_heads, width = (op.heads + 2 * layer.kv_heads) * D;
  const size_t q_bytes = query_bytes(layer.type, D);
  auto query = [&](int kv_head, int token) { return d.queries.data() + (size_t(kv_head) * rows + token) * group * q_bytes; };
  const std::vector<AttendJob>& jobs = op.plan->jobs;
  if (jobs.size() >= size_t(d.pool.size())) {  // the first block of a thread's first job comes while others are stored
    const Tiles tiles = first_tiles(op, jobs[jobs.size() * size_t(thread) / size_t(d.pool.size())]);
    for (int t = 0; t < tiles.count; t++)
      for (size_t i = 0; i < layer.tile_bytes; i += 64) k.prefetch(tiles.start[t] + i);
  }
  share(parts, thread, [&](int index) {
    const TileRun& run = d.tile_runs[index];
    const int tile = d.token_tile[run.first_token], first_slot = d.positions[run.first_token] % kTile;
    for (int h = 0; h < layer.kv_heads; h++) {
      char *kt = d.k_tile(op.layer, tile, h), *vt = d.v_tile(op.layer, tile, h);
      // a tile's first token clears its values: past the last token they are multiplied by exact zeros, so must be finite
      if (first_slot == 0) memset(vt, 0, v_tile_bytes(layer.type, D));
      for (int i = run.first_token; i < run.first_token + run.tokens; i++) {
        const float* x = op.x + size_t(i) * width;
        k.prepare_queries[layer.type](x + h * group * D, group, D, query(h, i));
        k.store_kv[layer.type](x + (op.heads + h) * D, x + (op.heads + layer.kv_heads + h) * D, D, kt, vt,
                              first_slot + i - run.first_token);
      }
    }
  });
}

// The tiles of a block that a segment's members share.
Tape::Tiles Tape::tiles_of(const Op& op, const AttendSegment& segment, int block, int kv_head) const {
  const Device& d = device_;
  const AttendMember& member = op.plan->members[size_t(segment.first_member)];
  const int last = d.positions[member.first_token + member.tokens - 1];
  Tiles tiles{};
  tiles.count = std::min(kBlockTiles, (last - block * kBlock) / kTile + 1);
  for (int t = 0; t < tiles.count; t++) {
    const int tile = d.row_tiles[size_t(member.row)][size_t(block) * kBlockTiles + t];
    tiles.start[t] = d.k_tile(op.layer, tile, kv_head);
    tiles.k[t] = tiles.start[t];
    tiles.v[t] = d.v_tile(op.layer, tile, kv_head);
  }
  return tiles;
}

Tape::Tiles Tape::first_tiles(const Op& op, const AttendJob& job) const {
  const AttendSegment& segment = op.plan->segments[size_t(job.first_segment)];
  return tiles_of(op, segment, segment.first_block, job.kv_head);
}

// `following` is the job that this thread most likely does next; null if there is none.
void Tape::attend_job(const Op& op, const AttendJob& job, const AttendJob* following, int rows, Device::Work& w) {
  Device& d = device_;
  const AttendPlan& plan = *op.plan;
  const Kernels& k = d.kernels;
  const KvLayer& layer = d.kv_layers[size_t(op.layer)];
  const int D = layer.head_dim, group = op.heads / layer.kv_heads, value_dim = layer.is_latent ? op.latent.rank : D;
  const size_t q_bytes = query_bytes(layer.type, D);
  const auto attend = layer.is_latent ? k.attend_latent[layer.type] : k.attend_block[layer.type];
  const AttendMember* members = plan.members.data() + job.first_member;
  auto query = [&](int token) {
    return d.queries.data() + ((size_t(job.kv_head) * rows + token) * group + job.first_q) * q_bytes;
  };
  // A query row is a token's query head. Those of one member lie together; of several, they are brought together.
  const char* queries = query(members[0].first_token);
  int n = 0;
  for (int m = 0; m < job.num_members; m++) {
    const AttendMember& member = members[m];
    const int count = member.tokens * job.num_q;
    if (job.num_members > 1) memcpy(w.queries.data() + n * q_bytes, query(member.first_token), count * q_bytes);
    for (int i = 0; i < count; i++) w.positions[size_t(n + i)] = d.positions[member.first_token + i / job.num_q];
    n += count;
  }
  if (job.num_members > 1) queries = w.queries.data();
  float* out = w.out.as<float>();
  float* lanes = w.lanes.as<float>();
  float* maxima = w.maxima.as<float>();
  std::fill(out, out + size_t(n) * D, 0.f);
  std::fill(lanes, lanes + n * 16, 0.f);
  std::fill(maxima, maxima + n, -1e30f);
  // A sink comes before all keys, as if a block of it alone had been attended: with the weight one, and nothing to sum up.
  if (op.sinks) for (int i = 0; i < n; i++) {
    maxima[i] = op.sinks[job.kv_head * group + job.first_q + i % job.num_q] * 1.44269504f;
    lanes[i * 16] = 1.f;
  }

  const AttendSegment* segment = plan.segments.data() + job.first_segment;
  const AttendSegment* const end = segment + job.num_segments;
  const int tile_lines = int(layer.tile_bytes / 64);
  Tiles now{}, next{};
  if (segment != end) now = tiles_of(op, *segment, segment->first_block, job.kv_head);
  for (; segment != end; segment++) {
    int first = 0, count = 0;
    for (int m = job.first_member; m < segment->first_member; m++) first += plan.members[size_t(m)].tokens * job.num_q;
    for (int m = 0; m < segment->num_members; m++) count += plan.members[size_t(segment->first_member + m)].tokens * job.num_q;
    for (int b = segment->first_block; b < segment->end_block; b++) {
      if (b + 1 < segment->end_block) next = tiles_of(op, *segment, b + 1, job.kv_head);
      else if (segment + 1 != end) next = tiles_of(op, segment[1], segment[1].first_block, job.kv_head);
      else next = following ? first_tiles(op, *following) : Tiles{};
      AttendBlock block{queries + size_t(first) * q_bytes, w.positions.data() + first, now.k, now.v, next.start, next.count,
                        tile_lines, count, now.count, b * kBlock, D, op.window, value_dim, op.number * 1.44269504f,
                        out + size_t(first) * D, lanes + first * 16, maxima + first, w.scores.as<float>(), w.weights.data()};
      if (op.cap != 0.f) { block.inner = op.number / op.cap; block.outer = op.cap / op.number; }
      attend(block);
      now = next;
    }
  }
  n = 0;
  for (int m = 0; m < job.num_members; m++)
    for (int i = 0; i < members[m].tokens * job.num_q; i++, n++) {
      const int token = members[m].first_token + i / job.num_q, head = job.kv_head * group + job.first_q + i % job.num_q;
      // Sums of latents take the place of the queries that they are of, which nobody else reads.
      float* results = layer.is_latent ? d.queries.as<float>() : op.out;
      k.finish_attention(out + size_t(n) * D, lanes + n * 16, value_dim, results + (size_t(token) * op.heads + head) * D);
    }
}

}  // namespace mooli
