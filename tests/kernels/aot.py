"""Compile kernels for GPUs that are not here, and read registers, spills, memory and instructions from the binaries.

Run as a program, without TRITON_INTERPRET: it reads jobs as JSON from standard input and writes what it found.
A job names a module, a kernel, the types of its arguments, its constants, launch options and architectures.
"""

import bisect
import importlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path


def compile_for(capability, job):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job["module"]), job["kernel"]).compiled
    names = kernel.arg_names
    signature = {name: "constexpr" if name in job["constants"] else job["types"][name] for name in names}
    constants = {(names.index(name),): value for name, value in job["constants"].items()}
    wide = [(names.index(name),) for name, kind in signature.items() if kind.startswith("*") or name in job["aligned"]]
    source = ASTSource(kernel, signature, constants, attrs={key: [["tt.divisibility", 16]] for key in wide})
    options = {"enable_fp_fusion": True, **job["options"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(name):
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def code_of(cubin):
    """Return the machine code of a binary: the content of its ``.text`` sections (ELF, 64 bits)."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    start = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin[start + name :].startswith(b".text.")
    )


def instructions_of(codes, capability):
    """Return the instructions of each code, disassembled at once: to start takes the tool longer than to read them."""
    target = f"SM{capability}{'a' if capability >= 90 else ''}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [tool("nvdisasm"), "--binary", target, "--print-code", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    ends = [*itertools.accumulate(map(len, codes))]
    found = [[] for _ in codes]
    for address, name in lines:
        found[bisect.bisect(ends, int(address, 16))].append(name)
    assert all(found), "nothing was disassembled"
    return found


def examine(compiled, instructions):
    """Return registers and spilled bytes of a thread, bytes of shared memory, and what matters of the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "loads": sorted({name for name in instructions if name.startswith("LDG")}),
        "stores": sorted({name for name in instructions if name.startswith("STG")}),
        "double": sorted({name for name in instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|[FI]2F\.F64", name)}),
        "products": sorted({name for name in instructions if re.match(r"HGMMA|HMMA|UTC\w*MMA", name)}),
    }  # fmt: skip


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    found = [[{"capability": capability} for capability in job["capabilities"]] for job in jobs]
    for capability in sorted({capability for job in jobs for capability in job["capabilities"]}):
        chosen = [(results, job) for results, job in zip(found, jobs, strict=True) if capability in job["capabilities"]]
        compiled = [compile_for(capability, job) for _, job in chosen]
        codes = [code_of(binary.asm["cubin"]) for binary in compiled]
        for (results, job), binary, names in zip(chosen, compiled, instructions_of(codes, capability), strict=True):
            results[job["capabilities"].index(capability)] |= examine(binary, names)
    json.dump(found, sys.stdout)
