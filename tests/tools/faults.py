"""The faults of the mutation check (mutants.py): one change of the sources each, and the tests that must catch it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Edit:
    """A text that occurs once in a file, or in one of a folder's files, and what takes its place."""

    where: str
    old: str
    new: str

    @cached_property
    def file(self) -> str:
        """The file that has the text, from the root.

        Raises:
            LookupError: the text does not occur, or more than once.
        """
        place = ROOT / self.where
        files = [place] if place.is_file() else [path for path in sorted(place.iterdir()) if path.is_file()]
        texts = {path: path.read_text() for path in files if path.suffix not in (".so", ".pyc")}
        found = {path: text.count(self.old) for path, text in texts.items() if self.old in text}
        if sum(found.values()) != 1:
            counts = ", ".join(f"{path.name} {count}" for path, count in found.items()) or "nowhere"
            raise LookupError(f"{self.where}: this text must occur once, not ({counts}): {self.old!r}")
        (path,) = found
        return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Fault(Edit):
    """An edit that the pytest arguments `tests` must make fail."""

    name: str
    tests: tuple[str, ...]
    whole: bool = False  # whether the fault is in kernels that a quick CUDA build leaves out


# A build that takes seconds: one instruction set, little optimisation.
QUICK = [
    Edit("setup.py", '"-O3", "-g0"', '"-O1", "-g0"'),
    Edit("csrc/cpu/kernels.h", "#define BLURRY_X86_LEVELS\n", ""),
]


def only_if(condition: str, where: str, code: str) -> Edit:
    """The code compiled only for template arguments that fulfil a condition."""
    return Edit(where, code, f"if constexpr ({condition}) {{\n{code}\n}}")


# CUDA in a minute or two: of the kernels on tensor cores only those for bfloat16 and head sizes up to 64.
QUICK_CUDA = [
    Edit("csrc/cuda/common", "  body(__half());\n", ""),
    Edit("csrc/cuda/common", "p.dtype != DType::bfloat16 && p.dtype != DType::float16", "p.dtype != DType::bfloat16"),
    Edit("csrc/cuda/common", "p.key_dim > 128 || p.value_dim > 128", "p.key_dim > 64 || p.value_dim > 64"),
    only_if(
        "dim == 64 && std::is_same_v<storage, __nv_bfloat16>",
        "csrc/cuda/fejer",
        "  if (p.slots <= 32) return body(Config<storage, dim, flux, 32, false>());\n"
        "  if (p.slots <= 64) return body(Config<storage, dim, flux, 64, false>());\n"
        "  return body(Config<storage, dim, flux, 64, true>());\n",
    ),
    only_if(
        "dim == 64",
        "csrc/cuda/fejer",
        "  if (p.slots <= 32) return body(BackConfig<storage, dim, flux, 32, patches>());\n"
        "  body(BackConfig<storage, dim, flux, 64, patches>());\n",
    ),
]

LAW = ("tests/law/test_law.py",)
OPENINGS = ("tests/law/test_facts.py::test_opening_for_every_phase",)
VALUES = ("tests/law/test_golden.py", "-k", "not reference-torch")
LONG = ("tests/operator/test_accuracy.py::test_float64_and_float32", "-k", "odd")  # several stretches of time
LAYOUT = (
    "tests/operator/test_layout.py::test_strided",
    "tests/operator/test_layout.py::test_packed_sequences_have_the_bits_of_each_alone",
)
STATES = (
    "tests/operator/test_gradients.py::test_shut_slots_are_not_read_and_have_gradient_zero",
    "tests/operator/test_gradients.py::test_gradients_equal_the_reference",
    "tests/operator/test_accuracy.py::test_empty",
)
NAN = ("tests/operator/test_nan.py::test_nan_lives_exactly_as_long_as_the_law_says",)
STEP = ("tests/state/test_step.py",)
ERRORS = ("tests/operator/test_errors.py",)
SHARP = (
    "tests/operator/test_accuracy.py::test_half_gradients_of_a_sharp_softmax",
    "tests/operator/test_accuracy.py::test_values_that_agree_give_queries_and_keys_no_gradient",
)
THREADS = ("tests/runtime/test_concurrency.py",)
LOGITS = ("tests/operator/test_accuracy.py::test_large_logits",)
WINDOWS = ("tests/law/test_window.py",)
GEOMETRY = ("tests/law/test_geometry.py",)
STATE = ("tests/state/test_state.py",)
DECODING = ("tests/state/test_decoding.py",)
REFUSALS = ("tests/operator/test_refusals.py",)
MODULES = ("tests/models/test_modules.py",)
ROTARY = ("tests/operator/test_rotary.py",)
SWAP = ("tests/models/test_swap.py",)
RAGGED = ("tests/operator/test_ragged.py",)
EXPORT = ("tests/runtime/test_export.py",)
OPERATORS = ("tests/operator/test_operators.py",)
PACKAGING = ("tests/project/test_packaging.py", "-k", "build and not cuda_build")
HUB = ("tests/models/test_transformers.py",)
PIECES = ("tests/runtime/test_distributed.py", "-k", "pieces or number or length or long_ago")
DTENSORS = ("tests/runtime/test_distributed.py", "-k", "dtensor or share")
LAYERS = ("tests/runtime/test_distributed.py", "-k", "layer_by_heads")
FILES = ("tests/project/test_files.py",)
LM = ("tests/models/test_lm.py",)
REFERENCE = ("tests/law/test_golden.py", "-k", "reference-torch")


def faults(where: str, *entries: tuple[str, str, str, tuple[str, ...]], whole: bool = False) -> list[Fault]:
    return [Fault(where, old, new, name, tests, whole) for name, old, new, tests in entries]


