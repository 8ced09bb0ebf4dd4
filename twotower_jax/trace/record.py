"""What is known of how texts came to be; S is the size of a block."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pass:
    """One denoiser pass over a block.

    A position that is masked here, and not in the next pass or after the last, was committed in this one. A rule that
    masks again may mask it later.

    Attributes:
      predicted: (S,) token ids.
      confidence: (S,) the probability of each predicted token.
      masked: (S,) before the pass.
    """

    predicted: list[int]
    confidence: list[float]
    masked: list[bool]


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a row.

    Attributes:
      start: the number among the row's new tokens of the block's first new one.
      passes: in order.
      tokens: (S,) after the last pass.
      given: leading positions that were known before; in verified decoding 1, the row's last token.
      kept: how many of the tokens after those became text: up to the row's end, or the accepted drafts.
      correction: verified: the token that the context tower wrote after the accepted drafts.
    """

    start: int
    passes: list[Pass]
    tokens: list[int]
    given: int
    kept: int
    correction: int | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt's text.

    Attributes:
      prompt: (P,) token ids.
      mode: one of `decoding.MODES`.
      tokens: (N,) new ones.
      probabilities: (N,) that they had when they were committed.
      blocks: none where one token is written at a time.
      end: `stop`, `length`, `cancelled` or `error`.
      forwards: passes of the denoiser, and of the context tower, the prompt's counted as one.
    """

    prompt: list[int]
    mode: str
    tokens: list[int]
    probabilities: list[float]
    blocks: list[Block]
    end: str
    forwards: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Rows, and what is needed to draw them.

    Attributes:
      rows: in the prompts' order.
      model: its name.
      settings: what was asked for.
      pieces: the text of every token id that occurs; `⟨id⟩` in a model without a tokenizer.
    """

    rows: list[Row]
    model: str
    settings: dict[str, str | float]
    pieces: dict[int, str]
