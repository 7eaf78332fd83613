"""The one registry: category -> key -> component class.

A component registers itself where it is defined:

    @trainer_registry.register("baseline-mtp", version="1.0.0", description="uniform weights")
    class BaselineMtpTrainer(...): ...

`registry.register("my-key", category="collator")(MyCollator)` is the same thing said at length. Built-in
components are imported when their category is first asked for; third parties add theirs by an entry point of
the group `wmtp.components`, whose value is a module that registers on import.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final, TypeVar

from wmtp.exceptions import UserInputError

ENTRY_POINT_GROUP: Final = "wmtp.components"

# Importing a category's packages is what registers its built-in components.
_CATEGORY_PACKAGES: Final[dict[str, tuple[str, ...]]] = {
    "loader": ("wmtp.components.loader", "wmtp.components.data"),
    "trainer": ("wmtp.components.trainer",),
    "tokenizer": ("wmtp.components.tokenizer",),
    "optimizer": ("wmtp.components.optimizer",),
    "evaluator": ("wmtp.components.evaluator",),
    "pretrainer": ("wmtp.components.pretrainer",),
    "scorer": ("wmtp.components.scorer",),
    "collator": ("wmtp.components.data",),
}
CATEGORIES: Final = tuple(_CATEGORY_PACKAGES)

ComponentT = TypeVar("ComponentT", bound=type)


@dataclass(frozen=True, slots=True)
class Registration:
    """One registered component: its class and what `wmtp list` says of it."""

    key: str
    category: str
    component: type
    version: str
    description: str


class UnifiedRegistry:
    """Category -> key -> registration. Registering a key twice is an error unless it is the same class."""

    def __init__(self) -> None:
        self._registrations: dict[str, dict[str, Registration]] = {category: {} for category in CATEGORIES}
        self._loaded: set[str] = set()
        self._entry_points_loaded = False

    def register(
        self, key: str, *, category: str, version: str = "1.0.0", description: str = ""
    ) -> Callable[[ComponentT], ComponentT]:
        """Decorator that files a class under `category` and `key`.

        The description defaults to the first line of the class docstring.

        Raises:
            UserInputError: the category is unknown, or another class already has the key.
        """
        self._check_category(category)

        def file(component: ComponentT) -> ComponentT:
            known = self._registrations[category].get(key)
            if known is not None and known.component.__qualname__ != component.__qualname__:
                raise UserInputError(
                    f"{category} key {key!r} is already taken by {known.component.__module__}."
                    f"{known.component.__qualname__}",
                    remedy="register the component under another key",
                )
            text = description or (component.__doc__ or "").strip().split("\n", 1)[0]
            self._registrations[category][key] = Registration(key, category, component, version, text)
            return component

        return file

    def get(self, key: str, *, category: str) -> Registration:
        """The registration of `key`; an unknown key is an error that lists the known ones."""
        self._check_category(category)
        self._load_builtin(category)
        if key not in self._registrations[category]:
            self._load_entry_points()
        known = self._registrations[category]
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserInputError(
                f"unknown {category} {key!r}{hint}",
                remedy=f"known {category} keys: {', '.join(sorted(known)) or 'none'}",
            )
        return known[key]

    def create(self, key: str, config: Any = None, *, category: str) -> Any:
        """Build the component: its class is called with `config` alone."""
        return self.get(key, category=category).component(config)

    def list(self, category: str | None = None) -> list[Registration]:
        """All registrations, or those of one category, sorted by category and key."""
        if category is not None:
            self._check_category(category)
        categories = CATEGORIES if category is None else (category,)
        for name in categories:
            self._load_builtin(name)
        self._load_entry_points()
        return [
            self._registrations[name][key] for name in categories for key in sorted(self._registrations[name])
        ]

    def _check_category(self, category: str) -> None:
        if category not in self._registrations:
            raise UserInputError(
                f"unknown component category {category!r}", remedy=f"categories: {', '.join(CATEGORIES)}"
            )

    def _load_builtin(self, category: str) -> None:
        if category not in self._loaded:
            self._loaded.add(category)
            for package in _CATEGORY_PACKAGES[category]:
                importlib.import_module(package)

    def _load_entry_points(self) -> None:
        if not self._entry_points_loaded:
            self._entry_points_loaded = True
            for entry_point in entry_points(group=ENTRY_POINT_GROUP):
                entry_point.load()


class CategoryRegistry:
    """One category's view of the registry."""

    def __init__(self, registry: UnifiedRegistry, category: str) -> None:
        self._registry = registry
        self.category = category

    def register(
        self, key: str, *, category: str | None = None, version: str = "1.0.0", description: str = ""
    ) -> Callable[[ComponentT], ComponentT]:
        """Decorator; `category` may be repeated for the reader and must then be this view's own."""
        if category is not None and category != self.category:
            raise UserInputError(
                f"cannot register {key!r} with category {category!r} through the {self.category} registry",
                remedy=f"use category={self.category!r}, or the registry of {category!r}",
            )
        return self._registry.register(key, category=self.category, version=version, description=description)

    def get(self, key: str) -> Registration:
        """The registration of `key`; an unknown key is an error that lists the known ones."""
        return self._registry.get(key, category=self.category)

    def create(self, key: str, config: Any = None) -> Any:
        """Build the component: its class is called with `config` alone."""
        return self._registry.create(key, config, category=self.category)

    def keys(self) -> list[str]:
        """The known keys, sorted."""
        return [registration.key for registration in self._registry.list(self.category)]


registry: Final = UnifiedRegistry()
loader_registry: Final = CategoryRegistry(registry, "loader")
trainer_registry: Final = CategoryRegistry(registry, "trainer")
tokenizer_registry: Final = CategoryRegistry(registry, "tokenizer")
optimizer_registry: Final = CategoryRegistry(registry, "optimizer")
evaluator_registry: Final = CategoryRegistry(registry, "evaluator")
pretrainer_registry: Final = CategoryRegistry(registry, "pretrainer")
scorer_registry: Final = CategoryRegistry(registry, "scorer")
collator_registry: Final = CategoryRegistry(registry, "collator")
