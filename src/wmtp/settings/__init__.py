"""Settings: the two schemas (`Config`: where it runs, `Recipe`: what is run), loader, documentation."""

from wmtp.settings.config import Config
from wmtp.settings.recipe import Recipe

__all__ = ["Config", "Recipe"]
