// Mixtures of experts: what a router's choice and its experts are, and how the rows of a step are sorted by expert.
// Owns plain data; the operations are the tape's, in experts.cpp.
#pragma once
#include <vector>

#include "device.h"

namespace mooli {

constexpr int kMaxExperts = 4096, kMaxSlots = 64;

// See RouteSpec in mooli/backends/routing.py.
struct RouteShape {
  enum Score : int { SOFTMAX = 0, SIGMOID = 1, CHOSEN_SOFTMAX = 2 };
  int num_experts, slots;
  Score score;
  int groups, kept_groups, group_top;
  bool normalise;
  float eps, minimum, factor;
};

// What is added to scores before experts are chosen by them; may be empty. Its product is a linear of its own.
struct Router {
  std::vector<float> correction;
};

struct Experts {
  std::vector<const Linear*> gated, down;  // one of each for each expert
  int hidden() const { return down[0]->n; }
  int inner() const { return gated[0]->n; }
};

// Phases of the operation: sort rows, prepare them, gated products, prepare those, second products, add up.
constexpr int kExpertPhases = 6;

// An expert that some rows have chosen. Its rows are [first_row, first_row + rows) of all, those of one expert behind those of
// another; its items are behind those of the expert before: blocks to prepare, and panels to multiply, for [gated, down].
struct ExpertRun { int expert, first_row, rows, first_block[2], first_panel[2]; };

// A row of the step counts as often as it has slots.
struct ExpertPlan {
  std::vector<ExpertRun> runs;
  int blocks[2] = {0, 0}, panels[2] = {0, 0};  // of all runs
  std::vector<int> source;                     // of each of the sorted rows: the step's row
  std::vector<int> place;                      // of each row and slot: which of the sorted rows it is
  std::vector<int> next;                       // of each expert, where its next row goes
};

}  // namespace mooli
