// Instructions of Hopper that the grouped products are made of: barriers, clusters, and operands in shared memory.
#pragma once

#include <cstdint>

namespace mla {

constexpr int kSwizzle = 128;  // bytes of a row in shared memory, swizzled in atoms of 8 rows

__device__ inline uint32_t Shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline uint32_t OfRank(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ inline void Init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(Shared(barrier)), "r"(count));
}

__device__ inline void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(Shared(barrier)) : "memory");
}

__device__ inline void ArriveAtRank(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(OfRank(Shared(barrier), rank)) : "memory");
}

__device__ inline void ExpectBytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(Shared(barrier)), "r"(bytes) : "memory");
}

__device__ inline void Wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(Shared(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline int ClusterRank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline int ClusterSize() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Waits until all threads of the cluster have started (or ended).
__device__ inline void ClusterSync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Descriptor of an operand in shared memory: K-major rows of 128 bytes, swizzled, atoms of 8 rows one behind the other.
__device__ inline uint64_t Descriptor(uint32_t address) {
  constexpr uint64_t kAtomStride = uint64_t{8 * kSwizzle >> 4} << 32, kSwizzle128 = uint64_t{1} << 62;
  return ((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | kAtomStride | kSwizzle128;
}

}  // namespace mla
