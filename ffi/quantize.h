// Activations to FP8: numbers of float8_e4m3fn with a float32 scale for each row's 128 columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shapes.h"

namespace mla {

struct Quantize {
  int64_t rows, columns;     // M, K
  const void* x;             // bfloat16 [M, K]; gated: [M, 2 K], gate and up
  const float* row_weights;  // gated: [M], silu(gate) x up x weight is quantized; else null
  void* q;                   // float8_e4m3fn [M, K]
  float* scales;             // [M, ceil(K / 128)]
};

cudaError_t QuantizeRows(const Quantize& call, int num_sm, cudaStream_t stream);

}  // namespace mla
