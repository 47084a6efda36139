// The Python module blurry_attn._C loads the operators and calls them. It also shows the law and the build.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "attention.h"
#include "call.h"
#include "law.h"

#ifndef BLURRY_TORCH_VERSION
#define BLURRY_TORCH_VERSION "unknown"
#endif
#ifndef BLURRY_CUDA_VERSION
#define BLURRY_CUDA_VERSION ""
#endif

namespace py = pybind11;

namespace blurry_attn {
namespace {

py::array_t<double> gate_table(const std::string& kernel, int64_t slots, int64_t window, int64_t phase,
                               double sharpness, int64_t start, int64_t length) {
  TORCH_CHECK_VALUE(start >= 0 && start <= kMaxPosition, "start must be in 0 .. 2^62, got ", start);
  TORCH_CHECK_VALUE(length >= 0 && length <= kMaxPosition / kMaxSlots, "length must be in 0 .. 2^42, got ", length);
  const Kernel law = checked_kernel(kernel);
  // The table has any resolution; only calls of "dirichlet" bound it.
  const auto table = gates(law, checked_cells(Kernel::fejer, slots, window, phase), sharpness, start, length);
  return py::array_t<double>({length, slots}, table.data());
}

std::vector<int64_t> slot_openings(int64_t slots, int64_t window, int64_t phase) {
  const Cells cells = checked_cells(Kernel::fejer, slots, window, phase);
  std::vector<int64_t> tokens;
  for (int64_t m = 0; m < slots; ++m) tokens.push_back(cells.slot_opening(m));
  return tokens;
}

// These two take the arguments of the operators' schemas. The tensors of a state are given together, or none of them.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> call_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t slots, std::vector<int64_t> window,
    std::vector<int64_t> phase, std::string kernel, double sharpness, double scale, const OptionalTensor& cu_seqlens,
    const OptionalTensor& state_key, const OptionalTensor& state_value, const OptionalTensor& position,
    bool return_state) {
  Options options{scale, cu_seqlens, {}, return_state};
  if (state_key) options.state = State{*state_key, state_value.value(), position.value()};
  auto [out, lse, state] =
      forward(query, key, value, {slots, std::move(window), std::move(phase), std::move(kernel), sharpness}, options);
  return {out, lse, state.key, state.value, state.position};
}
at::Tensor call_step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& state_key, const at::Tensor& state_value, const at::Tensor& position,
                     int64_t slots, std::vector<int64_t> window, std::vector<int64_t> phase, std::string kernel,
                     double sharpness, double scale) {
  State state{state_key, state_value, position};
  return step(query, key, value, {slots, std::move(window), std::move(phase), std::move(kernel), sharpness}, state,
              scale);
}

using Arguments = std::vector<std::pair<std::string, at::Tensor>>;
void call_check_is_writable(const Arguments& written, const Arguments& read) {
  const auto view = [](const Arguments& arguments) {
    std::vector<Argument> views;
    for (const auto& [name, tensor] : arguments) views.push_back({name, tensor});
    return views;
  };
  check_is_writable(view(written), view(read));
}

py::dict build_info() {
  py::dict info;
  info["torch"] = BLURRY_TORCH_VERSION;
  info["cuda"] = *BLURRY_CUDA_VERSION ? py::object(py::str(BLURRY_CUDA_VERSION)) : py::object(py::none());
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace
}  // namespace blurry_attn

PYBIND11_MODULE(_C, m) {
  m.def("forward", torch::wrap_pybind_function_no_gil(&blurry_attn::call_forward), "torch.ops.blurry_attn.forward.");
  m.def("step", torch::wrap_pybind_function_no_gil(&blurry_attn::call_step), "torch.ops.blurry_attn.step.");
  m.def("rotary", torch::wrap_pybind_function_no_gil(&blurry_attn::rotary), "torch.ops.blurry_attn.rotary.");
  m.def("check_is_writable", torch::wrap_pybind_function_no_gil(&blurry_attn::call_check_is_writable),
        py::arg("written"), py::arg("read"),
        "What a step checks before it writes: names and tensors of what it writes and of what it reads.");
  m.def("gates", torch::wrap_pybind_function(&blurry_attn::gate_table), py::arg("kernel"), py::arg("slots"),
        py::arg("window"), py::arg("phase"), py::arg("sharpness"), py::arg("start"), py::arg("length"),
        "The law as a float64 table (length, slots): the share of token start + i that each slot takes, openings\n"
        "included; NaN where a slot is shut.");
  m.def("openings", torch::wrap_pybind_function(&blurry_attn::slot_openings), py::arg("slots"), py::arg("window"),
        py::arg("phase"), "The token that opens each slot.");
  m.def("build_info", &blurry_attn::build_info, "What the library was built with: torch, cuda (or None), compiler.");
}
