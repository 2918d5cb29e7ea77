// Included before everything else in FA3's own files: its macros end the process on a CUDA error. A server must not be
// ended by a kernel that can't be launched, so here they throw, and the handlers turn that into an error of the call.
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
