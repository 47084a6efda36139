// The law's tables: gates, cells and openings, against what its definition says.
#include <gtest/gtest.h>

#include <cmath>

#include "law.h"

using namespace blurry_attn;

class Law : public testing::TestWithParam<Cells> {
 protected:
  const Cells cells = GetParam();
};

TEST_P(Law, KernelIsOneAtItsSampleAndZeroAtTheOthers) {
  for (int64_t m = 0; m < 2 * cells.slots; ++m) {
    EXPECT_EQ(dirichlet(m * cells.resolution, cells.slots, cells.window()), m % cells.slots ? 0.0 : 1.0);
  }
}

TEST_P(Law, SamplesOfOneAddToOne) {
  for (int64_t x = 0; x < cells.window(); ++x) {
    double sum = 0;
    for (int64_t m = 0; m < cells.slots; ++m) sum += dirichlet(x - m * cells.resolution, cells.slots, cells.window());
    EXPECT_NEAR(sum, 1.0, 1e-12) << "x = " << x;
  }
}

TEST_P(Law, AtMostTwoSlotsAreInFluxAndSharesAreProper) {
  const int64_t length = 3 * cells.window();
  const auto table = gates(Kernel::fejer, cells, 6.0, 0, length);
  for (int64_t t = 0; t < length; ++t) {
    int64_t in_flux = 0;
    for (int64_t m = 0; m < cells.slots; ++m) {
      const double gate = table[t * cells.slots + m];
      EXPECT_EQ(std::isnan(gate), t < cells.slot_opening(m)) << "t = " << t << ", slot " << m;
      if (std::isnan(gate)) continue;
      EXPECT_GE(gate, 0.0);
      EXPECT_LE(gate, 1.0);
      in_flux += gate > 0;
    }
    EXPECT_GE(in_flux, 1) << "t = " << t;
    EXPECT_LE(in_flux, 2) << "t = " << t;
  }
}

TEST_P(Law, ASlotOpensWithGateOneAndItsCentresReplaceIt) {
  const int64_t length = 3 * cells.window();
  const auto table = gates(Kernel::dirichlet, cells, 1.0, 0, length);
  for (int64_t m = 0; m < cells.slots; ++m) {
    EXPECT_EQ(table[cells.slot_opening(m) * cells.slots + m], 1.0);
    for (int64_t t = cells.centre(m); t < length; t += cells.window()) EXPECT_EQ(table[t * cells.slots + m], 1.0);
  }
}

TEST_P(Law, ATableMayStartAnywhere) {
  const int64_t length = 2 * cells.window(), start = cells.window() / 2 + 1;
  for (const Kernel kernel : {Kernel::fejer, Kernel::dirichlet}) {
    const auto whole = gates(kernel, cells, 6.0, 0, length), rest = gates(kernel, cells, 6.0, start, length - start);
    for (size_t i = 0; i < rest.size(); ++i) {
      const double expected = whole[start * cells.slots + i];
      EXPECT_TRUE(rest[i] == expected || (std::isnan(rest[i]) && std::isnan(expected))) << "entry " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Law,
                         testing::Values(Cells{2, 1, 0}, Cells{2, 16, 5}, Cells{3, 2, 1}, Cells{3, 7, 0},
                                         Cells{8, 1, 0}, Cells{8, 7, 6}, Cells{8, 16, 0}, Cells{9, 16, 11},
                                         Cells{64, 8, 3}));
