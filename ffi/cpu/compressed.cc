#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"
#include "math/half.h"
#include "math/platform.h"

namespace fedfuse {
namespace {

bool is_present(const View& where, const Batch& batch, std::int64_t index, std::int64_t client) {
  return !where.present() || where.at(batch, index)[client] != std::byte{0};
}

template <typename Element>
const Element* row_of(const View& view, const Batch& batch, std::int64_t index, std::int64_t client,
                      std::int64_t length) {
  return reinterpret_cast<const Element*>(view.at(batch, index)) + client * length;
}

// ---- Sparse -----------------------------------------------------------------------------------------------------

// Floating types in memory, to and from their accumulators.
struct Float32 {
  using Element = float;
  using Accumulator = float;
  static float widen(float value) { return value; }
  static float narrow(float value) { return value; }
};
struct Float64 {
  using Element = double;
  using Accumulator = double;
  static double widen(double value) { return value; }
  static double narrow(double value) { return value; }
};
struct BFloat16 {
  using Element = std::uint16_t;
  using Accumulator = float;
  static float widen(std::uint16_t value) { return bfloat16_to_float(value); }
  static std::uint16_t narrow(float value) { return float_to_bfloat16(value); }
};
struct Float16 {
  using Element = std::uint16_t;
  using Accumulator = float;
  static float widen(std::uint16_t value) { return float16_to_float(value); }
  static std::uint16_t narrow(float value) { return float_to_float16(value); }
};

template <typename Use>
void with_type(Type type, Use use) {
  switch (type) {
    case Type::kFloat64:
      return use(Float64());
    case Type::kBFloat16:
      return use(BFloat16());
    case Type::kFloat16:
      return use(Float16());
    default:
      return use(Float32());
  }
}

// The coordinates are cut into tiles, whose sums stay in cache while the clients go by. All indices are taken for
// sorted until one is found not to be, and then the sum is begun anew: each client's entries are first put in the order
// of the tiles, keeping their order within a tile. Where all sums fit in cache and there are few threads, each picks
// its own out of entries as they are.
template <typename Float>
class SparseSum {
  using Accumulator = typename Float::Accumulator;
  using Element = typename Float::Element;

 public:
  explicit SparseSum(std::shared_ptr<const SparseSumProblem> problem)
      : problem_(std::move(problem)), rows_(problem_->shape.batch.count * problem_->shape.clients) {
    while (problem_->shape.coordinates > kTilesWanted << width_bits_ && width_bits_ < kWidestBits) ++width_bits_;
    tiles_ = tiles_of(width_bits_);
    // Where its entries of each tile begin is kept for each row: for many clients of few entries, of fewer tiles.
    const std::int64_t most_starts = std::max(kMostStarts, rows_ * problem_->shape.entries);
    while (tiles_ > 1 && rows_ * (tiles_ + 1) > most_starts) tiles_ = tiles_of(++width_bits_);
    const std::int64_t threads = tasks_wanted() / kTilesPerThread;
    picks_ = threads <= kMostPicking && problem_->shape.coordinates <= kMostCoordinatesPicked;
    tiles_of_pick_ = quotient_up(tiles_, threads);
    pieces_ = std::min(tiles_, tasks_wanted());
  }

  std::int64_t pieces() const { return problem_->shape.batch.count * pieces_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t tiles() const { return problem_->shape.batch.count * tiles_; }

  // Sums neighbouring tiles over the clients, if their indices are sorted; finds out if they are not.
  //
  // A piece's entries of a client are those from where its first coordinate would be inserted to where the next piece's
  // would. If no piece finds any that it may not add, the row is sorted: they follow on one another from piece to
  // piece, each no less than the one before.
  void add_sorted(std::int64_t task) {
    thread_local std::vector<Stretch> stretches;
    if (!in_order_) return;
    const SparseShape& shape = problem_->shape;
    const std::int64_t batch = task / pieces_, piece = task % pieces_;
    const std::int64_t first_tile = tiles_ * piece / pieces_, last_tile = tiles_ * (piece + 1) / pieces_;
    const Accumulator* weights = row_of<Accumulator>(problem_->weights, shape.batch, batch, 0, 0);
    stretches.clear();
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      if (!is_present(problem_->where, shape.batch, batch, client)) continue;
      const std::int32_t* indices = row_of<std::int32_t>(problem_->indices, shape.batch, batch, client, shape.entries);
      const std::int64_t start = place_in(indices, begin_of(first_tile)), stop = place_in(indices, begin_of(last_tile));
      // Nobody adds what lies before the first coordinate and beyond the last.
      if (!may_be_sorted(indices) || (piece == 0 && !is_sorted(indices, start)) ||
          (piece + 1 == pieces_ && !is_sorted(indices + stop, shape.entries - stop))) {
        in_order_ = false;
        return;
      }
      const Element* values = row_of<Element>(problem_->values, shape.batch, batch, client, shape.entries);
      stretches.push_back({indices + start, indices + stop, values + start, weights[client]});
    }
    Accumulator* total = reinterpret_cast<Accumulator*>(problem_->total.at(shape.batch, batch));
    for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
      std::fill(total + begin_of(tile), total + begin_of(tile + 1), Accumulator{0});
      for (std::size_t i = 0; i < stretches.size(); ++i) {
        if (!in_order_) return;
        const Stretch& following = stretches[i + 1 < stretches.size() ? i + 1 : 0];
        if (!add_stretch(begin_of(tile), begin_of(tile + 1), following, &stretches[i], total)) in_order_ = false;
      }
    }
    for (const Stretch& stretch : stretches) {
      if (stretch.next != stretch.stop) in_order_ = false;
    }
  }

