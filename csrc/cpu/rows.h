// The rows of a problem, spread over threads.
#pragma once

#include <memory>
#include <vector>

#include "../tensors.h"
#include "problem.h"

namespace alp {

// The layer map as dense blocks: student layers with one and the same set of teacher layers form a
// group; so do, for the teacher's gradients, teacher layers with one and the same set of students.
struct Groups {
  std::vector<std::vector<int>> indices;  // storage behind the pointers
  std::vector<Group> student, teacher;
  std::unique_ptr<bool[]> student_active, teacher_active;

  Groups(int m, int n, const std::vector<int64_t>& counts, const std::vector<int64_t>& layers,
         const std::vector<double>& omega, bool with_teacher);

  void hand_to(Problem* problem) const;

 private:
  Group group(const std::vector<int>& students, const std::vector<int>& teachers);
};

// How the processor is to read and write the rows: Problem's stream and fetching.
void suit_processor(Problem* problem, const Side& students, const Side& teachers);

// What the rows add up to, [m] each but for d_scale.
struct Sums {
  std::vector<double> loss, entropy;
  double d_scale = 0;
};

Sums run_rows(const Problem& problem, bool f64);

}  // namespace alp
