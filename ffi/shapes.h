// The sizes that the kernels are built for, and the sizes of their scratch.
#pragma once

#include <cstdint>

namespace mla {

constexpr int64_t kLatent = 512;  // R, kv_lora_rank
constexpr int64_t kRope = 64;     // r
constexpr int64_t kNope = 128;    // h
constexpr int64_t kValue = 128;   // v
constexpr int64_t kQuery = kNope + kRope;
constexpr int64_t kQueryTile = 64;  // queries, of all heads of a few tokens, that the absorbed kernels take at a time
constexpr int64_t kPageTile = 64;   // keys that the absorbed kernels load at a time: a page holds whole ones
constexpr int64_t kMostSplits = 128;  // of a row's keys
constexpr int64_t kAlignment = 16;    // bytes: what the kernels' vector and TMA loads need

// FA3's scheduler keeps four int32 vectors of the rows, each padded to 16 bytes, and one counter.
constexpr int64_t RoundUp4(int64_t n) { return (n + 3) / 4 * 4; }
constexpr int64_t SchedulerSize(int64_t rows) { return 4 * RoundUp4(rows) + 1; }

}  // namespace mla
