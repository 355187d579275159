"""Tokenizers and chat templates, against transformers' own rendering."""

import pytest
from tiny_checkpoints import edit_json, write_tokenizer

from fastshard import CheckpointError
from fastshard.checkpoint.source import Directory
from fastshard.checkpoint.tokenizer import read_tokenizer

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if loop.index0 % 2 == 0 and message.role != 'user' %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '[' + message['role'] + '] ' + message.content | trim + '\\n' }}
    {% if loop.last %}{{ {"é": [1, "<a>"]} | tojson }}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}
[assistant]
{% endif %}
"""
MESSAGES = [
    {"role": "user", "content": " Grüße <b> "},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "so?"},
]


def read(path):
    return read_tokenizer(Directory(path))


def rendered_by_transformers(path, messages):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_chat_template_renders_as_transformers(tmp_path, place):
    write_tokenizer(tmp_path, adds_bos=True)
    if place == "file":
        edit_json(tmp_path / "tokenizer_config.json", chat_template="wrong")
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        template = named if place == "named" else TEMPLATE
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    tokenizer = read(tmp_path)
    text = tokenizer.render_chat(MESSAGES)
    assert text == rendered_by_transformers(tmp_path, MESSAGES)
    tokens = tokenizer.encode_chat(MESSAGES)
    assert tokens[0] == 0  # <s> is one token, not three bytes
    assert tokens.count(0) == 1  # the template's; a plain text gets the tokenizer's
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.decode(tokens) == text.removeprefix("<s>")
    assert tokenizer.encode_chat("so?") == tokenizer.encode_chat(MESSAGES[2:])


def test_special_tokens_are_text_or_dict(tmp_path):
    write_tokenizer(tmp_path, unk_token=None, model_max_length=5)
    tokenizer = read(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.token_id("</s>") == 1
    assert tokenizer.token_id("none") is None


def test_decode_drops_special_tokens(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = read(tmp_path)
    assert tokenizer.decode([0, *tokenizer.encode("é!"), 1]) == "é!"


def test_no_tokenizer_is_none(tmp_path):
    assert read(tmp_path) is None


def test_no_tokenizer_config_is_fine(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = read(tmp_path)
    assert tokenizer.encode("a") != []
    with pytest.raises(ValueError, match="chat needs a chat template, and the checkpoint has none"):
        tokenizer.encode_chat("a")


@pytest.mark.parametrize("text", ["", "{}", "[", '{"model": {"type": "None"}}'])
def test_corrupt_tokenizer_raises(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer, "):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_corrupt_tokenizer_config_raises(tmp_path, text):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must be (a )?JSON"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ nothing.of_this }}", "'nothing' is undefined"),
    ],
)
def test_template_that_refuses_raises(tmp_path, template, message):
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=f"chat template refuses the messages: .*{message}"):
        read(tmp_path).encode_chat(MESSAGES)
