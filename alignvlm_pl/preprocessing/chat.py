"""Conversations to token ids and labels.

The chat template is rendered with a private-use sentinel in place of each fragment of content, and split at the
sentinels. Content is tokenized without special tokens, so it cannot forge a turn or an image. The supervised tokens are
those of the answer's content, and the end-of-turn token that follows it in the template.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, count
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from ..errors import AlignVLMError, ConfigError, DataError, nearest

_log = logging.getLogger(__name__)

IGNORE_INDEX = -100  # Label of a position that is not supervised (the index that torch's cross entropy ignores)

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
"""Templates without a system prompt, for tokenizers that have no template or one with a long prompt."""

ROLES = ("system", "user", "assistant")

_CLOCK = "the_clock_is_not_read"
_NO_CLOCK = "{% set strftime_now = " + _CLOCK + " %}{{ '' }}"
"""Hides transformers' clock: `strftime_now is defined` is false after it. The empty output keeps a line break."""
_ADDRESS = re.compile(r"0x[0-9a-f]{3,}", re.IGNORECASE)
"""What Python writes for an object without a text of its own: it differs from process to process."""
_CURE = f"set chat_template to one of {sorted(TEMPLATES)}, or to the template with a fixed text in its place"

_SENTINEL = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True, slots=True)
class ChatFragment:
    """A fragment of a rendered conversation: `template`, `text` (content) or `image`, which has an empty text.

    The text of an answer is `supervised`; after a fragment that `ends_answer` an end-of-turn token must follow.
    """

    kind: str
    text: str = ""
    supervised: bool = False
    ends_answer: bool = False


def choose_template(tokenizer: Any, name: str | None) -> str:
    """Return the chat template of this name: a key of `TEMPLATES` or a Jinja template; None for the tokenizer's own.

    A prompt depends on the configuration alone: the template is returned without the clock that transformers offers
    (`strftime_now`), so that Llama 3.2's, for one, writes its own date. A ConfigError if there is no such template, or
    it is not valid Jinja, reads the clock, or draws random text.
    """
    if name is not None and (not isinstance(name, str) or (name not in TEMPLATES and "{" not in name)):
        raise ConfigError(
            f"chat_template={str(name)[:60]!r} is neither a Jinja template nor the name of one; "
            f"{nearest(str(name)[:60], TEMPLATES)}"
        )
    template = TEMPLATES.get(name, name) if name else _own_template(tokenizer)
    if found := _parsed(template)[1]:
        raise ConfigError(f"the chat template draws random text ({found}), so prompts differ; {_CURE}")
    if "strftime_now" not in template or template.startswith(_NO_CLOCK):
        return template
    template = _NO_CLOCK + template
    for roles in (("user", "assistant"), ("system", "user", "assistant", "user")):
        for generation in (False, True):
            with suppress(DataError):  # a role or an order that this template does not know
                messages = [{"role": role, "content": role} for role in roles]
                render_chat(tokenizer, messages, template=template, add_generation_prompt=generation)
    _log.warning("the chat template dates its prompts; it is used without the clock, with the date that it has itself")
    return template


class _Generation(Extension):
    """The block `{% generation %}` of transformers, by which templates mark answers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def template_variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a Jinja template reads from outside; ConfigError: it is not valid."""
    return _parsed(template)[0]


@lru_cache(maxsize=64)
def _parsed(template: str) -> tuple[frozenset[str], str | None]:
    """Return the variables of a template, and by which filter or function it draws random text (None: by none)."""
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    del environment.globals["lipsum"]  # else it is no variable from outside
    try:
        tree = environment.parse(template)
        names = meta.find_undeclared_variables(tree)
    except TemplateError as error:
        raise ConfigError(f"the chat template is not valid Jinja: {error}; correct chat_template") from error
    variables = frozenset(names) - {"messages", "raise_exception", "strftime_now", "lipsum", _CLOCK}
    return variables, _random_part(tree) or ("lipsum" if "lipsum" in names else None)


