"""What Triton's interpreter gets wrong, put right for tests: bfloat16, and in Triton 3.6 loops with numpy 2.4.

It keeps bfloat16 as integers: conversions truncate, and products, sums, reductions and `tl.dot` act on the bit
patterns. With these replacements kernels can be tested as they are.
"""

import numpy as np


def decode(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values):
    """Round to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def repair(interpreter, tl):
    """Replace the interpreter's casts, arithmetic, reductions and dot by ones that know bfloat16."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = cast(builder.cast_impl, interpreter, tl)
    builder.create_fp_to_fp = cast(builder.create_fp_to_fp, interpreter, tl)
    builder.binary_op = arithmetic(builder.binary_op, interpreter, tl)
    builder.unary_op = arithmetic(builder.unary_op, interpreter, tl)
    builder.create_dot = dot(builder.create_dot, interpreter, tl)
    repair_reductions(interpreter, tl)
    repair_bounds(interpreter)


def is_bf16(value, tl):
    return value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def floats(value, interpreter, tl):
    return interpreter.TensorHandle(decode(value.data), tl.float32) if is_bf16(value, tl) else value


def cast(original, interpreter, tl):
    def run(self, source, target, *rest):
        source = floats(source, interpreter, tl)
        if target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(encode(source.data.astype(np.float32)), tl.bfloat16)
        if target.scalar == tl.float32 and source.dtype.scalar == tl.float32:
            return source
        return original(self, source, target, *rest)

    return run


def arithmetic(original, interpreter, tl):
    def run(self, *operands):
        *values, operation = operands
        if not any(is_bf16(value, tl) for value in values):
            return original(self, *operands)
        result = original(self, *(floats(value, interpreter, tl) for value in values), operation)
        if result.data.dtype == np.bool_:
            return result
        return interpreter.TensorHandle(encode(result.data), tl.bfloat16)

    return run


def dot(original, interpreter, tl):
    def run(self, a, b, d, *rest):
        return original(self, floats(a, interpreter, tl), floats(b, interpreter, tl), d, *rest)

    return run


def repair_reductions(interpreter, tl):
    operations = interpreter.ReduceOps

    def apply(self, values, _original=operations.apply_impl):
        if not any(value.dtype.scalar == tl.bfloat16 for value in values):
            return _original(self, values)
        wide = tuple(self.to_tensor(decode(value.handle.data), tl.float32) for value in values)
        result = _original(self, wide)
        single = not isinstance(result, tuple | list)
        narrow = [self.to_tensor(encode(part.handle.data), tl.bfloat16) for part in ([result] if single else result)]
        return narrow[0] if single else narrow

    operations.apply_impl = apply


def repair_bounds(interpreter):
    """Let arrays of one number be bounds of loops: numpy 2.4 converts none, and Triton 3.6 asks it to."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch
