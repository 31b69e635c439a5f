// Work on the rows of a matrix, shared out over threads.
//
// Rows are cut into pieces of a size that does not depend on the number of threads, so neither do the results.

#pragma once

#include <algorithm>
#include <cstdint>

#include "thread_pool.h"

namespace mindrlhf {

constexpr int64_t kNumbersAtOnce = 1 << 14;  // of a piece of rows

inline const float* Read(void* data) { return static_cast<const float*>(data); }
inline float* Write(void* data) { return static_cast<float*>(data); }

inline int64_t RowsAtOnce(int64_t columns) { return std::max<int64_t>(1, kNumbersAtOnce / columns); }

// Calls work(row) for each row, by all threads.
template <class Work>
int EachRow(int64_t rows, int64_t columns, const Work& work) {
  const int64_t step = RowsAtOnce(columns);
  return Exclusively([&] {
    SharedPool().Run(static_cast<int>(CeilDiv(rows, step)), [&](int piece, int) {
      for (int64_t row = piece * step; row < std::min(rows, (piece + 1) * step); ++row) work(row);
      return 0;
    });
  });
}

}  // namespace mindrlhf
