// A recorded sequence of operations, replayed for any number of rows in one parallel region: Python records it once per
// model and is not on the path of an operation. Owns the order; buffers belong to whoever recorded it.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "device.h"
#include "experts.h"

namespace mooli {

class Tape : private Region {
 public:
  explicit Tape(Device& device) : device_(device) {}
  ~Tape() override { device_.pool.abandon(); }
  Tape(const Tape&) = delete;
  // Addresses are of float32 rows, max rows each; strides are the widths. All must outlive the tape.
  void embed(const Embedding* table, float scale, float* out);
  // `residual` may be null, or be added; `out` may be it.
  void rms_norm(const float* x, const float* weight, float eps, int width, const float* residual, float* out);
  // `norm` may be null, or the weight of an RMS norm that each row of x goes through first.
  void linear(const float* x, const Linear* weight, const float* norm, float eps, const float* residual, float* out);
  // A gated linear whose result is nothing but the input of `down`: it leaves rows as that multiplies them, and no float32
  // of them is ever stored. Both must be of integer kinds, whose row blocks are the same.
  void gated_linear_down(const float* x, const Linear* gated, const float* norm, float eps, const Linear* down, const float* residual, float* out);
  // Of every head on its own; where it is joint, of the queries of all heads together, and of the keys of all.
  void head_norm(const float* x, const float* q_weight, const float* k_weight, float eps, int heads, int kv_heads, int head_dim, bool is_joint, float* out);
  void rope(const float* x, RopeTable* table, int heads, int kv_heads, int head_dim, float* out);
  // `sinks` may be null, or have a score for each head of something that all tokens see first and that has no value.
  // cap: 0, or what scores stay below.
  void attend(int layer, const float* qkv, int heads, float scale, int window, float cap, const float* sinks, float* out);
  // Queries, and latents as they are projected, of which what is kept is made with the gain `norm`.
  void attend_latent(int layer, const float* q, const float* latent, const float* norm, float eps, const LatentWeight* up, RopeTable* rope,
                     const LatentShape& shape, float scale, float* out);
  // layer: of those that keep a state.
  void conv(int layer, const float* x, const ConvWeight* weight, bool is_gated, float* out);
  void delta(int layer, const float* qkv, const float* gates, const DeltaWeight* weight, const DeltaShape* shape, float* out);
  // gates: (rows, heads); the shape's queries, keys and values are those of a row, as of a delta rule.
  void scan(int layer, const float* qkv, const float* gates, const DeltaWeight* weight, const DeltaShape* shape, float* out);
  void gated_norm(const float* x, const float* gate, const float* weight, float eps, int heads, int head_dim, float* out);
  // is_one: a row has one gate for all its values.
  void sigmoid_mul(const float* x, const float* gate, int width, bool is_one, float* out);
  // A row of `out` has the experts of a row of logits as int32, best first, then their weights. `correction` may be empty.
  void route(const float* logits, const RouteShape* shape, const std::vector<float>* correction, float* out);
  // `slots`: experts of a row of `routing`. `residual` may be null, or be added; `out` may be it.
  void experts(const float* x, const float* routing, int slots, const Experts* weight, const float* residual, float* out);
  void silu_mul(const float* x, const float* gate, int width, float* out);
  void soft_cap(const float* x, float cap, int width, float* out);
  // The rows of the planned step's asked tokens, and only those in all operations after it. `out` may be x.
  void asked_rows(const float* x, int width, float* out);
  // Compute all operations on `rows` rows (the planned step's tokens where operations depend on the step), or what is left
  // of them where they have begun.
  void run(int rows);
  // This tape on the planned step, then `head` on the asked tokens' rows of `result`, copied to its `input`, without the caller
  // in between. `width`: floats of a row.
  void run_then(int rows, Tape& head, const float* result, float* input, int width);
  // The same for the token below `vocab` with the largest logit of each row among those its mask allows, which the last operation
  // of `head` must be a linear or a soft cap for; -1 where the logits hold a NaN or nothing above -inf. Logits are stored only if some are not
  // finite.
  void run_choosing(int rows, Tape& head, const float* result, float* input, int width, int vocab, const Masks& masks, int32_t* token_ids);
  // Let the other threads begin with the step after the planned one, see Device::advance. It becomes what is computed if it is
  // planned next, and is abandoned if anything else is done. False where it cannot begin.
  bool begin_next(int num_rows, const int32_t* token_ids);
  // The same, timed on the calling thread: seconds spent in each operation, barriers included.
  std::vector<double> run_timed(int rows);
  size_t num_asked() const { return device_.asked.size(); }
  static const char* name(int code);
  int code(size_t i) const { return ops_[i].code; }
  size_t size() const { return ops_.size(); }

