"""A prompt is a function of the configuration: no clock, no random text.

textgen PR#6692, sglang#3296: Llama 3.2's own template writes today's date by `strftime_now` of transformers.
"""

import datetime as real_datetime

import pytest
from transformers import AutoProcessor
from transformers.utils import chat_template_utils

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import tiny_tokenizer
from alignvlm_pl.preprocessing.chat import CHATML_TEMPLATE

CHATS = [
    [{"role": "user", "content": "q"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
]
CLOCKS = {
    "at the begin": "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + CHATML_TEMPLATE,
    "with a system prompt": "{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}"
    + CHATML_TEMPLATE,
    "in the generation prompt": CHATML_TEMPLATE + "{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}",
    "by another name": "{% set now = strftime_now %}{{ now('%Y') }}" + CHATML_TEMPLATE,
}
GUARDED = "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{%- else %}26 Jul 2024{%- endif %}"


@pytest.mark.parametrize("where", CLOCKS)
def test_a_template_that_reads_the_clock_is_refused_when_it_is_built(where):
    with pytest.raises(ConfigError, match=r"reads the clock \(strftime_now\).*set chat_template to one of"):
        AlignVLMProcessor(tiny_tokenizer(chat_template=CLOCKS[where]))
    with pytest.raises(ConfigError, match="reads the clock"):
        AlignVLMProcessor(tiny_tokenizer(), chat_template=CLOCKS[where])


RANDOM = [
    "{{ ['a', 'b'] | random }}",
    "{{ lipsum(n=1) }}",
    "{{ [['a', 'b']] | map('random') | first }}",
    "{{ [['a', 'b']] | map('ran' ~ 'dom') | first }}",
    "{% set name = 'random' %}{{ [['a', 'b']] | map(name) | join }}",
    "{{ [['a', 'b']] | map(*['random']) | join }}",
    "{% filter random %}ab{% endfilter %}",
    "{{ (messages[0].keys() - []) | join }}",
    "{{ (joiner() | string)[-9:] }}",
    "{% set c = cycler(1) %}{{ c | replace('0x', '') }}",
    "{% set l = lipsum %}{{ l() }}",
    "{% macro m(f=lipsum) %}{{ f() }}{% endmacro %}{{ m() }}",
    "{% if messages | length > 9 %}{{ 'ab' | list | random }}{% endif %}",
    "{% if messages | length > 9 %}{% set lipsum = 'a' %}{% endif %}{{ lipsum }}",
]
ADDRESSES = [
    "{{ joiner() }}",
    "{{ [cycler('a')] }}",
    "{{ joiner('x') ~ '' }}",
    "{{ '%s' | format(cycler(1)) | upper }}",
    "{{ 'a'.upper }}",
    "{{ messages | map(attribute='role') }}",
    "{{ messages | batch(2) | string | urlencode }}",
    "{{ raise_exception }}",
    "{{ namespace(a=joiner()) }}",
    "{{ dict(a=messages[0].items) }}",
    "{{ dict }}",
]


@pytest.mark.parametrize("text", RANDOM)
def test_a_template_that_draws_random_text_is_refused(text):
    with pytest.raises(ConfigError, match=r"draws random text .*; set chat_template to one of"):
        AlignVLMProcessor(tiny_tokenizer(chat_template=text + CHATML_TEMPLATE))


@pytest.mark.parametrize("text", ADDRESSES)
def test_a_template_that_writes_an_address_is_refused(text):
    with pytest.raises(ConfigError, match=r"writes the memory address of an object .*; set chat_template to one of"):
        AlignVLMProcessor(tiny_tokenizer(chat_template=text + CHATML_TEMPLATE))


def test_addresses_in_the_text_of_a_variable_are_taken():
    processor = AlignVLMProcessor(tiny_tokenizer())
    template = "{{ a }}" + processor.chat_template
    for text in ("0xDEADBEEF", ["at 0x7fffffff"], {"a": "0x123456789"}):
        assert processor.apply_chat_template(CHATS[0], chat_template=template, a=text).startswith(str(text))


def test_templates_that_only_look_random_are_taken():
    text = "{{ '0x0123456789' }}{% set random = 1 %}{% set lipsum = '| random' %}{% for i in range(2) %}{{ lipsum }}"
    text += (
        "{% endfor %}{% set ns = namespace(a=1) %}{% set j = joiner() %}{{ j() }}{{ messages | map('length') | sum }}"
    )
    processor = AlignVLMProcessor(tiny_tokenizer(chat_template=text + CHATML_TEMPLATE))
    assert processor.apply_chat_template(CHATS[0]).startswith("0x0123456789| random| random")


def test_a_clock_in_a_rare_branch_is_refused_where_it_is_read():
    rare = "{% if messages | length > 4 %}{{ strftime_now('%Y') }}{% endif %}" + CHATML_TEMPLATE
    processor = AlignVLMProcessor(tiny_tokenizer(chat_template=rare))
    processor.apply_chat_template(CHATS[1])
    with pytest.raises(ConfigError, match="reads the clock"):
        processor.apply_chat_template(CHATS[1][1:] * 3)


def test_a_template_with_a_date_of_its_own_keeps_it_under_two_clocks(monkeypatch, tmp_path):
    first = AlignVLMProcessor(tiny_tokenizer(chat_template=GUARDED + "\n" + CHATML_TEMPLATE))
    first.save_pretrained(tmp_path)
    texts = [first.apply_chat_template(chat, add_generation_prompt=True) for chat in CHATS]
    assert all(text.startswith("26 Jul 2024") for text in texts)

    class Later(real_datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    second = AutoProcessor.from_pretrained(tmp_path)
    assert [second.apply_chat_template(chat, add_generation_prompt=True) for chat in CHATS] == texts
    assert second.identity() == first.identity()
    # What the export holds has no clock under anybody's renderer.
    tokenizer = tiny_tokenizer(chat_template=(tmp_path / "chat_template.jinja").read_text())
    assert tokenizer.apply_chat_template(CHATS[0], tokenize=False).startswith("26 Jul 2024")


def test_of_several_templates_the_default_is_taken():
    tokenizer = tiny_tokenizer(chat_template={"default": CHATML_TEMPLATE, "tools": "{{ strftime_now('%Y') }}"})
    assert AlignVLMProcessor(tokenizer).chat_template == CHATML_TEMPLATE
    with pytest.raises(ConfigError, match=r"no chat template \(of several, none called default"):
        AlignVLMProcessor(tiny_tokenizer(chat_template={"tools": CHATML_TEMPLATE}))