  void begin_anew_unless_in_order() {
    if (in_order_) return;
    starts_.resize(rows_ * (tiles_ + 1));
    arranged_.resize(rows_);
  }

  // Finds where each tile's entries begin in a row.
  void arrange(std::int64_t row) {
    if (in_order_) return;
    const SparseShape& shape = problem_->shape;
    const std::int64_t batch = row / shape.clients, client = row % shape.clients;
    if (!is_present(problem_->where, shape.batch, batch, client)) return;
    const std::int32_t* indices = row_of<std::int32_t>(problem_->indices, shape.batch, batch, client, shape.entries);
    std::int64_t* starts = starts_.data() + row * (tiles_ + 1);
    problem_->sorted[row] = is_sorted(indices, shape.entries);
    if (!problem_->sorted[row]) {
      if (picks_) return;
      const Element* values = row_of<Element>(problem_->values, shape.batch, batch, client, shape.entries);
      sort_by_tile(indices, values, starts, &arranged_[row]);
      return;
    }
    const std::int32_t* at = indices;
    for (std::int64_t tile = 0; tile <= tiles_; ++tile) {
      at = std::lower_bound(at, indices + shape.entries, begin_of(tile));
      starts[tile] = at - indices;
    }
  }

  // Sums a tile over the clients.
  void add_tile(std::int64_t index) {
    if (in_order_) return;
    const SparseShape& shape = problem_->shape;
    const std::int64_t batch = index / tiles_, tile = index % tiles_;
    if (picks_ && !all_sorted(batch)) {
      if (tile % tiles_of_pick_ == 0) pick(batch, tile);
      return;
    }
    Accumulator* total = reinterpret_cast<Accumulator*>(problem_->total.at(shape.batch, batch));
    std::fill(total + begin_of(tile), total + begin_of(tile + 1), Accumulator{0});
    const Accumulator* weights = row_of<Accumulator>(problem_->weights, shape.batch, batch, 0, 0);
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      if (!is_present(problem_->where, shape.batch, batch, client)) continue;
      const std::int64_t row = batch * shape.clients + client;
      const std::int64_t* starts = starts_.data() + row * (tiles_ + 1) + tile;
      const Accumulator weight = weights[client];
      if (problem_->sorted[row]) {
        const Element* values = row_of<Element>(problem_->values, shape.batch, batch, client, shape.entries);
        const std::int32_t* indices =
            row_of<std::int32_t>(problem_->indices, shape.batch, batch, client, shape.entries);
        for (std::int64_t i = starts[0]; i < starts[1]; ++i) total[indices[i]] += weight * Float::widen(values[i]);
      } else {
        const Entry* entries = arranged_[row].get();
        for (std::int64_t i = starts[0]; i < starts[1]; ++i) total[entries[i].index] += weight * entries[i].value;
      }
    }
  }

 private:
  struct Entry {
    std::int32_t index;
    Accumulator value;
  };

  // A client's entries from the next one to add to the end of a piece.
  struct Stretch {
    const std::int32_t* next;
    const std::int32_t* stop;
    const Element* values;
    Accumulator weight;
  };

