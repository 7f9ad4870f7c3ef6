"""Applications of the library, not part of it: the demo, the benchmark of ops, the doctor."""