CPU = [
    *faults(
        "csrc",
        ("phase ignored at the centres", "return cell * resolution + phase;", "return cell * resolution;", VALUES),
        ("lobe shifted by a token", "centre(cell) - resolution; }", "centre(cell) - resolution - 1; }", VALUES),
        ("flux ends a token early", "centre(cell) + resolution - 1;", "centre(cell) + resolution - 2;", VALUES),
        ("cell before the first omitted", "return phase > 0 ? -1 : 0; }", "return 0; }", VALUES),
        ("opening a token late", "flux_begin(cell) + 1;", "flux_begin(cell) + 2;", LAW),
        ("second lap opens again", "cell - slots < first();", "cell - slots <= first();", VALUES),
        ("opening token not written whole", "opens(cell) && token == opening(cell) ? scalar(1) : ", "", VALUES),
        ("slot open one token late", "|| token >= opening(cell);", "|| token > opening(cell);", VALUES),
        ("last slot opens with its later cell", "phase > 0 && slot == slots - 1 ? -1 : slot", "slot", LAW),
    ),
    *faults(
        "csrc",
        ("gates shifted by a token", "  offset = modulo(offset, window);", "  offset = modulo(offset + 1, window);",
         LAW),
        ("lobe not squared", "static_cast<double>(resolution) * d * d", "static_cast<double>(resolution) * d", LAW),
        ("gates above one", "std::min(1.0, sharpness / static_cast<double>(resolution) * d * d)",
         "sharpness / static_cast<double>(resolution) * d * d", LAW),
        ("even slots as odd ones", "(slots % 2 ? std::sin(angle) : std::tan(angle))", "std::sin(angle)", LAW),
        ("gate at the centre not one", "return x == 0 ? 1.0 : 0.0;", "return x == 0 ? 0.999 : 0.0;", LAW),
        ("lobe of one token less", ">= resolution) return 0.0;", ">= resolution - 1) return 0.0;", LAW),
        ("table shut at the opening", "token < opening    ?", "token <= opening    ?", LAW),
    ),
    *faults(
        "csrc/cpu",
        ("scan: shut slots of the given state read", "if (!is_open(m, begin() - 1)) continue;", "", STATES),
        ("scan: shut slots written", "if (!is_open(m, t)) continue;", "", OPENINGS),
        ("scan: opening token not written whole", "if (t == openings[m]) return 1;", "", VALUES),
        ("scan: shut slots seen", "if (scan.is_open(m, t)) weights[open++] =", "weights[open++] =", VALUES),
        ("scan: top missing in lse", "return top + std::log(total);", "return std::log(total);", VALUES),
        ("scan: softmax without its top", "largest(weights, open, weights[0]);", "0;", LOGITS),
        ("scan: delta without lse", "gradients.grad_lse ? gradients.grad_lse[scan.scalar_at(head, t)] : compute(0)",
         "compute(0)", VALUES),
        ("scan: scale dropped in backward", "scale_row(problem.scale, kw, grad_query.data());", "", VALUES),
        ("scan: stale carry in backward", "kept.data() + stretch * slots * (kw + vw)", "kept.data()", LONG),
        ("scan: last token skipped in backward", "int64_t t = end - 1; t >= begin;", "int64_t t = end - 2; t >= begin;",
         VALUES),
        ("scan: values kept whole in backward", "keep_row(g, vw, grad_values.data() + m * vw);", "", VALUES),
    ),
    *faults(
        "csrc/cpu",
        ("window: echo dropped", "copy_row(keys.row(track, cell - cells.slots), key_width, key);",
         "zero_row(key, key_width);", VALUES),
        ("window: echo dropped in backward",
         "add_scaled(compute(1), adjoint.key.data(), window.key_width, grad_keys.row(track, cell - slots));", "",
         VALUES),
        ("window: shut slots of the given state read", "problem.state_key && track.opened(cell, track.begin())",
         "problem.state_key", STATES),
        ("window: token before a stretch skipped", "s = window.first_token(track, cell); s < t; ++s",
         "s = window.first_token(track, cell); s < t - 1; ++s", LONG),
        ("window: stale carry at the turn", "key_before = flux_key(row - 1, 1);", "key_before = flux_key(row - 1, 0);",
         VALUES),
        ("window: turn a token early", "turns = t == cells.flux_end(trailing) + 1;",
         "turns = t == cells.flux_end(trailing);", VALUES),
        ("window: shut leading cell seen", "leads[i] = view.cells.is_open(cell + 1, t0 + i);", "leads[i] = true;",
         VALUES),
        ("window: oldest standing cell missed", "trailing_cell - cells.slots + 2;", "trailing_cell - cells.slots + 3;",
         VALUES),
        ("window: cells before the first seen", "return cell > cells.first() ? cell : cells.first();", "return cell;",
         VALUES),
        ("window: > for >= at a cell's end", "if (t0 + i > view.cells.flux_end(cell)) ++cell;",
         "if (t0 + i >= view.cells.flux_end(cell)) ++cell;", VALUES),
        ("window: cells that some rows see left out",
         "if (c < high[i]) add_scaled(w[c], standing + c * width, width, to);", "", VALUES),
        ("window: delta without lse", "gradients.grad_lse ? gradients.grad_lse[at] : compute(0)", "compute(0)", VALUES),
        ("window: scale dropped in the flux", "seen ? dz[standing + which] * problem.scale : 0;",
         "seen ? dz[standing + which] : 0;", VALUES),
        ("window: carry of the adjoint a token short", "t = window.last_token(track, cell + which); t >= stretch.end;",
         "t = window.last_token(track, cell + which); t > stretch.end;", LONG),
        ("window: heads of a group share their flux",
         "(head - track.head * problem.group()) * track.sequence.length + token", "token", VALUES),
        ("window: trailing and leading exchanged", "cell == track.cells.trailing(t) ? 0 : 1;",
         "cell == track.cells.trailing(t) ? 1 : 0;", VALUES),
        ("window: first row of a packed sequence ignored",
         "return view.row(track.sequence.batch, head, track.sequence.begin + token - track.begin());",
         "return view.row(track.sequence.batch, head, token - track.begin());", LAYOUT),
        ("window: last token of a sequence skipped", "t + length < track.end() ? t + length : track.end()});",
         "t + length < track.end() ? t + length : track.end() - 1});", VALUES),
    ),
    *faults(
        "csrc/cpu",
        ("padding counted in a softmax", "for (int64_t j = n - i; j < lanes; ++j) tail[j] = 0;", "", VALUES),
        ("delta omitted", "shift = grad_lse - mean * inverse;", "shift = grad_lse;", VALUES),
        ("delta without what no vector holds", "mean += row[i] * gradients[i];", "break;", VALUES),
        ("weights of the backward do not sum to one", "inverse = 1 / total,", "inverse = 1,", SHARP),
        ("share of one does not replace", "if (share == 1) return copy_row(token, width, to);", "", NAN),
        ("stride of elements ignored", "static_cast<compute>(from[i * stride]) * factor;",
         "static_cast<compute>(from[i]) * factor;", LAYOUT),
    ),
    *faults(
        "csrc/cpu",
        ("step: leading cell takes nothing", "{trailing, trailing + 1}", "{trailing}", STEP),
        ("step: shut slots of the value not cleared", "      values.clear(m);\n", "", STEP),
        ("step: rows with a tail not stored", "store_row(scratch, dim, at(m), 1);", "", STEP),
        ("step: a token that opens not written whole", "t == cells.slot_opening(m) ? compute(1) : gates[", "gates[",
         STEP),
        ("step: all queries of a group are the first", "row(sequence.batch, h, sequence.begin), problem.query.element",
         "row(sequence.batch, head * problem.group(), sequence.begin), problem.query.element", STEP),
    ),
    *faults(
        "csrc/cpu",
        ("rotary: turned backwards", "problem.back ? -angle", "!problem.back ? -angle", ROTARY),
        ("rotary: angles in float32", "std::cos(angle)", "std::cos(static_cast<float>(angle))", ROTARY),
        ("rotary: all sequences at the first one's positions", "b * problem.position_batch + t", "t", ROTARY),
    ),
    *faults(
        "csrc",
        ("overlap: first byte of an element alone", "apart + span_b + b.size - 1", "apart + span_b", REFUSALS),
        ("overlap: strides of one length counted once", "both.back().most += next.most;", "", REFUSALS),
        ("overlap: elements of one tensor compared in one sense", "2 * rest->most", "rest->most", REFUSALS),
        ("overlap: at most one element of a dimension", "std::min(most, high / stride)",
         "std::min(int64_t(1), high / stride)", REFUSALS),
    ),
    *faults(
        "csrc",
        ("step: autograd does not see the write", "written.unsafeGetTensorImpl()->bump_version();", "(void)written;",
         STEP),
        ("backward: tangents dropped",
         "  refuse_forward_mode(grad_out, grad_lse, grad_state_key, grad_state_value, query, key, value, given.out, "
         "given.lse,\n                      given.state_key, given.state_value);\n", "", ERRORS),
        ("rotary: gradient not turned back", '.toDouble(), !back}', '.toDouble(), back}', ROTARY),
    ),
    *faults(
        "csrc",
        ("results do not lie as inputs do", "tokens_first = is_tokens_first(x);", "tokens_first = false;", OPERATORS),
        ("phase of a whole resolution accepted", "phase < resolution,", "phase <= resolution,", ERRORS),
        ("window of no tokens accepted", "window >= slots && ", "", ERRORS),
        ("falling cu_seqlens accepted", "ends[i] >= ends[i - 1],", "true,", ERRORS),
        ("cu_seqlens that end early accepted", "ends.back() == tokens,", "ends.back() <= tokens,", ERRORS),
        ("position beyond 2^62 accepted", "data[i] <= kMaxPosition,", "true,", REFUSALS),
        ("scale beyond float32 accepted", "std::abs(scale) <= largest / kLog2E,", "true,", REFUSALS),
        ("scale beyond float32 in powers of two accepted", "largest / kLog2E,", "largest,", ERRORS),
        ("gates: tables made anew", "if (Gates<compute> table = find()) return table;", "", STEP),
        ("gates: a table of another sharpness", "             e.sharpness == sharpness;", "true;", THREADS),
        ("gates: a table of another number of slots", "e.slots == cells.slots && ", "", THREADS),
        ("too many slots accepted", "slots <= kMaxSlots,", "true,", ERRORS),
        ("step into an expanded state", "!place || !overlaps_itself(place->footprint),", "true,", REFUSALS),
        ("step into a state whose parts overlap", "i + 1 < places.size()", "i + 1 < size_t(0)", REFUSALS),
        ("step of a query that its state overlaps", "i = 0; i < places.size()", "i = 0; i < size_t(0)", REFUSALS),
        ("step into a lazy clone refused", "a->copied_on_write == b->copied_on_write && ", "", REFUSALS),
        ("step into an inference tensor", "!argument.tensor.is_inference() || c10::InferenceMode::is_enabled(),",
         "true,", STEP),
        ("negative position accepted", "data[i] >= 0,", "true,", ERRORS),
        ("step: values of a state that is not dense not written back",
         "if (!call.state_value->is_same(state.state_value)) state.state_value.copy_(*call.state_value);", "", STEP),
        ("step of two tokens accepted", "call.tokens() == 1,", "call.tokens() >= 1,", ERRORS),
        ("returned position does not count the given one", "return position ? position->add(tokens()) : at::full(",
         "return at::full(", VALUES),
    ),
    *faults(
        "csrc/cpu",
        ("strides of heads and tokens exchanged", "tensor.stride(1), tensor.stride(2), tensor.stride(3)};",
         "tensor.stride(2), tensor.stride(1), tensor.stride(3)};", VALUES),
        ("given position ignored", "problem.sequences.push_back({s, 0, call.tokens(), position});",
         "problem.sequences.push_back({s, 0, call.tokens(), 0 * position});", VALUES),
        ("step: position not advanced", "position.add_(1);", "", STEP),
    ),
]  # fmt: skip

