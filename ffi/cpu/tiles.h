// The one loop over batch, leaves and chunks of coordinates that the coordinate-wise operations share, as work.
#ifndef FEDFUSE_CPU_TILES_H_
#define FEDFUSE_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "contract/buffers.h"
#include "cpu/work.h"

namespace fedfuse {

// Columns of a tile, wherever a leaf has enough. Their accumulators stay in the second-level cache while the rows go
// by; shorter pieces of rows cost more, since every piece begins with pages whose addresses have to be found and lines
// nobody has fetched. Two short pieces cost more than one that is longer by half.
inline constexpr std::int64_t kWantedColumns = 16384;
inline constexpr std::int64_t kMostColumns = kWantedColumns * 3 / 2;
// Tiles that a thread has at least, so that none waits long for another's last one, unless they had fewer columns than
// are worth it.
inline constexpr std::int64_t kTilesPerThread = 8;
inline constexpr std::int64_t kFewestColumns = 1024;

inline std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Tasks that keep the threads of this machine busy.
inline std::int64_t tasks_wanted() {
  static const std::int64_t threads = std::max(1u, std::thread::hardware_concurrency());
  return threads * kTilesPerThread;
}

// A chunk of the coordinates of one leaf, in one element of the batch.
struct Tile {
  std::int64_t batch;
  std::int64_t leaf;
  std::int64_t begin;
  std::int64_t columns;
};

class Tiles {
 public:
  // Pieces of exactly so many columns, and what is left of a leaf.
  Tiles(const Shape& shape, std::int64_t columns)
      : Tiles(shape, std::vector<std::int64_t>(shape.coordinates.size(), columns)) {}

  // Pieces of a leaf as like in size as can be, and of a size that keeps the threads busy.
  static Tiles balanced(const Shape& shape) {
    std::int64_t all = 0;
    for (std::int64_t coordinates : shape.coordinates) all += shape.batch.count * coordinates;
    const std::int64_t wanted = std::clamp(all / tasks_wanted(), kFewestColumns, kWantedColumns);
    std::vector<std::int64_t> columns;
    for (std::int64_t coordinates : shape.coordinates) {
      const std::int64_t pieces = std::max<std::int64_t>(1, (coordinates + wanted / 2) / wanted);  // rounded
      const std::int64_t grains = quotient_up(quotient_up(coordinates, pieces), kGrain);
      columns.push_back(std::max<std::int64_t>(1, grains) * kGrain);
    }
    return Tiles(shape, std::move(columns));
  }

  std::int64_t count() const { return count_; }

  Tile operator[](std::int64_t index) const {
    const std::int64_t per_batch = first_tile_.back();
    const std::int64_t within = index % per_batch;
    const auto next_leaf = std::upper_bound(first_tile_.begin(), first_tile_.end(), within);
    const std::int64_t leaf = next_leaf - first_tile_.begin() - 1;
    const std::int64_t begin = (within - first_tile_[leaf]) * columns_[leaf];
    return {index / per_batch, leaf, begin, std::min(columns_[leaf], coordinates_[leaf] - begin)};
  }

 private:
  // Whole vectors, and whole tiles of the kernels, whatever the type.
  static constexpr std::int64_t kGrain = 256;
  static_assert(kMostColumns % kGrain == 0, "rounding up does not pass it");

  Tiles(const Shape& shape, std::vector<std::int64_t> columns)
      : coordinates_(shape.coordinates), columns_(std::move(columns)) {
    first_tile_.push_back(0);
    for (std::size_t leaf = 0; leaf < coordinates_.size(); ++leaf) {
      first_tile_.push_back(first_tile_.back() + quotient_up(coordinates_[leaf], columns_[leaf]));
    }
    count_ = shape.batch.count * first_tile_.back();
  }

  std::vector<std::int64_t> coordinates_;
  std::vector<std::int64_t> columns_;     // of a tile of each leaf; its last may have fewer
  std::vector<std::int64_t> first_tile_;  // of each leaf, and one past the last
  std::int64_t count_;
};

// A chunk of the coordinates of one leaf, for some neighbouring clients.
struct RowPiece {
  Tile tile;
  std::int64_t first_client;
  std::int64_t clients;
};

// Pieces of client-stacked results, for operations that need no more than one client to write a row: one after the
// other as they lie in memory, so that a page that the system has to clear is written while the caches still have it.
class RowPieces {
 public:
  explicit RowPieces(const Shape& shape) : clients_(shape.clients), stretches_(shape, kStretch) {
    first_piece_.push_back(0);
    for (std::int64_t stretch = 0; stretch < stretches_.count(); ++stretch) {
      const std::int64_t columns = stretches_[stretch].columns;
      const std::int64_t pieces = quotient_up(columns, kWantedColumns) * quotient_up(clients_, clients_of(columns));
      first_piece_.push_back(first_piece_.back() + pieces);
    }
  }

