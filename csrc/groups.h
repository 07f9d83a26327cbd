// The operator's layer map, read once for all backends. Host code alone.
#pragma once

#include <cstdint>
#include <map>
#include <numeric>
#include <vector>

namespace alp {

// Per student layer the teacher layers that it may attend to; none for a student layer of weight 0. The map gives
// their number per student layer and all of them in a row; without counts each may attend to all n.
inline std::vector<std::vector<int>> attended_layers(int n, const std::vector<int64_t>& counts,
                                                     const std::vector<int64_t>& layers,
                                                     const std::vector<double>& omega) {
  std::vector<std::vector<int>> attended(omega.size());
  auto next = layers.begin();
  for (size_t i = 0; i < omega.size(); ++i) {
    const auto first = next;
    if (!counts.empty()) next += counts[i];
    if (omega[i] == 0) continue;
    if (counts.empty()) {
      attended[i].resize(n);
      std::iota(attended[i].begin(), attended[i].end(), 0);
    } else {
      attended[i].assign(first, next);
    }
  }
  return attended;
}

// Set → the indices k with sets[k] equal to it, which form a group. Empty sets are left out.
inline std::map<std::vector<int>, std::vector<int>> groups_of_equal(const std::vector<std::vector<int>>& sets) {
  std::map<std::vector<int>, std::vector<int>> groups;
  for (size_t k = 0; k < sets.size(); ++k)
    if (!sets[k].empty()) groups[sets[k]].push_back(int(k));
  return groups;
}

}  // namespace alp
