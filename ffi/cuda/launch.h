// Where a launch's work lies: tables of leaves that travel in a kernel's parameters, and the tiles that its blocks
// walk. Plain functions, with nothing of CUDA in them: the host tests try them on shapes that no test could allocate.
#ifndef FEDFUSE_CUDA_LAUNCH_H_
#define FEDFUSE_CUDA_LAUNCH_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "contract/buffers.h"
#include "math/platform.h"

namespace fedfuse {
namespace cuda {

// What a kernel's parameters may take up (since CUDA 12.1, from compute capability 7.0 on).
inline constexpr std::int64_t kParameterBytes = 32764;

// How many leaves a kernel's table has room for. A launch copies the room, used or not, so kernels that do little but
// read and write are compiled a second time, for trees of few leaves. Order statistics and other arithmetic last longer
// than the copy, and their kernels take too long to compile.
inline constexpr int kMostLeaves = 320;
inline constexpr int kFewLeaves = 32;

// The most blocks of a launch; they walk over the rest of the work.
inline constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();

inline std::int64_t blocks_for(std::int64_t work) { return work < kMostBlocks ? work : kMostBlocks; }

// One leaf in a launch's table: 40 bytes for three operands.
template <int kOperands>
struct Leaf {
  std::byte* data[kOperands];
  std::int64_t coordinates;
  std::uint32_t first_tile;
  // A bit for each batch axis along which the operand is not shared.
  std::uint8_t mapped[kOperands];
};
static_assert(kMaxBatchDims <= 8, "a batch axis has a bit in a byte");

// What is not of a single leaf. `work` is the number of tasks that blocks take up one by one.
template <typename Options>
struct Header {
  Batch batch;
  std::int64_t clients = 0;
  std::int64_t tiles = 0;  // of all leaves of the table, in one element of the batch
  std::int64_t work = 0;
  int num_leaves = 0;
  Options options{};
};

// What the parameters of every kernel over leaves look like.
template <int kNumOperands, typename KernelOptions, int kNumLeaves = kMostLeaves>
struct Parameters : Header<KernelOptions> {
  using Options = KernelOptions;
  using FewLeaves = Parameters<kNumOperands, KernelOptions, kFewLeaves>;
  static constexpr int kOperands = kNumOperands;
  static constexpr int kCapacity = kNumLeaves;

  // Does not clear the table, which is long: nobody looks behind its last leaf.
  Parameters() {}

  // The same in a small table, for no more leaves than that has room for.
  FewLeaves few_leaves() const {
    FewLeaves few;
    static_cast<Header<Options>&>(few) = *this;
    std::copy_n(leaves, this->num_leaves, few.leaves);
    return few;
  }

