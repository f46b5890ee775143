"""Rows to token ids and labels, through the model's own chat template.

The loss is on the answers only: of a conversation, the tokens of each assistant turn and the token
that ends the turn, nothing else. Where those tokens are is never guessed from ids. The whole
conversation is rendered once and tokenized once, with character offsets; the characters of an
answer are found in the rendering:

    prompt   = render(messages before the answer, with the generation prompt)
    through  = render(messages up to the answer)      = prompt + answer + closing
    closing  = what the template writes after a last answer, found once with a probe

so an answer starts where the prompt ends and stops after the first control token of the closing.
An earlier answer counts only if the full rendering begins with that same text; templates that
rewrite earlier turns (say, that strip thinking) fail this, and then the last answer alone is
supervised and the row carries a note. Templates with {% generation %} marks state the characters
themselves. A template that writes no control token after the answer gets eos appended, so that a
tuned model stops. What was done to a row stands in `Encoded.notes`, whose codes `NOTES` explains.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from pyft.errors import UsageError
from pyft.finetune.data import Message, Row, Severity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORE = -100  # the label of a token that is not supervised
DATE = "26 Jul 2024"  # what Llama 3 templates print as today: the same ids on any day
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "PyftProbe"}]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADINGS = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

NOTES: dict[str, tuple[Severity, str]] = {
    "system-folded": (
        "info",
        "have a system message, which the chat template does not take: "
        "it was put before the first user message",
    ),
    "last-answer-only": (
        "warning",
        "are trained on their last answer only, because the chat template rewrites earlier turns: "
        "give one row per answer, or another template with --chat-template",
    ),
    "generation-prompt": (
        "warning",
        "train without the end of the generation prompt, which the chat template "
        "does not keep in a conversation: give a template that does with --chat-template",
    ),
    "eos-appended": (
        "info",
        "got eos after the last answer, because the chat template ends it with no control token",
    ),
}


@dataclass(frozen=True)
class Encoded:
    """One sequence of at most max_length tokens.

    `labels` has the length of `input_ids` and is not shifted: a label is the token's own id, or
    -100 where there is no loss; the first label is always -100, as nothing precedes it.
    `truncated` counts the tokens cut at the right, `supervised_lost` the supervised among them.
    """

    input_ids: list[int]
    labels: list[int]
    line: int
    truncated: int = 0
    supervised_lost: int = 0
    notes: tuple[str, ...] = ()

    @property
    def supervised(self) -> int:
        """The number of tokens that have a loss."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class _Ending:
    """What a template writes after a last answer, and how much of it belongs to the answer."""

    closing: str
    end_of_turn: str
    stops: bool  # end_of_turn is a control token: a model that writes it can be stopped


class _Refused(Exception):
    """The template raised an error for this conversation."""


def resolve(tokenizer: "Tokenizer", override: str | Path | None = None) -> tuple[str, str]:
    """The chat template to use and where it is from, in words.

    `override` is the path of a Jinja file. Without it: the model's own; failing that ChatML, where
    its marks are in the vocabulary; failing that plain headings, which need no new tokens and end
    each answer with eos. Raises UsageError for a file or template that cannot be used.
    """
    if override is not None:
        return _read_template(Path(override), tokenizer), str(override)
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        _ending(tokenizer, own)
        return str(own), "the model's own"
    bos = "{{ bos_token }}" if uses_bos(tokenizer) else ""
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return bos + CHATML, "pyft's ChatML (the model has no template)"
    if tokenizer.eos_token is None:
        raise UsageError(
            "the tokenizer has neither a chat template nor an eos token, so a tuned model could "
            "not stop: set eos_token in tokenizer_config.json or give --chat-template"
        )
    return bos + HEADINGS, "pyft's plain headings (the model has no template)"


def _read_template(path: Path, tokenizer: "Tokenizer") -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"chat template {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"chat template {path} is not UTF-8: save it as UTF-8") from None
    try:
        _ending(tokenizer, template)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return template


def uses_bos(tokenizer: "Tokenizer") -> bool:
    """Whether the tokenizer itself starts a text with bos."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def stop_ids(tokenizer: "Tokenizer", template: str) -> list[int]:
    """The ids that end an answer: eos, and the template's end of turn where it is another."""
    ending = _ending(tokenizer, template)
    ids = [tokenizer.eos_token_id]
    if ending.stops:
        ids += tokenizer(ending.end_of_turn, add_special_tokens=False).input_ids[-1:]
    return sorted({token for token in ids if token is not None})


