// This file checks the arguments of a call, allocates its results and caches tables of gates.
#include "call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COW.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <list>
#include <mutex>

#include "overlap.h"

namespace blurry_attn {

namespace {

constexpr double kLog2E = 1.4426950408889634;  // kernels compute a softmax by powers of two

c10::DispatchKeySet keys_of(const at::Tensor& beside, at::ScalarType type) {
  return c10::DispatchKeySet(c10::computeDispatchKey(type, at::kStrided, beside.device()));
}

// is_tokens_first() says whether a tensor is dense in memory as (batch, tokens, heads, dim), as is_contiguous() counts.
bool is_tokens_first(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t stride = 1;
  for (const int64_t d : {3, 1, 2, 0}) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) != stride) return false;
    stride *= tensor.size(d);
  }
  return true;
}

void check_tensor(const at::Tensor& tensor, const char* name, const at::Tensor& query) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_nested(), name,
                              " must not be a nested tensor; pack sequences with cu_seqlens");
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, name, " must be a dense tensor, got layout ",
                              tensor.layout());
  TORCH_CHECK_VALUE(tensor.dim() == 4, name, " must have 4 dimensions (batch, heads, tokens, head_dim), got ",
                    tensor.dim(), " in shape ", tensor.sizes());
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
                   " must be float64, float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_TYPE(type == query.scalar_type(), name, " must have query's dtype ", query.scalar_type(), ", got ", type);
  TORCH_CHECK_VALUE(tensor.device() == query.device(), name, " must be on query's device ", query.device(), ", got ",
                    tensor.device());
  TORCH_CHECK_VALUE(tensor.size(3) >= 1, name, " must have a head_dim of at least 1, got shape ", tensor.sizes());
}

void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType type,
                 const at::Tensor& query) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == query.device(), name, " must be on query's device ", query.device(), ", got ",
                    tensor.device());
}

// A Place says where a tensor lies in memory.
struct Place {
  Footprint footprint;
  const void* copied_on_write;  // its storage, if a write would first copy that elsewhere; else null
};

// place_of() is empty for a tensor without memory.
std::optional<Place> place_of(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kTraced({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  if (tensor.key_set().has_any(kTraced) || tensor.is_meta() || !tensor.has_storage() || tensor.numel() == 0)
    return std::nullopt;
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  Place place{{reinterpret_cast<intptr_t>(tensor.const_data_ptr()), size, {}}, nullptr};
  auto& dimensions = place.footprint.dimensions;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dimensions.push_back({tensor.stride(d) * size, tensor.size(d) - 1});
  }
  std::sort(dimensions.begin(), dimensions.end(), [](const auto& a, const auto& b) { return a.stride > b.stride; });
  const c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
  if (c10::impl::cow::is_cow_data_ptr(storage->data_ptr())) place.copied_on_write = storage;
  return place;
}

bool share_memory(const std::optional<Place>& a, const std::optional<Place>& b) {
  return a && b && a->copied_on_write == b->copied_on_write && overlap(a->footprint, b->footprint);
}

void check_slots(int64_t slots) {
  TORCH_CHECK_VALUE(slots >= 2, "slots must be at least 2, got ", slots);
  TORCH_CHECK_VALUE(slots <= kMaxSlots, "slots must be at most ", kMaxSlots, ", got ", slots);
}

constexpr size_t kMostTables = 128, kMostTableBytes = size_t(32) << 20;  // bounds of each type's cache of tables

// gates_of() returns the table of a law, from a cache or made anew. If another thread holds the lock, the cache counts
// as empty. So no call waits for another, and a process that is forked meanwhile does not hang.
template <typename compute>
Gates<compute> gates_of(Kernel kernel, const Cells& cells, double sharpness) {
  struct Entry {
    Kernel kernel;
    int64_t slots, resolution;
    double sharpness;
    Gates<compute> table;
  };
  static std::mutex mutex;
  static auto& kept = *new std::list<Entry>;  // most recently used first; never freed, since threads may outlive main()
  static size_t bytes = 0;
  if (kernel != Kernel::fejer) sharpness = 1;
  const auto find = [&]() -> Gates<compute> {
    const auto entry = std::find_if(kept.begin(), kept.end(), [&](const Entry& e) {
      return e.kernel == kernel && e.slots == cells.slots && e.resolution == cells.resolution &&
             e.sharpness == sharpness;
    });
    if (entry == kept.end()) return nullptr;
    kept.splice(kept.begin(), kept, entry);
    return entry->table;
  };
  {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (lock) {
      if (Gates<compute> table = find()) return table;
    }
  }
  const std::vector<double> gates =
      kernel == Kernel::fejer ? flux_gates(cells, sharpness) : period_gates(kernel, cells, sharpness);
  std::list<Entry> fresh, dropped;
  fresh.push_back({kernel, cells.slots, cells.resolution, sharpness,
                   std::make_shared<const std::vector<compute>>(gates.begin(), gates.end())});
  const Gates<compute> table = fresh.front().table;
  const auto bytes_of = [](const Entry& entry) { return entry.table->size() * sizeof(compute); };
  if (bytes_of(fresh.front()) > kMostTableBytes) return table;
  const std::unique_lock lock(mutex, std::try_to_lock);
  if (!lock || find()) return table;
  bytes += bytes_of(fresh.front());
  kept.splice(kept.begin(), fresh);
  while (kept.size() > kMostTables || bytes > kMostTableBytes) {
    bytes -= bytes_of(kept.back());
    dropped.splice(dropped.begin(), kept, std::prev(kept.end()));
  }
  return table;
}

}  // namespace

