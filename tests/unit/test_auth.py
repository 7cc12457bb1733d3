"""pinnace/auth.py: which lines of --api_key_file are keys, and which stop the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from pinnace.auth import Authenticator
from pinnace.errors import ConfigurationError, Unauthenticated
from pinnace.settings import Settings


def make_authenticator(tmp_path: Path, content: bytes) -> Authenticator:
    file = tmp_path / "keys"
    file.write_bytes(content)
    return Authenticator(Settings(api_key_file=file))


def accepts(authenticator: Authenticator, key: str) -> bool:
    try:
        authenticator.check(f"Bearer {key}", has_certificate=False)
    except Unauthenticated:
        return False
    return True


@pytest.mark.parametrize(
    "content",
    [
        b"first\nsecond#2\n",
        b"first\r\nsecond#2",
        b"\xef\xbb\xbffirst\n\n \t\n  second#2\t\n\n",
        b"# the keys\nfirst\n  # of a second, caf\xe9 \x1b\nsecond#2\n",
        b"first\nsecond#2\nfirst\n",
    ],
)
def test_each_line_that_is_no_comment_is_a_key(content: bytes, tmp_path: Path) -> None:
    authenticator = make_authenticator(tmp_path, content)

    assert [key for key in ("first", "second#2") if accepts(authenticator, key)] == ["first", "second#2"]
    for word in ("", "#", "the", "keys", "of", "second", "# the keys", "\ufefffirst"):
        assert not accepts(authenticator, word)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"secret words", "a key must not contain a blank"),
        (b"secret\tword", "a key must not contain a blank"),
        (b"secret # comment", "a key must not contain a blank"),
        (b"Bearer secret", "a key must not contain a blank"),
        (b"secr\xc3\xa9t", "a key must be of visible ASCII characters"),
        (b"secret\x00", "a key must be of visible ASCII characters"),
        (b"secret\x7f", "a key must be of visible ASCII characters"),
        ("\ufeffsecret".encode("utf-16-le"), "a key must be of visible ASCII characters"),
    ],
)
def test_a_line_that_is_no_key_stops_the_start_and_is_named_by_its_number(
    line: bytes, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_authenticator(tmp_path, b"# comment\n\nfirst\n" + line + b"\n")

    assert str(caught.value) == f"--api_key_file={tmp_path}/keys, line 4: {problem}"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# key\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_key_stops_the_start(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="contains no key"):
        make_authenticator(tmp_path, content)
