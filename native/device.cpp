#include "device.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <stdexcept>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(MOOLI_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mooli {

#if defined(__aarch64__)
namespace {

// The dot product of ARMv8.2, optional until ARMv8.4.
bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which older headers lack
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  return true;  // every Mac with an Arm processor has it
#else
  return false;
#endif
}

}  // namespace
#endif

#if defined(__x86_64__)
namespace {

// What the processor has and the system keeps for a process, read from both: `__builtin_cpu_supports` knows nothing in
// programs that are linked without GCC's own library.
class Processor {
 public:
  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &one_, &d) || !(one_ & 1u << 27)) return;  // OSXSAVE: the system says what it keeps
    uint32_t low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    kept_ = low;
    if (!__get_cpuid_count(7, 0, &a, &b_, &c_, &d_)) return;
    if (a >= 1) __get_cpuid_count(7, 1, &a1_, &b, &c, &d);
  }

  bool has_avx2() const { return keeps(0x6) && all(one_, 12, 29) && all(b_, 5); }  // FMA, F16C; AVX2
  bool has_avx_vnni() const { return all(a1_, 4); }
  bool has_avx512() const { return keeps(0xe6) && all(b_, 16, 17, 30, 31) && all(c_, 11); }  // F, DQ, BW, VL; VNNI
  bool has_avx512_bf16() const { return all(a1_, 5); }
  // Tiles of bfloat16 and of bytes. Linux gives them to a process that asks for them, once.
  bool has_tiles() const {
#if defined(MOOLI_AMX)
    constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, which older headers lack
    return keeps(0x600e6) && all(d_, 22, 24, 25) && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
    return false;
#endif
  }

 private:
  bool keeps(uint32_t states) const { return (kept_ & states) == states; }
  template <class... Bits> static bool all(unsigned word, Bits... bits) { return (... && (word >> bits & 1)); }

  // Leaf 1, ecx; leaf 7, ebx, ecx and edx; leaf 7.1, eax.
  unsigned one_ = 0, b_ = 0, c_ = 0, d_ = 0, a1_ = 0;
  uint32_t kept_ = 0;
};

}  // namespace
#endif

std::vector<std::string> available_isas() {
  std::vector<std::string> names{"scalar"};
#if defined(__x86_64__)
  const Processor processor;
  if (processor.has_avx2()) {
    names.push_back("avx2");
#if defined(MOOLI_AVX2_VNNI)
    if (processor.has_avx_vnni()) names.push_back("avx2_vnni");
#endif
    if (processor.has_avx512()) {
      names.push_back("avx512");
      if (processor.has_avx512_bf16()) {
        names.push_back("avx512_bf16");
        if (processor.has_tiles()) names.push_back("amx");
      }
    }
  }
#elif defined(__aarch64__)
  if (has_dot_product()) names.push_back("neon");
#endif
  return names;
}

const Kernels& select_kernels(const std::string& isa) {
  auto names = available_isas();
  std::string want = isa.empty() ? names.back() : isa;
  if (std::find(names.begin(), names.end(), want) == names.end())
    throw std::invalid_argument("instruction set '" + want + "' is not available on this processor");
#if defined(__x86_64__)
#if defined(MOOLI_AMX)
  if (want == "amx") return kernels_amx();
#endif
  if (want == "avx512_bf16") return kernels_avx512_bf16();
  if (want == "avx512") return kernels_avx512();
#if defined(MOOLI_AVX2_VNNI)
  if (want == "avx2_vnni") return kernels_avx2_vnni();
#endif
  if (want == "avx2") return kernels_avx2();
#elif defined(__aarch64__)
  if (want == "neon") return kernels_neon();
#endif
  return kernels_scalar();
}

namespace {
int padded(int k) { return (k + kGroup - 1) / kGroup * kGroup; }
}

Linear::Linear(Slabs& memory, int kind_, int n_, int k_, bool gated_) : kind(Kind(kind_)), n(n_), k(k_), gated(gated_) {
  const size_t all = bytes(kind_, n, k, gated);
  padded_k = padded(k);
  stride = panel_bytes(kind, padded_k);
  data = memory.take(all);
}

