// shared_memory is the dynamic shared memory of a block, whose size the launch sets.
#pragma once

namespace blurry_attn::cuda {

extern __shared__ __align__(128) unsigned char shared_memory[];

}  // namespace blurry_attn::cuda
