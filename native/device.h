// The processor as a device: threads, kernels, packed weights, the paged KV pool, and the plan of the step being computed.
// Owns memory and the step's host arrays; never knows a model: a model is a Tape of operations.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "formats.h"
#include "kernels.h"
#include "sampler.h"
#include "thread_pool.h"
#include "work_queue.h"

namespace mooli {

const Kernels& select_kernels(const std::string& isa);  // "" for the best this processor has
std::vector<std::string> available_isas();              // worst first

// A packed weight of n outputs and k inputs. `gated` interleaves 16 gate and 16 up columns in each panel.
struct Linear {
  Linear(Slabs& memory, int kind, int n, int k, bool gated);
  Linear(const Linear&) = delete;
  // What one takes, without its bias.
  static size_t bytes(int kind, int n, int k, bool gated);
  int panels() const { return panels(n, gated); }
  static int panels(int n, bool gated) { return (gated ? (n + 15) / 16 : (n + kPanel - 1) / kPanel); }
  char* panel(int p) const { return data.data() + size_t(p) * stride; }
  // Where output row `row` of part 0 (gate, or the only one) or 1 (up) lies.
  void locate(int part, int row, int& p, int& column) const {
    if (gated) { p = row / 16; column = row % 16 + 16 * part; }
    else { p = row / kPanel; column = row % kPanel; }
  }
  Kind kind;
  int n, k, padded_k;
  bool gated;
  Gate gate = SILU;  // of a gated one
  size_t stride;
  Buffer data;
  std::vector<float> bias;  // empty, or one per output padded to whole panels
};

// What makes keys and values of latents: of each head, a weight of `rank` outputs for queries, and one of value_dim outputs
// for sums of latents.
struct LatentWeight {
  std::vector<const Linear*> keys, values;
};

// Multi-head latent attention; a row of queries has of each head [nope | rope].
struct LatentShape {
  int heads, rank, nope, rope, value_dim;
  int width() const { return rank + rope; }
};

// Rows kept in the checkpoint's own format, or those of a head that is tied to it, and decoded when gathered.
struct Embedding {
  Embedding(Format format, int rows, int columns);
  explicit Embedding(const Linear& head);
  void gather(int row, float* out) const;
  Format format;
  int rows, columns;
  Buffer data;
  const Linear* head = nullptr;  // whose outputs the rows are; there is no data then
};

struct RopeTable {
  std::vector<double> inv_freq;
  double factor = 1;  // of cosines and sines
  double growth = 0;  // where it is not 0, queries are multiplied by 1 + growth * ln(1 + floor(position / period))
  int period = 1;
  std::vector<float> cosines, sines;  // (positions met so far, head_dim / 2)
  std::vector<float> temperatures;    // of queries; (positions met so far) where there is a growth
};

// The keys and values of one layer. Of what all layers keep of a tile, its own begin at `offset`: kv_heads times tile_bytes, of
// which the first k_bytes are keys. Latents are one head, whose keys and values lie in the same place.
struct KvLayer {
  KvType type;
  bool is_latent;
  int kv_heads, head_dim;
  size_t offset, tile_bytes, k_bytes;
};

// What one layer keeps of a sequence besides pages, in floats from a slot's begin on: the last inputs of a convolution,
// (columns - 1, channels), then for each head and each kDeltaColumns of its values (key_dim, kDeltaColumns).
struct StateLayer {
  int columns, channels, heads, key_dim, value_dim;  // heads 0: a convolution alone
  size_t conv, delta;
};

// (columns, channels) and a bias.
struct ConvWeight {
  int columns, channels;
  std::vector<float> weight, bias;
};

// Of each head: decay, what is added to a before the softplus, and of a scan what part of its input goes past the state.
struct DeltaWeight {
  std::vector<float> decay, dt_bias, skip;
};

struct DeltaShape {
  int num_key_heads, key_dim, value_dim;
  std::vector<int> key_heads;  // of each head of values
  int heads() const { return int(key_heads.size()); }
  int keys() const { return num_key_heads * key_dim; }
  int values() const { return heads() * value_dim; }
  int width() const { return 2 * keys() + values(); }
};

// Tokens of a row up to which its state goes on in `slot`; the next piece goes on from there in another.
struct StatePiece { int end, slot; };

// Consecutive tokens of a step that lie in one KV tile.
struct TileRun { int first_token, tokens; };

constexpr int kPanelsTogether = 8;  // most panels of a linear that one thread multiplies chunk by chunk

constexpr int kQueryTokens = 16;  // of a row, most that are attended together
constexpr int kJobRows = 60;      // query rows that a job of several members has at most

// Consecutive tokens of one row, whose queries of one kv head are attended together.
struct AttendMember { int row, first_token, tokens; };
// Blocks that consecutive members of a job have in common, down to the blocks of one member alone.
struct AttendSegment { int first_member, num_members, first_block, end_block; };
// What one thread attends at a time: members that share a prefix walk it together. first_q, num_q: of the kv head's query
// heads; first_segment, num_segments: in the order in which blocks must be merged.
struct AttendJob { int kv_head, first_member, num_members, first_q, num_q, first_segment, num_segments; int64_t cost; };
// The planned step as attention of one kind computes it: layers of different heads or windows have each their own.
struct AttendPlan {
  int num_heads, kv_heads, window;
  std::vector<AttendMember> members;
  std::vector<AttendSegment> segments;
  std::vector<AttendJob> jobs;
};

class Device {
 public:
  Device(int num_threads, std::vector<int> cpus, const std::string& isa);
  Device(const Device&) = delete;

