// The sums of the squares of all clients over one block of coordinates, which norms and dot products share.
#ifndef FEDFUSE_CPU_SQUARES_H_
#define FEDFUSE_CPU_SQUARES_H_

#include <cstdint>
#include <vector>

#include "contract/buffers.h"
#include "cpu/isa.h"
#include "cpu/tiles.h"

namespace fedfuse {

// Calls use(row, sum) for every client in order; for those who do not take part, with null and 0.
template <typename Use>
void for_each_square(const View& updates, const View& where, const Shape& shape, const Tile& tile, Use use) {
  thread_local std::vector<void*> rows;
  thread_local std::vector<double> sums;
  gather_rows(updates, where, shape, tile, &rows);
  sums.resize(rows.size());
  linear_kernels(updates.type).sums_of_squares(rows.data(), rows.size(), tile.columns, sums.data());
  std::size_t row = 0;
  for (std::int64_t client = 0; client < shape.clients; ++client) {
    if (is_present(where, shape, tile.batch, client)) {
      use(rows[row], sums[row]);
      ++row;
    } else {
      use(nullptr, 0.0);
    }
  }
}

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_SQUARES_H_
