// jax_mla_cp._ffi: the handlers as capsules for jax.ffi.register_ffi_target, and the CUDA version they were built for.

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"
#ifdef JAX_MLA_CP_CUDA
#include <cuda_runtime_api.h>
#endif

XLA_FFI_DECLARE_HANDLER_SYMBOL(MlaPrefillExpandedCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MlaPrefillAbsorbedCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MlaDecodeCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ScheduleSplitsCpu);
#ifdef JAX_MLA_CP_CUDA
XLA_FFI_DECLARE_HANDLER_SYMBOL(MlaPrefillExpandedCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MlaPrefillAbsorbedCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MlaDecodeCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ScheduleSplitsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FewRowsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FewRowsScaledCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(W8A8Cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeRowsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeGatedCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RouteCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SortPairsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AddNormCuda);
#endif

namespace nb = nanobind;

namespace {

nb::dict Targets(XLA_FFI_Handler* expanded, XLA_FFI_Handler* absorbed, XLA_FFI_Handler* decode,
                 XLA_FFI_Handler* schedule) {
  nb::dict targets;
  targets["mla_prefill_expanded"] = nb::capsule(reinterpret_cast<void*>(expanded));
  targets["mla_prefill_absorbed"] = nb::capsule(reinterpret_cast<void*>(absorbed));
  targets["mla_decode"] = nb::capsule(reinterpret_cast<void*>(decode));
  targets["schedule_splits"] = nb::capsule(reinterpret_cast<void*>(schedule));
  return targets;
}

nb::dict Registrations() {
  nb::dict platforms;
  platforms["cpu"] = Targets(MlaPrefillExpandedCpu, MlaPrefillAbsorbedCpu, MlaDecodeCpu, ScheduleSplitsCpu);
#ifdef JAX_MLA_CP_CUDA
  nb::dict cuda = Targets(MlaPrefillExpandedCuda, MlaPrefillAbsorbedCuda, MlaDecodeCuda, ScheduleSplitsCuda);
  cuda["few_rows"] = nb::capsule(reinterpret_cast<void*>(FewRowsCuda));
  cuda["few_rows_scaled"] = nb::capsule(reinterpret_cast<void*>(FewRowsScaledCuda));
  cuda["w8a8"] = nb::capsule(reinterpret_cast<void*>(W8A8Cuda));
  cuda["quantize_rows"] = nb::capsule(reinterpret_cast<void*>(QuantizeRowsCuda));
  cuda["quantize_gated"] = nb::capsule(reinterpret_cast<void*>(QuantizeGatedCuda));
  cuda["route"] = nb::capsule(reinterpret_cast<void*>(RouteCuda));
  cuda["sort_pairs"] = nb::capsule(reinterpret_cast<void*>(SortPairsCuda));
  cuda["add_norm"] = nb::capsule(reinterpret_cast<void*>(AddNormCuda));
  platforms["CUDA"] = cuda;
#endif
  return platforms;
}

int BuiltForCuda() {
#ifdef JAX_MLA_CP_CUDA
  return CUDART_VERSION;
#else
  return 0;
#endif
}

int DriverCuda() {
#ifdef JAX_MLA_CP_CUDA
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
#else
  return 0;
#endif
}

}  // namespace

NB_MODULE(_ffi, m) {
  m.doc() = "FlashAttention-3 for MLA and grouped products as XLA FFI handlers. Loaded by jax_mla_cp.extension.";
  m.def("registrations", &Registrations, "Platform -> target name -> handler capsule.");
  m.def("built_for_cuda", &BuiltForCuda, "CUDA's version, as 1000 major + 10 minor; 0: only CPU handlers.");
  m.def("driver_cuda", &DriverCuda, "The newest CUDA version that this machine's driver runs; 0: no driver.");
}
