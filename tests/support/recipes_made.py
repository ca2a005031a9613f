"""Quantisations made by hand: which protections help which schemes, by how much."""

from __future__ import annotations

import json

WEIGHTED = ["w8a8-tensor", "w8a8-static", "w8a8-token", "fp8-static", "fp8-token", "w8a16",
            "w4a16", "w4a4"]  # fmt: skip
KEPT = "model.layers.1.mlp.down_proj"


def score(value, interval=None):
    return {"value": value, "interval": interval}


def delta(value, width=0.0):
    return {"value": value, "interval": [value - width, value + width], "paired": True}


def trial(name, damage, *, role="protected", beyond=None, modules=(), weights=()):
    return {
        "name": name, "role": role, "control_of": None, "seed": None, "tokens": 0,
        "weights": list(weights), "modules": list(modules), "bits": None,
        "loss": score(3.0), "damage": delta(damage, 0.01), "kl": score(0.1),
        "agreement": score(0.9), "bought": None, "share": None,
        "beyond_random": None if beyond is None else delta(beyond, 0.05),
    }  # fmt: skip


def scheme(name, damage=1.0, **trials):
    made = [trial("as is", damage, role="as is")]
    made += [trial(key.replace("_", "-"), damage / 2, **given) for key, given in trials.items()]
    return {"scheme": name, "about": "", "passes": 1, "unrounded": [], "trials": made}


def linear(name, inputs=64, group=64, kind="Linear"):
    return {"name": name, "kind": kind, "inputs": inputs, "group": group}


LLAMA = [
    *(linear(f"model.layers.*.self_attn.{x}_proj.weight", 32, 32) for x in "qkvo"),
    *(linear(f"model.layers.*.mlp.{x}_proj.weight", 32, 32) for x in ("gate", "up")),
    linear("model.layers.*.mlp.down_proj.weight"),
]
"""Of the tiny Llama of the tests, as :func:`test_the_layers_are_named_as_transformers_does` has."""


def quantisation(*schemes, **given):
    from melens.results.quantise import Quantisation

    run = {
        "model": "tiny llama", "model_revision": None, "weights": "0", "dtype": "bfloat16",
        "device": "cpu", "seed": 0, "settings": {"bos": True, "sequences": 8, "length": 128},
        "command": "", "versions": {}, "git": None, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    made = {
        "schema": "melens/quantise/1", "kind": "quantise", "base_loss": score(2.0), "texts": 8,
        "tokens": 1000, "massive_tokens": 8, "calibration_texts": 2, "me_layer": 1, "n_layers": 12,
        "prefix": [1], "left_out": [], "schemes": schemes, "model_type": "llama", "linear": LLAMA,
        "whole": ["lm_head"], "run": run,
    }  # fmt: skip
    return Quantisation.from_json(json.dumps(made | given))


def helping(names, **given):
    """A result in which leaving out the ME Layer's down projection helps every scheme."""
    kept = {"beyond": 0.3, "modules": [KEPT]}
    return quantisation(*(scheme(name, me_layers=kept) for name in names), **given)


def of_tool(result, tool):
    from melens.quantising.recipe import recipes

    return {one.scheme: one for one in recipes(result) if one.tool == tool}