template <typename compute>
std::vector<Gates<compute>> Call::gates() const {
  std::vector<Gates<compute>> tables;
  for (const Cells& head : cells) {
    const bool is_as_before = !tables.empty() && head.resolution == (&head)[-1].resolution;
    tables.push_back(is_as_before ? tables.back() : gates_of<compute>(kernel, head, sharpness));
  }
  return tables;
}
template std::vector<Gates<float>> Call::gates() const;
template std::vector<Gates<double>> Call::gates() const;

at::Tensor Call::empty(at::IntArrayRef sizes, at::ScalarType type) const {
  return at::Tensor(at::detail::empty_generic(sizes, c10::GetAllocator(query.device().type()), keys_of(query, type),
                                              type, std::nullopt));
}
at::Tensor empty_beside(const at::Tensor& x, int64_t dim) {
  const int64_t heads = x.size(1), tokens = x.size(2), size = heads * tokens * dim;
  const bool tokens_first = is_tokens_first(x);
  return at::Tensor(at::detail::empty_strided_generic(
      {x.size(0), heads, tokens, dim}, {size, tokens_first ? dim : tokens * dim, tokens_first ? heads * dim : dim, 1},
      c10::GetAllocator(x.device().type()), keys_of(x, x.scalar_type()), x.scalar_type()));
}
at::Tensor Call::empty_lse() const { return empty({batch(), query_heads(), tokens()}, compute_type()); }
at::Tensor Call::empty_state_key() const {
  return empty({sequences(), kv_heads(), slots(), key_dim()}, compute_type());
}
at::Tensor Call::empty_state_value() const {
  return empty({sequences(), kv_heads(), slots(), value_dim()}, compute_type());
}

at::Tensor Call::positions_after() const {
  if (cu_seqlens) {
    const at::Tensor lengths = at::diff(cu_seqlens->to(at::kLong));
    return position ? lengths.add(*position) : lengths;
  }
  return position ? position->add(tokens()) : at::full({sequences()}, tokens(), query.options().dtype(at::kLong));
}

Kernel checked_kernel(std::string_view name) {
  TORCH_CHECK_VALUE(name == "fejer" || name == "dirichlet", "kernel must be 'fejer' or 'dirichlet', got '", name, "'");
  return name == "fejer" ? Kernel::fejer : Kernel::dirichlet;
}

Cells checked_cells(Kernel kernel, int64_t slots, int64_t window, int64_t phase) {
  check_slots(slots);
  TORCH_CHECK_VALUE(window >= slots && window % slots == 0, "window must be a positive multiple of slots (", slots,
                    "), got ", window);
  const int64_t resolution = window / slots;
  TORCH_CHECK_VALUE(resolution <= kMaxResolution, "window must be at most ", kMaxResolution, " * slots, got ", window,
                    " with ", slots, " slots");
  TORCH_CHECK_VALUE(kernel == Kernel::fejer || resolution <= kMaxDirichletResolution, "window must be at most ",
                    kMaxDirichletResolution, " * slots with kernel 'dirichlet', got ", window, " with ", slots,
                    " slots");
  TORCH_CHECK_VALUE(phase >= 0 && phase < resolution, "phase must be in 0 .. ", resolution - 1,
                    " (window / slots - 1), got ", phase);
  return {slots, resolution, phase};
}

