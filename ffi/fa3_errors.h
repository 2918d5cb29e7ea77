// Included before all else in FA3's translation units. FA3's CHECK_CUDA ends the process on a CUDA error, and a kernel
// that cannot be launched must not end a server: here it throws, and the handlers return the error from the call.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda_check.h"

#undef CHECK_CUDA
#define CHECK_CUDA(call)                                                               \
  do {                                                                                 \
    cudaError_t status_ = (call);                                                      \
    if (status_ != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status_)); \
  } while (0)