size_t Linear::bytes(int kind, int n, int k, bool gated) {
  if (kind < 0 || kind >= kNumKinds || n <= 0 || k <= 0) throw std::invalid_argument("bad kind or shape of a linear weight");
  // one line beyond the end: the prefetch of the last panel
  return panel_bytes(Kind(kind), padded(k)) * size_t(panels(n, gated)) + 64;
}

Embedding::Embedding(Format format_, int rows_, int columns_)
    : format(format_), rows(rows_), columns(columns_), data(row_bytes(format, columns) * rows) {}

Embedding::Embedding(const Linear& head_) : format(kF32), rows(head_.n), columns(head_.k), head(&head_) {
  if (head->gated || !head->bias.empty()) throw std::invalid_argument("not a head, whose outputs are rows of a table");
}

void Embedding::gather(int row, float* out) const {
  if (!head) {
    decode_row(format, (const uint8_t*)data.data() + size_t(row) * row_bytes(format, columns), columns, out);
    return;
  }
  int p, column;
  head->locate(0, row, p, column);
  unpack_column(head->kind, head->panel(p), columns, column, out);
}

Device::Device(int num_threads, std::vector<int> cpus, const std::string& isa)
    : pool(num_threads, std::move(cpus)), kernels(select_kernels(isa)), sampling(size_t(pool.size())) {}

void Device::pack(Linear& w, int part, int first_row, Format format, const uint8_t* rows, size_t row_stride, int num_rows_) {
  int limit = w.n;
  if (first_row < 0 || num_rows_ < 0 || first_row > limit || num_rows_ > limit - first_row || part < 0 || part > (w.gated ? 1 : 0))
    throw std::invalid_argument("rows outside the linear weight");
  if (w.k % block_values(format) != 0 || row_stride < row_bytes(format, w.k))
    throw std::invalid_argument("row length does not fit the storage format");
  if (num_rows_ == 0) return;
  const int per_panel = w.gated ? 16 : kPanel;
  const int p0 = first_row / per_panel, p1 = (first_row + num_rows_ - 1) / per_panel + 1;
  std::atomic<int> next{p0};
  pool.run([&](int) {
    for (int p; (p = next.fetch_add(1)) < p1;) {
      const int row = std::max(first_row, p * per_panel), end = std::min(first_row + num_rows_, (p + 1) * per_panel);
      int at, column;
      w.locate(part, row, at, column);
      pack_columns(w.kind, format, rows + size_t(row - first_row) * row_stride, row_stride, end - row, w.k, w.padded_k, w.panel(at), column,
                   kernels.quantize_q4);
    }
  });
}

void Device::fill(Embedding& table, const uint8_t* rows, size_t row_stride) {
  const size_t bytes = row_bytes(table.format, table.columns);
  constexpr int kTogether = 256;
  std::atomic<int> next{0};
  pool.run([&](int) {  // by all threads: most of the time goes into pages that nobody has touched
    for (int first; (first = next.fetch_add(kTogether)) < table.rows;)
      for (int row = first; row < std::min(table.rows, first + kTogether); row++)
        memcpy(table.data.data() + row * bytes, rows + row * row_stride, bytes);
  });
}

