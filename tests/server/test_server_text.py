"""Text comes in whole characters, is all of it, and ends in front of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sssd.hf.text import Piece, TextStream


def by_bytes():
    """Bytes as tokens, and some longer ones that end within characters."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    parts = [bytes([byte]) for byte in range(256)] + [
        b"ab",
        b"\xe2\x82",
        b"\x82\xac",
        b" a",
        "é".encode() + b"\xf0\x9f",
    ]
    vocab = {"".join(letters[byte] for byte in part): i for i, part in enumerate(parts)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def by_words():
    """Words with the space in front, of which the first loses it; bytes where there is no word."""
    words = ["</s>", "▁", "▁one", "▁two", "s", "!", "▁é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return _wrapped(tokenizer)


def _wrapped(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = [by_bytes(), by_words()]


def tokens_of(tokenizer, broken):
    """Ids of any tokens and the bytes of whole characters, with bytes that make none if ``broken``."""
    words = tokenizer is TOKENIZERS[1]
    first = tokenizer.convert_tokens_to_ids("<0x00>") if words else 0
    characters = st.sampled_from("€😀éa").map(lambda letter: [first + byte for byte in letter.encode()])
    last = len(tokenizer) - 1 if broken else 6
    tokens = st.one_of(st.integers(0, last), st.integers(0, 6)).map(lambda token: [token])
    parts = st.lists(st.one_of(tokens, characters), max_size=16)
    return parts.map(lambda parts: [token for part in parts for token in part])


def streamed(tokenizer, tokens, stops=()):
    """What comes, piece by piece, and whether a stop string was found."""
    stream, pieces = TextStream(tokenizer, stops), []
    for i, token in enumerate(tokens):
        pieces.append(stream.add(Piece(token, "", False), last=i + 1 == len(tokens)))
        if stream.stopped:
            break
    return pieces, stream.stopped


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(TOKENIZERS))
def test_pieces_are_the_whole_text(data, tokenizer):
    tokens = data.draw(tokens_of(tokenizer, broken=tokenizer is TOKENIZERS[0]))
    pieces, stopped = streamed(tokenizer, tokens)
    flat = [piece for part in pieces for piece in part]
    assert "".join(piece.text for piece in flat) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert [piece.token for piece in flat] == tokens
    assert not stopped


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("ab é€"), max_size=30),
    st.lists(st.text("ab é€", min_size=1, max_size=3), max_size=3),
)
def test_text_ends_in_front_of_the_first_stop_string(letters, stops):
    tokenizer = TOKENIZERS[0]
    letters = "".join(letters)
    tokens = [byte for letter in letters for byte in letter.encode()]
    pieces, stopped = streamed(tokenizer, tokens, stops)
    # a string counts when its last character is there, the earliest beginning first
    end = min((letters.index(stop) + len(stop) for stop in stops if stop in letters), default=None)
    expected = (
        letters
        if end is None
        else letters[: min(letters[:end].index(s) for s in stops if s in letters[:end])]
    )
    assert "".join(piece.text for part in pieces for piece in part) == expected
    assert stopped == (end is not None)
    # what has come is never taken back: whatever was out lies in the text
    out = ""
    for part in pieces:
        out += "".join(piece.text for piece in part)
        assert expected.startswith(out)


def test_text_waits_no_longer_than_it_must():
    tokenizer = TOKENIZERS[0]
    stream = TextStream(tokenizer, ["abc"])
    shown = [
        "".join(piece.text for piece in stream.add(Piece(ord(letter), "", False))) for letter in "xabxab"
    ]
    assert shown == ["x", "", "", "abx", "", ""]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "words"])
def test_characters_come_whole(tokenizer):
    first = tokenizer.convert_tokens_to_ids("<0x00>") if tokenizer is TOKENIZERS[1] else 0
    stream = TextStream(tokenizer)
    shown = [
        "".join(piece.text for piece in stream.add(Piece(first + byte, "", False))) for byte in "€😀".encode()
    ]
    assert shown == ["", "", "€", "", "", "", "😀"]
