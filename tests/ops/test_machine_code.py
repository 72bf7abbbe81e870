"""What the compiler made of the kernels' inner loops: the built extension, disassembled."""

import os
import re
import shutil
import subprocess

import pytest

import resnet_fast._C

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 machine code")

# A label, as `0000000000086170 <_ZN...>:`, and an instruction, as `   86174:\tvmovaps %zmm0,0x40(%rsp)`.
LABEL = re.compile(r"[0-9a-f]+ <(\S+)>:")
INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\t(.*)")
JUMP = re.compile(r"j\w+\s+([0-9a-f]+)")


@pytest.fixture(scope="module")
def functions():
    """Each function's name, and its instructions as (address, text); kernels of two instruction sets share names."""
    objdump = shutil.which("objdump")
    assert objdump, "the tests need objdump, of the binutils that linked the extension"
    command = [objdump, "-d", "--no-show-raw-insn", "-j", ".text", resnet_fast._C.__file__]
    found = []
    for line in subprocess.check_output(command, text=True).splitlines():
        if label := LABEL.match(line):
            found.append((label[1], []))
        elif instruction := INSTRUCTION.match(line):
            found[-1][1].append((int(instruction[1], 16), instruction[2]))
    return found


def of_register(functions, register):
    return [(name, body) for name, body in functions if any(f"%{register}" in text for _, text in body)]


def innermost_loops(body):
    """Texts of the instructions between a target and a jump back to it that hold no other such pair."""
    index = {address: i for i, (address, _) in enumerate(body)}
    loops = []
    for i, (_, text) in enumerate(body):
        if (jump := JUMP.match(text)) and index.get(int(jump[1], 16), i) < i:
            loops.append((index[int(jump[1], 16)], i))
    for begin, end in loops:
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops):
            yield [text for _, text in body[begin:end]]


def test_outputs_are_prefetched(functions):
    """GCC drops calls of functions that do nothing but prefetch."""
    kernel = re.compile(r"_ZN.*?_GLOBAL__N_1\w*?(winograd|outer_tile|run_tile)I")
    found = [(match[1], body) for name, body in functions if (match := kernel.match(name))]
    assert {name for name, _ in found} == {"winograd", "outer_tile", "run_tile"}
    # float and double on three instruction sets.
    assert sum(name == "winograd" for name, _ in found) == 6
    for name, body in found:
        assert any("prefetcht" in text for _, text in body), name


@pytest.mark.parametrize(("register", "accumulators"), [("zmm", 24), ("ymm", 12)])
def test_inner_loops_keep_their_accumulators_in_registers(functions, register, accumulators):
    """12 x 2 accumulators of 512 bits, 6 x 2 of 256: every one an FMA, and no vector goes to the stack and back."""
    fma = re.compile(rf"vfmadd\w+\s.*%{register}")
    bodies = [
        loop
        for _, body in of_register(functions, register)
        for loop in innermost_loops(body)
        if sum(bool(fma.match(text)) for text in loop) >= accumulators
    ]
    # GEMMs of tiles broadcast one factor and store nothing on the way; the transforms and batch norm's sums do not.
    broadcast = re.compile(r"vbroadcasts|\{1to\d+\}")
    result = re.compile(rf"vmov\w+\s+%{register}\d+,[^%]*\((?!%r[sb]p)")
    bodies = [loop for loop in bodies if any(map(broadcast.search, loop)) and not any(map(result.match, loop))]
    # Direct and Winograd, float and double: full panels and half panels.
    assert len(bodies) >= 4
    for loop in bodies:
        stack = [text for text in loop if re.search(rf"\(%r[sb]p.*%{register}|%{register}\d+,.*\(%r[sb]p", text)]
        assert not stack, "\n".join(loop)


def test_inner_loops_of_bf16_keep_their_accumulators_in_registers(functions):
    """12 x 2 and 14 x 2 accumulators: two loads of the filter and a broadcast a row beside the products of pairs."""
    found = set()
    for _, body in of_register(functions, "zmm"):
        for loop in innermost_loops(body):
            products, broadcasts = (sum(word in text for text in loop) for word in ("vdpbf16ps", "vpbroadcastd"))
            found.add((products, broadcasts))
            if products >= 24:
                stack = [text for text in loop if re.search(r"\(%r[sb]p.*%zmm|%zmm\d+,.*\(%r[sb]p", text)]
                assert not stack, "\n".join(loop)
    assert {(24, 12), (28, 14), (28, 28)} <= found  # direct; Winograd, full panels and half panels
