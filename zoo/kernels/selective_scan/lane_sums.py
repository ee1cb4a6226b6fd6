"""Sums over the 32 channels of a warp, of which each thread holds 16 states of one, without shared memory.

A thread's states times its channel's number, as eight pairs of bf16, are operand B of matrix products m16n8k16 just as
they lie in its registers: thread l has rows of l % 4, column l // 4. Operand A, a constant of zeros and ones, adds the
four threads of a column and puts the 16 states into 16 rows. A product m16n8k4 of tf32 then adds the eight columns, and
puts the sums of one step into one of eight columns of its own.

Triton's products have their operands go through shared memory: as many instructions, but the walk waits for them. This
relies on where Triton has the elements of a tile (32, 1, 4, 4) as in `kernels`: a channel a thread, states in order.
Sums, a tile of 8 bits, 16 of which make four registers, are for the functions of this module alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of two registers of pairs, four numbers, row l // 4 of operand A takes number (l // 4) % 4: in one operand rows 0 to 3
# and 12 to 15, in the other rows 4 to 11. ptxas would copy registers that it finds equal before each product, so one of
# them has 1 / 2 for 1, and states 4 to 11 come out doubled.
_OPERAND = """{
.reg .u32 group, part, value, low, high; .reg .pred p;
mov.u32 group, %laneid; shr.u32 group, group, 2;
and.b32 part, group, 1; setp.eq.u32 p, part, 1; selp.u32 value, ONE0000, ONE, p;
and.b32 part, group, 2; setp.eq.u32 p, part, 0; selp.u32 low, value, 0, p; selp.u32 high, 0, value, p;
setp.lt.u32 p, group, 4;
selp.u32 $A, low, 0, p; selp.u32 $B, 0, low, p; selp.u32 $C, high, 0, p; selp.u32 $D, 0, high, p;
}"""


def _operand(one: str, registers: str) -> tl.constexpr:
    text = _OPERAND.replace("ONE", one)
    for name, register in zip("ABCD", registers, strict=True):
        text = text.replace(f"${name}", f"${register}")
    return tl.constexpr(text)


OUTER = _operand("0x3f00", "0123")
INNER = _operand("0x3f80", "1032")
# A byte for each of eight columns: the first of 2.0 in a thread of that column, zero elsewhere.
COLUMNS = tl.constexpr("""{
.reg .u32 group, low, value; .reg .pred p;
mov.u32 group, %laneid; shr.u32 group, group, 2; setp.lt.u32 p, group, 4;
and.b32 low, group, 3; shl.b32 low, low, 3; shl.b32 value, 0x40, low;
selp.u32 $0, value, 0, p; selp.u32 $1, 0, value, p; mov.u32 $2, 0; mov.u32 $3, 0;
}""")

# $0 sums, $4 sums so far, $8 x, $24 v, $40 outer, $44 inner, $48 columns, $52 the byte of the step's column.
_PRODUCTS = """{
.reg .b32 x<8>, v, column; .reg .f32 a<4>, b<4>, zero;
cvt.rn.bf16x2.f32 v, $24, $24; mov.f32 zero, 0f00000000;
PAIRS
MMA {a0, a1, a2, a3}, {$40, $41, $42, $43}, {x0, x1}, {zero, zero, zero, zero};
MMA {a0, a1, a2, a3}, {$44, $45, $46, $47}, {x2, x3}, {a0, a1, a2, a3};
MMA {b0, b1, b2, b3}, {$44, $45, $46, $47}, {x4, x5}, {zero, zero, zero, zero};
MMA {b0, b1, b2, b3}, {$40, $41, $42, $43}, {x6, x7}, {b0, b1, b2, b3};
add.f32 a0, a0, a1; add.f32 b0, b2, b3; mov.b32 x0, a0; mov.b32 x1, b0;
prmt.b32 column, $HALF, 0, $52;
mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {x0, x1}, {column}, {$4, $5, $6, $7};
}"""
_PAIRS = "\n".join(
    f"cvt.rn.bf16x2.f32 x{i}, ${9 + 2 * i}, ${8 + 2 * i}; mul.rn.bf16x2 x{i}, x{i}, v;" for i in range(8)
)
_PRODUCTS = _PRODUCTS.replace("PAIRS", _PAIRS).replace("MMA", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
FIRST_COLUMNS = tl.constexpr(_PRODUCTS.replace("$HALF", "$48"))
LAST_COLUMNS = tl.constexpr(_PRODUCTS.replace("$HALF", "$49"))

# Thread l has states l // 4 and l // 4 + 8 of columns 2 (l % 4), to be stored at $8, and 2 (l % 4) + 1, at $24. $40:
# how many steps there are.
_STORE = """{
.reg .u32 group, step, at; .reg .u64 offset, even, odd; .reg .f32 outer, inner, v<4>; .reg .pred p;
mov.u32 at, %laneid; shr.u32 group, at, 2; and.b32 step, at, 3;
mad.lo.u32 at, step, 16, group; mul.wide.u32 offset, at, 4; add.u64 even, $8, offset; add.u64 odd, $24, offset;
setp.lt.u32 p, group, 4; selp.f32 outer, 0f3f800000, 0f3f000000, p; sub.f32 inner, 0f3fc00000, outer;
mul.f32 v0, $4, outer; mul.f32 v1, $5, outer; mul.f32 v2, $6, inner; mul.f32 v3, $7, inner;
setp.lt.s32 p, step, $40;
@p st.global.f32 [even], v0; @p st.global.f32 [even + 32], v2;
@p st.global.f32 [odd], v1; @p st.global.f32 [odd + 32], v3;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
}"""
STORE = tl.constexpr(_STORE)
STORE_ALL = tl.constexpr(_STORE.replace("@p ", "").replace("setp.lt.s32 p, step, $40;\n", ""))


def _registers(*inputs: str) -> tl.constexpr:
    """Four outputs, and of each input a kind of register for each time that it takes one."""
    return tl.constexpr(",".join(["=r"] * 4 + [kind for each in inputs for kind in each]))


MAKE = _registers("r" * 4)
ADD = _registers("r" * 4, "f" * 16, "f" * 16, "r" * 12, "r" * 16)
SAVE = _registers("f" * 4, "l" * 16, "l" * 16, "r" * 16)


@triton.jit
def constants(x):
    """What `lane_sums` is given, for tiles of x's shape. Of an x that were constant Triton would make one register."""
    x = (x > 0).to(tl.int8)
    outer = tl.inline_asm_elementwise(OUTER, MAKE, [x], tl.int8, True, 16)
    inner = tl.inline_asm_elementwise(INNER, MAKE, [x], tl.int8, True, 16)
    return outer, inner, tl.inline_asm_elementwise(COLUMNS, MAKE, [x], tl.int8, True, 16)


