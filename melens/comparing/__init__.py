"""Two models, or two saved results, side by side: did the massive activation change?"""

from melens.comparing.differences import diff
from melens.comparing.sides import Side
from melens.comparing.tolerances import Tolerances

__all__ = ["Side", "Tolerances", "diff"]
