"""Compiles every kernel that we ship for every GPU family, on a machine without a GPU, and records what came out.

    python benchmarks/aot.py [--arch 90] [--only NAME] [--few] [--out benchmarks/results/aot.jsonl]

Registers, stack, spills (accesses to local memory) and instructions are read from the machine code that would run,
shared memory is what a launch will ask for. Exit status 1 when a kernel spills, needs more shared memory than the GPU
has, or lacks its tensor-core instruction or asynchronous copies. `TRITON_INTERPRET` must not be set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

# Triton 3.10 switches the default off; the kernels count on fused multiply-adds.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may use."""
REGISTER_FILE = 65536


def variants(archs: tuple[int, ...]) -> Iterator:
    """Attention, its gradients, and selection."""
    from psa.backends.triton.selection_variants import selection_variants
    from psa.backends.triton.variants import shipped_variants

    yield from shipped_variants(archs=archs)
    yield from selection_variants(archs=archs)


def compile_variant(variant) -> dict:
    """One row of the results.

    Raises:
        Exception: whatever Triton or ptxas says when a kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=dict(variant.options))
    registers, stack, code = _inspect(compiled.asm["cubin"])
    warps = compiled.metadata.num_warps
    per_sm = REGISTER_FILE // max(1, registers * warps * 32)
    if compiled.metadata.shared:
        per_sm = min(per_sm, SHARED_LIMIT[variant.arch] // compiled.metadata.shared)
    return {
        "name": variant.name,
        "arch": variant.arch,
        "registers": registers,
        "stack_bytes": stack,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared_bytes": compiled.metadata.shared,
        "warps": warps,
        "blocks_per_sm": min(per_sm, 64 // warps),
        "tensor_core": sorted(set(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA)\b", code))),
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", code)),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "triton": triton.__version__,
    }


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the disassembly."""
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, code = (
            subprocess.run([_tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    if found is None:
        raise ValueError(f"cuobjdump said something unexpected: {used}")
    return int(found[1]), int(found[2]), code


def faults(variant, row: dict) -> list[str]:
    """What must not ship."""
    found = []
    if row["spills"]:
        found.append(f"spills {row['stack_bytes']} bytes in {row['spills']} instructions")
    if row["shared_bytes"] > SHARED_LIMIT[variant.arch]:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, {SHARED_LIMIT[variant.arch]} are there")
    if variant.instruction and not any(re.fullmatch(variant.instruction, name) for name in row["tensor_core"]):
        found.append(f"lacks {variant.instruction}, has {row['tensor_core'] or 'no tensor-core instruction'}")
    if variant.copies and not row["async_copies"]:
        found.append("has no asynchronous copies")
    return found


def compile_all(selected: Iterable, out: Path | None, few: bool = False) -> int:
    """Compiles and reports; the number of kernels with faults, of ``few`` of those that do not compile."""
    failed = 0
    file = out.open("w") if out else None
    for variant in selected:
        try:
            row = compile_variant(variant)
        except Exception as error:
            failed += 1
            print(f"{variant.name:58} does not compile: {error}", flush=True)
            continue
        wrong = [] if few else faults(variant, row)
        failed += bool(wrong)
        if file:
            file.write(json.dumps(row | {"faults": wrong}) + "\n")
            file.flush()
        cores = ",".join(row["tensor_core"]) or "-"
        print(
            f"{variant.name:58} {row['registers']:4} regs {row['spills']:3} spills {row['shared_bytes'] >> 10:4} KiB "
            f"{row['warps']:2} warps {row['blocks_per_sm']:2}/SM {cores:10} {row['async_copies']:3} copies  "
            f"{'; '.join(wrong)}",
            flush=True,
        )
    if file:
        file.close()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="regular expression on the variant's name")
    parser.add_argument("--few", action="store_true", help="one of each kernel, judged by whether it compiles alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    archs = tuple(options.arch or sorted(SHARED_LIMIT))
    chosen = [v for v in variants(archs) if re.search(options.only, v.name)]
    if options.few:
        chosen = list({(v.arch, v.name.split("/")[0]): v for v in reversed(chosen)}.values())
    failed = compile_all(chosen, options.out, options.few)
    print(f"{len(chosen)} kernels, {failed} with faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
