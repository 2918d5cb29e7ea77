// The instances of FA3's attention kernel (`run_flash_fwd`) that the extension calls. All are causal, for bfloat16,
// variable lengths and Hopper. Each is compiled in a .cu file of its own: about 110 s of a core and 4.5 GB of memory.
#pragma once

#include <cuda_runtime_api.h>

#include "flash.h"

namespace mla {

// Template arguments, under FA3's names (flash_fwd_launch_template.h).

// Per-head keys, 192 wide, and values, 128 wide.
struct PrefillExpandedKernel {
  static constexpr int kHeadDim = 192, kHeadDimV = 128;
  static constexpr bool PagedKVNonTMA = false, HasQv = false, PackGQA = false, Split = false;
};

// Pages of latents. All heads of a token share one key, so they are packed into a query tile.
struct PrefillAbsorbedKernel {
  static constexpr int kHeadDim = 64, kHeadDimV = 512;
  static constexpr bool PagedKVNonTMA = false, HasQv = true, PackGQA = true, Split = false;
};

// PrefillAbsorbedKernel with a row's keys split over thread blocks. A whole warp group loads pages by cp.async: a tile
// of few queries waits for memory, and the TMA of one thread keeps less in flight (flash_api.cpp: get_pagedkv_tma).
struct DecodeKernel {
  static constexpr int kHeadDim = 64, kHeadDimV = 512;
  static constexpr bool PagedKVNonTMA = true, HasQv = true, PackGQA = true, Split = true;
};

// Launches a kernel, after FA3's own scheduler where `params` asks for it. Throws std::runtime_error on a CUDA error.
template <typename Kernel>
void Launch(Flash_fwd_params& params, cudaStream_t stream);

}  // namespace mla
