// The layout of few (token, expert) pairs as rows: sorted by expert, then by token (lay_out in model/dispatch.py).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../shapes.h"

namespace mla {

constexpr int64_t kMaxPairs = 4096;

struct SortPairs {
  int64_t pairs, top, experts;  // R = T k, k, E
  const int32_t* expert;        // [T, k]; outside [0, E): another device's
  const float* weight;          // [T, k]
  int32_t* row;                 // [T, k]: each pair's; R for another device's
  int32_t* sizes;               // [E]: each expert's rows
  int32_t* token;               // [R]: each row's; 0 where there is none
  float* row_weight;            // [R]: the pair's weight; 0 where there is none
};

cudaError_t SortFewPairs(const SortPairs& call, cudaStream_t stream);

}  // namespace mla
