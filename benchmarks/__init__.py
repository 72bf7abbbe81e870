"""The fused networks and operators beside what else runs them: ``python -m benchmarks`` or ``pytest benchmarks``."""
