// Order statistics by selection networks: a thread has a whole column (of 16-bit types, two) in registers.
#ifndef FEDFUSE_CUDA_NETWORK_KERNELS_H_
#define FEDFUSE_CUDA_NETWORK_KERNELS_H_

#include <cstdint>

#include "cuda/order_statistics.h"
#include "generated/networks.h"

namespace fedfuse {
namespace cuda {

// ---- What a network compares ----------------------------------------------------------------------------------------

// Adjacent columns of one client, as they are in memory, and then ordered() as a network compares them.
template <Type type>
struct Lanes {  // of 32 and 64 bits
  using Bits = typename Element<type>::Bits;
  static constexpr int kColumns = 1;

  Bits key;  // the bits, until they are ordered

  // The inputs that are there, each a row; all loads are on their way before the first is waited for.
  template <int kInputs, typename Has>
  static FEDFUSE_DEVICE void load(const Bits* row, std::int64_t stride, std::int64_t, Has has,
                                  Lanes (&inputs)[kInputs]) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      if (has(i)) inputs[i].key = *row;
      row = next_row(row, stride);
    }
  }
  static FEDFUSE_DEVICE Lanes least() { return {bits_from_key<type>(Keys<type>::kNegativeInfinity)}; }
  static FEDFUSE_DEVICE Lanes greatest() { return {bits_from_key<type>(Keys<type>::kGreatest)}; }

  FEDFUSE_DEVICE Lanes ordered() const {
    constexpr Bits kGreatest = Keys<type>::kGreatest;
    const Bits flipped = flip_negative<8 * sizeof(Bits), Bits>(key, kGreatest);
    return {raise_negative_nans<Bits>(flipped, Keys<type>::kNegativeInfinity, kGreatest)};
  }
  FEDFUSE_DEVICE Bits bits(int) const { return bits_from_key<type>(key); }
};

template <Type type>
FEDFUSE_DEVICE Lanes<type> minimum(Lanes<type> a, Lanes<type> b) {
  return {a.key < b.key ? a.key : b.key};
}

template <Type type>
FEDFUSE_DEVICE Lanes<type> maximum(Lanes<type> a, Lanes<type> b) {
  return {a.key < b.key ? b.key : a.key};
}

// Two columns in a register, for min.f16x2 and max.NaN.f16x2 and their like, which order all values and NaN as wanted:
// the one gives the operand that is no NaN, the other the one that is, and both take +0 for greater than -0.
struct HalfPair {
  using Bits = std::int16_t;
  static constexpr int kColumns = 2;

  std::uint32_t both;

  // As above where words are aligned. Where they are not, a word is put together before the next one is asked for.
  template <typename Value, int kInputs, typename Has>
  static FEDFUSE_DEVICE void load(const Bits* row, std::int64_t stride, std::int64_t columns, Has has,
                                  Value (&inputs)[kInputs]) {
    const bool aligned = is_aligned(row, kColumns * sizeof(Bits)) && stride % kColumns == 0;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      if (has(i)) inputs[i].both = load_halves(row, aligned, columns);
      row = next_row(row, stride);
    }
  }

  FEDFUSE_DEVICE Bits bits(int column) const { return static_cast<Bits>(both >> (16 * column)); }
};

template <Type type>
struct HalfLanes : HalfPair {
  static FEDFUSE_DEVICE HalfLanes of(std::uint32_t both) {
    HalfLanes lanes;
    lanes.both = both;
    return lanes;
  }
  static FEDFUSE_DEVICE HalfLanes of_key(Bits key) {
    return of(0x00010001u * static_cast<std::uint16_t>(bits_from_key<type>(key)));
  }
  static FEDFUSE_DEVICE HalfLanes least() { return of_key(Keys<type>::kNegativeInfinity); }
  static FEDFUSE_DEVICE HalfLanes greatest() { return of_key(Keys<type>::kGreatest); }
  FEDFUSE_DEVICE HalfLanes ordered() const { return *this; }
};

template <>
struct Lanes<Type::kBFloat16> : HalfLanes<Type::kBFloat16> {
  Lanes() = default;
  FEDFUSE_DEVICE Lanes(HalfLanes<Type::kBFloat16> lanes) : HalfLanes<Type::kBFloat16>(lanes) {}
};

template <>
struct Lanes<Type::kFloat16> : HalfLanes<Type::kFloat16> {
  Lanes() = default;
  FEDFUSE_DEVICE Lanes(HalfLanes<Type::kFloat16> lanes) : HalfLanes<Type::kFloat16>(lanes) {}
};

