"""An SAE's settings as SAELens' users look at them: `sae.cfg.k`, `sae.cfg.metadata.hook_name`."""

from __future__ import annotations

from typing import Any


class SAECfg(dict[str, Any]):
    """An SAE's settings by SAELens' names. Keys are attributes too, and so are those of `metadata`.

    Versions of SAELens before 6 had the hook and the model among the settings, and later ones have them in `metadata`.
    """

    __slots__ = ()

    def __missing__(self, key: str) -> Any:
        return self.get("metadata", {})[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = ", ".join((*self, *self.get("metadata", {})))
            raise AttributeError(f"SAE.cfg: has {known}, got {name}; take one of these") from None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and texts."""
        return {**self, "architecture": str(self["architecture"]), "metadata": self["metadata"].to_dict()}


class SAEMetadata(dict[str, Any]):
    """What is known of an SAE beside its settings. Keys are attributes too. As in SAELens, an unknown one is None."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for methods
            raise AttributeError(name)
        return self.get(name)

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dict."""
        return dict(self)


class ArchitectureName(str):
    """The name of an architecture. Calling it gives the name too: SAELens 6 has a method where 5 had a text."""

    __slots__ = ()

    def __call__(self) -> str:
        return str(self)