def _random_part(tree: nodes.Template) -> str | None:
    """Return which filter or difference of keys (a set, without an order) makes the text random; None: none does."""
    made = ((one.target, one.node) for one in tree.find_all(nodes.Assign))
    objects = {target.name for target, node in made if isinstance(target, nodes.Name) and _is_object(node)}
    for part in tree.find_all((nodes.Filter, nodes.Sub)):
        match part:
            case nodes.Filter(name="random"):
                return "the filter random"
            case nodes.Filter(node=source) if _is_object(source) or getattr(source, "name", None) in objects:
                return f"the filter {part.name} of a joiner or cycler, whose text is a memory address"
            case nodes.Filter(name="map", args=[nodes.Const(value="random"), *_]):
                return "the filter map('random')"
            case nodes.Filter(name="map", args=[nodes.Const(), *_]) | nodes.Filter(name="map", args=[], dyn_args=None):
                pass  # with another filter's name, or attribute=…
            case nodes.Filter(name="map"):
                return "the filter map with another filter's name computed; write the name out"
            case nodes.Sub() if any(_is_keys(side) for side in (part.left, part.right)):
                return "a difference of keys, which has no order"
    return None


def _is_object(node: Any) -> bool:
    return isinstance(node, nodes.Call) and getattr(node.node, "name", None) in ("joiner", "cycler")


def _is_keys(node: Any) -> bool:
    return isinstance(node, nodes.Call) and getattr(node.node, "attr", None) in ("keys", "items")


def _own_template(tokenizer: Any) -> str:
    with suppress(ValueError):
        if template := tokenizer.get_chat_template():
            return str(template)
    raise ConfigError(
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template (of several, none called default) and none is "
        f"configured; set chat_template to one of {sorted(TEMPLATES)} or to a Jinja template"
    )


def render_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    template: str,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[ChatFragment]:
    """Render messages to fragments, in reading order.

    Args:
        tokenizer: Tokenizer whose `apply_chat_template` is used.
        messages: `[{"role", "content"}]`; the role is one of `ROLES`; content is a string or a list of
            `{"type": "text", "text"}` and `{"type": "image"}` parts.
        template: Jinja chat template for messages with string content.
        add_generation_prompt: Append the opening of an assistant turn.
        variables: Further variables of the template.

    Raises:
        ConfigError: The template reads the clock, or writes a memory address.
        DataError: A message is malformed, or the template raises, drops or repeats content.
    """
    if not messages:
        raise DataError("the conversation has no messages")
    contents = [_contents(message, number) for number, message in enumerate(messages)]
    turns = tuple((message["role"], len(found)) for message, found in zip(messages, contents, strict=True))
    try:
        # Values of variables are not compared: 1 equals True, and a list has no hash.
        render = _skeleton.__wrapped__ if variables else _skeleton
        rendered = render(tokenizer, template, turns, add_generation_prompt, variables or None)
    except (AlignVLMError, MemoryError):
        raise
    except Exception as error:  # of any class: a template for another form of content, or with a fault of its own
        if _CLOCK in str(error):
            raise ConfigError(
                f"the chat template reads the clock (strftime_now), so prompts differ; {_CURE}"
            ) from error
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template does not render a conversation of the roles {roles}: {error}; change the data or "
            "chat_template"
        ) from error
    return _split(rendered, list(chain.from_iterable(contents)))


def leave_open(fragments: Sequence[ChatFragment]) -> list[ChatFragment]:
    """Return the fragments up to the last content, for the model to continue it."""
    last = max(index for index, fragment in enumerate(fragments) if fragment.kind != "template")
    return [*fragments[:last], replace(fragments[last], ends_answer=False)]


def tokenize_chat(
    tokenizer: Any, fragments: Sequence[ChatFragment], *, image_token_id: int, spell_answers: bool = False
) -> tuple[list[int], list[int]]:
    """Tokenize fragments of `render_chat` to ids and labels of equal length; a label is the id or `IGNORE_INDEX`.

    `image_token_id` stands once for each image. With `spell_answers` answers are one token a character, as BPE-dropout
    at rate 1 has them (Provilkov et al. 2020). A ConfigError if the template ends an answer without a special token, or
    a spelled one decodes to another text.
    """
    ids: list[int] = []
    labels: list[int] = []
    for index, fragment in enumerate(fragments):
        if fragment.kind == "image":
            new = [image_token_id]
        elif fragment.supervised and spell_answers:
            new = _spelled_ids(tokenizer, fragment.text)
        elif fragment.kind == "template":
            new = list(_template_ids(tokenizer, fragment.text))
        else:
            new = _ids(tokenizer, fragment.text, special=False)
        supervised = len(new) if fragment.supervised else 0
        if index and fragments[index - 1].ends_answer:
            _require_end_of_turn(tokenizer, new if fragment.kind == "template" else [])
            supervised = 1
        ids += new
        labels += new[:supervised] + [IGNORE_INDEX] * (len(new) - supervised)
    if fragments and fragments[-1].ends_answer:
        _require_end_of_turn(tokenizer, [])
    return ids, labels