#if defined(__CUDACC__)

#define FEDFUSE_HALF_EXTREMUM(function, type, instruction)                   \
  FEDFUSE_DEVICE Lanes<type> function(Lanes<type> a, Lanes<type> b) {        \
    std::uint32_t both;                                                      \
    asm(instruction " %0, %1, %2;" : "=r"(both) : "r"(a.both), "r"(b.both)); \
    return HalfLanes<type>::of(both);                                        \
  }
FEDFUSE_HALF_EXTREMUM(minimum, Type::kBFloat16, "min.bf16x2")
FEDFUSE_HALF_EXTREMUM(maximum, Type::kBFloat16, "max.NaN.bf16x2")
FEDFUSE_HALF_EXTREMUM(minimum, Type::kFloat16, "min.f16x2")
FEDFUSE_HALF_EXTREMUM(maximum, Type::kFloat16, "max.NaN.f16x2")
#undef FEDFUSE_HALF_EXTREMUM

#else

// Out of line, or the networks would take a C++ compiler minutes.
template <Type type>
__attribute__((noinline)) Lanes<type> choose_halves(Lanes<type> a, Lanes<type> b, bool smaller) {
  std::uint32_t both = 0;
  for (int column = 0; column < 2; ++column) {
    const bool less = key_from_bits<type>(a.bits(column)) < key_from_bits<type>(b.bits(column));
    const auto half = static_cast<std::uint16_t>(less == smaller ? a.bits(column) : b.bits(column));
    both |= static_cast<std::uint32_t>(half) << (16 * column);
  }
  return HalfLanes<type>::of(both);
}
inline Lanes<Type::kBFloat16> minimum(Lanes<Type::kBFloat16> a, Lanes<Type::kBFloat16> b) {
  return choose_halves(a, b, true);
}
inline Lanes<Type::kBFloat16> maximum(Lanes<Type::kBFloat16> a, Lanes<Type::kBFloat16> b) {
  return choose_halves(a, b, false);
}
inline Lanes<Type::kFloat16> minimum(Lanes<Type::kFloat16> a, Lanes<Type::kFloat16> b) {
  return choose_halves(a, b, true);
}
inline Lanes<Type::kFloat16> maximum(Lanes<Type::kFloat16> a, Lanes<Type::kFloat16> b) {
  return choose_halves(a, b, false);
}

#endif

// ---- The kernels ----------------------------------------------------------------------------------------------------

// How many blocks should find room on a multiprocessor, by the registers of a network and those that its kernel was
// seen to need besides. Left to itself a compiler spills a few to fit in a block more, or takes all there are.
constexpr int network_blocks(bool sorts, int words, int columns) {
  constexpr int kRegistersOfThread = 65536 / 128;
  const int most = sorts ? 6 : columns > 1 ? 7 : 8;
  const int blocks = kRegistersOfThread / (words + (!sorts ? 32 : columns > 1 ? 72 : 46));
  return blocks < most ? blocks : most;
}

// Any trim, any participation, any of the wanted things, by a network that sorts; or the mean that a cheaper network is
// made for, of all clients.
template <Type type, typename Network, bool kSorts>
struct NetworkBody {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Value = Lanes<type>;
  using Parameters = OrderParameters;

  static constexpr int kThreads = 128;
  static constexpr int kColumns = Value::kColumns;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;
  static constexpr int kInputs = Network::kInputs;
  static constexpr int kOutputs = Network::kOutputs;
  static constexpr int kBlocks = network_blocks(kSorts, kInputs* static_cast<int>(sizeof(Value) / 4), kColumns);

