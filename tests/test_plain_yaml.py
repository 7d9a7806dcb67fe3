"""YAML files of settings: scalars are texts, no file takes long, and a fault is one line."""

import os
import random

import pytest

from moco_isl.errors import BadInput
from moco_isl.run import plain_yaml

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi")
)


@pytest.fixture
def read(tmp_path):
    def of(content):
        path = tmp_path / "a.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return plain_yaml.read(path, "--config")

    return of


@pytest.mark.parametrize(
    "written", "off on yes No true 1e-3 010 0x1f 1_000 1:30 2024-01-01 .inf .nan = << none".split()
)
def test_a_scalar_is_the_text_that_stands_there(read, written):
    found = read(f"a: {written}\nb: ['{written}', {written}]")
    assert found == {"a": written, "b": [written, written]}


def test_null_is_none_and_a_quoted_null_a_text(read):
    found = read("a:\nb: ~\nc: null\nd: ''\ne: 'null'")
    assert found == {"a": None, "b": None, "c": None, "d": "", "e": "null"}
    assert read("") is read("# nothing") is read("---") is None


def test_what_people_write_is_read(read):
    found = read("- a # why\n- {b: [1, 2], c: 'x y'}\n- |\n  two\n  lines\n")
    assert found == ["a", {"b": ["1", "2"], "c": "x y"}, "two\nlines\n"]
    assert read("1: a\nnull: b") == {"1": "a", "null": "b"}


WRONG = {
    LAUGHS: "line 1: anchors (&) and aliases (*) are not taken",
    "a: *b": "line 1: anchors (&) and aliases (*) are not taken",
    "a: &b c": "anchors (&)",
    "a: !!python/object/apply:os.getpid []": "line 1: tags (!) are not taken",
    "a: 1\nb: 2\na: 3": "line 3: 'a' stands there twice",
    "[a]: 1": "a list or a mapping as a name: expected a text",
    "? {a: 1}\n: 1": "a list or a mapping as a name",
    "a: b: c": "line 1: mapping values are not allowed here",
    "a: [1": "line 1: ",
    "a: 1\n---\nb: 2": "line 2: a second document (---): expected one",
    "[" * 100_000: "it goes deeper than 20 levels",
    "{a: " * 100_000: "it goes deeper than 20 levels",
    'a: "\\UFFFFFFFF"': "cannot read --config",
    "%YAML " + "9" * 5000 + ".1\n---\na": "cannot read --config",
    "a: \0": "unacceptable character #x0000",
    b"\xff\xfe": "is not UTF-8 text: expected a YAML file",
    b"#" * (2 << 20): "has more than 1048576 bytes: expected a YAML file",
}


@pytest.mark.parametrize("content, said", WRONG.items(), ids=range(len(WRONG)))
def test_anything_else_is_one_line(read, content, said):
    with pytest.raises(BadInput) as caught:
        read(content)
    line = str(caught.value)
    assert said in line and "--config '" in line and "\n" not in line and len(line) < 400


def test_only_a_regular_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path, "is a folder"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(BadInput, match=said):
            plain_yaml.read(path)


def test_a_damaged_file_is_read_or_refused(read):
    """200 texts, each with some bytes changed, cut or put in."""
    draw = random.Random(0)
    whole = (
        b"script: pretrain\nbase: {mlp: true, lr: 1e-3, 'a\\n': \"\\u00e9\"}\npoints:\n- {name: a,"
        b" seed: 1}\n- name: |\n    b\n"
    )
    refused = 0
    for _ in range(200):
        text = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            i = draw.randrange(len(text))
            signs = b"{}[]&*!|>'\"%@`:-?,# \n\t\\\0\xffa1"
            put_in = draw.choices(signs, k=draw.randint(0, 3))
            text[i : i + draw.randint(0, 3)] = bytes(put_in)
        try:
            read(bytes(text))
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 200
