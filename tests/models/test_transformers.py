"""A transformers model runs blurred by name, generates from a constant cache, trains, and refuses a growing one."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from world import World

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from blurry_attn import BlurryWindow, reference  # noqa: E402
from blurry_attn.integrations.transformers import BlurryCache, convert, register  # noqa: E402

NAME = "blurry_tests"  # the default is taken by the examples of the documentation
WINDOW = BlurryWindow(4, 16)
register(WINDOW, NAME)
VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "rotary_pct": 0.5}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 16}),
    "gemma3": (  # a scale of its own, and one sliding layer
        "Gemma3",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def build(family="llama", implementation=NAME, device="cpu", dtype=torch.float64, **changes):
    prefix, options = FAMILIES[family]
    is_text_part = family == "gemma3"
    config = getattr(transformers, f"{prefix}TextConfig" if is_text_part else f"{prefix}Config")
    torch.manual_seed(0)
    options = {**options, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    model = getattr(transformers, f"{prefix}ForCausalLM")(
        config(**options, initializer_range=0.3, attn_implementation=implementation)
    )
    return model.to(device, dtype).eval()


def tokens(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator).to(device)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **{"use_cache": False, **kwargs}).logits


def by_the_reference(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    window = WINDOW if sliding_window is None else BlurryWindow(sliding_window, sliding_window)
    out = reference.blurry_window_attention(query, key, value, window, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_reference(family, device):
    AttentionInterface.register("reference", by_the_reference)
    AttentionMaskInterface.register("reference", sdpa_mask)
    ids = tokens(2, 40, device=device)
    expected = logits(build(family, "reference", device=device), ids)
    torch.testing.assert_close(logits(build(family, device=device), ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_per_slot_over_all_tokens_is_the_model_itself(family, device):
    ids = tokens(2, 20, device=device)
    expected = logits(build(family, "sdpa", device=device), ids)
    model = convert(build(family, "sdpa", device=device), BlurryWindow(20, 20), "all tokens")
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-9)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "prompt in chunks": {"do_sample": False, "prefill_chunk_size": 7},
}


def generate(model, ids, cache, **kwargs):
    torch.manual_seed(1)
    if cache is None:
        kwargs |= {"use_cache": False, "prefill_chunk_size": None}
    else:
        kwargs["past_key_values"] = cache
    return model.generate(ids, max_new_tokens=30, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_recomputing(family, mode, device):
    model, ids = build(family, device=device), tokens(2, 19, device=device)
    assert torch.equal(generate(model, ids, BlurryCache(), **MODES[mode]), generate(model, ids, None, **MODES[mode]))


@pytest.mark.parametrize("family", FAMILIES)
def test_single_tokens_equal_one_piece(family, device):
    model, ids, cache = build(family, device=device), tokens(2, 40, device=device), BlurryCache()
    pieces = [logits(model, x, past_key_values=cache, use_cache=True) for x in ids.split([1] * 9 + [13] + [1] * 18, 1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_left_padded_prompts_equals_each_alone(family, mode, device):
    model, ids = build(family, device=device, eos_token_id=None), tokens(3, 19, device=device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 12)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    out = generate(model, ids, BlurryCache(), attention_mask=mask, **MODES[mode])
    for row, padding in enumerate((0, 5, 12)):
        alone = generate(model, ids[row : row + 1, padding:], BlurryCache(), **MODES[mode])
        assert torch.equal(out[row, padding:], alone[0])


def test_the_second_turn_of_a_chat(device):
    model, cache = build(device=device, eos_token_id=None), BlurryCache()
    first = generate(model, tokens(2, 11, device=device), cache, do_sample=False)
    second = torch.cat((first, tokens(2, 9, seed=1, device=device)), dim=1)
    options = {"do_sample": False, "attention_mask": torch.ones_like(second)}
    assert torch.equal(generate(model, second, cache, **options), generate(model, second, None, **options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pieces_with_padding_equal_one_piece(side, device):
    """Padding of each turn on its own side; a piece may be padding alone."""
    model, cache = build(device=device), BlurryCache()
    pieces = [tokens(3, length, seed=length, device=device) for length in (13, 1, 6, 1, 30)]
    lengths = [(13, 4, 0), (1, 1, 0), (2, 0, 6), (1, 1, 1), (30, 17, 29)]
    masks, outs = [], []
    for piece, kept in zip(pieces, lengths, strict=True):
        index = torch.arange(piece.shape[1], device=device)
        kept = torch.tensor(kept, device=device).unsqueeze(1)
        masks.append(index < kept if side == "right" else index >= piece.shape[1] - kept)
        mask = torch.cat(masks, dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        outs.append(
            logits(model, piece, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        )
    mask, ids, out = torch.cat(masks, dim=1), torch.cat(pieces, dim=1), torch.cat(outs, dim=1)
    for row in range(3):
        alone = logits(model, ids[row][mask[row]].unsqueeze(0))
        torch.testing.assert_close(out[row][mask[row]], alone[0], rtol=0, atol=1e-9)
    assert cache.states[0].position.tolist() == mask.sum(1).tolist()


def test_a_cache_in_bfloat16(device):
    """Half the bytes, and the logits of a turn and of steps after it differ by a rounding of the slots."""
    model, ids = build(device=device).float(), tokens(2, 70, device=device)
    caches = BlurryCache(), BlurryCache(torch.bfloat16)
    for piece in (ids[:, :50], *ids[:, 50:].split(1, 1)):
        exact, ours = (logits(model, piece, past_key_values=cache, use_cache=True) for cache in caches)
        torch.testing.assert_close(ours, exact, rtol=2**-7, atol=2**-7 * exact.abs().max().item())
    for whole, half in zip(*(cache.states for cache in caches), strict=True):
        assert half.key.dtype == torch.bfloat16
        assert half.nbytes == whole.nbytes // 2 + 2 * whole.nbytes // half.slots
        assert torch.equal(half.position, whole.position)


def test_the_cache_does_not_grow(device):
    model, cache = build(device=device), BlurryCache()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    sizes = set()
    for _ in range(3):
        logits(model, tokens(2, 50, device=device), past_key_values=cache, use_cache=True)
        sizes.add(cache.nbytes)
    assert sizes == {2 * 2 * WINDOW.state_elements(kv_heads=2, head_dim=8) * 8}  # layers, sequences, bytes
    assert cache.get_seq_length() == 150
    cache.reset()
    assert (cache.get_seq_length(), cache.states) == (0, (None, None))


def test_a_copied_cache_is_another_and_rows_can_be_chosen(device):
    model, cache = build(device=device), BlurryCache()
    start, end = tokens(2, 21, device=device), tokens(4, 5, seed=1, device=device)
    logits(model, start, past_key_values=cache, use_cache=True)
    branch = copy.deepcopy(cache)
    branch.batch_repeat_interleave(2)
    branch.batch_select_indices(torch.tensor([3, 0, 1], device=device))
    rows = [1, 0, 0]
    expected = logits(model, torch.cat((start[rows], end[:3]), dim=1))[:, 21:]
    actual = logits(model, end[:3], past_key_values=branch, use_cache=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    expected = logits(model, torch.cat((start, end[:2]), dim=1))[:, 21:]
    actual = logits(model, end[:2], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_that_keeps_keys_is_refused(family, options):
    with pytest.raises(ValueError, match="BlurryCache"):
        build(family, eos_token_id=None).generate(tokens(1, 12), max_new_tokens=3, **options)


def test_another_attention_with_this_cache_is_refused():
    model, cache = build(implementation="sdpa"), BlurryCache()
    logits(model, tokens(1, 5), past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="did not reach blurry window attention"):
        logits(model, tokens(1, 5), past_key_values=cache, use_cache=True)


def test_keys_shared_between_layers_are_refused():
    attend, cache = AttentionInterface()[NAME], BlurryCache()
    x = torch.zeros(1, 2, 5, 8)
    key, value = cache.update(x.clone(), x, 0)
    attend(torch.nn.Identity(), x, key, value, None)
    with pytest.raises(NotImplementedError, match="share the keys"):
        attend(torch.nn.Identity(), x, key, value, None)


def test_a_cache_keeps_its_window():
    model, cache = build(), BlurryCache()
    logits(model, tokens(1, 5), past_key_values=cache, use_cache=True)
    convert(model, BlurryWindow(4, 8), "shorter")
    with pytest.raises(ValueError, match="filled in another window"):
        logits(model, tokens(1, 1), past_key_values=cache, use_cache=True)


def test_going_back_is_refused():
    model, ids, cache = build(), tokens(1, 12), BlurryCache()
    reason = "no token can be taken out again"
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": build()}):
        with pytest.raises(NotImplementedError, match=reason):
            model.generate(ids, past_key_values=BlurryCache(), max_new_tokens=5, **options)
    logits(model, ids, past_key_values=cache, use_cache=True)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match=reason):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match=reason):
        cache.layers[0].crop(-1)


def test_sequences_packed_in_a_row_equal_each_alone(device):
    model, lengths = build(device=device), (9, 1, 20)
    ids = tokens(1, sum(lengths), device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)
    ends = torch.tensor((0, *lengths), device=device).cumsum(0)
    expected = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    for options in ({"position_ids": positions}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}):
        # Without position_ids the rotary angles, which transformers takes in float32, are those of later positions.
        torch.testing.assert_close(logits(model, ids, **options), expected, rtol=0, atol=1e-5)


def refused(model, error, match, **kwargs):
    with pytest.raises(error, match=match):
        model(tokens(2, 8), **{"use_cache": False, **kwargs})


def test_what_cannot_be_honoured_is_refused():
    model, unsupported = build(), NotImplementedError
    refused(model, unsupported, "attention_mask", attention_mask=torch.ones(2, 1, 8, 8))
    refused(
        model, ValueError, "attention_mask must cover", attention_mask=torch.ones(2, 3), past_key_values=BlurryCache()
    )
    refused(model, unsupported, "output_attentions", output_attentions=True)
    for mask in (None, torch.ones(2, 8)):
        refused(model, ValueError, "is causal", is_causal=False, attention_mask=mask)
    refused(build(attention_dropout=0.1).train(), unsupported, "dropout")
    refused(convert(build(), BlurryWindow.pyramid(4, (1, 2, 4)), "three heads"), ValueError, r"kv head \(2\)")
    with pytest.raises(TypeError, match="window must be a BlurryWindow"):
        register(16)
    with pytest.raises(TypeError, match="name must be a str, got None"):
        convert(model, WINDOW, None)
    assert model.config._attn_implementation == NAME
    with pytest.raises(TypeError, match="model must be a PreTrainedModel of transformers, got Linear"):
        convert(torch.nn.Linear(2, 2), WINDOW, NAME)
    for dtype in (torch.float16, "bfloat16", model.config):
        with pytest.raises(TypeError, match="dtype must be torch"):
            BlurryCache(dtype)
    for name in (NAME, "sdpa", "eager"):
        with pytest.raises(ValueError, match=f"name '{name}' is taken"):
            register(BlurryWindow(4, 8), name)

    config = transformers.Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=50.0, attn_implementation=NAME)
    refused(transformers.Gemma2ForCausalLM(config), unsupported, "softcap")
    config = transformers.Llama4TextConfig(
        **GROUPED, head_dim=8, attention_chunk_size=4, num_local_experts=1, attn_implementation=NAME
    )
    refused(transformers.Llama4ForCausalLM(config), unsupported, "pattern of the model")
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(unsupported, match="BloomForCausalLM"):
        convert(transformers.BloomForCausalLM(config), WINDOW, NAME)


def test_compiled():
    model, ids = build(), tokens(2, 24)
    compiled, cache = torch.compile(model, backend="aot_eager"), BlurryCache()
    pieces = [logits(compiled, ids[:, :17], past_key_values=cache, use_cache=True)]
    pieces += [logits(compiled, token, past_key_values=cache, use_cache=True) for token in ids[:, 17:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(model, ids), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=0, atol=1e-9)


def test_saved_and_loaded(tmp_path):
    model, ids = build(dtype=torch.float32), tokens(1, 30)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_converted_model_trains(checkpointing, tmp_path):
    """Right-padded sequences of one repeated pattern: the loss falls, and every weight gets a finite gradient."""
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    pattern = tokens(10)
    rows = [pattern.roll(shift).repeat(4)[: 20 + shift] for shift in range(10)]
    examples = []
    for row in rows:
        padding = 30 - len(row)
        pad = partial(torch.nn.functional.pad, pad=(0, padding))
        examples.append(
            {"input_ids": pad(row), "labels": pad(row, value=-100), "attention_mask": pad(torch.ones_like(row))}
        )
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=5,
        learning_rate=5e-3,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = convert(build(implementation="sdpa", dtype=torch.float32), WINDOW, NAME)
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    model(examples[0]["input_ids"][None], labels=examples[0]["labels"][None]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_equal_the_reference():
    AttentionInterface.register("reference", by_the_reference)
    AttentionMaskInterface.register("reference", sdpa_mask)
    ids, gradients = tokens(2, 25), []
    for implementation in (NAME, "reference"):
        model = build(implementation=implementation)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


# Tensor parallel by the models' own plans


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    world = World(2, tmp_path_factory.mktemp("world") / "store")
    yield world
    world.close()


def answers(folder, ids, **options):
    """Logits, the gradients of all weights, and what is generated."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=NAME, dtype=torch.float64, **options
    ).eval()
    out = model(ids, use_cache=False).logits
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
    text = generate(model, ids, BlurryCache(), do_sample=False)
    return {"logits": out.detach(), "text": text, **grads}


def answers_of_a_rank(folder, ids):
    return answers(folder, ids, distributed_config=transformers.distributed.DistributedConfig(tp_size=2))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_tensor_parallel_heads_keep_their_phases(family, world, tmp_path):
    """The kv heads of a rank are staggered as among those of all ranks."""
    build(family, eos_token_id=None).save_pretrained(tmp_path)
    ids = tokens(2, 30)
    expected = answers(tmp_path, ids)
    for found in world(answers_of_a_rank, tmp_path, ids):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def refusal_of_a_rank():
    module, x = torch.nn.Linear(4, 4), torch.zeros(1, 2, 5, 8)
    module.config = transformers.LlamaConfig(hidden_size=48, num_attention_heads=6)
    assert AttentionInterface()[NAME](module, x, x, x, None)[0].shape == (1, 5, 2, 8)  # a layer with heads of its own
    parallelize_module(module, dist.device_mesh.init_device_mesh("cpu", (2,)), ColwiseParallel())
    with pytest.raises(NotImplementedError, match="the 6 kv heads of Linear must divide evenly over the ranks"):
        AttentionInterface()[NAME](module, x, x, x, None)


def test_tensor_parallel_heads_that_are_not_told_apart_are_refused(world):
    world(refusal_of_a_rank)