  using Present = PresentClients<kInputs>;
  struct Shared {
    Present present;
  };

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    Team<kThreads> team;
    if (kSorts) shared.present.find(where_of(p.options.where, p.batch, tile.batch), 0, p.clients, team);
    team.each([&](int thread, Nothing&) {
      if (thread * kColumns >= tile.columns) return;
      Value outputs[kOutputs];
      find_ranks(p, columns_of(tile, thread), shared.present, outputs);
      // While the network ran, its values had the registers. What else was in them is found out once more.
      const Tile again = locate(p, forgotten(task), kTileColumns);
      use_ranks(p, columns_of(again, thread), shared.present, outputs);
    });
  }

  // A thread's columns, and those to the right of them.
  static FEDFUSE_DEVICE Tile columns_of(Tile tile, int thread) {
    tile.begin += thread * kColumns;
    tile.columns -= thread * kColumns;
    return tile;
  }

  static FEDFUSE_DEVICE const Bits* updates_of(const Parameters& p, const Tile& tile) {
    return reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin;
  }

  // How many inputs below the first client's hold the least key.
  static FEDFUSE_DEVICE int low_pads_of(const Parameters& p) {
    return kSorts ? 0 : (kInputs - static_cast<int>(p.clients)) / 2;
  }

  static FEDFUSE_DEVICE void find_ranks(const Parameters& p, const Tile& tile, const Present& present,
                                        Value (&outputs)[kOutputs]) {
    const std::int64_t stride = p.leaves[tile.leaf].coordinates;
    const int low_pads = low_pads_of(p);
    const int past = low_pads + static_cast<int>(p.clients);
    // There is a client: low pads stay in the lower half, high pads in the upper one.
    const auto is_lower_half = [](int input) { return !kSorts && 2 * input < kInputs; };
    const auto has = [&](int input) {
      return kSorts ? present.has(input) : is_lower_half(input) ? input >= low_pads : input < past;
    };
    Value values[kInputs];
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      values[input] = is_lower_half(input) ? Value::least() : Value::greatest();
    }
    Value::load(next_row(updates_of(p, tile), -low_pads * stride), stride, tile.columns, has, values);
#pragma unroll
    for (int input = 0; input < kInputs; ++input) values[input] = values[input].ordered();
    Network::template run<Value>([&](int input) { return values[input]; },
                                 [&](int output, Value value) { outputs[output] = value; });
  }

  static FEDFUSE_DEVICE void use_ranks(const Parameters& p, const Tile& tile, const Present& present,
                                       const Value (&outputs)[kOutputs]) {
    const int num_present = kSorts ? present.count_before(kInputs) : static_cast<int>(p.clients);
    const Kept kept = kept_of(num_present, trim_of(p.options, p.batch, tile.batch));
    const int first = kept.first + low_pads_of(p) - Network::kFirstRank;
    const int last = first + kept.count - 1;
    if constexpr (kSorts) {
      if (p.options.wanted != Wanted::kMean) return consume_all(p, tile, kept, present, outputs, first, last);
    }
    store_means(p, tile, kept, outputs, first, last);
  }

  static FEDFUSE_DEVICE void consume_all(const Parameters& p, const Tile& tile, const Kept& kept,
                                         const Present& present, const Value (&outputs)[kOutputs], int first,
                                         int last) {
    // One column after the other: what they need together would not fit into the registers.
#pragma unroll 1
    for (int i = 0; i < kColumns && i < tile.columns; ++i) {
      BoundsFinder<Bits> finder;
#pragma unroll
      for (int output = 0; output < kOutputs; ++output) {
        finder.see(output, canonical_key<type>(outputs[output].bits(i)), first, last);
      }
      consume(p, tile, kept, i, finder.bounds, present);
    }
  }

  static FEDFUSE_DEVICE void store_means(const Parameters& p, const Tile& tile, const Kept& kept,
                                         const Value (&outputs)[kOutputs], int first, int last) {
    const Accumulator scale = Mean<Accumulator>::scale_for(kept.count);
    const std::int64_t reduced_bytes = bytes_of(p.options.reduced_type);
    std::byte* const reduced = operand_data(p, tile, 2, 1, reduced_bytes);
    Mean<Accumulator> means[kColumns];
#pragma unroll
    for (int output = 0; output < kOutputs; ++output) {
      if (output < first || output > last) continue;
      for (int i = 0; i < kColumns; ++i) means[i].add(Element<type>::widen(outputs[output].bits(i)), scale);
    }
    for (int i = 0; i < kColumns; ++i) {
      if (i < tile.columns) store_as(p.options.reduced_type, means[i].of(kept.count, scale), reduced, tile.begin + i);
    }
  }

  // Goes over one column's clients once more, whose updates are still in a cache, now that it is known who is kept.
  static FEDFUSE_DEVICE void consume(const Parameters& p, const Tile& tile, const Kept& kept, int i,
                                     Bounds<Bits> bounds, const Present& present) {
    const Bits* const updates = updates_of(p, tile) + i;
    const std::int64_t stride = p.leaves[tile.leaf].coordinates;
    const bool spreads = p.options.wanted == Wanted::kSpread;
    const std::byte* const given =
        operand_data(p, tile, 1, spreads ? 1 : p.clients, spreads ? bytes_of(p.options.cotangent_type) : sizeof(Bits));
    const Bits* const values = reinterpret_cast<const Bits*>(given) + tile.begin + i;
    Bits* const spread = reinterpret_cast<Bits*>(operand_data(p, tile, 2, p.clients, sizeof(Bits))) + tile.begin + i;
    Consumer<type> consumer(p.options, kept, given, tile.begin + i);
#pragma unroll 2
    for (int client = 0; client < static_cast<int>(p.clients); ++client) {
      const bool is_present = kept.count > 0 && present.has(client);
      const bool is_kept = is_present && bounds.keeps(canonical_key<type>(updates[client * stride]));
      consumer.take(is_kept, values + client * stride, spread + client * stride);
    }
    if (spreads) return;
    const std::int64_t reduced_bytes = bytes_of(p.options.reduced_type);
    store_as(p.options.reduced_type, consumer.mean.of(kept.count, consumer.scale),
             operand_data(p, tile, 2, 1, reduced_bytes), tile.begin + i);
  }
};