  // Adds what lies from `begin` to `end`; false if something does that is not in order, which is not added.
  static bool add_stretch(std::int64_t begin, std::int64_t end, const Stretch& following, Stretch* stretch,
                          Accumulator* total) {
    const std::int32_t* const indices = stretch->next;
    const Element* const values = stretch->values;
    const Accumulator weight = stretch->weight;
    const std::int64_t most = stretch->stop - stretch->next;
    std::int64_t previous = begin, i = 0;
    // A tile has few of a client's entries: asked for only when it is their turn, they would be waited for.
    for (; i + kLine <= most && indices[i + kLine - 1] < end; i += kLine) {
      __builtin_prefetch(following.next + i);
      __builtin_prefetch(following.values + i);
      for (std::int64_t j = 0; j < kLine; ++j) {
        if (!add_entry(indices[i + j], end, weight * Float::widen(values[i + j]), &previous, total)) return false;
      }
    }
    for (; i < most && indices[i] < end; ++i) {
      if (!add_entry(indices[i], end, weight * Float::widen(values[i]), &previous, total)) return false;
    }
    stretch->next += i;
    stretch->values += i;
    return true;
  }

  static FEDFUSE_INLINE bool add_entry(std::int64_t index, std::int64_t end, Accumulator term, std::int64_t* previous,
                                       Accumulator* total) {
    if (index < *previous || index >= end) return false;
    *previous = index;
    total[index] += term;
    return true;
  }

  static constexpr std::int64_t kLine = 64 / sizeof(std::int32_t);  // indices in a line of the caches

  // A glance at a row: most that are not sorted, such as those in the order of their size or padded with -1, show it.
  bool may_be_sorted(const std::int32_t* indices) const {
    const std::int64_t count = problem_->shape.entries;
    return is_sorted(indices, std::min(count, kLine)) && (count == 0 || indices[0] <= indices[count - 1]);
  }

  // Where in a sorted row a coordinate would be inserted: a number from 0 to `entries`, whatever the row. Begins where
  // it would be if the indices were spread evenly, since a bisection of the whole row is a cache miss at every step.
  std::int64_t place_in(const std::int32_t* indices, std::int64_t coordinate) const {
    const std::int64_t count = problem_->shape.entries;
    const double share = static_cast<double>(coordinate) / static_cast<double>(problem_->shape.coordinates);
    std::int64_t low = static_cast<std::int64_t>(share * static_cast<double>(count)), high = low;
    for (std::int64_t step = kLine; high < count && indices[high] < coordinate; step *= 2) {
      low = high + 1;
      high = std::min(high + step, count);
    }
    for (std::int64_t step = kLine; low > 0 && indices[low - 1] >= coordinate; step *= 2) {
      high = low - 1;
      low = std::max<std::int64_t>(low - step, 0);
    }
    return std::lower_bound(indices + low, indices + high, coordinate) - indices;
  }

  bool all_sorted(std::int64_t batch) const {
    for (std::int64_t client = 0; client < problem_->shape.clients; ++client) {
      if (!is_present(problem_->where, problem_->shape.batch, batch, client)) continue;
      if (!problem_->sorted[batch * problem_->shape.clients + client]) return false;
    }
    return true;
  }