PYTHON = [
    *faults(
        "blurry_attn/geometry.py",
        ("window: heads not staggered", "_count(resolutions[:head], resolution) * resolution //", "0 * resolution //",
         WINDOWS),
        ("window: too many slots accepted", "if slots > MAX_SLOTS:", "if False:", WINDOWS),
        ("window: too long accepted", "if window // slots > MAX_RESOLUTION:", "if False:", REFUSALS),
        ("window: phase of a whole resolution accepted", "if not 0 <= phase < window // slots:",
         "if not 0 <= phase <= window // slots:", WINDOWS),
        ("geometry: echo of the lap in which slots open", "sharpness, 2 * window, window)", "sharpness, 0, window)",
         GEOMETRY),
        ("state: reconstruct a token off", "newest = (position.view(-1, 1, 1) - 1 -",
         "newest = (position.view(-1, 1, 1) -", STATE),
        ("state: oldest slot without the cell before the first", "return slots - 1 if phase > 0 else 0", "return 0",
         STATE),
        ("state: slots in flux a cell early", "torch.stack((trailing, trailing + 1), -1)",
         "torch.stack((trailing - 1, trailing), -1)", DECODING),
        ("state: phases of the slots in flux ignored", "position.clamp(min=0).unsqueeze(1) - phase",
         "position.clamp(min=0).unsqueeze(1) - 0 * phase", DECODING),
    ),
    *faults(
        "blurry_attn/window.py",
        ("window: true taken for 1", "if not isinstance(value, bool) and ", "if ", WINDOWS),
        ("window: infinite sharpness accepted", "if not 1 <= self.sharpness <= sys.float_info.max:",
         "if not 1 <= self.sharpness:", WINDOWS),
        ("window: phases of part of the heads made anew", "self.sharpness, self.phases(kv_heads)[heads]",
         "self.sharpness, None", LAYERS),
        ("window: an array of one number taken for it", ' and getattr(value, "ndim", 0) == 0', "", WINDOWS),
        ("window: one resolution taken for a pyramid", """        if isinstance(entries, int):
            raise TypeError(""", """        entries = BlurryWindow._entries(entries)
        if isinstance(entries, int):
            raise TypeError(""", WINDOWS),
        ("window: equal whatever the phases", "            and self.phase == other.phase\n", "", WINDOWS),
        ("window: value_dim ignored in its size", "(head_dim if value_dim is None else value_dim))", "head_dim)",
         WINDOWS),
    ),
    *faults(
        "blurry_attn/ops.py",
        ("ops: fewer kv heads without enable_gqa", "if query.shape[1] != key.shape[1] and not enable_gqa:", "if False:",
         ERRORS),
        ("ops: a given scale ignored", "return float(scale)", "return 1 / math.sqrt(max(head_dim, 1))", VALUES),
        ("ops: a tensor taken for a scale", "or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat))",
         'or not hasattr(scale, "__float__")', REFUSALS),
        ("ops: default scale of one over the head size", "return 1 / math.sqrt(max(head_dim, 1))",
         "return 1 / max(head_dim, 1)", VALUES),
        ("ops: state of another window taken", "state.window is not window and state.window != window", "False",
         ERRORS),
        ("ops: inputs on other devices taken", "if tensor.device != query.device:", "if False:", REFUSALS),
        ("ops: sparse inputs taken", "if tensor.layout != torch.strided:", "if False:", REFUSALS),
        ("ops: a trace takes tensors of other devices", "            _check_place(name, tensor, query)\n\n\n",
         "            pass\n\n\n", ERRORS),
        ("ops: lse and state exchanged", """    if return_lse:
        results.append(lse)
    if return_state:
        end = BlurryState._unchecked(state_key, state_value, position, window)
        results.append(end if state is None or state.flux is None else end.to(dtype=torch.bfloat16))
""", """    if return_state:
        end = BlurryState._unchecked(state_key, state_value, position, window)
        results.append(end if state is None or state.flux is None else end.to(dtype=torch.bfloat16))
    if return_lse:
        results.append(lse)
""", VALUES),
        ("ops: state of a turn no longer in bfloat16", "results.append(end if state is None or state.flux is None else",
         "results.append(end if True else", DECODING),
        ("ops: positions of a bfloat16 state advance before it is written", "position = position.clone()", "pass",
         DECODING),
        ("ops: key and value of the returned state exchanged", "BlurryState._unchecked(state_key, state_value,",
         "BlurryState._unchecked(state_value, state_key,", VALUES),
        ("ops: fake output as wide as the key", "out = _empty_beside(query, value.shape[3])",
         "out = _empty_beside(query, key.shape[3])", OPERATORS),
        ("ops: fake state of the batch in packed calls",
         "sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1", "sequences = query.shape[0]",
         OPERATORS),
        ("ops: fake lse in the inputs' dtype", "lse = query.new_empty(query.shape[:3], dtype=_state_dtype(query))",
         "lse = query.new_empty(query.shape[:3])", OPERATORS),
        ("ops: fake gradients as the query", "tensor.shape[3]) for tensor in (query, key, value))",
         "tensor.shape[3]) for tensor in (query, query, value))", OPERATORS),
    ),
    *faults(
        "blurry_attn/flops.py",
        ("flops: backward counted as the forward", "work = 5 * attend // 2 + 2 * write if backward else", "work =",
         OPERATORS),
        ("flops: one head counted for all", "for period in window:", "for period in window[:1]:", OPERATORS),
    ),
    *faults(
        "blurry_attn/reference.py",
        ("reference: opening not written whole", "row.append(1.0 if token == opens else math.nan)",
         "row.append(gate(token, slot, window, head_window, phase) if token == opens else math.nan)", REFERENCE),
        ("reference: shut slots of the given state read", "torch.where(is_open, x, torch.zeros_like(x))", "x",
         STATES),
    ),
    *faults(
        "blurry_attn/state.py",
        ("state: clone shares the value", "change(self.key, *arguments), change(self.value, *arguments)",
         "change(self.key, *arguments), self.value", STATE),
        ("state: detach keeps the key's history", "change(self.key, *arguments), change(self.value, *arguments)",
         "self.key, change(self.value, *arguments)", STATE),
        ("state: index drops the positions", "BlurryState(key, value, change(self.position, *arguments),",
         "BlurryState(key, value, self.position[: len(key)],", DECODING),
        ("state: an int from the end is the next one", "row %= self.batch_size", "row = abs(row)", DECODING),
        ("state: window of a state_dict on the default device", "dtype=torch.uint8, device=device)",
         "dtype=torch.uint8)", STATE),
        ("state: positions shared between dtypes", "copy=copy or key is not self.key", "copy=copy", STATE),
        ("state: slots that come to rest not written", "[key, value, position, flux_rows",
         "[self.key, self.value, position, flux_rows", DECODING),
        ("state: expanded bfloat16 state written", "_C.check_is_writable(written, list(read.items()))", "pass",
         REFUSALS),
        ("state: a bfloat16 state's attributes not looked at again", "was made.\n        self._check()",
         "was made.\n        pass", ERRORS),
        ("state: unlike dtypes joined", "if state.key.dtype != states[0].key.dtype:", "if False:", REFUSALS),
        ("state: unlike windows joined", "if state.window != states[0].window:", "if False:", REFUSALS),
        ("state: sparse slots accepted", "if getattr(self, name).layout != torch.strided:", "if False:", STATE),
    ),
    *faults(
        "blurry_attn/flux_rows.py",
        ("state: tensors of a trace are kept", "        or is_in_torch_dispatch_mode()\n", "", EXPORT),
        ("state: slots in flux rounded", "key[rows], value[rows] = flux", "_ = flux", DECODING),
    ),
    *faults(
        "blurry_attn/spectrum.py",
        ("state: frequency window not shifted", "return spectrum * shift.to(spectrum.dtype)", "return spectrum", STATE),
        ("state: lags beyond the history answered", "torch.minimum(windows.view(-1, 1), position.view(-1, 1, 1))",
         "windows.view(-1, 1)", STATE),
        ("state: shut slots read", "known = torch.where(is_open, slots, 0.0)", "known = slots", STATE),
    ),
    *faults(
        "blurry_attn/serialization.py",
        ("state: position and value exchanged in trees", "key, value, position, *flux = children",
         "value, key, position, *flux = children", EXPORT),
    ),
    *faults(
        "blurry_attn/ragged.py",
        ("packing: positions count from one", "is_kept.cumsum(1) - 1", "is_kept.cumsum(1)", RAGGED),
        ("packing: padding not zeroed", "tokens = tokens.masked_fill(self._padding(tokens), 0)", "pass", RAGGED),
        ("packing: padding of results not zeroed", "padded = padded.masked_fill(self._padding(padded), 0)", "pass",
         RAGGED),
        ("packing: kept tokens out of order", ".argsort(stable=True)", ".argsort(stable=True, descending=True)",
         RAGGED),
        ("packing: state of the padding kept", "return state[: self.mask.shape[0]]", "return state", RAGGED),
    ),
    *faults(
        "blurry_attn/modules.py",
        ("modules: positions begin anew after a state", "return tokens + position.unsqueeze(1)", "return tokens",
         MODULES),
        ("modules: padded positions begin anew after a state", "positions = _after(state, packing.positions)",
         "positions = packing.positions", MODULES),
        ("modules: a traced mask fixes how many tokens there are", "keep_padding=not shapes_may_depend_on(",
         "keep_padding=not bool(", RAGGED),
        ("modules: a step's position one late", "self._project(x, state.position.unsqueeze(1))",
         "self._project(x, state.position.unsqueeze(1) + 1)", MODULES),
        ("modules: key not rotated", "rotary(query, positions, self.rope_base), rotary(key, positions, self.rope_base)",
         "rotary(query, positions, self.rope_base), key", MODULES),
        ("modules: dropout below zero accepted", "if dropout_p != 0:", "if dropout_p > 0:", REFUSALS),
        ("modules: not causal accepted", """        if not is_causal:
            raise ValueError(""", """        if is_causal is None:
            raise ValueError(""", MODULES),
        ("modules: scale dropped", "self.window, scale=scale, enable_gqa=enable_gqa",
         "self.window, enable_gqa=enable_gqa", MODULES),
        ("modules: key's and value's weights exchanged", "projections = (module.q_proj, module.k_proj, module.v_proj)",
         "projections = (module.q_proj, module.v_proj, module.k_proj)", MODULES),
        ("modules: output bias not taken over", "module.out_proj.bias.copy_(mha.out_proj.bias)", "pass", MODULES),
        ("modules: infinite rope_base accepted", "if not 0 < rope_base <= sys.float_info.max:", "if not 0 < rope_base:",
         MODULES),
    ),
    *faults(
        "blurry_attn/swap.py",
        ("swap: any mask counts as causal", "return bool((mask == is_seen).all())", "return True", SWAP),
        ("swap: a learned mask counts as causal", "if mask.requires_grad or ", "if ", SWAP),
        ("swap: a CausalBias of any size counts as causal",
         "return mask.seq_len_q == mask.seq_len_kv == query_length == key_length", "return True", SWAP),
        ("swap: calls that are not causal left as they are", """        elif not is_causal:
            raise ValueError(""", """        elif is_causal is None:
            raise ValueError(""", SWAP),
        ("swap: dropout ignored", "None, dropout_p, True, scale, enable_gqa)", "None, 0.0, True, scale, enable_gqa)",
         SWAP),
        ("swap: fast path stays on", "mha.set_fastpath_enabled(False)", "pass", SWAP),
        ("swap: fast path stays off", "            if cls.users == 0:\n                mha",
         "            if False:\n                mha", SWAP),
        ("swap: FlexAttention let through", '    "flex_attention",\n', "", SWAP),
        ("swap: varlen_attn let through", '    "_varlen_attn",\n', "", SWAP),
        ("swap: overloads let through", 'for overload in ("", ".default", ".out", ".quantized")',
         'for overload in ("",)', SWAP),
    ),
    *faults(
        "blurry_attn/distributed/context.py",
        ("distributed: rank's own piece counted", "lengths[: dist.get_rank(group)]",
         "lengths[: dist.get_rank(group) + 1]", PIECES),
        ("distributed: decay of a piece ignored",
         "carried = piece[..., :-1] + _kept(piece[..., -1:], carried, endless)",
         "carried = piece[..., :-1] + carried", PIECES),
        ("distributed: what is not finite forgotten", "if first and any(echoes) and not _outweighs(",
         "if False and not _outweighs(", PIECES),
        ("distributed: an echo that underflows takes a NaN along", "(decay == 0) & ~endless", "decay == 0", PIECES),
        ("distributed: laps that are skipped leave no echo less", "[echo**count for", "[echo**0 for", PIECES),
        ("distributed: gradient skips a rank", "for later in range(len(gathered) - 1, rank, -1):",
         "for later in range(len(gathered) - 1, rank + 1, -1):", PIECES),
        ("distributed: echo cut off early", "math.ceil(2 * math.log(", "math.ceil(0.2 * math.log(", PIECES),
        ("distributed: the given state's positions ignored", "position = position + state.position", "pass", PIECES),
        ("distributed: kept reads what is gone", "torch.where((decay == 0) & ~endless, 0.0, decay * slots)",
         "decay * slots", PIECES),
    ),
    *faults(
        "blurry_attn/distributed/heads.py",
        ("distributed: every rank has the first heads' windows", "slice(rank * kv_heads, (rank + 1) * kv_heads)",
         "slice(0, kv_heads)", LAYERS),
    ),
    *faults(
        "blurry_attn/distributed/dtensor.py",
        ("sharding: every rank has the first heads' windows", "window=window.of_heads(kv_heads, own),",
         "window=window.of_heads(kv_heads, slice(0, own.stop - own.start)),", DTENSORS),
        ("sharding: a shared kv head's gradient not summed", "kv_grad=at(Partial()) if is_shared else by_head",
         "kv_grad=at(Replicate()) if is_shared else by_head", DTENSORS),
        ("sharding: heads cut along tokens accepted", "if TOKENS in dims:", "if False:", DTENSORS),
        ("sharding: autograd does not see a step", "torch.autograd.graph.increment_version(", "tuple(", DTENSORS),
        ("sharding: uneven shards accepted", "if tensor.shape[dim] % parts[dim]:", "if False:", DTENSORS),
        ("sharding: positions of sequences not cut", "if cut == SEQUENCES and positions.dim() == 2 else",
         "if False else", DTENSORS),
        ("sharding: state keeps the window of a part",
         "results = (*results[:-1], _with_window(results[-1], window))", "pass", DTENSORS),
    ),
    *faults(
        "blurry_attn/integrations/transformers.py",
        ("transformers: scale ignored", "out, _ = _attend(query, key, value, window, scaling, ",
         "out, _ = _attend(query, key, value, window, None, ", HUB),
        ("transformers: a layer's sliding window ignored", "window = BlurryWindow(sliding_window, sliding_window)",
         "pass", HUB),
        ("transformers: padding attended", "packing = Packing(segments == 0)", "packing = Packing(segments < 0)", HUB),
        ("transformers: packed rows run together", "segments = nn.functional.pad(starts.cumsum(1), (1, 0)) + 1", "pass",
         HUB),
        ("transformers: soft-capping ignored", '_REFUSED = ("softcap", ', "_REFUSED = (", HUB),
        ("transformers: keys that were lost not noticed", "if self.awaits_attention:", "if False:", HUB),
        ("transformers: beams not reordered", "        self.batch_select_indices(beam_idx)", "        pass", HUB),
        ("transformers: a name taken twice", 'is_taken and getattr(known, "args", None) != (window,)', "False", HUB),
        ("transformers: the cache counts no tokens", "self.tokens += query.shape[2]", "pass", HUB),
    ),
    *faults(
        "blurry_attn/files.py",
        ("files: written in place", "partial = path.with_name(", "partial = path or path.with_name(", FILES),
        ("files: a partial file of a name that can be foreseen", "{secrets.token_hex(8)}", "0", FILES),
        ("files: a partial file that is opened, not made", "partial.touch(exist_ok=False)", "pass", FILES),
        ("files: a claim of a lock that is gone",
         "if os.path.samestat(os.fstat(descriptor), lock.stat()):", "if True:", FILES),
        ("files: a claim of two", "LOCK_EX | fcntl.LOCK_NB", "LOCK_SH | fcntl.LOCK_NB", FILES),
        ("files: errors name the partial file",
         "error.filename is None or Path(error.filename) == instead_of", "error.filename is None", FILES),
    ),
    *faults(
        "blurry_attn/lm/checkpoint.py",
        ("checkpoint: checksum not compared", 'if header.pop("checksum") != _checksum(tensors, header):',
         'if header.pop("checksum") is None:', FILES),
        ("checkpoint: any format taken", "if written != FORMAT:", "if False:", FILES),
        ("checkpoint: moments dropped", 'for name, values in moments.get("state", {}).items():',
         "for name, values in ():", LM),
        ("checkpoint: shapes not compared", "if kinds[name] != expected[name]:", "if False:", FILES),
        ("checkpoint: numbers that are not finite taken", "if not tensor.isfinite().all():", "if False:", FILES),
        ("checkpoint: layers without entries laid out", "or model_config.layers > len(kinds):", "or False:", FILES),
        ("checkpoint: a bool taken for a number", "return type(value) in {",
         "return type(value) is bool or type(value) in {", FILES),
    ),
    *faults(
        "blurry_attn/lm/train.py",
        ("train: schedule begins anew", "for step in range(start, config.steps):",
         "for step in range(config.steps - start):", LM),
        ("train: gradients that are not finite taken",
         '(("loss", value), ("gradient\'s norm", norm_size))', '(("loss", value),)', LM),
        ("train: another text taken", "if saved.digest != text.digest:", "if False:", LM),
        ("train: later lines of the log kept", 'log = [line for line in log if line["step"] <= step]', "pass", LM),
        ("train: Ctrl-C saves nothing", 'if "validation_bits" in line or stop:', 'if "validation_bits" in line:', LM),
        ("train: another training let in",
         "claim.enter_context(claimed(folder, METRICS, checkpoint.FILE, PLOT))", "folder.mkdir(exist_ok=True)", LM),
        ("train: the slower number of threads",
         "1 if one_takes < all_take else all_threads", "all_threads if one_takes < all_take else 1", LM),
        ("train: the trial leaves its gradient", "                model.zero_grad()\n", "", LM),
        ("train: the number of threads forgotten", "replace(train_config, threads=threads or saved_threads)",
         "train_config", LM),
        ("train: a comparison takes a run of fewer steps",
         'if found == "shorter" and known.steps', "if known.steps", LM),
    ),
    *faults(
        "blurry_attn/_load.py",
        ("load: another torch accepted", "same_torch = _series(torch_version) == _series(torch.__version__)",
         "same_torch = True", PACKAGING),
        ("load: another CUDA accepted", "if same_torch and same_cuda:", "if same_torch:", PACKAGING),
    ),
]  # fmt: skip

