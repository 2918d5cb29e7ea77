// What kernels of warps share.
#pragma once

#include <cstdint>

namespace mla {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;

__device__ inline float WarpSum(float x) {
  for (int i = kLanes / 2; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}

}  // namespace mla
