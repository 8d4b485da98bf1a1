"""Number formats: the dtypes of a run (`policy`), its matmul (`matmul`), 8-bit blocks (`quantize`)."""
