// Tests the arithmetic of launches on shapes that no machine could hold: nothing here touches the memory it speaks of.
#include "cuda/launch.h"

#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

namespace fedfuse {
namespace cuda {
namespace {

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

struct Options {
  std::int64_t whatever[24];
};
using Table = Parameters<3, Options>;
static_assert(sizeof(Parameters<7, Options>) <= kParameterBytes, "the most operands that a kernel has");
static_assert(sizeof(Parameters<7, Options>::FewLeaves) <= 4096 && sizeof(Table::FewLeaves) <= 2048, "soon copied");

Shape shape_of(std::vector<std::int64_t> batch, std::int64_t clients, std::vector<std::int64_t> coordinates) {
  Shape shape;
  shape.batch.rank = static_cast<int>(batch.size());
  for (int axis = 0; axis < kMaxBatchDims; ++axis) shape.batch.sizes[axis] = axis < shape.batch.rank ? batch[axis] : 1;
  shape.batch.count = std::accumulate(batch.begin(), batch.end(), std::int64_t{1}, std::multiplies<>());
  shape.clients = clients;
  shape.coordinates = std::move(coordinates);
  return shape;
}

// A float32 view of `rows` rows of a leaf, at some address, mapped over the batch axes whose bits are set.
View view_of(const Shape& shape, std::size_t leaf, std::int64_t rows, unsigned mapped) {
  View view;
  view.type = Type::kFloat32;
  view.elements = rows * shape.coordinates[leaf];
  view.data = reinterpret_cast<std::byte*>((leaf + 1) << 48);
  std::int64_t stride = view.elements * bytes_of(view.type);
  for (int axis = shape.batch.rank - 1; axis >= 0; --axis) {
    if ((mapped >> axis & 1u) == 0) continue;
    view.strides[axis] = shape.batch.sizes[axis] == 1 ? 0 : stride;
    stride *= shape.batch.sizes[axis];
  }
  return view;
}

// Checks that every tile of a table is found again, where it belongs; of very many tiles, some. Its first leaf is
// `first_leaf`; returns the one after its last.
template <typename P>
std::size_t check_table(const std::string& what, const P& p, const Shape& shape, std::int64_t width,
                        const std::vector<View>& updates, const std::vector<View>& results, std::size_t first_leaf) {
  expect(p.work == p.tiles * shape.batch.count, what + ": work");
  expect(blocks_for(p.work) >= 1 && blocks_for(p.work) <= kMostBlocks, what + ": blocks");
  std::size_t leaf = first_leaf;
  for (int entry = 0; entry < p.num_leaves; ++entry, ++leaf) {
    while (shape.coordinates[leaf] == 0) ++leaf;
    const std::int64_t coordinates = shape.coordinates[leaf];
    const std::int64_t tiles = (coordinates + width - 1) / width;
    for (const std::int64_t batch : {std::int64_t{0}, shape.batch.count / 2, shape.batch.count - 1}) {
      for (const std::int64_t number : {std::int64_t{0}, tiles / 3, tiles - 1}) {
        const std::int64_t index = batch * p.tiles + p.leaves[entry].first_tile + number;
        const Tile tile = locate(p, index, width);
        const std::int64_t begin = number * width;
        const std::int64_t columns = number == tiles - 1 ? coordinates - begin : width;
        expect(tile.batch == batch && tile.leaf == entry && tile.begin == begin && tile.columns == columns,
               what + ": tile " + std::to_string(index));
        expect(operand_data(p, tile, 0, shape.clients, 4) == updates[leaf].at(shape.batch, batch) &&
                   operand_data(p, tile, 2, 1, 4) == results[leaf].at(shape.batch, batch),
               what + ": data of tile " + std::to_string(index));
      }
    }
  }
  return leaf;
}

// Cuts the problem as kernels do, and checks every table; those that fit, as a small one too. Returns the number of
// launches.
int check(const std::string& what, const Shape& shape, std::int64_t width, unsigned mapped = 0xff) {
  std::vector<View> updates, results;
  for (std::size_t leaf = 0; leaf < shape.coordinates.size(); ++leaf) {
    updates.push_back(view_of(shape, leaf, shape.clients, mapped));
    results.push_back(view_of(shape, leaf, 1, 0xff));
  }
  int launches = 0;
  std::size_t next_leaf = 0;
  Table table{};
  const std::string error = for_each_table(
      shape, {&updates, nullptr, &results}, width, 1, &table,
      [&](const Table& p) {
        ++launches;
        const std::size_t past = check_table(what, p, shape, width, updates, results, next_leaf);
        if (p.num_leaves <= kFewLeaves) {
          expect(check_table(what + ", few", p.few_leaves(), shape, width, updates, results, next_leaf) == past,
                 what + ": few leaves");
        }
        next_leaf = past;
        return std::string();
      },
      [](std::size_t) { return true; });
  expect(error.empty(), what + ": error");
  while (next_leaf < shape.coordinates.size() && shape.coordinates[next_leaf] == 0) ++next_leaf;
  expect(next_leaf == shape.coordinates.size() || shape.batch.count == 0, what + ": every leaf");
  return launches;
}

int main_of_test() {
  static_assert(sizeof(Table) <= kParameterBytes, "parameters fit");
  expect(check("one coordinate", shape_of({}, 1, {1}), 128) == 1, "one launch");
  expect(check("5000 clients", shape_of({}, 5000, {1}), 16) == 1, "one launch");
  expect(check("a tile and a bit", shape_of({}, 3, {129}), 128) == 1, "one launch");
  expect(check("2^31 + 7 coordinates", shape_of({}, 2, {(std::int64_t{1} << 31) + 7}), 16) == 1, "one launch");
  expect(check("2^40 coordinates", shape_of({}, 1, {std::int64_t{1} << 40}), 16) == 1, "one launch");
  for (const std::int64_t width : {32, 64}) {  // of bit planes
    check("one coordinate", shape_of({}, 1024, {1}), width);
    check("a tile and a bit", shape_of({70000}, 1024, {width - 1, width, width + 1}), width);
    check("2^33 + 1 coordinates", shape_of({}, 129, {(std::int64_t{1} << 33) + 1}), width);
  }
  // More tiles than a table can number: the next leaf goes into another launch.
  expect(check("2^40 twice", shape_of({}, 1, {std::int64_t{1} << 40, 5}), 16) == 2, "two launches");
  expect(check("a batch of 70000", shape_of({70000}, 3, {5}), 128) == 1, "one launch");
  expect(check("a batch of 70000 x 70000", shape_of({70000, 70000}, 3, {5, 300}), 128) == 1, "one launch");
  for (const unsigned mapped : {0u, 1u, 2u, 4u, 5u, 7u}) {
    check("a batch of 3 axes, shared over some", shape_of({3, 1, 4}, 3, {5, 300}), 128, mapped);
    check("8 axes", shape_of({2, 3, 1, 2, 1, 2, 3, 2}, 3, {5, 300}), 128, mapped * 0x11);
  }
  expect(kMostLeaves >= 300, "a launch has room for many leaves");
  for (const int leaves : {kFewLeaves, kFewLeaves + 1, kMostLeaves, kMostLeaves + 1, 5000}) {
    const std::string what = std::to_string(leaves) + " leaves";
    const int launches = check(what, shape_of({2}, 4, std::vector<std::int64_t>(leaves, 3)), 128);
    expect(launches == (leaves + kMostLeaves - 1) / kMostLeaves, what + ": full tables");
    std::vector<std::int64_t> uneven(leaves);
    for (int i = 0; i < leaves; ++i) uneven[i] = 1 + i * 7919 % 1000;
    check(what + ", uneven", shape_of({}, 4, uneven), 128, 0);
  }
  std::vector<std::int64_t> some_empty(1000, 0);
  for (std::size_t i = 0; i < some_empty.size(); i += 3) some_empty[i] = static_cast<std::int64_t>(i) + 1;
  check("empty leaves between", shape_of({}, 4, some_empty), 128);
  expect(check("nothing but empty leaves", shape_of({}, 4, {0, 0}), 128) == 0, "no launch");
  expect(check("an empty batch", shape_of({0}, 4, {7}), 128) == 0, "no launch");
  expect(blocks_for(std::int64_t{1} << 40) == kMostBlocks, "no more blocks than a grid may have");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace cuda
}  // namespace fedfuse

int main() { return fedfuse::cuda::main_of_test(); }
