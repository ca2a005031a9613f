"""Loading, named models, hook-site names, and what a block is made of."""

from melens.models.anatomy import FAMILIES, Family, anatomy, gains
from melens.models.contract import check_contract
from melens.models.loading import load, load_plain
from melens.models.named import NAMED, NamedModel, accept_licence, fetch, forget, on_this_machine
from melens.models.origin import Origin, fingerprint, origin_of

__all__ = [
    "FAMILIES",
    "NAMED",
    "Family",
    "NamedModel",
    "Origin",
    "accept_licence",
    "anatomy",
    "check_contract",
    "fetch",
    "fingerprint",
    "forget",
    "gains",
    "load",
    "load_plain",
    "on_this_machine",
    "origin_of",
]
