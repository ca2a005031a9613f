"""quantise(): loss under number formats, with what melens knows kept whole, and with controls."""

from melens.quantising.bench import Protect
from melens.quantising.run import quantise
from melens.quantising.schemes import DEFAULT, SCHEMES

__all__ = ["DEFAULT", "SCHEMES", "Protect", "quantise"]
