"""Opening and reading control files: what is in the place of a file, and its limits."""

from __future__ import annotations

import errno
import json
import os
import socket

import pytest

from diffmoe_ds import control_files
from diffmoe_ds.cli import main
from diffmoe_ds.control_files import open_regular, parse_json, read_json, read_lines, read_text
from diffmoe_ds.data.sources.cache import locked

pytestmark = pytest.mark.usefixtures("hang_limit")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("text")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "device", "socket", "a\0b"):
            with pytest.raises(OSError) as caught:
                open_regular(tmp_path / name)
            assert caught.value.errno == (errno.ENXIO if name == "socket" else errno.EINVAL) and caught.value.strerror
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    assert read_text(tmp_path / "link") == "text"
    file = open_regular(tmp_path / "file")
    assert not os.get_inheritable(file.fileno())
    file.close()


def test_files_have_a_size_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_json(tmp_path / "file", 5) == 12345
    with pytest.raises(OSError, match="larger than the limit of 4 bytes"):
        read_json(tmp_path / "file", 4)
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError):
        read_text(tmp_path / "file")


@pytest.mark.parametrize("text", ("1e999", "-1e999", "NaN", "-Infinity", "9" * 20, "9" * 5000, "-9223372036854775809"))
def test_numbers_are_bounded(text):
    with pytest.raises(ValueError, match=r"is not a (finite number|JSON number|64-bit integer)"):
        parse_json(f'{{"a": [{text}]}}')


@pytest.mark.parametrize("value", (2**64 - 1, -(2**63), 1.7e308, -0.0, "9" * 30, "\ud800", {"a": [None, True]}, []))
def test_values_are_kept(value):
    assert parse_json(json.dumps(value)) == value


def test_nesting_is_bounded():
    limit = control_files.MAX_DEPTH
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        assert parse_json(opening * limit + "1" + closing * limit)
        for depth in (limit + 1, 900, 200_000):
            with pytest.raises(ValueError, match="nested more than 32 levels deep"):
                parse_json(opening * depth + "1" + closing * depth)
    with pytest.raises(ValueError, match="more than 524,288 objects and lists"):
        parse_json("[" + "[]," * control_files.MAX_NODES + "1]")
    with pytest.raises(ValueError, match="more than 600,000 values"):
        parse_json("[" + "1," * control_files.MAX_VALUES + "1]")


def test_long_lines_are_skipped(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"a\r\n" + b"x" * 100 + b"\nb\n\xff\nlast")
    assert list(read_lines(path, 10)) == ["a", "b", "\ufffd", "last"]


def test_a_lock_follows_no_link_and_waits_for_no_pipe(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "link.lock").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe.lock")
    with pytest.raises(OSError), locked(tmp_path / "link.lock"):
        pass
    with locked(tmp_path / "pipe.lock"):
        pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize(
    ("command", "message"),
    (
        ("sample --checkpoint x --out y --num-images 1000000000000000000", "--num-images must be at most 10,000,000"),
        ("sample --checkpoint x --out y --steps 1000000000000", "--steps must be at most 100,000"),
        ("sample --checkpoint x --out y --batch-size 1000000000000", "--batch-size must be at most 65,536"),
        ("sample --checkpoint x --out y --per-class 1000000000000", "--per-prompt must be at most 10,000,000"),
        ("plan --world 99999999999", "--world must be at most 1,048,576"),
        ("prepare images --images x --out y --threads 100000", "--threads must be at most 1,024"),
        ("prepare images --images x --out y --size 1000000000", "--size must be at most 16,384"),
        ("train --set model.depth=1e9", "model.depth must be positive and at most 512"),
        ("train --set model.hidden_size=1e12", "model.hidden_size must be positive and at most 65536"),
        ("train --set model.mlp_ratio=1e12", "parameters; at most 1e+12 are possible"),
        ("train --set data.num_workers=1e9", "data.num_workers must be at least 0 and at most 1024"),
        ("train --set run.rank_timeout_s=1.0e+300", "run.rank_timeout_s must be positive and at most 1e+06"),
        ("train --set data.cache_gb=1.0e+308", "data.cache_gb must be positive and at most 1e+09"),
        ("doctor --timeout nan", "--timeout must be positive and at most 1e+06"),
    ),
)
def test_absurd_sizes_are_refused(capsys, command, message):
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
