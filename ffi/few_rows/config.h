// Sizes of an instance of the kernel, by the weights' format and the rows of a tile, and its arguments.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "../few_rows.h"
#include "../grouped/groups.h"
#include "ptx.h"

namespace mla::few_rows {

constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;  // registers are dealt to warpgroups: one loads, with one thread
constexpr int kReduceRows = 32;                    // rows of a tile whose parts are added at a time

// Floats between the outputs of `kRows` rows, such that a warp's writes are in different banks.
constexpr int ReduceStride(int rows) { return rows > 8 ? rows + 8 : rows; }

template <WeightFormat kFormat_, int kMaxRows_>
struct Config {
  static constexpr WeightFormat kFormat = kFormat_;
  static constexpr int kMaxRows = kMaxRows_;
  // With few rows the warpgroups share the outputs and take every other stage; with many they share the stages, so that
  // a stage of rows serves twice as many outputs.
  static constexpr int kSplits = kMaxRows <= 64 ? 2 : 1;
  static constexpr int kOutputs = kSplits == 2 ? 64 : 128;
  static constexpr bool kFp8 = kFormat != WeightFormat::kBf16;
  static constexpr int kInputs = kFp8 ? 128 : 64;           // of a stage
  static constexpr int kMinRows = kMaxRows <= 32 ? 8 : 32;  // of a wgmma instruction: this, doubled, up to kMaxRows
  static constexpr int kMaps = kMaxRows == 32 || kMaxRows == 128 ? 3 : kMaxRows == 64 ? 2 : 1;  // one for each
  static constexpr int kWeightBytes = kOutputs * kSwizzle;
  static constexpr int kStageBytes = kWeightBytes + kMaxRows * kInputs * 2;
  static constexpr int kReduce = kMaxRows < kReduceRows ? kMaxRows : kReduceRows;
  static constexpr int kReduceFloats = kSplits * kOutputs * ReduceStride(kReduce);
  static constexpr int kOtherBytes = kReduceFloats * 4 + 2 * kMaxGroups * 4 + 1536;  // and barriers, alignment
  static constexpr int kStages = std::min((kSmemBytes - kOtherBytes) / kStageBytes, 24);
  static constexpr int kBytes = kStages * kStageBytes + kOtherBytes;
};

template <typename C>
struct Maps {
  CUtensorMap weights, rows[C::kMaps];  // rows: in 64 inputs, rows, and blocks of 64 inputs
};

struct Arguments {
  const void* scales;
  const int32_t* group_sizes;
  const int32_t* first_matrix;
  __nv_bfloat16* out;
  int groups, inputs, outputs, block_outputs;
};

}  // namespace mla::few_rows
