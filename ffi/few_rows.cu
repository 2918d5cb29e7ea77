// The launch of few_rows.h's kernel (few_rows/kernel.h): an instance for the format and the rows, tensor maps,
// clusters.

#include "few_rows.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>

#include "few_rows/config.h"
#include "few_rows/kernel.h"
#include "grouped/launch.h"

namespace mla::few_rows {
namespace {

// The CTAs over whose cluster the inputs of a tile are divided: those of the least time by this model of it, in
// hundredths of a microsecond on an H100. A CTA streams its stages; a cluster costs more the more CTAs are in clusters.
// All clusters must run at once, or the last ones take as long again: a cluster lies within a GPC, and of the GPCs'
// multiprocessors some are disabled. An H100 was seen to run 30 clusters of four, not 33. The limits here are
// constants, not the driver's, and below it: sums must not be in another order on the next GPU, whose other
// multiprocessors are disabled.
template <typename C>
int ChooseCluster(int64_t tiles, int64_t blocks) {
  constexpr struct {
    int size, active;
  } kClusters[] = {{2, 64}, {4, 28}, {8, 12}};
  constexpr int64_t kStage = C::kFp8 ? 20 : 14, kCluster = 50, kCta = 3;
  int64_t best_time = blocks * kStage;
  int best = 1;
  for (auto [size, active] : kClusters) {
    int64_t time = (blocks + size - 1) / size * kStage + kCluster + tiles * size * kCta;
    if (time >= best_time || tiles > active) continue;
    best_time = time;
    best = size;
  }
  return best;
}

template <typename C>
cudaError_t Launch(const FewRows& call, int num_sm, cudaStream_t stream) {
  Encode encode;
  if (cudaError_t status = FindEncode(encode); status != cudaSuccess) return status;
  Maps<C> maps;
  constexpr cuuint64_t kBytes = C::kFp8 ? 1 : 2;
  auto inputs = static_cast<cuuint64_t>(call.inputs), outputs = static_cast<cuuint64_t>(call.outputs);
  CUresult result =
      MakeMap(encode, &maps.weights, C::kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
              call.weights, {inputs, outputs, static_cast<cuuint64_t>(call.matrices)},
              {inputs * kBytes, inputs * outputs * kBytes}, {C::kInputs, C::kOutputs, 1});
  for (int i = 0; i < C::kMaps && result == CUDA_SUCCESS; ++i) {
    result = MakeMap(encode, &maps.rows[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, call.x,
                     {64, static_cast<cuuint64_t>(call.rows), inputs / 64}, {inputs * 2, 128},
                     {64, static_cast<cuuint32_t>(C::kMinRows << i), C::kInputs / 64});
  }
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;

  int64_t output_tiles = (call.outputs + C::kOutputs - 1) / C::kOutputs;
  int64_t blocks = (call.inputs + C::kInputs - 1) / C::kInputs;
  // An upper bound: which groups have rows is known on the device only.
  int64_t used_groups = std::min(call.rows, call.groups);
  int64_t row_tiles = used_groups + (call.rows - used_groups) / C::kMaxRows;
  // Several groups' tiles fill the GPU, mostly, and were slower when divided.
  int cluster = call.groups == 1 ? ChooseCluster<C>(row_tiles * output_tiles, blocks) : 1;
  int64_t clusters = std::min<int64_t>(num_sm / cluster, row_tiles * output_tiles);
  Arguments args{call.scales,
                 call.group_sizes,
                 call.first_matrix,
                 static_cast<__nv_bfloat16*>(call.out),
                 static_cast<int>(call.groups),
                 static_cast<int>(call.inputs),
                 static_cast<int>(call.outputs),
                 static_cast<int>(call.block_outputs)};
  return LaunchClusters(FewRowsKernel<C>, clusters, cluster, kThreads, C::kBytes, stream, maps, args);
}

template <WeightFormat kFormat>
cudaError_t LaunchFormat(const FewRows& call, int num_sm, cudaStream_t stream) {
  if (call.max_rows <= 8) return Launch<Config<kFormat, 8>>(call, num_sm, stream);
  if (call.max_rows <= 32) return Launch<Config<kFormat, 32>>(call, num_sm, stream);
  if (call.max_rows <= 64) return Launch<Config<kFormat, 64>>(call, num_sm, stream);
  return Launch<Config<kFormat, 128>>(call, num_sm, stream);
}

}  // namespace
}  // namespace mla::few_rows

namespace mla {

cudaError_t MultiplyFewRows(const FewRows& call, int num_sm, cudaStream_t stream) {
  switch (call.format) {
    case WeightFormat::kBf16:
      return few_rows::LaunchFormat<WeightFormat::kBf16>(call, num_sm, stream);
    case WeightFormat::kBlockFp8:
      return few_rows::LaunchFormat<WeightFormat::kBlockFp8>(call, num_sm, stream);
    default:
      return few_rows::LaunchFormat<WeightFormat::kGroupFp8>(call, num_sm, stream);
  }
}

}  // namespace mla
