"""Qwen2Tokenizer: text to token ids and back, from a checkpoint's vocab.json and merges.txt."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, Optional, Pattern, Sequence, Tuple, Union, cast

from ..errors import UserError
from ..machine import allowed_cpus
from ..whole_file import write_whole
from . import tokenizer_json
from .bpe import BytePairEncoder
from .matching import one_of
from .sharing import SLICE, even_groups, sliced
from .template import CHATML, render
from .tokenizer_config import (
    CONFIG_NAME,
    AddedToken,
    added_tokens,
    check_ids,
    check_options,
    default_template,
    read_config,
    read_template,
    token_content,
    token_contents,
)

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNBOUNDED = int(1e30)  # model_max_length when nobody has set one, as in Hugging Face's and MindFormers' tokenizers
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Model vocabularies are padded for the hardware: to 151936 or 152064 for the 151646 tokens of Qwen1.5. The larger of
# these is the token count rounded up to a multiple of this.
_VOCABULARY_MULTIPLE = 512


class Encoding(dict):
    """`input_ids` and `attention_mask` by key or attribute, as `Qwen2Tokenizer.__call__` gives them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _id_of_role(role: str) -> property:
    def get(self: Qwen2Tokenizer) -> Optional[int]:
        content = getattr(self, role)
        return None if content is None else self.id_of(content)
    get.__doc__ = f"Id of {role}, None without one."
    return property(get)


class Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's rules; ids equal those of Hugging Face's Qwen2Tokenizer and Qwen2TokenizerFast.

    Text is brought to NFC, control tokens in it are matched whole, and the rest is cut and merged (`qwen15.text.bpe`).
    UTF-16 surrogates, which no valid text has, are joined where they make a pair; a lone one becomes U+FFFD, the
    replacement character. (tiktoken does the same; Hugging Face's tokenizers raise UnicodeEncodeError.)

    Args:
        vocab_file: vocab.json, token to id.
        merges_file: merges.txt.
        options: what tokenizer_config.json may hold, each with Hugging Face's meaning: `unk_token`, `eos_token`,
            `pad_token` (`<|endoftext|>` by default), `bos_token` and the other roles, `additional_special_tokens`,
            `added_tokens_decoder`, `chat_template`, `model_max_length`, `padding_side`, `truncation_side`, `errors` (of
            bytes.decode), `split_special_tokens`. Ours: `padded_vocab_size`, the rows of the model's embedding. Other
            keys are kept and saved again.
            Without `added_tokens_decoder` the control tokens are Qwen's three, at their place in vocab.json or, when
            it does not have them, after its last id (151643, 151644, 151645 for Qwen).

    Raises:
        UserError: a file is missing, damaged, swapped with the other or foreign; a control token contradicts
            vocab.json.

    Example:
        >>> tokenizer = Qwen2Tokenizer("vocab.json", "merges.txt")      # doctest: +SKIP
        >>> tokenizer.encode("Hello world<|im_end|>")                   # doctest: +SKIP
        [9707, 1879, 151645]
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    truncation_side = "right"
    is_fast = False

    def __init__(self, vocab_file: str, merges_file: str, **options: Any):
        roles, extra = self._load(vocab_file, merges_file, options)
        for role, content in roles.items():
            setattr(self, role, content)
        self.additional_special_tokens: List[str] = extra
        self.model_max_length = options.get("model_max_length") or UNBOUNDED
        self.padding_side = options.get("padding_side") or "right"
        self.truncation_side = options.get("truncation_side") or "right"
        self.split_special_tokens = bool(options.get("split_special_tokens", False))
        self.chat_template = default_template(options.get("chat_template"), vocab_file)

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_files(cls, vocab_file: str, merges_file: str, options: Optional[Mapping[str, Any]] = None
                   ) -> "Qwen2Tokenizer":
        """A tokenizer from the two files and, beside vocab_file, tokenizer_config.json and chat_template.jinja, if any.

        Both files may be a tokenizer.json, from which the added tokens come as well, unless tokenizer_config.json has
        them. The template in a file of its own goes before that in tokenizer_config.json, as it does in transformers;
        `options` win over both.
        """
        folder = os.path.dirname(os.path.abspath(vocab_file))
        config = read_config(os.path.join(folder, CONFIG_NAME))
        template = read_template(folder)
        if template is not None:
            config["chat_template"] = template
        if config.get("added_tokens_decoder") is None and tokenizer_json.is_one(vocab_file):
            config["added_tokens_decoder"] = tokenizer_json.read(vocab_file).added
        config.update(options or {})
        return cls(vocab_file, merges_file, **config)

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> "Qwen2Tokenizer":
        """A tokenizer from a checkpoint's folder: vocab.json and merges.txt, or tokenizer.json where they are not both
        there, and what `from_files` reads beside them.

        Raises:
            UserError: it is no folder, or a file in it is missing or damaged.
        """
        folder = str(options.pop("pretrained_model_name_or_path", folder))
        if not os.path.isdir(folder):
            raise UserError("is not a folder", folder, "Nothing is downloaded here: give a checkpoint's local folder.")
        files = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
        whole = os.path.join(folder, tokenizer_json.FILE_NAME)
        if os.path.isfile(whole) and not all(map(os.path.isfile, files)):
            files = [whole, whole]
        return cls.from_files(files[0], files[1], options)

    def _load(self, vocab_file: str, merges_file: str, options: Dict[str, Any]
              ) -> Tuple[Dict[str, Optional[str]], List[str]]:
        """Read the files and settle which tokens are matched whole. Gives the roles and the additional specials."""
        for name, path in (("vocab_file", vocab_file), ("merges_file", merges_file)):
            if not isinstance(path, (str, os.PathLike)):
                raise UserError(f"the tokenizer needs {name}, got {path!r}", None,
                                "Give --vocab_file and --merges_file, or set processor.tokenizer in the YAML.")
        self.vocab_file, self.merges_file = str(vocab_file), str(merges_file)
        check_options(options, self.vocab_file)
        self._options = dict(options)
        self.errors = options.get("errors", "replace")
        roles = {role: token_content(options.get(role, END_OF_TEXT if role in ("unk_token", "eos_token", "pad_token")
                                            else None), role, self.vocab_file) for role in ROLES}
        extra = token_contents(options.get("additional_special_tokens"), "additional_special_tokens", self.vocab_file)
        listed = added_tokens(options.get("added_tokens_decoder"), self.vocab_file)
        wanted = [*(() if listed else (END_OF_TEXT, IM_START, IM_END)), *filter(None, roles.values()), *extra]
        known = {token.content: index for index, token in listed.items()}
        self._bpe = BytePairEncoder(self.vocab_file, self.merges_file,
                                    {**dict.fromkeys(wanted), **known}, roles["unk_token"])
        vocab = self._bpe.vocab
        check_ids(listed, len(self._bpe.tokens), self.vocab_file)
        self._added: Dict[int, AddedToken] = {}
        for index, token in listed.items():
            there = self._token_at(index)
            if vocab.get(token.content, index) != index or there not in ("", token.content):
                raise UserError(
                    f"added_tokens_decoder puts {token.content!r} at id {index}, vocab.json has it at "
                    f"{vocab.get(token.content)} and {there!r} at {index}", self.vocab_file,
                    "tokenizer_config.json and vocab.json belong to different models.")
            self._added[index] = token
        next_id = 1 + max([len(self._bpe.tokens) - 1, *self._added])
        for content in dict.fromkeys(wanted):
            place = known.get(content, vocab.get(content))
            self._added[next_id if place is None else place] = AddedToken(content, special=True)
            next_id += place is None
        self._index_added()
        padded = options.get("padded_vocab_size")
        if padded is not None and padded < self._size:
            raise UserError(f"the model has {padded} embedding rows, the tokenizer {self._size} ids", self.vocab_file,
                            "The tokenizer files belong to another model.")
        self.padded_vocab_size: int = padded or -(-self._size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        return roles, extra

    def _index_added(self) -> None:
        """Everything that is derived from the added tokens."""
        self._added_ids = {token.content: index for index, token in self._added.items()}
        self._size = 1 + max([len(self._bpe.tokens) - 1, *self._added])
        self._bytes_by_id: List[bytes] = []
        self.control_token_ids: FrozenSet[int] = frozenset(i for i, token in self._added.items() if token.special)
        self._any_added = one_of(self._added_ids)
        self._any_text_added = one_of(token.content for token in self._added.values() if not token.special)
        self._any_control = one_of(token.content for token in self._added.values() if token.special)

    @property
    def _bytes(self) -> List[bytes]:
        """Per id the bytes it stands for, added tokens included; made when the first token is decoded."""
        if not self._bytes_by_id:
            made = self._bpe.token_bytes + [b""] * (self._size - len(self._bpe.tokens))
            for index, token in self._added.items():
                made[index] = token.content.encode()
            self._bytes_by_id = made
        return self._bytes_by_id

    def _token_at(self, index: int) -> str:
        """The token of vocab.json with this id, "" where it has none."""
        return self._bpe.tokens[index] if 0 <= index < len(self._bpe.tokens) else ""

    def __reduce__(self):
        return functools.partial(type(self), **self._options), (self.vocab_file, self.merges_file)

    # -- sizes and names ----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Tokens in vocab.json, added ones not counted (151643 for Qwen)."""
        return len(self._bpe.vocab)

    def __len__(self) -> int:
        """Tokens in all (151646 for Qwen); a model's embedding may have more rows."""
        return len(self._bpe.vocab) + sum(token.content not in self._bpe.vocab for token in self._added.values())

    def get_vocab(self) -> Dict[str, int]:
        """Token to id, added ones included. A new dictionary."""
        return {**self._bpe.vocab, **self._added_ids}

    def get_added_vocab(self) -> Dict[str, int]:
        """Added token to id, by id."""
        return {self._added[index].content: index for index in sorted(self._added)}

    @property
    def added_tokens_encoder(self) -> Dict[str, int]:
        """Same as `get_added_vocab()`."""
        return self.get_added_vocab()

    @property
    def added_tokens_decoder(self) -> Dict[int, Any]:
        """Id to AddedToken, by id."""
        return {index: self._added[index] for index in sorted(self._added)}

    @property
    def im_start_id(self) -> Optional[int]:
        """Id of `<|im_start|>`, which opens a chat message."""
        return self._added_ids.get(IM_START)

    @property
    def im_end_id(self) -> Optional[int]:
        """Id of `<|im_end|>`, which closes a chat message."""
        return self._added_ids.get(IM_END)

    @property
    def end_of_text_id(self) -> Optional[int]:
        """Id of `<|endoftext|>`."""
        return self._added_ids.get(END_OF_TEXT)

    @property
    def special_tokens_map(self) -> Dict[str, Any]:
        """Role (`eos_token`, ...) to token, for the roles that are filled."""
        roles = {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}
        if self.additional_special_tokens:
            roles["additional_special_tokens"] = list(self.additional_special_tokens)
        return roles

    @property
    def all_special_tokens(self) -> List[str]:
        """The control tokens, by id."""
        return [self._added[index].content for index in self.all_special_ids]

    @property
    def all_special_ids(self) -> List[int]:
        """Ids of the control tokens, ascending."""
        return sorted(self.control_token_ids)

    unk_token: Optional[str]
    bos_token_id, eos_token_id, unk_token_id, sep_token_id, pad_token_id, cls_token_id, mask_token_id = map(
        _id_of_role, ROLES)

    # -- text to ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, control_tokens: Optional[bool] = None, **options: Any) -> List[int]:
        """Ids of `text`.

        Args:
            text: any string.
            control_tokens: whether `<|im_end|>` and the like in the text are control tokens. False keeps what a user
                has typed from steering the model: the characters are then encoded as ordinary text. The default is
                True, or False with `split_special_tokens`. Added tokens that are no control tokens always match.
            options: as for `__call__` (`truncation`, `max_length`, `padding`, `return_tensors`).
        """
        if options:
            return self(text, control_tokens=control_tokens, **options)["input_ids"]
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if len(text) >= 2 * SLICE:
            return self.encode_batch([text], control_tokens=control_tokens)[0]
        return self._encode(text, control_tokens)

    def encode_batch(self, texts: Sequence[str], *, control_tokens: Optional[bool] = None) -> List[List[int]]:
        """Ids of each text, on all processors that this process may use; long texts are shared out in slices."""
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"each text must be a str, got {type(text).__name__}")
        workers = len(allowed_cpus())
        # Threads help because the merging runs without Python's lock; a few short texts are not worth handing over.
        if workers < 2 or sum(map(len, texts)) < 20000 or any("\n" in content for content in self._added_ids):
            return [self._encode(text, control_tokens) for text in texts]
        pieces = [(row, piece) for row, text in enumerate(texts) for piece in sliced(text)]
        with ThreadPoolExecutor(workers) as pool:
            encoded = pool.map(lambda part: [self._encode(piece, control_tokens) for _, piece in part],
                               even_groups(pieces, 4 * workers))
            rows: List[List[int]] = [[] for _ in texts]
            for (row, _), ids in zip(pieces, itertools.chain.from_iterable(encoded)):
                rows[row] += ids
        return rows

    def _encode(self, text: str, control_tokens: Optional[bool]) -> List[int]:
        if control_tokens is None:
            control_tokens = not self.split_special_tokens
        text = _normalized(text)
        added = self._any_added if control_tokens else self._any_text_added
        if added is None:
            return self._bpe.encode(text)
        ids: List[int] = []
        for position, part in enumerate(added.split(text)):
            if position % 2:
                ids.append(self._added_ids[part])
            elif part:
                ids += self._bpe.encode(part)
        return ids

    def split_control(self, text: str) -> List[Union[int, str]]:
        """`text` cut at its control tokens: their ids, and between them the text that is not one (never empty)."""
        if self._any_control is None:
            return [text] if text else []
        return [self._added_ids[part] if position % 2 else part
                for position, part in enumerate(self._any_control.split(text)) if part]

    def tokenize(self, text: str, **options: Any) -> List[str]:
        """The tokens of `text` as they stand in vocab.json (in the byte alphabet: a blank is `Ġ`)."""
        return [self.token_of(index) for index in self.encode(text, control_tokens=options.get("control_tokens"))]

    def convert_tokens_to_ids(self, tokens: Union[str, Sequence[str], None]) -> Union[int, List[int], None]:
        """Id of a token, or ids of several. What is no token gets the id of `unk_token`."""
        if tokens is None:
            return None
        if not isinstance(tokens, str):
            return [self.id_of(token) for token in tokens]  # type: ignore[misc]  # as in Hugging Face's, None stays
        return self.id_of(tokens)

    def id_of(self, token: str) -> Optional[int]:
        """Id of a token, that of `unk_token` for what is none; None where there is no such token either."""
        unknown = self.unk_token
        index = self._added_ids.get(token, self._bpe.vocab.get(token))
        return self.id_of(unknown) if index is None and unknown is not None and token != unknown else index

    def __call__(self, text: Union[str, Sequence[str]], *, control_tokens: Optional[bool] = None,
                 add_special_tokens: bool = True, padding: Union[bool, str] = False,
                 truncation: Union[bool, str, None] = None, max_length: Optional[int] = None,
                 pad_to_multiple_of: Optional[int] = None, return_tensors: Optional[str] = None,
                 return_attention_mask: Optional[bool] = None, **unsupported: Any) -> Encoding:
        """Ids and attention mask of a text or of several.

        Args:
            text: one text, or several.
            control_tokens: as for `encode`.
            add_special_tokens: no effect; Qwen adds no token at either end.
            padding: True or 'longest' pads to the longest text, 'max_length' to `max_length` or `model_max_length`.
            truncation: True cuts to `max_length` or `model_max_length`, at `truncation_side`. Left out, a given
                `max_length` without padding cuts too.
            pad_to_multiple_of: round the padded length up.
            return_tensors: 'np' or 'ms' for int32 arrays (MindFormers' shapes: (L,) for one text, (B, L) for several).
            return_attention_mask: False leaves the mask out.
        """
        _refuse(unsupported)
        single = isinstance(text, str)
        rows = [self.encode(text, control_tokens=control_tokens)] if isinstance(text, str) else \
            self.encode_batch(text, control_tokens=control_tokens)
        if truncation is None:
            truncation = max_length is not None and padding is False
        if truncation not in (False, "do_not_truncate"):
            limit = self.model_max_length if max_length is None else max_length
            left = self.truncation_side == "left"
            rows = [row[max(0, len(row) - limit):] if left else row[:limit] for row in rows]
        encoded = {"input_ids": rows[0] if single else rows}
        return self.pad(encoded, padding=padding, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of,
                        return_tensors=return_tensors, return_attention_mask=return_attention_mask)

    def pad(self, encoded: Union[Mapping[str, Any], Sequence[Mapping[str, Any]]], padding: Union[bool, str] = True,
            max_length: Optional[int] = None, pad_to_multiple_of: Optional[int] = None,
            return_tensors: Optional[str] = None, return_attention_mask: Optional[bool] = None, **unsupported: Any
            ) -> Encoding:
        """Bring the rows of `encoded["input_ids"]` to one length with `pad_token` and make the attention mask.

        A single empty text stays empty, as in Hugging Face's and MindFormers' tokenizers.
        """
        _refuse(unsupported)
        if not isinstance(encoded, Mapping):
            encoded = {key: [row[key] for row in encoded] for key in encoded[0]}
        rows = encoded["input_ids"]
        single = not len(rows) or not isinstance(rows[0], (list, tuple))
        rows = [rows] if single else rows
        given = encoded.get("attention_mask")
        masks = [[1] * len(row) for row in rows] if given is None else [given] if single else given
        length = self._padded_length(rows, padding, max_length, pad_to_multiple_of)
        if length is not None and not (single and not rows[0]):
            pad_id = self.pad_token_id
            if pad_id is None:
                raise UserError("padding needs a pad_token, and this tokenizer has none", self.vocab_file,
                                "Set pad_token, e.g. to <|endoftext|>.")
            rows, masks = ([[filler] * (length - len(row)) + list(row) if self.padding_side == "left"
                            else list(row) + [filler] * (length - len(row)) for row in values]
                           for values, filler in ((rows, pad_id), (masks, 0)))
        result = Encoding(input_ids=rows[0] if single else rows)
        if return_attention_mask is not False:
            result["attention_mask"] = masks[0] if single else masks
        for key, value in result.items():
            result[key] = _tensor(value, return_tensors)
        return result

    def _padded_length(self, rows: List[List[int]], padding: Union[bool, str], max_length: Optional[int],
                       multiple: Optional[int]) -> Optional[int]:
        if padding in (False, None, "do_not_pad"):
            return None
        if padding in (True, "longest"):
            length = max(map(len, rows))
        elif padding == "max_length":
            length = self.model_max_length if max_length is None else max_length
            if length >= UNBOUNDED:
                return None
        else:
            raise ValueError(f"padding is {padding!r}; use True, False, 'longest', 'max_length' or 'do_not_pad'")
        return -(-length // multiple) * multiple if multiple else length

    # -- ids to text --------------------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for: perhaps half a character; b"" for an id of the padded vocabulary.

        Raises:
            UserError: there is no such id.
        """
        if 0 <= token_id < self._size:
            return self._bytes[token_id]
        self._check_ids((token_id,))
        return b""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False,
               spaces_between_special_tokens: bool = False, **unused: Any) -> Union[str, List[str]]:
        """The text that ids stand for; bytes that are no UTF-8 become U+FFFD.

        Args:
            token_ids: an id, a sequence, an array or tensor; a sequence of sequences gives a list of texts.
            skip_special_tokens: leave out all control tokens.
            clean_up_tokenization_spaces, spaces_between_special_tokens: not for byte-level BPE; True is refused.

        Ids from `len(self)` up to the model's padded vocabulary stand for nothing.

        Raises:
            UserError: an id is negative or beyond the padded vocabulary.
        """
        if clean_up_tokenization_spaces or spaces_between_special_tokens:
            raise ValueError("byte-level BPE keeps every space: there are none to clean up or to add")
        ids = _as_list(token_ids)
        if ids and isinstance(ids[0], list):
            return self.batch_decode(ids, skip_special_tokens)
        if skip_special_tokens:
            skipped = self.control_token_ids
            ids = [index for index in ids if index not in skipped]
        if not ids:
            return ""
        if min(ids) < 0 or max(ids) >= self._size:
            self._check_ids(ids)
            ids = [index for index in ids if index < self._size]
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", self.errors)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **options: Any) -> List[str]:
        """`decode` of each sequence."""
        return cast(List[str], [self.decode(ids, skip_special_tokens, **options) for ids in sequences])

    def convert_ids_to_tokens(self, ids: Union[int, Sequence[int]], skip_special_tokens: bool = False
                              ) -> Union[str, List[str]]:
        """Token of an id, or tokens of several, as they stand in vocab.json; "" in the padded vocabulary."""
        if isinstance(ids, int):
            return self.token_of(ids)
        skipped = self.control_token_ids if skip_special_tokens else ()
        return [self.token_of(index) for index in _as_list(ids) if index not in skipped]

    def token_of(self, index: int) -> str:
        """Token of an id, as it stands in vocab.json."""
        self._check_ids((index,))
        added = self._added.get(index)
        return self._token_at(index) if added is None else added.content

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of several tokens."""
        return str(self.decode([self.id_of(token) for token in tokens]))

    def _check_ids(self, ids: Iterable[int]) -> None:
        for position, index in enumerate(ids):
            if not 0 <= index < self.padded_vocab_size:
                raise UserError(f"token id {index} (position {position}) is outside 0 to {self.padded_vocab_size - 1}",
                                self.vocab_file, "Does this tokenizer belong to the model that made it?")

    # -- chat ---------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, conversation: Sequence[Any], chat_template: Optional[str] = None,
                            add_generation_prompt: bool = False, tokenize: bool = True,
                            tools: Optional[Sequence[Any]] = None, documents: Optional[Sequence[Any]] = None,
                            padding: Union[bool, str] = False, truncation: Union[bool, str, None] = None,
                            max_length: Optional[int] = None, return_tensors: Optional[str] = None,
                            return_dict: bool = False, **variables: Any) -> Any:
        """The prompt of a conversation (or of several), as ids or with `tokenize=False` as text.

        The template is the argument, else the checkpoint's, else Qwen's ChatML. Control tokens that a user has typed
        into a message come out as control tokens, as in Hugging Face's; `qwen15.text.chat.prompt_ids` prevents that.

        Raises:
            UserError: the template is not valid or refuses the messages.
        """
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        texts = [render(chat_template or self.chat_template or CHATML, messages, tools=tools, documents=documents,
                        add_generation_prompt=add_generation_prompt, where=self.vocab_file,
                        **{**self.special_tokens_map, **variables})
                 for messages in (conversation if several else [conversation])]
        if not tokenize:
            return texts if several else texts[0]
        encoded = self(texts if several else texts[0], control_tokens=True, padding=padding, truncation=truncation,
                       max_length=max_length, return_tensors=return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> Tuple[str, str]:
        """Write vocab.json and merges.txt into a folder; gives their paths.

        Raises:
            UserError: the folder is missing, or has other files of these names.
        """
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab = json.dumps(dict(sorted(self._bpe.vocab.items(), key=lambda item: item[1])), ensure_ascii=False)
        if tokenizer_json.is_one(self.merges_file):
            merges = "\n".join(["#version: 0.2", *map(" ".join, tokenizer_json.read(self.merges_file).merges), ""])
        else:
            with open(self.merges_file, encoding="utf-8") as file:
                merges = file.read()
        return (_write(save_directory, f"{prefix}vocab.json", vocab + "\n"),
                _write(save_directory, f"{prefix}merges.txt", merges))

    def save_pretrained(self, save_directory: str, *unused: Any, filename_prefix: Optional[str] = None,
                        **ignored: Any) -> Tuple[str, ...]:
        """Write vocab.json, merges.txt and tokenizer_config.json, from which `from_pretrained` and Hugging Face load.

        Raises:
            UserError: the folder cannot be made, or has other files of these names.
        """
        try:
            os.makedirs(save_directory, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder cannot be made: {error.strerror}", save_directory) from None
        config = {key: value for key, value in self._options.items()
                  if key not in ("vocab_file", "merges_file", "auto_register", "type") and _is_json(value)}
        config.update({role: getattr(self, role) for role in ROLES})
        config.update(
            tokenizer_class="Qwen2Tokenizer", errors=self.errors, split_special_tokens=self.split_special_tokens,
            padding_side=self.padding_side, truncation_side=self.truncation_side, chat_template=self.chat_template,
            model_max_length=self.model_max_length, clean_up_tokenization_spaces=False, add_prefix_space=False,
            additional_special_tokens=list(self.additional_special_tokens),
            added_tokens_decoder={str(index): {
                "content": token.content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": token.special} for index, token in sorted(self._added.items())})
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        text = json.dumps({key: config[key] for key in sorted(config)}, ensure_ascii=False, indent=2)
        return (*self.save_vocabulary(save_directory, filename_prefix),
                _write(save_directory, prefix + CONFIG_NAME, text + "\n"))

    def __repr__(self) -> str:
        return (f"Qwen2Tokenizer(vocab_file={self.vocab_file!r}, vocab_size={self.vocab_size}, length={len(self)}, "
                f"control_tokens={self.all_special_tokens})")


def _normalized(text: str) -> str:
    """`text` in NFC and without surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    # Line by line, because normalize() copies all of a text that has one combining character in it. Nothing combines
    # with a line end.
    return "\n".join([unicodedata.normalize("NFC", _marks_in_order(line)) for line in text.split("\n")])


_MANY_MARKS = 200
"""More marks in a row than any script has, and few enough for a sort by insertion."""


def _marks_in_order(line: str) -> str:
    """`line`, many marks in a row in NFD: normalize() orders them by insertion, a million in a quarter of an hour."""
    # So many in a row have one at a multiple of their number, which is found much faster.
    if not any(map(_is_moved, line[::_MANY_MARKS])):
        return line
    return _marks().sub(lambda found: _in_order(found.group()), line)


def _in_order(marks: str) -> str:
    return "".join(sorted("".join([unicodedata.normalize("NFD", mark) for mark in marks]), key=unicodedata.combining))


def _is_moved(character: str) -> bool:
    """Whether normalize() may move it: a mark, or one of those that are made of marks alone."""
    return unicodedata.combining(unicodedata.normalize("NFD", character)[0]) != 0


@functools.lru_cache(maxsize=None)
def _marks() -> Pattern[str]:
    """Many in a row of what `_is_moved`."""
    moved = [code for code in range(0x300, 0x20000) if _is_moved(chr(code))]
    begins = [code for code, before in zip(moved, [-1, *moved]) if code != before + 1]
    ends = [code for code, after in zip(moved, [*moved[1:], -1]) if code != after - 1]
    ranges = "".join(f"{chr(begin)}-{chr(end)}" for begin, end in zip(begins, ends))
    return re.compile(f"[{ranges}]{{{_MANY_MARKS},}}")


def _as_list(ids: Any) -> List[Any]:
    if isinstance(ids, int):
        return [ids]
    if hasattr(ids, "asnumpy"):  # a MindSpore tensor
        ids = ids.asnumpy()
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(ids, list):
        return [ids]
    if ids and not isinstance(ids[0], (int, list)):
        return [_as_list(row) if hasattr(row, "__len__") else int(row) for row in ids]
    return ids


def _tensor(value: List[Any], kind: Optional[str]) -> Any:
    if kind is None:
        return value
    if kind not in ("np", "ms"):
        raise ValueError(f"return_tensors is {kind!r}; use 'np' or 'ms'")
    import numpy as np

    try:
        array = np.asarray(value, np.int32)
    except ValueError:
        raise ValueError("texts of different lengths do not make an array: use padding=True, or truncation") from None
    if kind == "np":
        return array
    import mindspore

    return mindspore.Tensor(array)


def _refuse(options: Mapping[str, Any]) -> None:
    """What only the tokenizer for MindFormers can do must not be silently left out."""
    idle = {"verbose", "return_token_type_ids", "return_offsets_mapping", "return_special_tokens_mask", "return_length",
            "return_overflowing_tokens", "is_split_into_words", "stride", "text_pair", "split_special_tokens"}
    wanted = [name for name, value in options.items() if name != "verbose" and (name not in idle or value)]
    if wanted:
        raise TypeError(f"not supported here: {', '.join(wanted)}; the Qwen2Tokenizer that qwen1_5_tokenizer gives "
                        "after `import mindformers` takes all of MindFormers' arguments")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _write(folder: str, name: str, text: str) -> str:
    """Write a whole file or none. A file of that name with the same text is left as it is, another one is not
    touched."""
    path = os.path.join(folder, name)
    try:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                if file.read() == text:
                    return path
            raise UserError("exists with other contents", path, "Save into another folder, or move the file away.")
        write_whole(path, text.encode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be written: {error}", path) from None
    return path
