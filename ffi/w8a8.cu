// The launch of w8a8.h's kernel (w8a8/kernel.h).

#include "w8a8.h"

#include <algorithm>

#include "grouped/launch.h"
#include "w8a8/kernel.h"

namespace mla {

cudaError_t MultiplyW8A8(const W8A8& call, int num_sm, cudaStream_t stream) {
  using namespace w8a8;
  Encode encode;
  if (cudaError_t status = FindEncode(encode); status != cudaSuccess) return status;
  Maps maps;
  auto rows = static_cast<cuuint64_t>(call.rows), inputs = static_cast<cuuint64_t>(call.inputs);
  auto outputs = static_cast<cuuint64_t>(call.outputs), matrices = static_cast<cuuint64_t>(call.matrices);
  CUresult result = MakeMap(encode, &maps.rows, CU_TENSOR_MAP_DATA_TYPE_UINT8, call.x, {inputs, rows, 1},
                            {inputs, inputs * rows}, {kTile, kTile / kCluster, 1});
  if (result == CUDA_SUCCESS) {
    result = MakeMap(encode, &maps.weights, CU_TENSOR_MAP_DATA_TYPE_UINT8, call.weights, {inputs, outputs, matrices},
                     {inputs, inputs * outputs}, {kTile, kTile, 1});
  }
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  Arguments args{call.row_scales,
                 call.weight_scales,
                 call.group_sizes,
                 call.first_matrix,
                 static_cast<__nv_bfloat16*>(call.out),
                 static_cast<int>(call.rows),
                 static_cast<int>(call.inputs),
                 static_cast<int>(call.outputs),
                 static_cast<int>(call.groups)};
  // An upper bound of the tiles: which groups have rows is known on the device only.
  int64_t row_tiles = (call.rows + kTile - 1) / kTile + std::min(call.groups, call.rows) - 1;
  int64_t pairs = (call.outputs + kTile * kCluster - 1) / (kTile * kCluster);
  int64_t clusters = std::min<int64_t>(num_sm / kCluster, row_tiles * pairs);
  return LaunchClusters(W8A8Kernel, clusters, kCluster, kThreads, kBytes, stream, maps, args);
}

}  // namespace mla