  void pack(Linear& w, int part, int first_row, Format format, const uint8_t* rows, size_t row_stride, int num_rows);
  void fill(Embedding& table, const uint8_t* rows, size_t row_stride);
  // kv_heads, head_dims: of each layer; 0 and the width of one that keeps latents.
  void allocate_kv(int kv_type, const std::vector<int>& kv_heads, const std::vector<int>& head_dims, int page_size, int64_t num_pages);
  void allocate_scratch(int max_tokens, int max_k, int num_heads, int head_dim);
  // For mixtures of experts: `slots` experts of a row, `hidden` and `inner` the widest of them.
  void allocate_experts(int max_tokens, int slots, int hidden, int inner);
  void copy_page(int source, int target, int tokens);
  // conv: columns and channels of each layer that keeps a state; delta: heads, key_dim and value_dim of each, 0 without.
  void allocate_states(const std::vector<std::vector<int>>& conv, const std::vector<std::vector<int>>& delta, int64_t num_slots);
  void copy_state(int source, int target);
  // A state as bytes, and from such bytes. Throws std::invalid_argument for a slot out of range, and if these are not as many
  // bytes as a state has.
  void read_state(int slot, char* out, size_t bytes);
  void write_state(int slot, const char* data, size_t bytes);
  // Where the states of the planned step's rows are and go: `saves` has (row, tokens of it, slot) of those kept besides, by row
  // and token. Throws std::invalid_argument on an index out of range. A step without is of a model without.
  void plan_states(const int32_t* slots, int num_slots, const int32_t* saves, int num_saves);
  float* state(int slot) { return states.as<float>() + size_t(slot) * state_floats; }
  // Pages as bytes, one behind the other, and pages from such bytes. `tokens`: how many they hold, counted from the first one's
  // first; those behind them are as if zeros had been stored. Throws std::invalid_argument on an index out of range, and if
  // there are not as many bytes as pages have.
  void read_pages(const int32_t* pages, size_t count, int64_t tokens, char* out, size_t bytes);
  void write_pages(const int32_t* pages, size_t count, const char* data, size_t bytes);
  void release();  // give back KV pool and scratch
  // Take over the host arrays of a step. Throws std::invalid_argument on an index out of range.
  // `asked`: ascending, the tokens whose hidden states are wanted. `rope_positions`: where rotations say that tokens are.
  void plan(int num_tokens, const int32_t* token_ids, const int32_t* positions, const int32_t* rope_positions, int num_rows, const int32_t* lengths,
            const int32_t* page_table, int pages_per_row, int num_asked, const int32_t* asked, int vocab_size);
  // Make the plan of the step that follows if each row has one token more, `ids`. False, and nothing done, if these are not as
  // many as rows, one is below 0, or a row has no page for it.
  bool advance(int count, const int32_t* ids);
  // Nobody computes ahead when this returns. What had begun must be planned before it can be computed.
  void settle();
  // The plan for one kind of attention, made when it is first asked for in a step, and valid until the next step is planned.
  const AttendPlan& plan_attention(int num_heads, int kv_heads, int window);
  void prepare_rope(RopeTable& rope) const;