CUDA_LONG = ("tests/operator/test_cuda.py::test_against_the_cpu_and_float64",)
CUDA_STATES = (*STATES[:2], "tests/state/test_step.py::test_every_position_of_two_windows")
CUDA_PACKED = ("tests/operator/test_cuda.py::test_packed_over_many_stretches", STATES[1])

WALK = ("tests/operator/test_cuda.py::test_window_kernels", "-k", "bfloat16 and fresh and not wide")
WALK_STATES = ("tests/operator/test_cuda.py::test_window_kernels", "-k", "bfloat16 and state and not wide")
WALK_ECHO = ("tests/operator/test_cuda.py::test_window_kernels_with_an_echo", "-k", "bfloat16 and fresh")
SIZES = ("tests/operator/test_accuracy.py::test_sizes_that_change_a_thousandfold", "-k", "bfloat16 and cuda")
WALK_NAN = ("tests/operator/test_cuda.py::test_window_kernels_contain_what_is_not_finite",)
QUERY_NAN = ("tests/operator/test_nan.py::test_nan_in_a_query_leaves_shut_slots_without_gradient", "-k", "bfloat16")
PATCHES = ("tests/operator/test_cuda.py::test_patch_kernels", "-k", "bfloat16 and fresh and not wide")
PATCHES_STATES = ("tests/operator/test_cuda.py::test_patch_kernels", "-k", "bfloat16 and state and not wide")
CUDA_POSITIONS = ("tests/operator/test_cuda.py::test_graph_with_positions_out_of_range",)
CUDA_NARROW = ("tests/operator/test_cuda.py::test_largest_sizes",)
CUDA_RANGE = ("tests/operator/test_gradients.py::test_state_beyond_float16",)
CUDA_AGREE = (
    "tests/operator/test_cuda.py::test_half_values_that_agree_give_queries_and_keys_no_gradient",
    "tests/operator/test_accuracy.py::test_values_that_agree_give_queries_and_keys_no_gradient",
)