void Device::allocate_kv(int type, const std::vector<int>& kv_heads, const std::vector<int>& head_dims, int page_size_, int64_t pages) {
  if (type < KV_F32 || (type > KV_BF16 && type != KV_INT8) || kv_heads.empty() || kv_heads.size() != head_dims.size() || page_size_ <= 0 ||
      pages <= 0)
    throw std::invalid_argument("bad shape of a KV pool");
  for (size_t i = 0; i < kv_heads.size(); i++) {
    if (kv_heads[i] < 0 || head_dims[i] <= 0 || (kv_heads[i] == 0 && type == KV_INT8)) throw std::invalid_argument("bad shape of a KV pool");
    if (page_size_ % kTile != 0 || head_dims[i] % 16 != 0) throw std::invalid_argument("page size or head size does not fit the kernels");
    if (type == KV_INT8 && head_dims[i] > kMaxInt8HeadDim) throw std::invalid_argument("head size too large for int8 keys and values");
  }
  settle();
  // No step may run on a pool whose allocation failed.
  num_pages = num_tiles = num_tokens = 0;
  page_size = page_size_;
  kv_layers.clear();
  all_layers_bytes = 0;
  for (size_t i = 0; i < kv_heads.size(); i++) {
    const bool is_latent = kv_heads[i] == 0;
    KvLayer layer{KvType(type), is_latent, is_latent ? 1 : kv_heads[i], head_dims[i], all_layers_bytes, 0, 0};
    if (type == KV_BF16 && kernels.has_bf16_dot && layer.head_dim % 32 == 0 && !is_latent) layer.type = KV_BF16_DOT;
    layer.k_bytes = is_latent ? 0 : k_tile_bytes(layer.type, layer.head_dim);
    layer.tile_bytes = layer.k_bytes + v_tile_bytes(layer.type, layer.head_dim);
    kv_layers.push_back(layer);
    if (__builtin_add_overflow(all_layers_bytes, size_t(layer.kv_heads) * layer.tile_bytes, &all_layers_bytes)) throw std::bad_alloc();
  }
  const int64_t tiles = page_size / kTile;
  size_t bytes;
  if (pages > INT32_MAX / tiles || __builtin_mul_overflow(all_layers_bytes, size_t(pages * tiles), &bytes) ||
      bytes > size_t(INT64_MAX))
    throw std::bad_alloc();
  kv = Buffer(bytes);
  num_pages = pages;
  num_tiles = pages * tiles;
}

void Device::allocate_states(const std::vector<std::vector<int>>& conv, const std::vector<std::vector<int>>& delta, int64_t num_slots) {
  settle();
  num_states = 0;
  state_layers.clear();
  state_floats = 0;
  if (conv.size() != delta.size() || num_slots < 0 || num_slots > INT32_MAX) throw std::invalid_argument("bad shape of states");
  size_t widest = 0;
  for (size_t i = 0; i < conv.size(); i++) {
    StateLayer layer{conv[i].at(0), conv[i].at(1), delta[i].at(0), delta[i].at(1), delta[i].at(2), state_floats, 0};
    if (layer.columns < 2 || layer.columns > kMaxConvColumns || layer.channels <= 0 || layer.channels % kConvLanes || layer.heads < 0)
      throw std::invalid_argument("bad shape of a convolution's state");
    if (layer.heads && (layer.key_dim <= 0 || layer.key_dim % 4 || layer.value_dim <= 0 || layer.value_dim % kDeltaColumns))
      throw std::invalid_argument("bad shape of a delta rule's state");
    layer.delta = layer.conv + (size_t(layer.columns - 1) * size_t(layer.channels) + 15) / 16 * 16;
    state_floats = layer.delta + size_t(layer.heads) * size_t(layer.key_dim) * size_t(layer.value_dim);
    state_floats = (state_floats + 15) / 16 * 16;
    widest = std::max(widest, size_t(layer.channels) + 2 * size_t(layer.heads));
    state_layers.push_back(layer);
  }
  size_t bytes;
  if (__builtin_mul_overflow(state_floats * 4, size_t(num_slots), &bytes) || bytes > size_t(INT64_MAX)) throw std::bad_alloc();
  states = Buffer(bytes);
  units_width = widest;
  num_states = num_slots;
}

void Device::copy_state(int source, int target) {
  if (source < 0 || target < 0 || source >= num_states || target >= num_states) throw std::invalid_argument("a state outside the slots");
  settle();
  if (source != target) memcpy(state(target), state(source), state_floats * 4);
}

void Device::check_state(int slot, size_t bytes) const {
  if (slot < 0 || slot >= num_states) throw std::invalid_argument("a state outside the slots");
  if (bytes != state_floats * 4) throw std::invalid_argument(std::to_string(bytes) + " bytes are not those of a state");
}

void Device::read_state(int slot, char* out, size_t bytes) {
  check_state(slot, bytes);
  settle();  // what has begun may be changing states
  memcpy(out, state(slot), bytes);
}

void Device::write_state(int slot, const char* data, size_t bytes) {
  check_state(slot, bytes);
  settle();
  memcpy(state(slot), data, bytes);
}

