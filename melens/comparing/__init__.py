"""Models side by side: did the massive activation change, and where is it in all of them?"""

from melens.comparing.differences import diff
from melens.comparing.rows import Tolerances
from melens.comparing.sides import Side
from melens.comparing.surveying import Survey, census

__all__ = ["Side", "Survey", "Tolerances", "census", "diff"]
