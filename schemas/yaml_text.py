"""YAML that people write: read strictly, every mistake with its line and never with a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError
from schemas.mistakes import first_causes, in_words, keys_beside

#: Turns pydantic's place of a mistake into the keys that lead there in the text.
PlaceOf = Callable[[Sequence[int | str]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class YamlText:
    """What a text says, and where it says it."""

    where: str  # the file, for people
    raw: Any
    root: yaml.Node | None

    def mistakes(
        self,
        error: ValidationError,
        *,
        whole: str,
        model: type[BaseModel] | None = None,
        place_of: PlaceOf | None = None,
    ) -> ConfigError:
        """Make one line for each mistake; values are not quoted, one may be a misplaced secret."""
        lines = []
        for mistake in first_causes(error.errors(include_input=False, include_url=False)):
            loc = mistake["loc"]
            place = [str(part) for part in loc] if place_of is None else place_of(loc)
            text = in_words(mistake, keys_beside(model, loc) if model is not None else ())
            lines.append(f"{self.where}:{self._line(place)}: {'.'.join(place) or whole}: {text}")
        return ConfigError("\n".join(lines))

    def said(self, mistakes: Sequence[tuple[Sequence[str], str]]) -> ConfigError:
        """Make one line for each mistake that a document's reader has found, by its place."""
        return ConfigError(
            "\n".join(
                f"{self.where}:{self._line(place)}: {'.'.join(place)}: {text}"
                for place, text in mistakes
            )
        )

    def _line(self, place: Sequence[str]) -> int:
        """Follow the place through the nodes as far as it goes."""
        line, node = 1, self.root
        for part in place:
            if isinstance(node, yaml.SequenceNode) and part.isdecimal():
                node = node.value[int(part)]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == part:
                        line, node = key.start_mark.line + 1, value
                        break
                else:
                    break
            else:
                break
        return line


class _WithoutAliases(yaml.SafeLoader):
    """Aliases can make a small text huge; a text that somebody else wrote does without."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)


def read(text: str, where: str, *, aliases: bool = True) -> YamlText:
    """Read a text; ConfigError names place and line of what is no YAML, or stands there twice."""
    loader = yaml.SafeLoader if aliases else _WithoutAliases
    try:
        root = yaml.compose(text, Loader=loader)
        if root is not None:
            _refuse_repeated_keys(where, root)
        raw = yaml.load(text, Loader=loader)  # noqa: S506 - both are safe loaders
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError:  # without a mark: a character that YAML does not take
        raise ConfigError(f"{where}: not YAML: it holds a control character") from None
    except (RecursionError, ValueError):
        raise ConfigError(
            f"{where}: not YAML: it is nested too deep, or holds a day that there is not"
        ) from None
    return YamlText(where, raw, root)


def _refuse_repeated_keys(where: str, node: yaml.Node) -> None:
    """YAML keeps the last of two equal keys silently; a duplicate name must not vanish."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_keys(where, child)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigError(
                f"{where}:{key.start_mark.line + 1}: {key.value} stands here twice; remove one"
            )
        seen.add(key.value)
        _refuse_repeated_keys(where, value)
