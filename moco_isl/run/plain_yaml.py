"""YAML files that people write, read as names, lists and texts: every value is what stands there.

PyYAML's events are used, not its loaders: these turn `off` into False and expand aliases, by which
a small file can fill the memory.
"""

import os

import yaml

from moco_isl import files
from moco_isl.errors import BadInput, first_line

MOST = 1 << 20  # bytes; a file of settings has a few thousand
DEEP = 20  # levels of nesting; a sweep has four
NULLS = {"", "~", "null", "Null", "NULL"}

Value = str | list | dict | None


def read(path: str | os.PathLike, flag: str = "", expected: str = "a YAML file") -> Value:
    """The content of a YAML file: a text, a list, a dict named by texts, or None.

    None stands for null and for an empty file. Every other scalar is the text in the file: `off` is
    "off", `1e-3` is "1e-3", `010` is "010". flag: what gave the path. Raises BadInput for what is
    no regular UTF-8 file of at most 1 MiB or no YAML, and for anchors, aliases, tags, a name twice,
    a name that is no text, and more than 20 levels.
    """
    text = files.read_text(path, flag, expected, MOST)
    try:
        return _document(_Events(text))
    except yaml.YAMLError as error:
        reason = _reason(error)
    except (ValueError, OverflowError) as error:  # escapes such as \UFFFFFFFF, unchecked by PyYAML
        reason = str(error)
    what = f"cannot read {files.named(flag, path)}: {files.shown(reason)}"
    raise BadInput(f"{what}; expected {expected}")


def _reason(error: yaml.YAMLError) -> str:
    """PyYAML's reason and its line number, without the lines of the file that PyYAML quotes."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or first_line(error))


class _Events:
    """The events of a YAML text, one by one."""

    def __init__(self, text: str):
        self.parser = yaml.BaseLoader(text)

    def take(self) -> yaml.Event:
        event = self.parser.get_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _wrong(event, "anchors (&) and aliases (*) are not taken: write the value out")
        if getattr(event, "tag", None):
            raise _wrong(event, "tags (!) are not taken: write the value alone")
        return event

    def next_is(self, kind: type) -> bool:
        return self.parser.check_event(kind)


def _document(events: _Events) -> Value:
    events.take()  # the stream's start
    if events.next_is(yaml.StreamEndEvent):
        return None
    events.take()  # the document's start
    value = _value(events, events.take(), 0)
    events.take()  # the document's end
    if not events.next_is(yaml.StreamEndEvent):
        raise _wrong(events.take(), "a second document (---): expected one")
    return value


def _value(events: _Events, event: yaml.Event, depth: int) -> Value:
    """The value that begins with `event`."""
    if depth > DEEP:
        raise _wrong(event, f"it goes deeper than {DEEP} levels")
    if isinstance(event, yaml.ScalarEvent):
        is_plain = event.style is None  # without quotes
        return None if is_plain and event.value in NULLS else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        values = []
        while not events.next_is(yaml.SequenceEndEvent):
            values.append(_value(events, events.take(), depth + 1))
        events.take()
        return values
    named = {}
    while not events.next_is(yaml.MappingEndEvent):
        key = events.take()
        if not isinstance(key, yaml.ScalarEvent):
            raise _wrong(key, "a list or a mapping as a name: expected a text")
        if key.value in named:
            raise _wrong(key, f"'{key.value}' stands there twice")
        named[key.value] = _value(events, events.take(), depth + 1)
    events.take()
    return named


def _wrong(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
