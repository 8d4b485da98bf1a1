"""Number formats: which dtype a run computes in (`policy`) and the one matmul every weight goes through (`matmul`)."""
