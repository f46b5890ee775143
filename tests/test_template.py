"""Labels cover the answers and their end-of-turn tokens, for the templates people really use.

The templates are the essential shapes of well-known model families; the expected supervised text of
each is written out by hand, and the tokenizers are trained here on a few sentences.
"""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pyft.errors import UsageError
from pyft.finetune.data import Row
from pyft.finetune.template import (
    CHATML,
    HEADINGS,
    IGNORE,
    NOTES,
    Encoded,
    answer_text,
    encode,
    encode_rows,
    prompt_text,
    resolve,
    stop_ids,
    trainable,
    uses_bos,
)

SENTENCES = [
    "You are a helpful assistant.",
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system model: def add(a, b):\n    return a + b\n",
    "### User:\n### Assistant:\n### System:\n Thinking about it. naïve café 日本語 🙂",
] * 3
SPECIAL = [
    "<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>",
]  # fmt: skip

LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (  # strips thinking from every answer but the last, and writes an empty block there
    "{%- for message in messages %}{%- set text = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{%- if loop.last %}{%- set text = '<think>\n\n</think>\n\n' + text %}{%- endif %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (  # this family ignored the system role without a word, and ends a conversation with eos
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ALPACA = (  # no control token at all
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] "
    "+ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
R1 = (  # the generation prompt opens a thinking block that finished turns do not have
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] }}{% else %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)

# name: (template, bos, eos, what ends a turn, text before an answer, gives the eos of its own)
FAMILIES: dict[str, tuple[str, str, str, str, str]] = {
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", ""),
    "qwen": (QWEN, "<|endoftext|>", "<|im_end|>", "<|im_end|>", ""),
    "gemma": (GEMMA, "<bos>", "</s>", "<end_of_turn>", ""),
    "mistral": (MISTRAL, "<s>", "</s>", "</s>", " "),
    "phi3": (PHI3, "<s>", "<|endoftext|>", "<|end|>", ""),
    "chatml": (CHATML, "<s>", "</s>", "<|im_end|>", ""),
    "headings": (HEADINGS, "<s>", "</s>", "</s>", ""),
    "alpaca": (ALPACA, "<s>", "</s>", "</s>", ""),
}
KINDS = ("byte-level", "byte-level trimmed", "metaspace", "legacy llama")


