// What the CUDA handlers share.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace mla {

// Begins a handler's binding with XLA's stream.
inline auto OnStream() { return xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(); }

inline xla::ffi::Error InternalError(const char* target, const std::string& reason) {
  return xla::ffi::Error::Internal(std::string(target) + ": " + reason);
}

// Checks that the current device is a Hopper GPU, and tells its multiprocessors.
inline xla::ffi::Error CheckHopper(const char* target, int& num_sm) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  auto attribute = [&](int* value, cudaDeviceAttr which) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, which, device);
  };
  attribute(&num_sm, cudaDevAttrMultiProcessorCount);
  attribute(&major, cudaDevAttrComputeCapabilityMajor);
  attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  if (status != cudaSuccess) return InternalError(target, cudaGetErrorString(status));
  if (major != 9 || minor != 0) {
    return InternalError(target, "the kernels are for compute capability 9.0 (Hopper), this GPU has " +
                                     std::to_string(major) + "." + std::to_string(minor));
  }
  return xla::ffi::Error::Success();
}

// Calls `launch(num_sm)`, which returns a cudaError_t.
template <typename Launch>
xla::ffi::Error LaunchOnHopper(const char* target, const Launch& launch) {
  int num_sm = 0;
  if (xla::ffi::Error error = CheckHopper(target, num_sm); error.failure()) return error;
  cudaError_t status = launch(num_sm);
  return status == cudaSuccess ? xla::ffi::Error::Success() : InternalError(target, cudaGetErrorString(status));
}

}  // namespace mla
