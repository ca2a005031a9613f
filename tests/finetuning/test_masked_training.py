"""What a mask does to one training step: gradients, packing, padding, counting, the callback."""

from __future__ import annotations

import pytest
import torch
from planted import batch, plant

import melens
from melens.batches import Batch
from melens.errors import InterventionError, ModelError
from melens.finetuning import EmergenceCallback, Training
from melens.finetuning.callback import row_of
from melens.finetuning.data import IGNORED
from melens.finetuning.keeping import read_rows
from melens.finetuning.run import checkpointing, masked
from melens.models.view import view_of
from melens.results.edit import Edit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
MASK = Training(mask=Edit(name="wemask", rate=0.5))


@pytest.fixture
def planted():
    return plant("llama", "single", 3)


@pytest.fixture
def located(planted):
    made = plant("llama", "single", 3)
    return melens.locate(melens.load(made.model), [Batch.of(batch(made, n=2, length=24))])


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_gradients_are_those_of_the_masked_function():
    """float64, in a family that has no float32 inside: finite differences of the masked loss.

    Nothing flows through the masked coordinates of the massive token.
    """
    made = plant("gpt2", "single", 1)
    located = melens.locate(
        melens.load(plant("gpt2", "single", 1).model), [Batch.of(batch(made, n=2, length=24))]
    )
    model, ids, at = made.model.double(), batch(made, n=1, length=10), located.me_layer + 1
    norm, seen = model.transformer.h[at].ln_1, {}

    def loss():
        logits = model(ids, use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:])

    def keep(module, args, out):
        out.retain_grad()
        seen["out"] = out

    handle = norm.register_forward_hook(keep)
    with masked(model, MASK, located) as record:
        loss().backward()
    handle.remove()
    at_bos = seen["out"].grad[0, 0]
    assert not at_bos[list(record.dims[at])].any()
    assert at_bos.any()
    up = model.transformer.h[at].attn.c_attn.weight
    with masked(model, MASK, located), torch.no_grad():
        for place in torch.cartesian_prod(torch.tensor([0, 9, 30]), torch.tensor([2, 70, 150])):
            row, column = place.tolist()
            found = []
            for step in (1e-5, -2e-5):
                up[row, column] += step
                found.append(loss().item())
            up[row, column] += 1e-5
            slope = (found[0] - found[1]) / 2e-5
            assert up.grad[row, column].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_packing_change_nothing(planted, located, side):
    """Two texts, each with its own first token: apart, padded, or packed into one row."""
    model = planted.model
    texts = [batch(planted, n=1, length=n, seed=n)[0] for n in (9, 6)]
    with masked(model, MASK, located):
        apart = [loss_and_gradients(model, input_ids=t[None], labels=t[None]) for t in texts]
        count = [len(text) - 1 for text in texts]
        rows = [(text, text.masked_fill(text == text[0], IGNORED)) for text in texts]
        rows[1] = tuple(
            torch.cat([torch.full((3,), pad), x] if side == "left" else [x, torch.full((3,), pad)])
            for x, pad in zip(rows[1], (0, IGNORED), strict=True)
        )
        ids, labels = (torch.stack(list(part)) for part in zip(*rows, strict=True))
        real = torch.ones_like(ids)
        real[1, :3] = 0 if side == "left" else 1
        real[1, 6:] = 1 if side == "left" else 0
        padded = loss_and_gradients(model, input_ids=ids, labels=labels, attention_mask=real)
        packed_labels = torch.cat(texts)[None].clone()
        packed_labels[0, len(texts[0])] = IGNORED
        packed = loss_and_gradients(
            model,
            input_ids=torch.cat(texts)[None],
            labels=packed_labels,
            position_ids=torch.cat([torch.arange(len(text)) for text in texts])[None],
        )
    mean = sum(n * loss for n, (loss, _) in zip(count, apart, strict=True)) / sum(count)
    slopes = {
        name: sum(n * s[name] for n, (_, s) in zip(count, apart, strict=True)) / sum(count)
        for name in apart[0][1]
    }
    for loss, found in (padded, packed):
        assert loss == pytest.approx(mean, abs=1e-5)
        assert furthest(found, slopes) < 1e-4


