"""What nvcc made of the CUDA kernels: the machine code that the extension holds, for every architecture in it.

    for kernel in gate.kernels():
        assert kernel.spills == 0 and kernel.count("LDGSTS.128")

It is read from the built module with the cuobjdump and nvdisasm of the Triton wheel: no GPU, no compilation.
"""

import collections
import concurrent.futures
import functools
import os
import pathlib
import re
import tempfile
from dataclasses import dataclass

from ptxsim import sass

import resnet_fast._C

_NAME = r"_ZN11resnet_fast4cuda\d+([a-z_0-9]+_kernel)I(6__half|13__nv_bfloat16|f|d)((?:L[bi]\d+E)*)E"
_STAGE_NAME = r"(residual_stage_\w+)_(float16|bfloat16|float32)"
_TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}


@dataclass(frozen=True)
class Binary(sass.Code):
    """One kernel for one architecture. values: of its template's arguments after the type, a convolution's tile or
    flags; shared: static bytes a block."""

    stem: str  # "conv_bn_relu_fwd_kernel"
    dtype: str
    values: tuple[int, ...]

    @functools.cached_property
    def _loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop."""
        at = {line: i for i, line in enumerate(self.lines) if line.endswith(":")}
        targets = ((i, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(self.lines))
        return [(at[m[1] + ":"], i) for i, m in targets if m and at[m[1] + ":"] < i]

    @functools.cached_property
    def main_loop(self) -> collections.Counter:
        """Opcodes of the innermost loop that has most of the products."""
        products = next((p for p in ("HGMMA", "HMMA") if self.count(p)), "FFMA")
        bodies = [sass.opcodes(self.lines[first : last + 1]) for first, last in self._loops]
        return max(bodies, key=lambda body: (sass.count(body, products), -body.total()))

    @functools.cached_property
    def inner_loops(self) -> list[collections.Counter]:
        """Opcodes of the loops with products that hold no other loop with some."""
        bodies = {loop: sass.opcodes(self.lines[loop[0] : loop[1] + 1]) for loop in self._loops}
        busy = [loop for loop, body in bodies.items() if sass.count(body, "HMMA")]
        return [bodies[a] for a in busy if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in busy)]


@functools.cache
def kernels() -> tuple[Binary, ...]:
    with tempfile.TemporaryDirectory() as folder:
        sass.tool("cuobjdump", "-xelf", "all", str(pathlib.Path(resnet_fast._C.__file__).resolve()), cwd=folder)
        cubins = sorted(pathlib.Path(folder).glob("*.cubin"))
        assert cubins, "the extension holds no CUDA kernels: it was built without nvcc"
        # The tools are processes of their own: threads are enough to keep the cores busy.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return tuple(b for binaries in pool.map(_read, cubins) for b in binaries)


def _read(cubin):
    found = []
    for mangled, code in sass.read(cubin.read_bytes(), int(re.search(r"sm_(\d+)", cubin.name)[1])).items():
        if m := re.fullmatch(_STAGE_NAME, mangled):
            what = mangled, m[2], ()
        else:
            m = re.match(_NAME, mangled)
            assert m, f"a kernel of another form: {mangled}"
            what = m[1], _TYPES[m[2]], tuple(map(int, re.findall(r"L[bi](\d+)E", m[3])))
        found.append(Binary(**vars(code), stem=what[0], dtype=what[1], values=what[2]))
    return found