def end_of_turn_id(tokenizer: Any, template: str) -> int:
    """Return the id of the token that ends an assistant turn under `template`; ConfigError: it is no special one."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    last = render_chat(tokenizer, messages, template=template)[-1]
    return _require_end_of_turn(tokenizer, [] if last.ends_answer else _ids(tokenizer, last.text, special=True))


def truncate_text(ids: list[int], labels: list[int], *, image_token_id: int, max_text_length: int) -> bool:
    """Drop text tokens beyond `max_text_length`, in place, but no image tokens; return whether one was dropped."""
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
    tokenizer: Any, template: str, turns: tuple[tuple[str, int], ...], add_generation_prompt: bool, variables: Any
) -> str:
    """Render turns (role, number of fragments) with a sentinel per fragment; independent of the content, so cached."""
    number = count()
    skeleton = [
        {"role": role, "content": "".join(f"\ue000{next(number)}\ue001" for _ in range(fragments))}
        for role, fragments in turns
    ]
    options = {**(variables or {}), "chat_template": template, "add_generation_prompt": add_generation_prompt}
    rendered = str(tokenizer.apply_chat_template(skeleton, tokenize=False, **options))
    require_unicode(rendered, "the chat template, or a variable of it,")
    if (found := _ADDRESS.search(rendered)) and found[0] not in f"{template}{variables}":
        raise ConfigError(
            f"the chat template writes the memory address of an object ({rendered[: found.end()][-60:]!r}), so prompts "
            f"differ; {_CURE}"
        )
    return rendered


def _contents(message: dict[str, Any], number: int) -> list[ChatFragment]:
    """Return the content fragments of one message, with role, part types and Unicode checked."""
    if missing := [key for key in ("role", "content") if message.get(key) is None]:
        raise DataError(f"a message has no {missing[0]!r}; expected role and content, found {sorted(message)[:5]}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        # Templates write the role as control text, where an arbitrary string could open or close a turn.
        raise DataError(f"message role {role!r} is unknown; {nearest(str(role), ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise DataError(f"message content of type {type(parts).__name__}, expected a string or a list of parts")
    fragments, answer = [], role == "assistant"
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise DataError(f"content part of type {str(kind or part)[:40]!r}; {nearest(str(kind), ('text', 'image'))}")
        text = (part.get("text") or "") if kind == "text" else ""
        if not isinstance(text, str):
            raise DataError(f"text of a content part is of type {type(text).__name__}, expected a string")
        require_unicode(text, f"messages[{number}]")
        last = index == len(parts) - 1
        fragments.append(ChatFragment(kind, text, answer and kind == "text", answer and last))
    return fragments


def require_unicode(text: str, where: str) -> None:
    """Raise a `DataError` if a text has half a surrogate pair, as JSON may hold it and no tokenizer encodes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair, {text[error.start]!a}, at character {error.start}; write the whole "
            "character, or leave it out"
        ) from error


def _split(rendered: str, contents: list[ChatFragment]) -> list[ChatFragment]:
    fields = _SENTINEL.split(rendered)
    order = [int(field) for field in fields[1::2]]
    if order != list(range(len(contents))):
        raise DataError(
            f"the chat template rendered content fragments {order} of {len(contents)}; it must render each once and in "
            "order (does it accept the roles system, user, assistant with string content?)"
        )
    fragments = [ChatFragment("template", fields[0])]
    for content, text in zip(contents, fields[2::2], strict=True):
        fragments += [content, ChatFragment("template", text)]
    return [fragment for fragment in fragments if fragment.kind != "template" or fragment.text]


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # Faster than calling the tokenizer, whose overhead is several times the cost of a short text.
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not special
    if backend.truncation is not None:  # set in the tokenizer's file
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return list(backend.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=1024)
def _template_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the ids of template text, cached because it repeats in every conversation."""
    return tuple(_ids(tokenizer, text, special=True))


def _spelled_ids(tokenizer: Any, text: str) -> list[int]:
    ids = [token for character in text for token in _ids(tokenizer, character, special=False)]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise ConfigError(
            f"the tokens of the characters of {text!r} do not decode to the same text; "
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
    # `all_special_ids` has only named special tokens, and Llama 3's <|eot_id|> is not named.
    token = tokenizer.added_tokens_decoder.get(token_id)
    return token is not None and bool(token.special)
