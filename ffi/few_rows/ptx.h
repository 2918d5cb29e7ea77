// Instructions of Hopper that only the kernel of few_rows.h uses: the tensor cores on bfloat16, and parts sent to a
// rank.
#pragma once

#include <cstdint>
#include <utility>

#include "../grouped/ptx.h"
#include "cute/arch/mma_sm90_gmma.hpp"

namespace mla::few_rows {

namespace gmma = cute::SM90::GMMA;

// Writes two floats to the shared memory of a rank, and counts their bytes at its barrier.
__device__ inline void SendToRank(float* to, float x, float y, uint64_t* barrier, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   OfRank(Shared(to), rank)),
               "f"(x), "f"(y), "r"(OfRank(Shared(barrier), rank))
               : "memory");
}

template <int kRows>
struct Wgmma;
#define MLA_WGMMA(N)                                                                 \
  template <>                                                                        \
  struct Wgmma<N> {                                                                  \
    using SS = gmma::MMA_64x##N##x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>; \
    using RS = gmma::MMA_64x##N##x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>; \
  }
MLA_WGMMA(8);
MLA_WGMMA(16);
MLA_WGMMA(32);
MLA_WGMMA(64);
MLA_WGMMA(128);
#undef MLA_WGMMA

// d = scale x d + a x b: 64 outputs of 16 inputs, times kRows rows. `a` is in registers here, in shared memory below.
template <int kRows, size_t... i>
__device__ void Multiply(const uint32_t (&a)[4], uint64_t b, float* d, gmma::ScaleOut scale,
                         std::index_sequence<i...>) {
  Wgmma<kRows>::RS::fma(a[0], a[1], a[2], a[3], b, d[i]..., scale);
}

template <int kRows>
__device__ void Multiply(const uint32_t (&a)[4], uint64_t b, float (&d)[kRows / 2], gmma::ScaleOut scale) {
  Multiply<kRows>(a, b, d, scale, std::make_index_sequence<kRows / 2>());
}

template <int kRows, size_t... i>
__device__ void Multiply(uint64_t a, uint64_t b, float* d, std::index_sequence<i...>) {
  Wgmma<kRows>::SS::fma(a, b, d[i]..., gmma::ScaleOut::One);
}

template <int kRows>
__device__ void Multiply(uint64_t a, uint64_t b, float (&d)[kRows / 2]) {
  Multiply<kRows>(a, b, d, std::make_index_sequence<kRows / 2>());
}

__device__ inline uint32_t Times(uint32_t pair, uint32_t factor) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(factor));
  return product;
}

__device__ inline void LoadMatrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

}  // namespace mla::few_rows