  Leaf<kNumOperands> leaves[kCapacity];
};

// A chunk of the coordinates of one leaf, in one element of the batch.
struct Tile {
  std::int64_t batch;
  int leaf;
  std::int64_t begin;
  std::int64_t columns;
};

// The tile with this index, 0 <= index < batch.count * tiles, where tiles are so many columns wide.
template <typename P>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Tile locate(const P& p, std::int64_t index, std::int64_t width) {
  Tile tile{};
  if (index >= p.tiles) {  // a 64-bit division is dear, and most calls have no batch
    tile.batch = index / p.tiles;
    index -= tile.batch * p.tiles;
  }
  int past = p.num_leaves;
  while (past - tile.leaf > 1) {
    const int middle = (tile.leaf + past) / 2;
    if (static_cast<std::int64_t>(p.leaves[middle].first_tile) <= index) {
      tile.leaf = middle;
    } else {
      past = middle;
    }
  }
  tile.begin = (index - static_cast<std::int64_t>(p.leaves[tile.leaf].first_tile)) * width;
  const std::int64_t rest = p.leaves[tile.leaf].coordinates - tile.begin;
  tile.columns = rest < width ? rest : width;
  return tile;
}

// How far from its beginning an operand, `bytes` long in one element of the batch, has the given element.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::int64_t batch_offset(const Batch& batch, unsigned mapped, std::int64_t bytes,
                                                             std::int64_t index) {
  std::int64_t offset = 0;
  for (int axis = batch.rank - 1; index > 0 && axis >= 0; --axis) {
    const std::int64_t quotient = index / batch.sizes[axis];
    if ((mapped >> axis & 1u) != 0) {
      offset += (index - quotient * batch.sizes[axis]) * bytes;
      bytes *= batch.sizes[axis];
    }
    index = quotient;
  }
  return offset;
}

// An operand of a tile's leaf in the tile's element of the batch, `rows` rows of elements of so many bytes.
template <typename P>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::byte* operand_data(const P& p, const Tile& tile, int operand, std::int64_t rows,
                                                           std::int64_t element_bytes) {
  const auto& leaf = p.leaves[tile.leaf];
  if (tile.batch == 0) return leaf.data[operand];
  return leaf.data[operand] +
         batch_offset(p.batch, leaf.mapped[operand], rows * leaf.coordinates * element_bytes, tile.batch);
}

// The batch axes along which a view is not shared, as Leaf::mapped has them.
inline std::uint8_t mapped_axes(const View& view) {
  unsigned mapped = 0;
  for (int axis = 0; axis < kMaxBatchDims; ++axis) mapped |= (view.strides[axis] != 0 ? 1u : 0u) << axis;
  return static_cast<std::uint8_t>(mapped);
}

// Adds a leaf to the table. False if there is no room for it.
template <typename P>
bool add_leaf(const std::array<View, P::kOperands>& operands, std::int64_t coordinates, std::int64_t width, P* p) {
  const std::int64_t tiles = (coordinates + width - 1) / width;
  if (p->num_leaves == P::kCapacity || p->tiles > std::numeric_limits<std::uint32_t>::max()) return false;
  Leaf<P::kOperands>& leaf = p->leaves[p->num_leaves++];
  for (int operand = 0; operand < P::kOperands; ++operand) {
    leaf.data[operand] = operands[operand].data;
    leaf.mapped[operand] = mapped_axes(operands[operand]);
  }
  leaf.coordinates = coordinates;
  leaf.first_tile = static_cast<std::uint32_t>(p->tiles);
  p->tiles += tiles;
  return true;
}

// Calls launch(table) with tables that together hold every leaf, in order, that is not empty and that belongs(leaf).
// `tasks` says how often in an element of the batch each tile is to be worked on. Stops at an error.
template <typename P, typename Launch, typename Belongs>
std::string for_each_table(const Shape& shape, const std::array<const std::vector<View>*, P::kOperands>& operands,
                           std::int64_t width, std::int64_t tasks, P* p, Launch launch, Belongs belongs) {
  p->batch = shape.batch;
  p->clients = shape.clients;
  for (std::size_t leaf = 0; leaf < shape.coordinates.size();) {
    p->num_leaves = 0;
    p->tiles = 0;
    for (; leaf < shape.coordinates.size(); ++leaf) {
      if (shape.coordinates[leaf] == 0 || !belongs(leaf)) continue;
      std::array<View, P::kOperands> views;
      for (int operand = 0; operand < P::kOperands; ++operand) {
        if (operands[operand] != nullptr) views[operand] = (*operands[operand])[leaf];
      }
      if (!add_leaf(views, shape.coordinates[leaf], width, p)) break;
    }
    p->work = shape.batch.count * tasks * p->tiles;
    if (p->work == 0) continue;
    if (std::string error = launch(*p); !error.empty()) return error;
  }
  return "";
}

// Calls use(std::integral_constant) for each floating type, while it returns no error.
template <typename Use>
std::string for_each_type(Use use) {
  std::string error = use(std::integral_constant<Type, Type::kFloat32>());
  if (error.empty()) error = use(std::integral_constant<Type, Type::kFloat64>());
  if (error.empty()) error = use(std::integral_constant<Type, Type::kBFloat16>());
  if (error.empty()) error = use(std::integral_constant<Type, Type::kFloat16>());
  return error;
}

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_LAUNCH_H_
