"""From a kernel's PTX to what the machine executes: every operand a register, constants among them."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LANES, SHARED_BASE = 32, 1024
POISON = 0xFFFFFFFFFFFFFFFF
"""What registers hold before they are written: NaN in every floating-point format."""
SKIPPED = r"fence\..*|bar\.warp\.sync|wgmma\.fence.*|griddepcontrol\..*"
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z")
SIZES = ("%nctaid.x", "%nctaid.y", "%nctaid.z")
OPERANDS = {"pack": 3, "unpack": 3, "mma": 14, "bar": 1, "shfl": 3, "redux": 3}
"""Of instructions of warps.h, by the beginning of their names."""
KINDS_OF_PRODUCT = {"bf16": 0, "f16": 1, "tf32": 2}
BYTES = {"64": 8, "32": 4, "16": 2, "8": 1}


@cache
def kinds() -> dict[str, int]:
    """Instruction names as the C files list them, and their numbers there."""
    return {name: number for number, (_, name) in enumerate(_listed())}


@cache
def sources() -> dict[str, int]:
    """How many operands an instruction of lanes.h reads."""
    return {name: ("ONE", "TWO", "THREE").index(what) + 1 for what, name in _listed() if what != "WARP"}


def _listed() -> list[tuple[str, str]]:
    text = (HERE / "lanes.h").read_text() + (HERE / "warps.h").read_text()
    return re.findall(r"^(ONE|TWO|THREE|WARP)\((\w+)", text, re.MULTILINE)


@dataclass
class Program:
    """One kernel.

    Attributes:
        parameters: the type of each, by its place.
        registers: the number of each register, by its name; constants and parameters are registers too.
        values: what constants hold.
        code: int32 [instructions, 7]: kind, guard or -1, whether that is negated, first operand, how many operands, how
            many of them are results, line of the text.
        operands: int32, numbers of registers.
    """

    name: str
    parameters: list[str] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)
    code: np.ndarray = field(default_factory=lambda: np.empty((0, 7), np.int32))
    operands: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, value: int) -> int:
        place = self.register(f"={value & POISON}")
        self.values[place] = value & POISON
        return place

    def initial(self, parameters: list[int], grid: tuple[int, ...]) -> np.ndarray:
        """uint64 [registers, 32] as a warp finds them."""
        found = np.full((len(self.registers), LANES), POISON, np.uint64)
        for name, place in self.registers.items():
            if name.startswith("%p") and name[2:].isdigit():
                found[place] = 1
        for place, value in self.values.items():
            found[place] = value
        for place, value in enumerate(parameters):
            found[self.register(f"param{place}")] = value & POISON
        for axis, size in zip("xyz", grid, strict=True):
            found[self.register(f"%nctaid.{axis}")] = size
        return found


def number(text: str) -> int | None:
    """A constant's bits, or None."""
    if re.fullmatch(r"0f[0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"0d[0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return None


def results(kind: int, used: list[int]) -> int:
    """How many of an instruction's operands it writes; they come first."""
    name = list(kinds())[kind]
    if name.startswith(("ld_", "ldmatrix")):
        return len(used) - 2
    if name.startswith(("st_", "stmatrix", "cp_", "bar", "bra", "ret", "nothing", "wgmma")):
        return 0
    return {"unpack": 2, "mma": 4}.get(name.split("_")[0], 1)


class Reader:
    """Reads one entry function."""

    def __init__(self, text: str):
        self.text = text
        found = re.search(r"\.entry (\w+)\((.*?)\)", text, re.S)
        if found is None:
            raise ValueError("no entry function")
        self.program = Program(found[1], re.findall(r"\.param \.(\w+)", found[2]))
        self.declared = tuple(re.findall(r"\.reg \.\w+\s+(%\w+)<", text))
        for place in range(len(self.program.parameters)):
            self.program.register(f"param{place}")
        for name in (*SPECIAL, *SIZES):
            self.program.register(name)
        self.start = found.end()

    def statements(self):
        """Line, and a label or an instruction."""
        first = self.text[: self.start].count("\n")
        for place, line in enumerate(self.text[self.start :].split("\n")):
            if line.startswith("}"):
                return
            line = line.split("//")[0].strip()
            if label := re.fullmatch(r"(\$\w+):", line):
                yield first + place + 1, "label", label[1]
                continue
            line = line.strip("{} \t") if re.fullmatch(r"[{}]", line) else line
            for part in filter(None, (piece.strip() for piece in line.split(";"))):
                if not part.startswith("."):
                    yield first + place + 1, "instruction", part

    def read(self) -> Program:
        labels, lines = {}, []
        for line, what, text in self.statements():
            if what == "label":
                labels[text] = len(lines)
            else:
                lines.append((line, text))
        code, operands = [], []
        for line, text in lines:
            try:
                kind, guard, negated, used = self.instruction(text, labels)
            except (KeyError, ValueError, IndexError) as error:
                raise NotImplementedError(f"line {line}: {text}") from error
            code.append((kind, guard, negated, len(operands), len(used), results(kind, used), line))
            operands += used
        self.program.code = np.array(code, np.int32)
        self.program.operands = np.array(operands, np.int32)
        return self.program

    def operand(self, text: str) -> list[int]:
        """Registers: one, two of an address and its offset, or those of a list."""
        text = text.strip()
        if text.startswith("{"):
            return [place for part in text.strip("{}").split(",") for place in self.operand(part)]
        if text.startswith("["):
            inner = text.strip("[]").replace(" ", "")
            if param := re.fullmatch(r"\w+_param_(\d+)", inner):
                return [self.program.register(f"param{param[1]}")]
            base, _, offset = inner.partition("+")
            return [*self.operand(base), self.program.constant(number(offset or "0") or 0)]
        if text in (*SPECIAL, *SIZES, "_") or re.sub(r"\d+$", "", text) in self.declared:
            return [self.program.register(text)]
        if text == "global_smem":
            return [self.program.constant(SHARED_BASE)]
        value = number(text)
        if value is None:
            raise ValueError(text)
        return [self.program.constant(value)]

    def instruction(self, text: str, labels: dict[str, int]) -> tuple[int, int, int, list[int]]:
        guard, negated = -1, 0
        if guarded := re.match(r"@(!?)(%p\d+)\s+", text):
            guard, negated = self.program.register(guarded[2]), int(bool(guarded[1]))
            text = text[guarded.end() :]
        opcode, *rest = text.split(maxsplit=1)
        parts = [part.strip() for part in re.split(r",(?![^{]*})", rest[0])] if rest else []
        name, parts = self.named(opcode, parts)
        if name == "bra":
            return kinds()[name], guard, negated, [labels[parts[0]]]
        used = [place for part in parts for place in self.operand(part)]
        wanted = 1 + sources()[name] if name in sources() else OPERANDS.get(name.split("_")[0], len(used))
        if len(used) != wanted:
            raise ValueError(f"{name} of {len(used)} operands")
        return kinds()[name], guard, negated, used

    def named(self, opcode: str, parts: list[str]) -> tuple[str, list[str]]:
        """The machine's name of an instruction, and its operands as it takes them."""
        if re.fullmatch(SKIPPED, opcode):
            return "nothing", []
        if opcode.startswith("ld.param"):
            return ("cvt_s64_s32" if opcode.endswith(".s32") and parts[0].startswith("%rd") else "mov_b64"), parts
        if opcode.startswith("mov.b") and parts[0].startswith("{"):
            return f"unpack_{opcode[4:]}", parts
        if opcode.startswith("mov.b") and parts[1].startswith("{"):
            return f"pack_{opcode[4:]}", parts
        if found := re.fullmatch(r"(ld|st)\.(global|shared)(?:::cta)?(?:\.v\d)?\.(\w+)", opcode):
            return "_".join(found.groups()).replace("_u", "_b").replace("_f", "_b"), parts
        if found := re.match(r"(ldmatrix|stmatrix)", opcode):
            return found[1] + ("_trans" if ".trans" in opcode else ""), parts
        if found := re.fullmatch(r"shfl\.sync\.(\w+)\.b32", opcode):
            if parts[3] not in ("31", "0"):
                raise ValueError("a shuffle in a part of a warp")
            return f"shfl_{found[1]}", parts[:3]
        if opcode.startswith("redux.sync"):
            return "redux_" + opcode[11:].replace(".", "_"), parts
        if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", opcode):
            return "cp_async", parts
        if found := re.match(r"(cp\.async|wgmma)\.(commit|wait)_group", opcode):
            return f"{found[1].replace('.', '_')}_{found[2]}_group", parts
        if found := re.match(r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(\w+)\.", opcode):
            return f"mma_{found[1]}", parts
        if found := re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+\.f32\.(\w+)\.", opcode):
            result, left, right, add, *rest = parts
            held, flips = left.startswith("{"), rest[2:]
            flips = ["0", *flips] if held else flips
            flips = [*flips, "0", "0"][:2]
            kind = KINDS_OF_PRODUCT[found[2]]
            return "wgmma_mma", [found[1], str(kind), str(int(held)), right, add, *rest[:2], *flips, left, result]
        if opcode in ("bra.uni", "bra", "ret"):
            return opcode[:3], parts
        if opcode == "bar.sync":
            return "bar_sync", parts
        name = re.sub(r"\.(ftz|full)\b", "", opcode)
        name = re.sub(r"^(add|sub|fma|div)\.(rn|approx)", r"\1", name)
        if name in ("max.f32", "min.f32") and len(parts) == 4:
            name = name.replace(".", "3.")
        return name.replace(".", "_"), parts


def read(text: str) -> Program:
    """The program of PTX with one entry function.

    Raises:
        NotImplementedError: with the first instruction that the machine does not know.
    """
    return Reader(text).read()