void Device::plan_states(const int32_t* slots, int num_slots, const int32_t* saves, int num_saves) {
  row_state.clear();
  if (num_slots != num_rows) throw std::invalid_argument("not a state for each row");
  row_pieces.resize(size_t(num_rows));
  int next = 0;
  for (int r = 0; r < num_rows; r++) {
    auto& pieces = row_pieces[size_t(r)];
    pieces.clear();
    if (slots[r] < 0 || slots[r] >= num_states) throw std::invalid_argument("a state outside the slots");
    for (int before = 0; next < num_saves && saves[3 * next] == r; next++) {
      const int end = saves[3 * next + 1], slot = saves[3 * next + 2];
      if (end <= before || end > row_length[size_t(r)]) throw std::invalid_argument("a state is kept where its row computes nothing");
      if (slot < 0 || slot >= num_states) throw std::invalid_argument("a state outside the slots");
      pieces.push_back({end, slot});
      before = end;
    }
    pieces.push_back({row_length[size_t(r)], slots[r]});
  }
  if (next != num_saves) throw std::invalid_argument("states to keep are not in the order of rows");
  row_state.assign(slots, slots + num_slots);
}

void Device::allocate_scratch(int max_tokens_, int max_k, int num_heads, int head) {
  settle();
  max_tokens = 0;  // no step may run on buffers whose allocation failed
  const size_t beyond = 256 + kMaxRows * size_t(head) * 4;  // what kernels read behind the last row and do not use
  activations = Buffer(size_t(max_tokens_) * ((max_k + 31) / 32 * 32) * 4 + beyond);
  int group_bytes = 0;
  for (int kind = 0; is_integer(Kind(kind)); kind++)
    group_bytes = std::max({group_bytes, kernels.few[kind].group_bytes, kernels.many[kind].group_bytes});
  gated = Buffer(size_t(max_tokens_) * ((max_k + 31) / 32) * group_bytes + beyond);
  queries = Buffer(size_t(max_tokens_) * num_heads * head * 4 + beyond);
  units = Buffer(size_t(max_tokens_) * units_width * 4);
  const size_t rows = std::max<size_t>(size_t(kQueryTokens) * num_heads, kJobRows);
  bool has_latents = false;
  for (const KvLayer& layer : kv_layers) has_latents |= layer.is_latent;
  work.resize(pool.size());
  for (auto& w : work) {
    if (has_latents) w.latent = Buffer(size_t(kMaxRows) * padded(max_k) * 4 + beyond);
    w.rows = Buffer(size_t(kMaxRows) * max_k * 4);
    w.opened = Buffer(panel_bytes(F32, kChunk));
    w.sums = Buffer(size_t(kPanelsTogether) * (size_t(max_tokens_) + kMaxRows) * kPanel * 4);
    w.half = Buffer(size_t(max_tokens_) * 16 * 4);
    w.out = Buffer(rows * head * 4);
    w.queries = Buffer(rows * head * 4);
    w.positions.resize(rows);
    w.lanes = Buffer(rows * 64);
    w.maxima = Buffer(rows * 4);
    w.scores = Buffer(size_t(kMaxRows) * kBlock * 4);
    w.weights = Buffer(size_t(kMaxRows) * kBlock * 4);
  }
  max_tokens = max_tokens_;
}

void Device::allocate_experts(int max_tokens_, int slots, int hidden, int inner) {
  settle();
  const size_t rows = size_t(max_tokens_) * size_t(slots), beyond = 256 + kMaxRows * size_t(std::max(hidden, inner)) * 4;
  expert_rows = Buffer(rows * size_t(padded(std::max(hidden, inner))) * 4 + beyond);
  expert_values = Buffer(rows * size_t(std::max(hidden, inner)) * 4);
}

void Device::release() {
  settle();
  kv = Buffer();
  states = Buffer();
  units = Buffer();
  num_states = 0;
  activations = Buffer();
  gated = Buffer();
  expert_rows = Buffer();
  expert_values = Buffer();
  queries = Buffer();
  work.clear();
  num_pages = num_tiles = max_tokens = num_tokens = 0;
}

