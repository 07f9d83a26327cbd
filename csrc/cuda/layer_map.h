// The layer map as dense blocks.
#pragma once

#include <map>
#include <vector>

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
    std::map<std::vector<int>, std::vector<int>> students_of;  // set of teachers → students
    std::vector<int> slot(n, -1);
    size_t next = 0;
    for (int i = 0; i < m; ++i) {
      std::vector<int> attended;
      if (counts.empty())
        for (int j = 0; j < n; ++j) attended.push_back(j);
      else
        for (int64_t k = 0; k < counts[i]; ++k) attended.push_back(int(layers[next++]));
      if (omega[i] == 0) continue;
      for (int j : attended) slot[j] = 0;
      students_of[std::move(attended)].push_back(i);
    }
    for (int j = 0; j < n; ++j)
      if (slot[j] == 0) slot[j] = ns++, teachers.push_back(j);
    for (int j = 0; j < n; ++j)
      if (slot[j] < 0) teachers.push_back(j);
    for (auto& [attended, members] : students_of) {
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
