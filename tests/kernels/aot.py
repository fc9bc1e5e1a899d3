"""Compile kernels for GPUs that are not here, and read registers, spills, memory and instructions from the binaries.

Run as a program, without TRITON_INTERPRET: it reads jobs as JSON from standard input and writes what it found.
A job names a module, a kernel, the types of its arguments, its constants, launch options and architectures.
"""

import importlib
import json
import re
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


def examine(compiled):
    """Return registers and spilled bytes of a thread, bytes of shared memory, and the instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], **run).stdout
        sass = subprocess.run([tool, "-sass", file.name], **run).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
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
    found = [[{"capability": c, **examine(compile_for(c, job))} for c in job["capabilities"]] for job in jobs]
    json.dump(found, sys.stdout)