void Device::clear_v(const KvLayer& layer, char* tile, int from) {
  const int head_dim = layer.head_dim;
  if (layer.type == KV_INT8) {  // a scale of zero makes values zero whatever their codes
    memset(tile + size_t(kTile) * head_dim + from * 4, 0, size_t(kTile - from) * 4);
  } else if (layer.type == KV_BF16_DOT) {
    uint16_t* v = (uint16_t*)tile;
    for (int d = 0; d < head_dim; d++)
      for (int t = from; t < kTile; t++) v[size_t(d / 32) * kTile * 32 + size_t(t / 2) * 64 + (d % 32) * 2 + (t & 1)] = 0;
  } else {
    size_t row = size_t(head_dim) * kv_element_bytes(layer.type);
    memset(tile + from * row, 0, (kTile - from) * row);
  }
}

void Device::copy_page(int source, int target, int tokens) {
  if (source < 0 || target < 0 || source >= num_pages || target >= num_pages || tokens < 0 || tokens > page_size)
    throw std::invalid_argument("page copy out of range");
  settle();
  const int per_page = page_size / kTile;
  for (int i = 0; i < int(kv_layers.size()); i++) {
    const KvLayer& layer = kv_layers[size_t(i)];
    for (int t = 0; t * kTile < tokens; t++) {
      int from = source * per_page + t, to = target * per_page + t;
      memcpy(k_tile(i, to, 0), k_tile(i, from, 0), size_t(layer.kv_heads) * layer.tile_bytes);
      int keep = std::min(tokens - t * kTile, kTile);
      if (keep < kTile)  // values past the copied tokens are multiplied by exact zeros: they must be finite
        for (int h = 0; h < layer.kv_heads; h++) clear_v(layer, v_tile(i, to, h), keep);
    }
  }
}

void Device::check_pages(const int32_t* pages, size_t count, size_t bytes) const {
  for (size_t i = 0; i < count; i++)
    if (pages[i] < 0 || pages[i] >= num_pages) throw std::invalid_argument("page " + std::to_string(pages[i]) + " outside the pool");
  if (num_pages == 0 || bytes % page_bytes() != 0 || bytes / page_bytes() != count)
    throw std::invalid_argument(std::to_string(bytes) + " bytes are not those of " + std::to_string(count) + " pages");
}

void Device::read_pages(const int32_t* pages, size_t count, int64_t tokens, char* out, size_t bytes) {
  check_pages(pages, count, bytes);
  if (tokens < 0 || tokens > int64_t(count) * page_size) throw std::invalid_argument("more tokens than the pages hold");
  settle();  // what has begun may be storing behind their tokens
  const size_t stride = page_bytes();
  const int per_page = page_size / kTile;
  size_t largest = 0;
  int widest = 0;
  for (const KvLayer& layer : kv_layers) {
    largest = std::max(largest, layer.tile_bytes);
    widest = std::max(widest, layer.head_dim);
  }
  Buffer tile(largest);
  const std::vector<float> zeros(size_t(widest), 0.f);
  for (size_t i = 0; i < count; i++, out += stride) {
    memcpy(out, k_tile(0, pages[i] * per_page, 0), stride);
    for (int t = 0; t < per_page; t++) {
      const int64_t left = tokens - int64_t(i) * page_size - int64_t(t) * kTile;
      char* at = out + size_t(t) * all_layers_bytes;
      if (left <= 0) memset(at, 0, all_layers_bytes);
      if (left <= 0 || left >= kTile) continue;
      for (const KvLayer& layer : kv_layers)
        for (int h = 0; h < layer.kv_heads; h++, at += layer.tile_bytes) {  // in memory that is aligned, which `out` need not be
          memcpy(tile.data(), at, layer.tile_bytes);
          if (layer.is_latent) clear_v(layer, tile.data(), int(left));
          else for (int token = int(left); token < kTile; token++)
            kernels.store_kv[layer.type](zeros.data(), zeros.data(), layer.head_dim, tile.data(), tile.data() + layer.k_bytes, token);
          memcpy(at, tile.data(), layer.tile_bytes);
        }
    }
  }
}