  std::int64_t count() const { return first_piece_.back(); }

  RowPiece operator[](std::int64_t index) const {
    const auto next_stretch = std::upper_bound(first_piece_.begin(), first_piece_.end(), index);
    const std::int64_t stretch = next_stretch - first_piece_.begin() - 1;
    const std::int64_t within = index - first_piece_[stretch];
    const Tile whole = stretches_[stretch];
    const std::int64_t pieces_of_row = quotient_up(whole.columns, kWantedColumns);
    const std::int64_t skipped = within % pieces_of_row * kWantedColumns;
    const std::int64_t first_client = within / pieces_of_row * clients_of(whole.columns);
    const Tile tile{whole.batch, whole.leaf, whole.begin + skipped, std::min(kWantedColumns, whole.columns - skipped)};
    return {tile, first_client, std::min(clients_of(whole.columns), clients_ - first_client)};
  }

 private:
  // Of a longer row, all clients' first columns come first: what they are made from stays in the last-level cache.
  static constexpr std::int64_t kStretch = std::int64_t{1} << 20;

  // Rows of a piece: short ones are worth a task only together.
  static std::int64_t clients_of(std::int64_t columns) { return std::max<std::int64_t>(1, kWantedColumns / columns); }

  std::int64_t clients_;
  Tiles stretches_;
  std::vector<std::int64_t> first_piece_;  // of each stretch, and one past the last
};

// Whether a client takes part. A byte that is neither 0 nor 1 is not a bool; here it is whatever is not 0.
inline bool is_present(const View& where, const Shape& shape, std::int64_t batch, std::int64_t client) {
  return !where.present() || where.at(shape.batch, batch)[client] != std::byte{0};
}

// Where a tile of a view without a client axis begins.
inline std::byte* tile_data(const View& view, const Shape& shape, const Tile& tile) {
  return view.at(shape.batch, tile.batch) + tile.begin * bytes_of(view.type);
}

// Where a tile begins in one client's row of a client-stacked view.
inline std::byte* row_data(const View& view, const Shape& shape, const Tile& tile, std::int64_t client) {
  return tile_data(view, shape, tile) + client * shape.coordinates[tile.leaf] * bytes_of(view.type);
}

// Where the tile begins in the rows of a client-stacked view, for the clients that take part (all, without `where`).
inline void gather_rows(const View& view, const View& where, const Shape& shape, const Tile& tile,
                        std::vector<void*>* rows) {
  std::byte* row = tile_data(view, shape, tile);
  const std::int64_t stride = shape.coordinates[tile.leaf] * bytes_of(view.type);
  rows->clear();
  for (std::int64_t client = 0; client < shape.clients; ++client, row += stride) {
    if (is_present(where, shape, tile.batch, client)) rows->push_back(row);
  }
}

// Bytes of all the updates, for Work::cost.
inline std::int64_t stacked_bytes(const Shape& shape, const std::vector<View>& leaves) {
  std::int64_t bytes = 0;
  for (std::size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    bytes += shape.batch.count * shape.clients * shape.coordinates[leaf] * bytes_of(leaves[leaf].type);
  }
  return bytes;
}

// Work of one task a tile: `run_tile(tile)`.
template <typename RunTile>
Work cut_tiles(const Tiles& tiles, std::int64_t cost, RunTile run_tile) {
  Work work;
  work.tasks = tiles.count();
  work.cost = cost;
  work.run = [tiles, run_tile = std::move(run_tile)](std::int64_t task) { run_tile(tiles[task]); };
  return work;
}

// Work of one task a piece: `run_piece(piece)`.
template <typename RunPiece>
Work cut_rows(const RowPieces& pieces, std::int64_t cost, RunPiece run_piece) {
  Work work;
  work.tasks = pieces.count();
  work.cost = cost;
  work.run = [pieces, run_piece = std::move(run_piece)](std::int64_t task) { run_piece(pieces[task]); };
  return work;
}

// Calls `run` with a zero of the type in which elements of `type` are added up.
template <typename Run>
void with_accumulator(Type type, const Run& run) {
  if (accumulator_of(type) == Type::kFloat64) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_TILES_H_