Call check_call(const CallArguments& given) {
  const auto& [query, key, value] = static_cast<const Inputs&>(given);
  const auto& [slots, window, phase, kernel, sharpness] = static_cast<const LawArguments&>(given);
  const double scale = given.scale;
  const OptionalTensor &cu_seqlens = given.cu_seqlens, &position = given.position;
  const OptionalTensor &state_key = given.state_key, &state_value = given.state_value;
  check_tensor(query, "query", query);
  check_tensor(key, "key", query);
  check_tensor(value, "value", query);
  TORCH_CHECK_VALUE(key.size(0) == query.size(0), "key must have query's batch ", query.size(0), ", got ", key.size(0));
  TORCH_CHECK_VALUE(value.size(0) == query.size(0), "value must have query's batch ", query.size(0), ", got ",
                    value.size(0));
  TORCH_CHECK_VALUE(key.size(2) == query.size(2), "key must have as many tokens as query (", query.size(2), "), got ",
                    key.size(2), ": blurry window attention is causal self-attention");
  TORCH_CHECK_VALUE(value.size(2) == query.size(2), "value must have as many tokens as query (", query.size(2),
                    "), got ", value.size(2));
  TORCH_CHECK_VALUE(key.size(3) == query.size(3), "key must have query's head_dim ", query.size(3), ", got ",
                    key.size(3));
  const int64_t heads = key.size(1);
  TORCH_CHECK_VALUE(heads >= 1, "key must have at least one head, got shape ", key.sizes());
  TORCH_CHECK_VALUE(value.size(1) == heads, "value must have key's number of heads ", heads, ", got ", value.size(1));
  TORCH_CHECK_VALUE(query.size(1) >= 1 && query.size(1) % heads == 0, "query must have a multiple of key's ", heads,
                    " heads, got ", query.size(1));

  const Kernel law = checked_kernel(kernel);
  const bool fejer = law == Kernel::fejer;
  check_slots(slots);
  TORCH_CHECK_VALUE(!fejer || (std::isfinite(sharpness) && sharpness >= 1),
                    "sharpness must be finite and at least 1, got ", sharpness);
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale must be finite, got ", scale);
  const bool is_double = query.scalar_type() == at::kDouble;
  const double largest = is_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  TORCH_CHECK_VALUE(std::abs(scale) <= largest / kLog2E, "scale must be finite in ", is_double ? "float64" : "float32",
                    " when multiplied by log2(e), got ", scale);
  TORCH_CHECK_VALUE(static_cast<int64_t>(window.size()) == heads, "window must have one entry per kv head (", heads,
                    "), got ", window.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(phase.size()) == heads, "phase must have one entry per kv head (", heads,
                    "), got ", phase.size());
  std::vector<Cells> cells;
  cells.reserve(heads);
  for (int64_t h = 0; h < heads; ++h) {
    cells.push_back(checked_cells(law, slots, window[h], phase[h]));
  }

  if (cu_seqlens) {
    const at::ScalarType type = cu_seqlens->scalar_type();
    TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, "cu_seqlens must be int32 or int64, got ", type);
    TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                      "cu_seqlens must have shape (sequences + 1,), got ", cu_seqlens->sizes());
    TORCH_CHECK_VALUE(cu_seqlens->device() == query.device(), "cu_seqlens must be on query's device ", query.device(),
                      ", got ", cu_seqlens->device());
    TORCH_CHECK_VALUE(query.size(0) == 1, "query must have batch 1 with cu_seqlens, got ", query.size(0));
  }
  Call call{query, key, value, std::move(cells), law, sharpness, scale, cu_seqlens, {}, {}, {}};
  TORCH_CHECK_VALUE(state_key.has_value() == state_value.has_value() && state_key.has_value() == position.has_value(),
                    "state_key, state_value and position must be given together");
  if (state_key) {
    check_shape(*state_key, "state.key", {call.sequences(), heads, slots, call.key_dim()}, call.compute_type(), query);
    check_shape(*state_value, "state.value", {call.sequences(), heads, slots, call.value_dim()}, call.compute_type(),
                query);
    check_shape(*position, "state.position", {call.sequences()}, at::kLong, query);
    call.state_key = state_key->contiguous();
    call.state_value = state_value->contiguous();
    call.position = position->contiguous();
  }
  return call;
}

Call check_call(const BackendArguments& given) {
  const OptionalTensor none;
  return check_call(CallArguments{given, given, /*scale=*/1, none, none, none, none});
}

Call check_step(const StepArguments& given) {
  const OptionalTensor none, state_key = given.state_key, state_value = given.state_value, position = given.position;
  Call call = check_call(CallArguments{given, given, given.scale, none, state_key, state_value, position});
  TORCH_CHECK_VALUE(call.tokens() == 1, "query must have one token in a step, got ", call.tokens());
  check_is_writable(
      {{"state.key", given.state_key}, {"state.value", given.state_value}, {"state.position", given.position}},
      {{"query", given.query}, {"key", given.key}, {"value", given.value}});
  return call;
}

