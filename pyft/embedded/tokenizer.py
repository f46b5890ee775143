"""The embedded model's tokenizer: sentencepiece BPE, also as a transformers fast tokenizer.

Text is not normalized at all and has no space put before it, so that code, newlines and indentation
come back as they went in. Characters outside the vocabulary become byte pieces. The one exception
is U+2581, which sentencepiece itself uses for a space and which therefore comes back as one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
MARKERS = (USER, ASSISTANT, SYSTEM, END)
SPACE = "\u2581"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ('user', 'system') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': write system, user or assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(texts: Iterable[str], vocab_size: int = 4096) -> bytes:
    """A sentencepiece BPE model (serialized) of `vocab_size` pieces; deterministic."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        user_defined_symbols=[*MARKERS, "\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every split of every learned piece into two known pieces, best-scored piece first."""
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(ranked)]


def save(model: bytes, directory: Path, max_length: int) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json for the serialized model."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = [pieces.id_to_piece(index) for index in range(len(pieces))]
    vocab = {name: index for index, name in enumerate(names)}
    symbols = {UNK, BOS, EOS, PAD, *MARKERS, "\n"}
    scores = {
        name: pieces.get_score(index)
        for index, name in enumerate(names)
        if name not in symbols and not pieces.is_byte(index)
    }
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(vocab, scores), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(name, normalized=False, special=True)
            for name in (UNK, BOS, EOS, PAD, *MARKERS)
        ]
    )
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(MARKERS),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    fast.save_pretrained(directory, save_jinja_files=False)
