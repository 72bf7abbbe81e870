"""What a launch cost."""

import functools
from collections import Counter
from dataclasses import dataclass

_KINDS = ("load", "store", "atomic")


@dataclass
class Row:
    """One PTX statement that ran. units: sectors, wavefronts or divergent branches; ideal: their least."""

    line: int
    source: str
    text: str
    kind: str
    warps: int
    lanes: int
    units: int
    ideal: int
    bytes: int


@dataclass
class Report:
    """Counters of one launch."""

    executed: int
    counted: list[list]  # what each row holds
    classes: dict[str, dict[str, int]]
    mma_flops: dict[str, int]
    buffers: dict[str, dict[str, int]]

    @classmethod
    def of(cls, r: dict) -> "Report":
        buffers = {b.pop("name"): b for b in r["buffers"]}
        return cls(r["executed"], r["rows"], r["classes"], r["mma_flops"], buffers)

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Made when they are asked for: of most launches they are not."""
        return [Row(*row) for row in self.counted]

    def total(self, what: str, *kinds: str) -> int:
        return sum(c[what] for k, c in self.classes.items() if not kinds or k in kinds)

    @property
    def lane_instructions(self) -> int:
        return self.total("lanes")

    @property
    def sectors(self) -> tuple[int, int]:
        """32-byte sectors of global requests: touched, and the least that their bytes need."""
        return tuple(self.total(u, *(f"{k}_global" for k in _KINDS), "async_copy") for u in ("units", "ideal"))

    @property
    def wavefronts(self) -> tuple[int, int]:
        """Shared-memory wavefronts: taken, and without bank conflicts."""
        return tuple(self.total(u, *(f"{k}_shared" for k in _KINDS), "matrix") for u in ("units", "ideal"))

    @property
    def divergent_branches(self) -> int:
        return self.total("units", "branch")

    @property
    def compulsory_bytes(self) -> tuple[int, int]:
        """Distinct bytes read and written: the traffic no kernel can avoid."""
        return sum(b["read"] for b in self.buffers.values()), sum(b["written"] for b in self.buffers.values())

    def conflicts(self) -> list[Row]:
        """Shared-memory statements that took more wavefronts than they need."""
        return [r for r in self.rows if ("shared" in r.kind or r.kind == "matrix") and r.units > r.ideal]

    def table(self, top: int = 20) -> str:
        """Source lines by warp instructions executed."""
        warps, units, ideal = Counter(), Counter(), Counter()
        for r in self.rows:
            for sums, n in ((warps, r.warps), (units, r.units), (ideal, r.ideal)):
                sums[r.source or "?"] += n
        lines = [f"{n:12} {units[s]:10} {ideal[s]:10}  {s}" for s, n in warps.most_common(top)]
        return "\n".join([f"{'warp instr.':>12} {'units':>10} {'ideal':>10}  source", *lines])
