"""Training under a mask: what TRL would do, with the edit in every pass, kept and taken up."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from processes import ended, forked, fresh
from safetensors.torch import load_file

import melens
from melens.errors import InterventionError, ModelError, NoTokenError, ResultError
from melens.finetuning import merge, trained_model
from melens.finetuning.data import read_training_data, tokenise
from melens.finetuning.keeping import PICKLES, losses_in, read_rows
from melens.results import load_result
from melens.results.edit import Edit

# Raised inside PEFT and TRL, about each other's and transformers' names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
MASK = Edit(name="wemask", rate=0.5)
FEW = {"steps": 3, "batch_size": 4, "rank": 2, "save_every": 2, "look_every": 100}


def weights(out, which="last"):
    return load_file(out / which / "adapter_model.safetensors")


def same(a, b, *, within=0.0):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a) <= within


@pytest.fixture(scope="module")
def masked(folder, rows, rows_of, tmp_path_factory):
    """One training under the mask, undisturbed."""
    out = tmp_path_factory.mktemp("masked") / "run"
    held_out = rows_of("held-out", 4, 1)
    result = melens.finetune(folder, rows, mask=MASK, held_out=held_out, out=out, **FEW)
    return out, result, held_out


def test_strength_0_is_plain_trl_bit_for_bit(folder, rows, words, tmp_path):
    """Independent: PEFT and TRL as their own documents use them."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    none = MASK.changed(strength=0.0)
    melens.finetune(folder, rows, mask=none, out=tmp_path / "ours", **FEW)

    hf = AutoModelForCausalLM.from_pretrained(folder)
    names = [n for n, m in hf.model.named_modules() if isinstance(m, torch.nn.Linear)]
    torch.manual_seed(0)
    linear = [f"model.{name}" for name in names]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=linear, task_type="CAUSAL_LM")
    tokens = tokenise(read_training_data(rows), words, max_tokens=256)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        seed=0,
        data_seed=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        max_length=None,
    )
    columns = {"input_ids": list(map(list, tokens.ids)), "labels": list(map(list, tokens.labels))}
    model = get_peft_model(hf, config)
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), processing_class=words
    )
    trainer.train()
    model.save_pretrained(tmp_path / "trl" / "last")
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "trl"))


def test_what_a_training_leaves(masked, folder):
    out, result, _ = masked
    assert load_result(out / "finetune.json") == result
    assert [row.step for row in result.losses] == [1, 2, 3]
    assert result.losses[1].held_out is not None
    assert result.me_layer == melens.locate(melens.load(folder)).me_layer
    assert not [path for kind in PICKLES for path in out.rglob(kind)]
    assert not (out / "checkpoints").exists()
    assert "planted, 3 steps of sft (lora" in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "best",
        "emergence.jsonl",
        "finetune.json",
        "last",
        "losses.jsonl",
        "training.json",
    }
    for style in ("training", "layers"):
        assert result.plot(style).axes


def test_killed_and_resumed_is_undisturbed(masked, folder, rows, tmp_path):
    """Behind the checkpoint of step 2 a step is lost; the same call does it again."""
    out, result, held_out = masked

    class KilledError(Exception):
        pass

    def kill(done, total):
        if done == 3:
            raise KilledError

    asked = {"mask": MASK, "held_out": held_out, "out": tmp_path / "run", **FEW}
    with pytest.raises(KilledError):
        melens.finetune(folder, rows, progress=kill, **asked)
    assert not (tmp_path / "run" / "last").exists()
    with pytest.raises(ResultError, match="has not ended"):
        trained_model(tmp_path / "run")
    again = melens.finetune(folder, rows, **asked)
    assert same(weights(out), weights(tmp_path / "run"))
    assert (again.losses, again.edited_tokens) == (result.losses, result.edited_tokens)
    kept = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.jsonl")}
    assert melens.finetune(folder, rows, **asked) == again  # nothing is trained twice
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.jsonl")} == kept
    assert result.edited_tokens > 0
    with pytest.raises(ResultError, match="holds another training"):
        melens.finetune(folder, rows, **asked | {"seed": 1})


def test_checkpointing_changes_nothing(masked, folder, rows, tmp_path):
    out, _, held_out = masked
    asked = {"mask": MASK, "held_out": held_out, "out": tmp_path, "checkpointing": True, **FEW}
    melens.finetune(folder, rows, **asked)
    assert same(weights(out), weights(tmp_path), within=1e-6)


