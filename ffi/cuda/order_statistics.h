// Order statistics, a column at a time: what all kinds of kernels, by network and by search, have in common.
//
// What is kept, in which order ties go and what a mean is, is said in cpu/kernels/order_statistics.h, and holds here.
#ifndef FEDFUSE_CUDA_ORDER_STATISTICS_H_
#define FEDFUSE_CUDA_ORDER_STATISTICS_H_

#include <cstdint>
#include <limits>

#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "math/around_median.h"
#include "math/ordered_keys.h"

namespace fedfuse {
namespace cuda {

enum class Wanted : std::uint8_t { kMean, kSelectedMean, kSpread };

struct OrderOptions {
  View where;
  View trim_count;
  std::int64_t trim;  // where trim_count is not there
  bool around_median;
  Wanted wanted;
  Type reduced_type;    // of means
  Type cotangent_type;  // of what is spread
};

// Operands: updates; for a selected mean the values, for a spread the cotangents; the result.
using OrderParameters = Parameters<3, OrderOptions>;

// Launches a kernel over the leaves of a table.
using OrderLaunch = std::string (*)(const OrderParameters& p, Stream stream);

// A kernel, and how wide its tiles are. No kernel: no launch.
struct OrderKernel {
  OrderLaunch launch = nullptr;
  std::int64_t tile_columns = 0;
};

// The kernel by selection networks for so many clients. A trim that is not known beforehand is negative; so is that of
// everything but a mean of all clients. No kernel if they are too many for registers.
template <Type type>
OrderKernel network_kernel(std::int64_t clients, std::int64_t trim);

// The ranks that are kept of m values, [first, first + count), or none. Around the median, every column has a first
// rank of its own.
struct Kept {
  int first = 0;
  int count = 0;

  FEDFUSE_DEVICE int last() const { return first + count - 1; }
};

FEDFUSE_DEVICE Kept kept_of(int present, std::int64_t trim, bool around_median = false) {
  if (around_median) return {0, trim < 0 || trim >= present ? 0 : present - static_cast<int>(trim)};
  if (trim < 0 || 2 * trim >= present) return {};
  return {static_cast<int>(trim), present - 2 * static_cast<int>(trim)};
}

FEDFUSE_DEVICE std::int64_t trim_of(const OrderOptions& options, const Batch& batch, std::int64_t index) {
  if (options.trim_count.type != Type::kInt32) return options.trim;
  return *reinterpret_cast<const std::int32_t*>(options.trim_count.at(batch, index));
}

template <typename Real>
FEDFUSE_DEVICE Real quiet_nan() {
  return std::numeric_limits<Real>::quiet_NaN();
}

template <typename Real>
FEDFUSE_DEVICE bool is_finite(Real value) {
  return value - value == 0;
}

// ---- Means ----------------------------------------------------------------------------------------------------------

// A sum next to the same sum scaled by a power of two that keeps it from overflowing.
template <typename Real>
struct Mean {
  // Minus zero, to which adding minus zeros leaves minus zero.
  Real sum = -Real{0};
  Real scaled = -Real{0};

  // The least power of two that is not less than the count, inverted.
  static FEDFUSE_DEVICE Real scale_for(int count) {
    Real scale = 1;
    for (std::int64_t power = 1; power < count; power *= 2) scale *= Real{0.5};
    return scale;
  }

  FEDFUSE_DEVICE void add(Real value, Real scale) {
    sum += value;
    scaled += value * scale;
  }

  FEDFUSE_DEVICE void add(const Mean& other) {
    sum += other.sum;
    scaled += other.scaled;
  }

  FEDFUSE_DEVICE Real of(int count, Real scale) const {
    if (count < 1) return quiet_nan<Real>();
    const Real mean = sum / static_cast<Real>(count);
    if (is_finite(mean)) return mean;
    const Real limit = std::numeric_limits<Real>::max() * scale;
    Real unscaled = scaled / static_cast<Real>(count);
    // Rounding may have carried it past what the greatest value scales to.
    const bool finite = is_finite(unscaled);
    if (finite && unscaled > limit) unscaled = limit;
    if (finite && unscaled < -limit) unscaled = -limit;
    return unscaled / scale;
  }
};

// ---- Who is kept ----------------------------------------------------------------------------------------------------

// Keys that are equal where the order says so: one NaN, one zero.
template <Type type>
FEDFUSE_DEVICE typename Keys<type>::Integer canonical_key(typename Keys<type>::Integer bits) {
  return merge_zeros<typename Keys<type>::Integer>(key_from_bits<type>(bits), 0);
}

// What decides in a column who is kept: the keys of the least and the greatest kept value; of those who tie with the
// least, the first `skip` are not kept; of those who tie with the greatest, only the first `take` are.
template <typename Key>
struct Bounds {
  Key low = 0;
  Key high = 0;
  int skip = 0;
  int take = 0;

  // Asked in the clients' order.
  FEDFUSE_DEVICE bool keeps(Key key) {
    const bool skipped = key == low && skip > 0;
    const bool taken = key == high && take > 0;
    skip -= skipped;
    take -= taken;
    return key >= low && (key < high || taken) && !skipped;
  }
};

// Finds the bounds from the keys of all ranks, which come in order.
template <typename Key>
struct BoundsFinder {
  Bounds<Key> bounds;
  Key previous = 0;
  int run = 0;  // of equal keys up to here

  FEDFUSE_DEVICE void see(int rank, Key key, int first, int last) {
    run = rank > 0 && key == previous ? run + 1 : 1;
    previous = key;
    if (rank == first) {
      bounds.low = key;
      bounds.skip = run - 1;
    }
    if (rank == last) {
      bounds.high = key;
      bounds.take = run;
    }
  }
};

// What is done, once it is known who is kept, with one client after the other in one column of a tile.
template <Type type>
struct Consumer {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;

  Wanted wanted;
  Accumulator scale;
  Bits share = 0;
  Mean<Accumulator> mean;

  // `given` is the second operand at this column: of the first client, or of all.
  FEDFUSE_DEVICE Consumer(const OrderOptions& options, const Kept& kept, const std::byte* given, std::int64_t column)
      : wanted(options.wanted), scale(Mean<Accumulator>::scale_for(kept.count)) {
    if (wanted == Wanted::kSpread && kept.count > 0) {
      const auto cotangent = load_as<Accumulator>(options.cotangent_type, given, column);
      share = Element<type>::narrow(cotangent / static_cast<Accumulator>(kept.count));
    }
  }

  // `values` and `spread` are a client's elements at this column.
  FEDFUSE_DEVICE void take(bool is_kept, const Bits* value, Bits* spread) {
    if (wanted == Wanted::kSpread) {
      *spread = is_kept ? share : Bits{0};
    } else if (is_kept) {
      mean.add(Element<type>::widen(*value), scale);
    }
  }
};

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_ORDER_STATISTICS_H_