  // Sums several tiles over the clients, of entries in any order.
  void pick(std::int64_t batch, std::int64_t first_tile) {
    const SparseShape& shape = problem_->shape;
    const std::int64_t begin = begin_of(first_tile), end = begin_of(first_tile + tiles_of_pick_);
    const auto origin = static_cast<std::uint32_t>(begin), count = static_cast<std::uint32_t>(end - begin);
    Accumulator* total = reinterpret_cast<Accumulator*>(problem_->total.at(shape.batch, batch));
    std::fill(total + begin, total + end, Accumulator{0});
    const Accumulator* weights = row_of<Accumulator>(problem_->weights, shape.batch, batch, 0, 0);
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      if (!is_present(problem_->where, shape.batch, batch, client)) continue;
      const Element* values = row_of<Element>(problem_->values, shape.batch, batch, client, shape.entries);
      const std::int32_t* indices = row_of<std::int32_t>(problem_->indices, shape.batch, batch, client, shape.entries);
      const Accumulator weight = weights[client];
      for (std::int64_t first = 0; first < shape.entries; first += kPickedAtOnce) {
        Entry picked[kPickedAtOnce];
        std::int64_t num_picked = 0;
        // Without a branch, which nobody could predict: what is not picked is written over.
        for (std::int64_t i = first; i < std::min(first + kPickedAtOnce, shape.entries); ++i) {
          picked[num_picked] = {indices[i], Float::widen(values[i])};
          num_picked += static_cast<std::uint32_t>(indices[i]) - origin < count;
        }
        for (std::int64_t i = 0; i < num_picked; ++i) total[picked[i].index] += weight * picked[i].value;
      }
    }
  }

  // Everybody who picks reads all entries: more threads are better off sharing the work of putting them in order.
  static constexpr std::int64_t kMostPicking = 4;
  static constexpr std::int64_t kMostCoordinatesPicked = (std::int64_t{8} << 20) / sizeof(Accumulator);
  static constexpr std::int64_t kPickedAtOnce = 512;

  static constexpr std::int64_t kTilesWanted = 32;
  static constexpr int kWidestBits = 16;
  static constexpr std::int64_t kMostStarts = (std::int64_t{32} << 20) / sizeof(std::int64_t);

  std::int64_t tiles_of(int width_bits) const {
    return quotient_up(problem_->shape.coordinates, std::int64_t{1} << width_bits);
  }

  std::int64_t begin_of(std::int64_t tile) const { return std::min(tile << width_bits_, problem_->shape.coordinates); }

  static bool is_sorted(const std::int32_t* indices, std::int64_t count) {
    constexpr std::int64_t kStretch = 4096;  // long enough for vectors, short enough to stop early
    for (std::int64_t first = 0; first + 1 < count; first += kStretch) {
      const std::int64_t last = std::min(first + kStretch, count - 1);
      unsigned descents = 0;
      for (std::int64_t i = first; i < last; ++i) descents |= indices[i] > indices[i + 1];
      if (descents != 0) return false;
    }
    return true;
  }

  // By counting, which keeps the order within a tile. Memory first: without it, the row has no entries.
  void sort_by_tile(const std::int32_t* indices, const Element* values, std::int64_t* starts,
                    std::unique_ptr<Entry[]>* arranged) const {
    const std::int64_t count = problem_->shape.entries;
    // A negative index is beyond the end as well.
    const auto end = static_cast<std::uint32_t>(problem_->shape.coordinates);
    const auto is_inside = [&](std::int32_t index) { return static_cast<std::uint32_t>(index) < end; };
    arranged->reset(new Entry[count]);
    std::vector<std::int64_t> next(tiles_);
    for (std::int64_t i = 0; i < count; ++i) {
      if (is_inside(indices[i])) ++starts[(indices[i] >> width_bits_) + 1];
    }
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      next[tile] = starts[tile];
      starts[tile + 1] += starts[tile];
    }
    for (std::int64_t i = 0; i < count; ++i) {
      if (is_inside(indices[i])) (*arranged)[next[indices[i] >> width_bits_]++] = {indices[i], Float::widen(values[i])};
    }
  }

  std::shared_ptr<const SparseSumProblem> problem_;
  std::int64_t rows_;
  int width_bits_ = 10;  // a tile's coordinates are a power of two
  std::int64_t tiles_;
  std::int64_t pieces_;
  std::atomic<bool> in_order_{true};  // all indices, as far as anybody has looked
  bool picks_;
  std::int64_t tiles_of_pick_;
  std::vector<std::int64_t> starts_;                // of each row and tile, and one past the last tile
  std::vector<std::unique_ptr<Entry[]>> arranged_;  // the entries of each row that is not sorted, without picking
};

template <typename Float>
Work cut_sparse_sum(std::shared_ptr<const SparseSumProblem> problem) {
  const SparseShape& shape = problem->shape;
  const auto sum = std::make_shared<SparseSum<Float>>(problem);
  Work tiles;
  tiles.tasks = sum->tiles();
  tiles.run = [sum](std::int64_t tile) { sum->add_tile(tile); };
  Work rows;
  rows.tasks = sum->rows();
  rows.run = [sum](std::int64_t row) { sum->arrange(row); };
  rows.next = std::make_shared<Work>(std::move(tiles));
  Work pieces;
  pieces.tasks = sum->pieces();
  // A scattered addition costs about what streaming 16 bytes does, and looking at its index 4.
  pieces.cost =
      sum->rows() * shape.entries * 20 + shape.batch.count * shape.coordinates * bytes_of(problem->total.type);
  pieces.run = [sum](std::int64_t piece) { sum->add_sorted(piece); };
  pieces.finish = [sum] { sum->begin_anew_unless_in_order(); };
  pieces.next = std::make_shared<Work>(std::move(rows));
  return pieces;
}

// Entries that a task works on.
constexpr std::int64_t kEntries = 16384;

