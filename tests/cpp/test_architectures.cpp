// A build without code for the card says so in one line that names both.
#include <gtest/gtest.h>

#include "cuda/common/architectures.h"

namespace blurry_attn::cuda {
namespace {

TEST(Architectures, AMissingOneIsNamedWithThoseThatAreThere) {
  EXPECT_EQ(no_code_for(860, {900}),
            "this build has code for compute capability 9.0, and the card has 8.6; "
            "build again with TORCH_CUDA_ARCH_LIST=8.6");
  EXPECT_EQ(no_code_for(1210, {800, 1000}),
            "this build has code for compute capability 8.0, 10.0, and the card has 12.1; "
            "build again with TORCH_CUDA_ARCH_LIST=12.1");
}

TEST(Architectures, ACardThatNoBuildServesIsNotSentToOne) {
  EXPECT_EQ(no_code_for(750, {800, 900}),
            "this build has code for compute capability 8.0, 9.0, and the card has 7.5; "
            "the kernels need 8.0 or newer");
}

}  // namespace
}  // namespace blurry_attn::cuda
