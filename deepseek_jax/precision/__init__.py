"""Number formats: what a run computes in (`policy`), the matmul every weight goes through (`matmul`), 8-bit blocks
(`quantize`).
"""