void check_gradients(const Call& call, const BackwardArguments& given) {
  const auto& [grad_out, grad_lse, grad_state_key, grad_state_value] = static_cast<const IncomingGradients&>(given);
  const at::Tensor &out = given.out, &lse = given.lse;
  const int64_t batch = call.batch(), heads = call.query_heads(), tokens = call.tokens();
  const at::ScalarType type = call.query.scalar_type(), compute = call.compute_type();
  check_shape(out, "out", {batch, heads, tokens, call.value_dim()}, type, call.query);
  check_shape(lse, "lse", {batch, heads, tokens}, compute, call.query);
  check_shape(grad_out, "grad_out", out.sizes(), type, call.query);
  if (grad_lse) check_shape(*grad_lse, "grad_lse", lse.sizes(), compute, call.query);
  const int64_t states = call.sequences(), kv_heads = call.kv_heads(), slots = call.slots();
  if (grad_state_key) {
    check_shape(*grad_state_key, "grad_state_key", {states, kv_heads, slots, call.key_dim()}, compute, call.query);
  }
  if (grad_state_value) {
    check_shape(*grad_state_value, "grad_state_value", {states, kv_heads, slots, call.value_dim()}, compute,
                call.query);
  }
  check_shape(given.kept, "kept", {given.kept.numel()}, at::kByte, call.query);
}

void check_rotary(const RotaryArguments& given) {
  const auto& [x, position, base, back] = given;
  check_tensor(x, "x", x);
  TORCH_CHECK_VALUE(x.size(3) % 2 == 0, "x must have an even head_dim for rotary embedding, got ", x.size(3));
  TORCH_CHECK_TYPE(position.scalar_type() == at::kLong, "positions must be int64, got ", position.scalar_type());
  TORCH_CHECK_VALUE(
      position.sizes() == x.sizes().slice(2, 1) || position.sizes() == at::IntArrayRef({x.size(0), x.size(2)}),
      "positions must be (T,) or (B, T) of x ", x.sizes(), ", got ", position.sizes());
  TORCH_CHECK_VALUE(position.device() == x.device(), "positions must be on x's device ", x.device(), ", got ",
                    position.device());
  TORCH_CHECK_VALUE(base > 0 && std::isfinite(base), "base must be positive and finite, got ", base);
}

void check_is_writable(c10::ArrayRef<Argument> written, c10::ArrayRef<Argument> read) {
  c10::SmallVector<std::optional<Place>, 4> places;
  for (const Argument& argument : written) {
    TORCH_CHECK_VALUE(!argument.tensor.is_inference() || c10::InferenceMode::is_enabled(), argument.name,
                      " must be no inference tensor to be updated in place outside torch.inference_mode(); clone() it");
    const std::optional<Place>& place = places.emplace_back(place_of(argument.tensor));
    TORCH_CHECK_VALUE(!place || !overlaps_itself(place->footprint), argument.name,
                      " must have memory for every element to be updated in place, got a tensor whose elements share "
                      "it; clone() it");
    for (size_t i = 0; i + 1 < places.size(); ++i) {
      TORCH_CHECK_VALUE(!share_memory(places[i], place), argument.name, " must not share memory with ", written[i].name,
                        " to be updated in place; clone() it");
    }
  }
  for (const Argument& argument : read) {
    const std::optional<Place> place = place_of(argument.tensor);
    for (size_t i = 0; i < places.size(); ++i) {
      TORCH_CHECK_VALUE(!share_memory(places[i], place), argument.name, " must not share memory with ", written[i].name,
                        ", which is updated in place; clone() it");
    }
  }
}

void write_back(const Call& call, const WrittenState& state) {
  if (!call.state_key->is_same(state.state_key)) state.state_key.copy_(*call.state_key);
  if (!call.state_value->is_same(state.state_value)) state.state_value.copy_(*call.state_value);
}

std::vector<int64_t> checked_cu_seqlens(const at::Tensor& cu_seqlens, int64_t tokens) {
  const at::Tensor numbers = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* data = numbers.const_data_ptr<int64_t>();
  const std::vector<int64_t> ends(data, data + numbers.numel());
  TORCH_CHECK_VALUE(ends.front() == 0, "cu_seqlens must start at 0, got ", ends.front());
  for (size_t i = 1; i < ends.size(); ++i) {
    TORCH_CHECK_VALUE(ends[i] >= ends[i - 1], "cu_seqlens must not decrease, got ", ends[i], " after ", ends[i - 1]);
  }
  TORCH_CHECK_VALUE(ends.back() == tokens, "cu_seqlens must end at the number of tokens ", tokens, ", got ",
                    ends.back());
  return ends;
}

void check_positions(const at::Tensor& position) {
  const int64_t* data = position.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < position.numel(); ++i) {
    TORCH_CHECK_VALUE(data[i] >= 0, "state.position must not be negative, got ", data[i]);
    TORCH_CHECK_VALUE(data[i] <= kMaxPosition, "state.position must be at most 2^62, got ", data[i]);
  }
}

}  // namespace blurry_attn
