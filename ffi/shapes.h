// The sizes that the kernels are built for, and the sizes of their scratch.
#pragma once

#include <cstdint>

namespace mla {

constexpr int64_t kLatent = 512;  // R, kv_lora_rank
constexpr int64_t kRope = 64;     // r
constexpr int64_t kNope = 128;    // h
constexpr int64_t kValue = 128;   // v
constexpr int64_t kQuery = kNope + kRope;
constexpr int64_t kQueryTile = 64;    // query tile of the absorbed kernels: all heads of a few tokens
constexpr int64_t kPageTile = 64;     // key tile of the absorbed kernels; a page holds a whole number of them
constexpr int64_t kMaxSplits = 128;   // splits of a row's keys
constexpr int64_t kScaleBlock = 128;  // inputs and outputs that share a scale of FP8 weights, columns of a row
constexpr int64_t kMaxGroups = 512;   // groups of rows in a grouped product
constexpr int64_t kAlignment = 16;    // bytes, for vector and TMA loads

constexpr int64_t ScaleBlocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

// FA3's scheduler keeps four int32 vectors of the rows, each padded to 16 bytes, and one counter.
constexpr int64_t RoundUp4(int64_t n) { return (n + 3) / 4 * 4; }
constexpr int64_t SplitsSize(int64_t rows) { return 4 * RoundUp4(rows); }
constexpr int64_t SchedulerSize(int64_t rows) { return SplitsSize(rows) + 1; }
constexpr int64_t kMaxScheduledRows = 1024;  // rows whose splits are scheduled: more keep the GPU busy without splits

}  // namespace mla
