"""Two threads on one model: refused in words, never silently wrong. Turns are taken by events."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from melens.batches import Batch
from melens.capture import ChannelMax, require_this_thread, stream
from melens.errors import BusyError
from melens.exporting.reload import OpenEdit
from melens.interventions import ffn_scale, wemask
from melens.models import load
from melens.results.edit import Edit
from melens.resume import Resumable

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
HANG = 60
EDIT = {"layers": [1], "rate": 0.5, "select": "activation"}


@pytest.fixture
def elsewhere():
    """Runs a function in another thread and gives its result, or raises its error here."""
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        yield lambda function, *args: pool.submit(function, *args).result(HANG)


@pytest.fixture(params=["bridge", "plain"])
def model(request, make_tiny, tokenizer):
    hf = make_tiny("llama")
    return load(hf, tokenizer=tokenizer) if request.param == "bridge" else hf


def logits(model):
    with torch.no_grad():
        made = model(IDS)
    return getattr(made, "logits", made)


def masked(model):
    with wemask(model, **EDIT):
        return logits(model)


def test_a_pass_under_an_edit_of_another_thread_is_refused(model, elsewhere):
    clean, expected = logits(model), masked(model)
    assert not torch.equal(clean, expected)
    with wemask(model, **EDIT):
        with pytest.raises(BusyError, match="thread MainThread is open on this model"):
            elsewhere(logits, model)
        with pytest.raises(BusyError):
            elsewhere(masked, model)
        assert torch.equal(logits(model), expected)
    assert torch.equal(elsewhere(logits, model), clean)
    assert torch.equal(elsewhere(masked, model), expected)
    assert torch.equal(logits(model), clean)


def test_thirty_passes_of_two_threads_are_right_or_refused(model):
    """What was silently wrong in 78 of 80."""
    expected = dict.fromkeys((0.25, 0.75))
    for rate in expected:
        with wemask(model, **{**EDIT, "rate": rate}):
            expected[rate] = logits(model)
    together = threading.Barrier(2)

    def work(rate):
        right = refused = 0
        for _ in range(15):
            together.wait(HANG)
            try:
                with wemask(model, **{**EDIT, "rate": rate}):
                    right += torch.equal(logits(model), expected[rate])
            except BusyError:
                refused += 1
        return right, refused

    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(work, expected))
    assert all(right + refused == 15 for right, refused in counts)
    assert sum(right for right, _ in counts) >= 15  # one of the two always has the model


def test_a_pass_that_was_running_when_the_edit_was_entered_is_refused(tiny, elsewhere):
    """It has passed the model's entrance; the edit's own hook stops it."""
    inside, go_on = threading.Event(), threading.Event()
    main = threading.get_ident()

    def wait(module, args):
        if threading.get_ident() != main:
            inside.set()
            assert go_on.wait(HANG)

    handle = tiny.blocks[0].register_forward_pre_hook(wait)
    expected = None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, tiny)
        assert inside.wait(HANG)
        with ffn_scale(tiny, 1, factor=0.5):
            expected = logits(tiny)
            go_on.set()
            with pytest.raises(BusyError):
                running.result(HANG)
    handle.remove()
    with ffn_scale(tiny, 1, factor=0.5):
        assert torch.equal(logits(tiny), expected)


def test_two_captures_at_once(tiny, elsewhere):
    site = "blocks.1.hook_resid_post"

    def capture(progress=None):
        tap = ChannelMax()
        stream(tiny, [Batch.of(IDS), Batch.of(IDS)], {site: tap}, progress=progress)
        return tap.result()

    expected, refusals = capture(), []

    def meddle(done):
        for function in (capture, lambda: logits(tiny), lambda: masked(tiny)):
            with pytest.raises(BusyError):
                elsewhere(function)
            refusals.append(done)

    assert torch.equal(capture(meddle), expected)
    assert refusals == [2] * 6
    assert torch.equal(elsewhere(capture), expected)


def test_resumed_runs_keep_out_of_anothers_edit(tiny, elsewhere):
    run = Resumable(tiny, Batch.of(IDS))
    expected = run.run(1, run.resid_pre(1))
    with ffn_scale(tiny, 2, factor=0.5):
        logits(tiny)
        with pytest.raises(BusyError):
            elsewhere(lambda: run.run(1, run.resid_pre(1)))
        with pytest.raises(BusyError):
            elsewhere(lambda: Resumable(tiny, Batch.of(IDS)))
    assert torch.equal(elsewhere(lambda: run.run(1, run.resid_pre(1))), expected)


def test_models_of_their_own_are_free(make_tiny, tokenizer):
    models = [load(make_tiny("llama"), tokenizer=tokenizer) for _ in range(2)]
    expected, meet = masked(models[0]), threading.Barrier(2)

    def work(model):
        with wemask(model, **EDIT):
            meet.wait(HANG)
            made = logits(model)
            meet.wait(HANG)
        return made

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(made, expected) for made in pool.map(work, models))


def test_an_edit_kept_open_is_for_the_thread_that_runs_the_model(tiny, elsewhere):
    """As a model loaded in the main thread whose answers a worker streams."""
    edit = Edit(name="wemask", rate=0.5, layers=(1,), select="activation")
    expected, clean = masked(tiny), logits(tiny)
    kept = OpenEdit(tiny, edit, None)
    assert torch.equal(logits(tiny), expected)
    assert torch.equal(elsewhere(logits, tiny), expected)
    made = elsewhere(lambda: tiny.generate(IDS[:1], max_new_tokens=3, verbose=False))
    assert made.shape[1] == IDS.shape[1] + 3
    elsewhere(masked, tiny)  # an edit of that thread's own, and gone again
    with ffn_scale(tiny, 1, factor=0.5):
        logits(tiny)
        with pytest.raises(BusyError):
            elsewhere(logits, tiny)

    def meddle(module, args):  # in the middle of a pass, once
        handle.remove()
        for function in (logits, masked, lambda _: kept.close()):
            with pytest.raises(BusyError):
                elsewhere(function, tiny)

    handle = tiny.blocks[0].register_forward_pre_hook(meddle)
    assert torch.equal(logits(tiny), expected)
    assert kept.active
    elsewhere(kept.close)
    assert torch.equal(logits(tiny), clean)


def test_what_a_thread_left_open_when_it_ended_stops_nobody(model):
    left = wemask(model, **EDIT)
    expected = masked(model)
    thread = threading.Thread(target=left.__enter__)
    thread.start()
    thread.join(HANG)
    assert torch.equal(logits(model), expected)
    left.__exit__(None, None, None)
    assert not torch.equal(logits(model), expected)


def test_blocks_that_a_backward_pass_runs_again_are_of_the_thread_that_asked(tiny):
    """Autograd does so in a thread of its own on a GPU; here a thread within a backward hook."""
    seen = []

    def again(grad):
        seen.append(torch._C._current_graph_task_id())
        require_this_thread(tiny)

    with ThreadPoolExecutor(1) as pool, ffn_scale(tiny, 1, factor=0.5):
        logits(tiny)
        x = torch.ones(2, requires_grad=True)
        x.register_hook(again)
        pool.submit(lambda: (2 * x).sum().backward()).result(HANG)
        with pytest.raises(BusyError):
            pool.submit(require_this_thread, tiny).result(HANG)
    assert seen[0] != -1