void Device::write_pages(const int32_t* pages, size_t count, const char* data, size_t bytes) {
  check_pages(pages, count, bytes);
  settle();  // what has begun may be storing into pages that have changed hands since
  for (size_t i = 0; i < count; i++)
    memcpy(k_tile(0, pages[i] * (page_size / kTile), 0), data + i * page_bytes(), page_bytes());
}

void Device::plan(int tokens, const int32_t* ids, const int32_t* pos, const int32_t* rope_pos, int rows, const int32_t* lengths,
                  const int32_t* page_table, int pages_per_row, int num_asked, const int32_t* asked_tokens, int vocab_size) {
  if (ahead == BEGUN && is_planned_already(tokens, ids, pos, rope_pos, rows, lengths, page_table, pages_per_row, num_asked, asked_tokens)) {
    for (int r = 0; r < rows; r++) next_tile[r] = tile_of(page_table + size_t(r) * pages_per_row, pages_per_row, (positions[r] + 1) / kTile);
    ahead = PLANNED;
    num_begun_steps++;
    return;
  }
  settle();
  row_state.clear();
  num_tokens = num_rows = 0;  // nothing runs on a step that was refused
  if (tokens <= 0 || rows <= 0) throw std::invalid_argument("a step without tokens");
  if (tokens > max_tokens) throw std::invalid_argument("step of " + std::to_string(tokens) + " tokens, buffers for " + std::to_string(max_tokens));
  for (int i = 0; i < num_asked; i++)
    if (asked_tokens[i] <= (i ? asked_tokens[i - 1] : -1) || asked_tokens[i] >= tokens)
      throw std::invalid_argument("asked tokens must be ascending and lie in the step");
  asked.assign(asked_tokens, asked_tokens + num_asked);
  token_ids.assign(ids, ids + tokens);
  positions.assign(pos, pos + tokens);
  rope_positions.assign(rope_pos, rope_pos + tokens);
  token_tile.resize(tokens);
  row_first.resize(rows);
  row_length.assign(lengths, lengths + rows);
  row_tiles.resize(rows);
  next_tile.resize(rows);
  // Tables of angles reach to the largest.
  const int64_t most_rope = int64_t(std::max(num_pages, int64_t(pages_per_row))) * page_size;
  int first = 0;
  max_token_id = 0;
  for (int r = 0; r < rows; r++) {
    row_first[r] = first;
    if (lengths[r] <= 0 || lengths[r] > tokens - first) throw std::invalid_argument("row lengths do not add up to the step's tokens");
    const int last = pos[first + lengths[r] - 1], tiles = last / kTile + 1;
    if (pos[first] < 0 || last < pos[first] || last / page_size >= pages_per_row)
      throw std::invalid_argument("a row's positions lie outside its pages");
    if (last - pos[first] != lengths[r] - 1) throw std::invalid_argument("a row's positions are not consecutive");
    auto& table = row_tiles[r];
    table.resize(tiles);
    const int32_t* pages = page_table + size_t(r) * pages_per_row;
    for (int t = 0; t < tiles; t++) {
      table[t] = tile_of(pages, pages_per_row, t);
      if (table[t] < 0) throw std::invalid_argument("page " + std::to_string(pages[t / (page_size / kTile)]) + " outside the pool");
    }
    next_tile[r] = tile_of(pages, pages_per_row, (last + 1) / kTile);
    for (int i = first; i < first + lengths[r]; i++) {
      if (ids[i] < 0 || ids[i] >= vocab_size) throw std::invalid_argument("token id " + std::to_string(ids[i]) + " outside the vocabulary");
      if (pos[i] != pos[first] + i - first) throw std::invalid_argument("a row's positions are not consecutive");
      if (rope_pos[i] < 0 || rope_pos[i] >= most_rope)
        throw std::invalid_argument("rotary position " + std::to_string(rope_pos[i]) + " outside the tokens of the pool");
      max_token_id = std::max(max_token_id, ids[i]);
      token_tile[i] = table[pos[i] / kTile];
    }
    first += lengths[r];
  }
  if (first != tokens) throw std::invalid_argument("row lengths do not add up to the step's tokens");
  tile_runs.clear();
  for (int i = 0; i < tokens; i++) {
    if (i > 0 && token_tile[i] == token_tile[i - 1] && pos[i] == pos[i - 1] + 1) tile_runs.back().tokens++;
    else tile_runs.push_back({i, 1});
  }
  num_tokens = tokens;
  num_rows = rows;
  num_attend_plans_ = 0;
}