def test_merged_and_unmerged_agree_and_the_mask_comes_with_it(masked, folder, tmp_path):
    from peft import PeftModel

    out, _, _ = masked
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    hf, _, _ = trained_model(out)
    base, _, _ = melens.models.load_plain(folder)
    unmerged = PeftModel.from_pretrained(base, str(out / "last"))
    with torch.no_grad():
        assert torch.allclose(hf(ids).logits, unmerged(ids).logits, atol=1e-4)
    bridge = melens.load(merge(out, tmp_path / "merged"))
    assert bridge.melens_edit.edit == MASK
    with torch.no_grad():
        edited = bridge(ids)
        bridge.melens_edit.close()
        assert not torch.allclose(edited, bridge(ids), atol=1e-3)
        assert torch.allclose(bridge(ids), hf(ids).logits, atol=1e-4)


FRESH = """
import sys
import torch
import melens
hf = melens.load(sys.argv[1]).original_model
row = torch.tensor([[1, 20, 30, 40, 50]])
print(hf.generate(row, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist())
"""


def test_the_merged_model_generates_with_the_mask_in_a_fresh_process(masked, tmp_path):
    """Independent: passes over the whole text, without a cache, a token at a time."""
    out, _, _ = masked
    merged = merge(out, tmp_path / "merged")
    done = fresh(FRESH, merged)
    assert done.code == 0, done.stderr[-2000:]
    bridge = melens.load(merged)

    def text():
        ids = [1, 20, 30, 40, 50]
        for _ in range(8):
            ids.append(int(bridge(torch.tensor([ids]))[0, -1].argmax()))
        return ids

    with torch.no_grad():
        edited = text()
        bridge.melens_edit.close()
        assert text() != edited
    assert json.loads(done.stdout) == [edited]


