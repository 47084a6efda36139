// The dynamic shared memory of a block, as a launch asks for it.
#pragma once

namespace blurry_attn::cuda {

extern __shared__ __align__(128) unsigned char shared_memory[];

}  // namespace blurry_attn::cuda