// ---- Which kernel ---------------------------------------------------------------------------------------------------

// The sizes that are compiled, by type and family, ascending; more clients than the largest go to the bit planes. Each
// costs compile time on every target, and none may spill one of the 255 registers that a thread has at most.
template <Type type>
struct CompiledNetworks;

template <>
struct CompiledNetworks<Type::kFloat32> {
  using Sort = NetworkSizes<4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192>;
  using Median = NetworkSizes<8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192>;
  using TrimmedMean = NetworkSizes<10, 16, 20, 32, 48, 64, 80, 96, 112, 128, 160, 192>;
};

// Values take two registers each and a comparison six instructions: few networks.
template <>
struct CompiledNetworks<Type::kFloat64> {
  using Sort = NetworkSizes<4, 8, 16, 24, 32, 48, 64, 96>;
  using Median = NetworkSizes<64, 96>;
  using TrimmedMean = NetworkSizes<64, 96>;
};

// A sort of 160 would spill: what is made of two columns of ranks takes more registers than of one.
struct HalfNetworks {
  using Sort = NetworkSizes<4, 8, 16, 32, 48, 64, 96, 128>;
  using Median = NetworkSizes<8, 16, 32, 64, 96, 128, 160, 192>;
  using TrimmedMean = NetworkSizes<10, 16, 20, 32, 64, 96, 128, 160, 192>;
};
template <>
struct CompiledNetworks<Type::kBFloat16> : HalfNetworks {};
template <>
struct CompiledNetworks<Type::kFloat16> : HalfNetworks {};

template <Type type, typename Network, bool kSorts>
OrderKernel make_network_kernel() {
  using Body = NetworkBody<type, Network, kSorts>;
  return {launch<Body>, Body::kTileColumns};
}

// The kernel of the first of these sizes with room for the clients, if there is one.
template <Type type, template <int> class Family, bool kSorts, int... kSizes>
OrderKernel first_with_room(NetworkSizes<kSizes...>, std::int64_t clients) {
  OrderKernel found;
  (void)((clients <= kSizes && (found = make_network_kernel<type, Family<kSizes>, kSorts>(), true)) || ...);
  return found;
}

// The same for a family that serves, by the network of each size, the counts from the next smaller size on only: a
// kernel if the smallest network with room is among these.
template <Type type, int... kSizes, int... kAllSizes>
OrderKernel trimmed_with_room(NetworkSizes<kSizes...>, NetworkSizes<kAllSizes...>, std::int64_t clients) {
  std::int64_t size = 0;
  (void)((clients <= kAllSizes && (size = kAllSizes, true)) || ...);
  OrderKernel found;
  (void)((size == kSizes && (found = make_network_kernel<type, TrimmedMeanNetwork<kSizes>, false>(), true)) || ...);
  return found;
}

template <Type type>
OrderKernel network_kernel(std::int64_t clients, std::int64_t trim) {
  using Compiled = CompiledNetworks<type>;
  OrderKernel kernel;
  if (trim >= 0 && 2 * trim < clients && clients - 2 * trim <= 2) {
    kernel = first_with_room<type, MedianNetwork, false>(typename Compiled::Median(), clients);
  } else if (clients >= kFewestTrimmed && trim == static_cast<std::int64_t>(kTrimFraction * clients)) {
    kernel = trimmed_with_room<type>(typename Compiled::TrimmedMean(), TrimmedMeanNetworkSizes(), clients);
  }
  if (kernel.launch != nullptr) return kernel;
  return first_with_room<type, SortNetwork, true>(typename Compiled::Sort(), clients);
}

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_NETWORK_KERNELS_H_