// A row's tile in the pool; -1 where its pages do not say, or say one outside the pool.
int Device::tile_of(const int32_t* pages, int pages_per_row, int tile) const {
  const int per_page = page_size / kTile, index = tile / per_page;
  if (index >= pages_per_row || pages[index] < 0 || pages[index] >= num_pages) return -1;
  return pages[index] * per_page + tile % per_page;
}

// Whether that is what `advance` has made: one token a row, all asked for.
bool Device::is_planned_already(int tokens, const int32_t* ids, const int32_t* pos, const int32_t* rope_pos, int rows,
                                const int32_t* lengths, const int32_t* page_table, int pages_per_row, int num_asked,
                                const int32_t* asked_tokens) const {
  if (tokens != num_tokens || rows != num_rows || num_asked != tokens) return false;
  for (int r = 0; r < rows; r++) {
    if (lengths[r] != 1 || asked_tokens[r] != r || ids[r] != token_ids[r] || pos[r] != positions[r]) return false;
    if (rope_pos[r] != rope_positions[r]) return false;
    for (size_t t = 0; t < row_tiles[r].size(); t++)
      if (row_tiles[r][t] != tile_of(page_table + size_t(r) * pages_per_row, pages_per_row, int(t))) return false;
  }
  return true;
}

bool Device::advance(int count, const int32_t* ids) {
  // A step that is given up again must not have written to states.
  if (ahead != NONE || num_rows == 0 || count != num_rows || !row_state.empty()) return false;
  for (int r = 0; r < count; r++)
    if (ids[r] < 0 || next_tile[r] < 0) return false;
  std::vector<int32_t> next(static_cast<size_t>(count)), next_rope(static_cast<size_t>(count));
  for (int r = 0; r < count; r++) {
    next[r] = positions[row_first[r] + row_length[r] - 1] + 1;
    next_rope[r] = rope_positions[row_first[r] + row_length[r] - 1] + 1;
  }
  positions.swap(next);
  rope_positions.swap(next_rope);
  token_ids.assign(ids, ids + count);
  token_tile = next_tile;
  max_token_id = *std::max_element(ids, ids + count);
  tile_runs.clear();
  asked.resize(count);
  for (int r = 0; r < count; r++) {
    if (positions[r] / kTile == int(row_tiles[r].size())) row_tiles[r].push_back(token_tile[r]);
    row_first[r] = asked[r] = r;
    row_length[r] = 1;
    tile_runs.push_back({r, 1});
  }
  num_tokens = count;
  num_attend_plans_ = 0;
  return true;
}

void Device::settle() {
  if (ahead == BEGUN) num_tokens = num_rows = 0;
  ahead = NONE;
  pool.abandon();
}

void Device::prepare_rope(RopeTable& rope) const {
  const size_t half = rope.inv_freq.size(), wanted = size_t(*std::max_element(rope_positions.begin(), rope_positions.begin() + num_tokens)) + 1;
  for (size_t position = rope.cosines.size() / half; position < wanted; position++)
    for (double frequency : rope.inv_freq) {
      const double angle = double(position) * frequency;
      rope.cosines.push_back(float(std::cos(angle) * rope.factor));
      rope.sines.push_back(float(std::sin(angle) * rope.factor));
    }
  if (rope.growth == 0) return;
  for (size_t position = rope.temperatures.size(); position < wanted; position++)
    rope.temperatures.push_back(float(1 + rope.growth * std::log1p(double(position / size_t(rope.period)))));
}

// How many whole blocks from `from` on two members read from the same tiles.
int Device::shared_blocks(const AttendMember& a, const AttendMember& b, int from) const {
  const int most = std::min(full_blocks(a), full_blocks(b));
  const int32_t *x = row_tiles[a.row].data(), *y = row_tiles[b.row].data();
  int block = from;
  while (block < most && memcmp(x + block * kBlockTiles, y + block * kBlockTiles, kBlockTiles * sizeof(int32_t)) == 0) block++;
  return block - from;
}