  // All layers of a tile lie together: a new page touches new memory once, and not once in every layer's region.
  char* k_tile(int layer, int tile, int head) const {
    const KvLayer& l = kv_layers[size_t(layer)];
    return kv.data() + size_t(tile) * all_layers_bytes + l.offset + size_t(head) * l.tile_bytes;
  }
  char* v_tile(int layer, int tile, int head) const { return k_tile(layer, tile, head) + kv_layers[size_t(layer)].k_bytes; }
  size_t page_bytes() const { return size_t(page_size / kTile) * all_layers_bytes; }
  static void clear_v(const KvLayer& layer, char* tile, int from);

  ThreadPool pool;
  const Kernels& kernels;

  std::vector<KvLayer> kv_layers;
  size_t all_layers_bytes = 0;  // of a tile
  int page_size = 0;
  int64_t num_pages = 0, num_tiles = 0;
  Buffer kv;

  std::vector<StateLayer> state_layers;
  size_t state_floats = 0;  // of a slot
  size_t units_width = 0;   // floats of a token
  int64_t num_states = 0;
  Buffer states;

  // the step
  std::vector<std::vector<StatePiece>> row_pieces;
  std::vector<int> row_state;  // the slot that a row goes on from; empty where none is planned
  int num_tokens = 0, num_rows = 0, max_token_id = 0;
  // Whether a tape has begun with the step before it was planned, and whether it then was.
  enum { NONE, BEGUN, PLANNED } ahead = NONE;
  int64_t num_begun_steps = 0;  // that were planned
  std::vector<int32_t> token_ids, positions, rope_positions, asked, token_tile, row_first, row_length;
  std::vector<std::vector<int32_t>> row_tiles;
  std::vector<int32_t> next_tile;  // of the token that would follow each row; -1 where the row has none for it
  std::vector<TileRun> tile_runs;
  std::vector<std::unique_ptr<RopeTable>> ropes;

  // scratch
  int max_tokens = 0;
  Buffer activations;  // prepared rows of the linear being computed
  Buffer gated;        // prepared rows that a gated linear leaves for the one after it
  Buffer units;        // of the delta rule being computed: queries and keys of length one, and gates, of each token
  Buffer expert_rows;   // prepared rows of each expert, of its first products and then of its second
  Buffer expert_values;  // float32: what a gated linear gives of each, and then what the expert gives
  Buffer queries;      // (kv_heads, tokens, group, head_dim) of the attention being computed
  struct Work {
    Buffer rows, half, opened, sums, out, lanes, maxima, scores, weights, queries;
    Buffer latent;  // prepared rows of one head, where there are latents
    std::vector<int> positions;
    // Of the rows whose tokens are chosen while their logits are computed: see Kernels::keep_largest.
    std::vector<float> chosen;
    float unfit[kPanel];
    int last_panel;
  };
  std::vector<Work> work;
  std::vector<SamplerScratch> sampling;  // one a thread
  WorkQueue packing;                     // the last member: its jobs use the others

 private:
  void check_pages(const int32_t* pages, size_t count, size_t bytes) const;
  void check_state(int slot, size_t bytes) const;
  int last_position(const AttendMember& m) const { return positions[m.first_token + m.tokens - 1]; }
  int full_blocks(const AttendMember& m) const { return (last_position(m) + 1) / kBlock; }
  int tile_of(const int32_t* pages, int pages_per_row, int tile) const;
  bool is_planned_already(int num_tokens, const int32_t* ids, const int32_t* pos, const int32_t* rope_pos, int num_rows, const int32_t* lengths,
                          const int32_t* page_table, int pages_per_row, int num_asked, const int32_t* asked_tokens) const;
  int shared_blocks(const AttendMember& a, const AttendMember& b, int from) const;
  void add_segments(AttendPlan& plan, int first, int count, int block) const;
  void add_job(AttendPlan& plan, int kv_head, int first_member, int num_members, int first_q, int num_q) const;

  // Those of the planned step come first; the others keep their memory for steps to come.
  std::vector<std::unique_ptr<AttendPlan>> attend_plans_;
  size_t num_attend_plans_ = 0;
};

}  // namespace mooli
