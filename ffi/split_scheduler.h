// The split scheduler: how many splits each row's keys get in decode, and in which order rows run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shapes.h"

namespace mla {

// FA3's scheduler metadata, under its names in flash.h. The vectors have an entry per row, longest splits first.
struct SchedulerMetadata {
  int32_t* num_splits_dynamic;
  int32_t* num_m_blocks;      // query tiles
  int32_t* varlen_batch_idx;  // the row of this entry
  int32_t* num_nheads_in_l2;

  // As they lie in [SplitsSize(rows)].
  static SchedulerMetadata At(int32_t* splits, int64_t rows) {
    int64_t padded = RoundUp4(rows);
    return {splits, splits + padded, splits + 2 * padded, splits + 3 * padded};
  }
};

// Chooses splits such that all multiprocessors finish at about the same time. Replaces FA3's prepare_varlen_num_blocks,
// which aims at one wave with a margin of 10 %: it gives eight long rows 15 splits each, and 12 of 132 multiprocessors
// idle. Here the rows get 16 each.
//
// `counter`: FA3's of tiles, which is cleared; null: none.
cudaError_t ScheduleSplits(const int32_t* cu_q, const int32_t* kv_len, int64_t rows, int64_t heads, int64_t max_splits,
                           int num_sm, const SchedulerMetadata& metadata, int32_t* counter, cudaStream_t stream);

// Clears the counter alone, for a call whose splits are made. Between kernels of a CUDA graph a memset costs 7 us.
cudaError_t ClearCounter(int32_t* counter, cudaStream_t stream);

}  // namespace mla