CUDA = [
    *faults(
        "csrc/cuda/common",
        ("CUDA: openings ignored", "settled = t > cells.opening(cells.slots - 1);", "settled = t >= 0;", STEP),
        ("CUDA: phase ignored", "from_centre = t - cells.centre(0), window", "from_centre = t, window", VALUES),
        ("CUDA: last token of a lobe skipped", "end = cells.flux_end(cell) + 1;", "end = cells.flux_end(cell);",
         VALUES),
        ("CUDA: gate of one does not replace", "return gate == compute(1) ? token : gate", "return gate", NAN),
        ("CUDA: given position ignored", "position = problem.position ? bounded_position(problem.position[i]) : 0;",
         "position = 0;", VALUES),
        ("CUDA: negative positions taken", "return position < 0 ? 0 : position", "return position", CUDA_POSITIONS),
    ),
    *faults(
        "csrc/cuda/common",
        ("CUDA: backward in float16 takes any state", "problem.dtype == DType::float16 && given ?", "false ?",
         CUDA_RANGE),
        whole=True,
    ),
    *faults(
        "csrc/cuda/step",
        ("CUDA step: position not advanced", "position[i] = before + 1;", "position[i] = before;", STEP),
    ),
    *faults(
        "csrc/cuda/rotary",
        ("CUDA rotary: turned backwards", "p.back ? -angles", "!p.back ? -angles", ROTARY),
        ("CUDA rotary: angles in float32", "turn_of(position * frequency[pair + i]",
         "turn_of(static_cast<float>(position * frequency[pair + i])", ROTARY),
        ("CUDA rotary: a half turn rounded", "sizeof(compute) < sizeof(double)", "sizeof(compute) < sizeof(float)",
         ROTARY),
        ("CUDA rotary: a group's last head left out", "begin + group < p.heads ? group : p.heads - begin;",
         "begin + group < p.heads ? group - (group > 1) : p.heads - begin;", ROTARY),
        ("CUDA rotary: all sequences at the first one's positions", "batch * p.position_batch + token", "token",
         ROTARY),
    ),
    *faults(
        "csrc/cuda/step",
        ("CUDA step: shut slots read", "gate == compute(kShut) ? compute(0) : written(", "written(", CUDA_STATES),
        ("CUDA step: shut slots attended", "open >> r & 1 ? shape.scale * logits[r] : kNone;",
         "shape.scale * logits[r];", CUDA_STATES),
        ("CUDA step: scale dropped", "scale(static_cast<compute>(p.scale * kLog2E))",
         "scale(static_cast<compute>(kLog2E))", STEP),
        ("CUDA step: a team's slots left out", "for (int t = 0; t < kStepTeams; ++t) {\n        const compute share",
         "for (int t = 1; t < kStepTeams; ++t) {\n        const compute share", STEP),
    ),
    *faults(
        "csrc/cuda/scan",
        ("CUDA scan: shut slots of the given state read", "if (!slots || !law.is_open(slot, token))", "if (!slots)",
         CUDA_STATES),
        ("CUDA scan: carry between stretches dropped", "next = decay == compute(0) ? carry : carry + decay * next;",
         "next = carry;", CUDA_LONG),
        ("CUDA scan: > for >= at the opening", "*to = token >= opening ?", "*to = token > opening ?",
         VALUES),
        ("CUDA scan: rows of narrow heads not staged", "std::max(kWarp / shape.across, 4 / per_thread_other)",
         "kWarp / shape.across", CUDA_NARROW),
        ("CUDA scan: probabilities by another's lse", "      z[k] /= total;\n      sum", "      sum",
         CUDA_AGREE),
        ("CUDA scan: delta without lse", "warp_sum(sum) - (grad_lse ? grad_lse[row] : compute(0));", "warp_sum(sum);",
         VALUES),
        ("CUDA scan: delta omitted", "z[k] * (dz[k] - delta) :", "z[k] * dz[k] :", VALUES),
        ("CUDA scan: scale dropped in backward", "? scale * z[k] * (dz[k]", "? z[k] * (dz[k]", VALUES),
        ("CUDA scan: top missing in lse", "lse[row] = top + log(total);", "lse[row] = log(total);", VALUES),
        ("CUDA scan: heads of a group exchanged", "block.head * group + i % group;",
         "block.head * group + (i + 1) % group;", VALUES),
        ("CUDA scan: a period a token short", "from = to - period > sequence.position ? to - period :",
         "from = to - period > sequence.position ? to - period + 1 :", CUDA_LONG),
        ("CUDA scan: token before a stretch skipped", "? from + plan.length : sequence.end();",
         "? from + plan.length - 1 : sequence.end();", CUDA_LONG),
        ("CUDA scan: stale adjoint", "content[4 * j + e][i] -= gate.x[e] * content[4 * j + e][i];", "", CUDA_LONG),
        ("CUDA scan: first row of a packed sequence ignored", "return sequence.row + time - sequence.position;",
         "return time - sequence.position;", CUDA_PACKED),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: opening token not written whole", "gates[i] = lies ? cells.gate(table, c, t) : 0.f;",
         "gates[i] = lies ? table[t - cells.flux_begin(c)] : 0.f;", WALK),
        ("CUDA window: shut slots seen", "shut(cells, cell + i / kPatch, token + own) ? kShut : log;", "log;", WALK),
        ("CUDA window: weight of a token before its time", "half > tile || 2 * q < g ? y : 0.f", "y", WALK),
        ("CUDA window: gate of 1 leaves something", "kNothing = -160.f", "kNothing = -4.f", WALK),
        ("CUDA window: shut slots of many cells seen",
         "if (j < kFlux && shut(cells, cell + j, token + row)) decay[tile][e] = -1.f;", "", WALK),
        ("CUDA window: shares after a gate of 1 no larger", "scale = ldexpf(scale, steps);", "", WALK),
        ("CUDA window: tokens before the state taken", "c >= cells.first() && t >= begin &&", "c >= cells.first() &&",
         WALK_STATES),
        ("CUDA window: later tokens of the patch seen", "past(half, e) ? raw[half][e] : 0.f", "raw[half][e]", WALK),
        ("CUDA window: later tokens of the patch get a gradient", "past(half, e) ? of_tokens[half][e] : 0.f",
         "of_tokens[half][e]", WALK),
        ("CUDA window: what went before omitted in a gradient", "++e) sums[tile][e] *= fmaxf(decay[tile][e], 0.f);",
         "++e) sums[tile][e] *= decay[tile][e] > 0.f;", WALK),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: slot of the given state a cell off", "const int64_t c = cell + given_cell - slots - 1 - back;",
         "const int64_t c = cell + given - slots - 2 - back;", WALK_STATES),
        ("CUDA window: phase ignored", "first_time = patch_begin(cells, from);",
         "first_time = floor_div(from, kPatch) * kPatch;", WALK),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: no warm-up", "plan.warm_up = laps * c.longest_window", "plan.warm_up = 0 * c.longest_window",
         WALK),
        ("CUDA window: stretches overlap", "static_cast<int>(t - first_time > least ? t - first_time : least);",
         "static_cast<int>(t - first_time > least ? t - first_time - 1 : least);", WALK),
        ("CUDA window: gates below one taken for one", "return law.selects && law.cells.resolution <= 2;",
         "return law.cells.resolution <= 2;", WALK_ECHO),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: newest token not seen where the next cell has begun", "Holds::first ? raw[1][e] : before;",
         "Holds::first ? raw[1][e] : raw[0][e];", WALK),
        ("CUDA window: newest token not seen where it is no cell", "Holds::first ? raw[1][e] : before;",
         "Holds::first ? raw[0][e] : before;", WALK),
        ("CUDA window: gradient of the newest token given to the next cell", "if (e % 2 == 0) of_before = __shfl",
         "if (false) of_before = __shfl", WALK),
        ("CUDA window: cells before the first of all seen", "column < ended_columns && column < missing;",
         "column < ended && column < 0;", WALK),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: gradient of a cell in flux at the end dropped", "(left > 1 &&", "(left > 0 &&", WALK_STATES),
        ("CUDA window: gradient of the next cell begun at the end dropped", "i == 0 ? trailing : cell;",
         "i == 0 ? trailing + 1 : cell;", WALK_STATES),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: what a cell held dropped", "const float decay = decays[w * kFlux + j];",
         "const float decay = 0.f;", WALK),
        ("CUDA window: stale carry between tiles", "if (lobe < 0 && time > 0) from = carried + odd * carried_tile;",
         "", WALK),
        ("CUDA window: what is not finite not noticed", "if (!finite<storage>(words)) report();", "", WALK_NAN),
        ("CUDA window: given state that is not finite not noticed",
         "if (!isfinite(to_compute<float>(content))) report();", "", WALK_NAN),
        ("CUDA window: cells kept by the wrong stretch", "if (keeps && last < kTile && owns(time + last)) {",
         "if (keeps && last < kTile && !owns(time + last)) {", WALK),
        ("CUDA window: wrong sequence in a batch", "row_of<const storage>(view, walk.batch, head,",
         "row_of<const storage>(view, 0, head,", WALK),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: state without an echo", "p.laws[head].echo == 0 && lap", "lap", WALK),
        ("CUDA window: given state not kept", "if (outputs.kept && p.state_key)",
         "if (outputs.kept && !p.state_key)", WALK_STATES),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: > for >= where a cell goes on", "config::kSelecting ? 0 : offset >= 2 ? 2 : 1;",
         "config::kSelecting ? 0 : offset > 2 ? 2 : 1;", WALK),
        ("CUDA window: missing mask",
         "attend.irregular = irregular;\n    attend.masked = irregular ?",
         "attend.irregular = irregular;\n    attend.masked = false ?", WALK),
        ("CUDA window: walks that differ at a seam kept", "within_rounding<storage>(difference, size);", "true;",
         SIZES),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: ended cells' slots not seen",
         "if (column < ended_columns) at = wrap(at + slots, ring_rows);", "", WALK_STATES),
    ),
    *faults(
        "csrc/cuda/fejer",
        ("CUDA window: last queries of a stretch without a gradient", "if (t < own_end) {",
         "if (t + kPatch < own_end) {", WALK),
        ("CUDA window: delta omitted", "score[tile][e] * (grad[tile][e] - delta[half]);",
         "score[tile][e] * grad[tile][e];", WALK),
        ("CUDA window: scale dropped in backward", "grad[tile][e] = static_cast<float>(p.scale) * score",
         "grad[tile][e] = score", WALK),
        ("CUDA window: cells of the next tile read too late", "load_cells(oldest(tile - 2), oldest(tile - 1), thread",
         "load_cells(oldest(tile - 2) + 1, oldest(tile - 1), thread", WALK),
        ("CUDA window: weights of other cells not cleared", "+ lane; n < 4 * clear; n +=",
         "+ lane; n < 0 * clear; n +=", WALK),
        ("CUDA window: gradient of the cell before dropped", "grads[before[j]] = held[j] + at_begin[j];", "", WALK),
        ("CUDA window: gradient of finished cells not cleared",
         "              now = 0.f;\n", "", WALK),
        ("CUDA window: gradient of a cell that goes on dropped",
         "at_begin[j] + grads_started[at_lane(2 * w + j)];", "at_begin[j];", WALK),
        ("CUDA window: gradient of the state ignored", "if (walk.to_end && grad_state && has_element) {",
         "if (walk.to_end && grad_state && !has_element) {", WALK),
        ("CUDA window: gradients that differ at a seam kept",
         "differ || !within_rounding<storage>(difference, warp_sum(size));", "differ;", SIZES),
        ("CUDA window: shut slots get a gradient", "open ? all_grads[at_lane(cell % grad_rows)] : 0.f;",
         "all_grads[at_lane(cell % grad_rows)] + !open;", WALK_STATES),
    ),
    *faults(
        "csrc/cuda/dirichlet",
        ("CUDA patches: low parts of the end weights dropped",
         "row[kLow + i / 2] = pack<storage>(first - rounded.x, second - rounded.y);", "row[kLow + i / 2] = 0;",
         PATCHES),
        ("CUDA patches: opening token not written whole", "return t == opening ? 1.f : gates[", "return gates[",
         PATCHES),
        ("CUDA patches: tokens before the state taken", "if (t < walk.begin || t >= walk.end || t < opening)",
         "if (t >= walk.end || t < opening)", PATCHES_STATES),
        ("CUDA patches: table used while slots open", "time + kPatch <= walk.end && time > walk.settled",
         "time + kPatch <= walk.end", PATCHES),
        ("CUDA patches: walk begins a patch late", "? own.begin : own.begin - period;",
         "? own.begin : own.begin - period + 16;", PATCHES),
        ("CUDA patches: phase ignored", "first_time = patch_begin(cells, from);",
         "first_time = floor_div(from, kPatch) * kPatch;", PATCHES),
        ("CUDA patches: later tokens seen", "if (b < 2 || reached) y += gates[c].x[e]", "y += gates[c].x[e]", PATCHES),
        ("CUDA patches: what a slot held dropped", "for (int e = 0; e < 4; ++e) x[e] *= left[e / 2];",
         "for (int e = 0; e < 4; ++e) x[e] = 0.f;", PATCHES),
        ("CUDA patches: rows of another resolution", "first[h] = static_cast<int32_t>(rows);", "first[h] = 0;",
         PATCHES),
    ),
    *faults(
        "csrc/cuda/dirichlet",
        ("CUDA patches: shut slots seen", "x = open ? x * walk.factor : -INFINITY;", "x = x * walk.factor + !open;",
         PATCHES),
        ("CUDA patches: what is not finite not noticed", "sound = sound && check == 0.f;", "", WALK_NAN),
        ("CUDA patches: state of too few tokens", "int64_t from = sequence.end() - period;",
         "int64_t from = sequence.end() - period + 1;", PATCHES),
    ),
    *faults(
        "csrc/cuda/dirichlet",
        ("CUDA patches: delta without lse", "&& owned) delta -= lses[kPatch + g + 8 * half];", "&& owned) delta += 0;",
         PATCHES),
        ("CUDA patches: scale dropped in backward", "walk.scale * probability * (grad - delta)",
         "probability * (grad - delta)", PATCHES),
        ("CUDA patches: stale gradient of slots", "grads[n][j / 2][2 + j % 2] *= decay;", "", PATCHES),
        ("CUDA patches: gradient of the state ignored", "if (walk.to_end && grad_state) {",
         "if (walk.to_end && grad_state && slots == 0) {", PATCHES),
        ("CUDA patches: shut slots get a gradient", "walk.given_before(slot) ? grad : 0.f;", "grad;", QUERY_NAN),
        ("CUDA patches: gradient of open slots dropped", "walk.given_before(slot) ? grad : 0.f;",
         "walk.given_before(slot) ? 0.f : grad;", PATCHES_STATES),
    ),
]  # fmt: skip
