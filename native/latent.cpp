// Multi-head latent attention as an operation of a tape, in three phases: what is kept of the step's tokens is stored, and
// queries are brought into the space of the latents; they attend there, as any others; the sums become values of each head.
// One formula for every row of every step, so that no bit depends on what is computed beside it. Owns the phases; jobs of the
// attention itself are those of attend (tape.cpp).
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "tape.h"

namespace mooli {

void Tape::attend_latent(int layer, const float* q, const float* latent, const float* norm, float eps, const LatentWeight* up, RopeTable* rope,
                         const LatentShape& shape, float scale, float* out) {
  Op o{LATENT};
  o.layer = layer; o.x = q; o.a = latent; o.b = norm; o.eps = eps; o.up = up; o.rope = rope; o.latent = shape; o.number = scale; o.out = out;
  o.heads = shape.heads;
  add(o);
}

// Throws where what was recorded does not fit what is allocated.
void Tape::check_latent(const Op& op) const {
  const Device& d = device_;
  if (op.layer < 0 || size_t(op.layer) >= d.kv_layers.size()) throw std::invalid_argument("a layer outside the KV pool");
  const KvLayer& layer = d.kv_layers[size_t(op.layer)];
  if (!layer.is_latent || layer.head_dim != op.latent.width()) throw std::invalid_argument("a layer that keeps no latents of this width");
  if (size_t(op.rows) * op.heads * layer.head_dim * 4 > d.queries.size()) throw std::invalid_argument("query heads that do not fit the buffers");
  for (const Linear* weight : {op.up->keys[0], op.up->values[0]})
    if (size_t(kMaxRows) * d.kernels.few[weight->kind].row_bytes(weight->padded_k) > d.work[0].latent.size())
      throw std::invalid_argument("weights of latents that are wider than the buffers");
}

// Blocks of rows that one head's weight is multiplied with.
int Tape::latent_blocks(const Linear& weight, int rows) const {
  const int most = device_.kernels.few[weight.kind].max_rows;
  return (rows + most - 1) / most;
}

int Tape::latent_items(const Op& op, int rows, int phase) const {
  if (phase == 0) return int(device_.tile_runs.size()) + op.heads * latent_blocks(*op.up->keys[0], rows);
  if (phase == 1) return int(op.plan->jobs.size());
  return op.heads * latent_blocks(*op.up->values[0], rows);
}

void Tape::latent_phase(const Op& op, int phase, int thread, Part* parts) {
  Device::Work& work = device_.work[size_t(thread)];
  if (phase == 0) {
    const int runs = int(device_.tile_runs.size());
    share(parts, thread, [&](int i) {
      if (i < runs) store_latents(op, device_.tile_runs[size_t(i)]);
      else absorb_queries(op, i - runs, work);
    });
  } else if (phase == 1) {
    share(parts, thread, [&](int i) {
      const AttendJob* job = &op.plan->jobs[size_t(i)];
      attend_job(op, *job, size_t(i) + 1 < op.plan->jobs.size() ? job + 1 : nullptr, op.rows, work);
    });
  } else {
    share(parts, thread, [&](int i) { latent_values(op, i, work); });
  }
}

void Tape::store_latents(const Op& op, const TileRun& run) {
  Device& d = device_;
  const Kernels& k = d.kernels;
  const KvLayer& layer = d.kv_layers[size_t(op.layer)];
  const int width = op.latent.width(), half = int(op.rope->inv_freq.size());
  const int first_slot = d.positions[size_t(run.first_token)] % kTile;
  char* tile = d.k_tile(op.layer, d.token_tile[size_t(run.first_token)], 0);
  if (first_slot == 0) memset(tile, 0, layer.tile_bytes);  // past the last token latents are multiplied by exact zeros
  std::vector<float> row(static_cast<size_t>(width));
  for (int i = run.first_token; i < run.first_token + run.tokens; i++) {
    const float* x = op.a + size_t(i) * width;
    const size_t angles = size_t(d.rope_positions[size_t(i)]) * size_t(half);
    k.rms_norm(x, op.b, op.eps, op.latent.rank, nullptr, row.data());
    std::copy(x + op.latent.rank, x + width, row.data() + op.latent.rank);
    k.rope(row.data() + op.latent.rank, &op.rope->cosines[angles], &op.rope->sines[angles], half);
    k.store_latent[layer.type](row.data(), width, tile, first_slot + i - run.first_token);
  }
}

// `rows` rows of `x`, times a weight: f(panel's first output, its outputs, rows x kPanel sums). Kernels for few rows, whatever
// their number: a head's weight is small.
template <class F>
void Tape::multiply_head(const Linear& w, const float* x, size_t stride, int rows, Device::Work& work, F f) const {
  const RowKernels& k = device_.kernels.few[w.kind];
  alignas(64) float tile[kMaxRows * kPanel];
  k.prepare(x, stride, w.k, w.padded_k, work.latent.data(), rows);
  for (int p = 0; p < w.panels(); p++) {
    k.gemm[rows](work.latent.data(), w.panel(p), w.padded_k, tile, w.panel(p), 0);
    f(p * kPanel, std::min(kPanel, w.n - p * kPanel), tile);
  }
}

void Tape::absorb_queries(const Op& op, int item, Device::Work& work) {
  Device& d = device_;
  const LatentShape& s = op.latent;
  const int head = item % s.heads, block = item / s.heads, most = d.kernels.few[op.up->keys[0]->kind].max_rows;
  const int first = block * most, rows = std::min(most, op.rows - first), half = int(op.rope->inv_freq.size());
  const size_t stride = size_t(s.heads) * size_t(s.nope + s.rope), out_stride = size_t(s.heads) * size_t(s.width());
  const float* x = op.x + size_t(first) * stride + size_t(head) * size_t(s.nope + s.rope);
  float* out = d.queries.as<float>() + size_t(first) * out_stride + size_t(head) * size_t(s.width());
  multiply_head(*op.up->keys[size_t(head)], x, stride, rows, work, [&](int begin, int columns, const float* sums) {
    d.kernels.store(sums, rows, columns, nullptr, nullptr, out + begin, out_stride);
  });
  for (int r = 0; r < rows; r++) {
    const size_t angles = size_t(d.rope_positions[size_t(first + r)]) * size_t(half);
    float* turned = out + size_t(r) * out_stride + s.rank;
    memcpy(turned, x + size_t(r) * stride + s.nope, size_t(s.rope) * 4);
    d.kernels.rope(turned, &op.rope->cosines[angles], &op.rope->sines[angles], half);
  }
}

void Tape::latent_values(const Op& op, int item, Device::Work& work) {
  Device& d = device_;
  const LatentShape& s = op.latent;
  const int head = item % s.heads, block = item / s.heads, most = d.kernels.few[op.up->values[0]->kind].max_rows;
  const int first = block * most, rows = std::min(most, op.rows - first);
  const size_t stride = size_t(s.heads) * size_t(s.width()), out_stride = size_t(s.heads) * size_t(s.value_dim);
  const float* x = d.queries.as<float>() + size_t(first) * stride + size_t(head) * size_t(s.width());
  float* out = op.out + size_t(first) * out_stride + size_t(head) * size_t(s.value_dim);
  multiply_head(*op.up->values[size_t(head)], x, stride, rows, work, [&](int begin, int columns, const float* sums) {
    d.kernels.store(sums, rows, columns, nullptr, nullptr, out + begin, out_stride);
  });
}

}  // namespace mooli
