"""`read_yaml`: a YAML file as plain values. It may be a stranger's, so its size, nesting and aliases are bounded."""

import itertools
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from actcache.arguments import shown
from actcache.errors import ConfigError
from actcache.files import NoFile, opened

MAX_BYTES, MAX_NODES, MAX_NUMBER = 1 << 20, 100_000, 1 << 63


def read_yaml(path: Path) -> object:
    """What a YAML file holds.

    Raises:
        ConfigError: there is no such file, or it is no YAML within the bounds. The error names the file.
        OSError: it cannot be read.
    """
    try:
        with opened(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ConfigError(f"{path}: must have at most {MAX_BYTES:,} bytes; is it a config?")
        return yaml.load(text.decode(), Loader=_Loader)
    except NoFile as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """A loader with the floats of YAML 1.2, in which `3e-4` is a number.

    It refuses a key that stands twice, a small file whose aliases make it large, whole numbers beyond 64 bits, and
    tags, which make a value of another kind of a text. What has a colon is a text, and no number of base 60.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"tag {shown(event.tag)}: leave it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        is_text = kind is yaml.ScalarNode and ":" in (value or "")
        return self.DEFAULT_SCALAR_TAG if is_text else super().resolve(kind, value, implicit)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if not -MAX_NUMBER <= number < MAX_NUMBER:
            said = f"a whole number must be in [-2**63, 2**63), got {shown(node.value)}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return number

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None and _n_nodes(root, {}) > MAX_NODES:
            said = f"its aliases must come to at most {MAX_NODES:,} values, and to none that holds itself"
            raise yaml.constructor.ConstructorError(None, None, said, root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable):  # another is refused below
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {shown(name)} stands twice", key.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)


def _n_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node comes to when its aliases are written out; infinity if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # as long as it is not known, whoever gets here again is inside of it
        below = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            below = itertools.chain.from_iterable(node.value)
        known[id(node)] = 1.0 + sum(_n_nodes(each, known) for each in below)
    return known[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
