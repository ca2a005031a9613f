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
# # What happens if the massive token is loosened?
#
# SmolLM2-135M, the embedded model, with BOS in front; short texts, so that every cell takes
# seconds. Layers count from 0 and mean the output of a block.

# %%
import tempfile
from pathlib import Path

import melens
from melens.evaluating import Compare, Items
from melens.exporting import load_prefix
from melens.models.decoder import decoder_of
from melens.models.loading import load_plain
from melens.results import Edit

model = melens.load("smollm2-135m")
texts = melens.prompts(n=6, length=48, bos=True)
layer = melens.locate(model, texts)
layer.summary()

# %% [markdown]
# ## How much of the token does a mask hold?
# WeMask scales the top dimensions of the massive token where attention reads it. The rate says how
# many dimensions that are; the masked energy says how much of the token.

# %%
ids = model.to_tokens("The capital of France is", prepend_bos=True)
energy = {}
for select in ("gamma", "activation", "bottom-gamma"):
    with melens.wemask(model, layer, rate=0.5, select=select) as mask:
        model(ids)
    energy[select] = mask.mean_energy
energy

# %%
# Half of the dimensions by activation are nearly all of it. By gain they are not: in the later
# layers the massive dimension has next to the smallest gain of all, so the rule passes it by.
massive = layer.massive[0].dim
gain = decoder_of(model).gain(20).abs()
assert energy["activation"] > 0.99
assert energy["gamma"] < 0.25 < 0.75 < energy["bottom-gamma"]
assert int((gain < gain[massive]).sum()) == 0

# %% [markdown]
# ## Does anything get better?
# Loss with and without, paired by text; doses and both controls are always beside it: the same
# mask in other layers, and as many random dimensions.

# %%
items = Items(n=6, length=48, bos=True)
compare = Compare(rates=(0.9,), seeds=(0,))
edit = Edit(select="gamma", rate=0.5)
by_gain = melens.evaluate(model, "perplexity", edit, me_layer=layer, items=items, compare=compare)
by_gain

# %%
edit = Edit(select="activation", rate=0.1)
by_activation = melens.evaluate(
    model, "perplexity", edit, me_layer=layer, items=items, compare=compare
)
by_activation

# %%
# Masking by activation costs; by gain hardly anything changes.
assert by_activation.delta.interval[0] > 0
assert abs(by_gain.delta.value) < 0.5 * by_activation.delta.value

# %% [markdown]
# ## And its rivals?
# Set the massive coordinate to zero or to its mean, flatten the norm or cap the FFN at the ME
# Layer, hide the token's key and value.

# %%
names = ("zero", "mean", "norm-flatten", "ffn-cap", "drop-key")
compare = Compare(rates=(), seeds=(), rivals=names)
edit = Edit(select="gamma", rate=0.5)
rivals = melens.evaluate(model, "perplexity", edit, me_layer=layer, items=items, compare=compare)
rivals.to_frame()[["condition", "value", "delta", "kl", "agreement"]]

# %%
# The same thing said five ways, and five different prices: only the exact edit says what a number
# is about.
price = {score.name: score.delta.value for score in rivals.rivals}
assert price["zero"] > 5
assert abs(price["mean"]) < 0.05
assert price["drop-key"] > 0.1

# %% [markdown]
# ## What becomes of the sinks?

# %%
before = melens.sinks(model, layer, texts)
with melens.wemask(model, layer, rate=0.1, select="activation"):
    after = melens.sinks(model, layer, texts)
before.overall["0.3"], after.overall["0.3"]

# %%
assert after.overall["0.3"] < before.overall["0.3"]

# %% [markdown]
# ## The mask as one column of the key-value cache
# With a fixed first token the mask is a constant, computed once: an exported prefix gives the same
# answers without melens and costs nothing.

# %%
folder = Path(tempfile.mkdtemp()) / "prefix"
melens.export(
    "smollm2-135m", edit, format="prefix", out=folder, me_layer=layer, first_token="<|im_start|>"
)
plain, *_ = load_plain("smollm2-135m")
with melens.wemask(plain, layer, rate=0.5):
    hooked = plain(ids).logits[:, 1:]
prefixed = plain(ids[:, 1:], past_key_values=load_prefix(folder, plain)).logits

# %%
assert (hooked - prefixed).abs().max() < 1e-3
