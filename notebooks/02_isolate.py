# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which parameters make the massive activation?
#
# SmolLM2-135M, the embedded model, with BOS in front; short texts, so that every cell takes
# seconds. Layers count from 0 and mean the output of a block.

# %%
import melens
from melens.interventions import ffn_ablate_neurons, norm_flatten
from melens.patching import LogitDifference

model = melens.load("smollm2-135m")
texts = melens.prompts(n=2, length=16, bos=True)
layer = melens.locate(model, texts)
layer.summary()

# %% [markdown]
# ## Norm, FFN, or both together?
# The gain of the norm before the FFN is flattened, the neurons that write the massive coordinate
# are ablated, on the first token alone; grey: the same edits at every other layer.

# %%
cause = melens.isolate(model, layer, texts)
cause

# %%
# Two neurons make it; the shape of the norm's gain hardly matters.
assert cause.factorial.flat_kept.left > 0.9
assert cause.factorial.kept_edited.left < 0.02
assert [row.neuron for row in cause.neurons if row.layer == 11][:2] == [1229, 1487]

# %% [markdown]
# ## Which writes are needed, and which one is enough?

# %%
cause.plot("layers")

# %%
# The FFN write of layer 11 is needed and enough; layer 0's FFN and those that erase the first stage
# (8, 9) are needed too, though they write next to nothing of what stays.
needed = {write.layer: write.left for write in cause.necessity if write.part == "ffn"}
enough = {write.layer: write.left for write in cause.sufficiency if write.part == "ffn"}
assert needed[11] < 0.01
assert enough[11] > 0.9
assert needed[0] < 0.01
assert max(needed[8], needed[9]) < 0.3
assert max(abs(left) for at, left in enough.items() if at != 11) < 0.2

# %% [markdown]
# ## Where inside the block does it grow?

# %%
cause.plot("path")

# %%
# Not before gate and up are multiplied.
ratio = {step.site: step.ratio for step in cause.path}
assert ratio["up"] < 5 < 100 < ratio["product"]

# %% [markdown]
# ## What must a token look like to set it off?

# %%
cause.direction

# %%
# One direction of the FFN's input holds nearly all of the quadratic form, and only the massive
# token points along it.
assert cause.direction.concentration > 0.85
assert cause.direction.massive > 3 * cause.direction.others_max

# %% [markdown]
# ## Does a single weight ruin the model?

# %%
weights = melens.super_weights(model, texts, me_layer=layer)
weights

# %%
assert (11, 507, 1229) in [(w.layer, w.row, w.column) for w in weights.super_weights]

# %% [markdown]
# ## An edit by hand
# Every edit is a context manager; leaving it restores the model bit for bit.

# %%
with norm_flatten(model, layer, alpha=0.0), ffn_ablate_neurons(model, layer, neurons=[1229]):
    both = melens.locate(model, texts)
both.stages[-1].peak, layer.stages[-1].peak

# %%
assert both.stages[-1].peak < 0.3 * layer.stages[-1].peak

# %% [markdown]
# ## Which activations carry an answer?
# One activation of the clean run is put into the corrupted one, at every layer and position.

# %%
grid = melens.patch(
    model,
    "The capital of France is",
    "The capital of Italy is",
    sites=["resid_pre", "mlp_out"],
    metric=LogitDifference(" Paris", " Rome"),
)
grid

# %%
assert grid.clean > grid.corrupted
