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
# # From a model to its attention sinks
#
# SmolLM2-135M, the embedded model; any name, folder or Hugging Face id works in its place. Layers
# count from 0 and mean the output of a block. Each section asks one question, makes one call,
# shows one picture and checks one sentence.

# %%
import melens
from melens.measuring import attention

model = melens.load("smollm2-135m")
texts = melens.prompts(n=4, length=64, bos=True)  # the bundled texts, BOS in front

# %% [markdown]
# ## In which layer do massive activations emerge?

# %%
layer = melens.locate(model, texts)
layer

# %%
# An earlier stage at layer 2 was erased; what stays comes from layer 11.
assert (layer.verdict, layer.me_layer, layer.stages[0].layer) == ("re-emergent", 11, 2)

# %% [markdown]
# ## What is the massive token like, and what sets it off?

# %%
token = melens.describe(model, layer, texts)
token

# %%
# Nearly all of its energy is in one coordinate, and its direction then stays as it is; so does it
# between different first tokens, nearly all of which turn massive.
assert token.energy["1"] > 0.98
assert min(token.cosine_layers[11:27]) > 0.999
assert min(token.cosine_inputs[11:27]) > 0.99
assert sum(row.massive for row in token.first_tokens) > 0.95 * len(token.first_tokens)

# %% [markdown]
# ## Which dimensions carry it, layer by layer?

# %%
token.plot("dimensions")

# %%
assert token.coordinates[0].dim == 507

# %% [markdown]
# ## Do residual, queries and keys collapse?

# %%
ranks = melens.collapse(model, layer, texts)
ranks

# %%
# The residual does, but only through that one row. Queries and keys lose less than a third, and
# without the row it is the same.
whole, without = ranks.curve("resid_post")
assert whole[11] < 10 < 0.6 * without[11]
for site in ("q", "k"):
    whole, without = ranks.curve(site)
    assert min(whole[12:]) > 0.6 * whole[10]
    assert all(abs(a - b) < 1 for a, b in zip(whole, without, strict=True))

# %% [markdown]
# ## Where do attention sinks form?

# %%
found = melens.sinks(model, layer, texts)
found

# %%
# Right after the ME Layer most heads attend to the first token, far above uniform attention.
assert found.sink_rate["0.3"][layer.me_layer] < 0.1 < 0.6 < found.sink_rate["0.3"][12]
assert found.attention_to_token[20] > 5 * found.uniform

# %% [markdown]
# ## What do single heads look at?
#
# circuitsvis views of this one text, drawn offline; `heads.view().save_html("heads.html")` keeps
# them as one file.

# %%
heads = attention(model, layer, texts, layers=[11, 12], heads=[0, 3, 8])
heads

# %%
first = {(row["layer"], row["head"]): row["attention_to_first"] for row in heads.rows()}
assert first[12, 0] > 3 * first[11, 0]

# %% [markdown]
# The same as a picture without a program, which a page or a pull request shows too.

# %%
heads.plot()

# %% [markdown]
# ## The numbers, for a paper or a figure of your own
#
# Every result has tables (`to_frame`, `to_csv`, `to_latex`) and arrays, and draws into axes of
# yours.

# %%
found.arrays()["alpha"].shape  # attention to the first token: (layers, heads)

# %%
print(layer.to_latex(table="massive"))

# %%
import matplotlib.pyplot as plt

page, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(2, 1), layout="constrained")
found.plot("curves", ax=left)
found.plot("map", ax=right)
# %% [markdown]
# Several models stand in one figure, a line each; here the same one with and without BOS.

# %%
from melens.figures import compare

without = melens.locate(model, melens.prompts(n=4, length=64, bos=False))
compare([layer, without])
