// The router after its product: each token's scores, groups, top k and weights (route in model/router.py).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mla {

constexpr int64_t kMaxRouted = 512;  // experts, 16 a lane
constexpr int64_t kMaxTop = 32;      // experts of a token, and groups: one a lane

struct Route {
  int64_t tokens, parts, experts, top;  // T, P, E, k
  int64_t groups, kept_groups;
  bool sigmoid, normalize;
  float scale;
  int32_t no_expert;
  const float* logits;   // [T, P, E], summed over P
  const float* bias;     // [L, E]; null for a softmax
  const int32_t* layer;  // [1]
  const bool* valid;     // [T]
  int32_t* expert;       // [T, k]
  float* weight;         // [T, k]
};

cudaError_t RouteTokens(const Route& call, cudaStream_t stream);

}  // namespace mla
