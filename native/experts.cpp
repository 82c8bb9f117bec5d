// Mixtures of experts on a tape: the choice of a router, and the sum of what its experts give.
//
// The rows of a step are sorted by expert, so that each expert's weights are read once, by threads that take panels of any
// expert. How many there are is known only when the router has chosen: the first phase deals out what the later ones compute.
// Results are stored for each row and slot, and added in the order of the slots, so that a row's bits are its own.
#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "tape.h"

namespace mooli {
namespace {

constexpr int kColumns = 512;  // of a row's results that are added up at a time
// What reading a panel's weights costs, in rows that are multiplied with them.
constexpr int kReadRows = 4;
constexpr size_t kNextFetchBytes = 16 << 10;  // of the expert that a thread computes next, fetched ahead

size_t prepared_bytes(int k) { return size_t((k + kGroup - 1) / kGroup * kGroup) * 4; }

int num_blocks(const RowKernels& kernels, int rows) { return (rows + kernels.max_rows - 1) / kernels.max_rows; }

// The run that an item belongs to; `first`: its first item, of a run.
template <class F> const ExpertRun& run_of(const std::vector<ExpertRun>& runs, int item, F first) {
  const auto after = std::upper_bound(runs.begin(), runs.end(), item, [&](int i, const ExpertRun& run) { return i < first(run); });
  return *(after - 1);
}

// Indices of the `count` largest of n values, descending, the lower one first where they are equal; those for which `skip` is
// true are left out.
template <class F> void largest(const float* x, int n, int count, F skip, int* ids) {
  int found = 0;
  for (int i = 0; i < n; i++) {
    if (skip(i) || (found == count && !(x[i] > x[ids[count - 1]]))) continue;
    int at = found < count ? found++ : count - 1;
    for (; at > 0 && x[i] > x[ids[at - 1]]; at--) ids[at] = ids[at - 1];
    ids[at] = i;
  }
}

void softmax(const Kernels& k, const float* x, int n, float* out) {
  const float highest = *std::max_element(x, x + n);
  const float total = float(k.exp_sum(x, n, highest, 1.f, out));
  for (int i = 0; i < n; i++) out[i] /= total;
}

// Whether each group may be chosen from.
void keep_groups(const float* order, const RouteShape& s, bool* is_kept) {
  float best[kMaxExperts];
  const int size = s.num_experts / s.groups;
  int ids[kMaxExperts];
  for (int g = 0; g < s.groups; g++) {
    largest(order + g * size, size, s.group_top, [](int) { return false; }, ids);
    best[g] = 0.f;
    for (int i = s.group_top - 1; i >= 0; i--) best[g] += order[g * size + ids[i]];
  }
  std::fill_n(is_kept, s.groups, false);
  largest(best, s.groups, s.kept_groups, [](int) { return false; }, ids);
  for (int i = 0; i < s.kept_groups; i++) is_kept[ids[i]] = true;
}

}  // namespace

void Tape::choose_experts(const Op& op, int row) const {
  const Kernels& k = device_.kernels;
  const RouteShape& s = *op.route;
  const int n = s.num_experts;
  const float* logits = op.x + size_t(row) * size_t(n);
  float* out = op.out + size_t(row) * size_t(2 * s.slots);
  float* weights = out + s.slots;
  int ids[kMaxSlots];
  bool is_fit = true;
  for (int i = 0; i < n; i++) is_fit &= logits[i] == logits[i];
  if (!is_fit) {  // what comes out is NaN, whichever experts compute it
    for (int i = 0; i < s.slots; i++) {
      ids[i] = i;
      weights[i] = std::numeric_limits<float>::quiet_NaN();
    }
    memcpy(out, ids, size_t(s.slots) * 4);
    return;
  }
  alignas(64) float made[kMaxExperts], order[kMaxExperts];
  const float* scores = logits;
  if (s.score == RouteShape::SOFTMAX) softmax(k, logits, n, made);
  if (s.score == RouteShape::SIGMOID) {
    std::fill_n(order, n, 1.f);
    k.sigmoid_mul(order, logits, n, made);
  }
  if (s.score != RouteShape::CHOSEN_SOFTMAX) scores = made;
  const float* choosing = scores;
  if (!op.correction->empty()) {
    for (int i = 0; i < n; i++) order[i] = scores[i] + (*op.correction)[size_t(i)];
    choosing = order;
  }
  if (s.kept_groups == s.groups) {
    largest(choosing, n, s.slots, [](int) { return false; }, ids);
  } else {
    bool is_kept[kMaxExperts];
    keep_groups(choosing, s, is_kept);
    const int size = n / s.groups;
    largest(choosing, n, s.slots, [&](int i) { return !is_kept[i / size]; }, ids);
  }
  memcpy(out, ids, size_t(s.slots) * 4);
  float chosen[kMaxSlots];
  for (int i = 0; i < s.slots; i++) chosen[i] = scores[ids[i]];
  if (s.score == RouteShape::CHOSEN_SOFTMAX) {
    float shares[kMaxSlots];
    softmax(k, chosen, s.slots, shares);
    memcpy(chosen, shares, sizeof chosen);
  }
  float divisor = 1.f;
  if (s.normalise) {
    divisor = 0.f;
    for (int i = 0; i < s.slots; i++) divisor += chosen[i];
    divisor = std::max(divisor + s.eps, s.minimum);
  }
  for (int i = 0; i < s.slots; i++) weights[i] = chosen[i] / divisor * s.factor;
}

void Tape::scale_row(const Op& op, int row) const {
  const float share = float(1.0 / (1.0 + std::exp(-double(op.a[row]))));
  const float* x = op.x + size_t(row) * size_t(op.width);
  float* out = op.out + size_t(row) * size_t(op.width);
  for (int i = 0; i < op.width; i++) out[i] = x[i] * share;
}

int Tape::expert_items(const Op& op, int rows, int phase) const {
  if (phase == 0) return 1;
  if (phase + 1 == kExpertPhases) return rows * ((op.experts->hidden() + kColumns - 1) / kColumns);
  return 0;  // until rows are sorted
}

void Tape::check_experts(const Op& op) {
  const Experts& w = *op.experts;
  const size_t rows = size_t(op.rows) * size_t(op.heads), widest = size_t(std::max(w.hidden(), w.inner()));
  if (rows * prepared_bytes(int(widest)) > device_.expert_rows.size() || rows * widest * 4 > device_.expert_values.size())
    throw std::invalid_argument("experts wider than the buffers: capture again after loading them");
  ExpertPlan& plan = expert_plan_;
  if (plan.source.size() < rows) plan.source.resize(rows);
  if (plan.place.size() < rows) plan.place.resize(rows);
  if (plan.next.size() < w.down.size() + 1) plan.next.resize(w.down.size() + 1);
  plan.runs.reserve(w.down.size());
}

void Tape::compute_experts(const Op& op, int phase, int stage, int thread) {
  Part* parts = &parts_[size_t(stage) * size_t(device_.pool.size())];
  switch (phase) {
    case 0: share(parts, thread, [&](int) { plan_experts(op, stage); }); break;
    case 1: case 3: share(parts, thread, [&](int i) { prepare_experts(op, phase == 3, i, thread); }); break;
    case 2: case 4: share(parts, thread, [&](int i) { multiply_experts(op, phase == 4, i, thread); }); break;
    default: share(parts, thread, [&](int i) { add_results(op, i); });
  }
  if (phase == 1 || phase == 3) {  // the first panel that this thread multiplies comes while others still prepare
    const uint64_t range = parts[device_.pool.size() + thread].range.load(std::memory_order_relaxed);
    if (uint32_t(range >> 32) < uint32_t(range)) fetch_expert(op, phase == 3, int(range >> 32), kNextFetchBytes);
  }
}

// Sort rows by expert, which keeps their order, and deal out the phases that compute from them.
void Tape::plan_experts(const Op& op, int stage) {
  const Experts& w = *op.experts;
  const Kernels& k = device_.kernels;
  ExpertPlan& plan = expert_plan_;
  const int count = int(w.down.size()), slots = op.heads;
  auto chosen = [&](int row) { return reinterpret_cast<const int32_t*>(op.a + size_t(row) * size_t(2 * slots)); };
  std::fill_n(plan.next.begin(), count + 1, 0);
  for (int row = 0; row < op.rows; row++)
    for (int slot = 0; slot < slots; slot++) plan.next[size_t(chosen(row)[slot]) + 1]++;
  plan.runs.clear();
  plan.blocks[0] = plan.blocks[1] = plan.panels[0] = plan.panels[1] = 0;
  for (int expert = 0, first = 0; expert < count; expert++) {
    const int rows = plan.next[size_t(expert) + 1];
    plan.next[size_t(expert)] = first;
    if (rows == 0) continue;
    plan.runs.push_back({expert, first, rows, {plan.blocks[0], plan.blocks[1]}, {plan.panels[0], plan.panels[1]}});
    for (int i = 0; i < 2; i++) {
      const Linear& linear = *(i ? w.down : w.gated)[size_t(expert)];
      plan.blocks[i] += num_blocks(k.of(linear.kind, rows), rows);
      plan.panels[i] += linear.panels();
    }
    first += rows;
  }
  for (int row = 0; row < op.rows; row++)
    for (int slot = 0; slot < slots; slot++) {
      const int place = plan.next[size_t(chosen(row)[slot])]++;
      plan.source[size_t(place)] = row;
      plan.place[size_t(row) * size_t(slots) + size_t(slot)] = place;
    }
  for (int i = 0; i < 2; i++) {
    deal_out(stage + 1 + 2 * i, plan.blocks[i], i == 1, false);
    deal_out(stage + 2 + 2 * i, plan.panels[i], i == 1, true);
  }
}

// Consecutive items for each thread: as many, or, of panels, as cost as much.
void Tape::deal_out(int stage, int items, bool is_down, bool is_weighed) {
  const int64_t threads = device_.pool.size();
  const std::vector<ExpertRun>& runs = expert_plan_.runs;
  auto end_of = [&](size_t run) { return run + 1 < runs.size() ? runs[run + 1].first_panel[is_down] : items; };
  int64_t total = 0;
  if (is_weighed)
    for (size_t i = 0; i < runs.size(); i++) total += int64_t(end_of(i) - runs[i].first_panel[is_down]) * (runs[i].rows + kReadRows);
  size_t run = 0;
  int64_t before = 0;  // what all runs before this one cost
  uint64_t begin = 0;
  for (int64_t t = 1; t <= threads; t++) {
    uint64_t end = uint64_t(items) * uint64_t(t) / uint64_t(threads);
    if (is_weighed && t < threads) {
      const int64_t wanted = total * t / threads;
      for (;; run++) {
        const int64_t cost = runs[run].rows + kReadRows, panels = end_of(run) - runs[run].first_panel[is_down];
        if (before + panels * cost >= wanted) {
          end = uint64_t(runs[run].first_panel[is_down] + (wanted - before) / cost);
          break;
        }
        before += panels * cost;
      }
    }
    parts_[size_t(stage) * size_t(threads) + size_t(t - 1)].range.store(begin << 32 | end);
    begin = end;
  }
  if (is_drained_)
    for (int64_t t = 0; t < threads; t++) parts_[size_t(stage) * size_t(threads) + size_t(t)].range.store(0);
}

// One block of rows of one expert, as the kernels take it.
void Tape::prepare_experts(const Op& op, bool is_down, int item, int thread) const {
  const Device& d = device_;
  const ExpertRun& run = run_of(expert_plan_.runs, item, [&](const ExpertRun& r) { return r.first_block[is_down]; });
  const Linear& w = *(is_down ? op.experts->down : op.experts->gated)[size_t(run.expert)];
  const RowKernels& kernels = d.kernels.of(w.kind, run.rows);
  const Blocks blocks{kernels, run.rows, num_blocks(kernels, run.rows), 1};
  const int block = item - run.first_block[is_down], r0 = blocks.first_row(block), rows = blocks.first_row(block + 1) - r0;
  const size_t k = size_t(w.k);
  char* target = d.expert_rows.data() + size_t(run.first_row) * prepared_bytes(w.k) + size_t(r0) * kernels.row_bytes(w.padded_k);
  if (is_down) {
    kernels.prepare(d.expert_values.as<float>() + size_t(run.first_row + r0) * k, k, w.k, w.padded_k, target, rows);
    return;
  }
  // Rows of one expert are ascending: those that lie together need not be brought together.
  const int* source = expert_plan_.source.data() + run.first_row + r0;
  if (source[rows - 1] - source[0] == rows - 1) {
    kernels.prepare(op.x + size_t(source[0]) * k, k, w.k, w.padded_k, target, rows);
    return;
  }
  float* gathered = d.work[size_t(thread)].rows.as<float>();
  for (int i = 0; i < rows; i++) memcpy(gathered + size_t(i) * k, op.x + size_t(source[i]) * k, k * 4);
  kernels.prepare(gathered, k, w.k, w.padded_k, target, rows);
}

// One panel of one expert, with all of its rows.
void Tape::multiply_experts(const Op& op, bool is_down, int item, int thread) const {
  const Device& d = device_;
  const Kernels& k = d.kernels;
  const ExpertRun& run = run_of(expert_plan_.runs, item, [&](const ExpertRun& r) { return r.first_panel[is_down]; });
  const Linear& w = *(is_down ? op.experts->down : op.experts->gated)[size_t(run.expert)];
  const RowKernels& kernels = k.of(w.kind, run.rows);
  const Blocks blocks{kernels, run.rows, num_blocks(kernels, run.rows), 1};
  const int panel = item - run.first_panel[is_down];
  if (panel + 1 == w.panels()) fetch_expert(op, is_down, item + 1, kNextFetchBytes);
  const char* activations = d.expert_rows.data() + size_t(run.first_row) * prepared_bytes(w.k);
  const size_t width = size_t(w.n);
  float* values = d.expert_values.as<float>() + size_t(run.first_row) * width;
  multiply({w, blocks, panel, panel + 1, thread, activations}, [&](int p, int r0, int r, const float* sums) {
    const int per_panel = w.gated ? 16 : kPanel, column = p * per_panel, columns = std::min(per_panel, w.n - column);
    const float* bias = w.bias.empty() ? nullptr : w.bias.data() + p * kPanel;
    float* out = values + size_t(r0) * width + column;
    if (w.gated) k.store_gated[w.gate](sums, r, columns, bias, out, width);
    else k.store(sums, r, columns, bias, nullptr, out, width);
  });
}

// Some columns of one row: its slots in their order, then the residual.
void Tape::add_results(const Op& op, int item) const {
  const size_t width = size_t(op.experts->hidden()), slots = size_t(op.heads);
  const size_t chunks = (width + kColumns - 1) / kColumns, row = size_t(item) / chunks, first = size_t(item) % chunks * kColumns;
  const size_t count = std::min(size_t(kColumns), width - first);
  const float* weights = op.a + row * 2 * slots + slots;
  const int* place = expert_plan_.place.data() + row * slots;
  const float* values = device_.expert_values.as<float>() + first;
  float sums[kColumns];
  for (size_t slot = 0; slot < slots; slot++) {
    const float* x = values + size_t(place[slot]) * width;
    const float weight = weights[slot];
    if (slot == 0) for (size_t i = 0; i < count; i++) sums[i] = weight * x[i];
    else for (size_t i = 0; i < count; i++) sums[i] += weight * x[i];
  }
  float* out = op.out + row * width + first;
  const float* residual = op.b ? op.b + row * width + first : nullptr;
  if (residual) for (size_t i = 0; i < count; i++) out[i] = sums[i] + residual[i];
  else memcpy(out, sums, count * 4);
}

// The begin of a panel. Only where weights are all that takes time: of experts of few rows.
void Tape::fetch_expert(const Op& op, bool is_down, int item, size_t bytes) const {
  if (item >= expert_plan_.panels[is_down]) return;
  const ExpertRun& run = run_of(expert_plan_.runs, item, [&](const ExpertRun& r) { return r.first_panel[is_down]; });
  const Linear& w = *(is_down ? op.experts->down : op.experts->gated)[size_t(run.expert)];
  if (num_blocks(device_.kernels.of(w.kind, run.rows), run.rows) > 1) return;
  const char* begin = w.panel(item - run.first_panel[is_down]);
  const char* end = std::min(begin + bytes, static_cast<const char*>(w.data.data() + w.data.size()));
  for (const char* p = begin; p < end; p += 64) device_.kernels.prefetch(p);
}

}  // namespace mooli
