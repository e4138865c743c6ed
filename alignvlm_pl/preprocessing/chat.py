"""Conversations to token ids and labels, by structure and never by string search.

The tokenizer's own template is rendered ONCE with a private-use sentinel in place of every piece of content.
Splitting the rendering at the sentinels gives template text and content apart, so that (a) content is
tokenized with special tokens switched off and can never forge a turn or an image, and (b) the supervised
span is known from the message it came from: the answer's content plus the end-of-turn token that the
template puts behind it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from jinja2 import TemplateError

from ..errors import ConfigError, DataError, nearest

IGNORE_INDEX = -100
"""Label of a position without loss (the index torch's cross entropy ignores)."""

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML_TEMPLATE, "llama3": LLAMA3_TEMPLATE}
"""Plain templates without a system prompt, for tokenizers that carry none or a long one."""

ROLES = ("system", "user", "assistant")

_SENTINEL = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation.

    Args:
        kind: `template`, `text` (content) or `image`.
        text: The text; empty for an image.
        supervised: Whether the text is (part of) an answer.
        ends_answer: Whether an answer ends here, so that its end-of-turn token must follow.
    """

    kind: str
    text: str = ""
    supervised: bool = False
    ends_answer: bool = False


def choose_template(tokenizer: Any, name: str | None) -> str:
    """Return the chat template to use.

    Args:
        tokenizer: A Hugging Face tokenizer.
        name: None for the tokenizer's own, a key of `TEMPLATES`, or a Jinja template.

    Raises:
        ConfigError: If none is named and the tokenizer has none, or the name is neither known nor a template.
    """
    if name is not None:
        if name not in TEMPLATES and "{" not in name:
            raise ConfigError(
                f"chat_template={name!r} is no Jinja template and no name: {nearest(name, TEMPLATES)}"
            )
        return TEMPLATES.get(name, name)
    if tokenizer.chat_template:
        return str(tokenizer.chat_template)
    raise ConfigError(
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template and none is configured; "
        f"set chat_template to one of {sorted(TEMPLATES)} or to a Jinja template"
    )


def render(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, template: str, add_generation_prompt: bool = False
) -> list[Piece]:
    """Render messages to pieces in reading order.

    Args:
        tokenizer: Used for its `apply_chat_template` only.
        messages: `[{"role", "content"}]`; the role is one of `ROLES`; content is a string or a list of
            `{"type": "text", "text"}` and `{"type": "image"}` parts.
        template: Jinja chat template whose messages carry plain strings.
        add_generation_prompt: Append the opening of an assistant turn.

    Raises:
        DataError: If a message is malformed, the template refuses the conversation, or it drops or repeats content.
    """
    if not messages:
        raise DataError("the conversation has no messages")
    contents: list[Piece] = []
    turns: list[tuple[str, int]] = []
    for message in messages:
        pieces = _contents(message)
        contents += pieces
        turns.append((message["role"], len(pieces)))
    try:
        rendered = _skeleton(tokenizer, template, tuple(turns), add_generation_prompt)
    except (TemplateError, TypeError) as error:  # TypeError: a template that wants content of another form
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template does not render a conversation of the roles {roles}: {error}; change the data or "
            "chat_template"
        ) from error
    return _split(rendered, contents)


def tokenize(
    tokenizer: Any,
    pieces: Sequence[Piece],
    *,
    image_token_id: int,
    spell_answers: bool = False,
) -> tuple[list[int], list[int]]:
    """Turn pieces into token ids and labels.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        pieces: Output of `render`.
        image_token_id: Id put where an image is, once for each.
        spell_answers: Write answers one character a token, as BPE-dropout at rate 1 does (Provilkov et al. 2020).

    Returns:
        Ids and labels of equal length; a label is the id itself or `IGNORE_INDEX`.

    Raises:
        ConfigError: If the template closes an assistant turn without a special token, or the tokenizer cannot spell.
    """
    ids: list[int] = []
    labels: list[int] = []
    for index, piece in enumerate(pieces):
        if piece.kind == "image":
            new = [image_token_id]
        elif piece.supervised and spell_answers:
            new = _spelled_ids(tokenizer, piece.text)
        elif piece.kind == "template":
            new = list(_template_ids(tokenizer, piece.text))
        else:
            new = _ids(tokenizer, piece.text, special=False)
        supervised = len(new) if piece.supervised else 0
        if index and pieces[index - 1].ends_answer:
            _require_end_of_turn(tokenizer, new if piece.kind == "template" else [])
            supervised = 1
        ids += new
        labels += new[:supervised] + [IGNORE_INDEX] * (len(new) - supervised)
    if pieces and pieces[-1].ends_answer:
        _require_end_of_turn(tokenizer, [])
    return ids, labels


def end_of_turn_id(tokenizer: Any, template: str) -> int:
    """Id of the token that closes an assistant turn under `template`.

    Raises:
        ConfigError: If there is none.
    """
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    last = render(tokenizer, messages, template=template)[-1]
    return _require_end_of_turn(
        tokenizer, [] if last.ends_answer else _ids(tokenizer, last.text, special=True)
    )


def truncate_text(ids: list[int], labels: list[int], *, image_token_id: int, max_text_length: int) -> bool:
    """Drop text tokens beyond `max_text_length` in place; images are never dropped.

    Returns:
        Whether anything was dropped.
    """
    kept, text = [], 0
    for position, token in enumerate(ids):
        text += token != image_token_id
        if token == image_token_id or text <= max_text_length:
            kept.append(position)
    truncated = len(kept) < len(ids)
    ids[:] = [ids[position] for position in kept]
    labels[:] = [labels[position] for position in kept]
    return truncated


@lru_cache(maxsize=1024)
def _skeleton(
    tokenizer: Any, template: str, turns: tuple[tuple[str, int], ...], add_generation_prompt: bool
) -> str:
    """Render turns of (role, number of pieces) with a sentinel for each piece: the same for all contents."""
    number = count()
    skeleton = [
        {"role": role, "content": "".join(f"\ue000{next(number)}\ue001" for _ in range(pieces))}
        for role, pieces in turns
    ]
    return str(
        tokenizer.apply_chat_template(
            skeleton, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _contents(message: dict[str, Any]) -> list[Piece]:
    """Pieces of one message, checked: role and part types come from files."""
    role, content = message["role"], message["content"]
    if role not in ROLES:
        # Not only a courtesy: templates write the role as control text, where it could open or close a turn.
        raise DataError(f"message role {role!r} is unknown; {nearest(str(role), ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    pieces = []
    for index, part in enumerate(parts):
        answer = role == "assistant"
        if part["type"] not in ("text", "image"):
            raise DataError(
                f"content part of type {part['type']!r}; {nearest(str(part['type']), ('text', 'image'))}"
            )
        text = (part.get("text") or "") if part["type"] == "text" else ""
        pieces.append(
            Piece(part["type"], text, answer and part["type"] == "text", answer and index == len(parts) - 1)
        )
    return pieces


def _split(rendered: str, contents: list[Piece]) -> list[Piece]:
    fields = _SENTINEL.split(rendered)
    order = [int(field) for field in fields[1::2]]
    if order != list(range(len(contents))):
        raise DataError(
            f"the chat template rendered content pieces {order} of {len(contents)}; it must render each once and in "
            "order (does it accept the roles system, user, assistant with string content?)"
        )
    pieces = [Piece("template", fields[0])]
    for content, text in zip(contents, fields[2::2], strict=True):
        pieces += [content, Piece("template", text)]
    return [piece for piece in pieces if piece.kind != "template" or piece.text]


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # What calling the tokenizer comes down to; its bookkeeping costs several times what a short text does.
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not special
    if backend.truncation is not None:  # of the tokenizer's file
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return list(backend.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=1024)
def _template_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of template text, which is the same in every conversation."""
    return tuple(_ids(tokenizer, text, special=True))


def _spelled_ids(tokenizer: Any, text: str) -> list[int]:
    ids = [token for character in text for token in _ids(tokenizer, character, special=False)]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise ConfigError(
            f"the tokenizer does not give back {text!r} from its characters' tokens; "
            "set model.spec.spell_answers to false"
        )
    return ids


def _require_end_of_turn(tokenizer: Any, ids: list[int]) -> int:
    if not ids or not _is_special(tokenizer, ids[0]):
        raise ConfigError(
            f"the chat template closes an assistant turn with token {ids[:1]}, expected a special end-of-turn token; "
            "without it the model never learns to stop: configure another chat_template"
        )
    return ids[0]


@lru_cache(maxsize=1024)
def _is_special(tokenizer: Any, token_id: int) -> bool:
    # Asked of the token itself: `all_special_ids` lists only those with a name, which Llama 3's <|eot_id|> lacks.
    token = tokenizer.added_tokens_decoder.get(token_id)
    return token is not None and bool(token.special)