def build(kind: str = "byte-level", special: list[str] = SPECIAL) -> Tokenizer:
    """A small BPE of one of the kinds in use; they differ in white space and in offsets."""
    tokenizer = Tokenizer(models.BPE(byte_fallback="byte" not in kind, unk_token="<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "byte" in kind else []
    if "byte" in kind:
        trim = kind.endswith("trimmed")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = normalizers.Sequence(steps)
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special = [*special, *alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=alphabet if "byte" in kind else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


BUILT = {kind: build(kind) for kind in KINDS}


def wrap(
    kind: str = "byte-level", bos: str = "<s>", eos: str = "</s>", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(BUILT[kind].to_str())
    if adds_bos:
        pair = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [pair])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def supervised(item: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of supervised tokens."""
    runs: list[list[int]] = []
    previous = IGNORE
    for label in item.labels:
        if label != IGNORE:
            if previous == IGNORE:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


ANSWERS = [
    "Paris.",
    "def add(a, b):\n\n    return a + b",
    "naïve 日本語 🙂",
    "assistant",
    "4",
    "Thinking of </s> is no end",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_with_its_end_of_turn_and_nothing_else(family: str, kind: str) -> None:
    template, bos, eos, end, lead = FAMILIES[family]
    tokenizer = wrap(kind, bos, eos)
    for first in ANSWERS:
        for second in ANSWERS:
            turns = [user("Hi  there"), assistant(first), user("And?\n"), assistant(second)]
            item = encode(Row(1, messages=turns), tokenizer, template, 10_000)
            expected = [f"{lead}{first}{end}", f"{lead}{second}{end}"]
            if family == "alpaca":  # this template does not end a turn; the last one gets eos
                expected[0] = first
            got = supervised(item, tokenizer)
            if "byte" not in kind:  # these write a space of their own after control tokens
                expected = ["".join(text.split()) for text in expected]
                got = ["".join(text.split()) for text in got]
            assert got == expected
            assert item.notes == (("eos-appended",) if family == "alpaca" else ())
            assert (item.truncated, item.supervised_lost) == (0, 0)
            assert item.input_ids[-1] == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_one_rendering(family: str) -> None:
    template, bos, eos, end, _ = FAMILIES[family]
    tokenizer = wrap("byte-level", bos, eos)
    turns = [user("Hi"), assistant("Paris."), user("And?"), assistant("It is.")]
    item = encode(Row(1, messages=turns), tokenizer, template, 10_000)
    whole = tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=True, tokenize=True
    ).input_ids
    cut = len(item.input_ids) - ("eos-appended" in item.notes)
    assert item.input_ids[:cut] == whole[:cut]
    assert tokenizer.decode(whole[cut:]).strip() in ("", "<|endoftext|>")
    assert stop_ids(tokenizer, template) == sorted(
        {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_system_message_is_kept_or_folded_and_said(family: str) -> None:
    template, bos, eos, _, lead = FAMILIES[family]
    tokenizer = wrap("byte-level", bos, eos)
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Paris.")]
    item = encode(Row(1, messages=turns), tokenizer, template, 10_000)
    folds = family in ("gemma", "mistral", "phi3")
    assert ("system-folded" in item.notes) == folds
    text = tokenizer.decode(item.input_ids)
    assert text.count("Be brief.") == 1
    assert ("Be brief.\n\nHi" in text) == folds
    assert supervised(item, tokenizer)[0].startswith(lead + "Paris.")
    assert text.startswith(prompt_text(Row(1, messages=turns), tokenizer, template))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_make_the_training_text(family: str) -> None:
    template, bos, eos, end, lead = FAMILIES[family]
    tokenizer = wrap("byte-level", bos, eos)
    row = Row(1, messages=[user("A"), assistant("B"), user("C"), assistant("Paris.")])
    prompt = prompt_text(row, tokenizer, template)
    item = encode(row, tokenizer, template, 10_000)
    assert tokenizer.decode(item.input_ids) == f"{prompt}{lead}{answer_text(row)}{end}"


@pytest.mark.parametrize("kind", ["byte-level", "byte-level trimmed"])
def test_white_space_at_the_edges_of_an_answer(kind: str) -> None:
    tokenizer = wrap(kind)
    for answer in ("\n\nParis.", "  Paris. \n\n", "Paris.  "):
        item = encode(Row(1, messages=[user("A"), assistant(answer)]), tokenizer, ALPACA, 99)
        assert supervised(item, tokenizer) == [f"{answer}</s>"]


def test_a_token_across_the_start_counts_if_only_white_space_is_not_the_answer() -> None:
    spaced = ALPACA.replace(":\n", ": ")
    tokenizer = wrap()
    item = encode(Row(1, messages=[user("A"), assistant("capital")]), tokenizer, spaced, 99)
    assert tokenizer.convert_ids_to_tokens(item.input_ids[-2]) == "Ġcapital"
    assert supervised(item, tokenizer) == [" capital</s>"]
    backend = Tokenizer(models.WordLevel({"==": 0, "=": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    joined = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    glued = ALPACA.replace(":\n", "=")
    item = encode(Row(1, messages=[user("A"), assistant("= b")]), joined, glued, 99)
    assert item.input_ids[-3:] == [0, 2, joined.eos_token_id]
    assert item.labels[-3:] == [IGNORE, 2, joined.eos_token_id]


def test_the_default_templates_agree_with_and_without_their_marks() -> None:
    tokenizer = wrap()
    row = Row(1, messages=[user("A"), assistant("B \n"), user("C"), assistant("Paris.")])
    for template in (CHATML, HEADINGS):
        bare = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert bare != template
        assert encode(row, tokenizer, bare, 99) == encode(row, tokenizer, template, 99)


def test_marks_that_leave_the_end_of_turn_out_are_completed() -> None:
    tokenizer = wrap()
    template = QWEN.replace(
        "'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}",
        "'<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
        "{%- generation %}{{- message.content }}{%- endgeneration %}{%- else %}"
        "{{- message.content }}{%- endif %}{{- '<|im_end|>\n' }}",
    )
    assert "{%- generation %}" in template
    row = Row(1, messages=[user("A"), assistant("B"), user("C"), assistant("Paris.")])
    item = encode(row, tokenizer, template, 1000)
    assert supervised(item, tokenizer) == ["B<|im_end|>", "Paris.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_supervises_the_last_answer() -> None:
    tokenizer = wrap("byte-level", "<|endoftext|>", "<|im_end|>")
    turns = [user("A"), assistant("<think>x</think>\n\nB"), user("C"), assistant("Paris.")]
    item = encode(Row(1, messages=turns), tokenizer, QWEN3, 1000)
    assert supervised(item, tokenizer) == ["<think>\n\n</think>\n\nParis.<|im_end|>"]
    assert item.notes == ("last-answer-only",)
    single = encode(Row(1, messages=turns[2:]), tokenizer, QWEN3, 1000)
    assert single.notes == ()


def test_a_generation_prompt_that_conversations_do_not_keep_is_said() -> None:
    tokenizer = wrap()
    for answer in ("Paris.", "<thing", "<"):
        item = encode(Row(1, messages=[user("A"), assistant(answer)]), tokenizer, R1, 1000)
        assert supervised(item, tokenizer) == [f"{answer}</s>"]
        assert item.notes == ("generation-prompt",)
    kept = [user("A"), assistant("<think>\nhm</think>Paris.")]
    item = encode(Row(1, messages=kept), tokenizer, R1, 1000)
    assert (supervised(item, tokenizer), item.notes) == (["hm</think>Paris.</s>"], ())


def test_train_on_all_supervises_every_token_but_the_first() -> None:
    tokenizer = wrap()
    item = encode(Row(1, messages=[user("A"), assistant("B")]), tokenizer, MISTRAL, 1000, "all")
    assert item.labels == [IGNORE, *item.input_ids[1:]]


def test_text_rows() -> None:
    for adds_bos in (False, True):
        tokenizer = wrap("byte-level", adds_bos=adds_bos)
        assert uses_bos(tokenizer) == adds_bos
        row = Row(7, text="The capital of France is Paris.")
        item = encode(row, tokenizer, CHATML, 1000)
        start = "<s>" if adds_bos else ""
        assert tokenizer.decode(item.input_ids) == f"{start}{row.text}</s>"
        assert item.labels == [IGNORE, *item.input_ids[1:]]
        assert (item.line, item.notes) == (7, ())
        prompt = prompt_text(row, tokenizer, CHATML)
        assert prompt + answer_text(row) == start + str(row.text)
        assert prompt != start
        assert answer_text(row)


def test_eos_stays_supervised_where_it_is_also_the_padding_token() -> None:
    tokenizer = wrap()
    tokenizer.pad_token = tokenizer.eos_token
    item = encode(Row(1, messages=[user("A"), assistant("B")]), tokenizer, MISTRAL, 1000)
    assert item.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_truncation_keeps_the_left_and_counts_what_is_lost() -> None:
    tokenizer = wrap()
    row = Row(3, messages=[user("A"), assistant("Paris. " * 20)])
    whole = encode(row, tokenizer, MISTRAL, 1000)
    for length in (2, 5, len(whole.labels) - 1, len(whole.labels)):
        item = encode(row, tokenizer, MISTRAL, length)
        assert item.input_ids == whole.input_ids[:length]
        assert item.labels == whole.labels[:length]
        assert item.truncated == len(whole.labels) - length
        assert item.supervised_lost == whole.supervised - item.supervised
    nothing_left = encode(row, tokenizer, MISTRAL, 2)
    assert nothing_left.supervised == 0
    assert trainable([nothing_left, whole]) == [whole]
    with pytest.raises(UsageError, match="at least 2"):
        encode(row, tokenizer, MISTRAL, 1)


@given(st.text(max_size=80), st.integers(2, 9))
@settings(deadline=None, max_examples=40)
def test_a_long_text_becomes_pieces_that_lose_no_token(text: str, length: int) -> None:
    tokenizer = wrap("byte-level", adds_bos=True)
    row = Row(1, text=text)
    whole = encode(row, tokenizer, CHATML, 10_000)
    pieces = encode_rows([row], tokenizer, CHATML, length)
    predicted = [label for piece in pieces for label in piece.labels if label != IGNORE]
    assert predicted == whole.input_ids[1:]
    assert all(len(piece.input_ids) <= length for piece in pieces)
    for left, right in pairwise(pieces):
        assert right.input_ids[0] == left.input_ids[-1]


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@given(
    st.lists(words, min_size=2, max_size=6), st.sampled_from(sorted(FAMILIES)), st.integers(2, 80)
)
@settings(deadline=None, max_examples=80)
def test_labels_are_the_ids_or_nothing(texts: list[str], family: str, length: int) -> None:
    template, bos, eos, end, _ = FAMILIES[family]
    tokenizer = wrap("byte-level", bos, eos)
    turns = [
        (assistant if index % 2 else user)(text)
        for index, text in enumerate(texts[: len(texts) // 2 * 2])
    ]
    item = encode(Row(1, messages=turns), tokenizer, template, length)
    pairs = list(zip(item.input_ids, item.labels, strict=True))
    assert all(label in (token, IGNORE) for token, label in pairs)
    assert len(pairs) <= length
    if not item.truncated:
        assert item.labels[-1] == tokenizer.convert_tokens_to_ids(end)
        assert turns[-1]["content"].strip() in supervised(item, tokenizer)[-1]
    assert encode_rows([Row(1, messages=turns)], tokenizer, template, length) == [item]


def test_resolve_prefers_the_file_then_the_model_then_a_default(tmp_path: Path) -> None:
    tokenizer = wrap(adds_bos=True)
    template, origin = resolve(tokenizer)
    assert (template, "ChatML" in origin) == ("{{ bos_token }}" + CHATML, True)
    assert resolve(wrap())[0] == CHATML
    tokenizer.chat_template = MISTRAL
    assert resolve(tokenizer) == (MISTRAL, "the model's own")
    path = tmp_path / "t.jinja"
    path.write_text(QWEN, encoding="utf-8")
    assert resolve(tokenizer, path) == (QWEN, str(path))
    backend = build("byte-level", ["<s>", "</s>", "<unk>"])
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template, origin = resolve(plain)
    assert (template, "headings" in origin) == (HEADINGS, True)
    row = Row(1, messages=[user("A"), assistant("B")])
    item = encode(row, plain, template, 99)
    assert plain.decode(item.input_ids) == "### User:\nA\n\n### Assistant:\nB</s>"
    assert stop_ids(plain, template) == [plain.eos_token_id]
    with pytest.raises(UsageError, match="neither a chat template nor an eos token"):
        resolve(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for m in messages %}{{ m.content }\n{% endfor %}", "is broken, line 1"),
        ("{{ raise_exception('no') }}", "refuses a plain conversation: no"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write the assistant's text"),
    ],
)
def test_an_unusable_template_is_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        resolve(wrap(), path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        resolve(wrap(), tmp_path / "none.jinja")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        resolve(wrap(), tmp_path / "latin")


def test_a_refused_row_is_named_by_its_line() -> None:
    picky = MISTRAL.replace("{{ bos_token }}", "{% if messages[0].content == 'x' %}"
                            "{{ raise_exception('not x') }}{% endif %}")  # fmt: skip
    with pytest.raises(UsageError, match=r"line 12: the chat template refuses it: not x"):
        encode(Row(12, messages=[user("x"), assistant("y")]), wrap(), picky, 99)


def test_every_note_is_explained() -> None:
    assert set(NOTES) == {"system-folded", "last-answer-only", "generation-prompt", "eos-appended"}
