// The layer map as dense blocks.
#pragma once

#include <vector>

#include "../groups.h"
#include "problem.h"

namespace alp::cuda {

// Student layers with one and the same set of teacher layers form a group. Layers of weight 0 and teacher
// layers that nobody attends to come behind the others.
struct LayerMap {
  std::vector<int> students, teachers;  // slot → layer, inactive layers last
  int ms = 0, ns = 0;                   // active ones
  std::vector<Group> groups;
  std::vector<uint16_t> index;

  LayerMap(int m, int n, const std::vector<int64_t>& counts, const std::vector<int64_t>& layers,
           const std::vector<double>& omega) {
    const std::vector<std::vector<int>> attended_by_student = attended_layers(n, counts, layers, omega);
    std::vector<int> slot(n, -1);
    for (const auto& attended : attended_by_student)
      for (int j : attended) slot[j] = 0;
    for (int j = 0; j < n; ++j)
      if (slot[j] == 0) slot[j] = ns++, teachers.push_back(j);
    for (int j = 0; j < n; ++j)
      if (slot[j] < 0) teachers.push_back(j);
    for (const auto& [attended, members] : groups_of_equal(attended_by_student)) {
      groups.push_back({uint16_t(ms), uint16_t(members.size()), uint16_t(index.size()), uint16_t(attended.size())});
      for (int j : attended) index.push_back(uint16_t(slot[j]));
      for (int i : members) students.push_back(i);
      ms += int(members.size());
    }
    for (int i = 0; i < m; ++i)
      if (omega[i] == 0) students.push_back(i);
  }
};

}  // namespace alp::cuda
