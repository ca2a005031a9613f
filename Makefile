# make demo   environment, embedded weights, the main job on them, figures in runs/demo/
# make test   environment with the test tools, the suite on tiny models (WORKERS=2 processes)
# On a machine with a GPU: make demo TORCH=any (your own torch build, no CPU pin).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= cpu
WORKERS ?= 2
BIN := $(VENV)/bin
LIBRARIES := saelens dictionary_learning sparsify nnsight
TOOLS := llmcompressor torchao bitsandbytes gptqmodel
PIN := $(if $(filter any,$(TORCH)),,-c constraints-cpu.txt)
# Many processes start below: what one compiles the next reads. So pip need not compile what none imports.
unexport PYTHONDONTWRITEBYTECODE

SHAPES := tests/test_metrics.py \
  tests/test_batches.py \
  tests/interventions/test_interventions.py \
  tests/interventions/test_massive_tokens.py::test_evaluate_edits_and_counts_massive_tokens_only \
  tests/interventions/test_massive_tokens.py::test_massive_tokens_are_the_same_under_a_cache_padding_and_company \
  'tests/interventions/test_massive_tokens.py::test_the_rule_finds_the_planted_tokens_and_no_other[llama-single]' \
  tests/measuring/test_spectrum.py \
  tests/measuring/test_sinks.py \
  'tests/measuring/test_describe.py::test_a_planted_token_is_described_as_planted[llama]' \
  'tests/isolating/test_isolate.py::test_what_was_planted_is_blamed[norm-0]' \
  tests/isolating/test_super_weights.py::test_batches_and_padding_change_nothing \
  'tests/isolating/test_routed.py::test_the_planted_expert_and_neuron_are_named[MixtralForCausalLM]' \
  'tests/isolating/test_routed_super_weights.py::test_batches_and_padding_change_nothing[left]' \
  'tests/patching/test_patching.py::test_loss_kl_and_a_function_of_logits_equal_plain_runs[left]' \
  'tests/patching/test_patching.py::test_massive_coordinate_and_sink_rate_equal_plain_runs[left]' \
  tests/patching/test_patching.py::test_ablation_by_the_mean_and_by_another_sequence \
  tests/exporting/test_exporting.py::test_the_embedding_row_is_keys_then_values \
  tests/finetuning/test_masked_training.py::test_the_two_way_context_by_hand \
  'tests/exporting/test_exporting.py::test_the_prefix_gives_the_hooks_logits[llama-left]' \
  'tests/exporting/test_serving.py::test_a_mask_under_continuous_batching_and_in_a_static_cache[llama]' \
  tests/quantising/test_rounding.py \
  tests/quantising/test_quantise.py::test_numbers_fit_together \
  tests/quantising/test_quantise.py::test_behind_a_prefix_keys_and_values_of_the_model_as_it_is_are_read \
  tests/quantising/test_quantise.py::test_a_token_of_the_cache_that_is_kept_whole_widens_no_scale \
  tests/scanning/test_scan.py::test_planted_layers_are_predicted \
  tests/scanning/test_ceilings.py::test_the_best_input_is_the_one_that_ascent_finds \
  tests/scanning/test_ceilings.py::test_layer_norm_outputs_are_bounded_with_gain_and_bias \
  tests/scanning/test_ceilings.py::test_the_squared_relu_is_reached \
  tests/evaluating/test_evaluation.py::test_what_is_paired_cancels \
  tests/evaluating/test_evaluation.py::test_a_ratio_estimate_resamples_items_with_their_weights \
  'tests/streaming/test_streamed.py::test_the_reach_is_the_trajectory_of_locate[llama]' \
  'tests/evaluating/test_evaluation.py::test_a_resumed_run_is_a_whole_run_under_the_edit[llama]' \
  tests/exporting/test_sidecar.py::test_the_mask_equals_melens_on_held_out_texts_at_every_layer_it_tells

.PHONY: demo test test-weights test-shapes test-families test-gemma test-browser test-hooked test-engines test-interop notebooks examples docs check all clean

demo: $(VENV)/.run
	$(BIN)/melens locate smollm2-135m --out runs/demo
	$(BIN)/melens known smollm2-135m runs/demo/locate.json
	$(BIN)/melens describe smollm2-135m --located runs/demo/locate.json --out runs/demo
	$(BIN)/melens sinks smollm2-135m --located runs/demo/locate.json --out runs/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=30

# The same on SmolLM2-135M: reference values, and what only real weights show.
test-weights: $(VENV)/.test
	$(BIN)/melens models get smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m weights --durations=10

# Shapes of tensors (jaxtyping, beartype), in tests that reach every function which has them.
test-shapes: $(VENV)/.test
	PYTHONPATH=tests/support $(BIN)/python -m pytest -p checked_shapes $(SHAPES)

