"""What a launch cost."""

from dataclasses import dataclass, field


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
    rows: list[Row]
    classes: dict[str, dict[str, int]]
    mma_flops: dict[str, int]
    buffers: dict[str, dict[str, int]] = field(default_factory=dict)

    def total(self, what: str, *kinds: str) -> int:
        return sum(c[what] for k, c in self.classes.items() if not kinds or k in kinds)

    @property
    def lane_instructions(self) -> int:
        return self.total("lanes")

    @property
    def sectors(self) -> tuple[int, int]:
        """32-byte sectors of global requests: touched, and the least that their bytes need."""
        kinds = ("load_global", "store_global", "atomic_global", "async_copy")
        return self.total("units", *kinds), self.total("ideal", *kinds)

    @property
    def wavefronts(self) -> tuple[int, int]:
        """Shared-memory wavefronts: taken, and without bank conflicts."""
        kinds = ("load_shared", "store_shared", "atomic_shared", "matrix")
        return self.total("units", *kinds), self.total("ideal", *kinds)

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
        lines: dict[str, list[int]] = {}
        for r in self.rows:
            entry = lines.setdefault(r.source or "?", [0, 0, 0])
            entry[0] += r.warps
            entry[1] += r.units
            entry[2] += r.ideal
        order = sorted(lines.items(), key=lambda kv: -kv[1][0])[:top]
        return "\n".join(
            [f"{'warp instr.':>12} {'units':>10} {'ideal':>10}  source"]
            + [f"{w:12} {u:10} {i:10}  {s}" for s, (w, u, i) in order]
        )
