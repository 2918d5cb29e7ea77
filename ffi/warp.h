// What kernels of warps share.
#pragma once

#include <cstdint>

namespace mla {

constexpr int kWarp = 32;  // threads
constexpr uint32_t kAllLanes = ~0u;

__device__ inline float WarpSum(float x) {
  for (int i = kWarp / 2; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}

}  // namespace mla
