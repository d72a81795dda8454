"""Qwen2Tokenizer as MindFormers wants its tokenizers: one of its own classes, registered by name."""

from __future__ import annotations

import functools
from typing import Any, Optional, Sequence

from mindformers.models import tokenization_utils
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from . import tokenizer
from .tokenizer import ROLES
from .tokenizer_config import AddedToken, default_template

_plain = tokenizer.Qwen2Tokenizer


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class Qwen2Tokenizer(tokenization_utils.PreTrainedTokenizer, _plain):
    """MindFormers' interface first, the plain tokenizer beneath; where both have a method, the exact one is named here.

    MindFormers' Trainer and pipelines check for their own type. Ids, texts and chat prompts are the plain tokenizer's;
    the rest of MindFormers' interface (text pairs, strides, `encode_plus`, `add_tokens`) is MindFormers' code above it.
    """

    vocab_files_names = _plain.vocab_files_names
    model_input_names = _plain.model_input_names

    from_pretrained = _plain.__dict__["from_pretrained"]
    vocab_size, __len__, get_vocab = _plain.vocab_size, _plain.__len__, _plain.get_vocab
    tokenize, encode_batch = _plain.tokenize, _plain.encode_batch
    convert_tokens_to_ids, convert_ids_to_tokens = _plain.convert_tokens_to_ids, _plain.convert_ids_to_tokens
    convert_tokens_to_string = _plain.convert_tokens_to_string
    decode, batch_decode, apply_chat_template = _plain.decode, _plain.batch_decode, _plain.apply_chat_template
    save_vocabulary, save_pretrained = _plain.save_vocabulary, _plain.save_pretrained
    all_special_tokens, all_special_ids = _plain.all_special_tokens, _plain.all_special_ids
    __repr__, __reduce__ = _plain.__repr__, _plain.__reduce__

    def __init__(self, vocab_file: str, merges_file: str, **options: Any):
        roles, extra = self._load(vocab_file, merges_file, options)
        specials = {role: _flagged(AddedToken(content)) for role, content in roles.items() if content}
        given = {name: value for name, value in options.items() if name not in ROLES and name not in (
            "added_tokens_decoder", "additional_special_tokens", "chat_template", "clean_up_tokenization_spaces")}
        super().__init__(**{
            **given, **specials, "additional_special_tokens": [_flagged(AddedToken(token)) for token in extra],
            "added_tokens_decoder": {index: _flagged(token) for index, token in self._added.items()},
            "chat_template": default_template(options.get("chat_template"), vocab_file),
            "clean_up_tokenization_spaces": False})

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        added = super()._add_tokens(new_tokens, special_tokens)
        for index, token in self._added_tokens_decoder.items():
            self._added[index] = AddedToken(token.content, bool(token.special))
        self._index_added()
        self.padded_vocab_size = max(self.padded_vocab_size, self._size)
        return added

    def encode(self, text: Any, text_pair: Any = None, *, control_tokens: Optional[bool] = None, **options: Any) -> Any:
        """Ids of a text, or of two; `control_tokens` as in the plain tokenizer, everything else as in MindFormers."""
        if text_pair is None and not options and isinstance(text, str):
            return _plain.encode(self, text, control_tokens=control_tokens)
        theirs = tokenization_utils.PreTrainedTokenizer.encode
        return theirs(self, text, text_pair, control_tokens=control_tokens, **options)

    def _encode_plus(self, text: Any, text_pair: Any = None, control_tokens: Optional[bool] = None,
                     **options: Any) -> Any:
        encode = functools.partial(self._ids_of, control_tokens=control_tokens)
        return super()._encode_plus(encode(text), encode(text_pair), **options)

    def _batch_encode_plus(self, batch_text_or_text_pairs: Any, control_tokens: Optional[bool] = None,
                           is_split_into_words: bool = False, **options: Any) -> Any:
        batch = list(batch_text_or_text_pairs)
        if all(isinstance(text, str) for text in batch):
            rows = self.encode_batch(batch, control_tokens=control_tokens)
            batch = [(row or "", None) for row in rows]
        elif not is_split_into_words:
            batch = [tuple(self._ids_of(text, control_tokens) for text in pair) if isinstance(pair, (list, tuple))
                     and len(pair) == 2 and isinstance(pair[0], str) else pair for pair in batch]
        return super()._batch_encode_plus(batch, is_split_into_words=is_split_into_words, **options)

    def _ids_of(self, text: Any, control_tokens: Optional[bool]) -> Any:
        # MindFormers takes ids as they are; an empty text it wants as text.
        return _plain.encode(self, text, control_tokens=control_tokens) if isinstance(text, str) and text else text


def _flagged(token: AddedToken) -> Any:
    return tokenization_utils.AddedToken(token.content, lstrip=False, rstrip=False, normalized=False,
                                         special=token.special)
