"""Two models, or two saved results, side by side: did the massive activation change?"""

from melens.comparing.differences import diff
from melens.comparing.rows import Tolerances
from melens.comparing.sides import Side

__all__ = ["Side", "Tolerances", "diff"]
