// Kernels that complete the output of FA3's attention kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mla {

// Combines the partial outputs of each token's splits, weighted by their LSE, and clears padding tokens as
// `ClearPadding` does. The output of a row with one split is already in place.
// FA3's combine kernel has a grid over rows x longest row, mostly idle with many short rows. This grid is over tokens.
// `num_splits` and `row_of` are `num_splits_dynamic` and `varlen_batch_idx` of the scheduler metadata.
cudaError_t CombineSplits(const int32_t* cu_q, const int32_t* num_splits, const int32_t* row_of, int64_t rows,
                          int64_t tokens, int64_t heads, const float* out_partial, const float* lse_partial,
                          uint16_t* out, float* lse, cudaStream_t stream);

// Sets the output of padding tokens (those of no row) to 0 and their LSE to -inf: FA3 does not write them.
// `out` has `width` bfloat16 elements per token and head; strides are in elements. `lse` is [heads, tokens].
cudaError_t ClearPadding(const int32_t* cu_q, int64_t rows, int64_t tokens, int64_t heads, int64_t width, uint16_t* out,
                         int64_t token_stride, int64_t head_stride, float* lse, cudaStream_t stream);

}  // namespace mla
