// Which row's keys are split into how many parts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mla {

// Rows that one block can schedule. With more there is enough to do without splits.
constexpr int64_t kMaxScheduledRows = 1024;

// FA3's scheduling vectors (flash.h), each with an entry for each row, the longest parts first.
struct Schedule {
  int32_t* splits;
  int32_t* query_tiles;
  int32_t* row_of;
  int32_t* heads_in_l2;
  int32_t* tile_counter;
};

// Splits rows so that all multiprocessors end at about the same time, in place of FA3's prepare_varlen_num_blocks: that
// one aims at a part for each multiprocessor less a margin of 10 %, in one wave. Eight long rows, say, are 15 parts
// each to it, which leaves 12 of 132 multiprocessors idle; here they are 16.
cudaError_t ScheduleSplits(const int32_t* cu_q, const int32_t* kv_len, int64_t rows, int64_t heads, int64_t max_splits,
                           int num_sm, const Schedule& schedule, cudaStream_t stream);

}  // namespace mla