template <typename Float>
void spread_entries(const SparseSpreadProblem& problem, std::int64_t batch, std::int64_t client, std::int64_t begin,
                    std::int64_t end) {
  using Accumulator = typename Float::Accumulator;
  const SparseShape& shape = problem.shape;
  auto* spread =
      reinterpret_cast<typename Float::Element*>(problem.spread.at(shape.batch, batch)) + client * shape.entries;
  const bool present = is_present(problem.where, shape.batch, batch, client);
  const Accumulator weight = row_of<Accumulator>(problem.weights, shape.batch, batch, 0, 0)[client];
  const Accumulator* vector = row_of<Accumulator>(problem.vector, shape.batch, batch, 0, 0);
  const std::int32_t* indices = row_of<std::int32_t>(problem.indices, shape.batch, batch, client, shape.entries);
  for (std::int64_t i = begin; i < end; ++i) {
    const bool counts = present && indices[i] >= 0 && indices[i] < shape.coordinates;
    spread[i] = Float::narrow(counts ? weight * vector[indices[i]] : Accumulator{0});
  }
}

// In float64, in four interleaved sums.
template <typename Float>
double dot_entries(const SparseDotsProblem& problem, std::int64_t batch, std::int64_t client) {
  using Accumulator = typename Float::Accumulator;
  const SparseShape& shape = problem.shape;
  const auto* values = row_of<typename Float::Element>(problem.values, shape.batch, batch, client, shape.entries);
  const std::int32_t* indices = row_of<std::int32_t>(problem.indices, shape.batch, batch, client, shape.entries);
  const Accumulator* vector = row_of<Accumulator>(problem.vector, shape.batch, batch, 0, 0);
  double sums[4] = {};
  for (std::int64_t i = 0; i < shape.entries; ++i) {
    if (indices[i] < 0 || indices[i] >= shape.coordinates) continue;
    sums[i % 4] += static_cast<double>(Float::widen(values[i])) * static_cast<double>(vector[indices[i]]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void store_dot(const View& dots, const Batch& batch, std::int64_t index, std::int64_t at, double dot) {
  std::byte* to = dots.at(batch, index);
  if (dots.type == Type::kFloat64) {
    reinterpret_cast<double*>(to)[at] = dot;
  } else {
    reinterpret_cast<float*>(to)[at] = static_cast<float>(dot);
  }
}

// ---- Quantised --------------------------------------------------------------------------------------------------

// Columns whose accumulators stay in the first-level cache while the rows go by.
constexpr std::int64_t kColumns = 4096;

template <typename Accumulator>
void add_quantized_tile(const QuantizedSumProblem& problem, std::int64_t batch, std::int64_t begin,
                        std::int64_t columns) {
  thread_local std::vector<const std::uint8_t*> rows;
  thread_local std::vector<std::int64_t> clients;
  thread_local std::vector<Accumulator> slopes, zeros;
  const QuantizedShape& shape = problem.shape;
  const Accumulator* weights = row_of<Accumulator>(problem.weights, shape.batch, batch, 0, 0);
  const Accumulator* scales = row_of<Accumulator>(problem.scales, shape.batch, batch, 0, 0);
  const Accumulator* zero_points = row_of<Accumulator>(problem.zero_points, shape.batch, batch, 0, 0);
  rows.clear();
  clients.clear();
  for (std::int64_t client = 0; client < shape.clients; ++client) {
    if (!is_present(problem.where, shape.batch, batch, client)) continue;
    rows.push_back(row_of<std::uint8_t>(problem.codes, shape.batch, batch, client, shape.bytes));
    clients.push_back(client);
  }
  slopes.resize(rows.size());
  zeros.resize(rows.size());
  const QuantizedKernels& kernels = quantized_kernels(problem.total.type, shape.codes);
  Accumulator* total = reinterpret_cast<Accumulator*>(problem.total.at(shape.batch, batch));
  for (std::int64_t end = begin + columns; begin < end;) {
    const std::int64_t block = begin / shape.block_size;
    const std::int64_t width = std::min(end, (block + 1) * shape.block_size) - begin;
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const std::int64_t at = clients[row] * shape.blocks + block;
      slopes[row] = weights[clients[row]] * scales[at];
      zeros[row] = zero_points[at];
    }
    kernels.sum(rows.data(), slopes.data(), zeros.data(), static_cast<std::int64_t>(rows.size()), begin, width,
                total + begin);
    begin += width;
  }
}

// Blocks that a task sums: enough to be worth it.
std::int64_t blocks_of_task(const QuantizedShape& shape) {
  return std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, shape.block_size));
}

