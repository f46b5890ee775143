"""Train the embedded model from the reStructuredText sources of Python's documentation.

    apt-get download python3.11-doc && dpkg-deb -x python3.11-doc_*.deb doc
    python -m pyft.embedded.pretrain --docs doc/usr/share/doc/python3.11/html/_sources \\
        --output model --minutes 60

Writes a checkpoint directory (bf16 safetensors, tokenizer) into `--output` and the held-out text
into `--general`. Each document is tokenized as `<s> text </s>`; all are joined, in a new order each
epoch, and cut into windows of 256 tokens, later of 512 and at the end of 1024. Muon (Jordan et al.
2024, as in torch.optim) for the matrices of the layers, AdamW for embeddings and norms, one
learning rate for both: linear warmup, then a cosine to a twentieth of the peak. The schedule
follows the share of the token budget or of the time budget that is spent, whichever is larger.
`--start-from` goes on from the weights of an earlier run, with a schedule of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from pyft.embedded import tokenizer as tokenizers_
from pyft.embedded.corpus import general_text, read_documents
from pyft.ops.shared.matmul import has_matmul

MAX_LENGTH = 1024
CONTEXTS = (
    (0.6, 256),
    (0.9, 512),
    (1.0, MAX_LENGTH),
)  # up to this share of the run: tokens in a window


def new_model(vocab_size: int, pad: int, bos: int, eos: int, end: int) -> LlamaForCausalLM:
    """A Llama of 5.5 million parameters in fp32, with fresh weights from torch's global seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eos, end], pad_token_id=pad, do_sample=False
    )
    return model


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Write weights (bf16) and configuration; each file appears whole under its name."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config)
    torch.nn.Module.to(copy, torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config = model.generation_config
    partial = directory / f".partial-{os.getpid()}"
    copy.save_pretrained(partial)
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)
        path.replace(directory / path.name)
    partial.rmdir()


def windows(
    documents: list[torch.Tensor], generator: torch.Generator, size: int
) -> Iterator[torch.Tensor]:
    """One epoch of windows [size]: documents joined in random order, windows in random order."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = torch.cat([documents[index] for index in order])
    offset = int(torch.randint(size, (1,), generator=generator))
    count = (len(stream) - offset) // size
    for index in torch.randperm(count, generator=generator).tolist():
        yield stream[offset + index * size : offset + (index + 1) * size]


def batches(
    documents: list[torch.Tensor], generator: torch.Generator, size: int, tokens: int
) -> Iterator[torch.Tensor]:
    """Batches [tokens // size, size] without end, epoch after epoch."""
    rows: list[torch.Tensor] = []
    while True:
        for window in windows(documents, generator, size):
            rows.append(window)
            if len(rows) == tokens // size:
                yield torch.stack(rows)
                rows = []


@torch.no_grad()
def general_loss(model: LlamaForCausalLM, encoded: list[list[int]]) -> float:
    """Mean negative log-likelihood (nats per token) over sequences, each `<s> passage`."""
    model.eval()
    total, count = 0.0, 0
    for ids in encoded:
        row = torch.tensor([ids[:MAX_LENGTH]])
        total += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    model.train()
    return total / count


def learning_rate(peak: float, done: float, warmup: float = 0.02, floor: float = 0.05) -> float:
    """Linear warmup over the first `warmup` of the run, then a cosine to `floor` of the peak."""
    if done < warmup:
        return peak * max(done / warmup, 0.01)
    return peak * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    )


def optimizers_for(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (steps scaled to AdamW's size), AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def pretrain(options: argparse.Namespace) -> dict[str, float]:
    """Train and save; returns tokens, seconds and the held-out loss in nats per token."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    train_documents, kept_aside = read_documents(options.docs)
    options.output.mkdir(parents=True, exist_ok=True)
    pieces = tokenizers_.train((d.text for d in train_documents), options.vocab_size)
    tokenizers_.save(pieces, options.output, MAX_LENGTH)
    general = general_text(kept_aside, train_documents)
    options.general.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in general), encoding="utf-8"
    )

    tokenizer = AutoTokenizer.from_pretrained(options.output)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    documents = [
        torch.tensor([bos, *tokenizer.encode(d.text, add_special_tokens=False, verbose=False), eos])
        for d in train_documents
    ]
    held_out = [[bos, *tokenizer.encode(row["text"], add_special_tokens=False)] for row in general]
    corpus_tokens = sum(map(len, documents))
    end = next(iter(tokenizer.encode(tokenizers_.END, add_special_tokens=False)))
    model = new_model(len(tokenizer), pad, bos, eos, end)
    if options.start_from:
        earlier = LlamaForCausalLM.from_pretrained(options.start_from, dtype=torch.float32)
        model.load_state_dict(earlier.state_dict())
    print(f"{corpus_tokens} training tokens, {sum(map(len, held_out))} held-out tokens", flush=True)
    print(f"{model.num_parameters()} parameters", flush=True)

    optimizers = optimizers_for(model)
    generator = torch.Generator().manual_seed(options.seed)
    streams = {
        size: batches(documents, generator, size, options.batch_tokens) for _, size in CONTEXTS
    }
    began = saved = time.monotonic()
    tokens, step, done = 0, 0, 0.0
    while done < 1:
        rows = next(streams[next(size for share, size in CONTEXTS if done < share)])
        with torch.autocast("cpu", torch.bfloat16, enabled=has_matmul(torch.bfloat16)):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options.lr, done)
            optimizer.step()
        model.zero_grad()
        tokens, step = tokens + rows.numel(), step + 1
        now = time.monotonic()
        done = max(tokens / options.tokens, (now - began) / (60 * options.minutes))
        if step % 10 == 0:
            rate = tokens / (now - began)
            print(
                f"step {step}  tokens {tokens}  loss {loss.item():.4f}"
                f"  {rate:.0f} tokens/s  {done:.1%}",
                flush=True,
            )
        if now - saved > 60 * options.save_minutes:
            save_model(model, options.output)
            print(f"saved; held-out loss {general_loss(model, held_out):.4f}", flush=True)
            saved = time.monotonic()
    seconds = time.monotonic() - began
    save_model(model, options.output)
    result = {"tokens": tokens, "seconds": seconds, "held_out_loss": general_loss(model, held_out)}
    print(json.dumps(result), flush=True)
    return result


def main() -> dict[str, float]:
    """Read the options and train; returns what `pretrain` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, required=True, help="the _sources directory")
    parser.add_argument("--output", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument(
        "--general", type=Path, help="the held-out text (default: general.jsonl beside --output)"
    )
    parser.add_argument("--start-from", type=Path, help="a checkpoint whose weights to go on from")
    parser.add_argument(
        "--tokens", type=float, default=math.inf, help="stop after this many tokens"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument(
        "--save-minutes", type=float, default=5.0, help="minutes between checkpoints"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if math.isinf(options.tokens) and math.isinf(options.minutes):
        parser.error("no budget: give --tokens, --minutes or both")
    if options.batch_tokens < MAX_LENGTH:
        parser.error(f"--batch-tokens {options.batch_tokens}: give {MAX_LENGTH} or more")
    options.general = options.general or options.output.parent / "general.jsonl"
    return pretrain(options)


if __name__ == "__main__":
    main()