// The blocks from `block` on of members that are sorted by their tiles: what all share, then what parts of them do.
void Device::add_segments(AttendPlan& plan, int first, int count, int block) const {
  const std::vector<AttendMember>& members = plan.members;
  int end = block;
  if (count == 1) {
    end = last_position(members[first]) / kBlock + 1;
    if (plan.window > 0) block = std::max(0, positions[members[first].first_token] - plan.window + 1) / kBlock;
  } else {
    end += shared_blocks(members[first], members[first + count - 1], block);
  }
  if (end > block) plan.segments.push_back({first, count, block, end});
  if (count == 1) return;
  for (int i = 0; i < count;) {
    int n = 1;
    while (i + n < count && shared_blocks(members[first + i], members[first + i + n], end) > 0) n++;
    add_segments(plan, first + i, n, end);
    i += n;
  }
}

void Device::add_job(AttendPlan& plan, int kv_head, int first_member, int num_members, int first_q, int num_q) const {
  const int first_segment = int(plan.segments.size());
  add_segments(plan, first_member, num_members, 0);
  int64_t cost = 0;
  for (size_t i = size_t(first_segment); i < plan.segments.size(); i++) {
    const AttendSegment& s = plan.segments[i];
    for (int m = s.first_member; m < s.first_member + s.num_members; m++)
      cost += int64_t(s.end_block - s.first_block) * plan.members[m].tokens * num_q;
  }
  plan.jobs.push_back({kv_head, first_member, num_members, first_q, num_q, first_segment, int(plan.segments.size()) - first_segment, cost});
}

const AttendPlan& Device::plan_attention(int num_heads, int kv_heads, int window) {
  for (size_t i = 0; i < num_attend_plans_; i++) {
    const AttendPlan& made = *attend_plans_[i];
    if (made.num_heads == num_heads && made.kv_heads == kv_heads && made.window == window) return made;
  }
  if (num_attend_plans_ == attend_plans_.size()) attend_plans_.push_back(std::make_unique<AttendPlan>());
  AttendPlan& plan = *attend_plans_[num_attend_plans_];
  plan.num_heads = num_heads;
  plan.kv_heads = kv_heads;
  plan.window = window;
  plan.segments.clear();
  plan.jobs.clear();
  std::vector<AttendMember>& members = plan.members;
  members.clear();
  const int group = num_heads / kv_heads, threads = pool.size();
  for (int r = 0; r < num_rows; r++)
    for (int t = 0; t < row_length[r]; t += kQueryTokens)
      members.push_back({r, row_first[r] + t, std::min(kQueryTokens, row_length[r] - t)});
  // Rows that share their first tiles lie together from here on.
  if (window == 0)
    std::stable_sort(members.begin(), members.end(), [&](const AttendMember& a, const AttendMember& b) {
      return a.row != b.row && row_tiles[a.row] < row_tiles[b.row];
    });
  const int count = int(members.size()) * kv_heads;
  // Rows together until they fill the kernels, but not so many that threads are left without any.
  const int most = std::max(1, count / (2 * threads));
  // few and uneven jobs: share the query heads of a group too, so that no thread waits for another
  int parts = count < 4 * threads && count % threads != 0 ? group : 1;
  if (kv_heads == 1) parts = std::min(parts, 2 * threads);  // each part reads all keys there are
  for (int first = 0, end = 0; first < int(members.size()); first = end) {
    int queries = members[first].tokens * group;
    for (end = first + 1; end < int(members.size()) && window == 0 && end - first < most; end++) {
      queries += members[end].tokens * group;
      if (queries > kJobRows || shared_blocks(members[first], members[end], 0) == 0) break;
    }
    const int split = end - first == 1 && members[first].tokens == 1 ? parts : 1;
    for (int h = 0; h < kv_heads; h++)
      for (int s = 0; s < split; s++)
        add_job(plan, h, first, end - first, group * s / split, group * (s + 1) / split - group * s / split);
  }
  std::stable_sort(plan.jobs.begin(), plan.jobs.end(), [](const AttendJob& a, const AttendJob& b) { return a.cost > b.cost; });
  num_attend_plans_++;
  return plan;
}

}  // namespace mooli