# The licence of Gemma must be accepted first: melens models get gemma3-270m --accept-license gemma
test-gemma: $(VENV)/.test
	$(BIN)/melens models get gemma3-270m
	$(BIN)/python -m pytest -m gemma tests/scanning/test_scan.py tests/weights

# Every causal family of transformers, against the table of docs/architectures.md, and every command on each: an hour.
test-families: $(VENV)/.test
	$(BIN)/python -m pytest -m "families or not families" -n $(WORKERS) tests/models/test_every_family.py

# Needs a browser: apt-get install chromium chromium-driver
test-browser: $(VENV)/.test
	$(BIN)/python -m pytest -m browser tests/figures/test_attention_view.py tests/reporting/test_report_browser.py

# Sweeps on a Ray cluster of two nodes and through submitit, all on this machine.
test-engines: $(VENV)/.engines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/sweeping/test_engines.py

# Runs every notebook as it is; its source in percent format is kept beside it.
notebooks: $(VENV)/.test
	$(BIN)/melens models get smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -o addopts= -m notebooks tests/test_notebooks.py tests/figures/test_shown_figures.py

# Examples, Python, tables and figures of the pages again: they must give what stands there.
examples: $(VENV)/.test
	$(BIN)/melens models get smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python experiments/make_examples.py --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m examples tests/test_docs.py

# The docs as a site in runs/site, warnings as errors.
docs: $(VENV)/.docs
	$(BIN)/zensical build --strict -f mkdocs.yml

# HookedTransformer lives in TransformerLens 3.9, which cannot share an environment with 4.3.
test-hooked: .interop/hooked/.test
	.interop/hooked/bin/python -m pytest -m hooked tests/test_hooked.py

# The blocks of docs/sidecar.md in the libraries that they are of (400 MB beside $(VENV), two minutes), and recipes
# in the tools that they are for. Not made here, as they are large: .interop/vllm/.test and .interop/sglang/.test.
test-interop: $(LIBRARIES:%=.interop/%/.test) $(TOOLS:%=.interop/%/.test)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m interop tests/exporting/test_interop.py tests/quantising

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

all: check test test-weights test-shapes test-engines notebooks examples docs test-browser test-hooked demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile $(PIN) -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile $(PIN) -e '.[test]'
	touch $@ $(VENV)/.run

# The extra alone: melens itself is there, and may be running.
$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-compile \
	  "$$(sed -n 's/^docs = \["\(.*\)"\]$$/\1/p' pyproject.toml)"
	touch $@

# The extras alone: melens itself is there, and may be running.
$(VENV)/.engines: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-compile \
	  $$(sed -n 's/^\(ray\|slurm\) = \["\(.*\)"\]$$/\2/p' pyproject.toml)
	touch $@

# A layer over $(VENV): what a library needs and $(VENV) has is not installed again, and what stands
# in both is the library's (TransformerLens 3.9 for SAELens, of which pip complains for melens). An editable melens is seen from the root alone.
.interop/%/.test: Makefile | $(VENV)/.test
	$(BIN)/python -m venv --clear .interop/$*
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  $$(.interop/$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	.interop/$*/bin/python -m pip install --quiet --no-compile $(NEEDS)
	touch $@

.interop/hooked/.test: NEEDS = --no-deps transformer-lens==3.9.0 better-abc==0.0.3
.interop/saelens/.test: NEEDS = sae-lens==6.54.12
.interop/sparsify/.test: NEEDS = eai-sparsify==1.3.3
.interop/nnsight/.test: NEEDS = nnsight==0.8.1
# Its buffer stops a trace as nnsight 0.3 does. That asks for torchvision, whose build on PyPI does
# not fit the CPU build of torch; neither library needs it here.
.interop/dictionary_learning/.test: NEEDS = --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 \
  diffusers==0.42.1 zstandard==0.25.0 python-socketio==5.18.1 python-engineio==4.15.1 \
  simple-websocket==1.1.0 bidict==0.24.1
.interop/llmcompressor/.test: NEEDS = --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru \
  nvidia-ml-py auto-round==0.15.1
.interop/torchao/.test: NEEDS = --no-deps torchao==0.18.0
.interop/bitsandbytes/.test: NEEDS = --no-deps bitsandbytes==0.50.2
.interop/gptqmodel/.test: NEEDS = --no-deps gptqmodel==7.7.0 pypcre tokenicer logbar device-smi defuser threadpoolctl
.interop/vllm/.test: NEEDS = --no-deps vllm==0.30.0 cloudpickle msgspec cachetools blake3 pyzmq py-cpuinfo \
  prometheus_client partial-json-parser cbor2 openai_harmony openai pybase64 uvloop fastapi starlette xgrammar \
  apache-tvm-ffi llguidance
.interop/sglang/.test: NEEDS = --no-deps sglang==0.5.23 msgspec orjson pybase64 triton starlette

clean:
	rm -rf $(VENV) .venv-hooked .interop runs
