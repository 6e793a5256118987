"""A small GPT, written by hand, that decodes with the ops of cgkernels.

The model learns a nursery rhyme, character by character, with whole sequences and
`prefill_attention`. Then it generates one token at a time: `decode_attention` rotates the new
key, appends it to the cache and attends to all of it in one call, and `sample_logits` draws the
next character by temperature and top-p, with noise that depends on (seed, row, position) alone.

Prints the loss while it learns, the largest difference between the logits of cached decoding and
those of the whole sequence at once, and four continuations of one prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgkernels import decode_attention, prefill_attention, sample_logits

TEXT = """this is the house that jack built.
this is the malt that lay in the house that jack built.
this is the rat that ate the malt that lay in the house that jack built.
this is the cat that chased the rat that ate the malt that lay in the house that jack built.
"""
LETTERS = sorted(set(TEXT))
WIDTH, HEADS, LAYERS, LONGEST = 64, 4, 2, 256
SIZE = WIDTH // HEADS  # of one head


def rope_tables() -> tuple[Tensor, Tensor]:
    """cos and sin, (LONGEST, SIZE / 2): pair i turns by position / 100^(2 i / SIZE)."""
    angles = torch.outer(torch.arange(LONGEST), 100.0 ** (-torch.arange(0, SIZE, 2) / SIZE))
    return angles.cos(), angles.sin()


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """t (B, S, H, D) with the halves of each head turned by position, as decode_attention does."""
    a, b = t.chunk(2, -1)
    cos, sin = cos[: t.shape[1], None], sin[: t.shape[1], None]  # (S, 1, D / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache=None, lengths=None) -> Tensor:
        """x (B, S, WIDTH): whole sequences, or with a cache the tokens that come next."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, SIZE)).unbind(2)  # (B, S, H, D)
        if cache is None:
            attended = prefill_attention(rotated(q, *rope), rotated(k, *rope), v)
        else:
            attended = decode_attention(q, *cache, lengths, k_new=k, v_new=v, rope=rope)
        x = x + self.out(attended.flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens (B, S) to logits (B, S, letters)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))
        self.rope = rope_tables()

    def forward(self, tokens: Tensor, caches=None, lengths=None) -> Tensor:
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, self.rope, None if caches is None else caches[i], lengths)
        return self.head(self.norm(x))


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """prompt (B, P) and count tokens more, and the logits (B, P + count - 1, letters) of all."""
    rows, length = prompt.shape
    shape = (rows, length + count, HEADS, SIZE)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]  # keys, values
    lengths = torch.zeros(rows, dtype=torch.int64)
    tokens, new, logits = prompt, prompt, []
    for position in range(length, length + count):
        logits.append(model(new, caches, lengths))
        lengths += new.shape[1]
        token, _ = sample_logits(
            logits[-1][:, -1], temperature=0.7, top_p=0.9, seed=seed, position=position
        )
        new = token[:, None]
        tokens = torch.cat([tokens, new], 1)
    return tokens, torch.cat(logits, 1)


def main(steps: int = 300, count: int = 80) -> dict:
    """Trains, generates, prints, and returns what was printed."""
    torch.manual_seed(0)
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    windows = text.unfold(0, 65, 1)  # (places, 65)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}  loss {loss.item():.3f} nats a letter")

    prompt = torch.tensor([[LETTERS.index(letter) for letter in "this is the "]]).expand(4, -1)
    tokens, cached = generate(model, prompt, count, seed=0)
    with torch.no_grad():
        difference = (cached - model(tokens[:, :-1])).abs().max().item()
    print(f"cached logits and those of the whole sequence differ by at most {difference:.1e}")
    drawn = ["".join(LETTERS[i] for i in row) for row in tokens]
    for row in drawn:
        print(repr(row))
    return {"last loss": loss.item(), "difference": difference, "texts": drawn}


if __name__ == "__main__":
    main()
