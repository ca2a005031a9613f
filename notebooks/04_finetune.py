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
# # Does the ME Layer survive fine-tuning?
#
# SmolLM2-135M, the embedded model, trained for a few steps on a handful of rows with the mask in
# force: too few to teach it anything, enough to see every part. Layers count from 0 and mean the
# output of a block. Needs the extra `train`.

# %%
import json
import tempfile
from pathlib import Path

import torch

import melens
from melens.finetuning import merge, plan
from melens.results import Edit

folder = Path(tempfile.mkdtemp())
rows = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}."}
    for a in range(2, 6)
    for b in range(2, 5)
]
data = folder / "rows.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))
mask = Edit(name="wemask", rate=0.5)
settings = {"mask": mask, "chat": False, "steps": 4, "batch_size": 2, "look_every": 2}

# %% [markdown]
# ## What would it take?
# One batch is run and timed; nothing is written.

# %%
wanted = plan("smollm2-135m", data, **settings)
wanted.rows()

# %% [markdown]
# ## Train
# The loop is TRL's. The mask is in every pass, backward included.

# %%
result = melens.finetune("smollm2-135m", data, out=folder / "run", **settings)
result.summary()

# %%
figure = result.plot("training")
figure

# %%
# Looks are rows of their own: before the first step and after the last at least.
first, last = result.looks[0], result.looks[-1]
assert (first.step, last.step) == (0, 4)
assert first.me_layer == last.me_layer
last.coordinate / first.coordinate

# %% [markdown]
# ## Use it
# The weights are a PEFT adapter. Merged into one folder, the mask comes with them: `melens.load`
# applies it.

# %%
model = melens.load(merge(folder / "run", folder / "model"))
assert model.melens_edit.edit == mask
ids = model.to_tokens("Question: What is 2 plus 2?\nAnswer:", prepend_bos=False)
with torch.no_grad():
    token = model(ids)[0, -1].argmax().item()
model.tokenizer.decode([token])
