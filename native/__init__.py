"""Floor 0, mechanism: kernels that touch bytes, without the GIL. Imports nothing else of ours."""
