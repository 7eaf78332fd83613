"""The one place that builds components: look the key up, hand over the settings, no logic."""

from wmtp.factory.component_factory import ComponentFactory, padding_multiple

__all__ = ["ComponentFactory", "padding_multiple"]
