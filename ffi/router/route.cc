// The target `route` on a Hopper GPU (route.h): checks arguments and launches on XLA's stream. Nothing here allocates,
// synchronizes or reads device memory, so that XLA can record a call into a command buffer.

#include "route.h"

#include <algorithm>
#include <string>

#include "../checker.h"
#include "../hopper.h"

namespace mla {
namespace {

ffi::Error RunRoute(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer bias, ffi::AnyBuffer layer,
                    ffi::AnyBuffer valid, Result expert, Result weight, int64_t groups, int64_t kept_groups,
                    bool sigmoid, bool normalize, float scale, int32_t no_expert) {
  constexpr const char* target = "route";
  Checker check(target);
  check.Rank("logits", logits, 3);
  check.Rank("expert", *expert, 2);
  if (!check.ok()) return check.error();
  int64_t t = logits.dimensions()[0], p = logits.dimensions()[1], e = logits.dimensions()[2];
  int64_t k = expert->dimensions()[1];
  check.Expect(p >= 1, "logits", "expected at least one part, got none");
  check.Expect(e >= 1 && e <= kMaxRouted, "logits",
               "expected 1 to " + std::to_string(kMaxRouted) + " experts, got " + std::to_string(e));
  check.Expect(
      k >= 1 && k <= std::min(e, kMaxTop), "expert",
      "expected 1 to " + std::to_string(std::min(e, kMaxTop)) + " experts of a token, got " + std::to_string(k));
  check.Expect(
      groups >= 1 && groups <= kMaxTop && e % groups == 0, "groups",
      "expected 1 to " + std::to_string(kMaxTop) + ", and a divisor of the experts, got " + std::to_string(groups));
  check.Expect(kept_groups >= 1 && kept_groups <= groups && kept_groups * (e / groups) >= k, "kept_groups",
               "expected groups with " + std::to_string(k) + " experts, got " + std::to_string(kept_groups));
  check.Buffer("logits", logits, ffi::F32, {t, p, e});
  check.Buffer("bias", bias, ffi::F32, {Checker::kAny, e});
  bool biased = bias.element_count() > 0;
  check.Expect(biased == sigmoid, "bias", "expected a layer's, or more, for sigmoid scores, and none for a softmax");
  check.Buffer("layer", layer, ffi::S32, {1});
  check.Buffer("valid", valid, ffi::PRED, {t});
  check.Buffer("expert", *expert, ffi::S32, {t, k});
  check.Buffer("weight", *weight, ffi::F32, {t, k});
  if (!check.ok()) return check.error();
  if (t == 0) return ffi::Error::Success();
  Route call{t,
             p,
             e,
             k,
             groups,
             kept_groups,
             sigmoid,
             normalize,
             scale,
             no_expert,
             static_cast<const float*>(logits.untyped_data()),
             biased ? static_cast<const float*>(bias.untyped_data()) : nullptr,
             static_cast<const int32_t*>(layer.untyped_data()),
             static_cast<const bool*>(valid.untyped_data()),
             static_cast<int32_t*>(expert->untyped_data()),
             static_cast<float*>(weight->untyped_data())};
  return LaunchOnHopper(target, [&](int) { return RouteTokens(call, stream); });
}

auto BindRoute() {
  return OnStream()
      .Arg<ffi::AnyBuffer>()  // logits
      .Arg<ffi::AnyBuffer>()  // bias
      .Arg<ffi::AnyBuffer>()  // layer
      .Arg<ffi::AnyBuffer>()  // valid
      .Ret<ffi::AnyBuffer>()  // expert
      .Ret<ffi::AnyBuffer>()  // weight
      .Attr<int64_t>("groups")
      .Attr<int64_t>("kept_groups")
      .Attr<bool>("sigmoid")
      .Attr<bool>("normalize")
      .Attr<float>("scale")
      .Attr<int32_t>("no_expert");
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(RouteCuda, mla::RunRoute, mla::BindRoute(), {xla::ffi::Traits::kCmdBufferCompatible});