void dot_blocks(const QuantizedDotsProblem& problem, std::int64_t batch, std::int64_t client, std::int64_t first,
                std::int64_t last) {
  const QuantizedShape& shape = problem.shape;
  const std::int64_t width = bytes_of(problem.dots.type);
  const bool present = is_present(problem.where, shape.batch, batch, client);
  const std::uint8_t* codes = row_of<std::uint8_t>(problem.codes, shape.batch, batch, client, shape.bytes);
  const std::byte* zero_points = problem.zero_points.at(shape.batch, batch) + client * shape.blocks * width;
  const std::byte* vector = problem.vector.at(shape.batch, batch);
  const QuantizedKernels& kernels = quantized_kernels(problem.dots.type, shape.codes);
  for (std::int64_t block = first; block < last; ++block) {
    const std::int64_t begin = block * shape.block_size;
    const std::int64_t columns = std::min(shape.block_size, shape.coordinates - begin);
    const double dot =
        present ? kernels.dot(codes, zero_points + block * width, begin, vector + begin * width, columns) : 0;
    store_dot(problem.dots, shape.batch, batch, client * shape.blocks + block, dot);
  }
}

}  // namespace

Work cut(std::shared_ptr<const SparseSumProblem> problem) {
  Work work;
  with_type(problem->values.type, [&](auto type) { work = cut_sparse_sum<decltype(type)>(problem); });
  return work;
}

Work cut(std::shared_ptr<const SparseSpreadProblem> problem) {
  const SparseShape& shape = problem->shape;
  const std::int64_t chunks = (shape.entries + kEntries - 1) / kEntries;
  Work work;
  work.tasks = shape.batch.count * shape.clients * chunks;
  work.cost = shape.batch.count * shape.clients * shape.entries * 16;
  work.run = [problem, chunks](std::int64_t task) {
    const std::int64_t row = task / chunks, begin = task % chunks * kEntries;
    const std::int64_t end = std::min(begin + kEntries, problem->shape.entries);
    with_type(problem->spread.type, [&](auto type) {
      spread_entries<decltype(type)>(*problem, row / problem->shape.clients, row % problem->shape.clients, begin, end);
    });
  };
  return work;
}

Work cut(std::shared_ptr<const SparseDotsProblem> problem) {
  const SparseShape& shape = problem->shape;
  Work work;
  work.tasks = shape.batch.count * shape.clients;
  work.cost = work.tasks * shape.entries * 16;
  work.run = [problem](std::int64_t row) {
    const std::int64_t batch = row / problem->shape.clients, client = row % problem->shape.clients;
    double dot = 0;
    if (is_present(problem->where, problem->shape.batch, batch, client)) {
      with_type(problem->values.type, [&](auto type) { dot = dot_entries<decltype(type)>(*problem, batch, client); });
    }
    store_dot(problem->dots, problem->shape.batch, batch, client, dot);
  };
  return work;
}

Work cut(std::shared_ptr<const QuantizedSumProblem> problem) {
  const QuantizedShape& shape = problem->shape;
  const std::int64_t tiles = (shape.coordinates + kColumns - 1) / kColumns;
  Work work;
  work.tasks = shape.batch.count * tiles;
  work.cost = shape.batch.count * shape.clients * shape.coordinates;
  work.run = [problem, tiles](std::int64_t task) {
    const std::int64_t begin = task % tiles * kColumns;
    const std::int64_t columns = std::min(kColumns, problem->shape.coordinates - begin);
    with_accumulator(problem->total.type,
                     [&](auto zero) { add_quantized_tile<decltype(zero)>(*problem, task / tiles, begin, columns); });
  };
  return work;
}

Work cut(std::shared_ptr<const QuantizedDotsProblem> problem) {
  const QuantizedShape& shape = problem->shape;
  const std::int64_t chunk = blocks_of_task(shape), chunks = (shape.blocks + chunk - 1) / chunk;
  Work work;
  work.tasks = shape.batch.count * shape.clients * chunks;
  work.cost = shape.batch.count * shape.clients * shape.coordinates * 5;
  work.run = [problem, chunk, chunks](std::int64_t task) {
    const std::int64_t row = task / chunks, first = task % chunks * chunk;
    const std::int64_t last = std::min(first + chunk, problem->shape.blocks);
    dot_blocks(*problem, row / problem->shape.clients, row % problem->shape.clients, first, last);
  };
  return work;
}

}  // namespace fedfuse
