"""qcompiler: a compiler for non-uniform quantization."""
