// The checks of the groups of a grouped product.
#pragma once

#include <string>

#include "../checker.h"
#include "../shapes.h"

namespace mla {

// Returns the number of groups.
inline int64_t CheckGroups(Checker& check, const ffi::AnyBuffer& group_sizes, const ffi::AnyBuffer& first) {
  check.Rank("group_sizes", group_sizes, 1);
  if (!check.ok()) return 0;
  int64_t groups = group_sizes.dimensions()[0];
  check.Expect(groups >= 1 && groups <= kMaxGroups, "group_sizes",
               "expected 1 to " + std::to_string(kMaxGroups) + " groups, got " + std::to_string(groups));
  check.Buffer("group_sizes", group_sizes, ffi::S32, {groups});
  check.Buffer("first", first, ffi::S32, {1});
  return groups;
}

}  // namespace mla