def control_tokens(tokenizer: "Tokenizer", special_only: bool = True) -> list[str]:
    """The strings the tokenizer reads as one reserved token, longest first; no white space."""
    names = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or not special_only:
            names.add(token.content)
    return sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))


# Rendering


def _render(
    tokenizer: "Tokenizer", template: str, messages: list[Message], prompt: bool = False
) -> str:
    """The conversation as text; `prompt` adds the generation prompt. Raises _Refused."""
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            date_string=DATE,
        )
    except TemplateSyntaxError as error:
        raise UsageError(f"the chat template is broken, line {error.lineno}: {error}") from None
    except (TemplateError, TypeError) as error:
        raise _Refused(str(error)) from None
    return str(text)


def _marked(
    tokenizer: "Tokenizer", template: str, messages: list[Message]
) -> list[tuple[int, int]]:
    """The characters inside {% generation %} marks, one pair per mark, in order."""
    from transformers.utils.chat_template_utils import render_jinja_template

    names: dict[str, Any] = {**tokenizer.special_tokens_map, "date_string": DATE}
    rendered: Any = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **names
    )
    return list(rendered[1][0])


@lru_cache(maxsize=8)
def _ending(tokenizer: "Tokenizer", template: str) -> _Ending:
    """Read off a probe conversation. Raises UsageError for a template that cannot render it."""
    try:
        text = _render(tokenizer, template, PROBE)
    except _Refused as error:
        raise UsageError(f"the chat template refuses a plain conversation: {error}") from None
    probe = PROBE[1]["content"]
    if probe not in text:
        raise UsageError(
            "the chat template does not write the assistant's text: give one with --chat-template"
        )
    closing = text[text.rindex(probe) + len(probe) :]
    names = control_tokens(tokenizer, special_only=False)
    control = re.search("|".join(map(re.escape, names)), closing) if names else None
    if control:
        return _Ending(closing, closing[: control.end()], True)
    return _Ending(closing, closing.rstrip(), False)


def _conversation(
    row: Row, tokenizer: "Tokenizer", template: str
) -> tuple[list[Message], str, list[str]]:
    """(messages, their rendering, notes); a system message the template does not take is folded."""
    messages = row.messages or []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    try:
        text = _render(tokenizer, template, messages)
        if system is None or system.strip() in text:
            return messages, text, []
    except _Refused as error:
        if system is None:
            raise UsageError(f"line {row.line}: the chat template refuses it: {error}") from None
    first = messages[1]
    folded = [{**first, "content": f"{system}\n\n{first['content']}"}, *messages[2:]]
    try:
        return folded, _render(tokenizer, template, folded), ["system-folded"]
    except _Refused as error:
        raise UsageError(f"line {row.line}: the chat template refuses it: {error}") from None


def _answers(
    row: Row, tokenizer: "Tokenizer", template: str
) -> tuple[str, list[tuple[int, int]], list[str]]:
    """(text, the characters of each supervised answer with its end of turn, notes)."""
    messages, full, notes = _conversation(row, tokenizer, template)
    ending = _ending(tokenizer, template)
    marks = _marked(tokenizer, template, messages) if MARK.search(template) else []
    spans = []
    for start, end in marks:
        has = full.endswith(ending.end_of_turn, start, end)
        more = 0 if has or not full.startswith(ending.end_of_turn, end) else len(ending.end_of_turn)
        spans.append((start, end + more))
    if not spans:
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for index in indices:
            last = index == indices[-1]
            through = full if last else _render(tokenizer, template, messages[: index + 1])
            start, whole = _start(tokenizer, template, messages[:index], through)
            end = len(through) - len(ending.closing)
            if not through.endswith(ending.closing) or not through[start:end].strip():
                raise UsageError(
                    f"line {row.line}: no answer is left in what the chat template writes: "
                    "give another one with --chat-template"
                )
            end += len(ending.end_of_turn)
            if not last and full[:end] != through[:end]:
                notes.append("last-answer-only")
                continue
            if not whole:
                notes.append("generation-prompt")
            spans.append((start, end))
        if "last-answer-only" in notes:
            spans = spans[-1:]
    if not ending.stops:
        notes.append("eos-appended")
    return full[: spans[-1][1]], spans, list(dict.fromkeys(notes))


def _start(
    tokenizer: "Tokenizer", template: str, before: list[Message], through: str
) -> tuple[int, bool]:
    """Where the answer starts in `through`, and whether the whole generation prompt precedes it."""
    prompt = _render(tokenizer, template, before, prompt=True)
    if through.startswith(prompt):
        return len(prompt), True
    differing = (i for i, (a, b) in enumerate(zip(prompt, through, strict=False)) if a != b)
    shared = next(differing, min(len(prompt), len(through)))
    names = control_tokens(tokenizer, special_only=False)
    ends = [m.end() for m in re.finditer("|".join(map(re.escape, names)), through[:shared])]
    return (ends[-1] if ends else shared), False