 private:
  enum Code { EMBED, RMS_NORM, LINEAR, HEAD_NORM, ROPE, ATTEND, ASKED_ROWS, CONV, DELTA, GATED_NORM, SIGMOID_MUL, SCAN, SILU_MUL, LATENT,
              ROUTE, EXPERTS, SOFT_CAP };
  // How the rows of a linear are cut into blocks, each one call of a kernel.
  struct Blocks {
    const RowKernels& kernels;
    int rows, count, panels;  // panels: that a thread multiplies together
    int first_row(int block) const { return int(int64_t(rows) * block / count); }
  };
  // Tiles of a block of keys and values: where each begins, its keys (the same place) and its values.
  struct Tiles {
    const void *k[kBlockTiles], *v[kBlockTiles];
    const char* start[kBlockTiles];
    int count;
  };
  struct Ahead { const char* start; int lines; };  // lines at each step of K
  // Panels [begin, end) of a weight, times rows as `activations` has them.
  struct Product { const Linear& weight; const Blocks& blocks; int begin, end, thread; const char* activations; };
  struct Op {
    Code code;
    const float *x = nullptr, *a = nullptr, *b = nullptr;
    float* out = nullptr;
    const Linear* weight = nullptr;
    const Linear* next = nullptr;  // of a gated linear: for which it prepares its result
    bool is_prepared = false;      // of the linear after it
    const Embedding* table = nullptr;
    RopeTable* rope = nullptr;
    const ConvWeight* conv = nullptr;
    const DeltaWeight* decay = nullptr;
    const DeltaShape* shape = nullptr;
    const float* sinks = nullptr;
    const LatentWeight* up = nullptr;
    LatentShape latent{};
    bool is_gated = false, is_joint = false;
    const RouteShape* route = nullptr;
    const std::vector<float>* correction = nullptr;
    const Experts* experts = nullptr;
    const AttendPlan* plan = nullptr;  // in the run that was started last
    int width = 0, heads = 0, kv_heads = 0, head_dim = 0, layer = 0, window = 0;
    float number = 0, eps = 0, cap = 0;
    int rows = 0;  // in the run that was started last
  };
  // What is left of one thread's part of a phase: [begin, end). The owner takes from the front, so that it streams through
  // consecutive memory; a thread that has finished its own part takes from the back of others.
  struct alignas(64) Part { std::atomic<uint64_t> range{0}; };

  // Of an operation: the first prepares what the second computes from.
  struct Stage { int op, phase; };
  class Timed;

  int num_stages() const override { return int(stages_.size()); }
  void compute(int stage, int thread) override;
  void finish() override;
  void drain() override;
  static Ahead ahead_of(const Product& x, int panel, int block, int first, int count);
  void add(const Op& op);
  void start(int rows);
  Blocks blocks_of(const Op& op, int rows) const;
  int phase_items(const Op& op, int rows, int phase) const;
  void compute_linear(const Op& op, int thread, Part* parts);
  void fetch_panels(const Op& op, int thread, size_t from, size_t bytes) const;
  void prepare_rows(const Op& op, int thread, Part* parts);
  template <class F> void multiply(const Product& x, F f) const;
  void run_to(int rows, const float* result, float* input, int width);
  void choose(int rows, int vocab, const Masks& masks, int32_t* token_ids);
  void gate_panels(const Op& op, const Blocks& blocks, int pair, int thread);
  void store_tokens(const Op& op, int thread, Part* parts);
  Tiles tiles_of(const Op& op, const AttendSegment& segment, int block, int kv_head) const;
  Tiles first_tiles(const Op& op, const AttendJob& job) const;
  void attend_job(const Op& op, const AttendJob& job, const AttendJob* following, int rows, Device::Work& work);
  void check_latent(const Op& op) const;
  int latent_blocks(const Linear& weight, int rows) const;
  int latent_items(const Op& op, int rows, int phase) const;
  void latent_phase(const Op& op, int phase, int thread, Part* parts);
  void store_latents(const Op& op, const TileRun& run);
  void absorb_queries(const Op& op, int item, Device::Work& work);
  void latent_values(const Op& op, int item, Device::Work& work);
  template <class F> void multiply_head(const Linear& weight, const float* x, size_t stride, int rows, Device::Work& work, F f) const;
  void check_states(const Op& op) const;
  void convolve(const Op& op, int index);
  void make_units(const Op& op, int token);
  void delta_columns(const Op& op, int index);
  void make_gates(const Op& op, int token);
  void scan_columns(const Op& op, int index);
  int expert_items(const Op& op, int rows, int phase) const;
  void check_experts(const Op& op);
  void choose_experts(const Op& op, int row) const;
  void scale_row(const Op& op, int row) const;
  void compute_experts(const Op& op, int phase, int stage, int thread);
  void plan_experts(const Op& op, int stage);
  void deal_out(int stage, int items, bool is_down, bool is_weighed);
  void prepare_experts(const Op& op, bool is_down, int item, int thread) const;
  void multiply_experts(const Op& op, bool is_down, int item, int thread) const;
  void add_results(const Op& op, int item) const;
  void fetch_expert(const Op& op, bool is_down, int item, size_t bytes) const;
  template <class F> void go_on(int row, size_t offset, size_t count, F f);
  template <class F> void share(Part* parts, int thread, F f);

