// Tests noise, clipping and server steps of every instruction set that this processor has. Needs nothing but the
// kernels: also for sanitizers and emulators.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operations.h"
#include "math/blocks.h"
#include "math/clipping.h"
#include "math/threefry.h"

namespace fedfuse {
namespace {

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

void test_threefry() {
  // The known answers of Random123.
  expect(threefry_bits<std::uint32_t>(ThreefryKey::from(0, 0), 0, 0) == (0x6b200159u ^ 0x99ba4efeu), "all zeros");
  const std::uint32_t ones = 0xffffffffu;
  expect(threefry_bits(ThreefryKey::from(ones, ones), ones, ones) == (0x1cb996fcu ^ 0xbb002be7u), "all ones");
  expect(threefry_bits(ThreefryKey::from(0x13198a2eu, 0x03707344u), 0x243f6a88u, 0x85a308d3u) ==
             (0xc4923a9cu ^ 0x483df7a0u),
         "digits of pi");
}

void test_noise() {
  const std::string isa = kernels().name;
  const NoiseKernels& noise = *kernels().noise;
  // Across the end of the low word of the counter.
  constexpr std::uint64_t kFirst = (std::uint64_t{1} << 32) - 100;
  constexpr std::int64_t kColumns = 300;
  std::vector<float> whole(kColumns, 0);
  noise.add_to_floats(1, 2, kFirst, 1.0f, kColumns, whole.data());
  for (std::int64_t begin : {0, 1, 63, 99, 100, 101, 250}) {
    for (std::int64_t columns : {1, 5, 16, 50}) {
      std::vector<float> part(columns, 0);
      noise.add_to_floats(1, 2, kFirst + begin, 1.0f, columns, part.data());
      expect(std::memcmp(part.data(), whole.data() + begin, columns * sizeof(float)) == 0, isa + ": part of the noise");
    }
  }
  std::vector<double> wide(kColumns, 1.0);
  noise.add_to_doubles(1, 2, kFirst, 0.5, kColumns, wide.data());
  for (std::int64_t i = 0; i < kColumns; ++i) {
    expect(wide[i] == 1.0 + 0.5 * static_cast<double>(whole[i]), isa + ": the same noise on doubles");
  }
  constexpr std::int64_t kMany = 100000;
  std::vector<float> many(kMany, 0);
  noise.add_to_floats(3, 4, 0, 1.0f, kMany, many.data());
  double mean = 0, square = 0;
  for (float x : many) {
    mean += x / kMany;
    square += static_cast<double>(x) * x / kMany;
  }
  expect(std::fabs(mean) < 5 / std::sqrt(kMany), isa + ": mean");
  expect(std::fabs(square - 1) < 5 * std::sqrt(2.0 / kMany), isa + ": variance");
}

void test_clipping() {
  expect(norm_of(add({16, 0}, {9, 0})) == 5, "norms add up");
  expect(norm_of(add({1, 600}, {1, -600})) == std::ldexp(1, 600), "far apart");
  expect(add({0, 0}, {4, 7}).exponent == 7, "nothing added");
  expect(std::isnan(norm_of(add({1, 600}, {NAN, 0}))), "NaN comes through");
  expect(clip_factor(INFINITY, 0, 1).kept == 0 && clip_factor(NAN, 0, 1).kept == 0, "not finite");
  expect(std::isnan(clip_factor(1, 0, -1).factor) && std::isnan(clip_factor(1, 0, NAN).factor), "a bad bound");
  expect(clip_factor(0, 0, 0).factor == 1 && clip_factor(2, 0, 0).factor == 0, "a bound of 0");
  const ClipFactor far = clip_factor(1, 1023, 0x1p1000);
  expect(std::ldexp(far.factor, far.exponent) == 0x1p-23, "beyond a double's root");
  for (int i = 1; i < 1000; ++i) {
    const ClippedWeight<float> clipped = clipped_weight<float>(1, clip_factor(i, 0, 0.7));
    expect(static_cast<double>(clipped.weight) * i <= 0.7 * (1 + 0x1p-50) && clipped.scale == 1,
           "rounded towards zero");
  }
}

// A number with an exponent of its own.
struct Wide {
  double fraction;
  int exponent;
};

Wide operator*(Wide a, double b) {
  int exponent;
  const double fraction = std::frexp(b, &exponent);
  return {a.fraction * fraction, a.exponent + exponent};
}

// Whatever the magnitudes of norm, bound, weight and coordinate: what a coordinate adds is right to rounding, unless it
// is too small or too large a number, and never more than it may be.
template <typename Accumulator>
void test_contributions() {
  using Limits = std::numeric_limits<Accumulator>;
  constexpr int kLeast = Limits::min_exponent - 1, kMost = Limits::max_exponent - 1,
                kStep = sizeof(Accumulator) == 8 ? 93 : 11;
  const double fractions[] = {1, 1.25, 1.75};
  int wrong = 0, longer = 0, checked = 0;
  for (int norm = kLeast; norm <= kMost; norm += kStep) {
    for (int bound = kLeast; bound < norm; bound += kStep) {
      for (int weight = kLeast; weight <= kMost; weight += kStep) {
        for (int below : {0, 1, 30}) {
          const double a = fractions[(norm - kLeast) % 3], b = fractions[(bound - kLeast) % 3], c = 1.125;
          const double coordinate = std::ldexp(a, norm - below);
          if (norm - below < kLeast) continue;
          const Wide exact = Wide{1, 0} * (coordinate / a) * (std::ldexp(b, bound) / 1) * std::ldexp(c, weight);
          // Divided by the norm over its fraction, times that fraction: nothing is rounded.
          const int exponent = exact.exponent - norm;
          const double fraction = exact.fraction;
          if (exponent <= kLeast + 3 || exponent >= kMost - 1) continue;
          const ClippedWeight<Accumulator> clipped = clipped_weight<Accumulator>(
              std::ldexp(c, weight), clip_factor(std::ldexp(a, norm), 0, std::ldexp(b, bound)));
          const volatile Accumulator scaled = clipped.scale * static_cast<Accumulator>(coordinate);
          const double got = clipped.weight * scaled;
          const double ratio = std::ldexp(got, -exponent) / fraction;
          ++checked;
          wrong += !(std::fabs(ratio - 1) <= 4 * Limits::epsilon());
          longer += !(ratio <= 1 + (sizeof(Accumulator) == 8 ? 4 : 0.5) * Limits::epsilon());
        }
      }
    }
  }
  const std::string type = sizeof(Accumulator) == 8 ? "float64" : "float32";
  expect(checked > 1000 && wrong == 0,
         type + " contributions: " + std::to_string(wrong) + " wrong of " + std::to_string(checked));
  expect(longer == 0, type + " contributions: " + std::to_string(longer) + " too long of " + std::to_string(checked));
}

void test_blocks() {
  const BlockLevel levels[] = {{3, 10, 2}, {20, 100, 5}};
  for (std::uint64_t i = 0; i < 10; ++i) {
    expect(index_in_leaf(levels, 2, i) == (3 + i / 5) * 100 + 20 + i % 5, "index in a leaf");
  }
}

void test_server() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::string isa = kernels().name;
  for (int rule = 0; rule < kNumServerRules; ++rule) {
    for (std::int64_t columns : {1, 15, 64, 100, 257}) {
      std::vector<float> delta, param, first, second;
      for (std::int64_t i = 0; i < columns; ++i) {
        delta.push_back(std::sin(i + 1.0f));
        param.push_back(std::cos(i));
        first.push_back(0.01f * i);
        second.push_back(1 + 0.1f * i);
      }
      std::vector<float> p = param, m = first, v = second;
      const Rates<float> rates = {0.1f, 0.9f, 0.99f, 1e-3f};
      kernels().server_rules->step_floats[rule](
          {rates, delta.data(), p.data(), m.data(), v.data(), p.data(), m.data(), v.data(), columns});
      for (std::int64_t i = 0; i < columns; ++i) {
        float p1 = param[i], m1 = first[i], v1 = second[i], p2, m2, v2;
        kernels().server_rules->step_floats[rule]({rates, &delta[i], &p1, &m1, &v1, &p2, &m2, &v2, 1});
        expect(p2 == p[i] && m2 == m[i] && v2 == v[i], isa + ": a coordinate alone has other bits");
        const ServerCoordinate<double> old = {param[i], first[i], second[i]};
        const Rates<double> wide = {rates.learning_rate, rates.b1, rates.b2, rates.tau};
        const ServerCoordinate<double> exact =
            rule == 0   ? server_step<ServerRule::kAvgM, double>(wide, old, delta[i])
            : rule == 1 ? server_step<ServerRule::kAdagrad, double>(wide, old, delta[i])
            : rule == 2 ? server_step<ServerRule::kAdam, double>(wide, old, delta[i])
                        : server_step<ServerRule::kYogi, double>(wide, old, delta[i]);
        expect(std::fabs(p[i] - exact.param) < 1e-6 && std::fabs(m[i] - exact.first) < 1e-5 &&
                   std::fabs(v[i] - exact.second) < 1e-5,
               isa + ": step");
      }

      // One coordinate, anywhere, whose moment or whose parameter would not be finite; and what is just behind them.
      const auto judged = [&](float overflow) {
        return kernels().server_rules->judge_floats[rule]({rates, delta.data(), param.data(), first.data(),
                                                           second.data(), nullptr, nullptr, nullptr, columns - 1,
                                                           overflow});
      };
      expect(judged(kInfinity), isa + ": a good step is refused");
      const float largest = *std::max_element(param.begin(), param.end());
      expect(columns < 100 || !judged(largest / 2), isa + ": a parameter overflows in its own type");
      delta[columns - 1] = kInfinity;
      expect(judged(kInfinity), isa + ": judged by what is behind the last coordinate");
      for (std::int64_t bad = 0; bad + 1 < columns; bad += 1 + columns / 3) {
        const float kept = delta[bad];
        delta[bad] = 1e30f;
        expect(judged(kInfinity) == (rule == 0), isa + ": a square overflows unseen");
        delta[bad] = kInfinity;
        expect(!judged(kInfinity), isa + ": an infinite mean passes");
        delta[bad] = kept;
      }
    }
  }
}

}  // namespace
}  // namespace fedfuse

int main() {
  using namespace fedfuse;
  test_threefry();
  test_clipping();
  test_contributions<float>();
  test_contributions<double>();
  test_blocks();
  for (const std::string& isa : supported_isas()) {
    choose_isa(isa);
    test_noise();
    test_server();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