# Encoding


def encode(
    row: Row,
    tokenizer: "Tokenizer",
    template: str,
    max_length: int,
    train_on: Literal["answer", "all"] = "answer",
) -> Encoded:
    """Token ids and labels of one row, cut at the right to `max_length` tokens.

    A text is [bos] + text + eos, all of it supervised; a conversation is supervised on its answers,
    or on everything with train_on="all". Raises UsageError where the template or the tokenizer
    cannot serve the row.
    """
    if row.messages is None:
        ids = _text_ids(row, tokenizer)
        return _cut(ids, list(ids), row.line, max_length, ())
    if not tokenizer.is_fast:
        raise UsageError(
            "the tokenizer gives no character offsets, which the loss on answers needs: "
            "add tokenizer.json to the model directory"
        )
    text, spans, notes = _answers(row, tokenizer, template)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoding.input_ids)
    chosen = _inside(text, encoding.offset_mapping, spans)
    if "eos-appended" in notes and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        chosen.append(True)
    if train_on == "all":
        chosen = [True] * len(ids)
    labels = [token if inside else IGNORE for token, inside in zip(ids, chosen, strict=True)]
    return _cut(ids, labels, row.line, max_length, tuple(notes))


def encode_rows(
    rows: list[Row],
    tokenizer: "Tokenizer",
    template: str,
    max_length: int,
    train_on: Literal["answer", "all"] = "answer",
) -> list[Encoded]:
    """`encode` for each row, except that a long text becomes several sequences and loses nothing.

    Each piece of a text starts with the last token of the piece before, which predicts its first.
    """
    encoded = []
    for row in rows:
        if row.messages is not None:
            encoded.append(encode(row, tokenizer, template, max_length, train_on))
            continue
        ids = _text_ids(row, tokenizer)
        for start in range(0, max(1, len(ids) - 1), max(1, max_length - 1)):
            piece = ids[start : start + max_length]
            encoded.append(_cut(piece, list(piece), row.line, max_length, ()))
    return encoded


def trainable(encoded: list[Encoded]) -> list[Encoded]:
    """The sequences with at least one supervised token; `quality.check` reports the others."""
    return [item for item in encoded if item.supervised]


def _text_ids(row: Row, tokenizer: "Tokenizer") -> list[int]:
    """[bos] + text + eos; a text that already begins or ends with them does not get them twice."""
    ids = list(tokenizer(row.text or "", add_special_tokens=False, verbose=False).input_ids)
    if uses_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def _cut(
    ids: list[int], labels: list[int], line: int, max_length: int, notes: tuple[str, ...]
) -> Encoded:
    if max_length < 2:
        raise UsageError(f"max_length is {max_length}: write at least 2")
    labels[:1] = [IGNORE] * len(labels[:1])
    lost = sum(label != IGNORE for label in labels[max_length:])
    truncated = max(0, len(ids) - max_length)
    return Encoded(ids[:max_length], labels[:max_length], line, truncated, lost, notes)


def _inside(text: str, offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens lie in a span, up to white space at the token's edges.

    Byte-level tokenizers may trim white space off the offsets; a token of white space alone is then
    an empty range at its own end.
    """

    def within(first: int, last: int, start: int, end: int) -> bool:
        if first == last:
            return start < first <= end
        outside = text[first : max(first, start)] + text[min(last, end) : last]
        return first < end and last > start and not outside.strip()

    return [any(within(*token, *span) for span in spans) for token in offsets]


# Prompts for generation


def prompt_text(row: Row, tokenizer: "Tokenizer", template: str) -> str:
    """What to give a model to have the last answer written: tokenize it without special tokens.

    Of a text it is the first half, cut at white space, after bos where the tokenizer uses it.
    """
    if row.messages is not None:
        messages, _, _ = _conversation(row, tokenizer, template)
        return _render(tokenizer, template, messages[:-1], prompt=True)
    bos = str(tokenizer.bos_token) if uses_bos(tokenizer) else ""
    return bos + _halves(row.text or "")[0]


def answer_text(row: Row) -> str:
    """The answer the data expects after `prompt_text`."""
    return row.messages[-1]["content"] if row.messages else _halves(row.text or "")[1]


def _halves(text: str) -> tuple[str, str]:
    space = re.compile(r"\s").search(text, len(text) // 2)
    cut = space.start() if space else len(text) // 2
    return text[:cut], text[cut:]