  Device& device_;
  std::vector<Op> ops_;
  std::vector<Stage> stages_;
  std::vector<Part> parts_;  // stage x thread
  ExpertPlan expert_plan_;   // of the mixture being computed
  std::atomic<bool> is_drained_{false};
  int choose_below_ = 0;     // of what the last linear computes, only the largest of each row among so many columns is kept; 0: all
  Masks choose_among_;       // and only of the columns allowed
};

// f(item) for each item of a thread's part, then for those that others have left.
template <class F> void Tape::share(Part* parts, int thread, F f) {
  const int threads = device_.pool.size();
  for (;;) {
    uint64_t range = parts[thread].range.load(std::memory_order_relaxed);
    if (uint32_t(range >> 32) >= uint32_t(range)) break;
    if (parts[thread].range.compare_exchange_weak(range, range + (uint64_t(1) << 32), std::memory_order_relaxed)) f(int(range >> 32));
  }
  for (int victim = (thread + 1) % threads; victim != thread; victim = (victim + 1) % threads)
    for (;;) {
      uint64_t range = parts[victim].range.load(std::memory_order_relaxed);
      if (uint32_t(range >> 32) >= uint32_t(range)) break;
      if (parts[victim].range.compare_exchange_weak(range, range - 1, std::memory_order_relaxed)) f(int(uint32_t(range)) - 1);
    }
}

// f(panel, first row, rows, sums of rows x 32). Where K is cut into chunks, a chunk of all panels is multiplied with all
// row blocks before the next: its weights stay in the first level cache and activations in the second.
template <class F> void Tape::multiply(const Product& x, F f) const {
  const Linear& w = x.weight;
  const Blocks& blocks = x.blocks;
  const RowKernels& k = blocks.kernels;
  const size_t row_size = k.row_bytes(w.padded_k);
  const Device::Work& work = device_.work[size_t(x.thread)];
  const int chunk = k.is_chunked ? kChunk : w.padded_k;
  alignas(64) float tile[kMaxRows * kPanel];
  auto sums = [&](int panel, int block) {  // kernels load and store more rows than a block has
    return k.is_chunked ? work.sums.as<float>() + (size_t(panel - x.begin) * blocks.count + block) * kMaxRows * kPanel : tile;
  };
  for (int first = 0; first < w.padded_k; first += chunk) {
    const int count = std::min(chunk, w.padded_k - first);
    for (int p = x.begin; p < x.end; p++) {
      const char* panel = w.panel(p) + panel_bytes(w.kind, first);
      if (k.open) {
        k.open(panel, count, work.opened.data());
        panel = work.opened.data();
      }
      for (int b = 0; b < blocks.count; b++) {
        const int r0 = blocks.first_row(b), r = blocks.first_row(b + 1) - r0;
        const Ahead ahead = ahead_of(x, p, b, first, count);
        const char* activations = x.activations + size_t(r0) * row_size + k.row_bytes(first) * size_t(r);
        (first ? k.gemm_more : k.gemm)[r](activations, panel, count, sums(p, b), ahead.start, ahead.lines);
        if (!k.is_chunked) f(p, r0, r, tile);
      }
    }
  }
  if (!k.is_chunked) return;
  for (int p = x.begin; p < x.end; p++)
    for (int b = 0; b < blocks.count; b++) f(p, blocks.first_row(b), blocks.first_row(b + 1) - blocks.first_row(b), sums(p, b));
}

}  // namespace mooli