def test_a_learned_sink_is_a_prefix_anywhere(folder, rows, words, tmp_path):
    """Independent: PEFT alone, on a model that melens never saw."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from melens.exporting import load_prefix

    out = tmp_path / "run"
    result = melens.finetune(folder, rows, mask=MASK, method="sink", out=out, **FEW)
    assert result.trained == 2 * 32 * melens.load(folder).cfg.n_layers
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        before = plain(ids).logits[:, 1:]
        ours = plain(ids[:, 1:], past_key_values=load_prefix(out / "prefix", plain)).logits
        theirs = PeftModel.from_pretrained(plain, str(out / "last"))(ids[:, 1:]).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2)
    assert "learned key and value in place" in str(load_result(out / "prefix" / "melens.json"))
    with pytest.raises(ResultError, match="learned sink"):
        merge(out, tmp_path / "merged")


@pytest.fixture
def no_telemetry(monkeypatch):
    """TRL asks the network at every trainer that is made, unless it was told not to in time."""

    def ask(*given, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", ask)


def test_a_kill_after_the_last_checkpoint(masked, folder, rows, tmp_path, monkeypatch):
    """A checkpoint of the last step leaves nothing to train: the stretch before it comes again."""

    class KilledError(Exception):
        pass

    def kill(*given):
        raise KilledError

    out, result, held_out = masked
    asked = {"mask": MASK, "held_out": held_out, "out": tmp_path / "run", **FEW}
    with monkeypatch.context() as patched:
        patched.setattr("melens.finetuning.run._keep", kill)
        with pytest.raises(KilledError):
            melens.finetune(folder, rows, **asked)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").exists()
    again = melens.finetune(folder, rows, **asked)
    assert same(weights(out), weights(tmp_path / "run"))
    assert again.losses == result.losses


def test_packed_by_trl_is_unpacked(folder, rows_of, tmp_path, no_telemetry):
    """Four texts in one row, none of which sees another: the loss and the slope of four rows."""
    few = rows_of("packed", 4, 3)
    asked = FEW | {"steps": 1, "mask": MASK, "max_tokens": 128}
    for name, own in (
        ("apart", {"batch_size": 4}),
        ("packed", {"batch_size": 1, "packing": True}),
    ):
        melens.finetune(folder, few, out=tmp_path / name, **asked | own)
    apart, packed = (read_rows(tmp_path / at / "losses.jsonl")[0] for at in ("apart", "packed"))
    assert packed["num_tokens"] == apart["num_tokens"]
    for name in ("loss", "grad_norm"):
        assert packed[name] == pytest.approx(apart[name], rel=1e-4)
    assert packed["edited_tokens"] == apart["edited_tokens"] == 4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_pairs_of_answers_by_dpo(folder, method, tmp_path, no_telemetry):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "w9 w8", "chosen": " w7 w20", "rejected": " w30"}
    pairs.write_text(json.dumps(row) + "\n" + json.dumps(row | {"chosen": " w50"}) + "\n")
    asked = FEW | {"batch_size": 2, "learning_rate": 1e-3}
    result = melens.finetune(folder, pairs, mask=MASK, method=method, out=tmp_path / "run", **asked)
    assert result.objective == "dpo"
    first, *_, last = (row.loss for row in result.losses)
    assert first == pytest.approx(0.6931, abs=1e-3)  # ln 2: reference and model see the same mask
    assert last < first


def test_rewards_of_ones_own(folder, rows_of, tmp_path, monkeypatch, no_telemetry):
    (tmp_path / "mine.py").write_text(
        "def short(completions, answer, **rest):\n    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = FEW | {"steps": 1, "objective": "grpo", "reward": "mine:short", "max_new_tokens": 4}
    few = rows_of("grpo", 4, 2)
    result = melens.finetune(folder, few, mask=MASK, out=tmp_path / "run", **asked)
    assert result.objective == "grpo"
    with pytest.raises(InterventionError, match="has no function 'long'"):
        melens.finetune(folder, few, out=tmp_path / "x", **asked | {"reward": "mine:long"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stepz": 3}, "finetune takes no 'stepz'"),
        ({"method": "lorra"}, "Did you mean 'lora'?"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"learning_rate": 2.0}, "learning_rate must be between 0 and 1"),
        ({"mask": "wemask"}, "mask must be a melens.results.Edit"),
        ({"mask": Edit(name="zero")}, "mask must be a melens.results.Edit called wemask or none"),
        ({"method": "sink", "packing": True}, "do not go with it"),
        ({"objective": "dpo"}, "dpo needs rows with prompt, chosen and rejected"),
        ({"objective": "grpo", "reward": "nothing"}, "reward must be math or module:function"),
        ({"objective": "grpo", "batch_size": 3}, "multiple of generations (4)"),
        ({"objective": "grpo", "checkpointing": True}, "checkpointing is for sft"),
        ({"generations": 1}, "generations must be a whole number from 2"),
        ({"seed": 2**32}, "seed must be at most"),
        ({"report_to": "tensorboard"}, "report_to must be a list"),
        ({"report_to": ("foo",)}, "is no tracker that is installed here"),
        ({"objective": "grpo", "accumulate": 2}, "use a larger batch_size"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_loading(rows, settings, says, tmp_path):
    with pytest.raises(InterventionError) as said:
        melens.finetune("no-such-model", rows, out=tmp_path / "x", **settings)
    assert says in str(said.value)
    assert not (tmp_path / "x").exists()


def test_a_compiled_model_is_refused(folder):
    from transformers import AutoModelForCausalLM

    from melens.finetuning.trainers import require_uncompiled

    hf = AutoModelForCausalLM.from_pretrained(folder)
    hf.compile()
    with pytest.raises(ModelError, match="compiled"):
        require_uncompiled(hf)


def _one_of_two(rank, port, where, call):
    """One of those that ``accelerate launch`` starts."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    args, settings = call
    melens.finetune(*args, out=where, **settings)


def test_two_processes_with_half_the_batch_are_one(folder, rows, tmp_path):
    few = FEW | {"steps": 2, "mask": MASK, "device": "cpu"}
    call, port = ((folder, rows), few | {"batch_size": 2}), str(20_000 + os.getpid() % 20_000)
    where = tmp_path / "two"
    processes = [forked(_one_of_two, rank, port, where, call) for rank in "01"]
    assert ended(*processes) == [0, 0]
    melens.finetune(folder, rows, out=tmp_path / "one", **few)
    losses = [[row.loss for row in losses_in(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"), within=1e-5)


def test_two_half_batches_a_step_are_one_batch(folder, rows, tmp_path):
    few = FEW | {"steps": 2, "mask": MASK}
    melens.finetune(folder, rows, out=tmp_path / "one", **few)
    halves = few | {"batch_size": 2, "accumulate": 2}
    melens.finetune(folder, rows, out=tmp_path / "halves", **halves)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "halves"), within=1e-5)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([""], "holds nothing but blank lines"),
        ([{"question": "w5", "answer": "w6"}, {"question": "w5"}], "line 2: no answer"),
        ([{"prompt": "w5", "chosen": "w6", "rejected": "w6"}], "line 1: chosen and rejected are"),
    ],
)
def test_the_command_refuses_bad_rows_before_the_model(lines, says, tmp_path, capsys):
    from melens.cli.app import _run

    path = tmp_path / "rows.jsonl"
    path.write_text("".join((json.dumps(line) if line else "") + "\n" for line in lines))
    asked = ["finetune", "no-such-model", "--data", str(path), "-o", str(tmp_path / "x")]
    code, said = _run(asked, debug=False), capsys.readouterr().err
    assert (code, says in said, said.count("\n")) == (2, True, 1)