@triton.jit
def lane_sums(sums, x, v, given, column: tl.constexpr):
    """`sums` and sum_d x_dn v_d, x (32, 1, 4, 4), v (32, 1), in a column of the 8 that is still zero."""
    v = tl.broadcast_to(v[:, :, None, None], x.shape)
    outer, inner, columns = given
    # Byte 3 is that of the column, the others are of a zero.
    byte = tl.full(x.shape, column % 4 * 0x1000 + 0x444, tl.int32)
    products: tl.constexpr = FIRST_COLUMNS if column < 4 else LAST_COLUMNS
    return tl.inline_asm_elementwise(products, ADD, [sums, x, v, outer, inner, columns, byte], tl.int8, True, 16)


@triton.jit
def store_lane_sums(even, odd, sums, live, WHOLE: tl.constexpr):
    """Columns 2 i and 2 i + 1 in rows i of `even` and `odd`, (steps, 16) in fp32, of which there are `live`."""
    even = tl.broadcast_to(even.to(tl.int64, bitcast=True), sums.shape)
    odd = tl.broadcast_to(odd.to(tl.int64, bitcast=True), sums.shape)
    live = tl.full(sums.shape, 4 if WHOLE else live, tl.int32)
    store: tl.constexpr = STORE_ALL if WHOLE else STORE
    tl.inline_asm_elementwise(store, SAVE, [sums, even, odd, live], tl.int8, False, 16)