def test_recomputed_blocks_see_the_same_edit_and_count_once(planted, located):
    model = planted.model.train()
    ids = batch(planted, n=2, length=10)
    with masked(model, MASK, located) as once:
        plain = loss_and_gradients(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable(checkpointing(model))
    with masked(model, MASK, located) as twice:
        first = model(input_ids=ids, labels=ids).loss
        model(input_ids=ids[:, :5])  # another pass, before the first is computed again
        model.zero_grad()
        first.backward()
    again = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert first.item() == pytest.approx(plain[0], abs=1e-6)
    assert furthest(again, plain[1]) < 1e-5
    assert once.edited.tokens == 2
    assert twice.edited.tokens == 4  # two passes of two rows
    assert twice.energy == pytest.approx(once.energy)


def test_bf16_autocast_sees_the_mask(planted, located):
    ids = batch(planted, n=1, length=10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = planted.model(ids).logits
        with masked(planted.model, MASK, located) as record:
            edited = planted.model(ids).logits
    assert record.edited.tokens == 1
    assert not torch.equal(before, edited)


def test_a_look_is_what_locate_and_sinks_say(planted, words):
    """Through a view of its own; the model and its random numbers are left as they were."""
    ids = batch(planted, n=2, length=70)
    texts = [list(row) for row in ids.tolist()]
    callback = EmergenceCallback(words, texts)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    before = {n: p.clone() for n, p in planted.model.named_parameters()}
    row = callback.look(planted.model, 7)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(p, before[n]) for n, p in planted.model.named_parameters())
    assert type(planted.model.model.layers[0]).__name__ == "LlamaDecoderLayer"

    bridge = melens.load(planted.model, tokenizer=words)
    located = melens.locate(bridge, texts)
    sinks = melens.sinks(bridge, located, texts)
    ranks = melens.collapse(bridge, located, texts)
    assert row == row_of(located, sinks, ranks, step=7, seconds=row.seconds)


def test_looks_see_adapters_of_layers_that_a_bridge_splits(words):
    """GPT-2 has queries, keys and values in one layer; merged by PEFT itself, the model is that."""
    from peft import LoraConfig, get_peft_model

    made = plant("gpt2", "single", 1)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(made.model, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    texts = [[1, *range(20, 90)]]
    seen = EmergenceCallback(words, texts).look(model, 0)
    merged = EmergenceCallback(words, texts).look(model.merge_and_unload(), 0)
    assert seen.by_layer == pytest.approx(merged.by_layer, rel=1e-4)
    assert seen.sink_rate == merged.sink_rate


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_later_look_sees_what_adapters_have_learned_since(family, words):
    """And what other weights have; a callback that is given another model looks at that one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    inner = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    kept = "ln_1" if family == "gpt2" else "input_layernorm"
    config = LoraConfig(r=2, target_modules=inner, modules_to_save=[kept], task_type="CAUSAL_LM")
    model = get_peft_model(plant(family, "single", 1).model, config)
    texts = [[1, *range(20, 90)]]
    callback = EmergenceCallback(words, texts)

    def same(one, other):
        assert one.by_layer == pytest.approx(other.by_layer, rel=1e-6)
        assert one.largest == pytest.approx(other.largest, rel=1e-6)

    first = callback.look(model, 0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value), alpha=0.2)
    seen = callback.look(model, 1)
    assert seen.by_layer != pytest.approx(first.by_layer, rel=1e-3)
    same(seen, EmergenceCallback(words, texts).look(model, 1))
    same(callback.look(plant(family, "single", 1).model, 2), first)


def stacked(model, lora):
    from peft import LoHaConfig, get_peft_model

    inner = get_peft_model(model, lora)
    loha = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    return get_peft_model(inner.get_base_model(), loha)


def in_half(model, lora):
    from peft import get_peft_model

    return get_peft_model(model.to(torch.bfloat16), lora)


def with_magnitudes(model, lora):
    from peft import get_peft_model

    lora.use_dora = True
    return get_peft_model(model, lora)


def switched(model, lora):
    from peft import get_peft_model

    made = get_peft_model(model, lora)
    made.add_adapter("other", lora)
    return made


@pytest.mark.parametrize("make", [stacked, in_half, with_magnitudes, switched])
def test_looks_at_adapters_are_of_the_moment_and_change_no_weight(make, words):
    """What PEFT itself computes, whichever adapters are in force; own weights stay bit for bit."""
    from peft import LoraConfig

    torch.manual_seed(0)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=None if make is stacked else ["input_layernorm"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model, texts = make(plant("llama", "single", 1).model, lora), [[1, *range(20, 90)]]
    callback = EmergenceCallback(words, texts)
    callback.look(model, 0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value), alpha=0.2)
    if make is switched:
        model.set_adapter("other")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = callback.look(model, 1)
    assert seen.by_layer == EmergenceCallback(words, texts).look(model, 1).by_layer
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        plain = model(torch.tensor(texts), output_hidden_states=True).hidden_states
    largest = max(float(x.abs().max()) for x in plain[1:-1])
    assert seen.largest == pytest.approx(largest, rel=0.02 if make is in_half else 1e-3)


def test_a_file_of_another_training_is_refused_and_its_own_is_taken_up(planted, words, tmp_path):
    class State:
        is_world_process_zero, global_step, max_steps = True, 0, 4

    texts, file = [[1, *range(20, 40)]], tmp_path / "looks.jsonl"
    callback = EmergenceCallback(words, texts, file=file)
    for step in (0, 4, 6):
        callback.look(planted.model, step)
    again = EmergenceCallback(words, texts, file=file)
    with pytest.raises(InterventionError, match=r"looks of another training, up to step 6"):
        again.on_train_begin(None, State, None, model=planted.model)
    assert [row["step"] for row in read_rows(file)] == [0, 4, 6]
    State.global_step = 4  # the same training, taken up at a checkpoint
    again.on_train_begin(None, State, None, model=planted.model)
    assert not again.rows
    assert [row["step"] for row in read_rows(file)] == [0, 4]


def test_looks_take_a_bounded_share_of_the_time(planted, words, monkeypatch):
    callback = EmergenceCallback(words, [[1, *range(20, 40)]], every=1, share=0.05)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("melens.finetuning.callback.time.perf_counter", lambda: next(clock))

    class State:
        is_world_process_zero, global_step, max_steps = True, 0, 1000

    callback.on_train_begin(None, State, None, model=planted.model)
    for step in range(1, 60):
        State.global_step = step
        callback.on_step_end(None, State, None, model=planted.model)
    spent = sum(row.seconds for row in callback.rows[1:])
    assert len(callback.rows) > 1
    assert spent <= 0.05 * next(clock)


def test_a_look_at_numbers_that_overflowed_is_a_row(planted, words):
    callback = EmergenceCallback(words, [[1, *range(20, 40)]])
    callback.look(planted.model, 0)
    with torch.no_grad():
        planted.model.model.norm.weight.fill_(float("nan"))
        planted.model.model.layers[3].mlp.down_proj.weight.fill_(float("inf"))
    row = callback.look(planted.model, 1)
    assert (row.verdict, row.largest) == ("not finite", None)


def test_a_view_shares_weights_and_no_hooks(planted):
    fired = []
    handle = planted.model.model.layers[0].register_forward_hook(lambda *a: fired.append(1))
    view = view_of(planted.model)
    ids = batch(planted, n=1, length=8)
    with torch.no_grad():
        assert torch.equal(view(ids).logits, planted.model(ids).logits)
    handle.remove()
    assert len(fired) == 1
    pairs = zip(view.parameters(), planted.model.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_the_two_way_context_by_hand():
    from melens.finetuning.focus import two_way

    labels = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    made = two_way({"labels": labels, "attention_mask": mask}, torch.float32)[0, 0] == 0
    assert made.tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, True, True, False],
    ]


def test_fast_weights_adapt_and_are_thrown_away(folder, rows, tmp_path):
    """Two steps of plain gradient descent, written out; afterwards the model is as it was."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from melens.finetuning.focus import adapt, add_fast_weights, fast_weights, redraw

    hf = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    add_fast_weights(model)
    layers = {
        n.split("layers.")[1].split(".")[0] for n, _ in model.named_parameters() if ".fast." in n
    }
    n_layers = hf.config.num_hidden_layers
    assert layers == {str(at) for at in range(int(n_layers * 0.65), n_layers)}
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    before = model(ids).logits
    losses = adapt(model, {"input_ids": ids, "labels": ids})
    assert losses[1] < losses[0]
    assert all(value.grad is None for value in model.parameters())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    assert not torch.allclose(model(ids).logits, before, atol=1e-4)
    redraw(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-6)
    assert len(fast_weights(model)) == 2 * 3 * len(layers)

    out = tmp_path / "run"
    asked = {"steps": 1, "batch_size": 4, "rank": 2, "mask": MASK.mask}
    result = melens.finetune(folder, rows, remedy="focus", out=out, **asked)
    assert result.remedy == "focus"
    assert "fast" not in "".join(path.name for path in (out / "last").iterdir())
    assert result.looks[-1].coordinate == pytest.approx(result.looks[0].coordinate, rel=0.01)


def test_a_window_has_no_two_way_context(make_tiny):
    from peft import LoraConfig, get_peft_model

    from melens.finetuning.focus import add_fast_weights

    hf = make_tiny("gemma3")
    model = get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="sliding window"):
        add_fast_weights(model)