def test_the_command_plans_trains_and_merges(folder, rows, tmp_path, capsys):
    from melens.cli.app import _run

    common = ["finetune", str(folder), "--data", str(rows), "--steps", "1", "--rank", "2", "-q"]
    assert _run([*common, "--dry-run"], debug=False) == 0
    assert "about" in capsys.readouterr().out
    merged = ["--mask-rate", "0.5", "-o", str(tmp_path / "run"), "--merge", str(tmp_path / "model")]
    assert _run([*common, *merged], debug=False) == 0
    assert "1 steps of sft (lora" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "finetune.svg").exists()
    assert (tmp_path / "model" / "melens.json").exists()


def test_a_training_with_the_remedy_goes_on_too(folder, rows, tmp_path):
    """Loading a checkpoint leaves one adapter active; the fast one must be beside it again."""

    class KilledError(Exception):
        pass

    def kill(done, total):
        if done == 3:
            raise KilledError

    asked = {"remedy": "focus", "mask": MASK, **FEW}
    melens.finetune(folder, rows, out=tmp_path / "whole", **asked)
    with pytest.raises(KilledError):
        melens.finetune(folder, rows, out=tmp_path / "cut", progress=kill, **asked)
    melens.finetune(folder, rows, out=tmp_path / "cut", **asked)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("name", "sinks"), [("Mamba2ForCausalLM", False), ("GptOssForCausalLM", True)]
)
def test_models_without_attention_or_with_experts_are_trained_and_looked_at(name, sinks, tmp_path):
    """A state-space mixer's kernel reads past adapters; TRL asks experts' routers for more."""
    import families
    from words import letters

    families.tiny(name).save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2 and 2", "answer": "4"}\n' * 4)
    found = melens.finetune(
        tmp_path / "model", rows, steps=1, batch_size=2, rank=2, out=tmp_path / "run"
    )
    assert [row.sink_rate is not None for row in found.looks] == [sinks] * 2
    names = weights(tmp_path / "run")
    assert not any("mixer.out_proj" in name for name in names)
    assert names


def test_a_router_that_is_a_linear_layer_is_not_adapted():
    """Llama-4's gives two tensors, which an adapter around it could not add to."""
    import families

    from melens.finetuning.adapters import trainable
    from melens.finetuning.settings import Training

    model = trainable(families.tiny("Llama4ForCausalLM"), Training(), None, first_token=None)
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    assert names
    assert not any("router" in name for name in names)
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_a_mask_that_meets_no_token_ends_the_training():
    from melens.finetuning.run import RequireEdited
    from melens.interventions.core import EditedTokens

    edited = EditedTokens()
    with pytest.raises(NoTokenError, match="no text of the first step"):
        RequireEdited(edited).on_step_end(None, None, None)
    edited.tokens = 1
    RequireEdited(edited).on_step_end(None, None, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "sink", "-o", "run", "--merge", "model"], "a learned sink is in none"),
        (["-o", "run", "--merge", "run/in"], "must be two folders"),
        (["-o", "rows.jsonl"], "is a file"),
        ([], "--out FOLDER is missing"),
    ],
)
def test_the_command_refuses_folders_early(rows, options, says, tmp_path, monkeypatch, capsys):
    from melens.cli.app import _run

    monkeypatch.chdir(tmp_path)
    shutil.copy(rows, "rows.jsonl")
    code = _run(["finetune", "no-such-model", "--data", "rows.jsonl", *options], debug=False)
    assert (code, says in capsys.readouterr().err) == (2, True)
