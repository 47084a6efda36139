// This file declares the schemas of the operators. The structs in arguments.h have the same arguments.
#include <torch/library.h>

namespace blurry_attn {

#define BLURRY_INPUTS "Tensor query, Tensor key, Tensor value"
#define BLURRY_LAW "int slots, int[] window, int[] phase, str kernel, float sharpness"
#define BLURRY_CALL             \
  BLURRY_INPUTS ", " BLURRY_LAW \
                ", float scale, Tensor? cu_seqlens, Tensor? state_key, Tensor? state_value, Tensor? position"

TORCH_LIBRARY(blurry_attn, m) {
  m.def("backend(" BLURRY_INPUTS ", " BLURRY_LAW ") -> str");
  m.def("forward(" BLURRY_CALL
        ", bool return_state, bool keep=False) -> "
        "(Tensor out, Tensor lse, Tensor state_key, Tensor state_value, Tensor position, Tensor kept)");
  m.def("backward(Tensor grad_out, Tensor? grad_lse, Tensor? grad_state_key, Tensor? grad_state_value, " BLURRY_CALL
        ", Tensor out, Tensor lse, Tensor kept) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_state_key, Tensor grad_state_value)");
  m.def("step(" BLURRY_INPUTS ", Tensor(a!) state_key, Tensor(b!) state_value, Tensor(c!) position, " BLURRY_LAW
        ", float scale) -> Tensor");
  m.def("rotary(Tensor x, Tensor positions, float base, bool back=False) -> Tensor");
}

#undef BLURRY_INPUTS
#undef BLURRY_LAW
#undef BLURRY_CALL

}  // namespace blurry_attn
