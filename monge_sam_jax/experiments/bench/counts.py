"""What there is to count in a compiled program, in XLA's text of it."""

import math
import re
from typing import NamedTuple

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
# The shape of the result, the operation, and the rest of the line.
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")
CHANNEL = re.compile(r"channel_id=(\d+)")
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
KERNELS = ("fusion", "custom-call")

# Numbers in a collective's operands and results. XLA packs scalars into one, so that a few hundred
# of them do not yet tell of an array.
LARGE = 1024


class Counts(NamedTuple):
    """Of a program; what is in the body of a loop counts once.

    Attributes:
      kernels: fusions and custom calls. On a GPU each is a launch, which small steps are bound by.
      instructions: of all computations, in XLA's language for the device.
      all_reduces: started in a run of the program, as those below.
      all_gathers: likewise.
      reduce_scatters: likewise.
      other_collectives: all-to-alls and permutations.
      large_collectives: of all kinds, of more than `LARGE` numbers.
    """

    kernels: int = 0
    instructions: int = 0
    all_reduces: int = 0
    all_gathers: int = 0
    reduce_scatters: int = 0
    other_collectives: int = 0
    large_collectives: int = 0

    @property
    def collectives(self) -> int:
        """Of all kinds and sizes."""
        return self.all_reduces + self.all_gathers + self.reduce_scatters + self.other_collectives

    def plus(self, other: "Counts") -> "Counts":
        """Those of two programs together."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(text: str) -> Counts:
    """Counts what is in the text of a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text`.

    >>> scale = "  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%scale"
    >>> count(scale)[:2]
    (1, 1)
    >>> total = "  %z = (f32[], f32[64,64]{1,0}) all-reduce(%n, %g), channel_id=1, to_apply=%add"
    >>> count(total).all_reduces, count(total).large_collectives
    (1, 1)
    """
    kernels, instructions, large = 0, 0, 0
    started = {"all-reduce": 0, "all-gather": 0, "reduce-scatter": 0}
    others = 0
    computation, staged = "", set()
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            computation = header[1]
        if not (found := INSTRUCTION.match(line)):
            continue
        shape, operation, rest = found.groups()
        instructions += 1
        kernels += operation in KERNELS
        if not (collective := COLLECTIVE.fullmatch(operation)):
            continue
        kind = collective[1]
        # A TPU's asynchronous collective is written out in each fusion that it runs beside.
        if "chain_id=" in rest and (channel := CHANNEL.search(rest)):
            if (kind, channel[1]) in staged:
                continue
            staged.add((kind, channel[1]))
        if computation.startswith("all-reduce-scatter"):  # so a TPU has it
            kind = "reduce-scatter"
        if kind in started:
            started[kind] += 1
        else:
            others += 1
        large += _numbers(shape) > LARGE
    return Counts(
        kernels=kernels,
        instructions=instructions,
        all_reduces=started["all-reduce"],
        all_gathers=started["all-gather"],
        reduce_scatters=started["reduce-scatter"],
        other_collectives=others,
        large_collectives=large,
    )


def _numbers(shape: str) -> int:
    """How many a result holds, a tuple of arrays or one.

    >>> _numbers("(f32[], bf16[8,3]{1,0:T(8,128)(2,1)})")
    25
    """
    return sum(math.prod(map(int, filter(None, d.split(",")))) for d in SHAPE.findall(shape))
