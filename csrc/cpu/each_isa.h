// This header includes BLURRY_BODY once per instruction set, each time with its own BLURRY_ISA (a namespace) and
// BLURRY_VECTOR_BYTES. So one source serves every x86 level, and other machines take the plain one. The headers of the
// body must be included before: no code of theirs may be compiled for an instruction set that the machine may lack.
#define BLURRY_ISA plain
#define BLURRY_VECTOR_BYTES 16
#include BLURRY_BODY
#undef BLURRY_ISA
#undef BLURRY_VECTOR_BYTES

#ifdef BLURRY_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define BLURRY_ISA avx2
#define BLURRY_VECTOR_BYTES 32
#include BLURRY_BODY
#undef BLURRY_ISA
#undef BLURRY_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define BLURRY_ISA avx512
#define BLURRY_VECTOR_BYTES 64
#include BLURRY_BODY
#undef BLURRY_ISA
#undef BLURRY_VECTOR_BYTES
#pragma GCC pop_options
#endif

// BLURRY_DEFINE_ENTRIES defines NAME_forward and NAME_backward for all types, which call the body at level `isa`.
#ifdef BLURRY_X86_LEVELS
#define BLURRY_AT_LEVEL(call)    \
  switch (isa) {                 \
    case 2: return avx512::call; \
    case 1: return avx2::call;   \
    default: return plain::call; \
  }
#else
#define BLURRY_AT_LEVEL(call) \
  (void)isa;                  \
  return plain::call;
#endif

#define BLURRY_DEFINE_ENTRIES(NAME)                                                                            \
  namespace blurry_attn::cpu {                                                                                 \
  template <typename storage, typename compute>                                                                \
  void NAME##_forward(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs,      \
                      const Allocate& allocate, int isa) {                                                     \
    BLURRY_AT_LEVEL(forward(problem, outputs, allocate))                                                       \
  }                                                                                                            \
  template <typename storage, typename compute>                                                                \
  void NAME##_backward(const Problem<storage, compute>& problem, const Gradients<storage, compute>& gradients, \
                       const Allocate& allocate, int isa) {                                                    \
    BLURRY_AT_LEVEL(backward(problem, gradients, allocate))                                                    \
  }                                                                                                            \
  BLURRY_INSTANTIATE(NAME, double, double)                                                                     \
  BLURRY_INSTANTIATE(NAME, float, float)                                                                       \
  BLURRY_INSTANTIATE(NAME, c10::BFloat16, float)                                                               \
  BLURRY_INSTANTIATE(NAME, c10::Half, float)                                                                   \
  }  // namespace blurry_attn::cpu
#define BLURRY_INSTANTIATE(NAME, storage, compute)                                                                     \
  template void NAME##_forward(const Problem<storage, compute>&, const Outputs<storage, compute>&, const Allocate&,    \
                               int);                                                                                   \
  template void NAME##_backward(const Problem<storage, compute>&, const Gradients<storage, compute>&, const Allocate&, \
                                int);
